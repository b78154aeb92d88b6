"""Rows in Arrow record batches: vectors as numpy views, and gathering rows from many batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def vector_type(dimension: int, dtype: str) -> pa.DataType:
    """FixedSizeList of float32 or float16."""
    return pa.list_(pa.float32() if dtype == "float32" else pa.float16(), dimension)


def vectors_view(column: Any) -> NDArray[Any]:
    """A FixedSizeList array as an array of shape (n, dimension), without copying; do not write to it."""
    view: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)
    return view


def vectors_array(vectors: NDArray[Any]) -> Any:
    """An array of shape (n, dimension) as a FixedSizeList array, without copying."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def stream_of(rows: Any) -> Any:
    """A buffer that holds a record batch or table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write(rows)
    return sink.getvalue()


def gather(batches: Sequence[Any], which: NDArray[np.int64], rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
    """One record batch of the given columns: row i is row `rows[i]` of `batches[which[i]]`.

    `which` and `rows` are (n,) with n >= 1. Only the rows asked for are read from memory-mapped batches.
    """
    order = np.argsort(which, kind="stable")
    sources, starts = np.unique(which[order], return_index=True)
    stops = np.append(starts[1:], len(order))
    if len(sources) == 1 and (np.diff(order) == 1).all():
        return batches[sources[0]].select(columns).take(pa.array(rows))
    ends = [*zip(sources.tolist(), starts.tolist(), stops.tolist(), strict=True)]
    schema = batches[sources[0]].select(columns).schema
    narrow = [field.name for field in schema if field.nullable or not pa.types.is_fixed_size_list(field.type)]
    pieces = [batches[source].select(narrow).take(pa.array(rows[order[a:b]])) for source, a, b in ends]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    gathered = pa.concat_batches(pieces).take(pa.array(back)) if narrow else None
    arrays = [
        _gathered_lists([batches[source].column(field.name) for source, _, _ in ends], ends, order, rows)
        if gathered is None or field.name not in narrow
        else gathered.column(field.name)
        for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def _gathered_lists(
    columns: Sequence[Any], ends: Sequence[tuple[int, int, int]], order: NDArray[np.int64], rows: NDArray[np.int64]
) -> Any:
    """FixedSizeList columns without nulls, each row copied once to its place: vectors are what takes memory."""
    first = vectors_view(columns[0])
    found = np.empty((len(rows), first.shape[1]), first.dtype)
    for column, (_, start, stop) in zip(columns, ends, strict=True):
        places = order[start:stop]
        found[places] = vectors_view(column)[rows[places]]
    return vectors_array(found)
