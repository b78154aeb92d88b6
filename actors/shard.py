"""One replica's work: hold generations of one shard, follow its WAL, search and fetch. Runs without Ray.

Every generation is a `LiveGeneration`, and all are at one LSN. `load` brings one to that LSN beside what is served,
`apply` moves all of them on by a record. A lock guards the list of generations and the order of records; searches
never take it, and it is not held while storage is read.
"""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.live_generation import NOTHING, Existed, LiveGeneration
from actors.segment_loader import LoadedSegment, cached_path, load_segment
from actors.shard_client import ShardEndpoint
from actors.shard_view import ShardView
from cluster.errors import EaglerayError, Unavailable
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaState
from cluster.query import Hits, ShardSearch
from cluster.row_selection import RowSelection
from cluster.tombstones import read_tombstones
from cluster.wal import Wal, WalRecord, lsn_of

APPLY_WAIT_S = 30.0  # for a record that is durable and waits to be applied by this process
APPLIED_AT_PUBLISH = 16  # records that a generation may lack when it is published; writes wait while it applies them


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself. `error` is why it serves nothing, where that is so.

    `points` (live ones), `segments`, `tail_points` and `tombstones` are those of its newest generation; `attributes`
    are Arrow types, as text, by generation and name. `lsn` is the last record applied; `epoch` is that of the replica
    as primary, 0 where it is none. `upkeep` tells what is being sealed or merged, or why that failed. `observed` has
    the recall of live queries (`RecallObserver.observed`), for each generation of which some were evaluated.
    `endpoint` is where it takes direct connections, None where it does not.
    """

    state: ReplicaState
    versions: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    points: int = 0
    threads: int = 0
    pid: int = 0
    node: str = ""
    error: str = ""
    segments: tuple[dict[str, Any], ...] = field(default=())
    attributes: dict[int, dict[str, str]] = field(default_factory=dict)
    observed: tuple[dict[str, Any], ...] = ()
    lsn: int = 0
    epoch: int = 0
    tail_points: int = 0
    tombstones: int = 0
    upkeep: str = ""
    endpoint: ShardEndpoint | None = None


class Shard:
    """The generations of one shard. `load` adds one or renews it, `retire` drops old ones."""

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        shard: int,
        cache_dir: Path,
        new_nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.collection = collection
        self.number = shard
        self.wal = Wal(store, collection, shard)
        self.new_nonce = new_nonce
        self._store = store
        self._cache_dir = cache_dir
        self._log = ManifestLog(store, collection, new_nonce)
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)  # on to another LSN
        self._generations: dict[int, LiveGeneration] = {}  # by generation; replaced, never changed in place
        self._joining: list[list[WalRecord]] = []  # records for generations that are being loaded
        self._lsn = 0
        self._epoch = 0  # of the last record
        self._led_as = 0  # the epoch in which this replica is the primary
        self._failure = ""

    @property
    def applied_lsn(self) -> int:
        return self._lsn

    @property
    def epoch(self) -> int:
        """Of the last applied record."""
        return self._epoch

    def load(self, version: int | None = None) -> ShardView:
        """Load a manifest version (the newest without one) beside what is served; its segments are self-tested.

        The view is at the LSN of the others. An older version of a generation that is held changes nothing.
        """
        manifest = self._log.newest_live() if version is None else self._log.read(version)
        held = self._generations.get(manifest.generation)
        if held is not None and held.view.version >= manifest.version:
            held.stand_for((manifest.version,))
            return held.view
        fresh = self._from_files(manifest)
        if not self._generations:
            self._begin(fresh)
        before = self._cached_files()
        view = self._join(fresh)
        self._delete_unused(before)
        return view

    def _from_files(self, manifest: Manifest) -> LiveGeneration:
        """The generation as its manifest's files have it, at their applied LSN."""
        loaded = {s.description.segment_id: s for view in self._views() for s in view.segments}
        entry = _entry(manifest, self.number)
        metric = manifest.config.metric
        segments = tuple(
            loaded.get(ref.segment_id) or load_segment(self._store, self.collection, ref, metric, self._cache_dir)
            for ref in entry.segments
        )
        return LiveGeneration(manifest, segments, self._selections(entry, segments), entry.applied_lsn, entry.epoch)

    def _selections(self, entry: ShardEntry, segments: Sequence[LoadedSegment]) -> dict[str, RowSelection]:
        counts = {segment.description.segment_id: segment.description.count for segment in segments}
        selections = {}
        for ref in entry.tombstones:
            count = counts[ref.segment_id]
            rows = read_tombstones(self._store, self.collection, self.number, ref, count)
            selections[ref.segment_id] = RowSelection.everything(count).without(rows)
        return selections

    def _begin(self, fresh: LiveGeneration) -> None:
        """The first generation: go on where its files end, to where the WAL ends now."""
        last, _ = self.wal.end(fresh.view.lsn, fresh.epoch)
        for record in self.wal.read_after(fresh.view.lsn, last):
            fresh.apply(record)
        fresh.check()
        with self._lock:
            if not self._generations:
                self._lsn, self._epoch, self._failure = fresh.view.lsn, fresh.epoch, ""
                self._generations = {fresh.view.generation: fresh}

    def _join(self, fresh: LiveGeneration) -> ShardView:
        """Bring a generation to the LSN of the others while records go on coming, then publish it."""
        records: list[WalRecord] = []
        with self._lock:
            until = self._lsn
            self._joining.append(records)
        try:
            for record in self.wal.read_after(fresh.view.lsn, until):
                fresh.apply(record)
            self._reach(fresh.applied_lsn)
            self._publish_at_the_end(fresh, records)
        finally:
            with self._lock:
                self._joining = [waiting for waiting in self._joining if waiting is not records]
        return fresh.view

    def _reach(self, lsn: int) -> None:
        """Bring what is served to an LSN that was sealed before it was applied here, as far as the WAL goes back."""
        if self._led_as:
            with self._moved:
                self._moved.wait_for(lambda: self._lsn >= lsn or not self._led_as, APPLY_WAIT_S)
                if self._led_as and self._lsn < lsn:
                    raise Unavailable(f"{self._name} did not reach LSN {lsn} within {APPLY_WAIT_S:g} s")
        if self._lsn < lsn:
            self.catch_up(lsn)

    def _publish_at_the_end(self, fresh: LiveGeneration, records: list[WalRecord]) -> None:
        """Apply what comes meanwhile until little is left, and publish.

        Where writes come as fast as they are applied here, what is left does not get less by itself: then they wait.
        """
        before = sys.maxsize
        while True:
            with self._lock:
                coming, records[:] = records.copy(), []
                if len(coming) <= APPLIED_AT_PUBLISH or len(coming) > before // 2:
                    self._apply_to_joining(fresh, coming)
                    self._publish(fresh)
                    return
            self._apply_to_joining(fresh, coming)
            before = len(coming)

    def _apply_to_joining(self, fresh: LiveGeneration, coming: Sequence[WalRecord]) -> None:
        last = coming[0].lsn - 1 if coming else self._lsn
        if fresh.view.lsn < last:
            missing = f"records {fresh.view.lsn + 1} to {last}"
            raise Unavailable(f"the WAL of {self._name} lacks {missing}, which were applied here")
        for record in coming:
            fresh.apply(record)

    def _publish(self, fresh: LiveGeneration) -> None:
        """Under the lock. Dropped is what cannot follow: its WAL is gone, or it is of a collection deleted since."""
        generation = fresh.view.generation
        held = self._generations.get(generation)
        if held is fresh:
            return
        if held is not None:
            if held.view.version >= fresh.view.version:  # another load was faster
                held.stand_for(fresh.versions)
                return
            fresh.stand_for(held.versions)
        kept = {g: other for g, other in self._generations.items() if other.takes_records_of(fresh)}
        self._generations = {**kept, generation: fresh}
        self._lsn, self._epoch = fresh.view.lsn, fresh.epoch

    @property
    def _name(self) -> str:
        return f"shard {self.number} of {self.collection!r}"

    # --- writes -------------------------------------------------------------------------------------------------

    def catch_up(self, until: int | None = None) -> int:
        """Apply what others wrote, to the end of the WAL or to an LSN; returns the applied LSN.

        Nothing while this one leads.
        """
        if self._generations and not self._led_as:
            for record in self.wal.read_after(self._lsn, until):
                self._apply(record, own=False)
        return self._lsn

    def receive(self, data: bytes) -> None:
        """A record that the primary has written: applied if it is the next; after a gap the WAL is read."""
        lsn = lsn_of(data)
        if lsn <= self._lsn or self._led_as or not self._generations:
            return
        if lsn > self._lsn + 1:
            self.catch_up()
            return
        self._apply(WalRecord.decode(data, f"pushed record {lsn}", self.number, lsn, self.collection), own=False)

    def apply_own(self, record: WalRecord) -> Existed | None:
        """Apply a record that this replica wrote as primary; which ids there were in the newest generation.

        None where a replay has applied it already, after this replica stopped leading. Unavailable where it cannot be
        applied, because nothing is loaded or a record before it failed.
        """
        existed = self._apply(record, own=True)
        if not self._generations or self._lsn < record.lsn:
            raise Unavailable(f"{self._name} cannot apply record {record.lsn}: {self.status().error or self._lsn}")
        return existed

    def _apply(self, record: WalRecord, *, own: bool) -> Existed | None:
        """Apply the next record to every generation. Others' records are ignored while this replica leads."""
        with self._lock:
            if not self._generations or record.lsn != self._lsn + 1 or (self._led_as and not own):
                return None
            existed = NOTHING
            try:
                for _, generation in sorted(self._generations.items()):
                    existed = generation.apply(record)
            except Exception as error:
                self._generations = {}  # half applied: nothing is served before it was loaded anew
                self._led_as = 0
                self._failure = f"record {record.lsn}: {type(error).__name__}: {error}"
                raise
            self._lsn, self._epoch = record.lsn, record.epoch
            self._moved.notify_all()
            for waiting in self._joining:
                waiting.append(record)
            return existed

    def lead(self, claim: WalRecord) -> bool:
        """Be the primary from this claim on, which is in the WAL; False where something came before it, or after."""
        with self._lock:
            next_one = claim.lsn == self._lsn + 1
            if not self._generations or not (next_one or (claim.lsn, claim.epoch) == (self._lsn, self._epoch)):
                return False
            self._led_as = claim.epoch
        if next_one:
            self._apply(claim, own=True)
        return True

    def follow(self, epoch: int) -> None:
        """Be no primary of this epoch any more."""
        with self._lock:
            if self._led_as == epoch:
                self._led_as = 0
            self._moved.notify_all()

    # --- reads --------------------------------------------------------------------------------------------------

    def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        """One `Hits`, or the error of that group alone, per group. Unavailable where the generation is not held."""
        return self.view(request.generation).search(request)

    def fetch(self, generation: int, ids: Any, columns: Sequence[str]) -> tuple[NDArray[np.bool_], Any]:
        """(found (n,), table of `columns` for the found ids in their order) for an Arrow array of ids."""
        return self.view(generation).fetch(ids, columns)

    def view(self, generation: int) -> ShardView:
        """What is held of a generation now; Unavailable where nothing is."""
        held = self._generations.get(generation)
        if held is None:
            raise Unavailable(f"generation {generation} of {self.collection!r} is not loaded here", 0.1)
        return held.view

    def newest(self) -> LiveGeneration | None:
        """The newest generation that is held."""
        return max(self._generations.values(), key=lambda held: held.view.generation, default=None)

    def retire(self, generation: int) -> None:
        """Drop every generation older than this one, and their cached files that no later one uses."""
        before = self._cached_files()
        with self._lock:
            self._generations = {g: held for g, held in self._generations.items() if g >= generation}
        self._delete_unused(before)

    def _delete_unused(self, before: set[Path]) -> None:
        """Delete cached files that were in use before and are not now; who has mapped one keeps it."""
        for path in before - self._cached_files():
            path.unlink(missing_ok=True)

    def _views(self) -> list[ShardView]:
        return [held.view for _, held in sorted(self._generations.items())]

    def _cached_files(self) -> set[Path]:
        """Where the files of all views lie if they are cached; equal files are one."""
        segments = (segment for view in self._views() for segment in view.segments)
        return {cached_path(self._cache_dir, entry) for s in segments for entry in s.description.files.values()}

    def status(self) -> ReplicaStatus:
        held = [one for _, one in sorted(self._generations.items())]
        if not held:
            return ReplicaStatus("failed", error=self._failure or "nothing is loaded")
        views = [one.view for one in held]
        newest = views[-1]
        return ReplicaStatus(
            "ready",
            tuple(sorted({version for one in held for version in one.versions})),
            tuple(view.generation for view in views),
            newest.points,
            segments=tuple(_segment_facts(segment, newest) for segment in newest.segments),
            attributes={v.generation: {name: str(dtype) for name, dtype in v.attributes.items()} for v in views},
            lsn=self._lsn,
            epoch=self._led_as,
            tail_points=newest.tail_points,
            tombstones=newest.tombstones,
        )


def _entry(manifest: Manifest, shard: int) -> ShardEntry:
    """The shard's entry in a manifest; an empty one where that generation has fewer shards."""
    return manifest.shards[shard] if shard < len(manifest.shards) else ShardEntry(shard)


def _segment_facts(segment: LoadedSegment, view: ShardView) -> dict[str, Any]:
    description, selection = segment.description, view.selection(segment)
    return {
        "segment_id": description.segment_id,
        "count": description.count,
        "tombstones": 0 if selection is None else selection.count - selection.kept,
        "index_kind": segment.spec.kind,
        "index_params": segment.spec.params,
        "codes": segment.spec.codes,
        "rerank_store": segment.spec.rerank_store,
        "index_bytes": description.files["index.faiss"].size_bytes,
        "rows_bytes": description.files["rows.arrow"].size_bytes,
        "predicted_bytes": segment.spec.predicted_bytes,
        "reason": segment.spec.reason,
        "considered": list(description.considered),
        "operating_points": [vars(point) for point in description.operating_points],
        "attributes": description.attributes,
        "built": description.built,
    }
