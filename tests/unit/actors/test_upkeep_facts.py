from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.replica_status import ReplicaStatus
from actors.upkeep_facts import upkeep_facts
from cluster.config import CollectionConfig, IndexConfig, Upkeep
from cluster.manifest import Manifest, SegmentRef, ShardEntry, TombstonesRef
from cluster.manifest_format import added_on
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey
from cluster.routing import Routing
from cluster.upkeep import largest_build
from tests.fakes import SETTINGS, serving, table_when
from tests.unit.actors.points import commit, random_points

CONFIG = CollectionConfig(8, index=IndexConfig(kind="flat", target_recall=0.9))
BOUNDS = Upkeep(seal_points=100, segments_max=2, rebuild_growth=2.0)
Facts = dict[str, Any]


def manifest_of(*segments: tuple[str, int], tombstones: int = 0, generation: int = 3) -> Manifest:
    refs = tuple(SegmentRef(name, count, "xxh3_128:0") for name, count in segments)
    deleted = (TombstonesRef(segments[0][0], 1, tombstones, "xxh3_128:0"),) if tombstones else ()
    return Manifest("words", 7, CONFIG, Routing(1), generation, (ShardEntry(0, refs, 1, 1, deleted),), "", "")


def segment_of(name: str, count: int, tombstones: int = 0, planned: str = "flat", kind: str = "flat") -> Facts:
    considered = [{"kind": "hnsw", "rejected": "too large"}, {"kind": planned, "rejected": ""}]
    facts = {"segment_id": name, "count": count, "tombstones": tombstones}
    return facts | {"index_kind": kind, "considered": considered}


def ready(*segments: Facts, **more: Any) -> ReplicaStatus:
    return replace(ReplicaStatus("ready", (7,), (2, 3), lsn=5, epoch=1, segments=segments), **more)


def told(manifest: Manifest, *statuses: ReplicaStatus) -> tuple[list[str], dict[int, str]]:
    """Kinds of reasons, and shards whose upkeep is idle."""
    keyed = {ReplicaKey("words", 0, number): status for number, status in enumerate(statuses)}
    facts = upkeep_facts(manifest, keyed, BOUNDS)
    return [each.kind for each in facts["advice"]], facts["idle_upkeep"]


def test_the_replica_that_is_ahead_tells_what_there_is() -> None:
    manifest = manifest_of(("a", 100), ("b", 90))
    behind = ready(segment_of("a", 100), segment_of("b", 90), lsn=4, tail_points=99, epoch=0)
    ahead = ready(segment_of("a", 100), segment_of("b", 90), tail_points=5)
    assert told(manifest, behind, ahead) == ([], {})
    assert told(manifest, ahead, replace(behind, lsn=6)) == (["growth"], {})


def test_replicas_that_hold_another_generation_tell_nothing() -> None:
    manifest = manifest_of(("a", 10), ("b", 10))
    grown = ready(segment_of("a", 10), segment_of("b", 10), tail_points=50)
    assert told(manifest, grown)[0] == ["growth"]
    assert told(manifest, replace(grown, generations=(2,))) == ([], {})
    assert told(manifest, replace(grown, state="unreachable")) == ([], {})


def test_recall_is_that_of_the_generation_as_the_replica_saw_it_that_evaluated_most() -> None:
    def seen(generation: int, high: float, queries: int) -> Facts:
        return {"generation": generation, "recall": high - 0.1, "low": high - 0.2, "high": high, "queries": queries}

    manifest, low, fine = manifest_of(("a", 100)), seen(3, 0.8, 500), seen(3, 0.99, 400)
    segment = segment_of("a", 100)
    assert told(manifest, ready(segment, observed=(seen(2, 0.5, 900), low)), ready(segment, observed=(fine,)))[0] == [
        "recall"
    ]
    more = fine | {"queries": 600}
    assert told(manifest, ready(segment, observed=(low,)), ready(segment, observed=(more,)))[0] == []
    assert told(manifest, ready(segment, observed=(seen(2, 0.5, 900),)))[0] == []


def test_rows_that_a_seal_or_merge_will_take_are_no_reason_but_tell_that_nobody_begins() -> None:
    manifest = manifest_of(("a", 1_000))
    full = ready(segment_of("a", 1_000), tail_points=100, upkeep="sealing the tail")
    assert told(manifest, full) == ([], {})
    assert told(manifest, replace(full, upkeep="")) == (
        [],
        {0: "not begun yet: the tail has 100 points, seal_points is 100"},
    )
    assert told(manifest, replace(full, epoch=0)) == (
        [],
        {0: "not begun, no replica leads the shard: the tail has 100 points, seal_points is 100"},
    )
    assert told(manifest, replace(full, epoch=0, tail_points=99)) == ([], {})


