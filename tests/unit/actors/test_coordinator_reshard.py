"""Writes and reads through a coordinator while its collection is served by another number of shards, or generation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pyarrow as pa
import pytest

from actors import generation_switch, write_router
from actors.coordinator import Coordinator
from actors.shard_client import ServingTable
from cluster.config import CollectionConfig, Limits
from cluster.errors import Conflict, Exhausted, Fenced, Unavailable
from cluster.query import Query
from cluster.write import WriteResult
from tests.unit.actors.cluster_in_memory import (
    PATIENT_S,
    Cluster,
    delete,
    ids_of_shard,
    shard_of,
    upsert,
    with_cluster,
)

IDS = list(range(40))
VECTORS = np.zeros((1, 2), np.float32)
ENDED = Fenced("the log of the shard has ended")
Scenario = Callable[[Coordinator, Cluster], Awaitable[None]]


def ids_in(cluster: Cluster, shard: int) -> list[int]:
    return sorted(cluster.of(shard).points)


def end_logs(cluster: Cluster, *shards: int) -> None:
    for shard in shards:
        cluster.of(shard).answers = [ENDED] * 1_000


def begin_logs(cluster: Cluster, shards: int, lsn: int) -> None:
    """Have the first shards lead the logs of a new set, which begins behind an LSN."""
    for shard in range(shards):
        replica = cluster.of(shard)
        replica.answers, replica.shards, replica.lsn = [], shards, lsn


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# --- writes


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (3, 1)])
def test_write_that_found_the_old_logs_ended_is_split_by_the_new_routing(before: int, after: int) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, *range(before))
        writes = [asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S)) for _ in range(5)]
        await until(lambda: all(cluster.of(shard).writes for shard in range(before)))
        begin_logs(cluster, after, 10)
        coordinator.apply(cluster.table(after, generation=2, log_start=10))
        for write in writes:
            result = await write
            assert (result.count, set(result.lsn)) == (40, set(range(after)))
        gone = await coordinator.write("words", delete(*IDS[:7]), PATIENT_S)
        assert gone.count == 7
        for shard in range(after):
            assert ids_in(cluster, shard) == [value for value in IDS[7:] if shard_of(after, value) == shard]
        for shard in range(after, before):
            assert ids_in(cluster, shard) == []

    with_cluster(scenario, shards=max(before, after), served=before)


def test_parts_of_a_write_that_were_applied_stay_and_the_others_are_split_again() -> None:
    mine = [value for value in IDS if shard_of(2, value) == 0]
    other = [value for value in IDS if shard_of(2, value) == 1]

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 1)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(1).writes)
        assert ids_in(cluster, 0) == mine
        begin_logs(cluster, 3, 100)
        coordinator.apply(cluster.table(3, generation=2, log_start=100))
        result = await write
        again = {shard_of(3, value) for value in other}
        assert 0 not in again, "the test's ids do not show what they should"
        assert result == WriteResult(40, {0: 1} | dict.fromkeys(sorted(again), 101))
        assert ids_in(cluster, 0) == mine
        assert sorted(value for shard in again for value in ids_in(cluster, shard)) == other
        assert len(cluster.of(0).writes) == 1

    with_cluster(scenario, shards=3, served=2)


def test_lsn_of_a_shard_number_that_acknowledged_twice_is_the_higher_one_and_counts_add_up() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 1)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(1).writes and cluster.of(0).points)
        begin_logs(cluster, 1, 100)
        coordinator.apply(cluster.table(1, generation=2, log_start=100))
        assert await write == WriteResult(40, {0: 101})
        assert ids_in(cluster, 0) == IDS

    with_cluster(scenario)


def test_part_that_may_have_been_applied_is_not_sent_again_and_reported_beside_the_others() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0).answers = [Unavailable("the put's answer was lost")]
        cluster.of(1).answers = [ENDED] * 1_000
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes and cluster.of(1).writes)
        begin_logs(cluster, 3, 7)
        coordinator.apply(cluster.table(3, generation=2, log_start=7))
        with pytest.raises(Unavailable, match="not by shard 0: the put's answer was lost") as caught:
            await write
        assert (caught.value.lsn, caught.value.failed) == ({1: 8, 2: 8}, (0,))
        assert ids_in(cluster, 0) == []

    with_cluster(scenario, shards=3, served=2)


def test_part_that_hangs_in_an_old_primary_holds_up_none_that_is_split_again() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(2).gate.clear()  # it is not among the new shards
        end_logs(cluster, 0, 1)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), 0.5))
        await until(lambda: cluster.of(0).writes and cluster.of(1).writes)
        begin_logs(cluster, 2, 7)
        coordinator.apply(cluster.table(2, generation=2, log_start=7))
        await until(lambda: cluster.of(0).points and cluster.of(1).points)
        assert not write.done()
        with pytest.raises(Unavailable, match=r"not by shard 2: .*may have been applied") as caught:
            await write
        assert (caught.value.lsn, caught.value.failed) == ({0: 8, 1: 8}, (2,))

    with_cluster(scenario, shards=3)


@pytest.mark.parametrize(("before", "after", "hangs"), [(2, 1, 1), (1, 2, 0)], ids=["gone", "stays"])
def test_writes_behind_a_full_window_of_an_old_log_are_split_again_at_once(before: int, after: int, hangs: int) -> None:
    ids = [value for value in range(100) if shard_of(before, value) == hangs != shard_of(after, value)][:6]

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(hangs).gate.clear()
        hanging = [asyncio.ensure_future(coordinator.write("words", upsert(value), PATIENT_S)) for value in ids[:2]]
        await asyncio.sleep(0.01)
        waiting = [asyncio.ensure_future(coordinator.write("words", upsert(value), PATIENT_S)) for value in ids[2:]]
        await asyncio.sleep(0.01)
        coordinator.apply(cluster.table(after, generation=2, log_start=7))
        assert [(await write).count for write in waiting] == [1, 1, 1, 1]
        assert ids_in(cluster, 1 - hangs) == ids[2:]
        assert not any(write.done() for write in hanging)
        for write in hanging:
            write.cancel()
        await asyncio.wait(hanging)

    with_cluster(scenario, shards=2, served=before)


def test_parts_that_are_given_back_one_soon_after_the_other_are_one_write_again() -> None:
    """What falls to one shard in one request is seen as a whole or not at all."""

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 0, 1)
        cluster.of(1).gate.clear()
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes)
        begin_logs(cluster, 1, 10)
        coordinator.apply(cluster.table(1, generation=2))
        await asyncio.sleep(0.005)
        cluster.of(1).gate.set()
        assert await write == WriteResult(40, {0: 11})

    with_cluster(scenario)


def test_parts_that_are_given_back_wait_while_no_table_shows_the_collection() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 0, 1)
        cluster.of(1).gate.clear()
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes)
        begin_logs(cluster, 1, 10)
        coordinator.apply(cluster.table(1, generation=2))
        await asyncio.sleep(0)
        coordinator.apply(ServingTable("unready", {}, {"words": "its replicas are loading"}))
        cluster.of(1).gate.set()
        await asyncio.sleep(2 * write_router.GATHER_S)
        assert not write.done()
        coordinator.apply(cluster.table(1, generation=2))
        assert (await write).count == 40
        assert ids_in(cluster, 0) == IDS

    with_cluster(scenario)


def test_write_waits_for_the_next_table_and_then_says_that_nothing_was_applied() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 0, 1)
        with pytest.raises(Unavailable, match=r"nothing was applied within 0\.2 s: the log of the shard has ended"):
            await coordinator.write("words", upsert(*IDS), 0.2)

    with_cluster(scenario)


def test_coordinator_with_an_old_table_writes_nothing_to_the_log_of_another_routing() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        begin_logs(cluster, 2, 10)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes)
        assert ids_in(cluster, 0) == []
        coordinator.apply(cluster.table(2, generation=2, log_start=10))
        assert (await write).lsn == {0: 11, 1: 11}

    with_cluster(scenario, served=1)


def test_part_too_large_for_the_new_shard_is_exhausted_and_what_was_applied_is_told() -> None:
    bound = upsert(*range(30)).size_bytes

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 1, 2)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*range(60)), PATIENT_S))
        await until(lambda: cluster.of(1).writes and cluster.of(2).writes and cluster.of(0).points)
        begin_logs(cluster, 1, 10)
        coordinator.apply(cluster.table(1, generation=2, log_start=10))
        with pytest.raises(Unavailable, match=r"acknowledged by shard 0 .*queued_write_bytes_per_shard") as caught:
            await write
        assert (caught.value.lsn, caught.value.failed) == ({0: 1}, (1, 2))

    with_cluster(scenario, shards=3, limits=Limits(queued_write_bytes_per_shard=bound))


def test_write_whose_collection_was_replaced_and_rerouted_is_a_conflict() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 0)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes)
        begin_logs(cluster, 2, 10)
        coordinator.apply(cluster.table(2, generation=2, config=CollectionConfig(3, metric="l2", shards=2)))
        with pytest.raises(Conflict, match="was replaced meanwhile; nothing was applied"):
            await write
        assert ids_in(cluster, 0) == ids_in(cluster, 1) == []

    with_cluster(scenario, served=1)


def test_collection_replaced_between_two_new_routings_is_a_conflict() -> None:
    """One part is given back by the new routing; while that is waited for, another collection takes its place."""

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(1).gate.clear()
        cluster.of(0).answers = [ENDED] * 1_000
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), 0.5))
        await until(lambda: cluster.of(0).writes)
        begin_logs(cluster, 1, 10)
        coordinator.apply(cluster.table(1, generation=2))
        await asyncio.sleep(0)
        coordinator.apply(cluster.table(1, generation=3, config=CollectionConfig(2, metric="ip")))
        with pytest.raises(Unavailable, match=r"shard 0: collection 'words' was replaced.*shard 1: .*may have been"):
            await write
        assert ids_in(cluster, 0) == []

    with_cluster(scenario)


def test_client_that_gives_up_while_its_write_is_split_again_leaves_nothing_behind() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        end_logs(cluster, 0)
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(0).writes)
        coordinator.apply(cluster.table(2, generation=2, primaries={}))
        await asyncio.sleep(0.01)
        write.cancel()
        await asyncio.wait({write})
        begin_logs(cluster, 2, 10)
        coordinator.apply(cluster.table(2, generation=2))
        assert (await coordinator.write("words", upsert(*IDS[:5]), PATIENT_S)).count == 5
        assert sorted(ids_in(cluster, 0) + ids_in(cluster, 1)) == IDS[:5]

    with_cluster(scenario, served=1)


def test_write_outcomes_of_one_shard_number_are_told_together() -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(1).answers = [ENDED] * 1_000
        write = asyncio.ensure_future(coordinator.write("words", upsert(*IDS), PATIENT_S))
        await until(lambda: cluster.of(1).writes and cluster.of(0).points)
        begin_logs(cluster, 1, 10)
        cluster.of(0).answers = [Unavailable("the store is away")]
        coordinator.apply(cluster.table(1, generation=2))
        message = r"acknowledged by shard 0 \(LSN 1\); not by shard 0: the store is away"
        with pytest.raises(Unavailable, match=message) as caught:
            await write
        assert (caught.value.lsn, caught.value.failed) == ({0: 1}, (0,))

    with_cluster(scenario)


# --- reads


async def read(coordinator: Coordinator, how: str, min_lsn: dict[int, int], timeout_s: float) -> dict[int, int]:
    """The LSNs of an answer."""
    if how == "search":
        return dict(
            (await coordinator.search("words", Query(VECTORS, timeout_ms=1e3 * timeout_s, min_lsn=min_lsn))).lsn
        )
    return dict((await coordinator.fetch("words", pa.array(IDS), ("id",), timeout_s, min_lsn)).lsn)


both = pytest.mark.parametrize("how", ["search", "fetch"])


@both
def test_lsn_of_a_shard_that_is_gone_is_in_a_generation_whose_logs_begin_behind_it(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(2, generation=2, log_start=50))
        assert await read(coordinator, how, {2: 50}, PATIENT_S) == {0: 0, 1: 0}

    with_cluster(scenario, shards=3)


@both
def test_lsn_of_a_shard_that_is_not_served_yet_waits_for_the_table_that_has_it(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        waiting = asyncio.ensure_future(read(coordinator, how, {2: 51}, PATIENT_S))
        coordinator.apply(cluster.table(2))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert cluster.of(0).asked_lsn == []
        begin_logs(cluster, 3, 51)
        coordinator.apply(cluster.table(3, generation=2, log_start=50))
        assert await waiting == {0: 51, 1: 51, 2: 51}
        assert cluster.of(2).asked_lsn == [51]

    with_cluster(scenario, shards=3, served=2)


@both
def test_lsn_of_a_shard_that_no_table_has_in_time_is_unavailable_and_says_so(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        coordinator.apply(cluster.table(2, log_start=50))
        with pytest.raises(Unavailable, match=r"shard 7: asked for LSN 51, .* has shards 0 to 1, whose logs"):
            await read(coordinator, how, {7: 51}, 0.05)
        assert cluster.of(0).asked_lsn == []

    with_cluster(scenario)


def test_no_more_reads_than_a_bound_wait_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_switch, "WAITING_MAX", 2)

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        waiting = [asyncio.ensure_future(read(coordinator, "search", {7: 1}, 0.2)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Exhausted, match="2 requests wait already"):
            await read(coordinator, "search", {7: 1}, 0.2)
        for one in waiting:
            with pytest.raises(Unavailable):
                await one
        with pytest.raises(Unavailable):  # there is room again
            await read(coordinator, "search", {7: 1}, 0.02)

    with_cluster(scenario)


@both
def test_read_whose_generation_was_dropped_is_asked_again_of_all_shards_under_the_new_table(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0).generations = {1, 2}
        cluster.of(1).gate.clear()
        reading = asyncio.ensure_future(read(coordinator, how, {}, PATIENT_S))
        await until(lambda: cluster.of(0).asked_generations == cluster.of(1).asked_generations == [1])
        coordinator.apply(cluster.table(generation=2))
        cluster.of(1).generations = {2}
        cluster.of(1).gate.set()
        assert await reading == {0: 0, 1: 0}
        assert cluster.of(0).asked_generations == cluster.of(1).asked_generations == [1, 2]

    with_cluster(scenario)


@both
def test_read_of_shards_that_are_gone_is_asked_again_of_those_that_are_served(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(2).gate.clear()
        reading = asyncio.ensure_future(read(coordinator, how, {}, PATIENT_S))
        await until(lambda: cluster.of(2).asked_generations)
        coordinator.apply(cluster.table(2, generation=2))
        cluster.of(2).generations = set()
        cluster.of(2).gate.set()
        assert await reading == {0: 0, 1: 0}
        assert cluster.of(0).asked_generations == [1, 2]

    with_cluster(scenario, shards=3)


@both
def test_read_that_failed_without_a_newer_generation_is_not_asked_again(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(1).generations = {2}
        with pytest.raises(Unavailable, match="generation 1 of 'words' is not loaded here"):
            await read(coordinator, how, {}, PATIENT_S)
        assert cluster.of(1).asked_generations == [1]

    with_cluster(scenario)


@pytest.mark.parametrize("config", [CollectionConfig(3, metric="l2"), CollectionConfig(2, metric="ip")], ids=str)
@both
def test_read_is_not_asked_again_of_a_collection_that_it_was_not_made_for(how: str, config: CollectionConfig) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0).gate.clear()
        cluster.of(0).generations = {2}
        reading = asyncio.ensure_future(read(coordinator, how, {}, PATIENT_S))
        await until(lambda: cluster.of(0).asked_generations)
        coordinator.apply(cluster.table(generation=2, config=config))
        cluster.of(0).gate.set()
        with pytest.raises(Unavailable, match="generation 1 of 'words' is not loaded here"):
            await reading
        assert cluster.of(0).asked_generations == [1]

    with_cluster(scenario, shards=1)


@both
def test_read_that_waits_for_an_lsn_of_a_newer_log_goes_on_under_the_table_that_has_it(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0).patient = True
        reading = asyncio.ensure_future(read(coordinator, how, {0: 60}, PATIENT_S))
        await until(lambda: cluster.of(0).asked_generations)
        coordinator.apply(cluster.table(1))
        await asyncio.sleep(0.01)
        assert cluster.of(0).asked_generations == [1]
        cluster.of(0).patient = False  # of the old generation it never has it
        cluster.of(1).lsn = cluster.of(0).lsn = 60
        coordinator.apply(cluster.table(2, generation=2, log_start=50))
        assert await reading == {0: 60, 1: 60}
        assert cluster.of(1).asked_generations == [2]

    with_cluster(scenario, served=1)


def test_fetch_asks_a_shard_without_any_of_its_ids_for_an_lsn_that_nobody_has_seen() -> None:
    """An id may have moved to that shard: of a newer generation, which another coordinator knows already."""
    here = pa.array(ids_of_shard(2, 1, 3))

    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        with pytest.raises(Unavailable, match="shard 0: has applied LSN 0, not yet LSN 60"):
            await coordinator.fetch("words", here, ("id",), PATIENT_S, {0: 60})
        cluster.of(0).lsn = 60
        await coordinator.fetch("words", here, ("id",), PATIENT_S, {0: 60})
        assert cluster.of(0).asked_lsn == [60, 60]
        await coordinator.fetch("words", here, ("id",), PATIENT_S, {0: 60})
        assert cluster.of(0).asked_lsn == [60, 60]  # seen now
        assert cluster.of(1).asked_lsn == [0, 0, 0]

    with_cluster(scenario)


@both
def test_cancelled_read_that_waits_for_an_lsn_is_cancelled(how: str) -> None:
    async def scenario(coordinator: Coordinator, cluster: Cluster) -> None:
        cluster.of(0).patient = True
        reading = asyncio.ensure_future(read(coordinator, how, {0: 60}, PATIENT_S))
        await until(lambda: cluster.of(0).asked_generations)
        reading.cancel()
        coordinator.apply(cluster.table(generation=2))
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert cluster.of(0).asked_generations == [1]

    with_cluster(scenario, shards=1)
