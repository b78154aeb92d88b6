"""The order-independent checksum of stored points: a sum of 64-bit hashes of id and vector bytes."""

from __future__ import annotations

import numpy as np
import xxhash

from actors.segment_rows import RowNumbers
from cluster.arrow_rows import vectors_view
from cluster.gate import SUM_BITS, PointSum
from cluster.segment import Rows

BLOCK_BYTES = 1024 * 1024  # of vectors that are copied at a time, several times over


def sum_of_points(rows: Rows, live: RowNumbers) -> PointSum:
    """Of some rows (n,), ascending. The hash of an id seeds that of its vector's bytes."""
    step, total = max(1, BLOCK_BYTES // (4 * rows.dimension)), 0
    for start in range(0, len(live), step):
        batch = rows.take(live[start : start + step], ["id_hash", "vector"])
        vectors = np.ascontiguousarray(vectors_view(batch.column("vector")))
        data, width = vectors.data.cast("B"), vectors[0].nbytes
        seeds = batch.column("id_hash").to_numpy().tolist()
        total += sum(
            xxhash.xxh3_64_intdigest(data[at : at + width], seed)
            for at, seed in zip(range(0, len(data), width), seeds, strict=True)
        )
        rows.forget_pages()
    return PointSum(len(live), total % 2**SUM_BITS)
