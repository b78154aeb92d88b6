from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from actors.batcher import CALLS_AHEAD_MAX, QUEUE_FULL_RETRY_S, Batcher
from actors.call_rates import CALLS_MIN
from actors.search_queue import GroupKey
from cluster.config import Limits
from cluster.errors import EaglerayError, Exhausted, Invalid, Unavailable
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.fakes import ManualClock

TEN = GroupKey(10, SearchParams(), ())
LIMITS = Limits(calls_in_flight_per_replica=2)
Outcomes = tuple[Hits | EaglerayError, ...]


class Shard:
    """Keeps every call until told to answer; each vector's one hit is its own first number."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.calls: list[ShardSearch] = []
        self._answers: list[asyncio.Future[Outcomes]] = []
        self._came = asyncio.Condition()

    async def send(self, request: ShardSearch) -> Outcomes:
        async with self._came:
            self.calls.append(request)
            self._answers.append(asyncio.get_running_loop().create_future())
            self._came.notify_all()
        return await self._answers[len(self.calls) - 1]

    async def came(self, calls: int) -> None:
        """Wait until that many calls have come in all."""
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(lambda: len(self.calls) >= calls)

    def answer(self, number: int, outcomes: Outcomes | Exception | None = None) -> None:
        if isinstance(outcomes, Exception):
            self._answers[number].set_exception(outcomes)
        else:
            self._answers[number].set_result(outcomes or echo(self.calls[number]))


def echo(request: ShardSearch) -> tuple[Hits, ...]:
    return tuple(echo_hits(request.vectors[group.start : group.stop]) for group in request.groups)


def echo_hits(vectors: NDArray[np.float32]) -> Hits:
    first = vectors[:, 0]
    return Hits(np.ones(len(vectors), np.int64), pa.array(first.astype(np.int64)), first)


def numbers(*values: int) -> NDArray[np.float32]:
    return np.array([[value, 0.0] for value in values], np.float32)


def with_batcher(scenario: Callable[[Batcher, Shard], Awaitable[None]], limits: Limits = LIMITS) -> list[int]:
    """Run a scenario; returns the sizes of the batches, in vectors. Calls take the time that `shard.clock` is told."""
    sizes: list[int] = []

    async def run() -> None:
        shard = Shard()
        async with asyncio.timeout(20):
            await scenario(Batcher(shard.send, limits, sizes.append, clock=shard.clock), shard)

    asyncio.run(run())
    return sizes


def ask(
    batcher: Batcher, *values: int, generation: int = 1, key: GroupKey = TEN, min_lsn: int = 0
) -> asyncio.Task[Hits]:
    return asyncio.ensure_future(batcher.search(numbers(*values), generation, key, min_lsn=min_lsn))


async def fill_window(batcher: Batcher, shard: Shard) -> list[asyncio.Task[Hits]]:
    """Occupy both slots."""
    return await one_by_one(batcher, shard, -1, -2)


async def one_by_one(batcher: Batcher, shard: Shard, *values: int) -> list[asyncio.Task[Hits]]:
    """Ask each once the call for the one before has come: those of one turn of the event loop share a call."""
    asked = []
    for value in values:
        asked.append(ask(batcher, value))
        await shard.came(len(shard.calls) + 1)
    return asked


async def ids_of(*asked: asyncio.Task[Hits]) -> list[list[int]]:
    return [(await task).ids.to_pylist() for task in asked]


def test_search_leaves_at_once_while_the_window_has_room() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        first = ask(batcher, 1)
        await asyncio.sleep(0)  # the search runs and pumps
        await asyncio.sleep(0)  # the call runs: no timer was waited for
        assert [call.vectors[:, 0].tolist() for call in shard.calls] == [[1.0]]
        second = ask(batcher, 2)
        await shard.came(2)
        shard.answer(1)
        shard.answer(0)
        assert await ids_of(first, second) == [[1], [2]]

    assert with_batcher(scenario) == [1, 1]


def test_searches_of_one_turn_of_the_event_loop_leave_together() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        asked = [ask(batcher, number) for number in range(3)]
        await shard.came(1)
        shard.answer(0)
        assert await ids_of(*asked) == [[0], [1], [2]]
        assert len(shard.calls) == 1

    assert with_batcher(scenario) == [3]


def test_many_searches_of_one_turn_are_shared_between_the_free_slots() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        asked = [ask(batcher, number) for number in range(41)]
        await shard.came(2)
        for number in (1, 0):
            shard.answer(number)
        assert await ids_of(*asked) == [[number] for number in range(41)]

    assert with_batcher(scenario) == [21, 20]


def test_searches_gather_while_the_window_is_full_and_leave_together() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        early = await fill_window(batcher, shard)
        late = [ask(batcher, 3), ask(batcher, 4, 5), ask(batcher, 6)]
        await asyncio.sleep(0)
        assert len(shard.calls) == 2
        shard.answer(0)
        await shard.came(3)
        assert shard.calls[2].vectors[:, 0].tolist() == [3.0, 4.0, 5.0, 6.0]
        assert len(shard.calls[2].groups) == 1
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(*early, *late) == [[-1], [-2], [3], [4, 5], [6]]
        assert len(shard.calls) == 3

    assert with_batcher(scenario) == [1, 1, 4]


def test_searches_are_grouped_by_what_they_share() -> None:
    five = replace(TEN, k=5)
    wide = replace(TEN, params=SearchParams(ef_search=99))
    named = replace(TEN, columns=("name",))

    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        keys = [TEN, five, wide, TEN, named, five]
        late = [ask(batcher, number, key=key) for number, key in enumerate(keys)]
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        request = shard.calls[2]
        assert request.vectors[:, 0].tolist() == [0.0, 3.0, 1.0, 5.0, 2.0, 4.0]
        assert [(g.start, g.stop, GroupKey(g.k, g.params, g.columns)) for g in request.groups] == [
            (0, 2, TEN),
            (2, 4, five),
            (4, 5, wide),
            (5, 6, named),
        ]
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(*late) == [[number] for number in range(6)]

    with_batcher(scenario)


def test_calls_are_cut_at_their_bound_and_small_searches_pass_large_ones() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        late = [ask(batcher, *range(size)) for size in (2, 2, 1, 9, 1)]
        await asyncio.sleep(0)
        for number in range(6):
            await shard.came(number + 1)
            shard.answer(number)
        assert await ids_of(*late) == [list(range(size)) for size in (2, 2, 1, 9, 1)]

    assert with_batcher(scenario, replace(LIMITS, batch_vectors=4)) == [1, 1, 4, 4, 4, 3]


def test_search_over_the_queue_bound_is_exhausted_and_the_others_are_not() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        early = await fill_window(batcher, shard)
        late = [ask(batcher, 3, 4), ask(batcher, 5, 6)]
        await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="queued_vectors_per_shard: 4 vectors wait already, 5 may") as caught:
            await batcher.search(numbers(7, 8), 1, TEN)
        assert caught.value.retry_after_s == QUEUE_FULL_RETRY_S
        fits = ask(batcher, 9)
        await asyncio.sleep(0)
        shard.answer(0)
        shard.answer(1)
        await shard.came(3)
        shard.answer(2)
        assert await ids_of(*early, *late, fits) == [[-1], [-2], [3, 4], [5, 6], [9]]
        again = ask(batcher, 1, 2, 3, 4, 5)  # the queue is empty again
        await shard.came(4)
        shard.answer(3)
        assert await ids_of(again) == [[1, 2, 3, 4, 5]]

    with_batcher(scenario, replace(LIMITS, queued_vectors_per_shard=5))


def test_error_of_a_group_fails_only_its_searches() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        good, bad = ask(batcher, 3), [ask(batcher, n, key=replace(TEN, columns=("no",))) for n in (4, 5)]
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        shard.answer(2, (echo(shard.calls[2])[0], Invalid("no attribute 'no'")))
        assert await ids_of(good) == [[3]]
        for task in bad:
            with pytest.raises(Invalid, match="no attribute"):
                await task
        shard.answer(1)

    with_batcher(scenario)


@pytest.mark.parametrize("error", [Unavailable("away"), RuntimeError("a bug in the shard")], ids=["ours", "another"])
def test_error_of_a_call_fails_its_searches_and_frees_its_slot(error: Exception) -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        early = await fill_window(batcher, shard)
        late = ask(batcher, 3)
        await asyncio.sleep(0)
        shard.answer(0, error)
        with pytest.raises(type(error), match=str(error)):
            await early[0]
        await shard.came(3)
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(early[1], late) == [[-2], [3]]

    with_batcher(scenario)


def test_answer_with_too_few_outcomes_fails_the_searches() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        late = [ask(batcher, 3), ask(batcher, 4, key=replace(TEN, k=5))]
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        shard.answer(2, echo(shard.calls[2])[:1])
        assert await ids_of(late[0]) == [[3]]
        with pytest.raises(ValueError, match="shorter"):
            await late[1]
        shard.answer(1)

    with_batcher(scenario)


def test_cancelled_searches_are_dropped_from_the_queue() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        late = [ask(batcher, number) for number in (3, 4, 5)]
        await asyncio.sleep(0)
        late[0].cancel()
        late[2].cancel()
        await asyncio.wait({late[0], late[2]})
        shard.answer(0)
        await shard.came(3)
        assert shard.calls[2].vectors[:, 0].tolist() == [4.0]
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(late[1]) == [[4]]

    assert with_batcher(scenario) == [1, 1, 1]


def test_queue_of_cancelled_searches_only_makes_no_call_and_holds_no_room() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        early = await fill_window(batcher, shard)
        gone = ask(batcher, 3, 4, 5)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({gone})
        shard.answer(0)
        assert await ids_of(early[0]) == [[-1]]
        await asyncio.sleep(0)
        assert len(shard.calls) == 2
        late = ask(batcher, 6, 7, 8)
        await shard.came(3)
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(late) == [[6, 7, 8]]

    with_batcher(scenario, replace(LIMITS, queued_vectors_per_shard=3))


def test_search_cancelled_during_its_call_leaves_the_others_of_the_call_their_answers() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        late = [ask(batcher, number) for number in (3, 4)]
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        late[0].cancel()
        await asyncio.wait({late[0]})
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(late[1]) == [[4]]

    with_batcher(scenario)


def test_generations_are_never_mixed_in_one_call_and_keep_their_order() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        late = [ask(batcher, n, generation=g) for n, g in [(3, 1), (4, 1), (5, 2), (6, 2), (7, 1)]]
        await asyncio.sleep(0)
        for number in range(5):
            await shard.came(number + 1)
            shard.answer(number)
        assert await ids_of(*late) == [[3], [4], [5], [6], [7]]
        sent = [(call.generation, call.vectors[:, 0].tolist()) for call in shard.calls[2:]]
        assert sent == [(1, [3.0, 4.0]), (2, [5.0, 6.0]), (1, [7.0])]

    with_batcher(scenario)


def test_wider_window_lets_more_calls_fly() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        batcher.window = 3
        asked = await one_by_one(batcher, shard, 0, 1, 2)
        asked.append(ask(batcher, 3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(shard.calls) == 3
        shard.answer(2)
        await shard.came(4)
        for number in (0, 1, 3):
            shard.answer(number)
        assert await ids_of(*asked) == [[0], [1], [2], [3]]

    with_batcher(scenario)


def test_window_that_becomes_wider_lets_those_that_wait_go_at_once() -> None:
    """The calls that are out may hang: the replica that came must not wait for one of them to end."""

    async def scenario(batcher: Batcher, shard: Shard) -> None:
        early = await fill_window(batcher, shard)
        late = ask(batcher, 3)
        await asyncio.sleep(0)
        batcher.window = 4
        await shard.came(3)
        shard.answer(2)
        assert await ids_of(late) == [[3]]
        batcher.window = 2
        for number in (0, 1):
            shard.answer(number)
        assert await ids_of(*early) == [[-1], [-2]]

    with_batcher(scenario)


def test_error_while_a_call_is_made_fails_its_searches_and_frees_its_slot() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        for min_lsn in (0, 7):
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    await batcher.search(numbers(1), 1, TEN, min_lsn=min_lsn)
        assert (batcher._calls, batcher._in_flight_s, batcher._ahead) == (set(), 0.0, 0)

    async def run() -> None:
        shard = Shard()
        async with asyncio.timeout(20):
            await scenario(Batcher(shard.send, LIMITS, lambda vectors: vectors // 0), shard)

    asyncio.run(run())


def test_searches_for_an_lsn_that_was_seen_batch_with_each_other_alone_and_ask_for_the_highest() -> None:
    """On a replica that is behind they wait; those that ask for no LSN must not."""

    async def scenario(batcher: Batcher, shard: Shard) -> None:
        batcher.saw(9)
        await fill_window(batcher, shard)
        late = [ask(batcher, number, min_lsn=lsn) for number, lsn in [(3, 7), (4, 0), (5, 9), (6, 0), (7, 8)]]
        await asyncio.sleep(0)
        assert len(shard.calls) == 2
        shard.answer(0)
        await shard.came(3)
        shard.answer(1)
        await shard.came(4)
        assert [call.min_lsn for call in shard.calls] == [0, 0, 9, 0]
        assert [call.vectors[:, 0].tolist() for call in shard.calls[2:]] == [[3.0, 5.0, 7.0], [4.0, 6.0]]
        shard.answer(3)
        assert await ids_of(late[1], late[3]) == [[4], [6]]
        shard.answer(2)
        assert await ids_of(*late) == [[3], [4], [5], [6], [7]]

    with_batcher(scenario)


def test_searches_that_are_passed_over_keep_their_order_and_their_room() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        batcher.saw(1)
        batcher.window = 1
        first = ask(batcher, 0)
        await shard.came(1)
        late = [ask(batcher, number, min_lsn=lsn) for number, lsn in [(1, 1), (2, 0), (3, 1), (4, 0), (5, 1)]]
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(2)
        with pytest.raises(Exhausted, match="3 vectors wait already"):
            await batcher.search(numbers(6, 7, 8), 1, TEN)
        shard.answer(1)
        await shard.came(3)
        shard.answer(2)
        await shard.came(4)
        assert [call.vectors[:, 0].tolist() for call in shard.calls[1:]] == [[1.0, 3.0], [2.0, 4.0], [5.0]]
        shard.answer(3)
        assert await ids_of(first, *late) == [[0], [1], [2], [3], [4], [5]]

    with_batcher(scenario, replace(LIMITS, batch_vectors=2, queued_vectors_per_shard=5))


def test_search_for_an_lsn_nobody_has_seen_goes_alone_and_takes_no_slot() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        ahead = ask(batcher, 1, min_lsn=1_000)
        await shard.came(1)
        assert (shard.calls[0].min_lsn, shard.calls[0].vectors[:, 0].tolist()) == (1_000, [1.0])
        others = await one_by_one(batcher, shard, 2, 3)  # both slots are free
        shard.answer(1)
        shard.answer(2)
        assert await ids_of(*others) == [[2], [3]]
        more = await one_by_one(batcher, shard, 4, 5)
        also_ahead = ask(batcher, 6, min_lsn=7)  # even while the window is full
        await shard.came(6)
        for number in (3, 4, 5, 0):
            shard.answer(number)
        assert await ids_of(*more, also_ahead, ahead) == [[4], [5], [6], [1]]

    with_batcher(scenario)


def test_large_search_for_an_unseen_lsn_asks_for_it_once_and_then_waits_as_others_do() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(130), min_lsn=9)
        await shard.came(1)
        other = ask(batcher, -1)
        await shard.came(2)
        shard.answer(0, tuple(replace(hits, lsn=9) for hits in echo(shard.calls[0])))
        await shard.came(3)
        assert [(call.min_lsn, len(call.vectors)) for call in shard.calls] == [(9, 64), (0, 1), (9, 64)]
        shard.answer(1)
        shard.answer(2)
        await shard.came(4)
        shard.answer(3)
        assert await ids_of(large, other) == [list(range(130)), [-1]]

    assert with_batcher(scenario) == [64, 1, 64, 2]


def test_lsn_of_an_answer_or_an_acknowledged_write_is_seen_and_never_goes_back() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        first = ask(batcher, 1)
        await shard.came(1)
        shard.answer(0, tuple(replace(hits, lsn=5) for hits in echo(shard.calls[0])))
        assert (await first).lsn == 5
        ahead = ask(batcher, 2, min_lsn=8)
        await shard.came(2)
        shard.answer(1, tuple(replace(hits, lsn=8) for hits in echo(shard.calls[1])))
        assert (await ahead).lsn == 8
        batcher.saw(3)
        assert batcher.seen_lsn == 8

    with_batcher(scenario)


def test_error_of_a_search_that_went_alone_is_its_own() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        behind, wrong = ask(batcher, 1, min_lsn=9), ask(batcher, 2, min_lsn=9)
        await shard.came(2)
        shard.answer(0, Unavailable("at LSN 3, not 9"))
        shard.answer(1, (Invalid("no attribute"),))
        with pytest.raises(Unavailable, match="at LSN 3"):
            await behind
        with pytest.raises(Invalid, match="no attribute"):
            await wrong

    with_batcher(scenario)


def test_too_many_searches_for_an_unseen_lsn_are_exhausted_until_one_ends() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        waiting = [ask(batcher, number, min_lsn=9) for number in range(CALLS_AHEAD_MAX)]
        await shard.came(CALLS_AHEAD_MAX)
        with pytest.raises(Exhausted, match=f"{CALLS_AHEAD_MAX} requests wait already for an LSN over 0") as caught:
            await batcher.search(numbers(7), 1, TEN, min_lsn=9)
        assert caught.value.retry_after_s == QUEUE_FULL_RETRY_S
        waiting[0].cancel()
        await asyncio.wait({waiting[0]})
        late = ask(batcher, 7, min_lsn=9)
        await shard.came(CALLS_AHEAD_MAX + 1)
        for number in range(1, CALLS_AHEAD_MAX + 1):
            shard.answer(number)
        assert await ids_of(late) == [[7]]
        await asyncio.gather(*waiting[1:])

    with_batcher(scenario)


# --- fairness


def test_single_search_behind_a_large_one_waits_for_no_more_than_the_calls_in_flight() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(4_096))
        await shard.came(2)
        single = ask(batcher, -1)
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        shard.answer(2)
        assert await ids_of(single) == [[-1]]
        assert len(shard.calls) <= 4
        number = 1
        while not large.done():
            await shard.came(number + 1)
            if number != 2:
                shard.answer(number)
            number += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert await ids_of(large) == [list(range(4_096))]

    with_batcher(scenario)


def test_cancelled_large_search_sends_no_more_slices() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(4_096))
        await shard.came(2)
        large.cancel()
        await asyncio.wait({large})
        shard.answer(0)
        shard.answer(1)
        late = ask(batcher, -1)
        await shard.came(3)
        shard.answer(2)
        assert await ids_of(late) == [[-1]]

    assert with_batcher(scenario) == [64, 64, 1]


def test_error_of_one_slice_fails_a_large_search_and_the_rest_is_not_sent() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(4_096))
        await shard.came(2)
        shard.answer(0, Unavailable("away"))
        with pytest.raises(Unavailable, match="away"):
            await large
        shard.answer(1)
        late = ask(batcher, -1)
        await shard.came(3)
        assert shard.calls[2].vectors[:, 0].tolist() == [-1.0]
        shard.answer(2)
        assert await ids_of(late) == [[-1]]

    with_batcher(scenario)


def test_large_search_is_degraded_where_one_of_its_slices_is_and_no_other_for_that() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(100))
        await shard.came(2)
        small = ask(batcher, 7)
        await asyncio.sleep(0)
        shard.answer(0, tuple(replace(hits, degraded="cpu") for hits in echo(shard.calls[0])))
        shard.answer(1)
        await shard.came(3)
        shard.answer(2)
        answers = [await large, await small]
        assert [len(shard.calls), *(hits.degraded for hits in answers)] == [3, "cpu", ""]
        assert answers[0].ids.to_pylist() == list(range(100))

    with_batcher(scenario)


def test_slices_that_are_answered_out_of_order_are_joined_in_order() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        large = ask(batcher, *range(100))
        await shard.came(2)
        shard.answer(1)
        shard.answer(0)
        assert await ids_of(large) == [list(range(100))]

    assert with_batcher(scenario) == [64, 36]


def nearest(request: ShardSearch) -> tuple[Hits, ...]:
    """To each vector the k integers from its first number on."""

    def hits_of(group: SearchGroup) -> Hits:
        first = request.vectors[group.start : group.stop, :1].astype(np.int64)
        ids = (first + np.arange(group.k)).ravel()
        names = pa.table({"name": [f"{number}" for number in ids]})
        return Hits(np.full(len(first), group.k), pa.array(ids), ids.astype(np.float32), names, lsn=4)

    return tuple(map(hits_of, request.groups))


def test_searches_that_differ_in_k_share_a_group_and_get_their_own_number_of_hits() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await fill_window(batcher, shard)
        five, eight, ten = (replace(TEN, k=k) for k in (5, 8, 10))
        late = [ask(batcher, 100, key=five), ask(batcher, 200, 300, key=eight), ask(batcher, 400, 500, key=five)]
        late.append(ask(batcher, 600, key=ten))
        await asyncio.sleep(0)
        shard.answer(0)
        await shard.came(3)
        assert [(g.start, g.stop, g.k) for g in shard.calls[2].groups] == [(0, 5, 8), (5, 6, 10)]
        shard.answer(2, nearest(shard.calls[2]))
        for task, firsts, k in zip(late, [[100], [200, 300], [400, 500], [600]], [5, 8, 5, 10], strict=True):
            hits = await task
            ids = [first + number for first in firsts for number in range(k)]
            assert hits.ids.to_pylist() == ids
            assert hits.scores.tolist() == ids
            assert hits.columns["name"].to_pylist() == list(map(str, ids))
            assert hits.counts.tolist() == [k] * len(firsts)
            assert hits.lsn == 4
        shard.answer(1)

    with_batcher(scenario)


# --- predicted waits


async def measured(batcher: Batcher, shard: Shard, seconds: float, calls: int = CALLS_MIN) -> None:
    """Have calls of one vector take that long."""
    for _ in range(calls):
        search = ask(batcher, 0)
        await shard.came(len(shard.calls) + 1)
        shard.clock.advance(seconds)
        shard.answer(len(shard.calls) - 1)
        await search
        await asyncio.sleep(0)


async def queued(batcher: Batcher, count: int) -> list[asyncio.Task[Hits]]:
    asked = [ask(batcher, number) for number in range(count)]
    await asyncio.sleep(0)
    return asked


async def cancelled(asked: list[asyncio.Task[Hits]]) -> None:
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)


def test_wait_is_that_of_the_calls_in_flight_and_of_the_small_searches_in_the_queue() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await measured(batcher, shard, 0.010)
        assert batcher.wait_s() == 0.0
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 100)
        assert batcher.wait_s() == pytest.approx(1.02)
        large = ask(batcher, *range(1_000))  # passes no small one, but has its share
        await asyncio.sleep(0)
        assert batcher.wait_s() == pytest.approx(0.02 + 1.0 / 0.75)
        await cancelled([*early, *late, large])

    with_batcher(scenario)


def test_nothing_is_predicted_before_enough_calls_were_measured() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await measured(batcher, shard, 10.0, calls=CALLS_MIN - 1)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 300)
        assert batcher.wait_s() == 0.0
        await cancelled([*early, *late])

    with_batcher(scenario)


def test_search_that_would_begin_too_late_is_exhausted_at_once_and_a_patient_one_waits() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await measured(batcher, shard, 0.010)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 100)
        with pytest.raises(Exhausted, match="in 1000 ms, the timeout, the search would not begin") as caught:
            await batcher.search(numbers(1), 1, TEN, timeout_s=1.0)
        assert caught.value.retry_after_s == QUEUE_FULL_RETRY_S
        patient = asyncio.ensure_future(batcher.search(numbers(1), 1, TEN, timeout_s=2.0))
        await asyncio.sleep(0)
        assert not patient.done()
        await cancelled([*early, *late, patient])

    with_batcher(scenario)


def test_large_search_waits_for_large_ones_before_it_and_small_ones_do_not() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await measured(batcher, shard, 0.010)
        first = ask(batcher, *range(1_000))
        await shard.came(len(shard.calls) + 1)
        with pytest.raises(Exhausted, match="the search would not begin"):
            await batcher.search(numbers(*range(100)), 1, TEN, timeout_s=1.0)
        small = asyncio.ensure_future(batcher.search(numbers(1), 1, TEN, timeout_s=1.0))
        await asyncio.sleep(0)
        assert not small.done()
        await cancelled([first, small])

    with_batcher(scenario)


def test_wrong_estimate_lets_searches_through_and_is_corrected() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        await measured(batcher, shard, 30.0)
        search = asyncio.ensure_future(batcher.search(numbers(1), 1, TEN, timeout_s=0.5))  # the shard is idle
        await shard.came(CALLS_MIN + 1)
        await cancelled([search])
        shard.answer(CALLS_MIN)
        await measured(batcher, shard, 0.001, calls=50)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 100)
        assert batcher.wait_s() < 0.2
        await cancelled([*early, *late])

    with_batcher(scenario)


def test_call_that_waited_for_another_in_the_shard_is_not_measured_for_that_time() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        for _ in range(CALLS_MIN):
            at = len(shard.calls)
            pair = await one_by_one(batcher, shard, 1, 2)
            for number in range(2):
                shard.clock.advance(0.010)
                shard.answer(at + number)
                await pair[number]
            await asyncio.sleep(0)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 98)
        assert batcher.wait_s() == pytest.approx(1.0)
        await cancelled([*early, *late])

    with_batcher(scenario)


def test_call_that_fails_is_not_measured() -> None:
    async def scenario(batcher: Batcher, shard: Shard) -> None:
        for number in range(CALLS_MIN):
            search = ask(batcher, 1)
            await shard.came(number + 1)
            shard.clock.advance(60.0)
            shard.answer(number, Unavailable("away"))
            with pytest.raises(Unavailable):
                await search
            await asyncio.sleep(0)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 300)
        assert batcher.wait_s() == 0.0
        await cancelled([*early, *late])

    with_batcher(scenario)


def test_call_that_waited_for_an_lsn_says_nothing_of_what_searches_cost() -> None:
    """A replica that lags would otherwise have the searches that ask for no LSN refused."""

    async def scenario(batcher: Batcher, shard: Shard) -> None:
        batcher.saw(7)
        await measured(batcher, shard, 0.010)
        for seconds in (5.0, 5.0, 5.0, 5.0, 5.0):
            search = ask(batcher, 0, min_lsn=7)
            await shard.came(len(shard.calls) + 1)
            shard.clock.advance(seconds)
            shard.answer(len(shard.calls) - 1)
            await search
            await asyncio.sleep(0)
        early = await one_by_one(batcher, shard, -1, -2)
        late = await queued(batcher, 98)
        assert batcher.wait_s() == pytest.approx(1.0)
        await cancelled([*early, *late])

    with_batcher(scenario)
