"""Attributes of points: their Arrow types as the text that manifests and the serving table hold, and their columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

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


def fitted(column: Any, dtype: Any) -> Any:
    """An Arrow array as another type, null where a value does not fit.

    Such values there are only where an import changed the type of an attribute while points were written.
    """
    try:
        return column.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        logger.warning("an attribute that is %s now holds values that do not fit: %s", dtype, error)
    values = [_fitted_value(column.slice(row, 1), dtype) for row in range(len(column))]
    return pa.concat_arrays([*values, pa.nulls(0, dtype)])


def _fitted_value(value: Any, dtype: Any) -> Any:
    try:
        return value.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(1, dtype)


def arrow_type(text: str) -> Any:
    """The Arrow type of that name; None where Arrow has no such name (it has none for nested types)."""
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return None
