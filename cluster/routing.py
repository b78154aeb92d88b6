"""Which shard holds a point, which shards a search asks, which shards may hold an id.

Routing is data named by the manifest. Nothing outside this module may assume that a search goes to every shard
or that an id fixes its shard for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import Corrupt
from cluster.ids import hash_ids


@dataclass(frozen=True)
class Routing:
    """`kind="hash"`: the upper 32 bits of the id's hash, scaled to the number of shards.

    A shard is thus a contiguous range of hashes, and within a shard the rows are ordered by the hash: any prefix
    of a shard's rows is a uniform random sample of it.
    """

    shards: int
    kind: str = "hash"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "shards": self.shards}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Routing:
        if data.get("kind") != "hash":
            raise Corrupt(f"unknown routing kind {data.get('kind')!r}; this version knows 'hash'")
        return cls(shards=int(data["shards"]))

    def shards_of_ids(self, ids: Any) -> NDArray[np.int64]:
        """The shard that takes each id of an Arrow array, shape (n,)."""
        return slots_of_hashes(hash_ids(ids), self.shards)

    def shards_to_search(self) -> tuple[int, ...]:
        return tuple(range(self.shards))


def slots_of_hashes(hashes: NDArray[np.uint64], slots: int) -> NDArray[np.int64]:
    """Map 64-bit hashes to 0..slots-1 in equal contiguous ranges (multiply-shift; Lemire, 2019)."""
    return (((hashes >> np.uint64(32)) * np.uint64(slots)) >> np.uint64(32)).astype(np.int64)
