"""Kinds that a config names for GPUs: options, limits, what they step down to; whether there are enough GPUs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid, Unavailable
from cluster.gpu_memory import GpuFacts
from cluster.gpu_policy import GPU_KINDS, GRAPH_DIMENSION_MAX, K_MAX, NPROBE_MAX, POINTS_MIN, gpu_for, k_limit, pq_sizes
from cluster.index_policy import choose, plan_index
from cluster.index_spec import ITOPK_MAX
from tests.unit.cluster.gpu_plans import H100, ROOMY, chosen, config_of, refused

# ---- kinds that were named


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_named_kind_is_taken_from_the_fewest_points_on(kind: str) -> None:
    spec = choose(POINTS_MIN, config_of(kind=kind, device="gpu"), H100)
    assert (spec.kind, spec.device, spec.reason) == (kind, "gpu", f"{kind} was asked for")


@pytest.mark.parametrize("kind", ["cagra", "ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("count", [0, 1, POINTS_MIN - 1])
def test_points_too_few_for_the_named_kind_are_scanned_on_the_gpu(kind: str, count: int) -> None:
    spec = choose(count, config_of(kind=kind), H100)
    assert (spec.kind, spec.device) == ("flat", "gpu")
    assert spec.reason == f"{kind} was asked for; {count} points are too few for it: from {POINTS_MIN} on"


@pytest.mark.parametrize(
    ("options", "params", "codes"),
    [
        ({"kind": "flat"}, {}, "float32"),
        ({"kind": "flat", "codes": "float16"}, {}, "float16"),
        ({"kind": "flat", "dtype": "float16"}, {}, "float16"),
        ({"kind": "cagra"}, {"graph_degree": 32, "intermediate_graph_degree": 64}, "float32"),
        ({"kind": "cagra", "codes": "float16"}, {"graph_degree": 32, "intermediate_graph_degree": 64}, "float16"),
        ({"kind": "cagra", "graph_degree": 96}, {"graph_degree": 96, "intermediate_graph_degree": 192}, "float32"),
        ({"kind": "ivf_flat"}, {"nlist": 64}, "float32"),
        ({"kind": "ivf_flat", "nlist": 100, "dtype": "float16"}, {"nlist": 100}, "float32"),
        ({"kind": "ivf_pq"}, {"nlist": 64, "pq_m": 384, "pq_bits": 8}, "float32"),
        ({"kind": "ivf_pq", "pq_m": 32, "nlist": 7, "pq_bits": 8}, {"nlist": 7, "pq_m": 32, "pq_bits": 8}, "float32"),
    ],
)
def test_named_kind_takes_its_options(options: dict[str, Any], params: dict[str, int], codes: str) -> None:
    spec = choose(50_000, config_of(target_recall=0.9, **options), H100)
    assert (spec.params, spec.codes, spec.rerank_store, spec.device) == (params, codes, "rows", "gpu")


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"kind": "hnsw"}, "index.kind", "they take auto, flat, ivf_flat, ivf_pq, cagra; or use device cpu"),
        ({"kind": "factory", "factory": "Flat"}, "index.kind", "factory is not served on GPUs"),
        ({"kind": "cagra", "metric": "ip"}, "index.kind", "under metric ip.*use flat, or device cpu"),
        ({"kind": "ivf_pq", "metric": "ip"}, "index.kind", "under metric ip.*use flat, or device cpu"),
        ({"kind": "cagra", "dimension": GRAPH_DIMENSION_MAX + 1}, "index.kind", "at most 8192 dimensions.*ivf_pq"),
        ({"kind": "ivf_flat", "codes": "float16"}, "index.codes", "must be float32"),
        ({"kind": "ivf_flat", "rerank_store": "sq8"}, "index.rerank_store", "must be rows on GPUs, not sq8"),
        ({"kind": "ivf_pq", "pq_bits": 4}, "index.pq_bits", "must be 8 on GPUs, not 4"),
        ({"kind": "ivf_pq", "pq_m": 100}, "index.pq_m", "must divide the dimension, 768.*such as 384, 192, 96"),
        ({"kind": "ivf_flat", "nlist": NPROBE_MAX + 1}, "index.nlist", "at most 16384 on GPUs"),
    ],
)
def test_what_gpus_do_not_take_is_refused_by_name(options: dict[str, Any], field: str, words: str) -> None:
    refused_field, message = refused(0, **options)
    assert refused_field == field
    assert re.search(words, message)


def test_graph_of_gpus_is_refused_where_there_are_none_with_the_way_out() -> None:
    for device, where in (("cpu", "on device cpu"), ("auto", "here: there are no GPUs, or too few are free")):
        field, message = refused(0, None, kind="cagra", device=device)
        assert field == "index.kind"
        assert message == (
            f"cagra is for GPUs, it cannot be had {where}; take kind hnsw, or device gpu: with wait_for_gpu it "
            "is taken before there are GPUs"
        )
    assert refused(0, None, kind="cagra", device="auto", metric="ip")[1].startswith("cagra is not served on GPUs under")
    assert chosen(POINTS_MIN, H100, kind="cagra", device="auto") == ("cagra", "float32", "gpu")
    assert chosen(POINTS_MIN, None, kind="cagra", device="gpu") == ("cagra", "float32", "gpu")


def test_generation_that_came_to_the_cpu_gets_graphs_of_a_cpu() -> None:
    """Its segments are planned with the device that its manifest has."""
    spec = plan_index(50_000, config_of(kind="cagra", device="cpu", graph_degree=64)).spec
    assert (spec.kind, spec.device, spec.reason) == ("hnsw", "cpu", "cagra was asked for")


def test_segment_that_no_gpu_builds_for_a_graph_is_of_lists() -> None:
    for full in ("step_down", "refuse"):
        config = config_of(kind="cagra", gpu_full=full)
        spec = plan_index(50_000, config, gpu=GpuFacts(builds=False)).spec
        assert (spec.kind, spec.device) == ("ivf_flat", "gpu")


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("flat", [("flat", "gpu"), ("flat", "cpu")]),
        ("ivf_flat", [("ivf_flat", "gpu"), ("ivf_flat", "cpu")]),
        ("ivf_pq", [("ivf_pq", "gpu"), ("ivf_pq", "gpu"), ("ivf_pq", "gpu"), ("ivf_pq", "cpu")]),
        ("cagra", [("cagra", "gpu"), ("cagra", "gpu"), *[("ivf_pq", "gpu")] * 3, ("hnsw", "cpu")]),
    ],
)
def test_named_kind_steps_down_and_is_refused_where_it_must_not(kind: str, steps: list[tuple[str, str]]) -> None:
    plan = plan_index(1_000_000, config_of(kind=kind), gpu=ROOMY)
    assert [(c.spec.kind, c.spec.device) for c in plan.considered] == steps
    tiny = GpuFacts(10**9)
    assert chosen(1_000_000, tiny, kind=kind)[::2] == steps[-1]
    assert refused(1_000_000, tiny, kind=kind, gpu_full="refuse")[0] == "index.gpu_full"


@pytest.mark.parametrize(
    ("dimension", "sizes"),
    [
        (768, (384, 192, 96)),
        (96, (48, 24, 8)),  # 12 divides it as well, 8 is searched faster
        (100, (50, 25, 10)),
        (97, (97,)),  # a prime
        (6, (3, 1)),
        (1, (1,)),
    ],
)
def test_sub_quantizers_divide_the_dimension(dimension: int, sizes: tuple[int, ...]) -> None:
    assert pq_sizes(dimension) == sizes


def test_limits_of_k_are_those_of_the_kinds() -> None:
    assert [k_limit(kind) for kind in GPU_KINDS] == [K_MAX, K_MAX, K_MAX, ITOPK_MAX] == [16_384] * 3 + [512]


# ---- whether there are enough GPUs


def of(device: str, shards: int = 2, replicas: int = 1, **index: Any) -> CollectionConfig:
    return CollectionConfig(8, shards=shards, replicas=replicas, index=IndexConfig(device=device, **index))  # type: ignore[arg-type]


def facts_for(config: CollectionConfig, total: float, free: float, held: float = 0.0) -> GpuFacts | None:
    return gpu_for(config, config.index.num_gpus or 1.0, total, free, 1_000, "H100", held, True)


def test_cpu_takes_no_gpus_however_many_there_are() -> None:
    assert facts_for(of("cpu"), 8, 8) is None


@pytest.mark.parametrize(
    ("config", "total", "free", "held", "enough"),
    [
        (of("auto"), 0, 0, 0, False),
        (of("auto"), 2, 1, 0, False),
        (of("auto"), 2, 2, 0, True),
        (of("auto"), 2, 0, 2, True),  # its own replicas go on with theirs
        (of("auto"), 2, 0, 1, False),
        (of("auto"), 3, 1, 1, True),
        (of("auto", replicas=2), 3, 3, 0, False),
        (of("auto", num_gpus=0.5), 1, 1, 0, True),
        (of("auto", num_gpus=0.5), 1, 0.5, 0, False),
        (of("auto", num_gpus=0.5), 1, 0.5, 0.5, True),
        (of("auto", num_gpus=0.6), 1, 1, 0, False),  # two do not fit one GPU, though 1.2 - 0.6 are left over
        (of("auto", num_gpus=0.6), 2, 2, 0, True),
        (of("auto", shards=3, num_gpus=0.3333333), 1, 1, 0, True),
    ],
)
def test_auto_takes_gpus_where_enough_are_free(
    config: CollectionConfig, total: float, free: float, held: float, enough: bool
) -> None:
    told = facts_for(config, total, free, held)
    assert told == (GpuFacts(int(1_000 * (config.index.num_gpus or 1.0)), "H100") if enough else None)


@pytest.mark.parametrize("kind", ["auto", "flat"])
def test_auto_takes_no_gpus_of_which_no_driver_tells(kind: str) -> None:
    assert gpu_for(of("auto", kind=kind), 1.0, 2, 2, None, "", 0, True) is None
    assert gpu_for(of("auto", kind=kind), 1.0, 2, 2, 10**9, "", 0, True) is not None


def test_facts_are_those_of_a_replica_s_share() -> None:
    told = gpu_for(of("gpu"), 0.25, 1, 1, 80 * 10**9, "H100", 0, False)
    assert told == GpuFacts(20 * 10**9, "H100", builds=False)
    assert gpu_for(of("gpu"), 1.0, 2, 2, None, "", 0, True) == GpuFacts()


@pytest.mark.parametrize(
    ("config", "total", "free", "held", "words"),
    [
        (of("gpu"), 0, 0, 0, "this cluster has no GPU: use device cpu, .* or set wait_for_gpu"),
        (of("auto", kind="cagra"), 0, 0, 0, "this cluster has no GPU"),
        (of("gpu", replicas=2), 3, 3, 0, "2 shards x 2 replicas of 1 GPUs take 4 GPUs, this cluster has 3: use fewer"),
        (of("gpu", num_gpus=0.6), 1, 1, 0, "2 shards x 1 replicas of 0.6 GPUs take 2 GPUs, this cluster has 1"),
    ],
)
def test_gpus_that_the_cluster_does_not_have_are_refused_unless_asked_to_wait(
    config: CollectionConfig, total: float, free: float, held: float, words: str
) -> None:
    with pytest.raises(Invalid, match=words) as caught:
        facts_for(config, total, free, held)
    assert [error.field for error in caught.value.errors] == ["index.device"]
    waiting = replace(config, index=replace(config.index, wait_for_gpu=True))
    assert facts_for(waiting, total, free, held) is not None


def test_gpus_that_others_hold_are_unavailable_unless_asked_to_wait() -> None:
    with pytest.raises(Unavailable, match=r"take 2 GPUs more, 1 of 4 are free: try again .* set index\.wait_for_gpu"):
        facts_for(of("gpu"), 4, 1)
    assert facts_for(of("gpu", wait_for_gpu=True), 4, 1) == GpuFacts(1_000, "H100")
    assert facts_for(of("gpu"), 4, 1, held=1) == GpuFacts(1_000, "H100")


def test_gpus_that_own_replicas_hold_with_another_share_are_told_so() -> None:
    with pytest.raises(Unavailable, match=r"take 1 GPUs more, 0 of 2 are free: its own have 2 with another share"):
        gpu_for(of("gpu"), 0.5, 2, 0, None, "", 0.0, True, held_otherwise=2.0)


def test_advice_is_what_can_be_followed() -> None:
    """Of a kind that has no rerank_store of its own, and of one that no CPU serves."""
    message = refused(50_000, kind="cagra", target_recall=1.0)[1]
    assert message.endswith("0.999 at most, 1 is asked for; lower the target, or use kind auto")
    with pytest.raises(Invalid, match="has no GPU: use kind hnsw on device cpu, add"):
        gpu_for(config_of(kind="cagra"), 1.0, 0.0, 0.0, None, "", 0.0, builds=False)
    with pytest.raises(Invalid, match=r"this cluster has 0\.5: .* num_gpus, kind hnsw on device cpu, or set"):
        gpu_for(config_of(kind="cagra"), 1.0, 0.5, 0.5, None, "", 0.0, builds=False)


def test_compressed_lists_that_do_not_fit_are_told_apart() -> None:
    plan = plan_index(2_000_000, config_of(), gpu=GpuFacts(2 * 10**9))
    told = [each.rejected for each in plan.considered if (each.spec.kind, each.spec.device) == ("ivf_pq", "gpu")]
    assert [reason.split(",")[0] for reason in told] == [f"ivf_pq of {m}-byte codes" for m in (384, 192, 96)]
    assert all("with its process and a search, takes" in reason for reason in told)
