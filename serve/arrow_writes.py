"""Upserts and deletes as Arrow streams: the checked writes that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import CollectionConfig, IdType, Limits
from cluster.errors import Invalid
from cluster.ids import ID_ARROW_TYPE, INT64_MAX
from serve.arrow_bodies import read_columns, vectors_of
from serve.attribute_columns import arrow_attributes, check_attribute_bytes
from serve.write_bodies import (
    CheckedWrite,
    WriteOptions,
    check_no_repeat,
    delete_of,
    stored_vectors,
    upsert_of,
    write_timeout_s,
)


def arrow_upsert(
    body: bytes, options: WriteOptions, config: CollectionConfig, known: Mapping[str, str], limits: Limits
) -> CheckedWrite:
    """The write of a stream with `id`, `vector` and a column per attribute; Invalid names `id[i]`, `vector[i]`."""
    timeout_s = write_timeout_s(options.timeout_ms, limits)
    columns = read_columns(body, ("id", "vector"), limits.points_per_upsert, "points")
    ids = _ids(columns.pop("id"), config.id_type)
    check_no_repeat(ids, _id_place)
    vector = columns.pop("vector")
    if vector.null_count:
        raise Invalid.at(_vector_place(_first_null(vector)), "is null")
    vectors = vectors_of(vector)
    if vectors.shape[1] != config.dimension:
        raise Invalid.at("vector", f"has {vectors.shape[1]} numbers, the collection's dimension is {config.dimension}")
    attributes = arrow_attributes(columns, known)
    check_attribute_bytes(attributes.columns, limits.attribute_bytes, lambda row: f"attributes[{row}]")
    stored = stored_vectors(vectors.astype(np.float32, copy=False), config, _vector_place)
    return CheckedWrite(upsert_of(ids, stored, attributes.columns), timeout_s, attributes.new)


def arrow_delete(body: bytes, options: WriteOptions, config: CollectionConfig, limits: Limits) -> CheckedWrite:
    """The write of a stream with the one column `id`; Invalid names `id[i]`."""
    timeout_s = write_timeout_s(options.timeout_ms, limits)
    columns = read_columns(body, ("id",), limits.ids_per_delete, "ids")
    if len(columns) > 1:
        raise Invalid.at("body", f"must hold exactly the column id, not {', '.join(columns)}")
    return CheckedWrite(delete_of(_ids(columns["id"], config.id_type)), timeout_s)


def _ids(column: Any, id_type: IdType) -> Any:
    """The ids as the collection's id type."""
    dtype = column.type
    if id_type == "int64":
        fits = pa.types.is_integer(dtype)
    else:
        fits = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
    if not fits:
        raise Invalid.at("id", f"must be {id_type}, not {dtype}")
    if column.null_count:
        raise Invalid.at(_id_place(_first_null(column)), "is null")
    try:
        return column.cast(ID_ARROW_TYPE[id_type])
    except pa.ArrowInvalid:  # uint64 beyond int64
        row = int(np.argmax(pc.greater(column, pa.scalar(INT64_MAX, pa.uint64())).to_numpy(zero_copy_only=False)))
        raise Invalid.at(_id_place(row), f"must be an int64, not {column[row].as_py()}") from None


def _first_null(column: Any) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def _id_place(row: int) -> str:
    return f"id[{row}]"


def _vector_place(row: int) -> str:
    return f"vector[{row}]"
