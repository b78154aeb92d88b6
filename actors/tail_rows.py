"""The final effect of a run of log records: which ids they wrote, and the rows that are live after the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.row_order import conformed, order_of_rows
from cluster.arrow_rows import gather
from cluster.config import CollectionConfig
from cluster.entry_log import EntryLog
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.segment import ROW_COLUMNS
from cluster.wal import WalRecord

SPILLED = "records.arrow"


@dataclass(frozen=True, eq=False)
class TailRows:
    """What some records wrote; `whole` where there were no more. `ids` and `hashes` (n,) are all ids, each once.

    `batches` are the records' upserts, memory-mapped; `which` and `rows` (m,) are the batch and the row there of the
    points that are live, `live` (m,) their positions in `ids`. Both are ordered by (hash of id, id).
    """

    records: int
    whole: bool
    ids: Any
    hashes: NDArray[np.uint64]
    batches: tuple[Any, ...]
    which: NDArray[np.int64]
    rows: NDArray[np.int64]
    live: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.live)

    @property
    def attributes(self) -> dict[str, Any]:
        """Name -> Arrow type, as the last record has it."""
        return {
            field.name: _plain(field.type)
            for batch in self.batches
            for field in batch.schema
            if field.name not in ROW_COLUMNS
        }

    def parts(self, points_max: int) -> list[TailRows]:
        """The live rows as runs of about equal size, each of less than twice `points_max`; none without any."""
        runs = np.array_split(np.arange(self.count), max(1, self.count // points_max)) if self.count else []
        return [replace(self, which=self.which[run], rows=self.rows[run], live=self.live[run]) for run in runs]

    def blocks(self, schema: Any, step: int) -> Iterator[Any]:
        """Record batches of `step` live rows, the last one of fewer."""
        stored = pa.schema([field for field in schema if field.name != "id_hash"])
        batches = [conformed(batch, stored) for batch in self.batches]
        for start in range(0, self.count, step):
            part = slice(start, start + step)
            found = gather(batches, self.which[part], self.rows[part], stored.names)
            columns = {name: found.column(name) for name in stored.names}
            columns["id_hash"] = pa.array(self.hashes[self.live[part]])
            yield pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _plain(dtype: Any) -> Any:
    """Dictionaries differ from record to record: a segment holds their values."""
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def read_tail(
    log: EntryLog, config: CollectionConfig, folder: Path, points_max: int, bytes_max: int
) -> TailRows | None:
    """What an entry lacks, up to the record that makes it `points_max` ids or `bytes_max` bytes.

    None where no record writes anything; the log has been read on all the same. Upserts are put aside in `folder` as
    they come: in memory are the ids with about 40 bytes for each, and the records that `Wal.read_after` reads ahead.
    """
    spill = _Spill(folder / SPILLED, config)
    points, size_bytes, whole = 0, 0, True
    with spill:
        for record in log.records():
            points += spill.add(record)
            size_bytes += record.upserts.nbytes if record.upserts is not None else 0
            if points >= points_max or size_bytes >= bytes_max:
                whole = False
                break
    return spill.tail(whole) if points else None


class _Spill:
    """Upserts of records in one local file, an Arrow stream for each; their ids, and those of deletes, in memory."""

    def __init__(self, path: Path, config: CollectionConfig) -> None:
        self._path = path
        self._id_type = ID_ARROW_TYPE[config.id_type]
        self._ids: list[Any] = []
        self._rows: list[NDArray[np.int64]] = []  # of each id in its batch; -1: it was deleted
        self._batch_of: list[int] = []
        self._ends: list[int] = []  # of the streams in the file
        self._records = 0

    def __enter__(self) -> _Spill:
        self._sink = pa.OSFile(str(self._path), "wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._sink.close()

    def add(self, record: WalRecord) -> int:
        """Returns the number of ids."""
        added = 0
        self._records += 1
        if record.upserts is not None:
            with pa.ipc.new_stream(self._sink, record.upserts.schema) as writer:
                writer.write_batch(record.upserts)
            self._ends.append(self._sink.tell())
            added += self._add_ids(record.upserts.column("id"), np.arange(len(record.upserts)))
        if record.deletes is not None:
            added += self._add_ids(record.deletes, np.full(len(record.deletes), -1, dtype=np.int64))
        return added

    def _add_ids(self, ids: Any, rows: NDArray[np.int64]) -> int:
        everything = pa.array(np.arange(len(ids)))
        self._ids.append(ids.cast(self._id_type).take(everything))  # a copy: the record's bytes are let go
        self._rows.append(rows)
        self._batch_of.append(len(self._ends) - 1)
        return len(ids)

    def tail(self, whole: bool) -> TailRows:
        ids = pa.concat_arrays(self._ids)
        rows = np.concatenate(self._rows)
        which = np.repeat(np.array(self._batch_of, dtype=np.int64), [len(part) for part in self._rows])
        hashes = hash_ids(ids)
        order, same = order_of_rows(hashes, lambda positions: ids.take(pa.array(positions)))
        last = order[~np.append(same, False)]  # of each id: positions of one id are in the order of the log
        live = np.flatnonzero(rows[last] >= 0)
        kept = last[live]
        named = ids.take(pa.array(last))
        return TailRows(self._records, whole, named, hashes[last], self._batches(), which[kept], rows[kept], live)

    def _batches(self) -> tuple[Any, ...]:
        if not self._ends:
            return ()
        mapped = pa.memory_map(str(self._path)).read_buffer()
        starts = [0, *self._ends[:-1]]
        streams = (mapped.slice(start, end - start) for start, end in zip(starts, self._ends, strict=True))
        return tuple(pa.ipc.open_stream(stream).read_next_batch() for stream in streams)


def column_types(known: Mapping[str, Any], declared: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The types of a new segment's attributes: those of the segments there are, else as declared, else as written."""
    return {**written, **declared, **known}
