"""The WAL: records bit for bit, one writer for each LSN, and stores that fail at any call."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from cluster import paths
from cluster.arrow_rows import vector_type, vectors_array, vectors_view
from cluster.errors import Corrupt, EaglerayError, Fenced, NotFound, Unavailable
from cluster.ids import id_array
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.wal import APPEND_TRIES, BODY_AT, BUSY_CLAIM_TRIES, READ_WINDOW, RecordKind, Wal, WalRecord, lsn_of
from tests.fakes import Fault, FaultyStore

SHARD = 3
FAULTS: tuple[Fault, ...] = ("fail", "lose_answer", "die")


def nonce_of(number: int) -> str:
    return f"{number:032x}"


def points(ids: list[Any], dimension: int = 4, dtype: str = "float32") -> pa.RecordBatch:
    vectors = np.arange(len(ids) * dimension).reshape(-1, dimension).astype(dtype)
    columns = [
        id_array(ids, "string" if isinstance(ids[0], str) else "int64"),
        vectors_array(vectors),
        pa.array([None if number % 2 else f"word {number}" for number in range(len(ids))], pa.string()),
    ]
    return pa.record_batch(columns, names=["id", "vector", "word"])


def record_of(lsn: int, epoch: int = 1, writer: int = 0) -> WalRecord:
    """A small write that nobody else writes."""
    return WalRecord(lsn, epoch, "write", nonce_of(writer * 1_000_000 + lsn), points([lsn, -lsn]), pa.array([7, 8]))


def key_of(lsn: int) -> str:
    return paths.wal_record("c", SHARD, lsn)


def wal_of(store: ObjectStore, pauses: list[float] | None = None) -> Wal:
    return Wal(store, "c", SHARD, 0, (pauses if pauses is not None else []).append)


def log_with(records: int, epoch: int = 1, store: MemoryStore | None = None) -> MemoryStore:
    store = store or MemoryStore()
    for lsn in range(1, records + 1):
        store.put(key_of(lsn), record_of(lsn, epoch).encode(SHARD))
    return store


def lsns(records: Iterator[WalRecord]) -> list[int]:
    return [record.lsn for record in records]


def resealed(data: bytes, **changes: Any) -> bytes:
    """The object with header fields (or the body) changed and a checksum that fits."""
    names = ("magic", "version", "kind", "shard", "zero", "lsn", "epoch", "nonce", "upserts", "deletes")
    fields = dict(zip(names, struct.unpack_from("<8sIIIIQQ16sQQ", data), strict=True))
    body = changes.pop("body", data[88:])
    header = struct.pack("<8sIIIIQQ16sQQ", *(fields | changes).values())
    return bytes(header + xxhash.xxh3_128_digest(header + body) + body)


# --- records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("upserts", "deletes"),
    [([1, 2, 3], [-5, 2**62]), (["a", "", "日本語"], ["löwe"]), ([1], []), ([], [5]), ([], [])],
)
def test_record_survives_encoding(upserts: list[Any], deletes: list[Any], dtype: str) -> None:
    batch = points(upserts, dtype=dtype) if upserts else None
    ids = id_array(deletes, "string" if isinstance(deletes[0], str) else "int64") if deletes else None
    record = WalRecord(2**63, 2**40, "write", nonce_of(2**127), batch, ids)
    decoded = WalRecord.decode(record.encode(SHARD), "k", SHARD, 2**63)
    assert (decoded.lsn, decoded.epoch, decoded.kind, decoded.nonce) == (2**63, 2**40, "write", nonce_of(2**127))
    for found, given in ((decoded.upserts, batch), (decoded.deletes, ids)):
        assert (found is None) == (given is None)
        assert found is None or found.equals(given)
    if batch is not None:
        assert decoded.upserts.schema.field("vector").type == vector_type(4, dtype)


def test_record_layout_is_pinned() -> None:
    data = WalRecord(5, 6, "claim", "00112233445566778899aabbccddeeff").encode(7)
    assert data[:72] == (
        b"EAGLEWAL"
        + (1).to_bytes(4, "little")
        + (2).to_bytes(4, "little")
        + (7).to_bytes(4, "little")
        + bytes(4)
        + (5).to_bytes(8, "little")
        + (6).to_bytes(8, "little")
        + bytes.fromhex("00112233445566778899aabbccddeeff")
        + bytes(16)
    )
    assert data[72:] == xxhash.xxh3_128_digest(data[:72])
    write = record_of(1).encode(SHARD)
    assert write[12] == 1
    upserts, deletes = struct.unpack_from("<QQ", write, 56)
    assert len(write) == BODY_AT + upserts + deletes
    assert pa.ipc.open_stream(write[88 : 88 + upserts]).read_all().column_names == ["id", "vector", "word"]
    assert pa.ipc.open_stream(write[88 + upserts :]).read_all().to_pydict() == {"id": [7, 8]}


def test_deleted_ids_do_not_carry_vectors() -> None:
    deletes = pa.array(range(1_000))
    data = WalRecord(1, 1, "write", nonce_of(1), points([1], 1_000), deletes).encode(0)
    assert len(data) < 1_000 * 4 + deletes.nbytes + 2_000


def test_part_of_a_batch_is_written_alone_and_no_rows_are_none() -> None:
    batch = points(list(range(1_000)))
    record = WalRecord(1, 1, "write", nonce_of(1), batch.slice(10, 2), pa.array([1] * 1_000).slice(3, 1))
    data = record.encode(0)
    assert len(data) < 2_000
    decoded = WalRecord.decode(data, "k", 0, 1)
    assert decoded.upserts.equals(batch.slice(10, 2))
    assert decoded.deletes.to_pylist() == [1]
    empty = WalRecord(1, 1, "write", nonce_of(1), batch.slice(0, 0), pa.array([], pa.int64()))
    decoded = WalRecord.decode(empty.encode(0), "k", 0, 1)
    assert (decoded.upserts, decoded.deletes) == (None, None)


def test_decoded_arrays_are_aligned_views_of_the_bytes() -> None:
    batch = points(list(range(99)), 3)
    data = WalRecord(1, 1, "write", nonce_of(1), batch, pa.array([5])).encode(0)
    start = pa.py_buffer(data).address
    decoded = WalRecord.decode(data, "k", 0, 1)
    vectors = vectors_view(decoded.upserts.column("vector"))
    for view in (vectors, decoded.upserts.column("id").to_numpy(), decoded.deletes.to_numpy()):
        address = view.__array_interface__["data"][0]
        assert start <= address < start + len(data)
        assert (address - start) % 8 == 0
    assert (vectors == vectors_view(batch.column("vector"))).all()


def test_lsn_of_a_record_is_read_without_the_rest() -> None:
    data = record_of(2**40).encode(SHARD)
    assert lsn_of(data) == lsn_of(data[:BODY_AT]) == 2**40
    with pytest.raises(Corrupt, match="87 bytes are no WAL record"):
        lsn_of(data[: BODY_AT - 1])


@pytest.mark.parametrize("nonce", ["", "00", "x" * 32, nonce_of(1) + "00"])
def test_nonce_that_is_not_32_hex_digits_is_refused(nonce: str) -> None:
    with pytest.raises(ValueError, match="hex"):
        WalRecord(1, 1, "claim", nonce).encode(0)


@pytest.mark.parametrize("kind", ["write", "claim"])
def test_record_with_any_one_byte_changed_is_corrupt(kind: RecordKind) -> None:
    record = record_of(9) if kind == "write" else WalRecord(9, 2, "claim", nonce_of(9))
    data = record.encode(SHARD)
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF, data[position] or 0x10):
            damaged = data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]
            with pytest.raises(Corrupt, match=f"^{key_of(9)}: "):
                WalRecord.decode(damaged, key_of(9), SHARD, 9)


def test_record_cut_anywhere_or_with_bytes_appended_is_corrupt() -> None:
    data = record_of(9).encode(SHARD)
    for damaged in (*(data[:length] for length in range(len(data))), data + b"\0", data + data, data + bytes(88)):
        with pytest.raises(Corrupt, match=f"^{key_of(9)}: "):
            WalRecord.decode(damaged, key_of(9), SHARD, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"EAGLEWAX"}, "not a WAL record"),
        ({"version": 2}, "WAL format 2, this version reads 1"),
        ({"kind": 4}, "WAL record of kind 4, this version knows 1, 2, 3"),
        ({"kind": 0}, "WAL record of kind 0"),
        ({"shard": 4}, "holds LSN 9 of shard 4"),
        ({"lsn": 8}, "holds LSN 8 of shard 3"),
        ({"upserts": 0, "deletes": 2**64 - 1}, "its header says"),
        ({"upserts": 2**64 - 1}, "its header says"),
    ],
)
def test_record_that_is_another_one_is_corrupt_though_its_checksum_fits(changes: Any, message: str) -> None:
    data = record_of(9).encode(SHARD)
    assert resealed(data) == data
    with pytest.raises(Corrupt, match=f"^{key_of(9)}: .*{message}"):
        WalRecord.decode(resealed(data, **changes), key_of(9), SHARD, 9)


def stream_of(*batches: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense",
        b"\xff\xff\xff\xff" * 30,
        stream_of(points([1]), points([2])),
        stream_of(points([1]))[:-100],
        stream_of(pa.record_batch([pa.array([1])], names=["id"])),
        stream_of(pa.record_batch([pa.array([1]), pa.array([1])], names=["vector", "id"])),
    ],
)
def test_body_that_is_not_one_batch_of_points_is_corrupt_though_its_checksum_fits(body: bytes) -> None:
    data = resealed(record_of(9).encode(SHARD), body=body, upserts=len(body), deletes=0)
    with pytest.raises(Corrupt, match=f"^{key_of(9)}: "):
        WalRecord.decode(data, key_of(9), SHARD, 9)


# --- appending --------------------------------------------------------------------------------------------------


class ScriptedStore(MemoryStore):
    """The n-th put-if-absent runs the n-th step, then goes on; a step may raise, or put the object itself."""

    def __init__(self, *steps: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._steps = list(steps)
        self.puts = 0

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.puts += 1
        if self._steps:
            self._steps.pop(0)(key, data)
        return super().put_if_absent(key, data)

    def write_and_fail(self, key: str, data: bytes) -> None:
        self.put(key, data)
        raise Unavailable("the answer was lost")


def refuse(key: str, data: bytes) -> None:
    raise Unavailable("no network")


def test_appended_record_is_read_back() -> None:
    store = MemoryStore()
    wal = wal_of(store)
    data = wal.append(record_of(1))
    assert store.get("collections/c/shards/0003/wal/00000000000000000001.arrow") == data
    found = wal.read(1)
    assert found is not None
    assert found.upserts.equals(points([1, -1]))
    assert found.deletes.to_pylist() == [7, 8]
    assert wal.read(2) is None


def test_append_where_another_writer_was_is_fenced_and_changes_nothing() -> None:
    store = MemoryStore()
    theirs = wal_of(store).append(record_of(1, epoch=6, writer=1))
    pauses: list[float] = []
    with pytest.raises(Fenced, match="shard 3 of 'c': LSN 1 is another writer's write of epoch 6"):
        wal_of(store, pauses).append(record_of(1, epoch=5))
    assert store.get(key_of(1)) == theirs
    assert pauses == []


def test_append_of_the_same_points_under_another_nonce_is_fenced() -> None:
    store = MemoryStore()
    wal_of(store).append(WalRecord(1, 1, "claim", nonce_of(1)))
    with pytest.raises(Fenced, match="another writer's claim of epoch 1"):
        wal_of(store).append(WalRecord(1, 1, "claim", nonce_of(2)))


def test_append_that_collides_with_itself_succeeds() -> None:
    store = MemoryStore()
    data = wal_of(store).append(record_of(1))
    assert wal_of(store).append(record_of(1)) == data


@pytest.mark.parametrize("failures", range(APPEND_TRIES))
@pytest.mark.parametrize("written", [False, True])
def test_append_is_tried_again_while_the_store_fails(failures: int, written: bool) -> None:
    store = ScriptedStore()
    store._steps = [store.write_and_fail if written else refuse] * failures
    pauses: list[float] = []
    data = wal_of(store, pauses).append(record_of(1))
    assert store.get(key_of(1)) == data
    assert len(pauses) == failures
    assert pauses == sorted(pauses)
    assert store.puts == failures + 1


def test_append_gives_up_after_a_few_tries_and_nobody_knows() -> None:
    store = ScriptedStore(*[refuse] * 10)
    pauses: list[float] = []
    with pytest.raises(Unavailable, match=f"^{key_of(1)}: nobody knows whether it was written: no network"):
        wal_of(store, pauses).append(record_of(1))
    assert (store.puts, len(pauses)) == (APPEND_TRIES, APPEND_TRIES - 1)


def test_append_overtaken_between_two_tries_is_fenced() -> None:
    def overtaken(key: str, data: bytes) -> None:
        store.put(key, record_of(1, epoch=9, writer=1).encode(SHARD))

    store = ScriptedStore(refuse, overtaken)
    with pytest.raises(Fenced, match="epoch 9"):
        wal_of(store).append(record_of(1))


def test_append_onto_a_damaged_object_is_corrupt() -> None:
    store = MemoryStore()
    store.put(key_of(1), b"torn")
    with pytest.raises(Corrupt, match=f"^{key_of(1)}: "):
        wal_of(store).append(record_of(1))
    assert store.get(key_of(1)) == b"torn"


def test_of_many_writers_of_one_lsn_exactly_one_appends() -> None:
    store, start, outcomes = MemoryStore(), threading.Barrier(8), []

    def append(writer: int) -> None:
        start.wait(timeout=10)
        try:
            outcomes.append(wal_of(store).append(record_of(1, writer=writer)))
        except Fenced:
            outcomes.append(b"")

    threads = [threading.Thread(target=append, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert outcomes.count(b"") == 7
    assert [data for data in outcomes if data] == [store.get(key_of(1))]


# --- reading ----------------------------------------------------------------------------------------------------


class CountingStore(MemoryStore):
    """Notes which objects were read, by which threads, and how many at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.readers: set[str] = set()
        self._reading = 0
        self.most_at_once = 0
        self._count_lock = threading.Lock()

    def get(self, key: str) -> bytes:
        with self._count_lock:
            self.read.append(key)
            self.readers.add(threading.current_thread().name)
            self._reading += 1
            self.most_at_once = max(self.most_at_once, self._reading)
        try:
            return super().get(key)
        finally:
            with self._count_lock:
                self._reading -= 1


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("wal-read")]


