"""Arrow record batch streams as request and answer of a search. Vectors are views of the received bytes."""

from __future__ import annotations

import struct
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
        _refuse_compressed(body)
        batches = list(pa.ipc.open_stream(body))
        names = batches[0].schema.names if batches else []
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise Invalid.at("body", f"is not an Arrow stream: {error}") from None
    if not batches:
        raise Invalid.at("vector", "the stream holds no record batch")
    if names != ["vector"]:
        raise Invalid.at("body", f"must hold exactly the column vector, not {', '.join(names) or 'none'}")
    views = [_view(batch.column(0)) for batch in batches]
    return views[0] if len(views) == 1 else np.concatenate(views)


def _refuse_compressed(body: bytes) -> None:
    """A compressed stream may unpack to thousands of times its size: the bound on the body would bound nothing."""
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type == "record batch" and _names_codec(message.metadata.to_pybytes()):
            raise Invalid.at("body", "holds compressed buffers; write the Arrow stream without compression")


def _names_codec(metadata: bytes) -> bool:
    """Whether a record batch's flatbuffer has `compression` (Arrow's Message.fbs: Message.header is its third
    field, RecordBatch.compression its fourth)."""
    message = _offset(metadata, 0)
    header = _field(metadata, message, 2)
    return header is not None and _field(metadata, _offset(metadata, header), 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer table lies; None if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    slot = 4 + 2 * number
    at = struct.unpack_from("<H", data, vtable + slot)[0] if slot < size else 0
    return table + at if at else None


def _offset(data: bytes, at: int) -> int:
    """The place that the offset stored at a place leads to."""
    return int(at + struct.unpack_from("<I", data, at)[0])


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
