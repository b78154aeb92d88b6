"""Upserts and deletes as JSON bodies, and the checked writes that they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta, Struct
from numpy.typing import NDArray

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IdType, Limits
from cluster.errors import FieldError, Invalid
from cluster.ids import id_array
from cluster.vectors import as_searched, vector_problem
from cluster.write import PointWrite
from jobs.row_reader import FLOAT16_MAX
from serve.attribute_columns import Place, check_attribute_bytes, json_attributes
from serve.decoding import invalid_fields
from serve.search_bodies import check_timeout, rows_to_vectors

WRITE_TIMEOUT_MS = 10_000.0
TimeoutMs = Annotated[float, Meta(gt=0.0)]


class PointBody(Struct, forbid_unknown_fields=True):
    """A point to write; an attribute that is left out is null."""

    id: int | str
    vector: list[float]
    attributes: dict[str, Any] | None = None


class UpsertBody(Struct, forbid_unknown_fields=True):
    """Points to insert, or to put in the place of those with the same ids."""

    points: list[PointBody]
    timeout_ms: TimeoutMs = WRITE_TIMEOUT_MS


class DeleteBody(Struct, forbid_unknown_fields=True):
    """Points to delete by id."""

    ids: list[int | str]
    timeout_ms: TimeoutMs = WRITE_TIMEOUT_MS


class WriteOptions(Struct, forbid_unknown_fields=True):
    """A write's options as URL parameters, where the body is Arrow."""

    timeout_ms: TimeoutMs = WRITE_TIMEOUT_MS


@dataclass(frozen=True)
class CheckedWrite:
    """A write that can be sent to the shards once `new_attributes` (name -> Arrow type) are declared."""

    write: PointWrite
    timeout_s: float
    new_attributes: Mapping[str, str] = field(default_factory=dict)


def json_upsert(body: UpsertBody, config: CollectionConfig, known: Mapping[str, str], limits: Limits) -> CheckedWrite:
    """The write of a JSON upsert; `known` are the collection's attributes. Invalid names the field and position."""
    points = body.points
    timeout_s = write_timeout_s(body.timeout_ms, limits)
    check_count(len(points), limits.points_per_upsert, "points", "points")
    ids = _json_ids([point.id for point in points], config.id_type)
    check_no_repeat(ids, _id_place)
    vectors = rows_to_vectors([point.vector for point in points], config.dimension, _vector_place)
    attributes = json_attributes([point.attributes for point in points], known)
    check_attribute_bytes(attributes.columns, limits.attribute_bytes, _attributes_place)
    write = upsert_of(ids, stored_vectors(vectors, config, _vector_place), attributes.columns)
    return CheckedWrite(write, timeout_s, attributes.new)


def json_delete(body: DeleteBody, config: CollectionConfig, limits: Limits) -> CheckedWrite:
    """The write of a JSON delete; Invalid names the position."""
    timeout_s = write_timeout_s(body.timeout_ms, limits)
    check_count(len(body.ids), limits.ids_per_delete, "ids", "ids")
    return CheckedWrite(delete_of(id_array(body.ids, config.id_type)), timeout_s)


def write_timeout_s(timeout_ms: float, limits: Limits) -> float:
    """Invalid where more is asked for than the endpoint's bound; the default is that bound at most."""
    if timeout_ms != WRITE_TIMEOUT_MS:
        check_timeout(timeout_ms, limits)
    return min(timeout_ms, limits.timeout_ms) / 1000.0


def upsert_of(ids: Any, vectors: NDArray[Any], attributes: Mapping[str, Any]) -> PointWrite:
    """Columns as a write shares them: `id`, `vector`, attributes."""
    arrays = [ids, vectors_array(vectors), *attributes.values()]
    return PointWrite(upserts=pa.record_batch(arrays, names=["id", "vector", *attributes]))


def delete_of(ids: Any) -> PointWrite:
    """A delete takes repeated ids once."""
    return PointWrite(deletes=pc.unique(ids) if len(ids) > 1 else ids)


def check_count(count: int, bound: int, field_name: str, what: str) -> None:
    """Invalid unless there is something, and no more than the bound."""
    if not 1 <= count <= bound:
        raise Invalid.at(field_name, f"must hold 1 to {bound} {what}, not {count}")


def check_no_repeat(ids: Any, place: Place) -> None:
    """Invalid names the first id that comes a second time."""
    if len(ids) < 2 or len(pc.unique(ids)) == len(ids):
        return
    first_at: dict[int | str, int] = {}
    for row, value in enumerate(ids.to_pylist()):
        if value in first_at:
            raise Invalid.at(place(row), f"{value!r} is the id of {place(first_at[value])} too")
        first_at[value] = row


def stored_vectors(vectors: NDArray[np.float32], config: CollectionConfig, place: Place) -> NDArray[Any]:
    """Checked vectors (n, dimension) as a shard stores them: unit length under cosine, in the collection's dtype.

    Those of an import go through the same (`jobs.row_reader.checked_vectors`).
    """
    problem = vector_problem(vectors, config.metric)
    if problem is not None:
        raise Invalid.at(place(problem[0]), problem[1])
    stored = as_searched(vectors, config.metric)
    if config.vector_dtype == "float32":
        return stored
    largest = np.abs(stored).max(axis=1)
    if (largest > FLOAT16_MAX).any():
        raise Invalid.at(place(int(np.argmax(largest > FLOAT16_MAX))), "holds a number too large for float16")
    return stored.astype(np.float16)


def _json_ids(ids: Sequence[int | str], id_type: IdType) -> Any:
    try:
        return id_array(ids, id_type)
    except Invalid as error:  # which calls them ids[3]
        raise invalid_fields(FieldError(_as_points(each.field), each.message) for each in error.errors) from None


def _as_points(field_name: str) -> str:
    return f"points{field_name.removeprefix('ids')}.id" if field_name != "ids" else "points"


def _id_place(row: int) -> str:
    return f"points[{row}].id"


def _vector_place(row: int) -> str:
    return f"points[{row}].vector"


def _attributes_place(row: int) -> str:
    return f"points[{row}].attributes"
