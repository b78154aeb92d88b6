"""Attributes of points to be written, as columns of the types that the collection has for them.

A name that the collection does not know is declared by the write: its type is that of the values.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.attributes import arrow_type
from cluster.errors import Invalid
from cluster.segment import RESERVED_COLUMNS

ATTRIBUTES_MAX = 1_024  # of a collection, as far as writes declare them: every one is in each manifest
NAME_BYTES_MAX = 256
Place = Callable[[int], str]  # what a message calls a row
Values = Sequence[Any]
NONE = type(None)


@dataclass(frozen=True)
class AttributeColumns:
    """Arrow arrays by name, of the attributes that any point has, and the types of those to be declared."""

    columns: dict[str, Any] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)


def json_attributes(rows: Sequence[Mapping[str, Any] | None], known: Mapping[str, str]) -> AttributeColumns:
    """The columns of JSON attributes, one mapping (or none) per point; Invalid names `points[i].attributes.name`."""
    attributes = AttributeColumns()
    first_row = {name: row for row in reversed(range(len(rows))) for name in rows[row] or ()}
    for name in sorted(first_row):
        place = _json_place(name)
        check_name(name, place(first_row[name]))
        values = [row.get(name) if row else None for row in rows]
        if all(value is None for value in values):
            continue
        if name in known:
            attributes.columns[name] = _converted(values, arrow_type(known[name]), known[name], place)
        else:
            column = _inferred(values, place)
            attributes.columns[name], attributes.new[name] = column, str(column.type)
    check_total(known, attributes.new, "points")
    return attributes


def arrow_attributes(columns: Mapping[str, Any], known: Mapping[str, str]) -> AttributeColumns:
    """The same of Arrow columns, which were validated; Invalid names `name[i]`."""
    attributes = AttributeColumns()
    for name, column in columns.items():
        check_name(name, name)
        if column.null_count == len(column):
            continue
        if name in known:
            attributes.columns[name] = _cast(column, known[name], name)
        else:
            declared = _declared(column, name)
            attributes.columns[name], attributes.new[name] = declared, str(declared.type)
    check_total(known, attributes.new, "body")
    return attributes


def check_name(name: str, place: str) -> None:
    """Invalid where no attribute can be called that."""
    if name in RESERVED_COLUMNS:
        raise Invalid.at(place, f"{name!r} is not for attributes; reserved are {', '.join(sorted(RESERVED_COLUMNS))}")
    if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise Invalid.at(place, f"a name has 1 to {NAME_BYTES_MAX} bytes, not {len(name.encode())}")


def check_total(known: Mapping[str, str], new: Mapping[str, str], place: str) -> None:
    """Invalid where the collection would have too many attributes."""
    if new and len(known) + len(new) > ATTRIBUTES_MAX:
        raise Invalid.at(
            place, f"{len(known)} attributes and {len(new)} new ones: a collection has at most {ATTRIBUTES_MAX}"
        )


def check_attribute_bytes(columns: Mapping[str, Any], bound: int, place: Place) -> None:
    """Invalid names the first point whose attributes, with their names, are larger than the bound."""
    names = {name: len(name.encode()) for name in columns}
    if sum(column.nbytes + names[name] for name, column in columns.items()) <= bound:
        return
    sizes = np.sum([_value_bytes(column) + names[name] * _valid(column) for name, column in columns.items()], axis=0)
    row = int(np.argmax(sizes > bound))
    if sizes[row] > bound:
        raise Invalid.at(place(row), f"has {sizes[row]} bytes, a point's attributes at most {bound} (attribute_bytes)")


def _valid(column: Any) -> NDArray[np.int64]:
    valid: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return valid.astype(np.int64)


def _value_bytes(column: Any) -> NDArray[np.int64]:
    """Bytes of each value, shape (n,)."""
    dtype = column.type
    if pa.types.is_large_string(dtype) or pa.types.is_string(dtype) or _is_binary(dtype):
        lengths = pc.fill_null(pc.binary_length(column), 0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    try:
        width: int = (dtype.bit_width + 7) // 8
        return _valid(column) * width
    except ValueError:  # nested
        return np.array([column.slice(row, 1).nbytes for row in range(len(column))], dtype=np.int64)


# --- JSON values ------------------------------------------------------------------------------------------------


def _json_place(name: str) -> Place:
    return lambda row: f"points[{row}].attributes.{name}"


def _inferred(values: Values, place: Place) -> Any:
    """The column of an attribute that is not known yet."""
    types = {type(value) for value in values} - {NONE}
    for allowed, dtype in (
        ({bool}, pa.bool_()),
        ({int}, pa.int64()),
        ({int, float}, pa.float64()),
        ({str}, pa.large_string()),
    ):
        if types <= allowed:
            return _converted(values, dtype, str(dtype), place)
    first = next(type(value) for value in values if value is not None)
    for row, value in enumerate(values):
        if type(value) not in (NONE, bool, int, float, str):
            raise Invalid.at(place(row), "must be null, true or false, a number or text")
        if type(value) not in (NONE, first) and {type(value), first} != {int, float}:
            raise Invalid.at(place(row), f"{value!r:.100} is of another kind than the values before")
    raise AssertionError(types)


def _converted(values: Values, dtype: Any, text: str, place: Place) -> Any:
    """The column of that type; Invalid names the first value that is none of it."""
    convert = _converter(dtype) if dtype is not None else None
    if convert is None:
        row = next(row for row, value in enumerate(values) if value is not None)
        raise Invalid.at(place(row), f"has the type {text}, which JSON cannot write; write null, or by an import")
    try:
        return convert(values, dtype)
    except _WRONG:
        for row, value in enumerate(values):
            try:
                convert([value], dtype)
            except _WRONG:
                raise Invalid.at(place(row), f"must be {text}, not {value!r:.100}") from None
        raise


_WRONG = (TypeError, ValueError, OverflowError, pa.ArrowException)
Converter = Callable[[Values, Any], Any]


@cache
def _converter(dtype: Any) -> Converter | None:
    """How values of that type are written in JSON: as answers give them."""
    is_a = pa.types
    for fits, convert in (
        (is_a.is_boolean, _booleans),
        (is_a.is_integer, _integers),
        (is_a.is_floating, _floats),
        (_is_text, _texts),
        (_is_binary, _bytes),
        (is_a.is_timestamp, _cast_texts),
        (is_a.is_date, _cast_texts),
        (is_a.is_time, _times),
        (is_a.is_duration, _durations),
    ):
        if fits(dtype):
            return convert
    return None


def _require(values: Values, *kinds: type) -> None:
    if not {type(value) for value in values} <= {NONE, *kinds}:
        raise TypeError


def _booleans(values: Values, dtype: Any) -> Any:
    _require(values, bool)
    return pa.array(values, dtype)


def _integers(values: Values, dtype: Any) -> Any:
    _require(values, int)
    return pa.array(values, dtype)


def _floats(values: Values, dtype: Any) -> Any:
    _require(values, int, float)
    column = pa.array([None if value is None else float(value) for value in values], pa.float64()).cast(dtype)
    if pc.any(pc.is_inf(column.cast(pa.float64()))).as_py():
        raise OverflowError
    return column


def _texts(values: Values, dtype: Any) -> Any:
    _require(values, str)
    return pa.array(values, dtype)


def _bytes(values: Values, dtype: Any) -> Any:
    """Base64."""
    _require(values, str)
    return pa.array([msgspec.convert(value, bytes | None) for value in values], dtype)


def _cast_texts(values: Values, dtype: Any) -> Any:
    """ISO 8601, for timestamps and dates."""
    _require(values, str)
    return pa.array(values, pa.large_string()).cast(dtype)


def _times(values: Values, dtype: Any) -> Any:
    _require(values, str)
    times = [msgspec.convert(value, datetime.time | None) for value in values]
    if any(time is not None and time.tzinfo is not None for time in times):
        raise ValueError
    return pa.array(times, pa.time64("us")).cast(dtype)


def _durations(values: Values, dtype: Any) -> Any:
    """ISO 8601, or a number of the type's unit."""
    _require(values, int, str)
    if any(type(value) is str for value in values):
        columns = [
            _integers([value], pa.int64()).cast(dtype)
            if type(value) is int
            else pa.array([msgspec.convert(value, datetime.timedelta | None)], pa.duration("us")).cast(dtype)
            for value in values
        ]
        return pa.concat_arrays(columns)
    return _integers(values, pa.int64()).cast(dtype)


