"""The order of a segment's rows, by (hash of id, id), of rows that lie in several places; and columns made alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.attributes import fitted

Positions = NDArray[np.int64]


def order_of_rows(
    hashes: NDArray[np.uint64], ids_at: Callable[[Positions], Any]
) -> tuple[Positions, NDArray[np.bool_]]:
    """Positions (n,) ordered by (hash, id, position), and (n - 1,) where the next one has the same id.

    `ids_at` gives the ids of some positions as an Arrow array; it is asked only for those whose hashes are equal.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    equal = np.flatnonzero(ordered[1:] == ordered[:-1])
    same = np.zeros(max(0, len(order) - 1), dtype=bool)
    if len(equal):
        same[equal] = pc.equal(ids_at(order[equal]), ids_at(order[equal + 1])).to_numpy(zero_copy_only=False)
        for digest in np.unique(ordered[equal[~same[equal]]]):  # two ids of one hash
            start, stop = np.searchsorted(ordered, digest, "left"), np.searchsorted(ordered, digest, "right")
            run = sorted(zip(ids_at(order[start:stop]).to_pylist(), order[start:stop].tolist(), strict=True))
            order[start:stop] = [position for _, position in run]
            same[start : stop - 1] = [one[0] == other[0] for one, other in pairwise(run)]
    return order, same


def conformed(batch: Any, schema: Any) -> Any:
    """A record batch with the columns of a schema: null where it has none, or a value does not fit the type."""
    arrays = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        if place < 0:
            arrays.append(pa.nulls(batch.num_rows, field.type))
        else:
            arrays.append(_of_type(batch.column(place), field.type, field.name))
    return pa.record_batch(arrays, schema=schema)


def _of_type(column: Any, dtype: Any, name: str) -> Any:
    """Without copying where the type is the same."""
    if column.type == dtype:
        return column
    if name == "vector":  # the name of the inner field may differ
        return pa.FixedSizeListArray.from_arrays(column.flatten(), type=dtype)
    return fitted(column, dtype, name)
