"""One shard in a manifest: its segments and their deleted rows, as of one LSN of its WAL.

In a generation with another number of shards than the one before, that is one LSN of each log of that one (`behind`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class SegmentRef:
    """A segment as the manifest names it; `checksum` is that of its `segment.json`.

    `origin` is the collection that holds its files; "" is the manifest's own.
    """

    segment_id: str
    count: int
    checksum: str
    origin: str = ""

    def home(self, collection: str) -> str:
        """The collection that holds its files, for a segment of `collection`."""
        return self.origin or collection


@dataclass(frozen=True)
class TombstonesRef:
    """A segment's `count` deleted rows as of an LSN of its shard; `checksum` is that of the tombstone file.

    `variant` is of the file's name ("" in what format 2 wrote): generations that share a segment, as one has after a
    restore, may have deleted other rows of it as of the same LSN.
    """

    segment_id: str
    lsn: int
    count: int
    checksum: str
    variant: str = ""


@dataclass(frozen=True)
class LogPosition:
    """One record of a shard's log: what is at or before it was applied. `epoch` is that record's."""

    shard: int
    lsn: int
    epoch: int


@dataclass(frozen=True)
class LogSet:
    """The logs of one routing, one for each of its shards; `number` is that of the set (`Manifest.log_set`).

    `positions` are as of where they have to be read, in the order of the shards; without any, from where they begin.
    """

    number: int
    shards: int
    positions: tuple[LogPosition, ...] = ()


@dataclass(frozen=True)
class ShardEntry:
    """One shard as of `applied_lsn`: its segments, and their deleted rows. `epoch` is the WAL's at that LSN.

    With `behind` the shard has applied nothing of its own log yet. What it lacks is in the logs of earlier sets, the
    oldest first, and then in its own; `applied_lsn` and `epoch` are the highest of the first set's positions.
    """

    shard: int
    segments: tuple[SegmentRef, ...] = ()
    applied_lsn: int = 0
    epoch: int = 0
    tombstones: tuple[TombstonesRef, ...] = ()
    behind: tuple[LogSet, ...] = ()

    @property
    def points(self) -> int:
        return sum(ref.count for ref in self.segments) - sum(ref.count for ref in self.tombstones)

    @classmethod
    def from_dict(cls, data: dict[str, Any], format_: int) -> ShardEntry:
        """Plain data of a manifest's format; TypeError or KeyError where it has other fields."""
        if wrong := data.keys() ^ ENTRY_FIELDS[format_]:
            raise TypeError(f"a shard of format {format_} with or without {', '.join(sorted(wrong))}")
        parts: dict[str, Any] = {"segments": tuple(_segment_ref(ref, format_) for ref in data["segments"])}
        if format_ > 1:
            parts["tombstones"] = tuple(_tombstones_ref(ref, format_) for ref in data["tombstones"])
        if format_ > 2:
            parts["behind"] = tuple(_log_set(logs) for logs in data["behind"])
        return cls(**{**data, **parts})


ENTRY_FIELDS = {  # of each format of the manifest
    1: {"shard", "segments"},
    2: {"shard", "segments", "applied_lsn", "epoch", "tombstones"},
    3: {"shard", "segments", "applied_lsn", "epoch", "tombstones", "behind"},
    4: {"shard", "segments", "applied_lsn", "epoch", "tombstones", "behind"},
    5: {"shard", "segments", "applied_lsn", "epoch", "tombstones", "behind"},
}


def _segment_ref(data: dict[str, Any], format_: int) -> SegmentRef:
    if ("origin" in data) != (format_ > 2):
        raise TypeError(f"a segment of format {format_} with or without origin")
    return SegmentRef(**data)


def _tombstones_ref(data: dict[str, Any], format_: int) -> TombstonesRef:
    if ("variant" in data) != (format_ > 2):
        raise TypeError(f"tombstones of format {format_} with or without variant")
    return TombstonesRef(**data)


def _log_set(data: dict[str, Any]) -> LogSet:
    return LogSet(data["number"], data["shards"], tuple(LogPosition(**position) for position in data["positions"]))


def behind_logs(entry: ShardEntry, first: LogSet, *later: LogSet) -> ShardEntry:
    """The entry, at `first.positions`: it has to read those logs on, and then later sets."""
    lsn = max(position.lsn for position in first.positions)
    epoch = max(position.epoch for position in first.positions)
    return replace(entry, applied_lsn=lsn, epoch=epoch, behind=(first, *later))


def wrong_behind(entry: ShardEntry) -> list[str]:
    """What is wrong with what an entry has to read of earlier log sets; empty when nothing is."""
    wrong = []
    for place, logs in enumerate(entry.behind):
        expected = range(logs.shards) if place == 0 else range(0)
        if logs.shards < 1 or [position.shard for position in logs.positions] != list(expected):
            wrong.append(f"log set {logs.number} behind it has positions of other logs than 0 to {logs.shards - 1}")
    numbers = [logs.number for logs in entry.behind]
    if numbers != sorted(set(numbers)):
        wrong.append(f"log sets {numbers} behind it are not in order")
    if entry.behind and not wrong:
        first = entry.behind[0].positions
        highest = max(position.lsn for position in first), max(position.epoch for position in first)
        if highest != (entry.applied_lsn, entry.epoch):
            wrong.append(f"LSN {entry.applied_lsn} of epoch {entry.epoch}, the logs behind it are at {highest}")
    return wrong


def wrong_tombstones(entry: ShardEntry) -> list[str]:
    """What is wrong with an entry's tombstones; empty when nothing is."""
    counts = {ref.segment_id: ref.count for ref in entry.segments}
    wrong = []
    if len({ref.segment_id for ref in entry.tombstones}) != len(entry.tombstones):
        wrong.append("a segment has more than one tombstone file")
    for ref in entry.tombstones:
        if not 1 <= ref.count <= counts.get(ref.segment_id, 0):
            wrong.append(f"{ref.count} tombstones for {counts.get(ref.segment_id, 0)} rows of {ref.segment_id!r}")
        if ref.lsn > entry.applied_lsn:
            wrong.append(f"tombstones as of LSN {ref.lsn}, after {entry.applied_lsn}")
    return wrong


def lsns_that_go_back(before: tuple[ShardEntry, ...], after: tuple[ShardEntry, ...]) -> list[str]:
    """LSNs and epochs that are lower in `after`: the same shards, later in the same generation."""
    return [
        f"shard {new.shard}: {name} {now} goes back from {then}"
        for old, new in zip(before, after, strict=True)
        for name, then, now in (("LSN", old.applied_lsn, new.applied_lsn), ("epoch", old.epoch, new.epoch))
        if now < then
    ]
