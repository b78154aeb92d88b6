"""Deleting the files of a collection that was deleted; what a later one of the same name needs or writes stays.

What branches of it name stays as well. It is deleted first and then looked who names its segments; who branches commits
first and then looks whether the origin still lives. So one of the two sees the other.
"""

from __future__ import annotations

import logging

from cluster import paths
from cluster.errors import Corrupt, NotFound
from cluster.garbage import GRACE_S
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.references import references_of_others
from cluster.segment import delete_segment
from cluster.snapshots import Snapshot
from cluster.stored_object import parsed
from cluster.wal import Wal

logger = logging.getLogger(__name__)


def delete_files(store: ObjectStore, log: ManifestLog, deleted: Manifest) -> None:
    """Delete snapshots, segments, tombstone files and WAL records of all versions before `deleted`
    (`ManifestLog.delete`).

    Manifests stay, and of each WAL the claims and ends: they keep writers of the deleted collection out. Where what
    others name cannot be read, segments stay: `collect_garbage` tells of it, and deletes them once it can be.
    """
    name = deleted.collection
    _delete_snapshots(store, deleted)
    others = references_of_others(store, deleted, GRACE_S)
    for unreadable in others.unreadable.values():
        logger.warning("the segments of %r stay behind: they may be named by what cannot be read: %s", name, unreadable)
    for segment_id in log.segments_until(deleted.version):
        if not others.names_segment(name, segment_id):
            delete_segment(store, name, segment_id)
    _delete_logs(store, deleted)
    for entry in deleted.shards:
        for info in list(store.objects(paths.tombstones_prefix(name, entry.shard))):
            lsn = paths.tombstones_lsn(info.key)
            if lsn is not None and lsn <= entry.applied_lsn:
                store.delete(info.key)


def _delete_snapshots(store: ObjectStore, deleted: Manifest) -> None:
    """Those of versions before `deleted`, first of all, so that none names what is gone."""
    for info in list(store.objects(paths.snapshots_prefix(deleted.collection))):
        if paths.snapshot_name(info.key) is None:
            continue
        try:
            later = Snapshot.decode(store.get(info.key), info.key).version > deleted.version
        except Corrupt:
            later = False
        except NotFound:
            continue
        if not later:
            store.delete(info.key)


def _delete_logs(store: ObjectStore, deleted: Manifest) -> None:
    """What was written before the claims that `deleted` names, and all of earlier log sets, which nobody writes to."""
    name = deleted.collection
    for entry in deleted.shards:
        Wal(store, name, entry.shard, deleted.log_set).delete_before(entry.applied_lsn)
    earlier = {
        (found.log_set, found.shard)
        for info in store.objects(paths.shards_prefix(name))
        if (found := parsed(info.key)) is not None and found.kind == "wal" and found.log_set < deleted.log_set
    }
    for log_set, shard in sorted(earlier):
        wal = Wal(store, name, shard, log_set)
        wal.delete_before(wal.last_listed())
