"""Arrow record batch streams as request and answer of a search. Vectors are views of the received bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.arrow_rows import vectors_view
from cluster.errors import Invalid
from cluster.query import SearchResult

ARROW = "application/vnd.apache.arrow.stream"


def read_vectors(body: bytes) -> NDArray[Any]:
    """The `vector` column (FixedSizeList of float32 or float16) as an array of shape (n, dimension)."""
    try:
        batches = list(pa.ipc.open_stream(body))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise Invalid.at("body", f"is not an Arrow stream: {error}") from None
    if not batches:
        raise Invalid.at("vector", "the stream holds no record batch")
    names = batches[0].schema.names
    if names != ["vector"]:
        raise Invalid.at("body", f"must hold exactly the column vector, not {', '.join(names) or 'none'}")
    views = [_view(batch.column(0)) for batch in batches]
    return views[0] if len(views) == 1 else np.concatenate(views)


def _view(column: Any) -> NDArray[Any]:
    dtype = column.type
    if not pa.types.is_fixed_size_list(dtype) or dtype.value_type not in (pa.float32(), pa.float16()):
        raise Invalid.at("vector", f"must be a FixedSizeList of float32 or float16, not {dtype}")
    if dtype.list_size < 1:
        raise Invalid.at("vector", "must hold at least one number")
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise Invalid.at("vector", f"is damaged: {error}") from None
    if column.null_count or column.flatten().null_count:
        raise Invalid.at("vector", "holds nulls")
    return vectors_view(column)


def write_result(result: SearchResult) -> bytes:
    """Columns `query` int32, `id`, `score` float32, then attributes; the rest is in the schema's metadata."""
    hits = result.hits
    query = np.repeat(np.arange(len(hits.counts), dtype=np.int32), hits.counts)
    columns = {"query": pa.array(query), "id": hits.ids, "score": pa.array(hits.scores)}
    if hits.columns is not None:
        columns |= {name: hits.columns.column(name) for name in hits.columns.column_names}
    metadata = {"coverage": msgspec.json.encode(result.coverage.to_dict()), "generation": str(result.generation)}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