def test_segments_of_a_generation_on_gpus_may_be_as_large_as_those_that_are_made() -> None:
    """They are made on CPUs, which takes less host memory than the copy for a GPU that links a graph."""
    config = CollectionConfig(96, metric="l2", index=IndexConfig())
    names = {f"s{number}": 2_000_000 for number in range(3)}
    manifest = replace(manifest_of(*names.items()), config=config, num_gpus=0.25)
    assert largest_build(manifest.built_for) < 2 * 2_000_000 < largest_build(manifest.built_for, gpu=added_on("gpu"))
    status = ready(*(segment_of(name, count) | {"device": "gpu"} for name, count in names.items()))
    assert told(manifest, status)[1] == {0: "not begun yet: 3 segments may grow, segments_max is 2"}


def test_share_of_a_gpu_that_is_full_is_a_reason_where_a_build_would_take_a_larger_one() -> None:
    config = CollectionConfig(768, metric="l2", index=IndexConfig("flat", device="gpu"))
    manifest = replace(manifest_of(("a", 800_000), ("b", 100_000)), config=config, num_gpus=0.125)
    there, lacks = ({"device": "gpu", "degraded": why} for why in ("", "flat takes 1 bytes of GPU memory"))
    gpu = {"total_bytes": 24 * 10**9, "lost": ""}

    def of(second: Facts, share: float = 0.125, manifest: Manifest = manifest, **more: Any) -> list[str]:
        segments = (segment_of("a", 800_000) | there, segment_of("b", 100_000) | second)
        status = ready(*segments, **{"gpu": gpu} | more)
        advice = upkeep_facts(manifest, {ReplicaKey("words", 0, 0, share): status}, BOUNDS)["advice"]
        return [each.reason for each in advice if each.kind == "gpu_share"]

    assert of(lacks) == [
        "shard 0: an eighth of a GPU does not hold the index of its 900,000 points any more, and the CPU answers for "
        "some of them; half a GPU would be taken"
    ]
    assert of(there) == of({}) == [], "a CPU's kind tells nothing of it"
    assert of(lacks, gpu=gpu | {"lost": "an error"}) == []
    assert of(lacks, gpu=gpu | {"total_bytes": None}) == []
    assert of(lacks, gpu=None) == []
    assert of(lacks, gpu=gpu | {"total_bytes": 80 * 10**9}) == [], "it holds it: what is replaced takes the room"
    assert of(lacks, share=0.5) == [], "of those that are to go"
    assert of(lacks, generations=(2, 3, 4)) == []
    named = replace(config, index=replace(config.index, num_gpus=0.125))
    assert of(lacks, manifest=replace(manifest, config=named)) == [], "a build would take it again"


def test_deleted_rows_are_those_of_the_replica_and_of_the_manifest() -> None:
    manifest = manifest_of(("a", 1_000), tombstones=300)
    status = ready(segment_of("a", 1_000, tombstones=600), upkeep="")
    assert told(manifest, status) == ([], {0: "not begun yet: 300 of 1000 rows of a are deleted"})


def test_kind_that_the_builder_departed_from_is_not_advised_against() -> None:
    manifest = replace(manifest_of(("a", 1_000_000)), config=replace(CONFIG, index=IndexConfig()))
    assert told(manifest, ready(segment_of("a", 1_000_000)))[0] == ["index_kind"]
    assert told(manifest, ready(segment_of("a", 1_000_000, planned="hnsw", kind="ivf_pq")))[0] == []


def test_supervisor_tells_of_a_collection_that_is_served(tmp_path: Path) -> None:
    async def run() -> None:
        store = MemoryStore()
        commit(store, "words", CONFIG, random_points(CONFIG, 50))
        settings = replace(SETTINGS, upkeep=Upkeep(rebuild_growth=1.0))
        async with asyncio.timeout(60), serving(store, tmp_path, settings) as eagleray:
            await table_when(eagleray.directory, lambda table: "words" in table.collections and not table.unready)
            facts = await eagleray.directory.describe("words")
            assert (facts["advice"], facts["idle_upkeep"]) == ((), {})

    asyncio.run(run())
