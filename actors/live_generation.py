"""One generation of a shard that takes writes: applies WAL records and publishes a view after each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.segment_loader import LoadedSegment
from actors.shard_view import ShardView
from actors.tail import Tail
from cluster.errors import Corrupt
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.manifest import Manifest
from cluster.row_selection import RowSelection
from cluster.wal import WalRecord

VERSIONS_KEPT = 32
REPLAYED_TOGETHER = 256  # records that are replayed at a time, and
REPLAYED_BYTES = 16 * 1024 * 1024  # of their points and deleted ids
SELF_TEST_ROWS = 32


@dataclass(frozen=True)
class Existed:
    """Which ids of a record's upserts and deletes, both (n,) bool, were live points before it."""

    upserts: NDArray[np.bool_]
    deletes: NDArray[np.bool_]


class LiveGeneration:
    """Segments with their tombstones, and a tail. One thread at a time applies; `view` is replaced, never changed.

    `versions` are the manifests that it stands for: its own, and older ones of the same generation, whose segments it
    has in another form.
    """

    def __init__(
        self,
        manifest: Manifest,
        segments: tuple[LoadedSegment, ...],
        selections: Mapping[str, RowSelection],
        applied_lsn: int,
        epoch: int,
    ) -> None:
        self.applied_lsn = applied_lsn  # of the manifest: what segments and tombstone files hold
        self.log_set = manifest.log_set
        self.routing = manifest.routing
        self.epoch = epoch  # of the last record
        self.versions: tuple[int, ...] = (manifest.version,)
        self.records = 0  # in the tail
        self._tail = Tail(manifest.config)
        declared = {name: pa.type_for_alias(text) for name, text in manifest.attributes.items()}
        self.view = ShardView(
            manifest.version,
            manifest.generation,
            manifest.config,
            segments,
            dict(selections),
            self._tail.view(),
            applied_lsn,
            declared,
        )

    def declare(self, version: int, attributes: Mapping[str, str]) -> None:
        """Be a later version that names the same files, and more attributes: name -> Arrow type as text."""
        declared = {name: pa.type_for_alias(text) for name, text in attributes.items()}
        self.view = replace(self.view, version=version, declared=declared)
        self.stand_for((version,))

    def stand_for(self, versions: tuple[int, ...]) -> None:
        """Stand for these manifest versions, too."""
        self.versions = tuple(sorted({*self.versions, *versions})[-VERSIONS_KEPT:])

    def takes_records_of(self, other: LiveGeneration) -> bool:
        """Whether the next record of `other` can be applied here as well."""
        return self._taken == other._taken

    @property
    def _taken(self) -> tuple[Any, ...]:
        """What tells which record is the next one, and of which form its points are."""
        config = self.view.config
        return self.log_set, self.view.lsn, config.dimension, config.metric, config.id_type, config.vector_dtype

    def apply(self, record: WalRecord) -> Existed:
        """Apply the next record. A record that the manifest's files hold already changes nothing."""
        if record.lsn <= self.view.lsn:
            return NOTHING
        if record.lsn != self.view.lsn + 1:
            raise RuntimeError(f"record {record.lsn} does not follow record {self.view.lsn}")
        self.epoch = record.epoch
        return self._take([record], record.lsn)

    def replay(self, records: Iterable[WalRecord]) -> None:
        """Apply the next records as `apply` does, many at a time: each segment is asked once for all of their ids.

        Where reading them fails this stands at one of the records before, and can be replayed on from there.
        """
        for together in _groups(records):
            coming = [record for record in together if record.lsn > self.view.lsn]
            for lsn, record in enumerate(coming, self.view.lsn + 1):
                if record.lsn != lsn:
                    raise RuntimeError(f"record {record.lsn} does not follow record {lsn - 1}")
            if coming:
                self.epoch = coming[-1].epoch
                self._take(coming, coming[-1].lsn)

    def cross(self, record: WalRecord) -> None:
        """Apply a record of an earlier log set, whose LSNs are those of several logs. None may come twice."""
        self._take([record], self.view.lsn)

    def arrive(self, start: int, epoch: int) -> None:
        """Everything of the earlier log sets was applied: the own log begins at this LSN, after records of `epoch`."""
        self.epoch = epoch
        self.view = replace(self.view, lsn=start)

    def _take(self, records: Sequence[WalRecord], lsn: int) -> Existed:
        """Apply records, and stand at `lsn` after them. What is returned is of the first, where there is one."""
        written = [(record, ids) for record in records if (ids := _ids_of(record)) is not None]
        selections, existed = dict(self.view.selections), NOTHING
        if written:
            self.records += len(written)
            existed = self._write(written, selections)
        self.view = replace(self.view, lsn=lsn, selections=selections, tail=self._tail.view())
        return existed

    def check(self) -> None:
        """The self-test of what was replayed: the tail finds its points, and none is in a segment as well."""
        tail = self.view.tail
        if tail is None or not tail.points:
            return
        rows = tail.selection.rows()
        ids = tail.ids(rows[rows < tail.count])
        for segment in self.view.segments:
            twice = self.view.live_rows(segment, ids) >= 0
            if twice.any():
                position = int(np.argmax(twice))
                raise Corrupt(f"{segment.description.segment_id}: still has {ids[position]}, which was written since")
        some = ids.slice(0, SELF_TEST_ROWS)
        if (tail.rows_of_ids(some) < 0).any():
            raise Corrupt(f"LSN {self.view.lsn}: the tail does not find its own points")

    def _write(self, written: Sequence[tuple[WalRecord, Any]], selections: dict[str, RowSelection]) -> Existed:
        """Every id's row so far goes, wherever it is; the upserts come to the end of the tail."""
        id_type = ID_ARROW_TYPE[self.view.config.id_type]  # a record may have its ids as another type of text
        together = [ids if ids.type == id_type else ids.cast(id_type) for _, ids in written]
        ids = pa.concat_arrays(together) if len(together) > 1 else together[0]
        hashes, values = hash_ids(ids), ids.to_pylist()
        existed = np.zeros(len(ids), dtype=bool)
        for segment in self.view.segments:
            rows = segment.rows.rows_of_ids(ids, hashes)
            here = rows >= 0
            if here.any():
                name = segment.description.segment_id
                before = selections.get(name) or RowSelection.everything(segment.description.count)
                existed[here] |= before.holds(rows[here])
                selections[name] = before.without(rows[here])
        start = 0
        for record, its_ids in written:
            stop = start + len(its_ids)
            existed[start:stop] |= self._tail.remove(values[start:stop])
            if record.upserts is not None and len(record.upserts):
                upserted = start + len(record.upserts)
                self._tail.append(record.upserts, values[start:upserted], hashes[start:upserted])
            start = stop
        first = written[0][0].upserts
        upserts, stop = 0 if first is None else len(first), len(written[0][1])
        return Existed(existed[:upserts], existed[upserts:stop])


NOTHING = Existed(np.zeros(0, bool), np.zeros(0, bool))


def _ids_of(record: WalRecord) -> Any:
    """The ids of a record's upserts, then of its deletes; None where it has none."""
    parts = [record.upserts.column("id")] if record.upserts is not None else []
    parts += [record.deletes] if record.deletes is not None else []
    return pa.concat_arrays(parts) if parts else None


def _groups(records: Iterable[WalRecord]) -> Iterator[list[WalRecord]]:
    """The records in their order, as many at a time as may be replayed together."""
    together: list[WalRecord] = []
    size_bytes = 0
    for record in records:
        together.append(record)
        size_bytes += sum(part.nbytes for part in (record.upserts, record.deletes) if part is not None)
        if len(together) == REPLAYED_TOGETHER or size_bytes >= REPLAYED_BYTES:
            yield together
            together, size_bytes = [], 0
    if together:
        yield together
