"""Which rows of a segment or a tail may be found: those without a tombstone. A bitmap, as FAISS takes it."""

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

    @classmethod
    def everything(cls, count: int) -> RowSelection:
        """Every row of `count`."""
        return cls(np.full((count + 7) // 8, 0xFF, dtype=np.uint8), count, count)

    def without(self, rows: NDArray[np.int64]) -> RowSelection:
        """A new selection that keeps none of some rows (n,), which may repeat or be left out already."""
        gone = np.unique(rows[self.holds(rows)])
        if len(gone) == 0:
            return self
        bits = self.bits.copy()
        np.bitwise_and.at(bits, gone >> 3, ~(1 << (gone & 7)).astype(np.uint8))
        return RowSelection(bits, self.kept - len(gone), self.count)

    def rows(self) -> NDArray[np.int64]:
        """The kept rows, ascending."""
        mask: NDArray[Any] = np.unpackbits(self.bits, count=self.count, bitorder="little")
        return np.flatnonzero(mask)

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows, of any shape, are kept."""
        kept: NDArray[np.bool_] = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        return kept
