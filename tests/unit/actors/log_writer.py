"""The process that writes to a shard's WAL, for the tests of those that follow it, and what a view then holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from actors.segment_upkeep import seal_tail
from actors.shard_view import ShardView
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import id_array
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import Wal, WalRecord
from cluster.write import PointWrite
from tests.unit.actors.batches import CONFIG, record, upsert, vectors_of
from tests.unit.actors.points import Points, in_row_order, manifest_log, publish

Contents = dict[int, float]  # id -> where the point lies


@dataclass
class LogWriter:
    """Shard 0 of `words`, which it creates. `live` is what the log holds; `put` and `claim` return what they wrote."""

    store: ObjectStore
    epoch: int = 1
    lsn: int = 0
    live: Contents = field(default_factory=dict)

    def __post_init__(self) -> None:
        manifest_log(self.store, "words").create(CONFIG)

    def put(self, write: PointWrite) -> WalRecord:
        """The next record."""
        self.lsn += 1
        written = record(self.lsn, write, self.epoch)
        Wal(self.store, "words", 0, 0).append(written)
        rows = write.upserts.to_pylist() if write.upserts is not None else ()
        self.live |= {row["id"]: row["vector"][0] for row in rows}
        for point_id in write.deletes.to_pylist() if write.deletes is not None else ():
            self.live.pop(point_id, None)
        return written

    def put_points(self, *ids: int) -> list[WalRecord]:
        """A record for each point."""
        return [self.put(upsert(point_id)) for point_id in ids]

    def push(self, write: PointWrite) -> bytes:
        """The bytes of the next record, as a primary pushes them."""
        return self.store.get(self.key(self.put(write).lsn))

    def claim(self) -> WalRecord:
        self.epoch, self.lsn = self.epoch + 1, self.lsn + 1
        return Wal(self.store, "words", 0, 0).claim(self.lsn - 1, self.epoch - 1, f"{self.lsn:032x}")

    def remove(self, lsn: int) -> bytes:
        """Take a record out of the store; returns its bytes."""
        data = self.store.get(self.key(lsn))
        self.store.delete(self.key(lsn))
        return data

    def key(self, lsn: int) -> str:
        return paths.wal_record("words", 0, lsn)

    def seal(self, cache_dir: Path) -> Manifest:
        """The next version of the newest generation: what the log holds is a segment."""
        manifest = seal_tail(self.store, "words", 0, cache_dir, lambda: "sealed")
        assert manifest is not None
        return manifest

    def import_points(self, *ids: int, config: CollectionConfig = CONFIG) -> Manifest:
        """The next generation holds these points in place of all that were written so far."""
        points = in_row_order(Points(id_array(ids, "int64"), vectors_of(ids)))
        built = CollectionConfig(config.dimension, config.metric, index=IndexConfig("flat"))
        log = manifest_log(self.store, "words")
        base = log.newest()
        ends = log.wal_ends(base, 1)
        refs = (publish(self.store, "words", built, points),)
        self.live = {point_id: float(point_id) for point_id in ids}
        return log.commit_generation(base, config, (replace(ends[0], segments=refs),))


def contents(view: ShardView) -> Contents:
    """Every live point that an exact search of a view finds, and a fetch too."""
    group = SearchGroup(0, 1, 10_000, SearchParams(exact=True), ("vector",))
    (hits,) = view.search(ShardSearch(view.generation, vectors_of([0.0]), (group,)))
    assert isinstance(hits, Hits), hits
    ids = hits.ids.to_pylist()
    vectors = hits.columns["vector"].to_pylist() if ids else []
    found = {point_id: vector[0] for point_id, vector in zip(ids, vectors, strict=True)}
    assert len(found) == len(ids) == view.points, "a point is there twice"
    there, table = view.fetch(id_array(ids, "int64"), ["id", "vector"])
    assert there.all()
    assert not ids or table["id"].to_pylist() == ids
    return found
