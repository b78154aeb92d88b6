"""The searches that wait for one shard, and what of them the next call takes. Decisions only: no event loop, no clock.

Small searches leave first, in their order. Large ones are cut into slices, which fill what is left of a call; they
take turns, and have at least `LARGE_SHARE` of every call. So a small search waits for one slice and not for the whole
of a large one, and no stream of small ones holds up a large one for ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.call_rates import CallRates
from cluster.config import Limits
from cluster.query import Hits, SearchParams

SMALL_PART = 8  # a search of up to an eighth of a call is small
SLOW_CALL = 10.0  # times the time of a call are taken for that eighth: brute force costs as much for fewer vectors
LARGE_SHARE = 0.25  # of a call, while small searches alone would fill it
SHARE_VECTORS_MIN = 16  # fewer are not shared between calls: one call costs as much as some searches
UNMEASURED_VECTORS = 64  # a call takes of searches whose time nobody can predict yet
TUNED_K = 10  # operating points hold up to this k, and are widened beyond it (`segment_loader.widened`)
GroupKind = tuple[SearchParams, tuple[str, ...], int, bool]


@dataclass(frozen=True, slots=True)
class GroupKey:
    """How the hits of a search are found, and what they come with."""

    k: int
    params: SearchParams
    columns: tuple[str, ...]

    @property
    def kind(self) -> GroupKind:
        """What searches must share to be answered by one FAISS call: all but k, of which only the power of two counts.

        They are asked for with the largest k, and cut: that finds at least as near neighbours at about the same cost.
        """
        return self.params, self.columns, (self.k - 1).bit_length(), self.k > TUNED_K


@dataclass(eq=False, slots=True)
class WaitingSearch:
    """Vectors (n, d) of one search, of which no call has taken the last `left`; `parts` are answers to slices."""

    vectors: NDArray[np.float32]
    generation: int
    key: GroupKey
    deadline: float
    min_lsn: int
    answer: asyncio.Future[Hits]
    kind: GroupKind
    left: int
    seconds_per_vector: float | None = None  # as predicted when it came
    parts: dict[int, Hits] = field(default_factory=dict)

    def take(self, count: int) -> Slice:
        """The next `count` vectors leave."""
        start = len(self.vectors) - self.left
        self.left -= count
        return Slice(self, start, start + count)

    def same_points(self, other: WaitingSearch) -> bool:
        """One call asks one generation (of one collection: another one of that name may have had other vectors)."""
        return self.generation == other.generation and self.vectors.shape[1] == other.vectors.shape[1]

    def may_share(self, other: WaitingSearch) -> bool:
        """Who may wait for an LSN goes with his like: others do not wait with him."""
        return self.same_points(other) and bool(self.min_lsn) == bool(other.min_lsn)


@dataclass(eq=False, slots=True)
class Slice:
    """Rows `start` to `stop` of a search, in one call."""

    search: WaitingSearch
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class _Room:
    """What a call still takes: `vectors`, of `seconds` in all, or up to `least` of them of `SLOW_CALL` times that."""

    def __init__(self, vectors: int, least: int, seconds: float) -> None:
        self._vectors = vectors
        self._least = least
        self._seconds = seconds
        self._slow_s = SLOW_CALL * seconds

    def fitting(self, search: WaitingSearch) -> int:
        """How many of a search's vectors fit."""
        rate = search.seconds_per_vector
        if rate is None:
            in_time = UNMEASURED_VECTORS
        elif rate * self._vectors <= self._seconds:
            in_time = self._vectors
        else:
            in_time = max(int(self._seconds / rate), min(self._least, int(self._slow_s / rate)))
        return max(0, min(search.left, self._vectors, in_time))

    def fill(self, piece: Slice) -> None:
        count = piece.stop - piece.start
        taken_s = count * (piece.search.seconds_per_vector or 0.0)
        self._vectors -= count
        self._least -= count
        self._seconds -= taken_s
        self._slow_s -= taken_s

    def all_but(self, share: float) -> _Room:
        """A room smaller by that share."""
        return _Room(int(self._vectors * (1.0 - share)), self._least, self._seconds * (1.0 - share))


