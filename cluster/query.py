"""A search and its answer, as data that travels between routes, coordinator and shard."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Degraded = Literal["", "cpu"]
RAW_KNOBS = ("nprobe", "ef_search", "rerank", "itopk_size", "search_width")


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How one search is done. Without anything given: at the tuned operating point of the collection's own target.

    `target_recall` takes the operating point of that target, `exact` asks every stored vector, whatever the index.
    The others are raw knobs, which must fit the index kind: inverted lists visited, candidates kept in the search of
    a graph (on a GPU `itopk_size`, with `search_width` of them expanded at a time), and candidates per hit (1.0 or
    more) whose exact distance is computed.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    rerank: float | None = None
    target_recall: float | None = None
    exact: bool = False
    itopk_size: int | None = None
    search_width: int | None = None

    @property
    def given(self) -> dict[str, float]:
        """The raw knobs that were set, by name."""
        if self.nprobe is self.ef_search is self.rerank is self.itopk_size is self.search_width is None:
            return {}  # as nearly always: the rest takes microseconds
        return {name: value for name in RAW_KNOBS if (value := getattr(self, name)) is not None}

    def without(self, knob: str) -> SearchParams:
        """The same without a raw knob."""
        knobs: dict[str, Any] = {knob: None}
        return replace(self, **knobs)


@dataclass(frozen=True, slots=True)
class Query:
    """One search request. `vectors` is float32, shape (n, dimension), finite, normalised under cosine."""

    vectors: NDArray[np.float32]
    k: int = 10
    params: SearchParams = field(default_factory=SearchParams)
    timeout_ms: float = 1_000.0
    min_coverage: float = 1.0
    with_attributes: tuple[str, ...] = ()
    with_vectors: bool = False
    min_lsn: Mapping[int, int] = field(default_factory=dict)  # shard -> LSN that its answer must include


@dataclass(frozen=True, slots=True)
class SearchGroup:
    """Rows `start` to `stop` of a batch that share everything but their vectors."""

    start: int
    stop: int
    k: int
    params: SearchParams
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardSearch:
    """One call to one shard: many requests' vectors, shape (n, dimension) float32, and how to search them.

    After `timeout_s` nobody waits for the answer any more. A replica that has not applied `min_lsn` yet waits for it.
    """

    generation: int
    vectors: NDArray[np.float32]
    groups: tuple[SearchGroup, ...]
    timeout_s: float = 60.0
    min_lsn: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Points of one shard by id: `found` (n,) bool, the table of the found ones' columns in the order asked (None: none
    was found), and the LSN of what was looked at."""

    found: NDArray[np.bool_]
    table: Any
    lsn: int


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of consecutive queries, flattened: no padding.

    `counts` int64 (queries,) says how many of the flat rows belong to each query; `ids` is an Arrow array and
    `scores` float32, both (sum of counts,), best first within a query, ties by id. `columns` holds attributes
    and vectors of the same rows where they were asked for. `lsn` is the last one that the shard had applied.
    `degraded` is "cpu" where a GPU should have answered and its twin on host memory did, else "".
    """

    counts: NDArray[np.int64]
    ids: Any
    scores: NDArray[np.float32]
    columns: Any = None
    lsn: int = 0
    degraded: Degraded = ""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The fraction of shards, and of points, that answered; the shards that did not."""

    shards: float
    points: float
    missing: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"shards": self.shards, "points": self.points, "missing": list(self.missing)}


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The merged answer to one `Query`. `degraded` as of `Hits`, of any shard."""

    hits: Hits
    coverage: Coverage
    generation: int
    lsn: Mapping[int, int] = field(default_factory=dict)  # by shard that answered
    degraded: Degraded = ""


FULL_COVERAGE = Coverage(1.0, 1.0)


def coverage_of(shard_points: Mapping[int, int], answered: Collection[int]) -> Coverage:
    """Coverage when the shards in `answered` replied, of all in `shard_points` (shard -> points)."""
    if len(answered) == len(shard_points):
        return FULL_COVERAGE
    missing = tuple(sorted(set(shard_points).difference(answered)))
    total = sum(shard_points.values())
    lost = sum(shard_points[shard] for shard in missing)
    shards = 1.0 - len(missing) / len(shard_points) if shard_points else 1.0
    points = 1.0 - lost / total if total else shards
    return Coverage(shards, points, missing)
