"""A replica whose segments are on a GPU: switches, deletes, memory that runs out, a device that is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import replica_gpu
from actors.gpu_device import GpuDevice
from actors.live_generation import LiveGeneration
from actors.replica import Replica
from actors.replica_gpu import ReplicaGpu
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from actors.shard_view import ShardView
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Limits, Settings
from cluster.errors import Corrupt, Unavailable
from cluster.index_policy import choose
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaKey
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import WalRecord
from cluster.write import PointWrite
from tests.gpu_double import double_device
from tests.unit.actors.gpu_segments import (
    COUNT,
    DIMENSION,
    committed,
    double_of,
    gpu_config,
    gpu_points,
    memory_for,
    published,
)
from tests.unit.actors.points import Points, brute_force, flipped, ids_per_query, manifest_log, random_vectors

KEY = ReplicaKey("words", 0, 0)
CONFIG = gpu_config("flat")
ONE, OTHER = gpu_points(CONFIG), gpu_points(CONFIG, seed=9)
QUERIES = random_vectors(CONFIG, 8, seed=21)


def store_of(*generations: Points, config: CollectionConfig = CONFIG) -> MemoryStore:
    store = MemoryStore()
    for points in generations:
        committed(store, config, published(store, config, points, None))
    return store


@contextmanager
def replica_on(device: GpuDevice | None, store: ObjectStore, folder: Path) -> Iterator[Replica]:
    settings = Settings(data="memory://x", observed_share=0.0, limits=Limits())
    made = Replica(KEY, lambda: Shard(store, "words", 0, folder, device=device), settings, 1, device=device)
    try:
        yield made
    finally:
        made.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


async def found(replica: Replica, generation: int, params: SearchParams | None = None) -> Hits:
    group = SearchGroup(0, len(QUERIES), 5, params or SearchParams())
    (hits,) = await replica.search(ShardSearch(generation, QUERIES, (group,)))
    assert isinstance(hits, Hits), hits
    return hits


async def assert_found(replica: Replica, generation: int, points: Points, degraded: str = "") -> None:
    """The exact answer, by the GPU or told to be degraded."""
    hits = await found(replica, generation)
    assert ids_per_query(hits) == brute_force(points, QUERIES, 5, "l2")
    assert hits.degraded == degraded


async def ticked(replica: Replica) -> None:
    """After a tick, and what it gave to the loading thread."""
    replica.tick()
    await asyncio.get_running_loop().run_in_executor(replica._loader, int)


def told(replica: Replica) -> Any:
    return replica.status().segments[0]


# --- switches -----------------------------------------------------------------------------------------------------


def test_generation_without_room_beside_the_old_one_is_answered_by_its_twin_until_that_is_retired(
    tmp_path: Path,
) -> None:
    store = store_of(ONE)
    device = double_device(memory_for(CONFIG, choose(COUNT, CONFIG)))

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            assert replica.status().degraded == ""
            committed(store, CONFIG, published(store, CONFIG, OTHER, None))
            await replica.load(None)
            status = replica.status()
            assert status.generations == (1, 2)
            assert "bytes of GPU memory" in status.degraded
            assert status.segments[0]["degraded"] in status.degraded
            await assert_found(replica, 1, ONE)
            await assert_found(replica, 2, OTHER, degraded="cpu")
            await ticked(replica)
            await assert_found(replica, 2, OTHER, degraded="cpu")
            await replica.retire(2)
            await assert_found(replica, 2, OTHER, degraded="cpu")
            await ticked(replica)
            await assert_found(replica, 2, OTHER)
            assert replica.status().degraded == told(replica)["degraded"] == ""
        double_of(device).check()

    run(scenario)


def test_generation_that_fits_beside_the_old_one_is_on_the_gpu_at_once_and_gives_its_place_back(
    tmp_path: Path,
) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        empty = double_of(device).taken_bytes
        with replica_on(device, store, tmp_path) as replica:
            alone = double_of(device).taken_bytes - empty
            assert alone > 0
            committed(store, CONFIG, published(store, CONFIG, OTHER, None))
            await replica.load(None)
            assert double_of(device).taken_bytes == empty + 2 * alone
            await assert_found(replica, 1, ONE)
            await assert_found(replica, 2, OTHER)
            await replica.retire(2)
            assert double_of(device).taken_bytes == empty + alone
            with pytest.raises(Unavailable, match=r"generation 1 .* is not loaded"):
                await found(replica, 1)
            await replica.retire(3)
            assert double_of(device).taken_bytes == empty
        double_of(device).check()

    run(scenario)


def test_view_that_is_still_searched_when_its_generation_is_retired_is_answered(tmp_path: Path) -> None:
    device = double_device()
    shard = Shard(store_of(ONE, OTHER), "words", 0, tmp_path, device=device)
    shard.load(1)
    shard.load(2)
    old = shard.view(1)
    shard.retire(2)
    request = ShardSearch(1, QUERIES, (SearchGroup(0, len(QUERIES), 5, SearchParams()),))
    (hits,) = old.search(request)
    assert isinstance(hits, Hits)
    assert ids_per_query(hits) == brute_force(ONE, QUERIES, 5, "l2")
    assert device.lost == ""


def test_load_that_fails_leaves_nothing_on_the_gpu(tmp_path: Path) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            alone = double_of(device).taken_bytes
            good, bad = (published(store, CONFIG, gpu_points(CONFIG, seed), None) for seed in (3, 4))
            key = paths.segment_file("words", bad.segment_id, paths.INDEX)
            store.put(key, flipped(store.get(key), 100))
            committed(store, CONFIG, good, bad)
            with pytest.raises(Corrupt, match=key):
                await replica.load(None)
            assert double_of(device).taken_bytes > alone
            await ticked(replica)
            assert double_of(device).taken_bytes == alone
            await assert_found(replica, 1, ONE)

    run(scenario)


def test_generation_that_is_loaded_anew_after_a_failed_record_finds_its_place_on_the_gpu_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = double_device(memory_for(CONFIG, choose(COUNT, CONFIG)))
    shard = Shard(store_of(ONE), "words", 0, tmp_path, device=device)
    shard.load()
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise RuntimeError("a bug")

        patch.setattr(LiveGeneration, "apply", fail)
        with pytest.raises(RuntimeError):
            shard.apply_own(WalRecord(1, 1, "claim", "f" * 32))
    assert shard.status().state == "failed"
    shard.load()
    assert (shard.status().state, shard.status().degraded) == ("ready", "")


def test_segments_that_generations_share_stay_on_the_gpu(tmp_path: Path) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            before = double_of(device).taken_bytes
            (entry,) = manifest_log(store, "words").newest_live().shards
            committed(store, CONFIG, *entry.segments)
            await replica.load(None)
            assert double_of(device).taken_bytes == before
            await replica.retire(2)
            assert double_of(device).taken_bytes == before
            await assert_found(replica, 2, ONE)

    run(scenario)


def test_load_without_room_and_without_a_twin_is_refused_with_the_numbers(tmp_path: Path) -> None:
    config = gpu_config("flat", cpu_twin=False)
    store = store_of(ONE, config=config)
    device = double_device(memory_for(config, choose(COUNT, config)))

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            committed(store, config, published(store, config, OTHER, None))
            with pytest.raises(Unavailable, match=r"takes \d+ bytes of GPU memory, \d+ can be had; its cpu_twin"):
                await replica.load(None)
            assert replica.status().generations == (1,)
            await replica.retire(2)  # who asks for it again gets it
            await replica.load(None)
            await assert_found(replica, 2, OTHER)

    run(scenario)


# --- failures -----------------------------------------------------------------------------------------------------


def test_search_that_finds_no_memory_is_answered_by_the_twin_and_the_next_by_the_gpu(tmp_path: Path) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            double_of(device).run_out_of_memory()
            await assert_found(replica, 1, ONE, degraded="cpu")
            await assert_found(replica, 1, ONE)
            status = replica.status()
            assert (status.degraded, status.state) == ("", "ready")
            assert told(replica)["out_of_memory"] == 1
        double_of(device).check()

    run(scenario)


def test_lost_device_leaves_the_replica_serving_and_telling_it(tmp_path: Path) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            await assert_found(replica, 1, ONE)
            double_of(device).lose()
            for _ in range(3):
                await assert_found(replica, 1, ONE, degraded="cpu")
            status = replica.status()
            assert status.state == "ready"
            assert status.degraded.startswith("the GPU is lost: ")
            assert "illegal memory access" in status.degraded
            assert status.gpu is not None
            assert status.gpu["lost"]
            assert told(replica)["degraded"]
            committed(store, CONFIG, published(store, CONFIG, OTHER, None))
            await replica.load(None)  # goes on
            await ticked(replica)
            await assert_found(replica, 2, OTHER, degraded="cpu")
            await replica.retire(2)
            await ticked(replica)
            await assert_found(replica, 2, OTHER, degraded="cpu")
        double_of(device).check()

    run(scenario)


def test_lost_device_without_a_twin_fails_searches_and_nothing_else(tmp_path: Path) -> None:
    config = gpu_config("flat", cpu_twin=False)
    store, device = store_of(ONE, config=config), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            double_of(device).lose()
            group = SearchGroup(0, len(QUERIES), 5, SearchParams())
            (outcome,) = await replica.search(ShardSearch(1, QUERIES, (group,)))
            assert isinstance(outcome, Unavailable)
            await exact_and_fetched(replica)

    run(scenario)


async def exact_and_fetched(replica: Replica) -> None:
    hits = await found(replica, 1, SearchParams(exact=True))
    assert ids_per_query(hits) == brute_force(ONE, QUERIES, 5, "l2")
    assert hits.degraded == ""
    answer = await replica.fetch(1, ONE.ids[:3], ["vector", "name"])
    assert answer.found.all()
    assert answer.table.column("name").to_pylist() == ONE.names[:3]


@pytest.mark.parametrize("lost", [False, True])
def test_exact_searches_and_fetches_need_no_gpu(lost: bool, tmp_path: Path) -> None:
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            double_of(device).searches.clear()
            if lost:
                double_of(device).lose()
            await exact_and_fetched(replica)
            assert double_of(device).searches == []

    run(scenario)


def test_replica_without_a_gpu_serves_a_generation_for_gpus_and_tells_it(tmp_path: Path) -> None:
    store = store_of(ONE)

    async def scenario() -> None:
        with replica_on(None, store, tmp_path) as replica:
            await ticked(replica)
            await assert_found(replica, 1, ONE, degraded="cpu")
            status = replica.status()
            assert status.gpu is None
            assert status.degraded.endswith("this process has no GPU")

    run(scenario)


# --- status, deletes, upkeep --------------------------------------------------------------------------------------


def test_status_tells_of_a_segment_what_it_takes_of_the_gpu(tmp_path: Path) -> None:
    device = double_device()

    async def scenario() -> None:
        with replica_on(device, store_of(ONE), tmp_path) as replica:
            segment = told(replica)
            assert segment["device"] == "gpu"
            assert segment["gpu_predicted_bytes"] > 0
            assert segment["gpu_measured_bytes"] == pytest.approx(segment["gpu_predicted_bytes"], rel=0.1)
            assert (segment["out_of_memory"], segment["degraded"]) == (0, "")
            gpu = replica.status().gpu
            assert gpu is not None
            assert gpu["name"] == "double"
            assert 0 < gpu["free_bytes"] < gpu["total_bytes"] == 8 << 30

    run(scenario)


def write_of(ids: list[int], vectors: Any) -> PointWrite:
    return PointWrite(pa.record_batch([pa.array(ids), vectors_array(vectors)], names=["id", "vector"]))


def test_deleted_and_replaced_points_are_not_found_on_the_gpu(tmp_path: Path) -> None:
    """A thousand points are scanned anyway where the rest is that small: here the GPU is made to answer."""
    store, device = store_of(ONE), double_device()

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            await replica.lead()
            nearest = [line[0] for line in brute_force(ONE, QUERIES, 1, "l2")]
            await replica.write([PointWrite(deletes=pa.array(nearest[:4]))])
            await replica.write([write_of([int(i) for i in nearest[4:]], np.full((4, DIMENSION), 50.0, np.float32))])
            double_of(device).searches.clear()
            kept = np.flatnonzero(~np.isin(np.array(ONE.ids), nearest))
            hits = await found(replica, 1)
            assert ids_per_query(hits) == brute_force(ONE.take(kept), QUERIES, 5, "l2")
            assert hits.degraded == ""
            assert all(search["selected"] for search in double_of(device).searches)
            assert double_of(device).searches
            status = replica.status()
            assert (status.tombstones, status.tail_points) == (len(set(nearest)), len(set(nearest[4:])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.segment_searcher.SCAN_FLOATS_MAX", 0)
        run(scenario)


@pytest.mark.parametrize("kind", ["auto", "cagra"])
def test_upkeep_of_a_collection_on_gpus_builds_what_gpus_search_and_cpus_build(kind: str, tmp_path: Path) -> None:
    config = gpu_config(kind, graph_degree=None) if kind == "auto" else gpu_config(kind)
    store, device = MemoryStore(), double_device()
    committed(store, config, published(store, config, ONE, device))

    def segment_ids(manifest: Manifest | None) -> list[str]:
        assert manifest is not None
        assert manifest.device == "gpu"
        return [ref.segment_id for ref in manifest.shards[0].segments]

    async def scenario() -> None:
        with replica_on(device, store, tmp_path) as replica:
            await replica.lead()
            ids = np.arange(100_000, 100_100)
            await replica.write([write_of(ids.tolist(), random_vectors(config, 100, seed=4))])
            both = segment_ids(seal_tail(store, "words", 0, tmp_path, lambda: "n1"))
            assert len(both) == 2
            await replica.load(None)
            sealed = replica.status().segments[1]
            assert (sealed["device"], sealed["index_kind"], sealed["degraded"]) == ("gpu", "flat", "")
            before = double_of(device).taken_bytes
            merged = segment_ids(merge_segments(store, "words", 0, both, tmp_path, lambda: "n2"))
            assert len(merged) == 1
            await replica.load(None)
            (only,) = replica.status().segments
            assert (only["device"], only["count"], only["degraded"]) == ("gpu", COUNT + 100, "")
            assert only["index_kind"] != "cagra"
            assert double_of(device).taken_bytes <= before, "what was merged has left the GPU"

    run(scenario)


# --- when it is tried ---------------------------------------------------------------------------------------------


class Inline(Executor):
    """Does what it is given at once."""

    def __init__(self) -> None:
        self.done = 0

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.done += 1
        work(*args, **kwargs)

        class Done:
            def done(self) -> bool:
                return True

        return Done()


def test_placing_is_tried_once_a_period_and_after_memory_was_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(replica_gpu.time, "monotonic", lambda: now[0])
    device, loader, seen = double_device(), Inline(), []

    def promote() -> list[str]:
        seen.append(gpu.busy)
        return []

    gpu = ReplicaGpu("words/0/0", device, loader, promote)
    for _ in range(3):
        gpu.look()
    assert seen == [True], "searches wait for no event loop meanwhile"
    assert not gpu.busy
    now[0] += replica_gpu.PROMOTE_PERIOD_S
    gpu.look()
    gpu.soon()
    gpu.look()
    gpu.look()
    assert loader.done == 3


def test_placing_that_fails_is_tried_again_and_stops_no_tick(caplog: pytest.LogCaptureFixture) -> None:
    def promote() -> list[str]:
        raise RuntimeError("a bug")

    device, loader = double_device(), Inline()
    gpu = ReplicaGpu("words/0/0", device, loader, promote)
    gpu.look()
    gpu.soon()
    gpu.look()
    assert loader.done == 2
    assert "placing segments on the GPU" in caplog.text
    assert not gpu.busy


def test_without_a_gpu_nothing_is_tried() -> None:
    loader = Inline()
    gpu = ReplicaGpu("words/0/0", None, loader, list)
    gpu.look()
    with gpu.used():
        assert not gpu.busy
    assert (loader.done, gpu.facts, gpu.lost) == (0, None, "")


@contextmanager
def at_work(device: GpuDevice) -> Iterator[None]:
    """While the device has something long to do."""
    began, go = threading.Event(), threading.Event()
    working = threading.Thread(target=lambda: device.run(lambda _: (began.set(), go.wait(20))))
    working.start()
    assert began.wait(20)
    try:
        yield
    finally:
        go.set()
        working.join(20)


def test_search_waits_in_its_thread_while_the_gpu_may_be_busy_with_a_load_or_another_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.replica.AT_ONCE_S", 60.0)
    device, threads = double_device(), []
    search = ShardView.search

    def seen(self: ShardView, request: ShardSearch) -> Any:
        threads.append(threading.current_thread().name)
        return search(self, request)

    async def scenario() -> None:
        with replica_on(device, store_of(ONE), tmp_path) as replica:
            monkeypatch.setattr(ShardView, "search", seen)
            await found(replica, 1)  # how long it takes is not known yet
            await found(replica, 1)
            with replica._gpu.used():
                await found(replica, 1)
            await found(replica, 1)
            with at_work(device):
                searching = asyncio.ensure_future(found(replica, 1))
                await asyncio.sleep(0)
                assert not searching.done()
            await searching
            assert [name == "search" for name in threads] == [True, False, True, False, True]

    run(scenario)
