"""Ray tasks and Ray's errors as the rest of the system sees them."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import ray_jobs, ray_runtime
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Settings, Upkeep
from cluster.errors import Conflict, Fenced, Invalid, NotFound, Unavailable
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("one_cluster")]
WANTED = WantedReplica(version=1, generation=1, shards=1, num_cpus=0.0)
KEY = ReplicaKey("empty", 0, 0)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ray_runtime.RayRuntime]:
    """One replica of an empty collection, started."""
    store = open_store(str(tmp_path))
    ManifestLog(store, "empty", lambda: "nonce").create(CollectionConfig(dimension=2))
    settings = Settings(data=str(tmp_path), namespace=f"eagleray-{tmp_path.name}", shard_cpus=0.0)
    runtime = ray_runtime.RayRuntime(settings)
    runtime.start(KEY, WANTED)
    yield runtime
    ray_runtime.stop_actors(settings.namespace)


def count_up(limit: int) -> Iterator[int]:
    for number in range(limit):  # noqa: UP028  # Ray drives generators with send(), which a range has not
        yield number


def refuse_two(number: int) -> Iterator[int]:
    yield 0
    if number == 2:
        raise Invalid.at("number", "2 is refused")


def die_once(marker: str) -> Iterator[str]:
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield "alive"


def test_run_tasks_gives_every_event_of_every_item_in_order() -> None:
    events: dict[int, list[int]] = {}
    for number, event in ray_jobs.run_tasks(count_up, [3, 0, 5, 1], num_cpus=1, in_flight=2):
        events.setdefault(number, []).append(event)
    assert events == {0: [0, 1, 2], 2: [0, 1, 2, 3, 4], 3: [0]}


def test_run_tasks_with_an_error_of_ours_raises_it_whole() -> None:
    with pytest.raises(Invalid) as caught:
        list(ray_jobs.run_tasks(refuse_two, [0, 1, 2, 3], num_cpus=1, in_flight=2))
    assert caught.value.errors[0].field == "number"


def test_run_tasks_with_a_killed_process_runs_it_again(tmp_path: Path) -> None:
    events = list(ray_jobs.run_tasks(die_once, [str(tmp_path / "died")], num_cpus=1, in_flight=1))
    assert events == [(0, "alive")]


def test_search_of_a_replica_answers_through_the_actor(runtime: ray_runtime.RayRuntime) -> None:
    client = ray_runtime.ActorShardClient(runtime.handles[KEY], KEY)
    request = ShardSearch(1, np.zeros((3, 2), np.float32), (SearchGroup(0, 3, 10, SearchParams()),))
    (hits,) = asyncio.run(client.search(request))
    assert hits.counts.tolist() == [0, 0, 0]  # type: ignore[union-attr]


def test_search_of_an_unknown_generation_is_unavailable(runtime: ray_runtime.RayRuntime) -> None:
    client = ray_runtime.ActorShardClient(runtime.handles[KEY], KEY)
    request = ShardSearch(7, np.zeros((1, 2), np.float32), ())
    with pytest.raises(Unavailable, match="generation 7"):
        asyncio.run(client.search(request))


def test_status_of_a_killed_process_is_unavailable_and_then_ready_again(runtime: ray_runtime.RayRuntime) -> None:
    async def kill_and_wait() -> tuple[int, int, list[str]]:
        first = await runtime.status(KEY)
        os.kill(first.pid, signal.SIGKILL)
        seen = []
        while True:
            try:
                status = await runtime.status(KEY)
            except Unavailable as error:
                seen.append(str(error))
            else:
                if status.pid != first.pid:
                    return first.pid, status.pid, seen
            await asyncio.sleep(0.05)

    first, second, _ = asyncio.run(asyncio.wait_for(kill_and_wait(), 60.0))
    assert first != second


def upsert(*numbers: int) -> PointWrite:
    """Points of these ids; point i lies at (i, i)."""
    vectors = np.repeat(np.array(numbers, np.float32)[:, None], 2, axis=1)
    return PointWrite(pa.record_batch([pa.array(numbers), vectors_array(vectors)], names=["id", "vector"]))


async def nearest(client: ray_runtime.ActorShardClient, number: int, min_lsn: int) -> Any:
    group = SearchGroup(0, 1, 1, SearchParams())
    (hits,) = await client.search(ShardSearch(1, np.full((1, 2), number, np.float32), (group,), 10.0, min_lsn))
    return hits.ids.to_pylist()  # type: ignore[union-attr]


def test_write_is_fenced_before_the_replica_leads_and_found_after_it(runtime: ray_runtime.RayRuntime) -> None:
    async def write_and_search() -> None:
        client = ray_runtime.ActorShardClient(runtime.handles[KEY], KEY)
        (refused,) = await client.write([upsert(7)])
        assert isinstance(refused, Fenced)
        await runtime.lead(KEY)
        outcomes = await client.write([upsert(7), upsert(8, 9), PointWrite(deletes=pa.array([9, 10]))])
        assert [outcome.count for outcome in outcomes] == [1, 2, 1]  # type: ignore[union-attr]
        lsn = max(outcome.lsn for outcome in outcomes)  # type: ignore[union-attr]
        assert [await nearest(client, number, lsn) for number in (7, 9)] == [[7], [8]]
        found = (await client.fetch(1, pa.array([9, 8]), [], lsn)).found
        assert found.tolist() == [False, True]

    asyncio.run(asyncio.wait_for(write_and_search(), 60.0))


def test_primary_pushes_to_the_other_replica_of_its_shard(tmp_path: Path) -> None:
    store, other = open_store(str(tmp_path)), ReplicaKey("empty", 0, 1)
    ManifestLog(store, "empty", lambda: uuid.uuid4().hex).create(CollectionConfig(dimension=2, replicas=2))
    settings = Settings(data=str(tmp_path), namespace=f"eagleray-{tmp_path.name}", shard_cpus=0.0)
    runtime = ray_runtime.RayRuntime(settings)

    async def write_and_follow() -> None:
        runtime.start(KEY, WANTED)
        runtime.start(other, WANTED)
        await runtime.lead(KEY)
        (outcome,) = await ray_runtime.ActorShardClient(runtime.handles[KEY], KEY).write([upsert(7)])
        client = ray_runtime.ActorShardClient(runtime.handles[other], other)
        assert await nearest(client, 7, outcome.lsn) == [7]  # type: ignore[union-attr]

    try:
        asyncio.run(asyncio.wait_for(write_and_follow(), 60.0))
    finally:
        ray_runtime.stop_actors(settings.namespace)


def test_primary_seals_its_tail_in_a_process_of_its_own(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    log = ManifestLog(store, "empty", lambda: uuid.uuid4().hex)
    log.create(CollectionConfig(dimension=2, metric="l2"))
    namespace = f"eagleray-{tmp_path.name}"
    settings = Settings(data=str(tmp_path), namespace=namespace, shard_cpus=0.0, upkeep=Upkeep(seal_points=20))
    runtime = ray_runtime.RayRuntime(settings)

    async def write_until_sealed() -> None:
        runtime.start(KEY, WANTED)
        await runtime.lead(KEY)
        client = ray_runtime.ActorShardClient(runtime.handles[KEY], KEY)
        outcomes = await client.write([upsert(number) for number in range(30)])
        assert all(isinstance(outcome, WriteOutcome) for outcome in outcomes), outcomes
        while (status := await runtime.status(KEY)).tail_points:
            await asyncio.sleep(0.05)
        assert (status.points, len(status.segments), status.upkeep) == (30, 1, "")
        assert log.newest_live().shards[0].applied_lsn == status.lsn
        assert [await nearest(client, number, status.lsn) for number in (0, 29)] == [[0], [29]]

    try:
        asyncio.run(asyncio.wait_for(write_until_sealed(), 60.0))
    finally:
        ray_runtime.stop_actors(namespace)


async def led_again(runtime: ray_runtime.RayRuntime, pid: int) -> int:
    """Until the replica runs in another process and leads; that process."""
    while True:
        try:
            status = await runtime.status(KEY)
            if status.pid != pid:
                await runtime.lead(KEY)
                return status.pid
        except Unavailable as error:
            print(f"not yet: {error}")
        await asyncio.sleep(0.02)


def test_acknowledged_writes_outlive_kills_of_the_process(runtime: ray_runtime.RayRuntime) -> None:
    acknowledged: set[int] = set()
    numbers = itertools.count()

    async def write_on(client: ray_runtime.ActorShardClient) -> None:
        """Until the process dies."""
        while True:
            number = next(numbers)
            try:
                (outcome,) = await client.write([upsert(number)])
            except Unavailable:
                return
            assert isinstance(outcome, WriteOutcome), outcome
            acknowledged.add(number)

    async def kill_again_and_again() -> None:
        client = ray_runtime.ActorShardClient(runtime.handles[KEY], KEY)
        pid = (await runtime.status(KEY)).pid
        await runtime.lead(KEY)
        for _ in range(3):
            before = len(acknowledged)
            writers = [asyncio.ensure_future(write_on(client)) for _ in range(4)]
            while len(acknowledged) < before + 50:
                await asyncio.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            await asyncio.gather(*writers)
            pid = await led_again(runtime, pid)
            ids = sorted(acknowledged)
            found = (await client.fetch(1, pa.array(ids), [])).found
            assert found.all(), np.array(ids)[~found]
        print(f"{len(acknowledged)} of {next(numbers)} writes were acknowledged")

    asyncio.run(asyncio.wait_for(kill_again_and_again(), 90.0))


def test_status_of_a_stopped_replica_is_not_found(runtime: ray_runtime.RayRuntime) -> None:
    handle = runtime.handles[KEY]
    runtime.stop(KEY)
    runtime.handles[KEY] = handle
    with pytest.raises(NotFound):
        asyncio.run(runtime.status(KEY))


def test_existing_finds_replicas_of_an_earlier_supervisor(runtime: ray_runtime.RayRuntime) -> None:
    asyncio.run(runtime.status(KEY))
    later = ray_runtime.RayRuntime(runtime._settings)
    assert later.existing() == [KEY]


def test_replica_of_a_missing_collection_says_why(tmp_path: Path) -> None:
    settings = Settings(data=str(tmp_path), namespace="missing", shard_cpus=0.0)
    runtime = ray_runtime.RayRuntime(settings)
    runtime.start(KEY, WANTED)
    status: Any = asyncio.run(runtime.status(KEY))
    assert status.state == "failed"
    assert "no collection 'empty'" in status.error
    ray_runtime.stop_actors("missing")


def test_supervisor_with_changed_settings_is_replaced_and_found_again(tmp_path: Path) -> None:
    settings = Settings(data=str(tmp_path), namespace="changed", shard_cpus=0.0)

    async def change_settings() -> None:
        first = await ray_runtime.ensure_supervisor(settings)
        directory = ray_runtime.RayDirectory(first, "changed")
        before = await directory.next_table(None)
        assert (await ray_runtime.ensure_supervisor(settings))._actor_id == first._actor_id
        second = await ray_runtime.ensure_supervisor(replace(settings, reconcile_period_s=0.5))
        assert second._actor_id != first._actor_id
        assert (await ray_runtime.answer(second.settings.remote(), "it")).reconcile_period_s == 0.5
        with pytest.raises(Unavailable):
            await directory.next_table(before.stamp)
        assert (await directory.next_table(before.stamp)).stamp != before.stamp

    asyncio.run(change_settings())
    ray_runtime.stop_actors("changed")


def test_supervisor_over_other_data_is_a_conflict(tmp_path: Path) -> None:
    settings = Settings(data=str(tmp_path / "a"), namespace="conflict", shard_cpus=0.0)

    async def start_two() -> None:
        await ray_runtime.ensure_supervisor(settings)
        with pytest.raises(Conflict, match="another namespace"):
            await ray_runtime.ensure_supervisor(replace(settings, data=str(tmp_path / "b")))

    asyncio.run(start_two())
    ray_runtime.stop_actors("conflict")
