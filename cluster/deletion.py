"""Deleting the files of a collection that was deleted; what a later one of the same name needs or writes stays."""

from __future__ import annotations

from cluster import paths
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.segment import delete_segment
from cluster.wal import Wal


def delete_files(store: ObjectStore, log: ManifestLog, deleted: Manifest) -> None:
    """Delete segments, tombstone files and WAL records of all versions before `deleted` (`ManifestLog.delete`).

    Manifests stay, and of each WAL the claims: they keep writers of the deleted collection out.
    """
    name = deleted.collection
    for segment_id in log.segments_until(deleted.version):
        delete_segment(store, name, segment_id)
    for entry in deleted.shards:
        Wal(store, name, entry.shard).delete_before(entry.applied_lsn)
        for info in list(store.objects(paths.tombstones_prefix(name, entry.shard))):
            lsn = paths.tombstones_lsn(info.key)
            if lsn is not None and lsn <= entry.applied_lsn:
                store.delete(info.key)