def assert_no_reading_threads() -> None:
    for thread in reading_threads():
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 16, 17, 40])
def test_records_are_read_in_order_up_to_the_end(count: int) -> None:
    wal = wal_of(log_with(count))
    for after in range(count + 2):
        assert lsns(wal.read_after(after)) == list(range(after + 1, count + 1))
    assert_no_reading_threads()


@pytest.mark.parametrize(("after", "until"), [(0, 0), (0, 1), (0, 2), (0, 7), (3, 30), (3, 29), (5, 2), (28, 99)])
def test_records_are_read_no_further_than_asked(after: int, until: int) -> None:
    store = log_with(30, store=CountingStore())
    assert lsns(wal_of(store).read_after(after, until)) == list(range(after + 1, min(until, 30) + 1))
    assert isinstance(store, CountingStore)
    assert max(store.read, default="") <= key_of(until)


@pytest.mark.parametrize(("count", "reads"), [(0, 1), (1, 2)])
def test_reading_the_end_of_the_log_takes_no_thread(count: int, reads: int) -> None:
    """Followers poll the log: what there usually is costs a read each, and one to see that there is no more."""
    store = log_with(count, store=CountingStore())
    assert isinstance(store, CountingStore)
    assert lsns(wal_of(store).read_after(0)) == list(range(1, count + 1))
    assert len(store.read) == reads
    assert store.readers == {threading.current_thread().name}


