"""Attributes of points: their Arrow types as the text that manifests and the serving table hold, and their columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import Conflict

MISFITS = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)  # what a cast raises of values
logger = logging.getLogger(__name__)


def complete_columns(table: Any, columns: Sequence[str], types: Mapping[str, str]) -> Any:
    """The table with exactly these columns. One that no replica knows yet, because it was declared just now, is null
    and of its type in the serving table, where that has a name of Arrow's."""
    if table is None or (table.column_names == list(columns) and not any(map(pa.types.is_null, table.schema.types))):
        return table
    arrays = {}
    for name in columns:
        if name in table.column_names and not pa.types.is_null(table.column(name).type):
            arrays[name] = table.column(name)
        else:
            arrays[name] = pa.nulls(len(table), arrow_type(types.get(name, "")) or pa.null())
    return pa.table(arrays)


def types_after_import(declared: Mapping[str, str], imported: Mapping[str, Any]) -> dict[str, str]:
    """The types, as text, of a collection's attributes once imported points, with these Arrow types, replace its own.

    One whose type has no name of Arrow's is left out: writes cannot have it. Conflict where they have declared it.
    """
    types = dict(declared)
    for name, dtype in imported.items():
        if arrow_type(str(dtype)) == dtype:
            types[name] = str(dtype)
        elif name in declared:
            raise Conflict(f"attribute {name!r} was written as {declared[name]}; an import cannot make it {dtype}")
    return types


def fitted(column: Any, dtype: Any, name: str) -> Any:
    """The Arrow array of an attribute as another type, null where a value does not fit.

    Such values there are only where an import changed the type of an attribute while points were written.
    """
    try:
        return column.cast(dtype)
    except MISFITS:
        values = [_fitted_value(column.take(pa.array([row])), dtype) for row in range(len(column))]
    found = pa.concat_arrays([*values, pa.nulls(0, dtype)])
    lost = found.null_count - column.null_count
    if lost:
        logger.warning("%d values of attribute %r become null: they do not fit %s", lost, name, dtype)
    return found


def _fitted_value(value: Any, dtype: Any) -> Any:
    """Of an array of one value, which is no slice: Arrow casts the lists of other rows along with those of a slice."""
    try:
        return value.cast(dtype)
    except MISFITS:
        return pa.nulls(1, dtype)


def arrow_type(text: str) -> Any:
    """The Arrow type of that name; None where Arrow has no such name (it has none for nested types)."""
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return None
