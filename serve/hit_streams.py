"""Answers of searches as Arrow streams, fast where answers differ in their numbers only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from cluster.arrow_rows import stream_of
from cluster.query import Coverage, Hits, SearchResult
from serve.json_bodies import lsn_answer

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's columnar format, "IPC Streaming Format"


def write_result(result: SearchResult) -> bytes:
    """Columns `query` int32, `id`, `score` float32, then attributes; the rest is in the schema's metadata."""
    hits = result.hits
    lsn = tuple(result.lsn.items())
    schema, head = _schema(hits.ids.type, result.coverage, result.generation, lsn, result.degraded)
    if hits.columns is not None:
        return _write_with_attributes(hits, schema)
    if len(hits.scores) and hits.ids.type == pa.int64():
        frame = _frame(len(hits.scores))
        parts: tuple[Any, ...] = (
            frame[0],
            _query_column(hits),
            frame[1],
            hits.ids.to_numpy(),
            frame[2],
            hits.scores,
            frame[3],
        )
        return b"".join((head, *parts, END_OF_STREAM))
    batch = pa.RecordBatch.from_arrays(_columns(hits), schema=schema)
    return b"".join((head, batch.serialize(), END_OF_STREAM))


def _write_with_attributes(hits: Hits, schema: Any) -> bytes:
    for field in hits.columns.schema:
        schema = schema.append(field)
    table = pa.table([*_columns(hits), *hits.columns.columns], schema=schema)
    return bytes(stream_of(table))


def _columns(hits: Hits) -> list[Any]:
    return [pa.array(_query_column(hits)), hits.ids, pa.array(hits.scores)]


def _query_column(hits: Hits) -> Any:
    """The number of each hit's query."""
    return np.repeat(np.arange(len(hits.counts), dtype=np.int32), hits.counts)


@lru_cache(maxsize=64)
def _schema(
    id_type: Any, coverage: Coverage, generation: int, lsn: tuple[tuple[int, int], ...], degraded: str
) -> tuple[Any, bytes]:
    """The schema of hits without attributes, and the message that begins their stream: both stay the same until the
    next write."""
    metadata = {
        "coverage": msgspec.json.encode(coverage.to_dict()),
        "generation": str(generation),
        "lsn": msgspec.json.encode(lsn_answer(dict(lsn))),
    } | ({"degraded": degraded} if degraded else {})
    schema = pa.schema([("query", pa.int32()), ("id", id_type), ("score", pa.float32())], metadata=metadata)
    return schema, schema.serialize().to_pybytes()


@lru_cache(maxsize=256)
def _frame(rows: int) -> tuple[bytes, ...]:
    """What stands before, between and after the three columns in the record batch of so many hits with int64 ids:
    it says nothing of their values."""
    types = (pa.int32(), pa.int64(), pa.float32())
    zeros = [pa.array(np.zeros(rows, dtype.to_pandas_dtype())) for dtype in types]
    message = pa.RecordBatch.from_arrays(zeros, names=["query", "id", "score"]).serialize()
    batch = pa.ipc.read_record_batch(message, pa.schema(list(zip(("query", "id", "score"), types, strict=True))))
    parts, end = [], 0
    for column in batch.columns:
        start = column.buffers()[1].address - message.address
        parts.append(message[end:start].to_pybytes())
        end = start + rows * column.type.byte_width
    return (*parts, message[end:].to_pybytes())