@pytest.mark.parametrize("count", range(2, 12))
def test_no_more_is_read_in_vain_than_was_found(count: int) -> None:
    store = log_with(count, store=CountingStore())
    assert isinstance(store, CountingStore)
    list(wal_of(store).read_after(0))
    assert len(store.read) <= 2 * count


def test_long_log_is_read_by_several_at_a_time_and_not_far_ahead() -> None:
    gate = threading.Barrier(READ_WINDOW)

    class Gated(CountingStore):
        def get(self, key: str) -> bytes:
            if key_of(61) <= key <= key_of(60 + READ_WINDOW):
                gate.wait(timeout=10)  # passes only when so many reads are under way
            return super().get(key)

    store = log_with(100, store=Gated())
    assert isinstance(store, Gated)
    for record in wal_of(store).read_after(0):
        assert max(store.read) <= key_of(record.lsn + READ_WINDOW)
    assert store.most_at_once <= READ_WINDOW
    assert record.lsn == 100


def test_damaged_record_raises_where_it_stands() -> None:
    store = log_with(30)
    store.put(key_of(20), store.get(key_of(20))[:-1])
    records = wal_of(store).read_after(0)
    assert [next(records).lsn for _ in range(19)] == list(range(1, 20))
    with pytest.raises(Corrupt, match=f"^{key_of(20)}: ") as caught:
        next(records)
    assert_no_reading_threads()  # also while somebody keeps the error, and its frames
    assert caught.tb is not None


