"""What of the waiting searches each call takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.call_rates import CALLS_MIN, CallRates
from actors.search_queue import SHARE_VECTORS_MIN, UNMEASURED_VECTORS, GroupKey, SearchQueue, Slice, WaitingSearch
from cluster.config import Limits
from cluster.query import SearchParams

KEY = GroupKey(10, SearchParams(), ())
LIMITS = Limits(batch_vectors=64, batch_bytes=1 << 30)  # small: up to 8
LONG_S = 1_000.0


@pytest.fixture(name="loop")
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Queue(SearchQueue):
    """Makes its searches itself; `seconds_per_vector` is measured of `KEY`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limits: Limits = LIMITS, seconds_per_vector: float | None = 1e-6
    ) -> None:
        rates = CallRates()
        if seconds_per_vector is not None:
            for _ in range(CALLS_MIN):
                rates.measured({KEY.kind: 100}, 100 * seconds_per_vector)
        super().__init__(limits, rates)
        self._loop = loop

    def ask(
        self, count: int, *, generation: int = 1, min_lsn: int = 0, dimension: int = 2, key: GroupKey = KEY
    ) -> WaitingSearch:
        vectors, answer = np.zeros((count, dimension), np.float32), self._loop.create_future()
        search = WaitingSearch(vectors, generation, key, 0.0, min_lsn, answer, key.kind, count)
        self.add(search)
        return search

    def calls(self, seconds: float = LONG_S) -> list[list[int]]:
        """Sizes of the slices of every call until nobody waits."""
        calls = []
        while taken := self.take(seconds):
            calls.append(sizes(taken))
        return calls


def sizes(call: list[Slice]) -> list[int]:
    return [len(piece) for piece in call]


