"""Writes through a coordinator: split over primaries, joined to one answer, moved when a primary changes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.coordinator import Coordinator
from actors.shard_client import ServingTable
from actors.write_parts import joined_result, split_write
from cluster.config import CollectionConfig, Limits
from cluster.errors import Conflict, EaglerayError, Exhausted, Fenced, NotFound, Unavailable
from cluster.placement import ReplicaKey
from cluster.query import Query
from cluster.routing import Routing
from cluster.write import WriteOutcome, WriteResult
from tests.unit.actors.cluster_in_memory import (
    PATIENT_S,
    Cluster,
    delete,
    ids_of_shard,
    shard_of,
    upsert,
    with_cluster,
)


def test_write_goes_to_the_shards_of_its_ids_and_is_answered_by_all() -> None:
    ids = list(range(40))

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        result = await coordinator.write("words", upsert(*ids), PATIENT_S)
        assert result == WriteResult(40, {0: 1, 1: 1, 2: 1})
        for shard in range(3):
            assert sorted(cluster.of(shard).points) == [value for value in ids if shard_of(3, value) == shard]
            assert all(vector == [value, 1.0] for value, vector in cluster.of(shard).points.items())
        gone = [ids_of_shard(3, 0, 1)[0], ids_of_shard(3, 1, 1)[0], 10**6]
        result = await coordinator.write("words", delete(*gone), PATIENT_S)
        assert result.count == 2
        assert all(lsn == 2 for lsn in result.lsn.values())

    with_cluster(scenario, shards=3)


@pytest.mark.parametrize("shards", [1, 3])
def test_write_of_one_shard_is_not_copied(shards: int) -> None:
    for write in (upsert(*ids_of_shard(shards, 0, 5)), delete(*ids_of_shard(shards, 0, 5))):
        (part,) = split_write(write, Routing(shards)).values()
        assert part.upserts is write.upserts
        assert part.deletes is write.deletes
        assert part.shards == shards


def test_parts_of_a_write_hold_their_own_bytes_only() -> None:
    write = upsert(*range(100))
    parts = split_write(write, Routing(4))
    assert sum(part.points for part in parts.values()) == 100
    assert sum(part.size_bytes for part in parts.values()) == write.size_bytes


def test_write_that_is_acknowledged_in_part_names_the_shards_on_both_sides() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(1).answers = [Unavailable("the put timed out", 3.0)]
        with pytest.raises(Unavailable) as caught:
            await coordinator.write("words", upsert(*range(20)), PATIENT_S)
        assert str(caught.value) == (
            "acknowledged by shard 0 (LSN 1); not by shard 1: the put timed out. Sending the same again is safe"
        )
        assert caught.value.retry_after_s == 3.0
        assert (caught.value.lsn, caught.value.failed) == ({0: 1}, (1,))
        assert (await coordinator.write("words", upsert(*range(20)), PATIENT_S)).count == 20

    with_cluster(scenario)


OK = WriteOutcome(7, 2)


@pytest.mark.parametrize(
    ("outcomes", "kind", "message"),
    [
        ({0: Exhausted("full", 0.5)}, Exhausted, "full"),
        ({0: Exhausted("full", 0.5), 1: Exhausted("too", 0.5)}, Exhausted, "full"),
        ({0: Exhausted("full", 0.5), 1: OK}, Unavailable, r"acknowledged by shard 1 \(LSN 7\); not by shard 0: full"),
        (
            {0: Exhausted("full", 0.5), 1: Unavailable("away")},
            Unavailable,
            "no shard acknowledged.*0: full; shard 1: away",
        ),
        ({0: Conflict("replaced"), 1: Conflict("replaced")}, Conflict, "replaced"),
        ({0: OK, 1: ValueError("a bug")}, ValueError, "a bug"),
    ],
    ids=str,
)
def test_outcomes_of_shards_are_one_error(outcomes: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        joined_result(outcomes.items())
    if isinstance(caught.value, Exhausted):
        assert caught.value.retry_after_s == 0.5
    if isinstance(caught.value, Unavailable):
        done = {shard: each.lsn for shard, each in outcomes.items() if isinstance(each, WriteOutcome)}
        assert (caught.value.lsn, {*done, *caught.value.failed}) == (done, {0, 1})


def test_write_that_a_shard_can_never_take_is_sent_to_none() -> None:
    small, large = ids_of_shard(2, 0, 1), ids_of_shard(2, 1, 9)
    bound = upsert(*large[:8]).size_bytes

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        for refuse in (
            coordinator.check_size("words", upsert(*small, *large)),
            coordinator.write("words", upsert(*small, *large), PATIENT_S),
        ):
            with pytest.raises(Exhausted, match="queued_write_bytes_per_shard: the write has") as caught:
                await refuse
            assert caught.value.retry_after_s is None
        assert cluster.of(0).writes == cluster.of(1).writes == []
        spread = upsert(*ids_of_shard(2, 0, 8), *large[:8])  # more than the bound, but not of one shard
        await coordinator.check_size("words", spread)
        assert (await coordinator.write("words", spread, PATIENT_S)).count == 16

    with_cluster(scenario, limits=Limits(queued_write_bytes_per_shard=bound))


def test_write_follows_the_primary_to_another_replica() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0, 0).answers = [Fenced("not the primary")] * 1_000
        task = asyncio.ensure_future(coordinator.write("words", upsert(5), PATIENT_S))
        while not cluster.of(0, 0).writes:
            await asyncio.sleep(0)
        assert not task.done()
        coordinator.apply(cluster.table(primaries={0: ReplicaKey("words", 0, 1)}))
        assert await task == WriteResult(1, {0: 1})
        assert (list(cluster.of(0, 0).points), list(cluster.of(0, 1).points)) == ([], [5])

    with_cluster(scenario, shards=1, replicas=2)


def test_write_waits_while_there_is_no_primary_or_no_collection_to_see() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(primaries={}))
        task = asyncio.ensure_future(coordinator.write("words", upsert(5), PATIENT_S))
        await asyncio.sleep(0)
        coordinator.apply(cluster.table(primaries={0: ReplicaKey("words", 0, 9)}))  # a process that is not known yet
        await asyncio.sleep(0)
        coordinator.apply(ServingTable("unready", {}, {"words": "its replicas are loading"}))
        await asyncio.sleep(0)
        assert not task.done()
        coordinator.apply(cluster.table())
        assert await task == WriteResult(1, {0: 1})

    with_cluster(scenario, shards=1)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"config": CollectionConfig(3, metric="l2")}, Conflict),
        ({"config": CollectionConfig(2, metric="cosine")}, Conflict),
        ({"config": CollectionConfig(2, metric="l2", vector_dtype="float16")}, Conflict),
        (None, NotFound),
    ],
    ids=str,
)
def test_write_to_a_collection_that_was_replaced_or_deleted_meanwhile_is_not_applied(
    changes: dict[str, Any] | None, kind: type[EaglerayError]
) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(primaries={}))
        task = asyncio.ensure_future(coordinator.write("words", upsert(5), PATIENT_S))
        await asyncio.sleep(0)
        coordinator.apply(ServingTable("deleted") if changes is None else cluster.table(**changes))
        with pytest.raises(kind):
            await task
        assert cluster.of(0).writes == []

    with_cluster(scenario, shards=1)


def test_new_index_options_do_not_keep_a_write_that_waits_from_its_collection() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(primaries={}))
        task = asyncio.ensure_future(coordinator.write("words", upsert(5), PATIENT_S))
        await asyncio.sleep(0)
        coordinator.apply(cluster.table(config=CollectionConfig(2, metric="l2", replicas=3), generation=2))
        assert (await task).count == 1

    with_cluster(scenario, shards=1)


def test_client_that_gives_up_leaves_the_writes_of_others_alone() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(primaries={}))
        tasks = [asyncio.ensure_future(coordinator.write("words", upsert(n, n + 10), PATIENT_S)) for n in range(6)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks[::2])
        coordinator.apply(cluster.table())
        assert [(await task).count for task in tasks[1::2]] == [2, 2, 2]
        stored = sorted(value for shard in range(2) for value in cluster.of(shard).points)
        assert stored == [1, 3, 5, 11, 13, 15]

    with_cluster(scenario)


def test_search_and_fetch_ask_each_shard_for_its_own_lsn_and_tell_what_they_have() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        await coordinator.write("words", upsert(*range(20)), PATIENT_S)
        await coordinator.write("words", upsert(*ids_of_shard(2, 1, 1)), PATIENT_S)
        vectors = np.zeros((1, 2), np.float32)
        result = await coordinator.search("words", Query(vectors, min_lsn={1: 2}))
        assert result.lsn == {0: 1, 1: 2}
        assert [cluster.of(shard).asked_lsn for shard in range(2)] == [[0], [2]]
        fetched = await coordinator.fetch("words", pa.array(range(20)), ("id",), PATIENT_S, {0: 1})
        assert [cluster.of(shard).asked_lsn[-1] for shard in range(2)] == [1, 0]
        assert fetched.lsn == {0: 1, 1: 2}

    with_cluster(scenario)


def test_replica_that_is_behind_is_passed_over_and_is_not_suspect_to_other_searches() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        vectors = np.zeros((1, 2), np.float32)
        cluster.of(0, 1).lsn = 5
        assert (await coordinator.search("words", Query(vectors, min_lsn={0: 5}))).lsn == {0: 5}
        assert cluster.of(0, 0).asked_lsn == [5]
        assert (await coordinator.search("words", Query(vectors))).lsn == {0: 0}
        assert cluster.of(0, 0).asked_lsn == [5, 0]

    with_cluster(scenario, shards=1, replicas=2)


def test_replicas_are_told_what_is_left_of_the_time_of_a_fetch() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        with pytest.raises(Unavailable):
            await coordinator.fetch("words", pa.array([1]), ("id",), 5.0, {0: 7})
        (first,), (second,) = (cluster.of(0, number).fetch_timeouts_s for number in range(2))
        assert 0.0 < second < first <= 5.0

    with_cluster(scenario, shards=1, replicas=2)


def test_lsn_that_no_replica_reaches_is_unavailable_and_says_which_shard_lacks_what() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        await coordinator.write("words", upsert(*range(20)), PATIENT_S)
        vectors = np.zeros((1, 2), np.float32)
        with pytest.raises(Unavailable, match=r"shard 1: .*not yet LSN 9 \(asked for LSN 9, the last one known is 1\)"):
            await coordinator.search("words", Query(vectors, min_lsn={1: 9}))
        partial = await coordinator.search("words", Query(vectors, min_lsn={1: 9}, min_coverage=0.5))
        assert (partial.lsn, partial.coverage.missing) == ({0: 1}, (1,))
        with pytest.raises(Unavailable, match=r"shards \[0\] did not answer: shard 0: .*asked for LSN 7"):
            await coordinator.fetch("words", pa.array(range(20)), ("id",), PATIENT_S, {0: 7})

    with_cluster(scenario)
