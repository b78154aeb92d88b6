"""The manifest: one committed version of a collection. The highest number is the truth; there is no pointer.

A manifest is committed by put-if-absent of the next number. A put whose answer was lost collides with itself, so
a collision is read back and recognised by the writer's nonce before it is called a Conflict.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard

from cluster import paths
from cluster.config import CollectionConfig
from cluster.errors import Conflict, Corrupt, EaglerayError, NotFound, Unavailable
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.segment import checksum_bytes

FORMAT = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentRef:
    """A segment as the manifest names it; `checksum` is that of its `segment.json`."""

    segment_id: str
    count: int
    checksum: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard's segments."""

    shard: int
    segments: tuple[SegmentRef, ...] = ()

    @property
    def points(self) -> int:
        return sum(segment.count for segment in self.segments)


@dataclass(frozen=True)
class Manifest:
    """One committed version. `state="deleted"` ends a collection; the same name may be created again after it."""

    collection: str
    version: int
    config: CollectionConfig
    routing: Routing
    generation: int
    shards: tuple[ShardEntry, ...]
    created_at: str
    writer: str
    state: Literal["live", "deleted"] = "live"
    format: int = FORMAT

    @property
    def points(self) -> int:
        return sum(shard.points for shard in self.shards)

    @property
    def segments(self) -> dict[str, SegmentRef]:
        return {ref.segment_id: ref for shard in self.shards for ref in shard.segments}

    def encode(self) -> bytes:
        """JSON with a checksum over everything else."""
        body = asdict(self) | {"config": self.config.to_dict(), "routing": self.routing.to_dict()}
        return json.dumps(body | {"checksum": checksum_bytes(_canonical(body))}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """Parse; Corrupt, naming the object, where the bytes are not what was written."""
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise Corrupt(f"format {body['format']}, this version reads {FORMAT}")
            checksum = body.pop("checksum")
            if checksum != checksum_bytes(_canonical(body)):
                raise Corrupt("the checksum does not match the content")
            body["config"] = CollectionConfig.from_dict(body["config"])
            body["routing"] = Routing.from_dict(body["routing"])
            body["shards"] = tuple(
                ShardEntry(entry["shard"], tuple(SegmentRef(**ref) for ref in entry["segments"]))
                for entry in body["shards"]
            )
            manifest = cls(**body)
        except Corrupt as error:
            raise Corrupt(f"{key}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EaglerayError) as error:
            raise Corrupt(f"{key}: not a manifest: {error!r}") from error
        _raise_broken(key, broken_invariants(manifest))
        return manifest


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def broken_invariants(manifest: Manifest, parent: Manifest | None = None) -> list[str]:
    """What is wrong with a manifest, on its own and after its parent; empty when nothing is."""
    broken = []
    names = [ref.segment_id for shard in manifest.shards for ref in shard.segments]
    if len(names) != len(set(names)):
        broken.append("a segment belongs to more than one shard")
    if [entry.shard for entry in manifest.shards] != list(range(manifest.routing.shards)):
        broken.append(f"shards are not 0 to {manifest.routing.shards - 1}")
    if any(ref.count < 1 for ref in manifest.segments.values()):
        broken.append("a segment holds no rows")
    if manifest.version != (parent.version + 1 if parent else max(1, manifest.version)):
        broken.append(f"version {manifest.version} does not follow {parent.version if parent else 0}")
    if parent and parent.state == "live" and manifest.generation < parent.generation:
        broken.append(f"generation {manifest.generation} goes back from {parent.generation}")
    return broken


def _raise_broken(key: str, broken: list[str]) -> None:
    if broken:
        raise Corrupt(f"{key}: {'; '.join(broken)}")


class ManifestLog:
    """The manifests of one collection in a store. `new_nonce` and `now` make it deterministic in tests."""

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        new_nonce: Callable[[], str],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._collection = collection
        self._new_nonce = new_nonce
        self._now = now

    def newest(self) -> Manifest | None:
        """The newest manifest, a deleted one too; None if the collection never existed."""
        versions = self._versions()
        return self.read(max(versions)) if versions else None

    def newest_live(self) -> Manifest:
        """The newest manifest; NotFound when the collection does not exist or was deleted."""
        manifest = self.newest()
        if manifest is None or manifest.state == "deleted":
            raise NotFound(f"no collection {self._collection!r}")
        return manifest

    def read(self, version: int) -> Manifest:
        key = paths.manifest(self._collection, version)
        manifest = Manifest.decode(self._store.get(key), key)
        if (manifest.collection, manifest.version) != (self._collection, version):
            raise Corrupt(f"{key}: holds version {manifest.version} of {manifest.collection!r}")
        return manifest

    def segments_until(self, version: int) -> set[str]:
        """Every segment that a manifest up to `version` names; one that cannot be read is logged and left out."""
        named: set[str] = set()
        for number in self._versions():
            if number <= version:
                try:
                    named |= self.read(number).segments.keys()
                except (Corrupt, NotFound) as error:  # an old version that nothing else needs must not stop a deletion
                    logger.warning("the segments that an unreadable manifest names stay behind: %s", error)
        return named

    def named_segments(self) -> set[str]:
        """Every segment that any manifest names; Corrupt where one cannot be read, for it may name more."""
        return {segment_id for number in self._versions() for segment_id in self.read(number).segments}

    def _versions(self) -> list[int]:
        keys = (info.key for info in self._store.objects(paths.manifest_prefix(self._collection)))
        return [version for key in keys if (version := paths.manifest_version(key)) is not None]

    def create(self, config: CollectionConfig) -> tuple[Manifest, bool]:
        """Make an empty collection: (manifest, True), or (the existing one, False) when it has this config.

        Raises Conflict when it exists with another config, also where another writer has just created it.
        """
        parent = self.newest()
        if self._is_live(parent, config):
            return parent, False
        entries = tuple(ShardEntry(shard) for shard in range(config.shards))
        try:
            return self._commit(parent, config, entries, generation=_next_generation(parent)), True
        except Conflict:
            newest = self.newest()
            if self._is_live(newest, config):
                return newest, False
            raise

    def _is_live(self, manifest: Manifest | None, config: CollectionConfig) -> TypeGuard[Manifest]:
        """Whether the collection exists and has this config; Conflict where it has another."""
        if manifest is None or manifest.state == "deleted":
            return False
        if manifest.config != config:
            raise Conflict(f"collection {self._collection!r} exists with another config")
        return True

    def commit_generation(
        self, parent: Manifest | None, config: CollectionConfig, shards: tuple[ShardEntry, ...]
    ) -> Manifest:
        """Commit a new generation whose points are exactly those of `shards`, after `parent` (None: the first)."""
        return self._commit(parent, config, shards, generation=_next_generation(parent))

    def delete(self) -> Manifest:
        """End the collection; returns the last live manifest, whose segments are now garbage."""
        parent = self.newest_live()
        entries = tuple(ShardEntry(shard) for shard in range(parent.routing.shards))
        self._commit(parent, parent.config, entries, generation=parent.generation, state="deleted")
        return parent

    def _commit(
        self,
        parent: Manifest | None,
        config: CollectionConfig,
        shards: tuple[ShardEntry, ...],
        *,
        generation: int,
        state: Literal["live", "deleted"] = "live",
    ) -> Manifest:
        manifest = Manifest(
            collection=self._collection,
            version=parent.version + 1 if parent else 1,
            config=config,
            routing=Routing(shards=len(shards)),
            generation=generation,
            shards=shards,
            created_at=self._now().isoformat(),
            writer=self._new_nonce(),
            state=state,
        )
        key = paths.manifest(self._collection, manifest.version)
        _raise_broken(key, broken_invariants(manifest, parent) + self._missing_segments(manifest))
        if not self._put(key, manifest):
            raise Conflict(
                f"collection {self._collection!r}: version {manifest.version} was committed by another writer"
            )
        return manifest

    def _put(self, key: str, manifest: Manifest) -> bool:
        """True if this manifest now is the one of its number, also where the answer of the put was lost."""
        try:
            if self._store.put_if_absent(key, manifest.encode()):
                return True
        except Unavailable as error:
            try:
                return self.read(manifest.version) == manifest
            except (NotFound, Unavailable):
                raise error from None
        return self.read(manifest.version) == manifest

    def _missing_segments(self, manifest: Manifest) -> list[str]:
        """Named segments whose description is not in the store, or is not the one named."""
        missing = []
        for segment_id, ref in manifest.segments.items():
            key = paths.segment_file(self._collection, segment_id, paths.DESCRIPTION)
            try:
                if checksum_bytes(self._store.get(key)) != ref.checksum:
                    missing.append(f"{key} is not the object that was named")
            except NotFound:
                missing.append(f"{key} does not exist")
        return missing


def _next_generation(parent: Manifest | None) -> int:
    return parent.generation + 1 if parent else 1


def collection_names(store: ObjectStore) -> list[str]:
    """Every name that ever had a collection, deleted ones too."""
    return store.folders(paths.collections_prefix())
