"""Attributes of points to be written, as columns of the types that the collection has for them.

A name that the collection does not know is declared by the write: its type is that of the values.
"""

from __future__ import annotations

import datetime
import unicodedata
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
from cluster.errors import Exhausted, Invalid
from cluster.segment import RESERVED_COLUMNS
from serve.attribute_casts import cast_column, is_binary, is_text

ATTRIBUTES_MAX = 1_024  # of a collection that a write adds one to: every one is in each manifest
NAME_BYTES_MAX = 256
CELLS_MAX = 4_000_000  # of one request, points x attributes: a null takes the bytes of a value, in the log as well
LARGE_CELLS = 20_000  # more are made beside the event loop: they take some 5 ms
COLUMN_ROWS_MIN = 200  # to make a column takes at least as long as one with so many values
Place = Callable[[int], str]  # what a message calls a row
Values = Sequence[Any]


@dataclass(frozen=True)
class AttributeColumns:
    """Arrow arrays by name, of the attributes that any point has, and the types of those to be declared."""

    columns: dict[str, Any] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)


def json_attributes(rows: Sequence[Mapping[str, Any] | None], known: Mapping[str, str]) -> AttributeColumns:
    """The columns of JSON attributes, one mapping (or none) per point; Invalid names `points[i].attributes.name`."""
    given = _given_values(rows, known)
    check_cells(len(rows), len(given))
    attributes = AttributeColumns()
    for name in sorted(given):
        at, values = given[name].rows, given[name].values
        place = _json_place(name, at)
        if name in known:
            column = _converted(values, arrow_type(known[name]), known[name], place)
        else:
            column = _inferred(values, place)
            attributes.new[name] = str(column.type)
        attributes.columns[name] = _spread(column, at, len(rows))
    return attributes


def arrow_attributes(columns: Mapping[str, Any], known: Mapping[str, str]) -> AttributeColumns:
    """The same of Arrow columns, which were validated; Invalid names `name[i]`."""
    given = {}
    for name, column in columns.items():
        if name not in known:
            check_name(name, name)
        if column.null_count < len(column):
            given[name] = column
    check_total(known, len(given.keys() - known.keys()), "body")
    check_cells(max(map(len, given.values()), default=0), len(given))
    attributes = AttributeColumns()
    for name, column in given.items():
        if name in known:
            attributes.columns[name] = cast_column(column, known[name], name)
        else:
            declared = _declared(column, name)
            attributes.columns[name], attributes.new[name] = declared, str(declared.type)
    return attributes


def check_name(name: str, place: str) -> None:
    """Invalid where a write cannot declare an attribute of that name."""
    if name in RESERVED_COLUMNS:
        raise Invalid.at(place, f"{name!r} is not for attributes; reserved are {', '.join(sorted(RESERVED_COLUMNS))}")
    if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise Invalid.at(place, f"a name has 1 to {NAME_BYTES_MAX} bytes, not {len(name.encode())}")
    if "," in name or any(unicodedata.category(character) == "Cc" for character in name):
        raise Invalid.at(place, f"a name has no comma and no control characters, unlike {name!r}")


def check_total(known: Mapping[str, str], new: int, place: str) -> None:
    """Invalid where the collection would have too many attributes."""
    if new and len(known) + new > ATTRIBUTES_MAX:
        raise Invalid.at(
            place, f"the collection has {len(known)} attributes, and may have {ATTRIBUTES_MAX}: {new} more are too many"
        )


def check_cells(points: int, names: int) -> None:
    """Exhausted where the columns of a request would be too large."""
    if points * names > CELLS_MAX:
        raise Exhausted(
            f"attributes: {points} points x {names} attributes are {points * names} values, nulls counted, "
            f"at most {CELLS_MAX} are taken: send fewer points at a time"
        )


