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
    pieces = [
        batches[source].select(columns).take(pa.array(rows[order[start:stop]]))
        for source, start, stop in zip(sources, starts, stops, strict=True)
    ]
    if len(pieces) == 1 and (np.diff(order) == 1).all():
        return pieces[0]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_batches(pieces).take(pa.array(back))
