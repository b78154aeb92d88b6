"""What a shard has to apply after its entry in a manifest: the records of earlier log sets, then those of its own log.

Of an earlier set every log is read to its end record; it holds points of other shards as well, which are left out. The
own log begins at the highest LSN of the last set's end records (docs/decisions/0007-jobs.md).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import Conflict
from cluster.manifest_format import Manifest
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.shard_entry import LogPosition, LogSet, ShardEntry
from cluster.wal import Wal, WalRecord


class EntryLog:
    """Reads on from an entry, each time as far as the logs go. Every record that was handed out counts as read.

    `lsn` and `epoch` are those of the entry until all earlier sets were read (`crossed`), then of the own log's last
    record read; `behind` has the positions in the earlier sets. `read` counts the records of these that were read,
    whether or not they have ids of this shard.
    """

    def __init__(self, store: ObjectStore, collection: str, entry: ShardEntry, routing: Routing, log_set: int) -> None:
        self._store = store
        self._collection = collection
        self._shard = entry.shard
        self._routing = routing
        self._own = Wal(store, collection, entry.shard, log_set)
        self._no_ends: set[LogPosition] = set()  # positions whose record is known not to be an end
        self.behind = entry.behind
        self.lsn = entry.applied_lsn
        self.epoch = entry.epoch
        self.read = 0
        self.start: int | None = None  # at which the own log begins, once the earlier sets were read here

    @classmethod
    def of(cls, store: ObjectStore, manifest: Manifest, shard: int) -> EntryLog:
        return cls(store, manifest.collection, manifest.shards[shard], manifest.routing, manifest.log_set)

    @property
    def crossed(self) -> bool:
        """Whether every earlier set was read to its end."""
        return not self.behind

    def records(self) -> Iterator[WalRecord]:
        """What there is, and was not read yet, in order. Call it again to read on.

        Records of earlier sets have the LSNs of their own logs, and only ids of this shard; one without any is left
        out. Those of one set come log by log: no id is in two of them. Raises Corrupt or Unavailable.
        """
        while self.behind:
            all_ended = True
            for number in range(len(self._positions())):
                ended = yield from self._read_log(number)
                all_ended = all_ended and ended
            if not all_ended:
                return
            ends = self._positions()
            self.lsn, self.epoch = _highest(ends)
            if len(self.behind) == 1:  # before `crossed` is true: other threads look at that
                self.start = self.lsn
            self.behind = self.behind[1:]
        for record in self._own.read_after(self.lsn):
            self.lsn, self.epoch = record.lsn, record.epoch
            yield record

    def lag(self) -> int:
        """How many records there are that were not read: of the logs whose place is known."""
        if not self.behind:
            return self._own.end(self.lsn, self.epoch)[0] - self.lsn
        number = self.behind[0].number
        return sum(self._log(number, at.shard).end(at.lsn, at.epoch)[0] - at.lsn for at in self._positions())

    def _positions(self) -> tuple[LogPosition, ...]:
        """In the oldest set that is not read yet; one that begins behind another does so at the other's end."""
        first = self.behind[0]
        if not first.positions:
            first = replace(first, positions=_starts(first, self.lsn, self.epoch))
            self.behind = (first, *self.behind[1:])
        return first.positions

    def _read_log(self, number: int) -> Generator[WalRecord, None, bool]:
        """Read one log of the oldest set on; returns whether that was to its end record."""
        at = self._positions()[number]
        if at not in self._no_ends:
            last = self._log(self.behind[0].number, at.shard).read(at.lsn) if at.lsn else None
            if last is not None and last.kind == "end":
                return True
            self._no_ends.add(at)
        for record in self._log(self.behind[0].number, at.shard).read_after(at.lsn):
            self._no_ends.discard(at)
            at = LogPosition(at.shard, record.lsn, record.epoch)
            self._no_ends.add(at)
            self._move(number, at)
            if record.kind == "end":
                self._no_ends.discard(at)
                return True
            ours = only_shard(record, self._routing, self._shard)
            if ours is not None:
                yield ours
        return False

    def _move(self, number: int, at: LogPosition) -> None:
        first = self.behind[0]
        positions = (*first.positions[:number], at, *first.positions[number + 1 :])
        self.read += 1
        self.behind = (replace(first, positions=positions), *self.behind[1:])

    def _log(self, number: int, shard: int) -> Wal:
        return Wal(self._store, self._collection, shard, number)


