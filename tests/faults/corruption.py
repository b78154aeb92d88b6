"""Stored bytes that change: every kind of damage, the collections it is done to, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.segment_rows import read_description, verified_file
from actors.shard import Shard
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import EaglerayError
from cluster.manifest import SegmentRef
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.segment import SegmentDescription
from cluster.tombstones import read_tombstones
from cluster.wal import Wal
from cluster.write import PointWrite
from tests.fakes import FaultyStore
from tests.faults.shards import ANSWER_S, COLLECTION, OTHER, entry, grown, lead, loaded, log, new_nonce, seal

EVERY_BYTE_MAX = 2_048  # of an object of which no byte is left out
EDGE_BYTES = 64
ZEROED_BYTES = 16
DIMENSION = 8
KINDS = ("flat", "hnsw", "ivf_pq", "names")
Answers = tuple[dict[Any, dict[str, Any]], list[Any]]


# --- damage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What was done to an object, in words, and its bytes after that."""

    name: str
    data: bytes


def every_offset(data: bytes) -> list[int]:
    """Every byte of a small object; of a larger one both ends, and bytes spread evenly over all of it."""
    if len(data) <= EVERY_BYTE_MAX:
        return list(range(len(data)))
    ends = {*range(EDGE_BYTES), *range(len(data) - EDGE_BYTES, len(data))}
    return sorted(ends | set(some_offsets(data, EDGE_BYTES)))


def some_offsets(data: bytes, count: int) -> list[int]:
    """The first byte, the last one, and others at equal distances; at least two."""
    return sorted({round(at) for at in np.linspace(0, len(data) - 1, max(2, count))})


def flipped(data: bytes, offsets: Iterable[int]) -> Iterator[Damage]:
    """At each offset one bit flipped; which one goes round."""
    for at in offsets:
        yield Damage(
            f"bit {at % 8} of byte {at} of {len(data)} flipped", _with(data, at, bytes([data[at] ^ 1 << at % 8]))
        )


def changed(data: bytes, offsets: Sequence[int]) -> Iterator[Damage]:
    """At each offset one bit flipped, all bits set, and a stretch of zeros."""
    yield from flipped(data, offsets)
    for at in offsets:
        if data[at] != 0xFF:
            yield Damage(f"byte {at} of {len(data)} set to 0xFF", _with(data, at, b"\xff"))
        stop = min(len(data), at + ZEROED_BYTES)
        if any(data[at:stop]):
            yield Damage(f"bytes {at} to {stop - 1} of {len(data)} zeroed", _with(data, at, bytes(stop - at)))