class _Line:
    """Searches in their order, and sums over them: vectors, and predicted seconds of calls for these."""

    def __init__(self) -> None:
        self._searches: deque[WaitingSearch] = deque()
        self.vectors = 0
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self._searches)

    @property
    def head(self) -> WaitingSearch:
        return self._searches[0]

    def append(self, search: WaitingSearch) -> None:
        self._searches.append(search)
        self._count(search, 1)

    def push_back(self, searches: list[WaitingSearch]) -> None:
        """Put what was at the head there again."""
        self._searches.extendleft(reversed(searches))
        for search in searches:
            self._count(search, 1)

    def pop(self) -> WaitingSearch:
        search = self._searches.popleft()
        self._count(search, -1)
        if not self._searches:
            self.seconds = 0.0  # without what rounding left
        return search

    def drop_given_up(self) -> None:
        """Searches at the head whose clients gave up: behind a replica that hangs they would pile up."""
        while self._searches and self._searches[0].answer.done():
            self.pop()

    def _count(self, search: WaitingSearch, sign: int) -> None:
        vectors = sign * search.left
        self.vectors += vectors
        self.seconds += vectors * (search.seconds_per_vector or 0.0)


class SearchQueue:
    """`small` and `large` are the searches that wait, as `_Line`s."""

    def __init__(self, limits: Limits, rates: CallRates) -> None:
        self._limits = limits
        self._rates = rates
        self._large_passed_over = False
        self._bounds: dict[int, tuple[int, int]] = {}  # by dimension, of which a shard has one for long
        self.small = _Line()
        self.large = _Line()

    def __bool__(self) -> bool:
        return bool(self.small or self.large)

    @property
    def vectors(self) -> int:
        return self.small.vectors + self.large.vectors

    def least_vectors(self, dimension: int) -> int:
        """How many vectors a call takes though they are predicted to take long; a search of no more is small."""
        return self._vector_bounds(dimension)[0]

    def _vector_bounds(self, dimension: int) -> tuple[int, int]:
        """The least and the most vectors that make a full call."""
        bounds = self._bounds.get(dimension)
        if bounds is None:
            most = max(1, min(self._limits.batch_vectors, self._limits.batch_bytes // (4 * dimension)))
            bounds = self._bounds[dimension] = (max(1, most // SMALL_PART), most)
        return bounds

    def add(self, search: WaitingSearch) -> None:
        search.seconds_per_vector = self._rates.seconds_per_vector(search.kind)
        line = self.small if search.left <= self.least_vectors(search.vectors.shape[1]) else self.large
        line.drop_given_up()
        line.append(search)

    def take(self, seconds: float, slots: int = 1) -> list[Slice]:
        """The next call, of about `seconds`; empty where nobody waits any more.

        What waits is shared between the `slots` that are free: one call of all would leave the other replicas idle, and
        one replica while its answers are sent.
        """
        self.small.drop_given_up()
        self.large.drop_given_up()
        if not self:
            return []
        large_leads = bool(self.large) and (self._large_passed_over or not self.small)
        lead = self.large.head if large_leads else self.small.head
        least, most = self._vector_bounds(lead.vectors.shape[1])
        share = max(-(-self.vectors // slots), SHARE_VECTORS_MIN, min(least, lead.left))
        room = _Room(min(most, share), least, seconds)
        if large_leads:
            taken = self._take_large(lead, room)
            taken += self._take_small(lead, room)
            self._large_passed_over = False
            return taken
        large_joins = bool(self.large) and self.large.head.may_share(lead)
        small = self._take_small(lead, room.all_but(LARGE_SHARE) if large_joins else room)
        if large_joins:
            for piece in small:
                room.fill(piece)
        large = self._take_large(lead, room)
        self._large_passed_over = bool(self.large) and not large
        return small + large

    def _take_small(self, lead: WaitingSearch, room: _Room) -> list[Slice]:
        """The oldest ones that may share a call with `lead`; those that only ask for another LSN are passed over."""
        taken: list[Slice] = []
        passed_over: list[WaitingSearch] = []
        while self.small and self.small.head.same_points(lead):
            search = self.small.head
            if room.fitting(search) < search.left and search is not lead:
                break
            self.small.pop()
            if not search.may_share(lead):
                passed_over.append(search)
            elif not search.answer.done():
                piece = search.take(search.left)
                room.fill(piece)
                taken.append(piece)
        self.small.push_back(passed_over)
        return taken

    def _take_large(self, lead: WaitingSearch, room: _Room) -> list[Slice]:
        """Slices, as many as there is room for; who has more to ask goes to the end of the line."""
        taken: list[Slice] = []
        while self.large and self.large.head.may_share(lead):
            search = self.large.head
            count = room.fitting(search) or int(search is lead)
            if not count:
                break
            self.large.pop()
            piece = search.take(count)
            room.fill(piece)
            taken.append(piece)
            if search.left:
                self.large.append(search)
                break
            self.large.drop_given_up()
        return taken
