"""What must stay: everything that a manifest which somebody may still need names, of all collections of a store.

Needed are, of every collection: the newest manifest; the last of the generation before it, to which a rollback goes
back, and where that is crossing the ones before it too, one of which is served; all that were the newest one within the
grace period, since who read them then may still work with them; those that snapshots name. With them: their segments,
in whichever collection these lie, their tombstone files, and the WAL records after their positions.

Nothing is ever taken back during one run: what was named once stays named. So a manifest is read once, whatever is
committed meanwhile only adds to what stays, and memory grows with what is named, not with what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cluster import paths
from cluster.errors import Corrupt, NotFound
from cluster.manifest import Manifest, ManifestLog, collection_names
from cluster.object_store import ObjectStore
from cluster.shard_entry import ShardEntry
from cluster.snapshots import list_snapshots

EVERYWHERE = ""  # of `InUse.held`: nobody knows which collection it is
READ_TRIES = 3  # of a collection whose manifests another run deletes at the same time


@dataclass(frozen=True)
class InUse:
    """What is worked with now: `held` are collections in which everything stays, and why (a job that works on them).

    `served` is the version of each collection that searches go to, where somebody knows it.
    """

    held: Mapping[str, str] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)


@dataclass
class CollectionReferences:
    """What the manifests of one collection need of it. `newest` is None where it has none."""

    newest: Manifest | None = None
    held: str = ""  # why everything stays; "" where it does not
    served: int | None = None  # the version that searches go to, where that is known
    named: set[int] = field(default_factory=set)  # versions whose files are known
    logged: set[int] = field(default_factory=set)  # versions whose positions are known
    _bounds: dict[tuple[int, int], int] = field(default_factory=dict)  # of a log: records up to there are not needed
    _first_set: int | None = None  # the earliest log set that a manifest writes to: later ones are needed whole

    def add_logs(self, manifest: Manifest) -> None:
        """The records that a manifest needs: after its positions, and all of later sets, for a rollback to it."""
        first = self._first_set
        self._first_set = manifest.log_set if first is None else min(first, manifest.log_set)
        for entry in manifest.shards:
            for log, lsn in positions_of(entry, manifest.log_set).items():
                self._bounds[log] = min(lsn, self._bounds.get(log, lsn))

    def needed_after(self, log_set: int, shard: int) -> int | None:
        """The LSN after which the records of a log are needed, 0: all; None where none is."""
        if self._first_set is None:  # no manifest: nobody can have been told that a record was written
            return None
        return 0 if log_set > self._first_set else self._bounds.get((log_set, shard))

    def needs_record(self, log_set: int, shard: int, lsn: int) -> bool:
        after = self.needed_after(log_set, shard)
        return after is not None and lsn > after

    def may_write_tombstones(self, shard: int, lsn: int) -> bool:
        """Whether a seal may still come to write, or find, a tombstone file of that LSN (`write_tombstones`).

        What it writes has an LSN over that of the newest manifest.
        """
        if self.newest is None or not self.newest.shards:
            return False
        floors = {entry.shard: min(positions_of(entry, 0).values()) for entry in self.newest.shards}
        return lsn > floors.get(shard, min(floors.values()))


def positions_of(entry: ShardEntry, log_set: int) -> dict[tuple[int, int], int]:
    """(log set, shard) -> the last LSN of that log which an entry does not need; `log_set` is its manifest's."""
    if not entry.behind:
        return {(log_set, entry.shard): entry.applied_lsn}
    found = {(log_set, entry.shard): 0}
    for logs in entry.behind:
        known = {at.shard: at.lsn for at in logs.positions}
        found |= {(logs.number, shard): known.get(shard, 0) for shard in range(logs.shards)}
    return found


