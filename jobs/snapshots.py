"""Named snapshots of a collection, restoring one in place, and branching one into a new collection without copying."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cluster.attributes import arrow_type
from cluster.config import check_collection_name
from cluster.deletion import delete_files
from cluster.errors import Conflict, EaglerayError, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry, TombstonesRef
from cluster.object_store import ObjectStore
from cluster.rollback import check_kept, put_back_unless_kept, switch_back
from cluster.snapshots import (
    Snapshot,
    check_snapshot_name,
    create_snapshot,
    delete_snapshot,
    missing_objects,
    read_snapshot,
)
from cluster.tombstones import read_tombstones, write_tombstones
from jobs.report import JobReporter
from jobs.sealing import Sealer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotOptions:
    """`name` has lower-case letters, digits, `_` and `-`, at most 63."""

    collection: str
    name: str


@dataclass(frozen=True)
class RestoreOptions:
    collection: str
    snapshot: str


@dataclass(frozen=True)
class BranchOptions:
    """`into` is the new collection. Without a snapshot it is branched as of now."""

    collection: str
    into: str
    snapshot: str | None = None


def now_utc() -> datetime:
    return datetime.now(UTC)


# --- snapshot -----------------------------------------------------------------------------------------------------


def take_snapshot(
    store: ObjectStore,
    sealer: Sealer,
    options: SnapshotOptions,
    reporter: JobReporter,
    now: Callable[[], datetime] = now_utc,
) -> Snapshot:
    """Seal every shard, so that every write that was acknowledged before is in files, and name the version reached.

    Conflict where the name has another version, NotFound where the collection is deleted meanwhile. What was sealed
    before an error stays sealed.
    """
    check_snapshot_name(options.name)
    check_collection_name(options.collection)
    manifest = sealer.sealed(options.collection, reporter)
    reporter.phase("name")
    snapshot = create_snapshot(store, options.name, manifest, now())
    try:  # who deletes or collects looks for the name after that: one of the two sees the other
        newest = sealer.log.newest() or manifest
        check_not_deleted_since(sealer.log, manifest.version, newest, f"snapshot {options.name!r}")
        if missing := missing_objects(store, manifest):
            raise Conflict(f"version {manifest.version}: {missing[0]} was collected meanwhile; take the snapshot again")
    except (NotFound, Conflict):
        with suppress(NotFound):
            delete_snapshot(store, options.collection, options.name)
        raise
    return snapshot


def named_version(store: ObjectStore, log: ManifestLog, collection: str, name: str) -> Manifest:
    """The version that a snapshot names; NotFound where the collection was deleted since."""
    snapshot = read_snapshot(store, collection, name)
    newest = log.newest_live()
    check_not_deleted_since(log, snapshot.version, newest, f"snapshot {name!r}")
    return log.read(snapshot.version)


def check_not_deleted_since(log: ManifestLog, version: int, newest: Manifest, what: str) -> None:
    """NotFound where the collection was deleted after a version; one of its name may have been created again."""
    if any(manifest.state == "deleted" for manifest in (newest, *log.generations(newest, after=version))):
        raise NotFound(f"{what} is of a collection {newest.collection!r} that was deleted")


def _check_named(store: ObjectStore, collection: str, name: str, manifest: Manifest) -> None:
    """NotFound where the snapshot does not name that version any more."""
    if read_snapshot(store, collection, name).version != manifest.version:
        raise NotFound(f"snapshot {name!r} of {collection!r} is of another version now")


def attribute_types_of(manifest: Manifest) -> dict[str, Any]:
    return {name: arrow_type(text) for name, text in manifest.attributes.items()}


# --- restore ------------------------------------------------------------------------------------------------------


def restore(store: ObjectStore, log: ManifestLog, options: RestoreOptions) -> Manifest:
    """Commit the snapshot's points as the next generation; returns its manifest.

    Writes that were acknowledged before this began are replaced, later ones stay on top, as with an import. It can be
    rolled back, and is switched to as the newest generation was (`commit_rollback`). NotFound where there is no such
    snapshot, or a file of it is gone; Conflict while the collection is being switched to another number of shards, or
    where something else was committed first.
    """
    check_collection_name(options.collection)
    base = log.newest_live()  # first: one that was deleted and created again since is found with the snapshot
    named = named_version(store, log, options.collection, options.snapshot)
    what = f"snapshot {options.snapshot!r} of {options.collection!r}"
    ends = log.wal_ends(base, len(named.shards))
    entries = tuple(
        replace(end, segments=entry.segments, tombstones=entry.tombstones)
        for end, entry in zip(ends, named.shards, strict=True)
    )

    def check(manifest: Manifest) -> None:
        check_kept(store, manifest, what)
        _check_named(store, options.collection, options.snapshot, named)

    check(named)
    types = attribute_types_of(named)
    how = switch_back(base, named)
    committed = log.commit_generation(base, named.config, entries, types, how, num_gpus=named.num_gpus)
    put_back_unless_kept(store, log, base, committed, check)
    return committed


# --- branch -------------------------------------------------------------------------------------------------------


def check_branch(into: ManifestLog, options: BranchOptions) -> Manifest | None:
    """The newest version of a collection of that name that was deleted, if there was one; Conflict where one exists."""
    check_collection_name(options.into)
    if options.into == options.collection:
        raise Invalid.at("into", f"{options.into!r} is the collection to branch")
    before = into.newest()
    if before is not None and before.state == "live":
        raise Conflict(f"collection {options.into!r} exists: delete it first, or take another name")
    return before


def branch(
    store: ObjectStore, log: ManifestLog, into: ManifestLog, origin: Manifest, options: BranchOptions
) -> Manifest:
    """Create a collection whose first version names the segments of `origin`, a version of another; returns it.

    Vectors are not copied. The new collection has the config of that version, writes to its own logs, and goes on by
    itself; who deletes files asks what it names. Conflict where it exists. Where the origin was deleted while this ran,
    or its snapshot, or files were collected, the branch is deleted again, and Conflict raised.
    """
    before = check_branch(into, options)
    if origin.crossing:
        raise Conflict(f"version {origin.version} of {origin.collection!r} is being switched to: try again")
    check_not_deleted_since(log, origin.version, log.newest_live(), f"version {origin.version}")
    ends = into.wal_ends(before, len(origin.shards))
    entries = tuple(
        _branched(store, origin, entry, options.into, end) for entry, end in zip(origin.shards, ends, strict=True)
    )
    types = attribute_types_of(origin)
    committed = into.commit_generation(before, origin.config, entries, types, num_gpus=origin.num_gpus)
    try:
        why = _lost(store, log, origin, committed, options)
    except Unavailable as error:
        raise Unavailable(
            f"collection {options.into!r} was branched, but whether all of it is there could not be seen: {error}; "
            "delete it and branch again"
        ) from error
    if why:
        _undo(store, into, committed)
        raise Conflict(f"{why} while it was branched: collection {options.into!r} was deleted again")
    return committed


def _branched(store: ObjectStore, origin: Manifest, entry: ShardEntry, into: str, end: ShardEntry) -> ShardEntry:
    """The entry of the new collection: the same segments where they are, tombstone files of its own."""

    def elsewhere(ref: SegmentRef) -> SegmentRef:
        home = ref.home(origin.collection)
        return replace(ref, origin="" if home == into else home)

    counts = {ref.segment_id: ref.count for ref in entry.segments}

    def rewritten(ref: TombstonesRef) -> TombstonesRef:
        rows = read_tombstones(store, origin.collection, entry.shard, ref, counts[ref.segment_id])
        return write_tombstones(store, into, entry.shard, ref.segment_id, end.applied_lsn, rows)

    segments = tuple(elsewhere(ref) for ref in entry.segments)
    return replace(end, segments=segments, tombstones=tuple(rewritten(ref) for ref in entry.tombstones))


def _lost(
    store: ObjectStore,
    log: ManifestLog,
    origin: Manifest,
    committed: Manifest,
    options: BranchOptions,
) -> str | None:
    """Why the branch cannot stay, if so. From its commit on nobody deletes what it names: was something gone before?"""
    newest = log.newest()
    if newest is None or newest.state == "deleted":
        return f"collection {options.collection!r} was deleted"
    try:
        check_not_deleted_since(log, origin.version, newest, f"version {origin.version}")
        if options.snapshot is not None:
            _check_named(store, options.collection, options.snapshot, origin)
    except NotFound as error:
        return f"{error},"
    if missing := missing_objects(store, committed):
        return f"{missing[0]} was collected"
    return None


def _undo(store: ObjectStore, into: ManifestLog, committed: Manifest) -> None:
    """Delete the branch; its files stay as garbage where that fails after its end was committed."""
    newest = into.newest()
    if newest is None or newest.state == "deleted" or newest.generation != committed.generation:
        return
    deleted = into.delete()
    try:
        delete_files(store, into, deleted)
    except EaglerayError as error:
        logger.warning("files of %r are left behind: %s", committed.collection, error)
