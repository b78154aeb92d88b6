"""The order-independent checksum of stored points: a sum of 64-bit hashes of id, vector bytes and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from actors.row_order import conformed
from actors.segment_rows import RowNumbers, attribute_types
from cluster.arrow_rows import vectors_view
from cluster.gate import SUM_BITS, PointSum
from cluster.ids import splitmix64
from cluster.segment import Rows
from cluster.value_hashes import hash_row_values

BLOCK_BYTES = 1024 * 1024  # of rows that are copied at a time, several times over


def sum_of_points(rows: Rows, live: RowNumbers, types: Mapping[str, Any] | None = None) -> PointSum:
    """Of some rows (n,), ascending, with their attributes as values of these Arrow types; None: as they are stored.

    A null attribute counts as none. The hash of an id seeds that of its vector's bytes, and is mixed with that of its
    attributes.
    """
    types = attribute_types(rows) if types is None else types
    schema = pa.schema(list(types.items()))
    columns = ["id_hash", "vector", *attribute_types(rows).keys() & types.keys()]
    step, total = max(1, BLOCK_BYTES // rows.row_bytes), 0
    for start in range(0, len(live), step):
        batch = rows.take(live[start : start + step], columns)
        total += _sum_of_vectors(batch) + _sum_of_attributes(batch, schema)
        rows.forget_pages()
    return PointSum(len(live), total % 2**SUM_BITS)


def _sum_of_vectors(batch: Any) -> int:
    vectors = np.ascontiguousarray(vectors_view(batch.column("vector")))
    data, width = vectors.data.cast("B"), vectors[0].nbytes
    seeds = batch.column("id_hash").to_numpy().tolist()
    return sum(
        xxhash.xxh3_64_intdigest(data[at : at + width], seed)
        for at, seed in zip(range(0, len(data), width), seeds, strict=True)
    )


def _sum_of_attributes(batch: Any, schema: Any) -> int:
    if not len(schema):
        return 0
    values = hash_row_values(conformed(batch, schema))
    mixed = splitmix64(values + batch.column("id_hash").to_numpy())
    return int(np.where(values == 0, 0, mixed).sum(dtype=np.uint64))