@pytest.mark.parametrize("other", [19, 21])
def test_record_under_another_number_is_corrupt(other: int) -> None:
    store = log_with(30)
    store.put(key_of(20), store.get(key_of(other)))
    with pytest.raises(Corrupt, match=f"^{key_of(20)}: holds LSN {other} of shard 3"):
        list(wal_of(store).read_after(0))


def test_reading_stops_at_the_first_lsn_that_does_not_exist() -> None:
    store = log_with(30)
    store.delete(key_of(20))
    assert lsns(wal_of(store).read_after(0)) == list(range(1, 20))


def test_store_that_fails_while_the_log_is_read_raises() -> None:
    inner = log_with(8)
    for at in range(1, 10):
        with pytest.raises(Unavailable):
            list(wal_of(FaultyStore(inner, at, "die")).read_after(0))
    assert_no_reading_threads()


@pytest.mark.parametrize("taken", [1, 2, 3, 10])
def test_reading_that_is_given_up_ends_its_threads(taken: int) -> None:
    records = wal_of(log_with(60)).read_after(0)
    assert [next(records).lsn for _ in range(taken)] == list(range(1, taken + 1))
    del records
    assert_no_reading_threads()


# --- the end, and taking over -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [*range(20), 63, 64, 65, 100])
def test_end_is_found_from_any_lsn_before_it(count: int) -> None:
    wal = wal_of(log_with(count, epoch=4))
    for after in range(count):
        assert wal.end(after, 1) == (count, 4)
    assert wal.end(count, 9) == (count, 9)


