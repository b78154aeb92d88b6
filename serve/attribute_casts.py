"""Arrow columns of attributes as the types that the collection has for them: of the same kind, and without loss."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.attributes import arrow_type
from cluster.errors import Invalid


def cast_column(column: Any, text: str, name: str) -> Any:
    """The column as the type of that text; Invalid names it, or the first value that does not fit.

    Only the rounding of a floating-point number to a narrower type may change a value.
    """
    if str(column.type) == text:
        return column
    dtype = arrow_type(text)
    kind, wanted = _kind(column.type), _kind(dtype) if dtype is not None else ""
    if not kind or (kind, wanted) not in {(kind, kind), ("integer", "floating")}:
        raise Invalid.at(name, f"is {column.type}, the collection has {text}")
    try:
        return _cast(column, dtype)
    except ValueError:
        place = f"{name}[{_first_unfit(column, dtype)}]"
        raise Invalid.at(place, f"is {column.type}, and as {text} it would be another value") from None


def is_text(dtype: Any) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype))


def is_binary(dtype: Any) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype))


def _is_local_timestamp(dtype: Any) -> bool:
    """One without a time zone, as all are that writes can give a collection."""
    return bool(pa.types.is_timestamp(dtype) and dtype.tz is None)


_KINDS = {
    "integer": pa.types.is_integer,
    "floating": pa.types.is_floating,
    "text": is_text,
    "binary": is_binary,
    "timestamp": _is_local_timestamp,
    "date": pa.types.is_date,
    "time": pa.types.is_time,
    "duration": pa.types.is_duration,
}


def _kind(dtype: Any) -> str:
    """The kind whose types are cast into each other; empty where there is none."""
    return next((kind for kind, is_of in _KINDS.items() if is_of(dtype)), "")


def _cast(column: Any, dtype: Any) -> Any:
    """ValueError where a value would be another one; Arrow's own errors are ValueErrors too."""
    if pa.types.is_floating(dtype):
        return _as_floats(column, dtype)
    cast = column.cast(dtype)
    if not cast.cast(column.type).equals(column):
        raise ValueError
    return cast


def _as_floats(column: Any, dtype: Any) -> Any:
    """Numbers as floating-point ones: integers exactly, others rounded, but not to infinity."""
    cast = column.cast(dtype, safe=False)
    if pa.types.is_integer(column.type):
        if cast.cast(pa.float64()).to_pylist() != column.to_pylist():  # Python compares an integer with a float exactly
            raise ValueError
    elif _infinities(cast) > _infinities(column):
        raise ValueError
    return cast


def _infinities(column: Any) -> int:
    return pc.sum(pc.is_inf(column.cast(pa.float64()))).as_py() or 0


def _first_unfit(column: Any, dtype: Any) -> int:
    """The row of the first value that `_cast` refuses, of a column that has one."""
    first, count = 0, len(column)
    while count > 1:
        half = count // 2
        try:
            _cast(column.slice(first, half), dtype)
        except ValueError:
            count = half
        else:
            first, count = first + half, count - half
    return first