def _with(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def resized(data: bytes) -> Iterator[Damage]:
    """Cut at several lengths, and longer by one byte and by itself."""
    size = len(data)
    for length in sorted({0, 1, EDGE_BYTES, size // 2, size - 1} & set(range(size))):
        yield Damage(f"cut to {length} of {size} bytes", data[:length])
    yield Damage(f"a zero appended to {size} bytes", data + b"\0")
    yield Damage(f"its {size} bytes twice", data + data)


def everywhere(key: str, data: bytes) -> Iterator[Damage]:
    """Every byte changed in every way; of a segment's files, which are copied to be read, one bit of every byte."""
    if kind_of(key) in (paths.ROWS, paths.INDEX):
        yield from flipped(data, every_offset(data))
        yield from changed(data, some_offsets(data, 16))
    else:
        yield from changed(data, every_offset(data))
    yield from resized(data)


def sampled(data: bytes, offsets: int) -> list[Damage]:
    """Some of all kinds, for what takes long."""
    return [*changed(data, some_offsets(data, offsets)), *resized(data)]


def kind_of(key: str) -> str:
    """The folder of a manifest, record or tombstone file, the name of a segment's file: its kind."""
    folder, name = key.split("/")[-2:]
    return name if name in paths.SEGMENT_FILES else folder


def assert_refused(key: str, damage: Damage, work: Callable[[], object]) -> None:
    """The work raises an error of ours, which names the object."""
    where = f"{key}: {damage.name}"
    try:
        outcome = work()
    except EaglerayError as error:
        told = str(error)
    except BaseException as error:
        error.add_note(where)
        raise
    else:
        raise AssertionError(f"{where}: taken as sound, with {outcome!r}")
    assert key in told, f"{where}: the error does not name it: {told}"


# --- collections ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A shard with two segments, tombstones and a tail in a store of its own; what a sound replica of it answers."""

    store: MemoryStore
    answers: Answers


def example(kind: str, folder: Path) -> Example:
    """One of `KINDS`. The flat one has a second shard, and beside it another collection like it."""
    store = MemoryStore()
    if kind == "names":
        log(store).create(CollectionConfig(DIMENSION, "l2", "string", index=IndexConfig("flat")))
        write_names(store, folder)
    elif kind == "flat":
        config = CollectionConfig(DIMENSION, "l2", shards=2, index=IndexConfig("flat"))
        for number, collection in enumerate((COLLECTION, OTHER)):
            log(store, collection).create(config)
            for shard in range(2):
                grown(store, folder, collection, shard, base=100.0 * number + 10.0 * shard)
    else:
        log(store).create(CollectionConfig(DIMENSION, "l2", index=IndexConfig(kind)))  # type: ignore[arg-type]
        grown(store, folder)
    return Example(store, served(loaded(store, folder)))


def write_names(store: ObjectStore, folder: Path) -> None:
    """Points with text as ids and with attributes, of which some are null."""
    log(store).declare_attributes({"word": "large_string", "size": "int64"})
    primary = lead(loaded(store, folder))

    def write(request: PointWrite) -> None:
        primary.write(request).result(ANSWER_S)

    write(named(range(20), "first"))
    seal(store, folder)
    write(named(range(10, 30), "second"))
    write(PointWrite(deletes=pa.array(["name 1", "name 12"])))
    seal(store, folder)
    write(named(range(8, 12), "third"))
    write(PointWrite(deletes=pa.array(["name 5", "name 25"])))
    primary.stop()


def named(numbers: Iterable[int], word: str) -> PointWrite:
    wanted = list(numbers)
    vectors = np.repeat(np.array(wanted, np.float32)[:, None], DIMENSION, axis=1)
    columns = {
        "id": pa.array([f"name {number}" for number in wanted], pa.large_string()),
        "vector": vectors_array(vectors),
        "word": pa.array([f"{word} {number}" if number % 3 else None for number in wanted], pa.large_string()),
        "size": pa.array(wanted, pa.int64()),
    }
    return PointWrite(upserts=pa.record_batch(list(columns.values()), names=list(columns)))


def served(shard: Shard) -> Answers:
    """Every point that an exact search finds, with all columns, which a fetch must confirm; and the nearest ten ids."""
    held = shard.newest()
    assert held is not None, shard.status().error
    view, origin = held.view, np.zeros((1, DIMENSION), np.float32)
    columns = ("id", "vector", *view.attributes)
    groups = (SearchGroup(0, 1, 10_000, SearchParams(exact=True), columns), SearchGroup(0, 1, 10, SearchParams()))
    everything, nearest = shard.search(ShardSearch(view.generation, origin, groups))
    assert isinstance(everything, Hits), everything
    assert isinstance(nearest, Hits), nearest
    rows = everything.columns.to_pylist()
    points = {row["id"]: row for row in rows}
    assert everything.ids.to_pylist() == list(points)
    assert len(rows) == shard.status().points, "a point is there twice"
    found, table = shard.fetch(view.generation, everything.ids, columns)
    assert found.all()
    assert table.to_pylist() == rows
    return points, nearest.ids.to_pylist()


def started(store: ObjectStore, folder: Path, damaged: str = "") -> Answers:
    """What a replica answers that starts now; nothing is cached, or only what is not read from the damaged object."""
    cached = bool(damaged) and kind_of(damaged) not in (paths.ROWS, paths.INDEX)
    return served(loaded(store, folder / ("cached" if cached else new_nonce())))


# --- what is read -----------------------------------------------------------------------------------------------


class ReadStore(FaultyStore):
    """Notes which objects were read."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.read: set[str] = set()

    def _call(self, method: str, *args: Any) -> Any:
        answer = super()._call(method, *args)
        if method in ("get", "download"):
            self.read.add(args[0])
        return answer


def read_by(store: MemoryStore, work: Callable[[ObjectStore], object]) -> list[str]:
    """The objects that are there before the work, and that it reads."""
    before = {info.key for info in store.objects("collections/")}
    reads = ReadStore(store)
    work(reads)
    return sorted(reads.read & before)


def readers(store: MemoryStore, folder: Path) -> dict[str, Callable[[], object]]:
    """For each object that a load of shard 0 needs: its key, and the shortest way to read and verify it.

    Files of segments are fetched, not found in a cache.
    """
    manifests, shard = log(store), entry(store)
    newest = manifests.newest_live()
    found: dict[str, Callable[[], object]] = {
        paths.manifest(COLLECTION, newest.version): lambda: manifests.read(newest.version)
    }
    wal = Wal(store, COLLECTION, 0, 0)
    for lsn in range(shard.applied_lsn + 1, wal.last_listed() + 1):
        found[paths.wal_record(COLLECTION, 0, lsn)] = lambda lsn=lsn: wal.read(lsn)  # type: ignore[misc]
    for ref in shard.tombstones:
        count = next(segment.count for segment in shard.segments if segment.segment_id == ref.segment_id)
        key = paths.tombstones(COLLECTION, 0, ref.segment_id, ref.lsn, ref.variant)
        found[key] = lambda ref=ref, count=count: read_tombstones(store, COLLECTION, 0, ref, count)  # type: ignore[misc]
    for ref in shard.segments:
        described = read_description(store, COLLECTION, ref)

        def describe(ref: SegmentRef = ref) -> object:
            return read_description(store, COLLECTION, ref)

        found[paths.segment_file(COLLECTION, ref.segment_id, paths.DESCRIPTION)] = describe
        for name in described.files:

            def fetch(name: str = name, described: SegmentDescription = described) -> object:
                return verified_file(store, COLLECTION, described, name, folder / "fetched")

            found[paths.segment_file(COLLECTION, ref.segment_id, name)] = fetch
    return found
