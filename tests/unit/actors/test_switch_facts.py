from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.replica_status import ReplicaStatus
from actors.switch_facts import ComingOnGpus, memory_of_switch
from cluster.config import CollectionConfig
from cluster.errors import Exhausted
from cluster.gpu_memory import host_load_bytes
from cluster.index_policy import MEMORY_MARGIN
from cluster.index_spec import IndexSpec
from cluster.placement import ReplicaKey

MIB = 1024**2
CONFIG = CollectionConfig(8, replicas=2, shards=2)


def status(node: str, available: int, *segments: tuple[int, int]) -> ReplicaStatus:
    """A replica with segments of so many MiB and points, on a node with so many MiB."""
    facts: tuple[dict[str, Any], ...] = tuple({"predicted_bytes": s * MIB, "count": count} for s, count in segments)
    return ReplicaStatus("ready", node=node, segments=facts, node_memory=(available * MIB, 1_000 * MIB))


def keyed(*statuses: ReplicaStatus) -> dict[ReplicaKey, ReplicaStatus]:
    keys = [ReplicaKey("words", shard, number) for shard in range(2) for number in range(2)]
    return dict(zip(keys, statuses, strict=False))


def test_what_replicas_have_loaded_and_what_is_coming_is_index_and_ids() -> None:
    statuses = keyed(status("a", 500, (10, MIB), (20, MIB)), status("b", 400), status("a", 450), status("b", 600))
    told = memory_of_switch("words", CONFIG, statuses, [(100, MIB), (50 * MIB, 0)])
    first, second = told.nodes
    assert (first.node, first.replicas, first.loaded) == ("a", 2, 30 * MIB + 2 * 8 * MIB)
    assert first.beside == pytest.approx((100 + 8 * MIB + 50 * MIB) * MEMORY_MARGIN, abs=2)
    assert (first.available, second.available) == (400 * MIB, 350 * MIB)  # the least that was told, less the spare
    assert (told.mode, told.unknown) == ("beside", 0)


def test_more_shards_than_before_have_replicas_that_do_not_run_yet() -> None:
    statuses = keyed(status("a", 100), status("b", 200))
    told = memory_of_switch("words", replace(CONFIG, shards=3), statuses, [(10 * MIB, 0)] * 3)
    assert sum(need.replicas for need in told.nodes) == 6
    assert told.nodes[1].replicas > told.nodes[0].replicas
    with pytest.raises(Exhausted, match="memory of the switch"):
        memory_of_switch("words", replace(CONFIG, shards=3), statuses, [(80 * MIB, 0)] * 3)


def test_replicas_on_gpus_have_the_ids_on_the_host_and_the_index_there() -> None:
    """What is free of the GPU is bounded by the share of it that a replica has."""
    gpu = {"total_bytes": 1_000 * MIB, "free_bytes": 700 * MIB, "used_bytes": 300 * MIB, "share": 0.5}
    segments = (
        {"predicted_bytes": 90 * MIB, "count": MIB, "device": "gpu", "gpu_predicted_bytes": 80 * MIB}
        | {"gpu_measured_bytes": 70 * MIB},
        {"predicted_bytes": 90 * MIB, "count": 0, "device": "gpu", "gpu_predicted_bytes": None}
        | {"gpu_measured_bytes": None},  # not on the GPU now
    )
    running = replace(status("a", 500), segments=segments, gpu=gpu)
    one = replace(CONFIG, shards=1, replicas=1)
    key = ReplicaKey("words", 0, 0, 0.5)
    told = memory_of_switch("words", one, {key: running}, [(100 * MIB, 2 * MIB)], ComingOnGpus(0.5, [300 * MIB]))
    (node,) = told.nodes
    assert (node.loaded, node.beside) == (8 * MIB, pytest.approx(16 * MIB * MEMORY_MARGIN, abs=2))
    (short,) = told.short_of_gpu
    assert (short.gpu_loaded, short.gpu_coming, short.gpu_left) == (70 * MIB, 300 * MIB, 200 * MIB)
    impatient = replace(one, index=replace(one.index, gpu_full="refuse"))
    with pytest.raises(Exhausted, match="GPU memory of the switch"):
        memory_of_switch("words", impatient, {key: running}, [(0, 0)], ComingOnGpus(0.5, [300 * MIB]))


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_replicas_that_go_to_another_share_do_not_run_yet_and_refuse_nothing_there(before: float) -> None:
    gpu = {"total_bytes": 1_000 * MIB, "free_bytes": 10 * MIB, "used_bytes": 900 * MIB, "share": 1.0}
    running = replace(status("a", 500, (10, 0)), gpu=gpu if before else None)
    old = {ReplicaKey("words", 0, number, before): running for number in range(2)}
    coming = ComingOnGpus(0.25, [10**12])
    told = memory_of_switch("words", replace(CONFIG, shards=1), old, [(10**12, MIB)], coming)
    (node,) = told.nodes
    assert (told.mode, told.short_of_gpu, node.replicas, node.loaded) == ("beside", (), 2, 0)


def test_host_memory_that_a_graph_takes_while_it_is_loaded_counts_until_it_is_there() -> None:
    """Of replicas that run one after the other loads it; others are started, and load it all at once."""
    one = replace(CONFIG, shards=1)
    keys = [ReplicaKey("words", 0, number, 0.5) for number in range(2)]
    spec = IndexSpec("cagra", {"graph_degree": 32}, "float32", 0, "", rerank_store="rows", device="gpu")
    loading = host_load_bytes(spec, MIB)
    assert loading == MIB * (32 * 12 + 12)
    coming, on_gpus = [(0, MIB)], ComingOnGpus(0.5, [MIB], loading)
    segment: dict[str, Any] = {"predicted_bytes": 0, "count": MIB, "device": "gpu"}
    running = {key: replace(status("a", 900), segments=(segment,)) for key in keys}
    (node,) = memory_of_switch("words", one, running, coming, on_gpus).nodes
    assert node.loading == pytest.approx(loading * MEMORY_MARGIN, abs=1)
    assert node.beside == pytest.approx((2 * 8 * MIB + loading) * MEMORY_MARGIN, abs=3)
    small = {key: replace(each, node_memory=(500 * MIB, 1_000 * MIB)) for key, each in running.items()}
    with pytest.raises(Exhausted, match=r"node a needs 0\.46 GiB, 0\.44 GiB of it only while it loads, beside the"):
        memory_of_switch("words", one, small, coming, on_gpus)
    assert memory_of_switch("words", one, small, coming, ComingOnGpus(0.5, [MIB])).mode == "beside"

    others = {replace(key, num_gpus=1.0): each for key, each in running.items()}
    with pytest.raises(Exhausted, match=r"node a needs 0\.91 GiB, 0\.89 GiB of it only while it loads"):
        memory_of_switch("words", one, others, coming, on_gpus)


def test_replicas_that_do_not_tell_their_memory_refuse_nothing() -> None:
    unknown = replace(status("a", 1), node_memory=None)
    told = memory_of_switch("words", CONFIG, keyed(unknown, unknown), [(10**12, 0)] * 2)
    assert (told.mode, told.nodes, told.unknown) == ("beside", (), 4)