def has_large_columns(rows: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether `json_attributes` of them would hold up an event loop, however few values are given."""
    names: set[str] = set().union(*filter(None, rows))
    return len(names) * max(len(rows), COLUMN_ROWS_MIN) > LARGE_CELLS


def check_attribute_bytes(columns: Mapping[str, Any], bound: int, place: Place) -> None:
    """Invalid names the first point whose attributes, with their names, are larger than the bound."""
    names = {name: len(name.encode()) for name in columns}
    if sum(column.nbytes + names[name] for name, column in columns.items()) <= bound:
        return
    sizes = np.zeros(max(map(len, columns.values())), dtype=np.int64)
    for name, column in columns.items():
        valid = _valid(column)
        sizes += _value_bytes(column, valid)
        sizes += names[name] * valid
    row = int(np.argmax(sizes > bound))
    if sizes[row] > bound:
        raise Invalid.at(place(row), f"has {sizes[row]} bytes, a point's attributes at most {bound} (attribute_bytes)")


def _valid(column: Any) -> NDArray[np.int64]:
    valid: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return valid.astype(np.int64)


def _value_bytes(column: Any, valid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each value, shape (n,)."""
    dtype = column.type
    if pa.types.is_large_string(dtype) or pa.types.is_string(dtype) or is_binary(dtype):
        lengths = pc.fill_null(pc.binary_length(column), 0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    try:
        width: int = (dtype.bit_width + 7) // 8
        return valid * width
    except ValueError:  # nested
        return np.array([column.slice(row, 1).nbytes for row in range(len(column))], dtype=np.int64)


# --- JSON values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """The values of an attribute that are not null, and the points that they are of, in order."""

    rows: list[int]
    values: list[Any]


def _given_values(rows: Sequence[Mapping[str, Any] | None], known: Mapping[str, str]) -> dict[str, _Given]:
    """The values by name. Names are checked as they come: a body may hold millions of them."""
    given: dict[str, _Given] = {}
    new = 0
    for row, attributes in enumerate(rows):
        for name, value in (attributes or {}).items():
            if name in given:
                if value is not None:
                    given[name].rows.append(row)
                    given[name].values.append(value)
                continue
            if name not in known:
                check_name(name, _json_place(name, [row])(0))
                new += value is not None
                check_total(known, new, "points")
            if value is not None:
                given[name] = _Given([row], [value])
    return given


def _json_place(name: str, rows: Sequence[int]) -> Place:
    """What a message calls the values of these points."""
    return lambda number: f"points[{rows[number]}].attributes.{name}"


def _spread(column: Any, rows: list[int], points: int) -> Any:
    """The values of these points as a column of all of them, the others null."""
    if len(rows) == points:
        return column
    at = np.full(points, -1, dtype=np.int32)
    at[rows] = np.arange(len(rows), dtype=np.int32)
    return column.take(pa.array(at, mask=at < 0))


def _inferred(values: Values, place: Place) -> Any:
    """The column of an attribute that is not known yet."""
    types = {type(value) for value in values}
    for allowed, dtype in (
        ({bool}, pa.bool_()),
        ({int}, pa.int64()),
        ({int, float}, pa.float64()),
        ({str}, pa.large_string()),
    ):
        if types <= allowed:
            return _converted(values, dtype, str(dtype), place)
    first = type(values[0])
    for row, value in enumerate(values):
        if type(value) not in (bool, int, float, str):
            raise Invalid.at(place(row), "must be null, true or false, a number or text")
        if type(value) is not first and {type(value), first} != {int, float}:
            raise Invalid.at(place(row), f"{value!r:.100} is of another kind than the values before")
    raise AssertionError(types)


def _converted(values: Values, dtype: Any, text: str, place: Place) -> Any:
    """The column of that type; Invalid names the first value that is none of it."""
    convert = _converter(dtype) if dtype is not None else None
    if convert is None:
        raise Invalid.at(place(0), f"has the type {text}, which JSON cannot write; write null, or by an import")
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
        (is_text, _texts),
        (is_binary, _bytes),
        (is_a.is_timestamp, _cast_texts),
        (is_a.is_date, _cast_texts),
        (is_a.is_time, _times),
        (is_a.is_duration, _durations),
    ):
        if fits(dtype):
            return convert
    return None


def _require(values: Values, *kinds: type) -> None:
    if not {type(value) for value in values} <= {*kinds}:
        raise TypeError


def _booleans(values: Values, dtype: Any) -> Any:
    _require(values, bool)
    return pa.array(values, dtype)


def _integers(values: Values, dtype: Any) -> Any:
    _require(values, int)
    return pa.array(values, dtype)


def _floats(values: Values, dtype: Any) -> Any:
    _require(values, int, float)
    column = pa.array([float(value) for value in values], pa.float64()).cast(dtype)
    if pc.any(pc.is_inf(column.cast(pa.float64()))).as_py():
        raise OverflowError
    return column


def _texts(values: Values, dtype: Any) -> Any:
    _require(values, str)
    return pa.array(values, dtype)


def _bytes(values: Values, dtype: Any) -> Any:
    """Base64."""
    _require(values, str)
    return pa.array([msgspec.convert(value, bytes) for value in values], dtype)


def _cast_texts(values: Values, dtype: Any) -> Any:
    """ISO 8601, for timestamps and dates."""
    _require(values, str)
    return pa.array(values, pa.large_string()).cast(dtype)


def _times(values: Values, dtype: Any) -> Any:
    _require(values, str)
    times = [msgspec.convert(value, datetime.time) for value in values]
    if any(time.tzinfo is not None for time in times):
        raise ValueError
    return pa.array(times, pa.time64("us")).cast(dtype)


def _durations(values: Values, dtype: Any) -> Any:
    """ISO 8601, or a number of the type's unit."""
    _require(values, int, str)
    if any(type(value) is str for value in values):
        columns = [
            _integers([value], pa.int64()).cast(dtype)
            if type(value) is int
            else pa.array([msgspec.convert(value, datetime.timedelta)], pa.duration("us")).cast(dtype)
            for value in values
        ]
        return pa.concat_arrays(columns)
    return _integers(values, pa.int64()).cast(dtype)


# --- Arrow columns ----------------------------------------------------------------------------------------------


def _declared(column: Any, name: str) -> Any:
    """A column whose type the collection is to have; strings as imports store them."""
    dtype = column.type
    if pa.types.is_string(dtype):
        return column.cast(pa.large_string())
    if arrow_type(str(dtype)) != dtype:
        raise Invalid.at(name, f"{dtype} cannot be declared by a write; an import can store it")
    return column
