"""Writes to points, as data that travels between routes, coordinator and shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PointWrite:
    """One request's upserts or deletes, as far as they fall to one shard; one of the two is given.

    `upserts` is an Arrow record batch: `id`, `vector` (FixedSizeList of the collection's stored dtype; of length one
    under cosine), then one column per attribute, without `id_hash`; no id twice. `deletes` is an Arrow array of ids, no
    id twice. Both are checked: a shard trusts them. `shards` is the number of shards of the routing that it was split
    by, 0 where it was not: the primary of a log of another routing must refuse it, for its ids may belong elsewhere.
    """

    upserts: Any = None
    deletes: Any = None
    shards: int = 0

    @property
    def points(self) -> int:
        return len(self.upserts if self.upserts is not None else self.deletes)

    @property
    def size_bytes(self) -> int:
        return int((self.upserts if self.upserts is not None else self.deletes).nbytes)


@dataclass(frozen=True)
class WriteOutcome:
    """An acknowledged write: the LSN of the record that holds it, and the points upserted, or deleted that existed."""

    lsn: int
    count: int


@dataclass(frozen=True)
class WriteResult:
    """The answer to a write that was acknowledged by every shard it fell to; `lsn` by shard."""

    count: int
    lsn: Mapping[int, int] = field(default_factory=dict)
