"""The manifest: one committed version of a collection. The highest number is the truth; there is no pointer.

A manifest is committed by put-if-absent of the next number. A put whose answer was lost collides with itself, so
a collision is read back and recognised by the writer's nonce before it is called a Conflict.

What a shard holds is its entry here, which describes it as of one LSN, and the WAL records after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeGuard

import xxhash

from cluster import entry_log, paths
from cluster.attributes import arrow_type, types_after_import
from cluster.config import CollectionConfig
from cluster.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from cluster.gpu_share import share_without_points
from cluster.manifest_format import FORMAT, Manifest, Switch, broken_invariants
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.segment import checksum_bytes
from cluster.shard_entry import LogPosition, LogSet, SegmentRef, ShardEntry, TombstonesRef, behind_logs
from cluster.wal import Wal

__all__ = ["Manifest", "ManifestLog", "SegmentRef", "ShardEntry", "TombstonesRef", "broken_invariants"]

COMMIT_TRIES = 100  # against seals and declarations, each of which is somebody's progress
logger = logging.getLogger(__name__)


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
        versions = self.versions()
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

    def last_of_generation(self, generation: int | None, before: Manifest) -> Manifest:
        """The last version of an earlier generation than that of `before`; None: of the one before it.

        NotFound where there is none: it was collected, or is of a collection that was deleted since.
        """
        what = "an earlier generation" if generation is None else f"generation {generation}"
        for manifest in self.generations(before):
            if manifest.state == "deleted" or (generation is not None and manifest.generation < generation):
                break
            if generation in (None, manifest.generation):
                return manifest
        raise NotFound(f"collection {self._collection!r}: no version of {what} before {before.generation} is kept")

    def generations(self, before: Manifest, after: int = 0) -> Iterator[Manifest]:
        """Of versions over `after`: the last one of each generation before that of `before`, the newest first.

        One that deleted a collection is the last of its generation. Found by bisection, since generations never go back
        and thousands of versions may be of one; those that were collected are passed over.
        """
        versions = sorted(number for number in self.versions() if after < number < before.version)
        found = self._last_before(versions, before.generation)
        while found is not None:
            yield found
            found = self._last_before(versions, found.generation)

    def _last_before(self, versions: list[int], generation: int) -> Manifest | None:
        """The last of these versions that is of an earlier generation; what is not there any more leaves the list."""
        low, high = 0, len(versions)  # of versions[low:high] some may be of an earlier one
        found: Manifest | None = None
        while low < high:
            middle = (low + high) // 2
            try:
                manifest = self.read(versions[middle])
            except NotFound:
                del versions[middle]
                high -= 1
                continue
            if manifest.generation < generation:
                found, low = manifest, middle + 1
            else:
                high = middle
        return found

    def segments_until(self, version: int) -> set[str]:
        """Every segment that a manifest up to `version` names; one that cannot be read is logged and left out."""
        named: set[str] = set()
        for number in self.versions():
            if number <= version:
                try:
                    named |= self.read(number).segments.keys()
                except (Corrupt, NotFound) as error:  # an old version that nothing else needs must not stop a deletion
                    logger.warning("the segments that an unreadable manifest names stay behind: %s", error)
        return named

    def named_segments(self) -> set[str]:
        """Every segment that any manifest names; Corrupt where one cannot be read, for it may name more."""
        return {segment_id for number in self.versions() for segment_id in self.read(number).segments}

    def versions(self) -> list[int]:
        """The numbers of all manifests there are, in no order."""
        keys = (info.key for info in self._store.objects(paths.manifest_prefix(self._collection)))
        return [version for key in keys if (version := paths.manifest_version(key)) is not None]

    def create(self, config: CollectionConfig) -> tuple[Manifest, bool]:
        """Make an empty collection: (manifest, True), or (the existing one, False) when it has this config.

        It is served on a GPU where its config asks for one, else on CPUs until something is built.

        Raises Conflict when it exists with another config, also where another writer has just created it.
        """
        parent = self.newest()
        if self._is_live(parent, config):
            return parent, False
        entries = self.wal_ends(parent, config.shards)
        try:
            empty = self._next(parent, config, entries, _next_generation(parent))
            return self._commit(replace(empty, num_gpus=share_without_points(config)), parent), True
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

    def ends_of_logs(self, base: Manifest) -> tuple[LogPosition, ...]:
        """Where the logs end that a live collection's writes go to now (`entry_log.ends_of_logs`)."""
        return entry_log.ends_of_logs(self._store, base)

    def wal_ends(self, base: Manifest | None, shards: int) -> tuple[ShardEntry, ...]:
        """Empty entries at the ends of the logs, at which a new generation after `base` can start.

        Writes acknowledged before this was called are at or before it. With another number of shards than a live
        collection has they are behind its logs. A collection that was deleted has had its logs claimed, and they are
        claimed again: what a writer of it still puts there must not be replayed into the new one. Shards without
        records stay at LSN 0. Raises Conflict (`ends_of_logs`), Unavailable or Corrupt.
        """
        if base is None:  # a log begins after the first manifest
            return tuple(ShardEntry(shard) for shard in range(shards))
        if base.state == "live":
            ends = self.ends_of_logs(base)
            if shards == len(ends):
                return tuple(ShardEntry(end.shard, (), end.lsn, end.epoch) for end in ends)
            logs = LogSet(base.log_set, len(ends), ends)
            return tuple(behind_logs(ShardEntry(shard), logs) for shard in range(shards))
        known = {entry.shard: (entry.applied_lsn, entry.epoch) for entry in base.shards}
        return tuple(self._fenced(shard, base.log_set, known.get(shard)) for shard in range(shards))

    def _new_claim_nonce(self) -> str:
        """32 hex digits, whatever the nonces of manifests look like."""
        return xxhash.xxh3_128_hexdigest(self._new_nonce().encode())

    def commit_generation(
        self,
        base: Manifest | None,
        config: CollectionConfig,
        shards: tuple[ShardEntry, ...],
        attributes: Mapping[str, Any] = MappingProxyType({}),
        switch: Switch = "beside",
        log_set: int | None = None,
        num_gpus: float = 0.0,
    ) -> Manifest:
        """Commit a new generation whose points are those of `shards` and of the logs after their LSNs.

        `attributes` are the Arrow types of those of its points: now the collection's (`types_after_import`). `log_set`
        is by default that of `base`, and a new one where the entries are behind that. `num_gpus` is the share of a GPU
        that its segments were built for; where what is served has another, other replicas load it.

        It follows the newest manifest, which must be `base` (None: there is none), or differ from it only by what
        shards sealed and writes declared since; else Conflict.
        """

        def generation_after(newest: Manifest | None) -> Manifest:
            declared = types_after_import(newest.attributes if newest else {}, attributes)  # a deletion has none
            logs = _log_set_after(newest, shards) if log_set is None else log_set
            changed = self._next(newest, config, shards, _next_generation(newest))
            return replace(changed, attributes=declared, log_set=logs, switch=switch, num_gpus=num_gpus)

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
            known = {entry.shard: (entry.applied_lsn, entry.epoch) for entry in newest.shards}
            if newest.crossing:
                start = entry_log.end_logs(self._store, self._collection, newest.behind, self._new_claim_nonce)
                known |= {entry.shard: start for entry in newest.shards if entry.behind}
            shards = tuple(self._fenced(shard, newest.log_set, at) for shard, at in known.items())
            return replace(self._same(newest), shards=shards, state="deleted", attributes={}, switch="beside")

        return self._commit_after(self.newest_live(), deletion_after)

    def _fenced(self, shard: int, log_set: int, at: tuple[int, int] | None) -> ShardEntry:
        """An empty entry at a claim which ends the shard's log, or at LSN 0 where it has no record."""
        wal = Wal(self._store, self._collection, shard, log_set)
        return ShardEntry(shard, (), *wal.fence(*(at or (max(0, wal.last_listed() - 1), 0)), self._new_claim_nonce))

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
            log_set=parent.log_set if parent else 0,
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
    named = {
        paths.segment_file(ref.home(name), ref.segment_id, paths.DESCRIPTION): ref for ref in manifest.segments.values()
    }
    return {key: ref.checksum for key, ref in named.items()} | {
        paths.tombstones(name, entry.shard, ref.segment_id, ref.lsn, ref.variant): ref.checksum
        for entry in manifest.shards
        for ref in entry.tombstones
    }


def _incarnation(manifest: Manifest | None) -> tuple[int, str, CollectionConfig] | None:
    """What seals and declarations leave as it is, and every other commit changes."""
    return (manifest.generation, manifest.state, manifest.config) if manifest else None


def _log_set_after(parent: Manifest | None, shards: tuple[ShardEntry, ...]) -> int:
    return (parent.log_set if parent else 0) + any(entry.behind for entry in shards)


def _next_generation(parent: Manifest | None) -> int:
    return parent.generation + 1 if parent else 1


def collection_names(store: ObjectStore) -> list[str]:
    """Every name that ever had a collection, deleted ones too."""
    return store.folders(paths.collections_prefix())
