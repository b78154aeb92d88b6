"""What was written since an entry becomes segments and tombstones of it, before anyone sees the entry.

So the next generation catches up with the one that is served: round after round, with one commit at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.segment_rows import RowNumbers, attribute_types
from actors.shard_place import ShardPlace
from actors.tail_rows import TailRows, column_types, read_tail
from cluster.attributes import arrow_type
from cluster.config import CollectionConfig
from cluster.entry_log import EntryLog
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.routing import Routing
from cluster.segment import Rows, rows_schema
from cluster.shard_entry import behind_logs

SEAL_POINTS_MAX = 1_000_000  # ids in the records of one seal: the next one goes on behind them
SEAL_BYTES_MAX = 1024**3
LITTLE_POINTS = 5_000  # so many are left to the replicas, which read them from the log in less time than a build takes
LITTLE_RECORDS = 1_000


@dataclass(frozen=True, eq=False)
class DraftEntry:
    """An entry of a generation that is not committed yet; `deleted` are the deleted rows, sorted, by segment.

    They become files once, in the end: a file is named by the highest LSN, which two rounds may have in common.
    """

    entry: ShardEntry
    deleted: Mapping[str, RowNumbers] = field(default_factory=dict)

    @property
    def points(self) -> int:
        return self.entry.points - sum(map(len, self.deleted.values()))


def seal_entry(
    place: ShardPlace,
    draft: DraftEntry,
    base: Manifest,
    config: CollectionConfig,
    name: str,
    points_max: int = SEAL_POINTS_MAX,
    log_set: int | None = None,
) -> tuple[DraftEntry, int]:
    """One round: put what was written since a draft into it, of a long log the first `points_max` ids.

    Returns the draft and how many ids the round read; where little is left the very draft that was given. `base` is a
    manifest of the generation that is served; `config` and `log_set` are the draft's own (None: as a commit after
    `base` has it). The segment's name begins with `name`. Conflict where another generation was committed meanwhile.

    Memory: 40 bytes and the id for each id in the records, one block of rows, the index; vectors are in local files.
    """
    own_set = base.log_set + (len(draft.entry.behind) > 0) if log_set is None else log_set
    log = EntryLog(place.store, place.collection, draft.entry, Routing(config.shards), own_set)
    with tempfile.TemporaryDirectory(prefix="eagleray-seal-") as folder:
        tail = read_tail(log, config, Path(folder), points_max, SEAL_BYTES_MAX)
        newest = place.newest(base)  # after the records: it names the attributes that they were declared with
        if tail is None:
            return replace(draft, entry=moved(draft.entry, log)), 0
        if tail.whole and len(tail.ids) < LITTLE_POINTS and tail.records < LITTLE_RECORDS:
            return draft, len(tail.ids)
        entry, deleted = _without(place, draft, tail)
        if tail.count:
            schema = sealed_schema(config, newest, [place.rows(ref) for ref in draft.entry.segments], tail)
            segment_id = f"{name}-{place.new_nonce()[:8]}"
            built = place.build(Path(folder) / "segment", segment_id, config, tail, schema, draft.points)
            entry = replace(entry, segments=(*entry.segments, built.ref))
        return DraftEntry(moved(entry, log), deleted), len(tail.ids)


def _without(place: ShardPlace, draft: DraftEntry, tail: TailRows) -> tuple[ShardEntry, dict[str, RowNumbers]]:
    """The entry without the tail's ids: (without the segments that have no rows left, deleted rows)."""
    kept: list[SegmentRef] = []
    deleted: dict[str, RowNumbers] = {}
    for ref in draft.entry.segments:
        rows = place.rows(ref).rows_of_ids(tail.ids, tail.hashes)
        gone = np.union1d(draft.deleted.get(ref.segment_id, np.empty(0, np.int64)), rows[rows >= 0])
        if len(gone) < ref.count:
            kept.append(ref)
            deleted |= {ref.segment_id: gone} if len(gone) else {}
    return replace(draft.entry, segments=tuple(kept)), deleted


def moved(entry: ShardEntry, log: EntryLog) -> ShardEntry:
    """The entry where the log has been read to."""
    if log.behind:
        return behind_logs(entry, *log.behind)
    return replace(entry, applied_lsn=log.lsn, epoch=log.epoch, behind=())


def finished_entry(place: ShardPlace, draft: DraftEntry) -> ShardEntry:
    """The entry to commit: its deleted rows are in files."""
    lsn = draft.entry.applied_lsn
    files = tuple(place.tombstones(lsn, segment_id, rows) for segment_id, rows in draft.deleted.items())
    return replace(draft.entry, tombstones=files)


def sealed_schema(config: CollectionConfig, newest: Manifest, others: Iterable[Rows], tail: TailRows) -> Any:
    """Columns of a segment of the tail beside others."""
    known: dict[str, Any] = {}
    for rows in others:
        known = attribute_types(rows) | known
    declared = {name: dtype for name, text in newest.attributes.items() if (dtype := arrow_type(text)) is not None}
    return rows_schema(config, column_types(known, declared, tail.attributes))
