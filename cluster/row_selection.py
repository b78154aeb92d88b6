"""Which rows of a segment may be found: tombstones now, filters later. A bitmap, as FAISS takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RowSelection:
    """`bits` uint8, bit i (little-endian within a byte) is 1 where row i is kept; `kept` of `count` rows are."""

    bits: NDArray[np.uint8]
    kept: int
    count: int

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> RowSelection:
        """From a mask (count,), True where the row is kept."""
        return cls(np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask)), len(mask))

    def rows(self) -> NDArray[np.int64]:
        """The kept rows, ascending."""
        mask: NDArray[Any] = np.unpackbits(self.bits, count=self.count, bitorder="little")
        return np.flatnonzero(mask)

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows, of any shape, are kept."""
        kept: NDArray[np.bool_] = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        return kept
