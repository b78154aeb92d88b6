"""One small shard under writes, and what a fresh replica of it holds. A point's vector says which write it is from."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.primary import Primary
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Limits, Upkeep
from cluster.errors import Unavailable
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import Wal, WalRecord
from cluster.write import PointWrite
from tests.fakes import PAUSED_S_MAX, FaultyStore

COLLECTION, OTHER = "words", "others"
CONFIG = CollectionConfig(8, "l2", index=IndexConfig("flat"))
ANSWER_S = 30.0
RANDOM = re.compile("[0-9a-f]{32}")  # nonces, and checksums
Points = dict[int, float]  # id -> the number that every component of its vector is


def new_nonce() -> str:
    return uuid.uuid4().hex


def log(store: ObjectStore, collection: str = COLLECTION) -> ManifestLog:
    return ManifestLog(store, collection, new_nonce)


def entry(store: ObjectStore, collection: str = COLLECTION, shard: int = 0) -> ShardEntry:
    """What the newest manifest says of a shard."""
    return log(store, collection).newest_live().shards[shard]


def upsert(points: Mapping[int, float]) -> PointWrite:
    ids = pa.array(list(points), pa.int64())
    vectors = np.repeat(np.array(list(points.values()), np.float32)[:, None], CONFIG.dimension, axis=1)
    return PointWrite(upserts=pa.record_batch([ids, vectors_array(vectors)], names=["id", "vector"]))


def delete(ids: Iterable[int]) -> PointWrite:
    return PointWrite(deletes=pa.array(list(ids), pa.int64()))


def loaded(store: ObjectStore, cache_dir: Path, collection: str = COLLECTION, shard: int = 0) -> Shard:
    """A replica that has just started."""
    replica = Shard(store, collection, shard, cache_dir, new_nonce)
    replica.load()
    return replica


def lead(shard: Shard, limits: Limits | None = None) -> Primary:
    return Primary.claim(shard, limits or Limits(), Upkeep())


def write(primary: Primary, points: Mapping[int, float] | None = None, gone: Iterable[int] | None = None) -> int:
    """One acknowledged write; its LSN."""
    request = upsert(points) if points is not None else delete(gone or ())
    return primary.write(request).result(ANSWER_S).lsn


def seal(store: ObjectStore, cache_dir: Path, collection: str = COLLECTION, shard: int = 0) -> Manifest | None:
    return seal_tail(store, collection, shard, cache_dir, new_nonce)


def merge(store: ObjectStore, cache_dir: Path) -> Manifest | None:
    """All segments become one."""
    names = [ref.segment_id for ref in entry(store).segments]
    return merge_segments(store, COLLECTION, 0, names, cache_dir, new_nonce)


def contents(shard: Shard) -> Points:
    """All points that an exact search finds; a fetch of their ids must say the same."""
    held = shard.newest()
    assert held is not None, shard.status().error
    generation = held.view.generation
    group = SearchGroup(0, 1, 10_000, SearchParams(exact=True), ("vector",))
    (hits,) = shard.search(ShardSearch(generation, np.zeros((1, CONFIG.dimension), np.float32), (group,)))
    assert isinstance(hits, Hits), hits
    ids = hits.ids.to_pylist()
    vectors = hits.columns["vector"].to_pylist() if ids else []
    points = {point_id: vector[0] for point_id, vector in zip(ids, vectors, strict=True)}
    assert len(points) == len(ids) == shard.status().points, "a point is there twice"
    assert all(len(set(vector)) == 1 for vector in vectors), "a vector nobody sent"
    found, table = shard.fetch(generation, pa.array(sorted(points), pa.int64()), ["id", "vector"])
    assert found.all()
    if points:
        fetched = zip(table["id"].to_pylist(), table["vector"].to_pylist(), strict=True)
        assert {point_id: vector[0] for point_id, vector in fetched} == points
    return points


def held(store: ObjectStore, cache_dir: Path) -> Points:
    """What a replica holds that starts now."""
    return contents(loaded(store, cache_dir))


def records(store: ObjectStore, collection: str = COLLECTION, shard: int = 0) -> list[WalRecord]:
    return list(Wal(store, collection, shard, 0).read_after(0))


def assert_one_history(store: ObjectStore) -> None:
    """Every LSN has one record, and is of one writer: who writes has claimed, with an epoch above all before."""
    wal = records(store)
    assert [record.lsn for record in wal] == list(range(1, len(wal) + 1))
    assert Wal(store, COLLECTION, 0, 0).last_listed() == len(wal)
    assert len({record.nonce for record in wal}) == len(wal)
    epoch, higher = 0, False
    for record in wal:
        if record.kind == "claim":
            assert record.epoch >= epoch, f"LSN {record.lsn} goes back to epoch {record.epoch}"
            higher = record.epoch > epoch
        else:
            assert higher, f"LSN {record.lsn} was written by one of two that claimed epoch {record.epoch}"
            assert record.epoch == epoch, f"LSN {record.lsn} is of epoch {record.epoch}, which did not claim"
        epoch = record.epoch


def anonymous(store: ObjectStore) -> tuple[str, ...]:
    """All that a store has, but for what differs each time the same is done: random names, checksums, times.

    Every object's key and, but of JSON, its size; what every manifest says of shard 0; of every record what it is.
    """
    manifests = [log(store).read(version) for version in sorted(log(store).versions())]
    told = [str((one.version, one.generation, one.state, one.shards[0])) for one in manifests]
    for one in records(store):
        upserts = one.upserts.to_pydict() if one.upserts is not None else None
        deletes = one.deletes.to_pylist() if one.deletes is not None else None
        told.append(str((one.lsn, one.epoch, one.kind, upserts, deletes)))
    told += [f"{info.key} {0 if info.key.endswith('.json') else info.size_bytes}" for info in store.objects("")]
    numbers: dict[str, str] = {}
    named = [RANDOM.sub(lambda found: numbers.setdefault(found[0], f"#{len(numbers)}"), part) for part in told]
    return tuple(sorted(named))


def copied(store: MemoryStore) -> MemoryStore:
    """Another store with the same objects."""
    copy = MemoryStore()
    for info in store.objects("collections/"):
        copy.put(info.key, store.get(info.key))
    return copy


def grown(
    store: ObjectStore, cache_dir: Path, collection: str = COLLECTION, shard: int = 0, base: float = 0.0
) -> Points:
    """Write to a shard until it has two segments with tombstones, and a tail that replaces and deletes points of both.

    Returns its points.
    """
    replica = loaded(store, cache_dir, collection, shard)
    primary = lead(replica)
    write(primary, dict.fromkeys(range(20), base + 1))
    seal(store, cache_dir, collection, shard)
    write(primary, dict.fromkeys(range(10, 30), base + 2))
    write(primary, gone=range(3))
    seal(store, cache_dir, collection, shard)
    write(primary, dict.fromkeys(range(8, 12), base + 3))
    write(primary, gone=[5, 25])
    write(primary, {40: base + 4, 25: base + 4})
    write(primary, gone=[26])
    primary.stop()
    points = dict.fromkeys(range(3, 10), base + 1) | dict.fromkeys(range(10, 30), base + 2)
    points |= dict.fromkeys(range(8, 12), base + 3) | {40: base + 4, 25: base + 4}
    return {number: value for number, value in points.items() if number not in (5, 26)}


class GateStore(FaultyStore):
    """Holds the next put of a key that has `text` in it, once `shut`: before it takes effect, or before its answer.

    `stalled` says that it is held; `open` lets it go on, or fail.
    """

    def __init__(self, inner: ObjectStore, text: str = "/wal/") -> None:
        super().__init__(inner)
        self._text = text
        self._holds = self._after = self._fails = False

    def shut(self, after: bool = False) -> None:
        self._holds, self._after = True, after
        self.stalled.clear()
        self.go_on.clear()

    def open(self, fails: bool = False) -> None:
        self._fails = fails
        self.go_on.set()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if not self._holds or self._text not in key:
            return super().put_if_absent(key, data)
        self._holds = False
        if self._after:
            answer = super().put_if_absent(key, data)
        self.stalled.set()
        if not self.go_on.wait(PAUSED_S_MAX) or self._fails:
            raise Unavailable(f"{key}: the store failed after a long time")
        return answer if self._after else super().put_if_absent(key, data)