def _is_text(dtype: Any) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype))


def _is_binary(dtype: Any) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype))


# --- Arrow columns ----------------------------------------------------------------------------------------------


def _declared(column: Any, name: str) -> Any:
    """A column whose type the collection is to have; strings as imports store them."""
    dtype = column.type
    if pa.types.is_string(dtype):
        return column.cast(pa.large_string())
    if arrow_type(str(dtype)) != dtype:
        raise Invalid.at(name, f"{dtype} cannot be declared by a write; an import can store it")
    return column


def _cast(column: Any, text: str, name: str) -> Any:
    """The column as the type that the collection has for it; Invalid names the first value that does not fit."""
    if str(column.type) == text:
        return column
    dtype = arrow_type(text)
    if dtype is None:
        raise Invalid.at(name, f"is {column.type}, the collection has {text}")
    try:
        return column.cast(dtype)
    except pa.ArrowNotImplementedError:
        raise Invalid.at(name, f"is {column.type}, the collection has {text}") from None
    except pa.ArrowInvalid as error:
        for row in range(len(column)):
            try:
                column.slice(row, 1).cast(dtype)
            except pa.ArrowInvalid:
                raise Invalid.at(f"{name}[{row}]", f"does not fit {text}: {error}") from None
        raise Invalid.at(name, f"does not fit {text}: {error}") from None