def test_end_of_a_long_log_takes_few_reads() -> None:
    store = log_with(1_000, store=CountingStore())
    assert isinstance(store, CountingStore)
    assert wal_of(store).end(0, 0) == (1_000, 1)
    assert len(store.read) <= 22


def test_end_of_another_shard_is_another_one() -> None:
    store = log_with(5)
    assert Wal(store, "c", 4, 0).end(0, 0) == (0, 0)
    assert Wal(store, "d", SHARD, 0).end(0, 0) == (0, 0)


def test_end_whose_record_is_damaged_is_corrupt() -> None:
    store = log_with(5)
    store.put(key_of(5), b"torn")
    with pytest.raises(Corrupt, match=f"^{key_of(5)}: "):
        wal_of(store).end(2, 1)


def test_claim_takes_the_next_lsn_and_epoch_and_fences_the_writer_before() -> None:
    store = log_with(2, epoch=5)
    wal = wal_of(store)
    claim = wal.claim(2, 5, nonce_of(99))
    assert (claim.lsn, claim.epoch, claim.kind, claim.nonce) == (3, 6, "claim", nonce_of(99))
    assert wal.end(0, 0) == (3, 6)
    with pytest.raises(Fenced, match="LSN 3 is another writer's claim of epoch 6"):
        wal.append(record_of(3, epoch=5))
    wal.append(record_of(4, epoch=6))
    with pytest.raises(Fenced, match="LSN 4 is another writer's write of epoch 6"):
        wal.claim(3, 6, nonce_of(98))


def test_fence_claims_the_end_and_leaves_an_empty_log_alone() -> None:
    nonces = iter(map(nonce_of, range(100, 200)))
    store = MemoryStore()
    assert wal_of(store).fence(0, 0, lambda: next(nonces)) == (0, 0)
    assert list(store.objects("collections/")) == []
    log_with(5, epoch=2, store=store)
    assert wal_of(store).fence(0, 0, lambda: next(nonces)) == (6, 3)
    assert wal_of(store).fence(6, 3, lambda: next(nonces)) == (7, 4)