class References:
    """What is named in a store at `now_s` of its clock. `in_use` is asked at each look."""

    def __init__(self, store: ObjectStore, now_s: float, grace_s: float, in_use: Callable[[], InUse] = InUse) -> None:
        self._store = store
        self._young_s = now_s - grace_s
        self._in_use = in_use
        self._collections: dict[str, CollectionReferences] = {}
        self._segments: dict[str, set[str]] = {}  # by the collection that holds their files
        self._tombstones: set[str] = set()
        self.unreadable: dict[str, str] = {}  # collection -> what of it cannot be read; may name any segment

    def refresh(self, leave_out: str | None = None) -> None:
        """Read what was committed since. Raises Unavailable.

        First the jobs, then snapshots, then manifests. A job commits before it says that it ended; who branches from a
        snapshot commits before it looks whether the snapshot is still there. So either the first is seen here, or what
        it committed. `leave_out` is a collection whose own manifests do not count.
        """
        in_use = self._in_use()
        named = {name: self._snapshots(name) for name in self._names(leave_out)}
        for name in self._names(leave_out):
            known = self.of(name)
            known.held = known.held or in_use.held.get(name, in_use.held.get(EVERYWHERE, ""))
            known.served = in_use.served.get(name, known.served)
            try:
                self._read_whole(name, known, named.get(name, set()))
            except (Corrupt, NotFound) as error:
                self.unreadable[name] = known.held = str(error)

    def _read_whole(self, name: str, known: CollectionReferences, snapshots: set[int]) -> None:
        for left in reversed(range(READ_TRIES)):
            try:
                self._read(name, known, snapshots)
                return
            except NotFound:  # a manifest that was listed; what is needed is never deleted
                if not left:
                    raise

    def of(self, collection: str) -> CollectionReferences:
        return self._collections.setdefault(collection, CollectionReferences())

    def names_segment(self, home: str, segment_id: str) -> bool:
        return bool(self.unreadable) or segment_id in self._segments.get(home, ())

    def names_tombstones(self, key: str) -> bool:
        return key in self._tombstones

    def segments_of(self, home: str) -> frozenset[str]:
        """The segments with files in a collection that are named, by whatever collection."""
        return frozenset(self._segments.get(home, ()))

    def held_collections(self) -> dict[str, str]:
        """Collection -> why everything in it stays."""
        return {name: known.held for name, known in sorted(self._collections.items()) if known.held}

    def _names(self, leave_out: str | None) -> list[str]:
        return [name for name in collection_names(self._store) if name != leave_out]

    def _snapshots(self, name: str) -> set[int]:
        try:
            return {snapshot.version for snapshot in list_snapshots(self._store, name)}
        except Corrupt as error:
            self.unreadable[name] = self.of(name).held = str(error)
            return set()

    def _read(self, name: str, known: CollectionReferences, snapshots: set[int]) -> None:
        log = ManifestLog(self._store, name, _no_nonce)
        since = _times(self._store, name)
        versions = sorted(since)
        if not versions:
            return
        if known.newest is None or known.newest.version != versions[-1]:
            known.newest = log.read(versions[-1])
            self._add(known, known.newest)
            for target in _rollback_targets(log, known.newest):
                self._add(known, target)
        for version in _newest_since(versions, since, self._young_s) if not known.held else versions:
            self._add_version(log, known, version)
        if known.served in since:
            self._add_version(log, known, known.served)
        if known.newest.state == "live":
            for version in snapshots & since.keys():
                self._add_version(log, known, version, logs=False)

    def _add_version(self, log: ManifestLog, known: CollectionReferences, version: int, logs: bool = True) -> None:
        if version not in known.named or (logs and version not in known.logged):
            self._add(known, log.read(version), logs)

    def _add(self, known: CollectionReferences, manifest: Manifest, logs: bool = True) -> None:
        name = manifest.collection
        known.named.add(manifest.version)
        if logs and manifest.version not in known.logged:
            known.logged.add(manifest.version)
            known.add_logs(manifest)
        for ref in manifest.segments.values():
            self._segments.setdefault(ref.home(name), set()).add(ref.segment_id)
        self._tombstones |= tombstone_keys(manifest)


def tombstone_keys(manifest: Manifest) -> set[str]:
    name = manifest.collection
    return {
        paths.tombstones(name, entry.shard, ref.segment_id, ref.lsn, ref.variant)
        for entry in manifest.shards
        for ref in entry.tombstones
    }


def _times(store: ObjectStore, collection: str) -> dict[int, float]:
    """Version -> when it was committed, by the store's clock."""
    found = ((paths.manifest_version(info.key), info) for info in store.objects(paths.manifest_prefix(collection)))
    return {version: info.modified_s for version, info in found if version is not None}


def _newest_since(versions: list[int], since: Mapping[int, float], young_s: float) -> Iterable[int]:
    """The versions that were the newest one at some time since `young_s`."""
    followed = zip(versions, [*versions[1:], None], strict=True)
    return [version for version, then in followed if then is None or since[then] >= young_s]


def _rollback_targets(log: ManifestLog, newest: Manifest) -> list[Manifest]:
    """The last version of the generation before `newest`, and before that ones where it is crossing, for one that is
    crossing may not be served yet: until one that is not. None of a collection that was deleted before."""
    found: list[Manifest] = []
    for target in log.generations(newest) if newest.state == "live" else ():
        if target.state != "live":
            break
        found.append(target)
        if not target.crossing:
            break
    return found


def references_of_others(store: ObjectStore, newest: Manifest, grace_s: float) -> References:
    """What all collections but one name, as of the commit of the newest version of that one."""
    modified_s = _times(store, newest.collection).get(newest.version, 0.0)
    references = References(store, modified_s, grace_s)
    references.refresh(leave_out=newest.collection)
    return references


def _no_nonce() -> str:
    raise AssertionError("who looks for references commits nothing")
