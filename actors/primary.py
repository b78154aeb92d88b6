"""The replica that may append to its shard's WAL: group commit, fencing, and acknowledgement.

Two threads: one puts records (writes that wait while a put is in flight share the next one), the other applies what
is durable and acknowledges it, so that a record is applied while the next one is being put.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from typing import Any

from actors.group_commit import counts_of, fold, shares_types
from actors.live_generation import NOTHING, Existed
from actors.shard import Shard
from cluster.config import Limits, Upkeep
from cluster.errors import Exhausted, Fenced, Unavailable
from cluster.wal import WalRecord
from cluster.write import PointWrite, WriteOutcome

CLAIM_ATTEMPTS = 20  # each is lost to another claim
IDLE_CHECK_S = 1.0  # how often an idle primary looks whether another has taken over
RETRY_PAUSE_S = 0.5  # between the puts of a record of which nobody knows whether it is in the WAL
QUEUE_FULL_RETRY_S, TAIL_FULL_RETRY_S = 0.1, 2.0
WAITING_RECORDS = 2  # durable ones that wait to be applied
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiting:
    write: PointWrite
    size_bytes: int
    deadline: float  # of `time.monotonic`
    outcome: Future[WriteOutcome]


class Primary:
    """Leads a shard from `claim` until `stop`, or until another writer's record is found: then `lost` says so."""

    def __init__(
        self, shard: Shard, epoch: int, limits: Limits, upkeep: Upkeep, push: Callable[[bytes], None] = lambda _: None
    ) -> None:
        self._shard = shard
        self._limits = limits
        self._upkeep = upkeep
        self._push = push
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._durable: queue.Queue[tuple[WalRecord, list[_Waiting]] | None] = queue.Queue(WAITING_RECORDS)
        self._wal = shard.wal  # the shard goes on to another one when this has ended
        self._next_lsn = shard.applied_lsn + 1
        self.epoch = epoch
        self.lost = ""
        self._threads = [
            threading.Thread(target=self._put_for_ever, name="wal-put", daemon=True),
            threading.Thread(target=self._apply_for_ever, name="wal-apply", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def claim(
        cls, shard: Shard, limits: Limits, upkeep: Upkeep, push: Callable[[bytes], None] = lambda _: None
    ) -> Primary:
        """Become the primary: claim the end of the WAL for the next epoch, apply it, load the newest manifest of it.

        Whoever led before finds the claim where its next record would go, so that the log does not grow while it is
        applied. Fenced where the log has ended; Unavailable where others' records keep coming; NotFound where the
        collection was deleted.
        """
        for _ in range(CLAIM_ATTEMPTS):
            if shard.newest() is None:
                raise Unavailable(f"shard {shard.number} of {shard.collection!r}: nothing is loaded")
            claim = shard.wal.take_over(shard.applied_lsn, shard.epoch, shard.new_nonce)
            shard.catch_up(claim.lsn)
            if shard.lead(claim):
                try:
                    shard.renew()
                except BaseException:
                    shard.follow(claim.epoch)
                    raise
                return cls(shard, claim.epoch, limits, upkeep, push)
        raise Unavailable(f"shard {shard.number} of {shard.collection!r}: others claim it, too")

    def write(self, write: PointWrite, deadline: float = inf) -> Future[WriteOutcome]:
        """Queue a write; the future has its outcome once it is durable and applied here.

        One that is still in the queue at its deadline (of `time.monotonic`) is never put. Fenced, where this is no
        primary any more, and Exhausted: nothing was or will be applied. The future may raise Fenced as well, or
        Unavailable: nobody knows, unless it says that nothing was applied.
        """
        size = write.size_bytes
        newest = self._shard.newest()
        if newest is not None and write.shards not in (0, newest.routing.shards):
            raise Fenced(
                f"the write was split over {write.shards} shards, shard {self._shard.number} is one of "
                f"{newest.routing.shards}: nothing was applied"
            )
        with self._changed:
            if self.lost:
                raise Fenced(self.lost)
            self._refuse_too_much(size)
            waiting = _Waiting(write, size, deadline, Future())
            self._waiting.append(waiting)
            self._waiting_bytes += size
            self._changed.notify()
        return waiting.outcome

    def _refuse_too_much(self, size: int) -> None:
        most = self._limits.queued_write_bytes_per_shard
        if self._waiting and self._waiting_bytes + size > most:
            raise Exhausted(
                f"queued_write_bytes_per_shard: {self._waiting_bytes} bytes wait already, {most} may",
                QUEUE_FULL_RETRY_S,
            )
        tail_bytes, most = self._shard.tail_bytes, self._upkeep.tail_bytes_max
        if tail_bytes + self._waiting_bytes > most:
            newest = self._shard.newest()
            tail = newest.view.tail if newest is not None else None
            told = f"tail_bytes_max: {tail_bytes} bytes wait to be sealed into a segment, {most} may"
            if tail is None or tail.size_bytes < tail_bytes:
                told += "; they are of a generation that is sealed no more, for a newer one is to be served: see what "
                told += "that waits for, or roll back"
            raise Exhausted(told, TAIL_FULL_RETRY_S)

    def drop_expired(self) -> None:
        """Answer the queued writes whose deadline is over. Nothing of them was put, nor will be."""
        now = time.monotonic()
        with self._changed:
            expired = [waiting for waiting in self._waiting if waiting.deadline <= now]
            if not expired:
                return
            self._waiting = deque(waiting for waiting in self._waiting if waiting.deadline > now)
            self._waiting_bytes -= sum(waiting.size_bytes for waiting in expired)
            # Before anybody sees that they wait no more: who finds one neither waiting nor answered takes it for put.
            _fail(expired, Unavailable("nothing was applied: the write waited for earlier ones until its deadline"))

    def stop(self) -> None:
        """Stop leading; writes that were not put yet fail as Fenced."""
        self._lose(f"epoch {self.epoch} of shard {self._shard.number} was given up")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # --- the put thread -----------------------------------------------------------------------------------------

    def _put_for_ever(self) -> None:
        try:
            while not self._stopped.is_set():
                group = self._next_group()
                if group:
                    self._put(group)
                elif not self._stopped.is_set():
                    self._look_for_another()
        except (Fenced, Unavailable) as error:
            self._lose(_reason(error))
        except Exception as error:
            logger.exception("the primary of shard %d of %r ends", self._shard.number, self._shard.collection)
            self._lose(_reason(error))
        finally:
            self._durable.put(None)

    def _next_group(self) -> list[_Waiting]:
        """What waits and fits into one record, up to `wal_object_bytes`; nothing after `IDLE_CHECK_S` without any."""
        with self._changed:
            if not self._waiting and not self._stopped.is_set():
                self._changed.wait(IDLE_CHECK_S)
            self.drop_expired()
            group: list[_Waiting] = []
            size = 0
            types: dict[str, Any] = {}
            while self._waiting and (not group or size + self._waiting[0].size_bytes <= self._limits.wal_object_bytes):
                if not shares_types(types, self._waiting[0].write):
                    break
                group.append(self._waiting.popleft())
                size += group[-1].size_bytes
            self._waiting_bytes -= size
            return group

    def _put(self, group: list[_Waiting]) -> None:
        """Make a group durable and hand it on. While nobody knows whether it is, nothing else is put."""
        try:
            upserts, deletes = fold([waiting.write for waiting in group])
            record = WalRecord(self._next_lsn, self.epoch, "write", self._shard.new_nonce(), upserts, deletes)
            self._push(self._made_durable(record, group))
        except BaseException as error:
            self._lose(_reason(error))  # first: who is told so finds a primary that leads no more
            _fail(group, error if isinstance(error, Fenced) else _in_doubt(error))
            raise
        self._next_lsn += 1
        self._durable.put((record, group))

    def _made_durable(self, record: WalRecord, group: list[_Waiting]) -> bytes:
        while True:
            try:
                return self._wal.append(record)
            except Unavailable as error:  # those who wait are told; the record is put until it is known to be there
                logger.warning("record %d of shard %d: %s", record.lsn, self._shard.number, error)
                _fail(group, _in_doubt(error))
                self.drop_expired()
                if self._stopped.wait(RETRY_PAUSE_S):
                    raise

    def _look_for_another(self) -> None:
        """An idle primary that was taken over, such as one that was paused, must not go on answering as if it led."""
        try:
            other = self._wal.read(self._next_lsn)
        except Unavailable as error:
            logger.warning("shard %d: looking for another primary: %s", self._shard.number, error)
            return
        if other is not None and other.kind == "end":
            raise Fenced(f"the log of shard {self._shard.number} ended at LSN {other.lsn}")
        if other is not None:
            raise Fenced(f"epoch {other.epoch} took over from epoch {self.epoch} at LSN {other.lsn}")

    # --- the apply thread ---------------------------------------------------------------------------------------

    def _apply_for_ever(self) -> None:
        while (item := self._durable.get()) is not None:
            record, group = item
            try:
                _acknowledge(record, group, self._shard.apply_own(record))
            except Exception as error:
                logger.exception("record %d of shard %d", record.lsn, self._shard.number)
                self._lose(f"record {record.lsn} could not be applied: {error}")
                _fail(group, _in_doubt(error))

    def _lose(self, reason: str) -> None:
        """Lead no more. Writes that wait were never put: nothing of them was applied."""
        with self._changed:
            if not self.lost:
                self.lost = reason
            group = list(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._stopped.set()
            self._changed.notify_all()
        self._shard.follow(self.epoch)
        _fail(group, Fenced(reason))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Fenced | Unavailable) else f"{type(error).__name__}: {error}"


def _in_doubt(error: BaseException) -> Unavailable:
    return Unavailable(f"the write may have been applied or not: {error}")


def _fail(group: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in group:
        if not waiting.outcome.done():
            waiting.outcome.set_exception(error)


def _acknowledge(record: WalRecord, group: Sequence[_Waiting], existed: Existed | None) -> None:
    """Tell every write what it did. Without `existed` the record was applied by a replay, which counts no deletes."""
    if existed is None:
        _fail([waiting for waiting in group if waiting.write.deletes is not None], _in_doubt(Fenced("it was replayed")))
        group = [waiting for waiting in group if waiting.write.deletes is None]
    counts = counts_of([waiting.write for waiting in group], record, existed or NOTHING)
    for waiting, count in zip(group, counts, strict=True):
        if not waiting.outcome.done():
            waiting.outcome.set_result(WriteOutcome(record.lsn, count))
