"""Truth in production: a small share of live queries is answered exactly as well, and the recall seen is kept.

Only queries at the tuned operating point of the collection's own target are sampled: knobs, targets and `exact` of a
request say nothing about the index. What is told is recall@min(k, 10), k as each query asked: of the best min(k, 10)
points that the shard holds, the share that it answered.
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
from queue import Empty, SimpleQueue
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
GENERATIONS_KEPT = 4
REST_MIN_S = 5.0  # so that queries gather, and a status does not change all the time
# Searches come first, but not by more: beside two busy processes on two cores a thread of niceness 19 that holds
# Python's lock and gets no time stopped the whole process for up to 1.1 s; of 5 for 72 ms, of 0 for 33 ms. The duty is
# the bound.
NICENESS = 5
TWO_SIDED_95 = 1.960  # standard normal quantile
AS_TUNED, EXACTLY = SearchParams(), SearchParams(exact=True)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One query that was answered: its vector (dimension,), and the ids of its best `k` hits."""

    generation: int
    vector: NDArray[np.float32]
    k: int
    ids: list[int | str]


class RecallObserver:
    """Samples what a shard answered, and asks `search` (`Shard.search`) for the truth in a thread of its own.

    Each query is taken with probability `share` (0: none). Of its time the thread works at most the share `duty`.
    `uniform` gives numbers from 0 to below 1; `pause` waits so many seconds, and returns True to stop earlier.
    """

    def __init__(
        self,
        search: Callable[[ShardSearch], Sequence[Hits | EaglerayError]],
        share: float,
        duty: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._search = search
        self._share = share
        self._duty = duty
        self._clock = clock
        self._uniform = uniform
        self._stopped = threading.Event()
        self._pause = pause or self._stopped.wait
        self._queue: SimpleQueue[Sample | None] = SimpleQueue()  # None wakes the thread to stop
        self._windows: dict[int, deque[tuple[float, int]]] = {}  # (recall, k) of each query, by generation
        self._observed: dict[int, dict[str, Any]] = {}  # by generation; replaced, never changed in place
        self._skip = self._gap()
        self.dropped = 0  # queries that found the queue full
        self.retired = 0  # queries whose generation was dropped before the truth was asked for
        self.failed = 0  # queries without truth because of an error, which was logged

    def offer(self, request: ShardSearch, outcomes: Sequence[Hits | EaglerayError]) -> None:
        """Sample from what was just answered; by one thread at a time. Never raises.

        Without a sample it costs a few comparisons, and nothing is copied.
        """
        try:
            for group, outcome in zip(request.groups, outcomes, strict=True):
                if isinstance(outcome, Hits) and group.params == AS_TUNED:
                    self._pass_over(request, group, outcome)
        except Exception:
            logger.exception("sampling queries for the observed recall")

    def _pass_over(self, request: ShardSearch, group: SearchGroup, hits: Hits) -> None:
        """Take the queries of a group whose turn it is; between two of them lie `_gap` others."""
        queries = group.stop - group.start
        while self._skip < queries:
            self._take(request, group, hits, int(self._skip))
            self._skip += 1 + self._gap()
        self._skip -= queries

    def _gap(self) -> float:
        """Queries to leave out before the next is taken: geometric, as if each were drawn with `share` by itself."""
        if self._share <= 0.0:
            return inf
        return 0 if self._share >= 1.0 else int(log(1.0 - self._uniform()) / log1p(-self._share))

    def _take(self, request: ShardSearch, group: SearchGroup, hits: Hits, number: int) -> None:
        if self._queue.qsize() >= QUEUE_QUERIES:
            self.dropped += 1
            return
        k = min(group.k, RECALL_K)
        first, count = int(hits.counts[:number].sum()), min(k, int(hits.counts[number]))
        ids = hits.ids.slice(first, count).to_pylist()
        vector = request.vectors[group.start + number].copy()  # a view would keep the whole batch
        self._queue.put(Sample(request.generation, vector, k, ids))

    def start(self) -> None:
        """Begin evaluating in a daemon thread; none where nothing is sampled."""
        if self._share > 0.0:
            threading.Thread(target=self._thread, name="recall-observer", daemon=True).start()

    def stop(self) -> None:
        """End the thread after the batch it is at; does not wait for it."""
        self._stopped.set()
        self._queue.put(None)

    def _thread(self) -> None:
        _lower_priority()
        use_threads(1)
        self.run()

    def run(self) -> None:
        """Evaluate batches until stopped; after t seconds of work rest t (1 / duty - 1), at least `REST_MIN_S`."""
        while not self._stopped.is_set():
            first = self._queue.get()
            if first is None:
                return
            began = self._clock()
            self._evaluate([first, *self._waiting(BATCH_QUERIES - 1)])
            worked_s = self._clock() - began
            if self._pause(max(REST_MIN_S, worked_s * (1.0 / self._duty - 1.0))):
                return

    def drain(self) -> None:
        """Evaluate all that waits, here and now."""
        while batch := self._waiting(BATCH_QUERIES):
            self._evaluate(batch)

    def _waiting(self, most: int) -> list[Sample]:
        samples: list[Sample] = []
        while len(samples) < most:
            try:
                sample = self._queue.get_nowait()
            except Empty:
                break
            if sample is not None:
                samples.append(sample)
        return samples

    def _evaluate(self, batch: list[Sample]) -> None:
        for generation in sorted({sample.generation for sample in batch}):
            samples = [sample for sample in batch if sample.generation == generation]
            try:
                self._add(generation, samples, _ids_per_query(self._truth(generation, samples)))
            except Unavailable:  # that generation is not held any more
                self.retired += len(samples)
            except Exception:  # whatever it is, searches go on
                self.failed += len(samples)
                logger.exception("observed recall of generation %d", generation)

    def _truth(self, generation: int, samples: list[Sample]) -> Hits:
        vectors = np.stack([sample.vector for sample in samples])
        group = SearchGroup(0, len(samples), max(sample.k for sample in samples), EXACTLY)
        (outcome,) = self._search(ShardSearch(generation, vectors, (group,)))
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
