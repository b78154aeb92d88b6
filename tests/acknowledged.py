"""What a collection must hold while it is written to: the judge of searches and fetches under load.

Every id has one writer, which waits for each write, so that what an id holds at any time is one of few states: the last
acknowledged one, and those begun since. Vectors are made of a pool by id and version, so that no two are equal; scores
are squared L2 distances. All methods may be called by any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOISE = 0.05  # of a version of a point beside the pool's vector it is made of, in standard deviations of the pool
NEVER = float("inf")
SCORE_TOLERANCE = 1e-3
Vectors = NDArray[np.float32]


@dataclass
class State:
    """What an id holds from some moment on: a version, or nothing. `acknowledged_at` is that of the write."""

    version: int | None
    begun_at: float
    acknowledged_at: float


@dataclass(frozen=True)
class Writing:
    """A write that was begun: what it makes of each of its ids."""

    states: dict[int, State]

    @property
    def ids(self) -> list[int]:
        return list(self.states)

    @property
    def deletes(self) -> bool:
        return any(state.version is None for state in self.states.values())


class Acknowledged:
    """Points `0` to `count` - 1 are there from the beginning, at version 0; there is room for ids up to `room` - 1."""

    def __init__(
        self, pool: Vectors, count: int, room: int, seed: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = pool
        self._noise = np.float32(NOISE * pool.std())
        self._seed = seed
        self._clock = clock
        self._lock = threading.Lock()
        self._made: dict[tuple[int, int], Vectors] = {}
        self._history: dict[int, list[State]] = {i: [State(0, -NEVER, -NEVER)] for i in range(count)}
        self._vectors = np.zeros((room, pool.shape[1]), np.float32)
        self._vectors[:count] = [self.vector(i, 0) for i in range(count)]
        self._live = np.zeros(room, bool)
        self._live[:count] = True
        self.lsn: dict[int, int] = {}  # of the last acknowledged writes, by shard
        self.writes = 0

    def vector(self, point_id: int, version: int) -> Vectors:
        """(dimension,) float32, of a version of a point."""
        made = self._made.get((point_id, version))
        if made is None:
            random = np.random.default_rng([self._seed, point_id, version])
            base = self._pool[random.integers(len(self._pool))]
            made = base + self._noise * random.standard_normal(len(base)).astype(np.float32)
            self._made[point_id, version] = made
        return made

    def begin(self, ids: Sequence[int], deletes: bool = False) -> Writing:
        """Say that these ids are about to be written, each to its next version, or deleted."""
        with self._lock:
            states: dict[int, State] = {}
            for point_id in ids:
                history = self._history.setdefault(point_id, [State(None, -NEVER, -NEVER)])
                version = None if deletes else len(history)
                states[point_id] = State(version, self._clock(), NEVER)
                history.append(states[point_id])
        return Writing(states)

    def vectors_of(self, writing: Writing) -> Vectors:
        return np.array([self.vector(i, state.version) for i, state in writing.states.items() if state.version])

    def acknowledge(self, writing: Writing, lsn: dict[int, int]) -> None:
        with self._lock:
            for point_id, state in writing.states.items():
                state.acknowledged_at = self._clock()
                self._live[point_id] = state.version is not None
                if state.version is not None:
                    self._vectors[point_id] = self.vector(point_id, state.version)
            self.lsn |= {shard: max(number, self.lsn.get(shard, 0)) for shard, number in lsn.items()}
            self.writes += 1

    def known_lsn(self) -> dict[int, int]:
        with self._lock:
            return dict(self.lsn)

    def live_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._live)

    def query(self, random: np.random.Generator) -> Vectors:
        """(1, dimension): like a point, near to no one more than to others."""
        pair = self._pool[random.integers(len(self._pool), size=2)]
        noise = random.standard_normal(self._pool.shape[1]).astype(np.float32)
        made: Vectors = (pair.mean(axis=0) + self._noise * noise)[None, :]
        return made

    def nearest(self, query: Vectors, k: int) -> set[int]:
        """The ids of the k nearest of all that is acknowledged now."""
        with self._lock:
            ids = np.flatnonzero(self._live)
            distances = np.square(self._vectors[ids] - query).sum(axis=1)
        return set(ids[np.argpartition(distances, k)[:k]].tolist())

    def wrong_hits(
        self, query: Vectors, ids: Sequence[int], scores: Sequence[float], k: int, since: float, until: float = NEVER
    ) -> str:
        """What is wrong with an answer that was asked for at `since` and came at `until`; empty when nothing is.

        Every hit must have the score of a version that its id had meanwhile; none may be found twice.
        """
        if len(ids) != k or len(set(ids)) != k:
            return f"{len(ids)} hits, {len(set(ids))} of them different: {sorted(ids)}"
        if list(scores) != sorted(scores):
            return f"scores are not in order: {list(scores)}"
        for point_id, score in zip(ids, scores, strict=True):
            possible = [state.version for state in self._states(point_id, since, until) if state.version is not None]
            true = [float(np.square(query[0] - self.vector(point_id, version)).sum()) for version in possible]
            if not any(abs(score - value) <= SCORE_TOLERANCE * max(1.0, value) for value in true):
                return f"id {point_id} has score {score}, its versions {possible} have {true}"
        return ""

    def recall(
        self,
        query: Vectors,
        ids: Sequence[int],
        scores: Sequence[float],
        truth: set[int],
        since: float,
        until: float = NEVER,
    ) -> float:
        """The share of `truth`, the nearest as of `since`, that an answer has.

        One that was written meanwhile counts as found, and so does one that is no nearer than the last hit: others
        have taken its place.
        """
        missed = 0
        for point_id in truth.difference(ids):
            states = self._states(point_id, since, until)
            version = states[0].version
            if len(states) == 1 and version is not None:
                distance = float(np.square(query[0] - self.vector(point_id, version)).sum())
                missed += max(scores, default=NEVER) > distance * (1.0 + SCORE_TOLERANCE)
        return 1.0 - missed / len(truth)

    def wrong_point(self, point_id: int, vector: Any, version: int | None, since: float, until: float = NEVER) -> str:
        """What is wrong with a fetched point (version None: it was not found) that was asked for at `since`."""
        possible = [state.version for state in self._states(point_id, since, until)]
        if version not in possible:
            return f"id {point_id} has version {version}, not one of {possible}"
        if version is not None and not np.array_equal(np.asarray(vector, np.float32), self.vector(point_id, version)):
            return f"id {point_id} has another vector than its version {version}"
        return ""

    def _states(self, point_id: int, since: float, until: float) -> list[State]:
        """Those an id may have had meanwhile: the last one acknowledged before, and all begun after it."""
        with self._lock:
            history = self._history.get(point_id, [State(None, -NEVER, -NEVER)])
            last = max(i for i, state in enumerate(history) if state.acknowledged_at < since)
            return [state for state in history[last:] if state.begun_at <= until]

    def replay(self) -> Replay:
        """All of it again from the beginning, for who wants to judge afterwards."""
        with self._lock:
            changes = [
                (state.acknowledged_at, point_id, state.version)
                for point_id, history in self._history.items()
                for state in history
                if state.acknowledged_at < NEVER
            ]
        return Replay(self, sorted(changes, key=lambda change: change[:2]), len(self._live))

    def every_id(self) -> list[int]:
        """All that were ever written."""
        with self._lock:
            return sorted(self._history)


class Replay:
    """What was acknowledged at times that do not go back."""

    def __init__(self, points: Acknowledged, changes: list[tuple[float, int, int | None]], room: int) -> None:
        self._points = points
        self._changes = changes
        self._done = 0
        self._vectors = np.zeros((room, len(points.vector(0, 0))), np.float32)
        self._squares = np.zeros(room, np.float32)
        self._live = np.zeros(room, bool)

    def nearest(self, query: Vectors, k: int, at: float) -> set[int]:
        """The ids of the k nearest of all that was acknowledged by then; `query` is (1, dimension)."""
        while self._done < len(self._changes) and self._changes[self._done][0] < at:
            _, point_id, version = self._changes[self._done]
            self._done += 1
            self._live[point_id] = version is not None
            if version is not None:
                self._vectors[point_id] = self._points.vector(point_id, version)
                self._squares[point_id] = np.square(self._vectors[point_id]).sum()
        distances = np.where(self._live, self._squares - 2.0 * (self._vectors @ query[0]), np.inf)
        return set(np.argpartition(distances, k)[:k].tolist())
