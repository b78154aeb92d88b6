"""Continuous batching for one shard: a small window of calls in flight, each takes what has gathered.

While the window has room a search leaves at once, with all that came in the same turn of the event loop (no timer);
while it is full, searches gather, and the next free slot takes as many as make a call of bounded work
(`search_queue`). A search that asks for more of the log than the shard is known to have goes alone, beside the
window: it holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from actors.call_rates import CallRates
from actors.search_queue import LARGE_SHARE, GroupKey, GroupKind, SearchQueue, Slice, WaitingSearch
from cluster.config import Limits
from cluster.errors import EaglerayError, Exhausted
from cluster.query import Hits, SearchGroup, ShardSearch
from cluster.topk import best_of_each, join_queries, split_hits

QUEUE_FULL_RETRY_S = 0.1
CALLS_AHEAD_MAX = 64  # of searches that may wait for an LSN that nobody has seen yet
Send = Callable[[ShardSearch], Awaitable[tuple[Hits | EaglerayError, ...]]]
Grouped = dict[GroupKind, list[Slice]]


class Batcher:
    """Gathers the searches for one shard. `send` performs one call.

    `send_ahead` performs one that may wait long for its LSN. `seen_lsn` is the highest LSN that an answer or an
    acknowledged write told of. `clock` measures what calls take.
    """

    def __init__(
        self,
        send: Send,
        limits: Limits,
        observe_batch: Callable[[int], None],
        send_ahead: Send | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._send = send
        self._send_ahead = send_ahead or send
        self._limits = limits
        self._observe_batch = observe_batch
        self._clock = clock
        self._rates = CallRates()
        self._queue = SearchQueue(limits, self._rates)
        self._calls: set[asyncio.Task[None]] = set()
        self._starting = False  # a call that has not taken its searches yet
        self._in_flight_s = 0.0
        self._last_answer = 0.0
        self._ahead = 0
        self._window = limits.calls_in_flight_per_replica
        self.seen_lsn = 0

    @property
    def window(self) -> int:
        """The calls in flight allowed. A wider one is used at once: those that are out may hang."""
        return self._window

    @window.setter
    def window(self, calls: int) -> None:
        self._window = calls
        self._pump()

    def saw(self, lsn: int) -> None:
        """The shard has that record."""
        self.seen_lsn = max(self.seen_lsn, lsn)

    async def search(
        self, vectors: NDArray[np.float32], generation: int, key: GroupKey, timeout_s: float = 60.0, min_lsn: int = 0
    ) -> Hits:
        """The answer of `submit`. Cancel it to give up."""
        return await self.submit(vectors, generation, key, timeout_s, min_lsn)

    def submit(
        self, vectors: NDArray[np.float32], generation: int, key: GroupKey, timeout_s: float = 60.0, min_lsn: int = 0
    ) -> asyncio.Future[Hits]:
        """Have `vectors` (n, d) searched with `min_lsn` applied, for someone who waits `timeout_s`.

        Exhausted when the queue is full, or so long that the call for this search is predicted to be too late. Settle
        or cancel the future to give up.
        """
        loop = asyncio.get_running_loop()
        deadline, answer = loop.time() + timeout_s, loop.create_future()
        search = WaitingSearch(vectors, generation, key, deadline, min_lsn, answer, key.kind, len(vectors))
        if min_lsn > self.seen_lsn:
            self._start_ahead(search, timeout_s)
            return answer
        self._check_room(vectors, timeout_s)
        self._queue.add(search)
        self._pump()
        return answer

    def wait_s(self) -> float:
        """How long a small search that comes now is predicted to wait until its call begins.

        0.0 where nobody knows, and while none waits before it: a wrong estimate thus keeps nobody away from a shard
        that has nothing to do, and is soon corrected.
        """
        small, large = self._queue.small, self._queue.large
        small.drop_given_up()
        if not small:
            return 0.0
        return self._in_flight_s + small.seconds / (1.0 - LARGE_SHARE if large else 1.0)

    def _check_room(self, vectors: NDArray[np.float32], timeout_s: float) -> None:
        waiting, bound = self._queue.vectors, self._limits.queued_vectors_per_shard
        if waiting + len(vectors) > bound:
            raise Exhausted(
                f"queued_vectors_per_shard: {waiting} vectors wait already, {bound} may", QUEUE_FULL_RETRY_S
            )
        wait_s = self.wait_s()
        if self._queue.large and len(vectors) > self._queue.least_vectors(vectors.shape[1]):
            wait_s = self._in_flight_s + self._queue.small.seconds + self._queue.large.seconds
        if wait_s > timeout_s:
            raise Exhausted(
                f"{waiting} vectors wait already: in {timeout_s * 1000.0:g} ms, the timeout, the search would not "
                f"begin, but in about {wait_s * 1000.0:.0f} ms; allow it more time, or ask again later",
                max(QUEUE_FULL_RETRY_S, wait_s - timeout_s),
            )

    # --- ahead of the known log

    def _start_ahead(self, search: WaitingSearch, timeout_s: float) -> None:
        """A call of its own for its first vectors: whether there will ever be such an LSN nobody knows."""
        self._enter_ahead(search.min_lsn)
        search.answer.add_done_callback(self._leave_ahead)
        call = asyncio.get_running_loop().create_task(self._call_ahead(search, timeout_s))
        search.answer.add_done_callback(lambda _: call.cancel())

    async def _call_ahead(self, search: WaitingSearch, timeout_s: float) -> None:
        """Once the LSN is there, what is left of a large search waits as others do."""
        key = search.key
        piece = search.take(min(search.left, self._queue.least_vectors(search.vectors.shape[1])))
        group = SearchGroup(0, len(piece), key.k, key.params, key.columns)
        vectors = search.vectors[: piece.stop]
        try:
            self._observe_batch(len(piece))
            (outcome,) = await self._send_ahead(
                ShardSearch(search.generation, vectors, (group,), timeout_s, search.min_lsn)
            )
            self._deliver([piece], outcome)
            if search.left and not search.answer.done():
                self._queue.add(search)
                self._pump()
        except asyncio.CancelledError:
            search.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # raised to the search, which must not wait for ever
            _fail([piece], error)

    @contextlib.contextmanager
    def room_ahead(self, min_lsn: int) -> Iterator[None]:
        """Counts a call that waits for an LSN not seen yet; Exhausted where too many do."""
        self._enter_ahead(min_lsn)
        try:
            yield
        finally:
            self._leave_ahead()

    def _enter_ahead(self, min_lsn: int) -> None:
        if self._ahead >= CALLS_AHEAD_MAX:
            raise Exhausted(
                f"{self._ahead} requests wait already for an LSN over {self.seen_lsn}, the last one known; "
                f"min_lsn {min_lsn} must wait too",
                QUEUE_FULL_RETRY_S,
            )
        self._ahead += 1

    def _leave_ahead(self, _: object = None) -> None:
        self._ahead -= 1

    # --- calls of the window

    def _pump(self) -> None:
        """Start a call where there is room. It takes its searches when it runs: all that come in this turn."""
        if self._queue and not self._starting and len(self._calls) < self.window:
            self._starting = True
            task = asyncio.get_running_loop().create_task(self._run_call())
            self._calls.add(task)
            task.add_done_callback(self._call_done)

    def _call_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._pump()

    async def _run_call(self) -> None:
        self._starting = False
        free = max(1, self.window - len(self._calls) + 1)
        slices = self._queue.take(self._limits.batch_ms / 1000.0 / self.window, free)
        self._pump()  # what did not fit goes in another call
        if slices:
            await self._call(slices)

    async def _call(self, slices: list[Slice]) -> None:
        grouped: Grouped = {}
        for piece in slices:
            grouped.setdefault(piece.search.kind, []).append(piece)
        predicted_s = sum(len(piece) * (piece.search.seconds_per_vector or 0.0) for piece in slices)
        self._in_flight_s += predicted_s
        try:
            request = _request(grouped)
            self._observe_batch(len(request.vectors))
            began = self._now()
            outcomes = await self._send(request)
            self._measure(grouped, began, predicted_s if request.min_lsn else 0.0)
            for pieces, outcome in zip(grouped.values(), outcomes, strict=True):
                self._deliver(pieces, outcome)
        except asyncio.CancelledError:
            for piece in slices:
                piece.search.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # raised to the searches, which must not wait for ever
            _fail(slices, error)
        finally:
            self._in_flight_s -= predicted_s

    def _measure(self, grouped: Grouped, began: float, no_longer_s: float) -> None:
        """A call's own time is that since the one before it was answered: until then it waited in the shard.

        `no_longer_s` if not 0: one that took longer waited for an LSN, and says nothing of what searches cost.
        """
        now = self._now()
        seconds = now - max(began, self._last_answer)
        self._last_answer = now
        if 0.0 < no_longer_s < seconds:
            return
        self._rates.measured({kind: sum(map(len, pieces)) for kind, pieces in grouped.items()}, seconds)

    def _now(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()

    def _deliver(self, pieces: list[Slice], outcome: Hits | EaglerayError) -> None:
        if isinstance(outcome, EaglerayError):
            _fail(pieces, outcome)
            return
        self.saw(outcome.lsn)
        largest = max(piece.search.key.k for piece in pieces)
        for piece, hits in zip(pieces, split_hits(outcome, [len(piece) for piece in pieces]), strict=True):
            k = piece.search.key.k
            _answer(piece, hits if k == largest else best_of_each(hits, k))


def _request(grouped: Grouped) -> ShardSearch:
    """One call for all groups, of which each is asked for the largest k in it."""
    groups, start = [], 0
    for (params, columns, *_), members in grouped.items():
        stop = start + sum(map(len, members))
        groups.append(SearchGroup(start, stop, max(piece.search.key.k for piece in members), params, columns))
        start = stop
    pieces = [piece for members in grouped.values() for piece in members]
    parts = [piece.search.vectors[piece.start : piece.stop] for piece in pieces]
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
    timeout_s = max(piece.search.deadline for piece in pieces) - asyncio.get_running_loop().time()
    min_lsn = max(piece.search.min_lsn for piece in pieces)
    return ShardSearch(pieces[0].search.generation, vectors, tuple(groups), max(0.0, timeout_s), min_lsn)


def _answer(piece: Slice, hits: Hits) -> None:
    """Settle the search with the answer to its last slice."""
    search = piece.search
    if search.answer.done():
        return
    if len(piece) == len(search.vectors):
        search.answer.set_result(hits)
        return
    search.parts[piece.start] = hits
    if not search.left and sum(len(part.counts) for part in search.parts.values()) == len(search.vectors):
        search.answer.set_result(join_queries([search.parts[start] for start in sorted(search.parts)]))


def _fail(pieces: list[Slice], error: Exception) -> None:
    for piece in pieces:
        if not piece.search.answer.done():
            piece.search.answer.set_exception(error)
