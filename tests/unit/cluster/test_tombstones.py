"""Tombstone files: what is written is read, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from cluster import paths
from cluster.errors import Corrupt, NotFound, Unavailable
from cluster.manifest import TombstonesRef
from cluster.memory_store import MemoryStore
from cluster.segment import checksum_bytes
from cluster.tombstones import encode_tombstones, read_tombstones, write_tombstones
from tests.fakes import FaultyStore


def key_of(ref: TombstonesRef) -> str:
    return paths.tombstones("c", 2, ref.segment_id, ref.lsn, ref.variant)


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def written(store: MemoryStore, *numbers: int) -> TombstonesRef:
    return write_tombstones(store, "c", 2, "s1", 9, rows(*numbers))


def test_written_rows_are_read_sorted() -> None:
    store = MemoryStore()
    given = rows(7, 0, 3)
    ref = write_tombstones(store, "c", 2, "s1", 9, given)
    assert given.tolist() == [7, 0, 3]
    assert ref == TombstonesRef("s1", 9, 3, checksum_bytes(store.get(key_of(ref))), "e2cd2b00af4bb059")
    found = read_tombstones(store, "c", 2, ref, 8)
    assert found.dtype == np.int64
    assert found.tolist() == [0, 3, 7]


def test_rows_written_again_are_the_same_file() -> None:
    """Who works them out again, after a crash or beside another one, names the same object."""
    store = MemoryStore()
    assert written(store, 1, 2) == written(store, 2, 1)


def test_file_that_is_there_in_another_encoding_stays_and_is_named() -> None:
    """Another version of Arrow may write other bytes, and a manifest may name those that are there."""
    store = MemoryStore()
    key = key_of(written(MemoryStore(), 1, 2))
    batch = pa.record_batch([pa.array([1, 2])], names=["row"]).replace_schema_metadata({"format": "1", "by": "other"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    other = bytes(sink.getvalue())
    store.put(key, other)
    ref = written(store, 1, 2)
    assert (ref.checksum, key_of(ref)) == (checksum_bytes(other), key)
    assert store.get(key) == other


def test_other_rows_as_of_the_same_lsn_are_another_file() -> None:
    """A restored generation shares segments with the one before, and has not deleted what that had."""
    store = MemoryStore()
    both, one = written(store, 1, 2), written(store, 1)
    assert key_of(both) != key_of(one)
    assert read_tombstones(store, "c", 2, both, 3).tolist() == [1, 2]
    assert read_tombstones(store, "c", 2, one, 3).tolist() == [1]
    assert [paths.tombstones_lsn(key_of(ref)) for ref in (both, one)] == [9, 9]


def test_other_rows_under_the_same_name_are_corrupt_and_left_alone() -> None:
    store = MemoryStore()
    key = key_of(written(MemoryStore(), 1))
    store.put(key, encode_tombstones(rows(1, 2)))
    with pytest.raises(Corrupt, match=f"^{key}: holds other rows than the 1"):
        written(store, 1)
    assert store.get(key) == encode_tombstones(rows(1, 2))


def test_file_of_an_older_version_is_read_by_its_name() -> None:
    store = MemoryStore()
    data = encode_tombstones(rows(1, 2))
    store.put(paths.tombstones("c", 2, "s1", 9), data)
    ref = TombstonesRef("s1", 9, 2, checksum_bytes(data))
    assert read_tombstones(store, "c", 2, ref, 3).tolist() == [1, 2]


def test_no_rows_are_not_written() -> None:
    store = MemoryStore()
    with pytest.raises(ValueError, match="no deleted rows"):
        written(store)
    assert list(store.objects("collections/")) == []


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_write_through_a_failing_store_is_done_by_the_next(fault: str) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, 1, fault)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        write_tombstones(store, "c", 2, "s1", 9, rows(4, 5))
    assert read_tombstones(inner, "c", 2, written(inner, 4, 5), 6).tolist() == [4, 5]


def test_missing_file_is_not_found() -> None:
    with pytest.raises(NotFound, match="s1-00000000000000000009"):
        read_tombstones(MemoryStore(), "c", 2, TombstonesRef("s1", 9, 1, "xxh3_128:00"), 5)


def test_file_with_any_byte_changed_or_cut_is_corrupt() -> None:
    store = MemoryStore()
    ref = written(store, 0, 3, 7)
    key = key_of(ref)
    data = store.get(key)
    damaged = [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in range(len(data))]
    damaged += [data[:length] for length in range(len(data))] + [data + b"\0"]
    for bad in damaged:
        store.put(key, bad)
        with pytest.raises(Corrupt, match=f"^{key}: the checksum"):
            read_tombstones(store, "c", 2, ref, 8)


def stream_of(batch: pa.RecordBatch, times: int = 1, format_: str | None = "1") -> bytes:
    batch = batch.replace_schema_metadata({"format": format_} if format_ else None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(times):
            writer.write_batch(batch)
    return bytes(sink.getvalue())


ONE = pa.record_batch([pa.array([1, 2])], names=["row"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"\xff\xff\xff\xff" * 20,
        encode_tombstones(rows(1, 2))[:-40],
        encode_tombstones(rows(2, 1)),
        encode_tombstones(rows(1, 1)),
        encode_tombstones(rows()),
        encode_tombstones(rows(-1, 2)),
        encode_tombstones(rows(1, 8)),
        encode_tombstones(rows(1, 2, 3)),
        stream_of(ONE, times=2),
        stream_of(ONE, times=0),
        stream_of(ONE, format_=None),
        stream_of(ONE, format_="2"),
        stream_of(pa.record_batch([pa.array([1, 2])], names=["id"])),
        stream_of(pa.record_batch([pa.array([1, 2], pa.int32())], names=["row"])),
        stream_of(pa.record_batch([pa.array([1, None])], names=["row"])),
    ],
)
def test_file_of_another_shape_is_corrupt_though_its_checksum_fits(data: bytes) -> None:
    store = MemoryStore()
    ref = TombstonesRef("s1", 9, 2, checksum_bytes(data), "0" * 16)
    store.put(key_of(ref), data)
    with pytest.raises(Corrupt, match=f"^{key_of(ref)}: "):
        read_tombstones(store, "c", 2, ref, 8)


def test_reference_to_another_segment_or_lsn_is_another_file() -> None:
    store = MemoryStore()
    ref = written(store, 1)
    for other in (replace(ref, segment_id="s2"), replace(ref, lsn=8), replace(ref, variant="")):
        with pytest.raises(NotFound):
            read_tombstones(store, "c", 2, other, 8)
    with pytest.raises(NotFound):
        read_tombstones(store, "c", 1, ref, 8)
