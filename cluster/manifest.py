"""The manifest: one committed version of a collection. The highest number is the truth; there is no pointer.

A manifest is committed by put-if-absent of the next number. A put whose answer was lost collides with itself, so
a collision is read back and recognised by the writer's nonce before it is called a Conflict.

What a shard holds is its entry here, which describes it as of one LSN, and the WAL records after that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

import xxhash

from cluster import paths
from cluster.attributes import arrow_type, types_after_import
from cluster.config import CollectionConfig
from cluster.errors import Conflict, Corrupt, EaglerayError, Invalid, NotFound, Unavailable
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.segment import checksum_bytes
from cluster.shard_entry import SegmentRef, ShardEntry, TombstonesRef, lsns_that_go_back, wrong_tombstones
from cluster.wal import Wal

__all__ = ["Manifest", "ManifestLog", "SegmentRef", "ShardEntry", "TombstonesRef", "broken_invariants"]

FORMAT = 2  # 1 had no LSNs, epochs, tombstones and attributes
COMMIT_TRIES = 100  # against seals and declarations, each of which is somebody's progress
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """One committed version. `state="deleted"` ends a collection; the same name may be created again after it.

    `attributes` are those that writes declared or an import brought: name -> Arrow type as text, which
    `pa.type_for_alias` reads.
    """

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
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> int:
        return sum(shard.points for shard in self.shards)

    @property
    def segments(self) -> dict[str, SegmentRef]:
        return {ref.segment_id: ref for shard in self.shards for ref in shard.segments}

    def encode(self) -> bytes:
        """JSON of the newest format, with a checksum over everything else."""
        body = asdict(self) | {"config": self.config.to_dict(), "routing": self.routing.to_dict(), "format": FORMAT}
        return json.dumps(body | {"checksum": checksum_bytes(_canonical(body))}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """Parse; Corrupt, naming the object, where the bytes are not what was written."""
        try:
            body = json.loads(data)
            if body["format"] not in range(1, FORMAT + 1):
                raise Corrupt(f"format {body['format']}, this version reads 1 to {FORMAT}")
            checksum = body.pop("checksum")
            if checksum != checksum_bytes(_canonical(body)):
                raise Corrupt("the checksum does not match the content")
            body["config"] = CollectionConfig.from_dict(body["config"])
            body["routing"] = Routing.from_dict(body["routing"])
            body["shards"] = tuple(ShardEntry.from_dict(entry, body["format"]) for entry in body["shards"])
            if body["format"] == 1 and "attributes" in body:
                raise Corrupt("a manifest of format 1 with attributes")
            if body["format"] > 1 and not all(isinstance(text, str) for text in body["attributes"].values()):
                raise Corrupt("the type of an attribute is not text")
            manifest = cls(**body)
            if broken := broken_invariants(manifest):
                raise Corrupt("; ".join(broken))
        except Corrupt as error:
            raise Corrupt(f"{key}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EaglerayError) as error:
            raise Corrupt(f"{key}: not a manifest: {error!r}") from error
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
    for entry in manifest.shards:
        broken += [f"shard {entry.shard}: {wrong}" for wrong in wrong_tombstones(entry)]
    if parent and parent.generation == manifest.generation and len(parent.shards) == len(manifest.shards):
        broken += lsns_that_go_back(parent.shards, manifest.shards)
    return broken


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
        entries = self.wal_ends(parent, config.shards)
        try:
            return self._commit(self._next(parent, config, entries, _next_generation(parent)), parent), True
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

    def wal_ends(self, base: Manifest | None, shards: int) -> tuple[ShardEntry, ...]:
        """Empty entries at the end of each shard's WAL, at which a new generation after `base` can start.

        Writes acknowledged before this was called are at or before it. Where the shard is none of a live collection
        its WAL is of an earlier one of that name, and is claimed: what a writer of that one still puts there must not
        be replayed into the new one. Shards without records stay at LSN 0. Raises Unavailable or Corrupt.
        """
        if base is None:  # a WAL begins after the first manifest
            return tuple(ShardEntry(shard) for shard in range(shards))
        known = {entry.shard: entry for entry in base.shards}
        ends = []
        for shard in range(shards):
            if base.state == "live" and shard in known:
                at = known[shard]
                end = Wal(self._store, self._collection, shard).end(at.applied_lsn, at.epoch)
                ends.append(ShardEntry(shard, (), *end))
            else:
                ends.append(self._fenced(known.get(shard), shard))
        return tuple(ends)

    def _new_claim_nonce(self) -> str:
        """32 hex digits, whatever the nonces of manifests look like."""
        return xxhash.xxh3_128_hexdigest(self._new_nonce().encode())

    def commit_generation(
        self,
        base: Manifest | None,
        config: CollectionConfig,
        shards: tuple[ShardEntry, ...],
        attributes: Mapping[str, Any] = MappingProxyType({}),
    ) -> Manifest:
        """Commit a new generation whose points are those of `shards` and of the WAL after their LSNs.

        `attributes` are the Arrow types of those of its points: now the collection's (`types_after_import`).

        It follows the newest manifest, which must be `base` (None: there is none), or differ from it only by what
        shards sealed and writes declared since; else Conflict.
        """

        def generation_after(newest: Manifest | None) -> Manifest:
            declared = types_after_import(newest.attributes if newest else {}, attributes)  # a deletion has none
            return self._next(newest, config, shards, _next_generation(newest), attributes=declared)

        return self._commit_after(base, generation_after)

    def commit_shards(self, parent: Manifest, entries: Mapping[int, ShardEntry]) -> Manifest:
        """Commit new entries of some shards, in the same generation: their points are the same, held in another way.

        Conflict where another version was committed after `parent`, or it is that of a deleted collection.
        """
        if parent.state == "deleted":
            raise Conflict(f"collection {self._collection!r} was deleted")
        shards = {entry.shard: entry for entry in parent.shards} | dict(entries)
        return self._commit(replace(self._same(parent), shards=tuple(shards.values())), parent)

    def declare_attributes(self, types: Mapping[str, str]) -> Manifest:
        """The newest manifest once it has these attributes: name -> Arrow type as text. Commits only what is new.

        Conflict where an attribute has another type; Invalid where a text is no type; NotFound without a collection.
        """
        for name, text in types.items():
            if arrow_type(text) is None:
                raise Invalid.at(f"attributes.{name}", f"{text!r} is not an Arrow type")
        for _ in range(COMMIT_TRIES):
            parent = self.newest_live()
            for name in sorted(types.keys() & parent.attributes.keys()):
                if types[name] != parent.attributes[name]:
                    raise Conflict(f"attribute {name!r} has type {parent.attributes[name]}, not {types[name]}")
            if types.keys() <= parent.attributes.keys():
                return parent
            try:
                return self._commit(replace(self._same(parent), attributes=parent.attributes | dict(types)), parent)
            except Conflict:
                continue
        raise self._overtaken(parent.version + 1)

    def delete(self) -> Manifest:
        """End the collection; returns the manifest that says so. What earlier ones named is garbage now.

        Its entries are at claims that end the WALs: a primary that goes on is fenced, and a collection created again
        under this name looks for the end of the WALs from there.
        """

        def deletion_after(newest: Manifest | None) -> Manifest:
            assert newest is not None
            shards = tuple(self._fenced(entry, entry.shard) for entry in newest.shards)
            return replace(self._same(newest), shards=shards, state="deleted", attributes={})

        return self._commit_after(self.newest_live(), deletion_after)

    def _fenced(self, entry: ShardEntry | None, shard: int) -> ShardEntry:
        """An empty entry at a claim which ends the shard's WAL, or at LSN 0 where it has no record."""
        wal = Wal(self._store, self._collection, shard)
        at = (entry.applied_lsn, entry.epoch) if entry else (max(0, wal.last_listed() - 1), 0)
        return ShardEntry(shard, (), *wal.fence(*at, self._new_claim_nonce))

    def _commit_after(self, base: Manifest | None, change: Callable[[Manifest | None], Manifest]) -> Manifest:
        """Commit `change` of the newest manifest; Conflict unless that is as `base`.

        Repeats when a seal or a declaration is committed between reading and writing.
        """
        for _ in range(COMMIT_TRIES):
            newest = self.newest()
            if _incarnation(newest) != _incarnation(base):
                raise self._overtaken(newest.version if newest else 1)
            changed = change(newest)
            try:
                return self._commit(changed, newest)
            except Conflict:
                continue
        raise self._overtaken(newest.version + 1 if newest else 1)

    def _overtaken(self, version: int) -> Conflict:
        return Conflict(f"collection {self._collection!r}: version {version} was committed by another writer")

    def _next(
        self,
        parent: Manifest | None,
        config: CollectionConfig,
        shards: tuple[ShardEntry, ...],
        generation: int,
        attributes: dict[str, str] | None = None,
    ) -> Manifest:
        return Manifest(
            collection=self._collection,
            version=parent.version + 1 if parent else 1,
            config=config,
            routing=Routing(shards=len(shards)),
            generation=generation,
            shards=shards,
            created_at=self._now().isoformat(),
            writer=self._new_nonce(),
            attributes=attributes or {},
        )

    def _same(self, parent: Manifest) -> Manifest:
        """The next version, which says the same as `parent`."""
        made_at, nonce = self._now().isoformat(), self._new_nonce()
        return replace(parent, version=parent.version + 1, created_at=made_at, writer=nonce, format=FORMAT)

    def _commit(self, manifest: Manifest, parent: Manifest | None) -> Manifest:
        key = paths.manifest(self._collection, manifest.version)
        broken = broken_invariants(manifest, parent) + self._missing_objects(manifest, parent)
        if broken:
            raise Corrupt(f"{key}: {'; '.join(broken)}")
        if not self._put(key, manifest):
            raise self._overtaken(manifest.version)
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

    def _missing_objects(self, manifest: Manifest, parent: Manifest | None) -> list[str]:
        """Segments and tombstone files that `parent` does not name, and the store does not hold as they are named."""
        known = _named_objects(parent) if parent else {}
        missing = []
        for key, checksum in _named_objects(manifest).items():
            if known.get(key) == checksum:
                continue
            try:
                if checksum_bytes(self._store.get(key)) != checksum:
                    missing.append(f"{key} is not the object that was named")
            except NotFound:
                missing.append(f"{key} does not exist")
        return missing


def _named_objects(manifest: Manifest) -> dict[str, str]:
    """Key -> checksum of every description and tombstone file."""
    name = manifest.collection
    named = {paths.segment_file(name, ref.segment_id, paths.DESCRIPTION): ref for ref in manifest.segments.values()}
    return {key: ref.checksum for key, ref in named.items()} | {
        paths.tombstones(name, entry.shard, ref.segment_id, ref.lsn): ref.checksum
        for entry in manifest.shards
        for ref in entry.tombstones
    }


def _incarnation(manifest: Manifest | None) -> tuple[int, str, CollectionConfig] | None:
    """What seals and declarations leave as it is, and every other commit changes."""
    return (manifest.generation, manifest.state, manifest.config) if manifest else None


def _next_generation(parent: Manifest | None) -> int:
    return parent.generation + 1 if parent else 1


def collection_names(store: ObjectStore) -> list[str]:
    """Every name that ever had a collection, deleted ones too."""
    return store.folders(paths.collections_prefix())
