"""Truth in production: a small share of live queries is answered exactly as well, and the recall seen is kept.

Only queries at the tuned operating point of the collection's own target are sampled: knobs, targets and `exact` of a
request say nothing about the index, nor do answers that a GPU should have given and its twin did. What is told is
recall@min(k, 10), k as each query asked: of the best min(k, 10) points that the shard held, the share that it answered.
Held at that moment: the truth is asked of the very view that answered, for the next write may change it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log, log1p, sqrt
from random import random
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import use_threads
from cluster.errors import EaglerayError, Unavailable
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch

RECALL_K = 10  # what the tuning promises is recall@10
WINDOW_QUERIES = 1_000
BATCH_QUERIES = 64  # one pass over the rows answers them all
QUEUE_QUERIES = 4 * BATCH_QUERIES
VIEWS_WAITING = 16  # of the queries in the queue; each keeps alive what was deleted or replaced since
GENERATIONS_KEPT = 4
REST_MIN_S = 5.0  # so that queries gather, and a status does not change all the time
# Searches come first, but not by more: beside two busy processes on two cores a thread of niceness 19 that holds
# Python's lock and gets no time stopped the whole process for up to 1.1 s; of 5 for 72 ms, of 0 for 33 ms. The duty is
# the bound.
NICENESS = 5
TWO_SIDED_95 = 1.960  # standard normal quantile
AS_TUNED, EXACTLY = SearchParams(), SearchParams(exact=True)
Search = Callable[[ShardSearch], Sequence[Hits | EaglerayError]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One query that was answered: its vector (dimension,), and the ids of its best `k` hits.

    `search` asks what answered it.
    """

    search: Search
    generation: int
    vector: NDArray[np.float32]
    k: int
    ids: list[int | str]


