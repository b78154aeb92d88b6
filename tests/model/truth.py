"""What a shard must hold: plain dicts by LSN and generation, and brute force over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import Metric

Id = int | str
LSNS_KEPT = 64  # of each generation; a replica that is further behind is not judged
GENERATIONS_KEPT = 3


@dataclass(frozen=True, eq=False)
class Point:
    """A vector (dimension,) in stored precision, and the attributes that are not null."""

    vector: NDArray[np.float32]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> list[float]:
        """Of the vector, which must not change any more."""
        return self.vector.tolist()  # type: ignore[no-any-return]

    def equals(self, other: Point) -> bool:
        return self.attributes == other.attributes and self.numbers == other.numbers


Change = Mapping[Id, Point | None]  # one request: None where the point is deleted


@dataclass(frozen=True, eq=False)
class State:
    """All points of a shard at one moment."""

    points: Mapping[Id, Point]

    def after(self, change: Change) -> State:
        points = {**self.points, **change}
        return State({point_id: point for point_id, point in points.items() if point is not None})

    @cached_property
    def ids(self) -> list[Id]:
        """In order, so that a stable sort by score leaves ties by id."""
        return sorted(self.points)  # type: ignore[type-var]

    @cached_property
    def vectors(self) -> NDArray[np.float64]:
        return np.array([self.points[point_id].vector for point_id in self.ids], dtype=np.float64)

    def scores(self, queries: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
        """Of every query with every point in the order of `ids`; cosine by distance, as indexes have it."""
        if not self.points:
            return np.zeros((len(queries), 0))
        asked = queries.astype(np.float64)
        if metric == "ip":
            return np.asarray(asked @ self.vectors.T)
        distances = np.square(asked[:, None, :] - self.vectors[None, :, :]).sum(axis=2)
        return distances if metric == "l2" else 1.0 - distances / 2.0


class Truth:
    """States by generation and LSN. `lsn` is the last one that is known to be in the WAL."""

    def __init__(self) -> None:
        self.lsn = 0
        self._states: dict[int, dict[int, State]] = {}

    @property
    def generations(self) -> list[int]:
        return sorted(self._states)

    def begin(self, generation: int, lsn: int, state: State) -> None:
        """A generation that holds `state` at an LSN, which is the last one."""
        self.advance(lsn)
        self._states[generation] = {lsn: state}
        for old in self.generations[:-GENERATIONS_KEPT]:
            del self._states[old]

    def apply(self, lsn: int, change: Change) -> None:
        """A request that the record of `lsn` holds; records between it and the last known one hold none."""
        self.advance(lsn)
        for states in self._states.values():
            states[lsn] = states[lsn].after(change)

    def advance(self, lsn: int) -> None:
        """Records up to `lsn` that hold no points."""
        assert lsn >= self.lsn, f"LSN {lsn} after LSN {self.lsn}"
        for states in self._states.values():
            for number in range(self.lsn + 1, lsn + 1):
                states[number] = states[number - 1]
                states.pop(number - LSNS_KEPT, None)
        self.lsn = lsn

    def skip(self, lsn: int, states: Mapping[int, State]) -> None:
        """What every generation holds at `lsn`; nobody knows in which records before it that was written."""
        for generation, state in states.items():
            self._states[generation] = {lsn: state}
        self.lsn = lsn

    def newest(self, generation: int) -> State:
        return self._states[generation][self.lsn]

    def at(self, generation: int, lsn: int) -> State | None:
        """None where that is too long ago, or nobody knows."""
        return self._states.get(generation, {}).get(lsn)

    def prefixes(self, generation: int, changes: Sequence[Change]) -> list[State]:
        """The newest state, and after the first change, after the first two, ..."""
        return list(accumulate(changes, State.after, initial=self.newest(generation)))
