"""The first phase of an import: read a unit, check every row, and split the rows over partitions by hash of id.

A partition is one shard's contiguous range of hashes; it becomes one segment. Its pieces wait in object storage,
one per unit, with the row each point came from, so that a later complaint can name it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig
from cluster.errors import Invalid
from cluster.free_memory import give_back_memory
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.object_store import open_store
from cluster.routing import slots_of_hashes
from cluster.segment import rows_schema
from cluster.vectors import as_searched, vector_problem
from jobs.import_source import Columns, Unit, read_batches

READ_BYTES = 8 * 1024 * 1024  # of vectors decoded at a time, which takes about ten times as much
READ_BYTES_MIN = 256 * 1024
READ_SHARE = 64  # of a job's memory
SOURCE_ROW_GROUP, SOURCE_ROW = "source_row_group", "source_row"
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class UnitTask:
    """Everything a task needs to read one unit."""

    data: str
    collection: str
    job_id: str
    source_url: str
    unit: Unit
    columns: Columns
    attributes: dict[str, Any]
    config: CollectionConfig
    partitions: int
    read_bytes: int = READ_BYTES


def read_bytes(memory_bytes: int) -> int:
    """Bytes of vectors to decode at a time, of a job that has so much memory."""
    return min(READ_BYTES, max(READ_BYTES_MIN, memory_bytes // READ_SHARE))


def piece_schema(config: CollectionConfig, attributes: dict[str, Any]) -> Any:
    """Rows as a segment stores them, with where each came from."""
    schema = rows_schema(config, attributes)
    return schema.append(pa.field(SOURCE_ROW_GROUP, pa.int32())).append(pa.field(SOURCE_ROW, pa.int64()))


def partition_unit(task: UnitTask) -> Iterator[dict[str, Any]]:
    """Read, check and split one unit. Yields {"rows": n} as it reads, and at last {"pieces": {partition: rows}}."""
    store = open_store(task.data)
    schema = piece_schema(task.config, task.attributes)
    pieces: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="eagleray-import-") as folder, ExitStack() as files:
        writers: dict[int, Any] = {}
        for batch in _checked_batches(task, schema):
            slots = slots_of_hashes(batch.column("id_hash").to_numpy(), task.partitions)
            for slot in np.unique(slots).tolist():
                if slot not in writers:
                    sink = files.enter_context(pa.OSFile(f"{folder}/{slot}", "wb"))
                    writers[slot] = files.enter_context(pa.ipc.new_file(sink, schema))
                part = batch.take(pa.array(np.flatnonzero(slots == slot)))
                writers[slot].write_batch(part)
                pieces[slot] = pieces.get(slot, 0) + part.num_rows
            yield {"rows": batch.num_rows}
        files.close()
        for slot in pieces:
            key = paths.staging_piece(task.collection, task.job_id, slot, task.unit.number)
            store.upload(Path(folder) / str(slot), key)
    give_back_memory()
    yield {"pieces": pieces}


def _checked_batches(task: UnitTask, schema: Any) -> Iterator[Any]:
    names = [task.columns.id, task.columns.vector, *task.attributes]
    size = max(1, task.read_bytes // (4 * task.config.dimension))
    rows_of = dict.fromkeys(task.unit.row_groups, 0)
    for group, batch in read_batches(task.source_url, task.unit, size, names):
        yield _checked(batch, task, schema, RowPlace(task.unit.file, group, rows_of[group]))
        rows_of[group] += batch.num_rows


@dataclass(frozen=True)
class RowPlace:
    """Where a batch begins: for messages that name a row."""

    file: str
    row_group: int
    first_row: int

    def bad(self, field: str, row: int, message: str) -> Invalid:
        return Invalid.at(field, f"{describe_place(self.file, self.row_group, self.first_row + row)}: {message}")


def describe_place(file: str, row_group: int, row: int) -> str:
    return f"file {file}, row group {row_group}, row {row}"


def _checked(batch: Any, task: UnitTask, schema: Any, place: RowPlace) -> Any:
    ids = _checked_ids(batch.column(task.columns.id), task, place)
    vectors = checked_vectors(batch.column(task.columns.vector), task.config, task.columns.vector, place)
    rows = batch.num_rows
    arrays = {
        "id": ids,
        "vector": vectors_array(vectors),
        "id_hash": pa.array(hash_ids(ids)),
        **{name: _valid(batch.column(name).cast(dtype), name, place) for name, dtype in task.attributes.items()},
        SOURCE_ROW_GROUP: pa.array(np.full(rows, place.row_group, np.int32)),
        SOURCE_ROW: pa.array(np.arange(place.first_row, place.first_row + rows)),
    }
    return pa.record_batch([arrays[name] for name in schema.names], schema=schema)


def _checked_ids(column: Any, task: UnitTask, place: RowPlace) -> Any:
    if column.null_count:
        raise place.bad(task.columns.id, _first(column.is_null()), "the id is null")
    try:
        ids = column.cast(ID_ARROW_TYPE[task.config.id_type])
    except pa.ArrowInvalid as error:
        row = next(row for row in range(len(column)) if not _is_int64(column[row].as_py()))
        raise place.bad(task.columns.id, row, f"the id is not an int64: {error}") from error
    return _valid(ids, task.columns.id, place)


def _valid(column: Any, name: str, place: RowPlace) -> Any:
    """The column, each value what its type says: not every writer of Parquet keeps its strings UTF-8."""
    if _problem(column) is not None:
        problems = (_problem(column.take(pa.array([row]))) for row in range(len(column)))
        row, problem = next((found for found in enumerate(problems) if found[1] is not None), (0, _problem(column)))
        raise place.bad(name, row, f"not a valid {column.type}: {problem}")
    return column


def _problem(column: Any) -> str | None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def checked_vectors(column: Any, config: CollectionConfig, name: str, place: RowPlace) -> NDArray[Any]:
    """Vectors (n, dimension) in the stored dtype, unit length under cosine; Invalid names the first bad row."""
    if column.null_count:
        raise place.bad(name, _first(column.is_null()), "the vector is null")
    _check_lengths(column, config.dimension, name, place)
    values = column.flatten()
    if values.null_count:
        row = _first(values.is_null()) // config.dimension
        raise place.bad(name, row, "the vector holds a null")
    with np.errstate(over="ignore"):  # a float64 too large becomes infinity, and is refused as that
        vectors = values.to_numpy().reshape(-1, config.dimension).astype(np.float32)
    problem = vector_problem(vectors, config.metric)
    if problem is not None:
        raise place.bad(name, problem[0], f"the vector {problem[1]}")
    return _as_stored(as_searched(vectors, config.metric), config, name, place)


def _check_lengths(column: Any, dimension: int, name: str, place: RowPlace) -> None:
    if pa.types.is_fixed_size_list(column.type):
        wrong = column.type.list_size != dimension
        if wrong and len(column):
            raise place.bad(name, 0, f"{column.type.list_size} numbers, the collection's dimension is {dimension}")
        return
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if (lengths != dimension).any():
        row = int(np.argmax(lengths != dimension))
        raise place.bad(name, row, f"{lengths[row]} numbers, the collection's dimension is {dimension}")


def _as_stored(vectors: NDArray[np.float32], config: CollectionConfig, name: str, place: RowPlace) -> NDArray[Any]:
    if config.vector_dtype == "float32":
        return vectors
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    if (largest > FLOAT16_MAX).any():
        raise place.bad(name, int(np.argmax(largest > FLOAT16_MAX)), "a number is too large for float16")
    return vectors.astype(np.float16)


def _first(mask: Any) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))
