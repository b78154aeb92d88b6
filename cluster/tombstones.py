"""Tombstone files: the deleted rows of one segment as of an LSN of its shard. A manifest names them with a checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cluster import paths
from cluster.arrow_rows import stream_of
from cluster.errors import Corrupt
from cluster.object_store import ObjectStore
from cluster.segment import checksum_bytes
from cluster.shard_entry import TombstonesRef

FORMAT = b"1"

RowNumbers = NDArray[np.int64]


def write_tombstones(
    store: ObjectStore, collection: str, shard: int, segment_id: str, lsn: int, rows: RowNumbers
) -> TombstonesRef:
    """Write the deleted rows (n,), n >= 1, in any order, no row twice.

    The file is named by its rows as well: in generations that share a segment other rows of it may be deleted as of
    the same LSN (a restore does not delete what the generation before had deleted). So a file that is there already
    stays, as a manifest may name it, and is returned; Corrupt where it says something else.
    """
    if not len(rows):
        raise ValueError(f"segment {segment_id!r} has no deleted rows to write")
    rows = np.sort(rows)
    variant = f"{xxhash.xxh3_64_intdigest(rows.astype('<i8').tobytes()):016x}"
    key, data = paths.tombstones(collection, shard, segment_id, lsn, variant), encode_tombstones(rows)
    if not store.put_if_absent(key, data):
        data = store.get(key)
        if not np.array_equal(decode_tombstones(data, key), rows):
            raise Corrupt(f"{key}: holds other rows than the {len(rows)} that are deleted")
    return TombstonesRef(segment_id, lsn, len(rows), checksum_bytes(data), variant)


def read_tombstones(store: ObjectStore, collection: str, shard: int, ref: TombstonesRef, count: int) -> RowNumbers:
    """The deleted rows, sorted, of a segment of `count` rows. Corrupt, naming the object, unless it is that file."""
    key = paths.tombstones(collection, shard, ref.segment_id, ref.lsn, ref.variant)
    data = store.get(key)
    if checksum_bytes(data) != ref.checksum:
        raise Corrupt(f"{key}: the checksum does not match the content")
    rows = decode_tombstones(data, key)
    if len(rows) != ref.count or rows[0] < 0 or rows[-1] >= count:
        raise Corrupt(f"{key}: {len(rows)} rows from {rows[0]} to {rows[-1]}, not {ref.count} of {count}")
    return rows


def encode_tombstones(rows: RowNumbers) -> bytes:
    """An Arrow stream of one batch with the column `row`; `rows` (n,) are sorted."""
    batch = pa.record_batch([pa.array(rows, pa.int64())], names=["row"]).replace_schema_metadata({"format": FORMAT})
    return bytes(stream_of(batch))


def decode_tombstones(data: bytes, key: str) -> RowNumbers:
    """At least one row, sorted, none twice; Corrupt, naming the object, where it holds anything else."""
    try:
        reader = pa.ipc.open_stream(data)
        batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Corrupt(f"{key}: not a tombstone file: {error!r}") from error
    format_ = (reader.schema.metadata or {}).get(b"format")
    if format_ != FORMAT:
        raise Corrupt(f"{key}: format {format_!r}, this version reads {FORMAT!r}")
    if len(batches) != 1 or reader.schema.names != ["row"] or reader.schema.types != [pa.int64()]:
        raise Corrupt(f"{key}: {len(batches)} batches of {reader.schema.names}, not one of row numbers")
    return _sorted_rows(batches[0].column(0), key)


def _sorted_rows(column: Any, key: str) -> RowNumbers:
    if not len(column) or column.null_count:
        raise Corrupt(f"{key}: no rows, or nulls")
    rows: RowNumbers = column.to_numpy(zero_copy_only=True)
    if (np.diff(rows) <= 0).any():
        raise Corrupt(f"{key}: its rows are not sorted")
    return rows
