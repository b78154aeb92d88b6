"""The write-ahead log of one shard: numbered records in object storage, each put if absent, dense from its first LSN.

A log is one of a log set (`shard_entry.LogSet`), and begins behind all LSNs of the set before. A record of kind "end"
is the last one for ever: what was written since is in the logs of the next set.

A record is a fixed header and two Arrow IPC streams, the upserts and the deleted ids. They are two streams because one
with a column that tells them apart would carry a whole vector of nulls for every deleted id. The checksum covers every
other byte of the object and is verified before Arrow sees any of it.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import xxhash

from cluster import paths
from cluster.arrow_rows import stream_of
from cluster.errors import Corrupt, Fenced, NotFound, Unavailable
from cluster.object_store import ObjectStore

MAGIC = b"EAGLEWAL"
FORMAT = 1
RecordKind = Literal["write", "claim", "end"]
KINDS: dict[int, RecordKind] = {1: "write", 2: "claim", 3: "end"}
KIND_NUMBERS = {kind: number for number, kind in KINDS.items()}
# magic, format, kind, shard, collection, LSN, epoch, nonce, bytes of the upserts, bytes of the deletes; then the
# checksum. The collection is 32 bits of its name's hash, 0 where the record does not tell. The streams are aligned to
# 8 bytes, so that numbers are read where they lie.
HEADER = struct.Struct("<8sIIIIQQ16sQQ")
LSN_FIELD = 5  # of the header
CHECKSUM_BYTES = 16
BODY_AT = HEADER.size + CHECKSUM_BYTES
CLAIM_BYTES = BODY_AT  # of an end, too; a write has a body
READ_WINDOW = 16  # records that are read at one time
READ_TRIES = 3  # without a pause: a remote store has waited already; thousands must succeed for one recovery
APPEND_TRIES = 3
APPEND_PAUSE_S = 0.1  # before the second try; twice that before the third
CLAIM_TRIES = 10
BUSY_CLAIM_TRIES = 1_000


@dataclass(frozen=True, eq=False)
class WalRecord:
    """One group commit ("write"), a new primary's first mark ("claim"), or the mark that ends the log ("end").

    `nonce` is 32 hex digits, of this record alone. `upserts` is an Arrow record batch: id, vector, attributes; None
    where there are none. `deletes` is an Arrow array of ids, None where there are none. No id is in both, or twice.
    """

    lsn: int
    epoch: int
    kind: RecordKind
    nonce: str
    upserts: Any = None
    deletes: Any = None

    def encode(self, shard: int, collection: str = "") -> bytes:
        upserts = stream_of(self.upserts) if self.upserts is not None and len(self.upserts) else b""
        deletes = b""
        if self.deletes is not None and len(self.deletes):
            deletes = stream_of(pa.record_batch([self.deletes], names=["id"]))
        nonce = bytes.fromhex(self.nonce)
        if len(nonce) != 16:
            raise ValueError(f"a nonce has 32 hex digits, not {self.nonce!r}")
        numbers = (FORMAT, KIND_NUMBERS[self.kind], shard, _tag(collection), self.lsn, self.epoch)
        header = HEADER.pack(MAGIC, *numbers, nonce, len(upserts), len(deletes))
        return b"".join((header, _checksum(header, upserts, deletes), upserts, deletes))

    @classmethod
    def decode(cls, data: bytes, key: str, shard: int, lsn: int, collection: str = "") -> WalRecord:
        """Parse the object of that shard and LSN, and collection where both tell; its arrays are views of `data`.

        Whatever is wrong with the bytes is Corrupt, naming the object.
        """
        try:
            return _decode(data, shard, lsn, _tag(collection))
        except Corrupt as error:
            raise Corrupt(f"{key}: {error}") from error


def lsn_of(data: bytes) -> int:
    """The LSN that a record says it has, without verifying anything else; Corrupt where there is none."""
    if len(data) < BODY_AT:
        raise Corrupt(f"{len(data)} bytes are no WAL record")
    return int(HEADER.unpack_from(data)[LSN_FIELD])


def _tag(collection: str) -> int:
    """What a record says of its collection: 1 to 2**32 - 1, or 0 without one."""
    return max(1, xxhash.xxh32_intdigest(collection.encode())) if collection else 0


def _checksum(*parts: Any) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _decode(data: bytes, shard: int, lsn: int, tag: int) -> WalRecord:
    if len(data) < BODY_AT:
        raise Corrupt(f"{len(data)} bytes, the header of a WAL record has {BODY_AT}")
    magic, version, kind, its_shard, its_tag, its_lsn, epoch, nonce, upserts, deletes = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise Corrupt("not a WAL record")
    if version != FORMAT:
        raise Corrupt(f"WAL format {version}, this version reads {FORMAT}")
    if len(data) != BODY_AT + upserts + deletes:
        raise Corrupt(f"{len(data)} bytes, its header says {BODY_AT + upserts + deletes}")
    view = memoryview(data)
    if view[HEADER.size : BODY_AT] != _checksum(view[: HEADER.size], view[BODY_AT:]):
        raise Corrupt("the checksum does not match the content")
    if kind not in KINDS:
        raise Corrupt(f"WAL record of kind {kind}, this version knows {', '.join(map(str, KINDS))}")
    if (its_shard, its_lsn) != (shard, lsn):
        raise Corrupt(f"holds LSN {its_lsn} of shard {its_shard}")
    if tag and its_tag not in (0, tag):
        raise Corrupt("holds a record of another collection")
    body = pa.py_buffer(data).slice(BODY_AT)
    points = _batch(body.slice(0, upserts), ["id", "vector"]) if upserts else None
    ids = _batch(body.slice(upserts), ["id"]) if deletes else None
    return WalRecord(lsn, epoch, KINDS[kind], nonce.hex(), points, None if ids is None else ids.column(0))


def _batch(stream: Any, first_columns: list[str]) -> Any:
    """The one record batch of a stream, as views of it."""
    try:
        reader = pa.ipc.open_stream(stream)
        batches = list(reader)
        for batch in batches:
            batch.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Corrupt(f"not an Arrow stream: {error!r}") from error
    if len(batches) != 1 or batches[0].schema.names[: len(first_columns)] != first_columns:
        raise Corrupt(f"{len(batches)} batches with the columns {reader.schema.names}, not one with {first_columns}")
    return batches[0]


class Wal:
    """The log of one shard. Records are never changed; of many writers of one LSN exactly one succeeds."""

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        shard: int,
        log_set: int,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._collection = collection
        self._shard = shard
        self._log_set = log_set
        self._pause = pause

    def read(self, lsn: int) -> WalRecord | None:
        """The record of an LSN; None where there is none."""
        for left in reversed(range(READ_TRIES)):
            try:
                return self._decoded(self._store.get(self._key(lsn)), lsn)
            except NotFound:
                return None
            except Unavailable:
                if not left:
                    raise
        raise AssertionError("a try returns or raises")

    def read_after(self, lsn: int, until: int | None = None) -> Iterator[WalRecord]:
        """The records of lsn + 1, lsn + 2, ... up to the first LSN that does not exist, or up to `until`.

        An end record is the last one that is read, whatever may be put behind it by mistake.
        Reads ahead, the further the more records there were: the usual one or two cost as many reads and no thread.
        Raises Corrupt or Unavailable where the log cannot be read on.
        """
        ahead: deque[Future[WalRecord | None]] = deque()
        pool: ThreadPoolExecutor | None = None
        unread, found = lsn + 1, 0
        try:
            while ahead or until is None or unread <= until:
                if pool is None and found > 1:
                    pool = ThreadPoolExecutor(READ_WINDOW, thread_name_prefix="wal-read")
                while pool and len(ahead) < min(found, READ_WINDOW) and (until is None or unread <= until):
                    ahead.append(pool.submit(self.read, unread))
                    unread += 1
                if ahead:
                    record = ahead.popleft().result()
                else:
                    record = self.read(unread)
                    unread += 1
                if record is None:
                    return
                found += 1
                yield record
                if record.kind == "end":
                    return
        finally:  # also where the caller stops early: the threads end with the reads they are at
            if pool is not None:
                pool.shutdown(wait=False)

    def append(self, record: WalRecord) -> bytes:
        """Put a record at its LSN; it is durable when this returns the bytes written.

        Raises Fenced where another writer's record has that LSN: this one was not written. A failing store is tried
        again, and a collision with the own record of an earlier try is success; after the last try Unavailable is
        raised, and nobody knows whether the record was written, or still will be.
        """
        key, data = self._key(record.lsn), record.encode(self._shard, self._collection)
        failure: Exception | None = None
        for attempt in range(APPEND_TRIES):
            if attempt:
                self._pause(APPEND_PAUSE_S * attempt)
            try:
                if self._store.put_if_absent(key, data):
                    return data
                there = self._store.get(key)
            except (Unavailable, NotFound) as error:
                failure = error
                continue
            if there != data:
                raise self._fenced(self._decoded(there, record.lsn))
            return data
        raise Unavailable(f"{key}: nobody knows whether it was written: {failure}") from failure

    def end(self, after: int, epoch: int) -> tuple[int, int]:
        """The last LSN of the log and that record's epoch; (after, epoch) where the log ends there.

        Every record that was durable when this was called is at or before it. Records are dense and none is deleted,
        so that this takes two reads for every doubling of the distance; `after` itself is not read.
        """
        last, step = after, 1
        while self._exists(last + step):
            last, step = last + step, 2 * step
        while step > 1:  # last exists, last + step does not
            step //= 2
            if self._exists(last + step):
                last += step
        if last == after:
            return after, epoch
        record = self.read(last)
        if record is None:
            raise Unavailable(f"{self._key(last)}: was there, and is gone")
        return last, record.epoch

    def claim(self, lsn: int, epoch: int, nonce: str) -> WalRecord:
        """Take over a log that ends at (lsn, epoch): from now on its writer is Fenced. Fenced if lsn + 1 is taken."""
        record = WalRecord(lsn + 1, epoch + 1, "claim", nonce)
        self.append(record)
        return record

    def take_over(self, after: int, epoch: int, new_nonce: Callable[[], str]) -> WalRecord:
        """Claim the end of the log, wherever that is by now; its end was at (after, epoch) or behind that.

        Fenced where the log has ended. Unavailable where others' records keep coming first.
        """
        for _ in range(CLAIM_TRIES):
            after, epoch = self.end(after, epoch)
            self._refuse_ended(after)
            try:
                return self.claim(after, epoch, new_nonce())
            except Fenced:
                continue
        return self._take_over_busy(after, epoch, new_nonce)

    def _take_over_busy(self, after: int, epoch: int, new_nonce: Callable[[], str]) -> WalRecord:
        """Claim LSN after LSN as fast as they can be put, without reading the records that were there first.

        The next LSN of a writer that never rests is on its way to the store before anybody can know that it is the
        next. But it works between two puts, and this does not. The epochs of others' claims are found afterwards.
        Where one of the records that were passed over ended the log, nobody ever reads the claim.
        """
        for lsn in range(after + 1, after + 1 + BUSY_CLAIM_TRIES):
            claim = WalRecord(lsn, epoch + 1, "claim", new_nonce())
            if not self._put(claim):
                continue
            before = self.read(lsn - 1) if lsn - 1 > after else None
            self._refuse_ended(lsn - 1)
            return claim if before is None or before.epoch <= epoch else self.take_over(lsn, before.epoch, new_nonce)
        raise Unavailable(f"{self._key(lsn)}: others wrote to the log {BUSY_CLAIM_TRIES} times before it was claimed")

    def _refuse_ended(self, last: int) -> None:
        record = self.end_record(last)
        if record is not None:
            raise self._ended(record)

    def end_record(self, last: int) -> WalRecord | None:
        """The record that ended the log whose last one is at `last`; None where it has not ended.

        Claims may be behind it, of who took over a busy log and passed the end over (`_take_over_busy`).
        """
        while last and (record := self.read(last)) is not None and record.kind != "write":
            if record.kind == "end":
                return record
            last -= 1
        return None

    def _ended(self, record: WalRecord) -> Fenced:
        return Fenced(
            f"shard {self._shard} of {self._collection!r}: the log of set {self._log_set} ended at LSN {record.lsn}; "
            "writes go to the logs of a later generation"
        )

    def finish(self, after: int, epoch: int, new_nonce: Callable[[], str]) -> WalRecord:
        """End the log for ever, wherever its end is by now: the end record, also where it has ended before.

        The log is claimed first, so that its writer is Fenced and the end of it stands still. Unavailable where others
        claim it at the same time: do it again.
        """
        for _ in range(CLAIM_TRIES):
            lsn, epoch = self.end(after, epoch)
            ended = self.end_record(lsn)
            if ended is not None:
                return ended
            last = self.read(lsn) if lsn else None
            try:
                claim = last if last is not None and last.kind == "claim" else None
                claim = claim or self.take_over(lsn, epoch, new_nonce)
                record = WalRecord(claim.lsn + 1, claim.epoch, "end", new_nonce())
                self.append(record)
                return record
            except Fenced:
                continue
        raise Unavailable(f"shard {self._shard} of {self._collection!r}: others keep writing to the log that is to end")

    def _put(self, record: WalRecord) -> bool:
        """As `append`, but False instead of Fenced, and without a read where the store answers."""
        try:
            return self._store.put_if_absent(self._key(record.lsn), record.encode(self._shard, self._collection))
        except Unavailable:
            try:
                self.append(record)
            except Fenced:
                return False
            return True

    def fence(self, after: int, epoch: int, new_nonce: Callable[[], str]) -> tuple[int, int]:
        """Claim the end of the log, so that whoever wrote to it is Fenced: the claim's LSN and epoch.

        (0, 0) for a log without records, which stays so. An ended log is fenced already.
        """
        after, epoch = self.end(after, epoch)
        if not after or self.end_record(after) is not None:
            return after, epoch
        claim = self.take_over(after, epoch, new_nonce)
        return claim.lsn, claim.epoch

    def last_listed(self) -> int:
        """The highest LSN, by listing: for a log whose beginning may be deleted. 0 where there is no record."""
        keys = (info.key for info in self._store.objects(self._prefix))
        return max((lsn for key in keys if (lsn := paths.wal_lsn(key)) is not None), default=0)

    def delete_before(self, lsn: int) -> None:
        """Delete the writes before that record. Claims and ends stay: there a writer that was taken over finds that."""
        for info in list(self._store.objects(self._prefix)):
            number = paths.wal_lsn(info.key)
            if number is not None and number < lsn and info.size_bytes != CLAIM_BYTES:
                self._store.delete(info.key)

    def _exists(self, lsn: int) -> bool:
        try:
            self._store.get(self._key(lsn))
        except NotFound:
            return False
        return True

    def _decoded(self, data: bytes, lsn: int) -> WalRecord:
        return WalRecord.decode(data, self._key(lsn), self._shard, lsn, self._collection)

    def _key(self, lsn: int) -> str:
        return paths.wal_record(self._collection, self._shard, lsn, self._log_set)

    @property
    def _prefix(self) -> str:
        return paths.wal_prefix(self._collection, self._shard, self._log_set)

    def _fenced(self, other: WalRecord) -> Fenced:
        return Fenced(
            f"shard {self._shard} of {self._collection!r}: LSN {other.lsn} is another writer's {other.kind} "
            f"of epoch {other.epoch}"
        )
