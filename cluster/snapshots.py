"""Named snapshots: a name for one version of a collection, whose files stay while the name is there.

The version holds everything that it says in segments and tombstone files: none of its shards is behind a log set.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from cluster import paths
from cluster.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore
from cluster.segment import checksum_bytes

FORMAT = 1
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Snapshot:
    """`created_at` is in ISO 8601; `points` is how many the version holds."""

    name: str
    version: int
    created_at: str
    points: int

    def encode(self) -> bytes:
        body = asdict(self) | {"format": FORMAT}
        return json.dumps(body | {"checksum": checksum_bytes(_canonical(body))}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Snapshot:
        """Parse; Corrupt, naming the object, where the bytes are not what was written under that key."""
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise Corrupt(f"{key}: format {body['format']}, this version reads {FORMAT}")
            checksum = body.pop("checksum")
            if checksum != checksum_bytes(_canonical(body)):
                raise Corrupt(f"{key}: the checksum does not match the content")
            del body["format"]
            snapshot = cls(**body)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(f"{key}: not a snapshot: {error!r}") from error
        if snapshot.name != paths.snapshot_name(key):
            raise Corrupt(f"{key}: holds the snapshot {snapshot.name!r}")
        return snapshot


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def check_snapshot_name(name: str) -> None:
    """Invalid unless it is a name that a snapshot can have."""
    if not NAME.fullmatch(name):
        raise Invalid.at("name", f"{name!r} does not match {NAME.pattern}")


def create_snapshot(store: ObjectStore, name: str, manifest: Manifest, now: datetime) -> Snapshot:
    """Name a version; the snapshot that is there where the name has this version already.

    Conflict where it has another one. After Unavailable nobody knows whether the name was given: do it again.
    """
    check_snapshot_name(name)
    if manifest.crossing or manifest.state != "live":
        raise ValueError(f"version {manifest.version} of {manifest.collection!r} is none to name: {manifest.state}")
    snapshot = Snapshot(name, manifest.version, now.isoformat(), manifest.points)
    key = paths.snapshot(manifest.collection, name)
    try:
        written = store.put_if_absent(key, snapshot.encode())
    except Unavailable as error:
        try:
            written = Snapshot.decode(store.get(key), key) == snapshot
        except (NotFound, Unavailable):
            raise error from None
    if written:
        return snapshot
    found = read_snapshot(store, manifest.collection, name)
    if found.version != manifest.version:
        raise Conflict(
            f"snapshot {name!r} of {manifest.collection!r} exists, of version {found.version}; now is version "
            f"{manifest.version}: take another name, or delete that one"
        )
    return found


def read_snapshot(store: ObjectStore, collection: str, name: str) -> Snapshot:
    """NotFound where there is none of that name; Corrupt, naming the object, where it cannot be read."""
    check_snapshot_name(name)
    key = paths.snapshot(collection, name)
    try:
        data = store.get(key)
    except NotFound:
        raise NotFound(f"no snapshot {name!r} of collection {collection!r}") from None
    return Snapshot.decode(data, key)


def list_snapshots(store: ObjectStore, collection: str) -> list[Snapshot]:
    """All of a collection, by name; Corrupt, naming the object, where one cannot be read."""
    names = [paths.snapshot_name(info.key) for info in store.objects(paths.snapshots_prefix(collection))]
    found = []
    for name in sorted(name for name in names if name is not None):
        try:
            found.append(read_snapshot(store, collection, name))
        except NotFound:  # deleted since it was listed
            continue
    return found


def delete_snapshot(store: ObjectStore, collection: str, name: str) -> None:
    """What only it named is garbage then. NotFound where there is none; one that cannot be read is deleted as well."""
    check_snapshot_name(name)
    key = paths.snapshot(collection, name)
    try:
        store.get(key)
    except NotFound:
        raise NotFound(f"no snapshot {name!r} of collection {collection!r}") from None
    store.delete(key)


def missing_objects(store: ObjectStore, manifest: Manifest) -> list[str]:
    """Keys of the files that a manifest names and the store does not list, sorted; empty when it holds them all."""
    missing: set[str] = set()
    for ref in manifest.segments.values():
        home = ref.home(manifest.collection)
        needed = {paths.segment_file(home, ref.segment_id, name) for name in paths.SEGMENT_FILES}
        missing |= needed - _keys(store, paths.segment_prefix(home, ref.segment_id))
    for entry in manifest.shards:
        needed = {
            paths.tombstones(manifest.collection, entry.shard, ref.segment_id, ref.lsn, ref.variant)
            for ref in entry.tombstones
        }
        if needed:
            missing |= needed - _keys(store, paths.tombstones_prefix(manifest.collection, entry.shard))
    return sorted(missing)


def _keys(store: ObjectStore, prefix: str) -> set[str]:
    return {info.key for info in store.objects(prefix)}
