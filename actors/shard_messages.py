"""What a coordinator and a replica say to each other in frames: requests, answers and errors as heads and bodies.

A head is msgpack, a body holds arrays one after the other, each from a multiple of 16 bytes on. Vectors, scores, counts
and int64 ids are sent as they lie in memory; string ids, attributes and written points are Arrow IPC streams. Nothing
is pickled: what is received can be wrong, but it cannot run anything.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.frames import Part, padding
from cluster.arrow_rows import stream_of
from cluster.errors import (
    Conflict,
    Corrupt,
    EaglerayError,
    Exhausted,
    Fenced,
    FieldError,
    Invalid,
    NotFound,
    Unavailable,
)
from cluster.query import Degraded, Fetched, Hits, SearchGroup, ShardSearch
from cluster.write import PointWrite, WriteOutcome

COPY_BYTES = 4096  # an array that is smaller is copied: that is cheaper than to refer to it
BESIDE_BYTES = 1024 * 1024  # Arrow streams that are larger are written, and checked, beside the event loop
INT64 = pa.int64()
NO_IDS = np.empty(0, np.int64)  # an empty Arrow array may have no buffer
Message = tuple[bytes, list[Part]]  # head and body
P = ParamSpec("P")
T = TypeVar("T")
PLAIN_ERRORS = {kind.__name__: kind for kind in (EaglerayError, NotFound, Conflict, Fenced, Corrupt)}


class _Search(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    generation: int
    rows: int
    dimension: int
    min_lsn: int
    groups: tuple[SearchGroup, ...]


class _Fetch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    generation: int
    min_lsn: int
    columns: tuple[str, ...]
    ids: int
    ids_bytes: int | None  # of their Arrow stream; None where they are int64


class _Write(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    deletes: bool
    size: int
    shards: int


class _Fetched(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    points: int
    lsn: int
    table_bytes: int | None


class _Hits(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=0):
    queries: int
    rows: int
    lsn: int
    ids_bytes: int | None  # as of `_Fetch`
    columns_bytes: int | None
    degraded: Degraded


class _Error(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=1):
    kind: str
    message: str
    retry_after_s: float | None = None
    fields: tuple[FieldError, ...] = ()
    coverage: Any = None
    lsn: dict[int, int] | None = None
    failed: tuple[int, ...] = ()


class _Written(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag=2):
    lsn: int
    count: int


def _plain(value: object) -> object:
    """numpy's scalars, and mappings that are no dicts."""
    if isinstance(value, np.generic):
        return value.item()
    return dict(value)  # type: ignore[call-overload]


_encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
_search = msgspec.msgpack.Decoder(_Search).decode
_fetch = msgspec.msgpack.Decoder(_Fetch).decode
_writes = msgspec.msgpack.Decoder(tuple[_Write, ...]).decode
_outcomes = msgspec.msgpack.Decoder(tuple[_Hits | _Error, ...]).decode
_fetched = msgspec.msgpack.Decoder(_Fetched).decode
_written = msgspec.msgpack.Decoder(tuple[_Written | _Error, ...]).decode
_error = msgspec.msgpack.Decoder(_Error).decode


