"""What an import reads: the Parquet files of a path, folder or object-storage URL, cut into units of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.config import IdType
from cluster.errors import Invalid, NotFound, Unavailable
from cluster.object_store import path_of_url
from cluster.segment import RESERVED_COLUMNS

READ_BUFFER_BYTES = 1024 * 1024  # of each column; without it Arrow reads whole row groups, whatever their size
UNIT_BYTES = 64 * 1024 * 1024  # uncompressed bytes of the row groups that one task reads
PROBED_ROWS = 16  # read at a time where a dimension is looked for


@dataclass(frozen=True)
class Columns:
    """Which columns of the files are id, vector and attributes; `attributes=None` takes none, "all" the rest."""

    id: str = "id"
    vector: str = "vector"
    attributes: tuple[str, ...] | str = ()


@dataclass(frozen=True)
class Unit:
    """Some row groups of one file: what one task reads."""

    number: int
    file: str
    row_groups: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Source:
    """What the files of an import hold: their units of work, and the columns as they are to be stored."""

    units: tuple[Unit, ...]
    dimension: int | None
    id_type: IdType
    attributes: dict[str, Any]

    @cached_property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def read_batches(url: str, unit: Unit, rows: int, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """(row group, record batch of at most `rows` rows), in order; Invalid names the row group that cannot be read."""
    parquet: Any = None
    for group in unit.row_groups:
        try:
            parquet = parquet or open_file(url, unit.file)
            for batch in parquet.iter_batches(rows, [group], columns):
                yield group, batch
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            message = f"file {unit.file}, row group {group} cannot be read: {error}"
            if isinstance(error, OSError) and urlsplit(url).scheme not in ("", "file"):
                raise Unavailable(f"source: {message}") from error  # the network, most likely: try again
            raise Invalid.at("source", message) from error


def open_file(url: str, file: str) -> Any:
    """Open one of a source's files for reading Parquet, in memory that does not grow with its row groups."""
    filesystem, _ = _resolve(url)
    return pq.ParquetFile(filesystem.open_input_file(file), pre_buffer=False, buffer_size=READ_BUFFER_BYTES)


def find_source(url: str, columns: Columns) -> Source:
    """List the files, check their schema, cut them into units. Invalid or NotFound name what is wrong."""
    filesystem, path = _resolve(url)
    files = _list_files(filesystem, path, url)
    schema: Any = None
    units: list[Unit] = []
    for file in files:
        metadata = _metadata(filesystem, file)
        file_schema = metadata.schema.to_arrow_schema()
        _check_same(schema, file_schema, file, columns)
        schema = schema or file_schema
        units += _units_of(file, metadata, len(units))
    attributes = _attributes(schema, columns)
    first = next((unit for unit in units if unit.rows), None)
    dimension = _dimension(schema, columns, first, url)
    return Source(tuple(units), dimension, _id_type(schema, columns), attributes)


def _resolve(url: str) -> tuple[Any, str]:
    try:
        if urlsplit(url).scheme in ("", "file"):
            return fs.LocalFileSystem(), str(path_of_url(url))
        filesystem, path = fs.FileSystem.from_uri(url)
    except Invalid as error:
        raise Invalid.at("source", error.errors[0].message) from error
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise Invalid.at("source", f"{url!r} cannot be opened: {error}") from error
    return filesystem, path


def _list_files(filesystem: Any, path: str, url: str) -> list[str]:
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise NotFound(f"source: nothing at {url!r}")
        if info.type == fs.FileType.File:
            return [path]
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise Invalid.at("source", f"{url!r} cannot be listed: {error}") from error
    files = sorted(entry.path for entry in found if entry.path.endswith(".parquet"))
    if not files:
        raise NotFound(f"source: no .parquet file under {url!r}")
    return files


def _metadata(filesystem: Any, file: str) -> Any:
    try:
        return pq.read_metadata(filesystem.open_input_file(file))
    except (pa.ArrowInvalid, OSError) as error:
        raise Invalid.at("source", f"{file} is not a Parquet file: {error}") from error


def _units_of(file: str, metadata: Any, first_number: int) -> list[Unit]:
    units: list[Unit] = []
    groups: list[int] = []
    rows = size = 0
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        groups.append(group)
        rows, size = rows + info.num_rows, size + info.total_byte_size
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            units.append(Unit(first_number + len(units), file, tuple(groups), rows))
            groups, rows, size = [], 0, 0
    return units


def _check_same(schema: Any, file_schema: Any, file: str, columns: Columns) -> None:
    for name in (columns.id, columns.vector):
        if name not in file_schema.names:
            field = "id_column" if name == columns.id else "vector_column"
            raise Invalid.at(field, f"{file} has no column {name!r}; it has: {', '.join(file_schema.names)}")
    if schema is not None and not file_schema.equals(schema):
        raise Invalid.at("source", f"{file} has another schema than the files before it")


def _id_type(schema: Any, columns: Columns) -> IdType:
    dtype = _value_type(schema.field(columns.id).type)
    if pa.types.is_integer(dtype):
        return "int64"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return "string"
    raise Invalid.at("id_column", f"{columns.id!r} holds {dtype}; ids are integers or strings")


def _value_type(dtype: Any) -> Any:
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def _dimension(schema: Any, columns: Columns, first: Unit | None, url: str) -> int | None:
    """Of fixed-size lists from the schema, of others from the first vector; None where there is none."""
    dtype = schema.field(columns.vector).type
    if not _is_list(dtype) or not pa.types.is_floating(dtype.value_type):
        raise Invalid.at("vector_column", f"{columns.vector!r} holds {dtype}, not lists of floating-point numbers")
    if pa.types.is_fixed_size_list(dtype):
        return int(dtype.list_size)
    if first is None:
        return None
    for _, batch in read_batches(url, first, PROBED_ROWS, [columns.vector]):
        found = pc.list_value_length(batch.column(0)).drop_null()
        if len(found):
            return int(found[0].as_py())
    return None


def _is_list(dtype: Any) -> bool:
    return bool(pa.types.is_fixed_size_list(dtype) or pa.types.is_list(dtype) or pa.types.is_large_list(dtype))


def _attributes(schema: Any, columns: Columns) -> dict[str, Any]:
    """Arrow types of the attribute columns, as they are stored: no dictionaries, large strings."""
    names: Sequence[str] = tuple(columns.attributes)
    if columns.attributes == "all":
        names = [name for name in schema.names if name not in (columns.id, columns.vector)]
    elif isinstance(columns.attributes, str):
        raise Invalid.at("attribute_columns", f"must be a list of columns or 'all', not {columns.attributes!r}")
    attributes = {}
    for name in names:
        if name not in schema.names:
            raise Invalid.at("attribute_columns", f"no column {name!r}; there are: {', '.join(schema.names)}")
        if name in RESERVED_COLUMNS:
            raise Invalid.at("attribute_columns", f"{name!r} is a reserved name")
        attributes[name] = _stored_type(_value_type(schema.field(name).type))
    return attributes


def _stored_type(dtype: Any) -> Any:
    if pa.types.is_string(dtype):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary(dtype) else dtype
