"""Arrow record batch streams as requests (`vector_streams` has those of query vectors). Columns are views of the
received bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from cluster.arrow_rows import vectors_view
from cluster.errors import Invalid

ARROW = "application/vnd.apache.arrow.stream"


def read_columns(body: bytes, required: Sequence[str], rows_max: int, what: str) -> dict[str, Any]:
    """All columns of a stream by name, each valid as its type says; one batch is not copied.

    Invalid where a required column is missing, a name comes twice, there are no rows or more than `rows_max`, or the
    columns share bytes, so that the bound on the body would not bound them.
    """
    types, batches = read_batches(body)
    rows = sum(batch.num_rows for batch in batches)
    if not 1 <= rows <= rows_max:
        raise Invalid.at("body", f"must hold 1 to {rows_max} {what}, not {rows}")
    names = [column.name for column in types]
    for name in required:
        if names.count(name) != 1:
            raise Invalid.at("body", f"must hold one column {name}; it holds {', '.join(names) or 'none'}")
    if len(set(names)) < len(names):
        raise Invalid.at("body", f"holds two columns {next(name for name in names if names.count(name) > 1)!r}")
    for column in types:
        if not column.plain:
            raise Invalid.at(column.name, f"{column.type_text} is not taken; write it as plain values")
    _validate(batches)
    if sum(batch.nbytes for batch in batches) > 2 * len(body):
        raise Invalid.at("body", "its columns share bytes")
    table = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
    return dict(zip(names, table.columns, strict=True))


def _validate(batches: Sequence[Any]) -> None:
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise Invalid.at(name, f"is damaged: {error}") from None


@dataclass(frozen=True)
class _Column:
    """A column as the stream's schema has it. `plain`: its values are what their bytes say, once each."""

    name: str
    type_text: str
    plain: bool


def read_batches(body: bytes) -> tuple[list[_Column], list[Any]]:
    """The columns, and the record batches, not validated yet."""
    try:
        _refuse_compressed(body)
        stream = pa.ipc.open_stream(body)
        return [_Column(each.name, str(each.type), _plain(each.type)) for each in stream.schema], list(stream)
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise Invalid.at("body", f"is not an Arrow stream: {error}") from None


def _plain(dtype: Any) -> bool:
    """No view or run, where a few bytes can stand for many values, and no class of some library's."""
    is_a = pa.types
    views = (is_a.is_string_view, is_a.is_binary_view, is_a.is_list_view, is_a.is_large_list_view)
    others = (is_a.is_run_end_encoded, is_a.is_union)
    if isinstance(dtype, pa.BaseExtensionType) or any(kind(dtype) for kind in (*views, *others)):
        return False
    return all(_plain(dtype.field(number).type) for number in range(dtype.num_fields))


def _refuse_compressed(body: bytes) -> None:
    """A compressed stream may unpack to thousands of times its size: the bound on the body would bound nothing."""
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type == "dictionary":
            raise Invalid.at("body", "holds dictionaries; write the columns without dictionary encoding")
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


def vectors_of(column: Any) -> NDArray[Any]:
    """A column of vectors as an array of shape (n, dimension); Invalid names `vector`."""
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