def _decodes(what: str, wrong: type[EaglerayError]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Whatever is wrong with what was received becomes `wrong`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def decode(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise wrong(f"a malformed {what}: {type(error).__name__}: {error}") from error

        return decode

    return decorate


async def beside(size_bytes: int, code: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Encode or decode a message of about that size, in a thread where it would hold up the event loop."""
    if size_bytes < BESIDE_BYTES:
        return code(*args, **kwargs)
    return await asyncio.to_thread(code, *args, **kwargs)


# --- requests -------------------------------------------------------------------------------------------------------


def encode_search(request: ShardSearch) -> Message:
    """Without `timeout_s`, which the frame tells."""
    rows, dimension = request.vectors.shape
    head = _encode(_Search(request.generation, rows, dimension, request.min_lsn, request.groups))
    return head, [_bytes_of(np.ascontiguousarray(request.vectors, np.float32))]


@_decodes("search", Invalid)
def decode_search(head: memoryview, body: memoryview, timeout_s: float) -> ShardSearch:
    told = _search(head)
    vectors = np.frombuffer(body, np.float32).reshape(told.rows, told.dimension)
    for group in told.groups:
        if not 0 <= group.start <= group.stop <= told.rows:
            raise ValueError(f"rows {group.start} to {group.stop} of {told.rows}")
    return ShardSearch(told.generation, vectors, told.groups, timeout_s, told.min_lsn)


def encode_fetch(generation: int, ids: Any, columns: Sequence[str], min_lsn: int) -> Message:
    body: list[Part] = []
    ids_bytes = _put_ids(body, ids)
    return _encode(_Fetch(generation, min_lsn, tuple(columns), len(ids), ids_bytes)), body


@_decodes("fetch", Invalid)
def decode_fetch(head: memoryview, body: memoryview) -> tuple[int, Any, tuple[str, ...], int]:
    """Generation, Arrow array of ids, columns and `min_lsn`."""
    told, sections = _fetch(head), _Sections(body)
    ids = sections.ids(told.ids, told.ids_bytes)
    sections.end()
    return told.generation, ids, told.columns, told.min_lsn


def encode_writes(writes: Sequence[PointWrite]) -> Message:
    heads, body = [], list[Part]()
    for write in writes:
        deletes = write.upserts is None
        batch = pa.record_batch([write.deletes], ["id"]) if deletes else write.upserts
        heads.append(_Write(deletes, _put_stream(body, batch), write.shards))
    return _encode(heads), body


@_decodes("write", Invalid)
def decode_writes(head: memoryview, body: memoryview) -> list[PointWrite]:
    writes, sections = [], _Sections(body)
    for told in _writes(head):
        batch = sections.batch(told.size)
        deletes = batch.column(0) if told.deletes else None
        writes.append(PointWrite(None if told.deletes else batch, deletes, told.shards))
    sections.end()
    return writes


# --- answers --------------------------------------------------------------------------------------------------------


def encode_outcomes(outcomes: Sequence[Hits | EaglerayError]) -> Message:
    body: list[Part] = []
    heads = [_put_hits(body, outcome) if isinstance(outcome, Hits) else _told_of(outcome) for outcome in outcomes]
    return _encode(heads), body


def _put_hits(body: list[Part], hits: Hits) -> _Hits:
    _put(body, np.ascontiguousarray(hits.counts, np.int64))
    ids_bytes = _put_ids(body, hits.ids)
    _put(body, np.ascontiguousarray(hits.scores, np.float32))
    columns_bytes = None if hits.columns is None else _put_stream(body, hits.columns)
    return _Hits(len(hits.counts), len(hits.scores), hits.lsn, ids_bytes, columns_bytes, hits.degraded)


@_decodes("answer to a search", Unavailable)
def decode_outcomes(head: memoryview, body: memoryview) -> tuple[Hits | EaglerayError, ...]:
    sections = _Sections(body)
    outcomes = tuple(sections.hits(told) if isinstance(told, _Hits) else _error_from(told) for told in _outcomes(head))
    sections.end()
    return outcomes


def encode_fetched(fetched: Fetched) -> Message:
    body: list[Part] = []
    _put(body, np.ascontiguousarray(fetched.found, np.bool_))
    table_bytes = None if fetched.table is None else _put_stream(body, fetched.table)
    return _encode(_Fetched(len(fetched.found), fetched.lsn, table_bytes)), body


@_decodes("answer to a fetch", Unavailable)
def decode_fetched(head: memoryview, body: memoryview) -> Fetched:
    told, sections = _fetched(head), _Sections(body)
    found = np.frombuffer(sections.take(told.points), np.uint8) != 0
    table = None if told.table_bytes is None else sections.table(told.table_bytes)
    sections.end()
    return Fetched(found, table, told.lsn)


def encode_written(outcomes: Sequence[WriteOutcome | EaglerayError]) -> Message:
    return _encode([_Written(o.lsn, o.count) if isinstance(o, WriteOutcome) else _told_of(o) for o in outcomes]), []


@_decodes("answer to a write", Unavailable)
def decode_written(head: memoryview, body: memoryview) -> tuple[WriteOutcome | EaglerayError, ...]:
    _Sections(body).end()
    return tuple(
        WriteOutcome(told.lsn, told.count) if isinstance(told, _Written) else _error_from(told)
        for told in _written(head)
    )


def encode_error(error: EaglerayError) -> Message:
    return _encode(_told_of(error)), []


@_decodes("error", Unavailable)
def decode_error(head: memoryview) -> EaglerayError:
    return _error_from(_error(head))


def _told_of(error: EaglerayError) -> _Error:
    kind = type(error).__name__
    if isinstance(error, Invalid):
        return _Error(kind, error.message, fields=error.errors)
    if isinstance(error, Exhausted):
        return _Error(kind, error.message, error.retry_after_s)
    if isinstance(error, Unavailable):
        lsn = None if error.lsn is None else dict(error.lsn)
        return _Error(kind, error.message, error.retry_after_s, (), error.coverage, lsn, error.failed)
    return _Error(kind, error.message)


def _error_from(told: _Error) -> EaglerayError:
    if told.kind == "Invalid":
        return Invalid(told.message, told.fields)
    if told.kind == "Exhausted":
        return Exhausted(told.message, told.retry_after_s)
    if told.kind == "Unavailable":
        retry_after_s = 1.0 if told.retry_after_s is None else told.retry_after_s
        return Unavailable(told.message, retry_after_s, told.coverage, told.lsn, told.failed)
    return PLAIN_ERRORS.get(told.kind, EaglerayError)(told.message)


# --- bodies ---------------------------------------------------------------------------------------------------------


def _bytes_of(array: NDArray[Any]) -> Part:
    """The bytes of a contiguous array."""
    return array.tobytes() if array.nbytes < COPY_BYTES else array.reshape(-1).data.cast("B")


def _put(body: list[Part], array: NDArray[Any]) -> None:
    body.append(_bytes_of(array))
    if unaligned := padding(array.nbytes):
        body.append(bytes(unaligned))


def _put_ids(body: list[Part], ids: Any) -> int | None:
    """Append an Arrow array of ids; the bytes of its stream, None where they are int64 as they are."""
    if ids.type == INT64:
        buffer = ids.buffers()[1]  # `to_numpy` would let go of the GIL, which may take long to get back
        _put(body, np.frombuffer(buffer, np.int64, len(ids), 8 * ids.offset) if len(ids) else NO_IDS)
        return None
    return _put_stream(body, pa.record_batch([ids], ["id"]))


def _put_stream(body: list[Part], rows: Any) -> int:
    """Append a table or record batch as an Arrow stream; its bytes."""
    stream = memoryview(stream_of(rows))
    body.append(stream)
    body.append(bytes(padding(len(stream))))
    return len(stream)


def _adds_up(counts: NDArray[np.int64], rows: int) -> bool:
    if len(counts) == 1:  # by far the most frequent case, and numpy's reductions take microseconds
        return bool(counts[0] == rows)
    return int(counts.sum()) == rows and int(counts.min(initial=0)) >= 0


class _Sections:
    """The arrays of a body, one after the other."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._at = 0

    def take(self, size: int) -> memoryview:
        at = self._at
        if size < 0 or at + size > len(self._body):
            raise ValueError(f"{size} bytes are to come, there are {len(self._body) - at}")
        self._at = at + size + padding(size)
        return self._body[at : at + size]

    def end(self) -> None:
        if self._at != len(self._body):
            raise ValueError(f"{len(self._body)} bytes came instead of {self._at}")

    def hits(self, told: _Hits) -> Hits:
        counts = np.frombuffer(self.take(8 * told.queries), np.int64)
        ids = self.ids(told.rows, told.ids_bytes)
        scores = np.frombuffer(self.take(4 * told.rows), np.float32)
        columns = None if told.columns_bytes is None else self.table(told.columns_bytes)
        if not _adds_up(counts, told.rows) or (columns is not None and len(columns) != told.rows):
            raise ValueError(f"the counts and columns of {told.rows} hits do not fit them")
        return Hits(counts, ids, scores, columns, told.lsn, told.degraded)

    def ids(self, count: int, stream_bytes: int | None) -> Any:
        """An Arrow array of `count` ids."""
        if stream_bytes is None:
            return pa.Array.from_buffers(INT64, count, [None, pa.py_buffer(self.take(8 * count))], 0)
        ids = self.batch(stream_bytes).column(0)
        if len(ids) != count:
            raise ValueError(f"{len(ids)} ids came instead of {count}")
        return ids

    def batch(self, size: int) -> Any:
        """The one record batch of an Arrow stream."""
        with pa.ipc.open_stream(pa.py_buffer(self.take(size))) as reader:
            batch = reader.read_next_batch()
            if any(True for _ in reader):  # to take the first alone would lose points of a write
                raise ValueError("more than one record batch came")
        batch.validate(full=True)
        return batch

    def table(self, size: int) -> Any:
        with pa.ipc.open_stream(pa.py_buffer(self.take(size))) as reader:
            table = reader.read_all()
        table.validate(full=True)
        return table