class RecallObserver:
    """Samples what a shard answered, and asks for the truth in a thread of its own.

    Each query is taken with probability `share` (0: none). Of its time the thread works at most the share `duty`.
    `uniform` gives numbers from 0 to below 1; `pause` waits so many seconds, and returns True to stop earlier.
    """

    def __init__(
        self,
        share: float,
        duty: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._share = share
        self._duty = duty
        self._clock = clock
        self._uniform = uniform
        self._stopped = threading.Event()
        self._pause = pause or self._stopped.wait
        self._queue: deque[Sample] = deque()
        self._queued = threading.Condition()  # guards the queue, and tells that it has grown or is not needed any more
        self._windows: dict[int, deque[tuple[float, int]]] = {}  # (recall, k) of each query, by generation
        self._observed: dict[int, dict[str, Any]] = {}  # by generation; replaced, never changed in place
        self._skip = self._gap()
        self.dropped = 0  # queries that found the queue full, of queries or of views
        self.retired = 0  # queries whose generation was dropped before the truth was asked for
        self.failed = 0  # queries without truth because of an error, which was logged

    def offer(self, request: ShardSearch, outcomes: Sequence[Hits | EaglerayError], search: Search) -> None:
        """Sample from what was just answered; by one thread at a time. Never raises.

        `search` asks the view that answered (`ShardView.search`); queries of equal ones are evaluated together.
        Without a sample it costs a few comparisons, and nothing is copied.
        """
        try:
            for group, outcome in zip(request.groups, outcomes, strict=True):
                if isinstance(outcome, Hits) and group.params == AS_TUNED and not outcome.degraded:
                    self._pass_over(request, group, outcome, search)
        except Exception:
            logger.exception("sampling queries for the observed recall")

    def _pass_over(self, request: ShardSearch, group: SearchGroup, hits: Hits, search: Search) -> None:
        """Take the queries of a group whose turn it is; between two of them lie `_gap` others."""
        queries = group.stop - group.start
        while self._skip < queries:
            self._take(request, group, hits, int(self._skip), search)
            self._skip += 1 + self._gap()
        self._skip -= queries

    def _gap(self) -> float:
        """Queries to leave out before the next is taken: geometric, as if each were drawn with `share` by itself."""
        if self._share <= 0.0:
            return inf
        return 0 if self._share >= 1.0 else int(log(1.0 - self._uniform()) / log1p(-self._share))

    def _take(self, request: ShardSearch, group: SearchGroup, hits: Hits, number: int, search: Search) -> None:
        k = min(group.k, RECALL_K)
        first, count = int(hits.counts[:number].sum()), min(k, int(hits.counts[number]))
        ids = hits.ids.slice(first, count).to_pylist()
        vector = request.vectors[group.start + number].copy()  # a view would keep the whole batch
        with self._queued:
            if self._has_room(search):
                self._queue.append(Sample(search, request.generation, vector, k, ids))
                self._queued.notify()
            else:
                self.dropped += 1

    def _has_room(self, search: Search) -> bool:
        if len(self._queue) >= QUEUE_QUERIES:
            return False
        waiting = {sample.search for sample in self._queue}
        return search in waiting or len(waiting) < VIEWS_WAITING

    def retire(self, generation: int) -> None:
        """Drop what waits of older generations: it would keep them in memory."""
        with self._queued:
            kept = [sample for sample in self._queue if sample.generation >= generation]
            self.retired += len(self._queue) - len(kept)
            self._queue = deque(kept)

    def start(self) -> None:
        """Begin evaluating in a daemon thread; none where nothing is sampled."""
        if self._share > 0.0:
            threading.Thread(target=self._thread, name="recall-observer", daemon=True).start()

    def stop(self) -> None:
        """End the thread after the batch it is at; does not wait for it."""
        self._stopped.set()
        with self._queued:
            self._queued.notify()

    def _thread(self) -> None:
        _lower_priority()
        use_threads(1)
        self.run()

    def run(self) -> None:
        """Evaluate batches until stopped; after t seconds of work rest t (1 / duty - 1), at least `REST_MIN_S`."""
        while not self._stopped.is_set():
            batch = self._next_batch()
            began = self._clock()
            self._evaluate(batch)
            worked_s = self._clock() - began
            del batch  # while it rests, nothing is kept alive for it
            if self._pause(max(REST_MIN_S, worked_s * (1.0 / self._duty - 1.0))):
                return

    def drain(self) -> None:
        """Evaluate all that waits, here and now."""
        while batch := self._waiting():
            self._evaluate(batch)

    def _next_batch(self) -> list[Sample]:
        """Wait for queries; none once it is stopped."""
        with self._queued:
            self._queued.wait_for(lambda: self._queue or self._stopped.is_set())
        return self._waiting()

    def _waiting(self) -> list[Sample]:
        with self._queued:
            return [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_QUERIES))]

    def _evaluate(self, batch: list[Sample]) -> None:
        groups: dict[tuple[int, Search], list[Sample]] = {}
        for sample in batch:
            groups.setdefault((sample.generation, sample.search), []).append(sample)
        for (generation, search), samples in groups.items():
            try:
                self._add(generation, samples, _ids_per_query(self._truth(search, generation, samples)))
            except Unavailable:  # that generation is not held any more
                self.retired += len(samples)
            except Exception:  # whatever it is, searches go on
                self.failed += len(samples)
                logger.exception("observed recall of generation %d", generation)

    def _truth(self, search: Search, generation: int, samples: list[Sample]) -> Hits:
        vectors = np.stack([sample.vector for sample in samples])
        group = SearchGroup(0, len(samples), max(sample.k for sample in samples), EXACTLY)
        (outcome,) = search(ShardSearch(generation, vectors, (group,)))
        if isinstance(outcome, EaglerayError):
            raise outcome
        return outcome

    def _add(self, generation: int, samples: list[Sample], truths: list[list[int | str]]) -> None:
        window = self._windows.setdefault(generation, deque(maxlen=WINDOW_QUERIES))
        for sample, truth in zip(samples, truths, strict=True):
            best = set(truth[: sample.k])
            if best:  # a shard without points has no recall
                window.append((len(best.intersection(sample.ids)) / len(best), sample.k))
        kept = sorted(self._windows)[-GENERATIONS_KEPT:]
        self._windows = {kept_one: self._windows[kept_one] for kept_one in kept}
        if window:
            told = {**self._observed, generation: self._summary(generation, window)}
            self._observed = {kept_one: told[kept_one] for kept_one in kept if kept_one in told}

    def _summary(self, generation: int, window: deque[tuple[float, int]]) -> dict[str, Any]:
        recall = fmean(recall for recall, _ in window)
        low, high = recall_interval(recall, len(window))
        return {
            "generation": generation,
            "recall": round(recall, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "queries": len(window),
            "k": max(k for _, k in window),
            "dropped": self.dropped + self.retired + self.failed,
        }

    def observed(self, generation: int) -> dict[str, Any] | None:
        """What the last `WINDOW_QUERIES` queries of a generation showed; None before the first was evaluated.

        `recall` is the mean of their recall@min(k, 10), `low` to `high` its 95% interval (`recall_interval`), `k` the
        largest min(k, 10) among them. `dropped` counts samples of any generation that were never evaluated. It
        changes only with a batch.
        """
        return self._observed.get(generation)


def recall_interval(mean: float, queries: int) -> tuple[float, float]:
    """Two-sided 95% interval of the mean of per-query recalls, within 0 to 1: Wilson's, each query as one trial.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n). Recalls between 0 and 1 with mean p vary by p (1-p) at
    most, so it is wide enough whatever they are, and one query does not make it narrow: 1 of 1 gives 0.21 to 1.
    """
    z2 = TWO_SIDED_95**2 / queries
    half = sqrt(TWO_SIDED_95**2 * mean * (1.0 - mean) / queries + z2 * z2 / 4.0)
    return max(0.0, (mean + z2 / 2.0 - half) / (1.0 + z2)), min(1.0, (mean + z2 / 2.0 + half) / (1.0 + z2))


def _ids_per_query(hits: Hits) -> list[list[int | str]]:
    ids, bounds = hits.ids.to_pylist(), np.concatenate([[0], np.cumsum(hits.counts)]).tolist()
    return [ids[start:stop] for start, stop in pairwise(bounds)]


def _lower_priority() -> None:
    """Of the calling thread, where threads have priorities of their own (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as error:
        logger.info("the observed recall is worked out at normal priority: %s", error)