def test_small_searches_leave_in_their_order_up_to_the_bound(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    asked = [queue.ask(7) for _ in range(11)]
    first, second, third = queue.take(LONG_S), queue.take(LONG_S), queue.take(LONG_S)
    assert [piece.search for piece in first] == asked[:9]
    assert [piece.search for piece in second] == asked[9:]
    assert third == []
    assert queue.vectors == 0


def test_single_search_behind_a_large_one_is_in_the_next_call(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    large = queue.ask(4_096)
    assert sizes(queue.take(LONG_S)) == [64]
    single = queue.ask(1)
    call = queue.take(LONG_S)
    assert [(piece.search, len(piece)) for piece in call] == [(single, 1), (large, 63)]


def test_stream_of_small_searches_leaves_a_large_one_its_share_of_every_call(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    large = queue.ask(160)
    calls = 0
    while large.left:
        while queue.small.vectors < 200:
            queue.ask(1)
        call = queue.take(LONG_S)
        assert len(call[-1]) == 16
        assert sum(sizes(call)) == 64
        calls += 1
    assert calls == 10


def test_large_searches_take_turns(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    first, second = queue.ask(200), queue.ask(100)
    order = [[(piece.search, piece.start, piece.stop) for piece in queue.take(LONG_S)] for _ in range(5)]
    assert order == [
        [(first, 0, 64)],
        [(second, 0, 64)],
        [(first, 64, 128)],
        [(second, 64, 100), (first, 128, 156)],
        [(first, 156, 200)],
    ]
    assert not queue


def test_call_is_bounded_by_bytes(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop, replace(LIMITS, batch_bytes=40 * 16 * 4))
    queue.ask(100, dimension=16)
    assert queue.calls() == [[40], [40], [20]]
    queue.ask(2, dimension=10_000)  # each is larger than a call
    assert queue.calls() == [[1], [1]]


def test_call_is_bounded_by_predicted_time_and_slow_searches_still_share_one(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop, seconds_per_vector=0.001)
    queue.ask(60)
    assert queue.calls(0.020) == [[20], [20], [20]]
    for _ in range(30):
        queue.ask(1)
    assert queue.calls(0.020) == [[1] * 20, [1] * 10]
    queue.ask(20)
    assert queue.calls(0.001) == [[8], [8], [4]]  # an eighth of 64, though they take eight times as long
    for _ in range(5):
        queue.ask(1)
    assert queue.calls(0.000_2) == [[1, 1], [1, 1], [1]]  # but not more than ten times
    queue.ask(7)
    assert queue.calls(0.000_001) == [[7]]  # one that is small is never cut
    queue.ask(10)
    assert queue.calls(0.000_001) == [[1]] * 10


def test_call_of_searches_that_were_never_measured_is_short(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop, replace(LIMITS, batch_vectors=1_024), seconds_per_vector=None)
    queue.ask(3 * UNMEASURED_VECTORS)
    assert queue.calls(0.001) == [[UNMEASURED_VECTORS]] * 3


def test_what_waits_is_shared_between_free_slots_unless_it_is_little(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    for _ in range(60):
        queue.ask(1)
    assert [len(queue.take(LONG_S, slots)) for slots in (3, 2, 1)] == [20, 20, 20]
    for _ in range(SHARE_VECTORS_MIN):
        queue.ask(1)
    assert len(queue.take(LONG_S, 4)) == SHARE_VECTORS_MIN


@pytest.mark.parametrize("other", [{"generation": 2}, {"min_lsn": 5}], ids=["generation", "lsn"])
def test_large_search_that_cannot_share_a_call_leads_the_next_one(
    other: dict[str, int], loop: asyncio.AbstractEventLoop
) -> None:
    queue = Queue(loop)
    large = queue.ask(1_000, **other)
    leads = []
    for _ in range(6):
        queue.ask(1)
        leads.append(queue.take(LONG_S)[0].search is large)
    assert leads == [False, True, False, True, False, True]


def test_vectors_of_another_dimension_never_share_a_call(loop: asyncio.AbstractEventLoop) -> None:
    """A collection of the same name and generation may have been made anew."""
    queue = Queue(loop)
    for dimension in (2, 3, 2):
        queue.ask(1, dimension=dimension)
        queue.ask(20, dimension=dimension)
    while call := queue.take(LONG_S):
        assert len({piece.search.vectors.shape[1] for piece in call}) == 1
    assert queue.vectors == 0


def test_searches_that_were_given_up_are_not_sent_and_hold_no_room(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop)
    gone, stays = [queue.ask(count) for count in (3, 30, 200)], [queue.ask(2), queue.ask(40)]
    assert sizes(queue.take(LONG_S)) == [3, 2, 30, 29]
    for search in gone:
        search.answer.cancel()
    assert [piece.search for piece in queue.take(LONG_S)] == stays[1:]
    assert (queue.vectors, queue.small.seconds, queue.large.seconds, bool(queue)) == (0, 0.0, 0.0, False)


def test_given_up_searches_leave_when_others_come(loop: asyncio.AbstractEventLoop) -> None:
    """Behind a replica that hangs no call takes them."""
    queue = Queue(loop)
    for _ in range(100):
        queue.ask(1).answer.cancel()
        queue.ask(20).answer.cancel()
    queue.ask(1)
    queue.ask(20)
    assert queue.vectors == 21


def test_seconds_of_what_waits_are_those_predicted_when_it_came(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(loop, seconds_per_vector=0.002)
    queue.ask(5)
    queue.ask(50)
    queue.ask(5, key=GroupKey(10, SearchParams(exact=True), ()))  # never measured
    assert queue.small.seconds == pytest.approx(0.010)
    assert queue.large.seconds == pytest.approx(0.100)


@pytest.mark.parametrize(
    ("ks", "together"),
    [((5, 8), True), ((9, 10), True), ((11, 16), True), ((10, 11), False), ((8, 9), False), ((100, 128), True)],
)
def test_searches_share_a_group_where_the_larger_k_costs_about_the_same(ks: tuple[int, int], together: bool) -> None:
    first, second = (replace(KEY, k=k).kind for k in ks)
    assert (first == second) is together


def test_searches_with_other_parameters_or_columns_share_no_group() -> None:
    keys = [KEY, replace(KEY, columns=("name",)), replace(KEY, params=SearchParams(exact=True))]
    assert len({key.kind for key in keys}) == 3


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 2), st.sampled_from([0, 0, 7]), st.booleans()), max_size=25
    ),
    between=st.integers(1, 6),
    seconds=st.sampled_from([0.0, 0.004, 1.0]),
    slots=st.integers(1, 4),
)
def test_every_vector_leaves_once_in_order_and_calls_keep_their_bounds(
    asked: list[tuple[int, int, int, bool]], between: int, seconds: float, slots: int
) -> None:
    loop = asyncio.new_event_loop()
    queue, made, taken = Queue(loop, seconds_per_vector=0.0005), [], []
    given_up = set()
    for number, (count, generation, min_lsn, gives_up) in enumerate(asked):
        made.append(queue.ask(count, generation=generation, min_lsn=min_lsn))
        if gives_up:
            made[-1].answer.cancel()
            given_up.add(made[-1])
        if number % between == 0:
            taken.append(queue.take(seconds, slots))
    for _ in range(1_000):
        if not queue:
            break
        taken.append(queue.take(seconds, slots))
    assert not queue, "calls take nothing any more"
    assert (queue.vectors, queue.small.seconds, queue.large.seconds) == (0, 0.0, 0.0)
    sent: dict[WaitingSearch, list[Slice]] = {}
    for call in taken:
        assert len({(piece.search.generation, bool(piece.search.min_lsn)) for piece in call}) <= 1
        assert sum(sizes(call)) <= 64
        assert len(call) <= 1 or sum(sizes(call)) <= max(8, seconds / 0.0005)
        for piece in call:
            sent.setdefault(piece.search, []).append(piece)
    for search in made:
        pieces = sent.get(search, [])
        rows = [row for piece in pieces for row in range(piece.start, piece.stop)]
        assert rows == ([] if search in given_up else list(range(len(search.vectors))))
    loop.close()
