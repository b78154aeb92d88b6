"""How many segments, how many builds at once, and what they ask for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.index_policy import MEMORY_MARGIN, choose, like
from cluster.index_spec import TRAINING_POINTS_PER_CENTROID
from jobs.build_plan import Builds, Workers, plan_builds, segment_bytes, segments_per_shard
from tests.fakes import run_tasks_here

GB = 10**9
FLAT, IVF, HNSW = (
    CollectionConfig(64, metric="l2", index=IndexConfig(kind=kind))  # type: ignore[arg-type]
    for kind in ("flat", "ivf_flat", "hnsw")
)


def workers(cpus: int, cpus_per_node: int | None = None, free: int | None = None) -> Workers:
    return Workers(run_tasks_here, cpus, cpus_per_node, free)


@pytest.mark.parametrize(
    ("partitions", "bytes_each", "there_are", "planned"),
    [
        (1, GB, workers(64, 16), Builds(1, 16, 16)),  # no node has the 64 CPUs of the cluster
        (1, GB, workers(64, 16, 15), Builds(1, 16, 15)),  # a replica holds one
        (1, GB, workers(64, 16, 0), Builds(1, 16, 1)),
        (4, GB, workers(64, 16), Builds(4, 16, 16)),
        (16, GB, workers(64, 16), Builds(16, 4, 4)),  # four of a node take the 4 GB
        (16, 2 * GB, workers(64, 16), Builds(8, 8, 8)),  # two of a node
        (16, 4 * GB, workers(64, 16), Builds(4, 16, 16)),
        (16, 4 * GB, workers(64, 16, 15), Builds(4, 16, 15)),  # still one of a node
        (16, 4 * GB, workers(64, 16, 2), Builds(1, 16, 2)),  # eight would go onto one node: one after the other
        (16, 9 * GB, workers(64, 16), Builds(4, 16, 16)),
        (100, 1, workers(2), Builds(2, 1, 1)),
        (2, 3 * GB, workers(2), Builds(1, 2, 2)),
        (0, 0, workers(1), Builds(1, 1, 1)),
    ],
)
def test_builds_share_the_cpus_and_the_memory_of_a_node(
    partitions: int, bytes_each: int, there_are: Workers, planned: Builds
) -> None:
    assert plan_builds(partitions, bytes_each, 4 * GB, there_are) == planned


def test_builds_that_fit_one_node_never_take_more_than_its_memory() -> None:
    numbers = random.Random(7)
    for _ in range(20_000):
        node, nodes = numbers.randint(1, 64), numbers.randint(1, 9)
        free, partitions = numbers.randint(0, node), numbers.randint(1, 200)
        memory_bytes, bytes_each = numbers.randint(1, 1000), numbers.randint(1, 300)
        builds = plan_builds(partitions, bytes_each, memory_bytes, workers(node * nodes, node, free))
        on_one_node = min(builds.at_once, node // builds.num_cpus)
        assert on_one_node * bytes_each <= memory_bytes or on_one_node == 1
        assert 1 <= builds.num_cpus <= builds.threads <= node
        assert 1 <= builds.at_once <= partitions


def segments(rows: int, config: CollectionConfig, memory_bytes: int) -> int:
    """Segments per shard of what the policy chooses for all rows."""
    return segments_per_shard(rows, choose(-(-rows // config.shards), config), config, memory_bytes)


def test_collection_that_fits_gets_one_segment_per_shard() -> None:
    assert segments(0, FLAT, 1) == 1
    assert segments(1, FLAT, 1) == 1
    assert segments(10_000_000, FLAT, 3 * GB) == 1
    assert segments(10_000_000, FLAT, 2 * GB) == 2
    assert segments(20_000_000, replace(FLAT, shards=2), 2 * GB) == 2


def test_training_sample_counts_as_memory_of_a_segment() -> None:
    spec = choose(100_000, IVF)
    assert spec.params["nlist"] * TRAINING_POINTS_PER_CENTROID > 100_000  # the sample is all of them
    wanted = (spec.predicted_bytes + 100_000 * 64 * 4) * MEMORY_MARGIN
    assert segment_bytes(spec, 100_000, 64) == pytest.approx(wanted, abs=1)
    bound = int(spec.predicted_bytes * MEMORY_MARGIN * 1.2)
    assert segments(100_000, IVF, bound) == 2


@pytest.mark.parametrize("config", [FLAT, IVF, HNSW])
@pytest.mark.parametrize("memory_bytes", [10**6, 10**7, 10**8, 10**12])
def test_segments_fit_the_memory_and_are_no_more_than_rows(config: CollectionConfig, memory_bytes: int) -> None:
    for rows in (1, 1_000, 123_456, 3_000_000):
        count = -(-rows // segments(rows, config, memory_bytes))
        assert segment_bytes(like(choose(rows, config), count, config), count, 64) <= memory_bytes
    assert segments(1_000, config, 1) == 1_000


def test_segments_of_a_shard_keep_the_kind_that_the_whole_shard_was_given() -> None:
    """Each of the segments by itself would be scanned exactly."""
    config = CollectionConfig(64, metric="l2")
    whole = choose(200_000, config)
    assert whole.kind == "hnsw"
    parts = segments_per_shard(200_000, whole, config, 20 * 10**6)
    count = -(-200_000 // parts)
    assert choose(count, config).kind == "flat"
    assert segment_bytes(like(whole, count, config), count, 64) <= 20 * 10**6
    assert segment_bytes(like(whole, -(-200_000 // (parts - 1)), config), 200_000 // (parts - 1), 64) > 20 * 10**6
