from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import write_batcher as module
from actors.write_batcher import MAYBE, QUEUE_FULL_RETRY_S, MadeFor, WriteBatcher
from cluster.config import Limits
from cluster.errors import Conflict, EaglerayError, Exhausted, Fenced, Invalid, NotFound, Unavailable
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome

ONE_SHARD = MadeFor(Routing(1), 2, "l2", "int64", "float32")
ID_BYTES = 8  # of a delete of one id
PATIENT_S = 10.0
LIMITS = Limits()
Outcomes = tuple[WriteOutcome | EaglerayError, ...]


class Primary:
    """A primary, and the table that names it: keeps every call until told to answer."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []  # the ids that each call deletes
        self.writes: list[Sequence[PointWrite]] = []
        self.timeouts_s: list[float] = []
        self.refusal: EaglerayError | None = None  # why the table names no primary
        self.asked = 0
        self.table = asyncio.Event()
        self.acknowledged: list[int] = []
        self._answers: list[asyncio.Future[Outcomes]] = []
        self._came = asyncio.Condition()

    def connect(self, made_for: MadeFor) -> Primary:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        return self

    def publish(self, refusal: EaglerayError | None = None) -> None:
        """Another serving table."""
        self.refusal = refusal
        table, self.table = self.table, asyncio.Event()
        table.set()

    async def write(self, writes: Sequence[PointWrite], timeout_s: float) -> Outcomes:
        async with self._came:
            self.timeouts_s.append(timeout_s)
            self.calls.append([value for write in writes for value in write.deletes.to_pylist()])
            self.writes.append(writes)
            self._answers.append(asyncio.get_running_loop().create_future())
            self._came.notify_all()
        return await self._answers[len(self.calls) - 1]

    async def search(self, request: Any) -> Any:
        raise AssertionError("writes only")

    async def fetch(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("writes only")

    async def came(self, calls: int) -> None:
        """Wait until that many calls have come in all."""
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(lambda: len(self.calls) >= calls)

    def answer(self, number: int, outcomes: Outcomes | Exception | None = None) -> None:
        if isinstance(outcomes, Exception):
            self._answers[number].set_exception(outcomes)
        else:
            count = len(self.writes[number])
            self._answers[number].set_result(outcomes or tuple(WriteOutcome(number + 1, 1) for _ in range(count)))


def with_batcher(scenario: Callable[[WriteBatcher, Primary], Awaitable[None]], limits: Limits = LIMITS) -> Primary:
    """Run a scenario; returns the primary."""

    async def run() -> Primary:
        primary = Primary()
        batcher = WriteBatcher(primary.connect, limits, lambda: primary.table, primary.acknowledged.append)
        async with asyncio.timeout(20):
            await scenario(batcher, primary)
        return primary

    return asyncio.run(run())


def delete(*ids: int) -> PointWrite:
    return PointWrite(deletes=pa.array(ids, pa.int64()))


def write(
    batcher: WriteBatcher, *ids: int, made_for: MadeFor = ONE_SHARD, timeout_s: float = PATIENT_S
) -> asyncio.Task[WriteOutcome]:
    return asyncio.ensure_future(batcher.write(delete(*ids), made_for, timeout_s))


async def fill_window(batcher: WriteBatcher, primary: Primary) -> list[asyncio.Task[WriteOutcome]]:
    """Occupy both slots."""
    sent = [write(batcher, -1)]
    await primary.came(1)
    sent.append(write(batcher, -2))
    await primary.came(2)
    return sent


async def lsns_of(*writes: asyncio.Task[WriteOutcome]) -> list[int]:
    return [(await task).lsn for task in writes]


def test_write_leaves_at_once_and_uncopied_while_the_window_has_room() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        mine = delete(1)
        task = asyncio.ensure_future(batcher.write(mine, ONE_SHARD, PATIENT_S))
        for _ in range(3):
            await asyncio.sleep(0)  # the write, its call, the primary: no timer was waited for
        assert primary.calls == [[1]]
        assert primary.writes[0][0] is mine
        primary.answer(0, (WriteOutcome(17, 1),))
        assert await task == WriteOutcome(17, 1)

    assert with_batcher(scenario).acknowledged == [17]


def test_writes_gather_while_the_window_is_full_and_leave_together() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, number) for number in (3, 4, 5)]
        await asyncio.sleep(0)
        assert len(primary.calls) == 2
        primary.answer(0)
        await primary.came(3)
        assert primary.calls[2] == [3, 4, 5]
        primary.answer(1)
        primary.answer(2)
        assert await lsns_of(*early, *late) == [1, 2, 3, 3, 3]

    assert with_batcher(scenario).acknowledged == [1, 2, 3, 3, 3]


def test_calls_are_cut_at_the_size_of_a_wal_object_but_one_larger_write_goes_alone() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, *ids) for ids in [(1,), (2, 3), (4,), (5, 6, 7, 8), (9,)]]
        await asyncio.sleep(0)
        for number in range(6):
            await primary.came(number + 1)
            primary.answer(number)
        await asyncio.gather(*early, *late)

    primary = with_batcher(scenario, Limits(wal_object_bytes=3 * ID_BYTES))
    assert primary.calls == [[-1], [-2], [1, 2, 3], [4], [5, 6, 7, 8], [9]]


def test_write_over_the_queue_bound_is_exhausted_and_the_others_are_not() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, 3, 4)]
        await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="queued_write_bytes_per_shard: writes of 16 bytes wait already") as caught:
            await batcher.write(delete(5, 6), ONE_SHARD, PATIENT_S)
        assert caught.value.retry_after_s == QUEUE_FULL_RETRY_S
        late.append(write(batcher, 7))
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        assert primary.calls[2] == [3, 4, 7]
        primary.answer(1)
        primary.answer(2)
        await asyncio.gather(*early, *late)
        again = write(batcher, 5, 6)  # the queue is empty again
        await primary.came(4)
        primary.answer(3)
        assert await lsns_of(again) == [4]

    with_batcher(scenario, Limits(queued_write_bytes_per_shard=3 * ID_BYTES))


def test_write_that_could_never_wait_is_exhausted_for_good() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        with pytest.raises(Exhausted, match="the write has 24 bytes, at most 16 may wait") as caught:
            await batcher.write(delete(1, 2, 3), ONE_SHARD, PATIENT_S)
        assert caught.value.retry_after_s is None

    assert with_batcher(scenario, Limits(queued_write_bytes_per_shard=2 * ID_BYTES)).calls == []


@pytest.mark.parametrize("whole_call", [False, True])
def test_fenced_write_goes_to_the_next_primary_once_the_table_names_it(
    whole_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAME_PRIMARY_PAUSE_S", PATIENT_S)
    fenced = Fenced("replica words:0:0 is not the primary of shard 0")

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        task = write(batcher, 1)
        await primary.came(1)
        primary.answer(0, fenced if whole_call else (fenced,))
        primary.publish()
        await primary.came(2)
        primary.answer(1, (WriteOutcome(9, 1),))
        assert await task == WriteOutcome(9, 1)

    assert with_batcher(scenario).calls == [[1], [1]]


def test_fenced_write_is_sent_again_under_the_same_table_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAME_PRIMARY_PAUSE_S", 0.001)

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        task = write(batcher, 1)
        for number in range(3):
            await primary.came(number + 1)
            primary.answer(number, (Fenced("not yet"),) if number < 2 else None)
        assert await lsns_of(task) == [3]

    with_batcher(scenario)


def test_only_the_fenced_writes_of_a_call_are_sent_again_and_a_table_that_came_meanwhile_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAME_PRIMARY_PAUSE_S", PATIENT_S)

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, number) for number in (3, 4, 5, 6)]
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        primary.publish()  # before the answer
        outcomes = (WriteOutcome(2, 1), Fenced("lost"), Unavailable("the put's answer is lost"), Fenced("lost"))
        primary.answer(2, outcomes)
        await primary.came(4)
        assert primary.calls[3] == [4, 6]
        primary.answer(1)
        primary.answer(3)
        assert await lsns_of(*early, late[0], late[1], late[3]) == [1, 2, 2, 4, 4]
        with pytest.raises(Unavailable, match="the put's answer is lost"):
            await late[2]

    with_batcher(scenario)


@pytest.mark.parametrize("refusal", [Unavailable("the shard has no primary"), Fenced("none")])
def test_write_waits_for_a_primary_until_a_table_names_one(
    refusal: EaglerayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAME_PRIMARY_PAUSE_S", PATIENT_S)

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        primary.refusal = refusal
        task = write(batcher, 1)
        while not primary.asked:
            await asyncio.sleep(0)
        assert primary.calls == []
        primary.publish()
        await primary.came(1)
        primary.answer(0)
        assert await lsns_of(task) == [1]

    with_batcher(scenario)


def test_primary_is_told_how_long_the_most_patient_of_its_callers_waits() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        await fill_window(batcher, primary)
        late = [write(batcher, number, timeout_s=timeout_s) for number, timeout_s in ((1, 4.0), (2, 5.0), (3, 3.0))]
        await asyncio.sleep(0.01)
        primary.answer(0)
        await primary.came(3)
        assert 4.0 < primary.timeouts_s[2] < 5.0, "it is what is left"
        for number in (1, 2):
            primary.answer(number)
        await asyncio.gather(*late)

    with_batcher(scenario)


def test_write_without_a_primary_until_its_deadline_says_that_nothing_was_applied() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        primary.refusal = Unavailable("the shard has no primary")
        with pytest.raises(Unavailable, match=r"nothing was applied within 0\.01 s: the shard has no primary"):
            await batcher.write(delete(1), ONE_SHARD, 0.01)

    assert with_batcher(scenario).calls == []


def test_write_whose_answer_does_not_come_says_that_it_may_have_been_applied() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        with pytest.raises(Unavailable, match=MAYBE):
            await batcher.write(delete(1), ONE_SHARD, 0.01)

    assert with_batcher(scenario).calls == [[1]]


def test_call_that_never_ends_gives_its_slot_back_when_nobody_waits_any_more() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        hung = [write(batcher, 1, timeout_s=0.01)]
        await primary.came(1)
        hung.append(write(batcher, 2, timeout_s=0.01))
        late = write(batcher, 3)
        await primary.came(3)
        primary.answer(2)
        assert await lsns_of(late) == [3]
        for task in hung:
            with pytest.raises(Unavailable, match=MAYBE):
                await task

    with_batcher(scenario)


def test_hung_calls_to_an_old_primary_do_not_hold_up_writes_to_the_new_one() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        hung = await fill_window(batcher, primary)
        late = [write(batcher, 3), write(batcher, 4)]
        await asyncio.sleep(0)
        assert len(primary.calls) == 2
        batcher.primary_changed()
        await primary.came(3)
        primary.answer(2)
        assert await lsns_of(*late) == [3, 3]
        primary.answer(0)  # it was only slow
        assert await lsns_of(hung[0]) == [1]
        hung[1].cancel()

    with_batcher(scenario)


@pytest.mark.parametrize("error", [Unavailable("away"), Exhausted("full", 0.5), RuntimeError("a bug")])
def test_error_of_a_call_is_reported_not_repeated_and_frees_its_slot(error: Exception) -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = write(batcher, 3)
        await asyncio.sleep(0)
        primary.answer(0, error)
        with pytest.raises(type(error), match=str(error)):
            await early[0]
        await primary.came(3)
        primary.answer(1)
        primary.answer(2)
        assert await lsns_of(early[1], late) == [2, 3]

    assert with_batcher(scenario).calls == [[-1], [-2], [3]]


@pytest.mark.parametrize("error", [NotFound("no collection"), Conflict("replaced")])
def test_write_to_a_collection_that_is_gone_fails_at_once(error: EaglerayError) -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        primary.refusal = Unavailable("not ready")
        task = write(batcher, 1)
        await asyncio.sleep(0)
        primary.publish(error)
        with pytest.raises(type(error)):
            await task

    assert with_batcher(scenario).calls == []


def test_answer_with_too_few_outcomes_fails_the_writes() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, 3), write(batcher, 4)]
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        primary.answer(2, (WriteOutcome(5, 1),))
        assert await lsns_of(late[0]) == [5]
        with pytest.raises(ValueError, match="shorter"):
            await late[1]
        primary.answer(1)
        await asyncio.gather(*early)

    with_batcher(scenario)


def test_cancelled_writes_leave_the_queue_with_their_room() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        gone, stays = write(batcher, 3, 4), write(batcher, 5)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({gone})
        late = write(batcher, 6, 7)
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        assert primary.calls[2] == [5, 6, 7]
        primary.answer(1)
        primary.answer(2)
        assert await lsns_of(*early, stays, late) == [1, 2, 3, 3]

    with_batcher(scenario, Limits(queued_write_bytes_per_shard=3 * ID_BYTES))


def test_write_cancelled_during_its_call_leaves_the_others_of_the_call_their_answers() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, number) for number in (3, 4)]
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        late[0].cancel()
        await asyncio.wait({late[0]})
        primary.answer(1)
        primary.answer(2)
        assert await lsns_of(*early, late[1]) == [1, 2, 3]

    assert with_batcher(scenario).acknowledged == [1, 2, 3, 3]


def test_write_cancelled_while_it_is_fenced_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAME_PRIMARY_PAUSE_S", PATIENT_S)

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, number) for number in (3, 4)]
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        late[0].cancel()
        await asyncio.wait({late[0]})
        primary.answer(2, (Fenced("lost"), Fenced("lost")))
        primary.publish()
        await primary.came(4)
        assert primary.calls[3] == [4]
        primary.answer(1)
        primary.answer(3)
        assert await lsns_of(*early, late[1]) == [1, 2, 4]

    with_batcher(scenario)


def test_writes_made_for_another_collection_are_not_mixed_in_one_call() -> None:
    doubled = replace(ONE_SHARD, routing=Routing(2))

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, n, made_for=m) for n, m in [(3, ONE_SHARD), (4, ONE_SHARD), (5, doubled), (6, doubled)]]
        await asyncio.sleep(0)
        for number in range(4):
            await primary.came(number + 1)
            primary.answer(number)
        await asyncio.gather(*early, *late)

    assert with_batcher(scenario).calls[2:] == [[3, 4], [5, 6]]


def test_many_concurrent_writes_are_each_acknowledged_once() -> None:
    seed = 7
    print(f"seed {seed}")
    sizes = np.random.default_rng(seed).integers(1, 5, size=200).tolist()

    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        starts = np.cumsum([0, *sizes]).tolist()
        tasks = [write(batcher, *range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
        number = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            while number < len(primary.calls):
                outcomes: Any = None if number % 3 else tuple(Fenced("lost") for _ in primary.writes[number])
                primary.answer(number, outcomes)
                primary.publish()
                number += 1
        done = [value for n, call in enumerate(primary.calls) if n % 3 for value in call]
        assert sorted(done) == list(range(sum(sizes)))
        assert len(primary.acknowledged) == len(sizes)

    with_batcher(scenario, Limits(wal_object_bytes=20 * ID_BYTES))


def test_invalid_outcome_reaches_only_its_write() -> None:
    async def scenario(batcher: WriteBatcher, primary: Primary) -> None:
        early = await fill_window(batcher, primary)
        late = [write(batcher, number) for number in (3, 4)]
        await asyncio.sleep(0)
        primary.answer(0)
        await primary.came(3)
        primary.answer(2, (Invalid("no"), WriteOutcome(3, 1)))
        with pytest.raises(Invalid):
            await late[0]
        primary.answer(1)
        assert await lsns_of(*early, late[1]) == [1, 2, 3]

    with_batcher(scenario)