def only_shard(record: WalRecord, routing: Routing, shard: int) -> WalRecord | None:
    """A write record with the ids that the routing gives to a shard; None where it has none of them."""
    upserts = _filtered(record.upserts, "id", routing, shard)
    deletes = _filtered(record.deletes, None, routing, shard)
    return None if upserts is None and deletes is None else replace(record, upserts=upserts, deletes=deletes)


def _filtered(rows: Any, column: str | None, routing: Routing, shard: int) -> Any:
    if rows is None:
        return None
    kept = routing.shards_of_ids(rows.column(column) if column else rows) == shard
    if not kept.any():
        return None
    return rows if kept.all() else rows.take(pa.array(np.flatnonzero(kept)))


# --- the logs of a collection -----------------------------------------------------------------------------------------


def end_logs(
    store: ObjectStore, collection: str, behind: tuple[LogSet, ...], new_nonce: Callable[[], str]
) -> tuple[int, int]:
    """End every log of these sets, the oldest first: (LSN, epoch) at which the next set begins.

    Whoever writes to one of them is fenced. What has ended stays as it is: doing it again changes nothing.
    """
    lsn = epoch = 0
    for logs in behind:
        positions = logs.positions or _starts(logs, lsn, epoch)
        ends = [Wal(store, collection, at.shard, logs.number).finish(at.lsn, at.epoch, new_nonce) for at in positions]
        lsn, epoch = max(end.lsn for end in ends), max(end.epoch for end in ends)
    return lsn, epoch


def start_after(store: ObjectStore, collection: str, behind: tuple[LogSet, ...]) -> tuple[int, int] | None:
    """(LSN, epoch) at which the set after these begins; None where one of their logs has not ended."""
    lsn = epoch = 0
    for logs in behind:
        ends = []
        for at in logs.positions or _starts(logs, lsn, epoch):
            wal = Wal(store, collection, at.shard, logs.number)
            record = wal.end_record(wal.end(at.lsn, at.epoch)[0])
            if record is None:
                return None
            ends.append(LogPosition(at.shard, record.lsn, record.epoch))
        lsn, epoch = _highest(tuple(ends))
    return lsn, epoch


def ends_of_logs(store: ObjectStore, manifest: Manifest) -> tuple[LogPosition, ...]:
    """Where the logs that the newest manifest's generation writes to end now, in the order of the shards.

    Writes acknowledged before this was called are at or before it. Conflict while the logs of an earlier set, which are
    still written to, have not ended.
    """
    starts: dict[tuple[LogSet, ...], tuple[int, int] | None] = {}
    ends = []
    for entry in manifest.shards:
        at: tuple[int, int] | None = entry.applied_lsn, entry.epoch
        if entry.behind:
            if entry.behind not in starts:
                starts[entry.behind] = start_after(store, manifest.collection, entry.behind)
            at = starts[entry.behind]
        if at is None:
            raise Conflict(
                f"collection {manifest.collection!r} is being switched to generation {manifest.generation}, which has "
                f"{len(manifest.shards)} shards: try again when that is served, or roll back"
            )
        wal = Wal(store, manifest.collection, entry.shard, manifest.log_set)
        ends.append(LogPosition(entry.shard, *wal.end(*at)))
    return tuple(ends)


def _starts(logs: LogSet, lsn: int, epoch: int) -> tuple[LogPosition, ...]:
    return tuple(LogPosition(shard, lsn, epoch) for shard in range(logs.shards))


def _highest(positions: tuple[LogPosition, ...]) -> tuple[int, int]:
    return max(at.lsn for at in positions), max(at.epoch for at in positions)
