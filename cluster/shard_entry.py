"""One shard in a manifest: its segments and their deleted rows, as of one LSN of its WAL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SegmentRef:
    """A segment as the manifest names it; `checksum` is that of its `segment.json`."""

    segment_id: str
    count: int
    checksum: str


@dataclass(frozen=True)
class TombstonesRef:
    """A segment's `count` deleted rows as of an LSN of its shard; `checksum` is that of the tombstone file."""

    segment_id: str
    lsn: int
    count: int
    checksum: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard as of `applied_lsn`: its segments, and their deleted rows. `epoch` is the WAL's at that LSN."""

    shard: int
    segments: tuple[SegmentRef, ...] = ()
    applied_lsn: int = 0
    epoch: int = 0
    tombstones: tuple[TombstonesRef, ...] = ()

    @property
    def points(self) -> int:
        return sum(ref.count for ref in self.segments) - sum(ref.count for ref in self.tombstones)

    @classmethod
    def from_dict(cls, data: dict[str, Any], format_: int) -> ShardEntry:
        """Plain data of a manifest's format; TypeError or KeyError where it has other fields."""
        parts: dict[str, Any] = {"segments": tuple(SegmentRef(**ref) for ref in data["segments"])}
        if format_ > 1:
            parts["tombstones"] = tuple(TombstonesRef(**ref) for ref in data["tombstones"])
        elif set(data) != {"shard", "segments"}:
            raise TypeError(f"a shard of format 1 with {', '.join(data)}")
        return cls(**{**data, **parts})


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
