"""One replica's work: hold generations of one shard, follow its WAL, search and fetch. Runs without Ray.

Every generation is a `LiveGeneration`, and all of one log set are at one LSN. `load` brings one to that LSN beside
what is served, `apply` moves all of them on by a record. One of a later log set is a `Crossing` until it has read the
earlier logs to their ends; when it arrives, the shard goes on with its log, and the generations of earlier sets stay as
they are, for queries that began there. A lock guards the list of generations and the order of records; searches never
take it, and it is not held while storage is read.
"""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.crossing import Crossing
from actors.generation_files import GenerationFiles
from actors.gpu_device import GpuDevice
from actors.live_generation import NOTHING, Existed, LiveGeneration
from actors.replica_status import LogFacts, ReplicaStatus, status_of
from actors.shard_view import ShardView
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.query import Hits, ShardSearch
from cluster.wal import Wal, WalRecord, lsn_of

__all__ = ["ReplicaStatus", "Shard", "ShardView"]

APPLY_WAIT_S = 30.0  # for a record that is durable and waits to be applied by this process
APPLIED_AT_PUBLISH = 16  # records that a generation may lack when it is published; writes wait while it applies them


class Shard:
    """The generations of one shard. `load` adds one or renews it, `retire` drops old ones.

    `before_arrival` is called when the log of a later set is about to take the place of the one that is followed: who
    leads that one has to give up. What was built for a GPU is placed on `device`; `no_gpu`: why there is none. One that
    is `on_cpus` holds such a generation only until others serve it: its twin is loaded, whatever `cpu_twin` says.
    """

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        shard: int,
        cache_dir: Path,
        new_nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
        device: GpuDevice | None = None,
        on_cpus: bool = False,
        no_gpu: str = "",
    ) -> None:
        self.collection = collection
        self.number = shard
        self._name = f"shard {shard} of {collection!r}"
        self.wal = Wal(store, collection, shard, 0)
        self.new_nonce = new_nonce
        self.before_arrival: Callable[[], None] = lambda: None
        self.crossing: Crossing | None = None
        self._store = store
        self._files = GenerationFiles(store, collection, shard, cache_dir, device, on_cpus, no_gpu)
        self._log = ManifestLog(store, collection, new_nonce)
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)  # on to another LSN
        self._generations: dict[int, LiveGeneration] = {}  # by generation; replaced, never changed in place
        self._joining: list[list[WalRecord]] = []  # records for generations that are being loaded
        self._log_set = 0  # of the log that is followed
        self._log_start = 0
        self._log_ended = False
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

    @property
    def log_ended(self) -> bool:
        """Whether the end of the log was applied: nothing more can be written to it."""
        return self._log_ended

    # --- loads --------------------------------------------------------------------------------------------------

    def load(self, version: int | None = None) -> ShardView:
        """Load a manifest version (the newest without one) beside what is served; its segments are self-tested.

        The view is at the LSN of the others. An older version of a generation that is held changes nothing. One of a
        later log set is a `crossing` for as long as the earlier logs are written to: then it is held only once
        `advance` and `arrive` have brought it to its own log. NotFound for a version without this shard.
        """
        return self._load(self._log.newest_live() if version is None else self._log.read(version))

    def renew(self) -> None:
        """Load the newest version, if its log is the one that is followed here. NotFound without a collection."""
        manifest = self._log.newest_live()
        if self.number < len(manifest.shards) and manifest.log_set == self._log_set:
            self._load(manifest)

    def _load(self, manifest: Manifest) -> ShardView:
        if self.number >= len(manifest.shards):
            raise NotFound(f"version {manifest.version} of {self.collection!r} has no shard {self.number}")
        held = self._generations.get(manifest.generation)
        if held is not None and held.view.version >= manifest.version:
            held.stand_for((manifest.version,))
            return held.view
        before = self._files.cached(self._views())
        crossing = self.crossing
        if crossing is not None and crossing.number < manifest.generation:
            self.crossing = None
        later = bool(self._generations) and manifest.log_set > self._log_set
        under_way = crossing is not None and crossing.number == manifest.generation
        if later or under_way or (not self._generations and not self._files.may_begin(manifest)):
            view = self._cross(manifest)
        elif self._generations and manifest.log_set < self._log_set:
            view = self._keep_past(manifest)
        else:
            fresh = self._files.at_own_log(manifest, self._views())
            if not self._generations:
                self._begin(fresh)
            view = self._join(fresh)
        self._files.delete_unused(before, self._views())
        return view

    def _wal_of(self, log_set: int) -> Wal:
        return self.wal if log_set == self._log_set else Wal(self._store, self.collection, self.number, log_set)

    def _begin(self, fresh: LiveGeneration) -> None:
        """Go on with the log of this generation, from where its files end to where the log ends now.

        For the first generation, and for one whose log takes the place of another: then what is held stays as it is.
        """
        wal = self._wal_of(fresh.log_set)
        last, _ = wal.end(fresh.view.lsn, fresh.epoch)
        fresh.replay(wal.read_after(fresh.view.lsn, last))
        fresh.check()
        at_end = wal.read(fresh.view.lsn) if fresh.view.lsn else None
        start = self._files.log_start(fresh)
        with self._lock:
            if self._generations and self._log_set >= fresh.log_set:
                return
            self.wal, self._log_set, self._log_start = wal, fresh.log_set, start
            self._log_ended = at_end is not None and at_end.kind == "end"
            self._lsn, self._epoch, self._led_as, self._failure = fresh.view.lsn, fresh.epoch, 0, ""
            self._generations = {**self._generations, fresh.view.generation: fresh}
            self._moved.notify_all()

    # --- another log set ----------------------------------------------------------------------------------------

    def _cross(self, manifest: Manifest) -> ShardView:
        """Begin to read the earlier logs, or go on, and arrive if that can be. While they grow it is not held."""
        crossing = self.crossing  # another thread may drop it
        if crossing is None or not crossing.stands_for(manifest):
            self.crossing = crossing = self._files.crossing(manifest, self._views())
            if not self._files.may_begin(manifest):
                return crossing.generation.view
        if self.advance():
            self.arrive()
        return crossing.generation.view

    def advance(self) -> bool:
        """Have the crossing read on; returns whether it can arrive. A broken one is dropped, to be loaded anew."""
        crossing = self.crossing
        try:
            return crossing is not None and crossing.advance()
        finally:
            if crossing is not None and crossing.broken and self.crossing is crossing:
                self.crossing = None

    def arrive(self) -> None:
        """Go on with the log of the crossing, if it has read all that is before; by the thread that loads and leads."""
        crossing = self.crossing
        if crossing is None or not crossing.crossed:
            return
        self.before_arrival()
        with self._lock:
            self._led_as = 0
            self._moved.notify_all()
        self.catch_up()  # for queries that go on in the generations of this log
        self.crossing = None
        try:
            self._begin(crossing.arrived())
        except Unavailable:  # the log could not be read on; after anything else a record may be applied by half
            self.crossing = crossing
            raise

    def _keep_past(self, manifest: Manifest) -> ShardView:
        """A generation of an earlier log set, whose logs have ended: for queries that go on there."""
        fresh = self._files.past(manifest, self._views())
        with self._lock:
            self._generations = {**self._generations, manifest.generation: fresh}
        return fresh.view

    # --- the same log -------------------------------------------------------------------------------------------

    def _join(self, fresh: LiveGeneration) -> ShardView:
        """Bring a generation to the LSN of the others while records go on coming, then publish it."""
        records: list[WalRecord] = []
        with self._lock:
            until = self._lsn
            self._joining.append(records)
        try:
            fresh.replay(self.wal.read_after(fresh.view.lsn, until))
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
        fresh.replay(coming)

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
        held_on = self._generations.items()
        kept = {g: other for g, other in held_on if other.log_set < fresh.log_set or other.takes_records_of(fresh)}
        self._generations = {**kept, generation: fresh}
        self._lsn, self._epoch = fresh.view.lsn, fresh.epoch

    # --- writes -------------------------------------------------------------------------------------------------

    def catch_up(self, until: int | None = None) -> int:
        """Apply what others wrote, to the end of the WAL or to an LSN; returns the applied LSN.

        Nothing while this one leads.
        """
        with self._lock:  # the LSN is one of that log
            follows = bool(self._generations) and not self._led_as and not self._log_ended
            wal, lsn = self.wal, self._lsn
        if follows:
            for record in wal.read_after(lsn, until):
                self._apply(record, own=False)
        return self._lsn

    def receive(self, data: bytes) -> None:
        """A record that the primary has written: applied if it is the next; after a gap the WAL is read."""
        lsn = lsn_of(data)
        if lsn <= self._lsn or self._led_as or self._log_ended or not self._generations:
            return  # what comes after the end is of another log
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
        """Apply the next record to all generations of its log. Others' records are ignored while this replica leads."""
        with self._lock:
            if not self._generations or record.lsn != self._lsn + 1 or (self._led_as and not own) or self._log_ended:
                return None
            existed = NOTHING
            try:
                for _, generation in sorted(self._generations.items()):
                    if generation.log_set == self._log_set:
                        existed = generation.apply(record)
            except Exception as error:
                self._generations = {}  # half applied: nothing is served before it was loaded anew
                self._led_as = 0
                self._failure = f"record {record.lsn}: {type(error).__name__}: {error}"
                raise
            self._lsn, self._epoch, self._log_ended = record.lsn, record.epoch, record.kind == "end"
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

    @property
    def tail_bytes(self) -> int:
        """Of the largest tail that takes the log's records: what is served is not sealed while a newer one waits."""
        tails = (one.view.tail for one in self._generations.values() if one.log_set == self._log_set)
        return max((tail.size_bytes for tail in tails if tail is not None), default=0)

    def retire(self, generation: int) -> None:
        """Drop every generation older than this one, and their cached files that no later one uses."""
        before = self._files.cached(self._views())
        with self._lock:
            self._generations = {g: held for g, held in self._generations.items() if g >= generation}
            crossing = self.crossing
            if crossing is not None and crossing.number < generation:
                self.crossing = None
        self._files.delete_unused(before, self._views())

    def promote(self) -> list[str]:
        """Place on the GPU what it had no room for so far; the segments that it answers for now. By who loads."""
        return self._files.promote(self._views())

    def _views(self) -> list[ShardView]:
        """Of all whose files are in use."""
        crossing = self.crossing
        views = [held.view for _, held in sorted(self._generations.items())]
        return [*views, crossing.generation.view] if crossing is not None else views

    def status(self) -> ReplicaStatus:
        held = [one for _, one in sorted(self._generations.items())]
        log = LogFacts(self._lsn, self._led_as, self._log_set, self._log_start, self._log_ended)
        return status_of(held, self.crossing, self._failure or "nothing is loaded", log)