def test_fence_goes_on_while_the_writer_is_faster_but_not_for_ever() -> None:
    store = ScriptedStore()
    log_with(1, store=store)

    def overtaken(key: str, data: bytes) -> None:
        lsn = int(key[-26:-6])
        store.put(key, record_of(lsn, epoch=1, writer=1).encode(SHARD))

    nonces = map(nonce_of, count(100))
    store._steps = [overtaken] * 3
    assert wal_of(store).fence(0, 0, lambda: next(nonces)) == (5, 2)
    store._steps = [overtaken] * 2 * BUSY_CLAIM_TRIES
    with pytest.raises(Unavailable, match=f"others wrote to the log {BUSY_CLAIM_TRIES} times"):
        wal_of(store).fence(0, 0, lambda: next(nonces))


# --- stores that fail at any call -------------------------------------------------------------------------------


class Writer:
    """A primary's use of its log: catch up, claim, then write; it keeps what was acknowledged, and stops at an error.

    What an append that raised Unavailable left is unknown, and kept apart.
    """

    def __init__(self, store: ObjectStore, number: int) -> None:
        self._wal = wal_of(store)
        self._number = number
        self.acknowledged: dict[int, bytes] = {}
        self.unknown: dict[int, bytes] = {}
        self.error: EaglerayError | None = None

    def run(self, writes: int) -> Writer:
        lsn, epoch = 0, 0
        try:
            for record in self._wal.read_after(0):
                lsn, epoch = record.lsn, record.epoch
            claim = self._wal.claim(lsn, epoch, nonce_of(self._number))
            for step in range(1, writes + 1):
                self._append(record_of(claim.lsn + step, claim.epoch, self._number))
        except (Unavailable, Fenced) as error:
            self.error = error
        return self

    def _append(self, record: WalRecord) -> None:
        try:
            self.acknowledged[record.lsn] = self._wal.append(record)
        except Unavailable:
            self.unknown[record.lsn] = record.encode(SHARD)
            raise


@pytest.mark.parametrize("fault", FAULTS)
def test_store_that_fails_at_any_call_loses_no_acknowledged_record_and_invents_none(fault: Fault) -> None:
    counted = FaultyStore(log_with(4))
    assert Writer(counted, 1).run(5).error is None
    for at in range(1, counted.calls + 1):  # a read ahead may be one call more or less
        inner = log_with(4)
        first = Writer(FaultyStore(inner, at, fault), 1).run(5)
        second = Writer(inner, 2).run(3)
        assert second.error is None, f"call {at}: the next primary could not take over"
        before = {lsn: record_of(lsn).encode(SHARD) for lsn in range(1, 5)}
        known = before | first.acknowledged | second.acknowledged
        kinds = []
        for record in wal_of(inner).read_after(0):
            kinds.append(record.kind)
            if record.kind == "write":
                assert inner.get(key_of(record.lsn)) in (known.get(record.lsn), first.unknown.get(record.lsn))
        assert [inner.get(key_of(lsn)) for lsn in known] == list(known.values()), f"call {at}"
        assert kinds.count("claim") <= 2
        if fault != "die" and first.error is not None:
            assert not first.acknowledged, f"call {at}: one failure of the store is no reason to stop writing"


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failure_of_the_store_while_a_record_is_appended_is_not_seen(fault: Fault) -> None:
    """Short of death: a lost answer is recognised, a failed put is put again."""
    inner = MemoryStore()
    store = FaultyStore(inner, 1, fault)
    if fault == "die":
        with pytest.raises(Unavailable, match="nobody knows"):
            wal_of(store).append(record_of(1))
        with pytest.raises(NotFound):
            inner.get(key_of(1))
    else:
        assert wal_of(store).append(record_of(1)) == inner.get(key_of(1))


@pytest.mark.parametrize("fault", FAULTS)
def test_fence_through_a_failing_store_is_complete_or_repeated(fault: Fault) -> None:
    counted = FaultyStore(log_with(9, epoch=3))
    assert wal_of(counted).fence(0, 0, lambda: nonce_of(500)) == (10, 4)
    for at in range(1, counted.calls + 1):
        inner = log_with(9, epoch=3)
        try:
            found = wal_of(FaultyStore(inner, at, fault)).fence(0, 0, lambda: nonce_of(500))
            assert found == (10, 4)
        except Unavailable:
            found = wal_of(inner).fence(0, 0, lambda: nonce_of(501))
            assert found in ((10, 4), (11, 5))
        assert wal_of(inner).end(0, 0) == found
        with pytest.raises(Fenced):
            wal_of(inner).append(record_of(10, epoch=3))
