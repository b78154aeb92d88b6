"""A collection under writes, without replicas: WAL records appended by hand, and what the store then says is live."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.segment_rows import deleted_rows, open_rows
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig
from cluster.ids import id_array
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.wal import Wal, WalRecord
from tests.unit.actors.points import in_row_order, manifest_log, publish, random_points, random_vectors

COLLECTION = "words"
Live = dict[int | str, tuple[list[float], dict[str, Any]]]  # id -> (vector, attributes that are not null)


@dataclass
class Written:
    """One shard of a collection; `live` is what it must hold. `epoch` is that of the next records."""

    store: ObjectStore
    config: CollectionConfig
    cache_dir: Path
    shard: int = 0
    epoch: int = 1
    lsn: int = 0
    live: Live = field(default_factory=dict)

    @property
    def log(self) -> ManifestLog:
        return manifest_log(self.store, COLLECTION)

    @property
    def wal(self) -> Wal:
        return Wal(self.store, COLLECTION, self.shard, 0)

    @property
    def newest(self) -> Manifest:
        return self.log.newest_live()

    @property
    def segments(self) -> list[str]:
        return [ref.segment_id for ref in self.newest.shards[self.shard].segments]

    def create(self) -> None:
        self.log.create(self.config)

    def vectors(self, count: int, seed: int) -> Any:
        return vectors_array(random_vectors(self.config, count, seed).astype(self.config.vector_dtype))

    def write(self, upserts: list[Any] = [], deletes: list[Any] = [], seed: int = 0, **attributes: Any) -> None:  # noqa: B006
        """Append one record; attributes are Arrow arrays."""
        batch = None
        if upserts:
            vectors = self.vectors(len(upserts), seed + 1000 * (self.lsn + 1))
            batch = pa.record_batch({"id": id_array(upserts, self.config.id_type), "vector": vectors, **attributes})
            for row in batch.to_pylist():
                given = {name: row[name] for name in attributes if row[name] is not None}
                self.live[row["id"]] = (list(row["vector"]), given)
        for point_id in deletes:
            self.live.pop(point_id, None)
        gone = id_array(deletes, self.config.id_type) if deletes else None
        self._append(WalRecord(self.lsn + 1, self.epoch, "write", uuid.uuid4().hex, batch, gone))

    def claim(self) -> None:
        self.epoch += 1
        self._append(WalRecord(self.lsn + 1, self.epoch, "claim", uuid.uuid4().hex))

    def _append(self, record: WalRecord) -> None:
        self.wal.append(record)
        self.lsn = record.lsn

    def import_points(self, count: int, seed: int = 0, segments: int = 1) -> None:
        """The next generation, of shard 0 alone: random points with the attribute `name`."""
        points = in_row_order(random_points(self.config, count, seed))
        pieces = np.array_split(np.arange(count), segments)
        refs = tuple(publish(self.store, COLLECTION, self.config, points.take(rows)) for rows in pieces)
        log, base = self.log, self.log.newest()
        ends = log.wal_ends(base, self.config.shards)
        entry = replace(ends[0], segments=refs)
        log.commit_generation(base, self.config, (entry, *ends[1:]))
        names = [{"name": name} for name in points.names]
        stored = points.vectors.tolist()
        self.live = dict(zip(points.ids.to_pylist(), zip(stored, names, strict=True), strict=True))

    def held(self, store: ObjectStore | None = None) -> Live:
        """What the newest manifest and the WAL after it say is live; an id that is live twice fails."""
        store = store or self.store
        manifest = self.newest
        entry = manifest.shards[self.shard]
        found: Live = {}
        for ref in entry.segments:
            rows = open_rows(store, COLLECTION, ref, self.cache_dir)
            deleted = set(deleted_rows(store, COLLECTION, entry, ref).tolist())
            table = rows.take(np.arange(ref.count), rows.schema.names).to_pylist()
            for number, row in enumerate(table):
                if number not in deleted:
                    assert row["id"] not in found, f"{row['id']} is live twice"
                    found[row["id"]] = _point(row)
        assert len(found) == entry.points
        for record in self.wal.read_after(entry.applied_lsn):
            for point_id in record.deletes.to_pylist() if record.deletes is not None else ():
                found.pop(point_id, None)
            for row in record.upserts.to_pylist() if record.upserts is not None else ():
                found[row["id"]] = _point(row)
        return found


def _point(row: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    attributes = {k: v for k, v in row.items() if k not in ("id", "vector", "id_hash") and v is not None}
    return list(row["vector"]), attributes
