"""What the supervisor knows of the manifests in object storage: the newest of every collection, or why it has none."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection

from cluster.entry_log import start_after
from cluster.errors import Corrupt, NotFound
from cluster.manifest import Manifest, ManifestLog, collection_names
from cluster.object_store import ObjectStore


class KnownManifests:
    """`newest` by collection, without deleted ones; `unreadable` says why a newest manifest could not be read.

    A collection may be in both: then `newest` is what was read before. `begun` has the first version that was read of
    one that was deleted and created again between two reads: earlier ones are of another. Every read may raise
    Unavailable.
    """

    def __init__(self, store: ObjectStore, new_nonce: Callable[[], str]) -> None:
        self._store = store
        self._new_nonce = new_nonce
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.newest: dict[str, Manifest] = {}
        self.unreadable: dict[str, str] = {}
        self.begun: dict[str, int] = {}
        self.complete = asyncio.Event()  # once every collection was read; before that an absent one may exist

    async def read_all(self) -> None:
        known = self.newest.keys() | self.unreadable.keys()  # what `read` adds meanwhile is not in the list
        names = await asyncio.to_thread(collection_names, self._store)
        for name in names:
            await self.read(name)
        for name in known - set(names):
            self._keep(name, None)
        self.complete.set()

    async def read(self, name: str) -> None:
        """A corrupt manifest stops its own collection from changing, not the others.

        One read of a collection at a time: a slow one must not bring back what a later one saw replaced.
        """
        async with self._reading[name]:
            try:
                manifest = await asyncio.to_thread(self._log(name).newest)
            except (Corrupt, NotFound) as error:
                self.unreadable[name] = str(error)
                return
            known = self.newest.get(name)
            if manifest is not None and known is not None and await self._was_deleted(manifest, since=known):
                self.begun[name] = manifest.version
            self._keep(name, manifest)

    async def _was_deleted(self, newest: Manifest, since: Manifest) -> bool:
        """Whether a collection was deleted, and created again, after a version; not where that cannot be read."""
        if newest.generation == since.generation:
            return False
        try:
            return await asyncio.to_thread(_deleted_since, self._log(newest.collection), newest, since.version)
        except (Corrupt, NotFound):
            return False

    async def earlier(self, newest: Manifest, version: int) -> Manifest | None:
        """An earlier version of a collection; None where it was deleted since, or cannot be read."""
        try:
            return await asyncio.to_thread(_earlier, self._log(newest.collection), newest, version)
        except (Corrupt, NotFound):
            return None

    async def in_use(self, newest: Manifest) -> Manifest | None:
        """The last version of the earlier generation whose logs are written to, because they have not ended yet.

        None where those of the newest version are, or it cannot be read.
        """
        try:
            manifest = await asyncio.to_thread(_in_use, self._store, self._log(newest.collection), newest)
        except (Corrupt, NotFound):
            return None
        return manifest if manifest.generation < newest.generation else None

    async def with_another_share(self, manifest: Manifest, shares: Collection[float]) -> Manifest | None:
        """The last version of the newest earlier generation that is served with another share of a GPU, one of these,
        and written to the same logs. None where there is none, it was deleted since, or it cannot be read."""
        if set(shares) <= {manifest.num_gpus}:
            return None
        try:
            return await asyncio.to_thread(_with_another_share, self._log(manifest.collection), manifest, shares)
        except (Corrupt, NotFound):
            return None

    def _keep(self, name: str, manifest: Manifest | None) -> None:
        self.unreadable.pop(name, None)
        if manifest is None or manifest.state == "deleted":
            self.newest.pop(name, None)
            self.begun.pop(name, None)
        else:
            self.newest[name] = manifest

    def _log(self, name: str) -> ManifestLog:
        return ManifestLog(self._store, name, self._new_nonce)


def _in_use(store: ObjectStore, log: ManifestLog, newest: Manifest) -> Manifest:
    manifest = newest
    while manifest.behind and start_after(store, manifest.collection, manifest.behind) is None:
        manifest = log.last_of_generation(None, manifest)
    return manifest


def _with_another_share(log: ManifestLog, manifest: Manifest, shares: Collection[float]) -> Manifest | None:
    for earlier in log.generations(manifest):
        if earlier.state == "deleted" or earlier.log_set != manifest.log_set:
            return None
        if earlier.num_gpus != manifest.num_gpus and earlier.num_gpus in shares:
            return earlier
    return None


def _earlier(log: ManifestLog, newest: Manifest, version: int) -> Manifest | None:
    """None where the collection was deleted since: the name stands for another one now."""
    if version == newest.version:
        return newest
    return None if _deleted_since(log, newest, version) else log.read(version)


def _deleted_since(log: ManifestLog, newest: Manifest, version: int) -> bool:
    return any(manifest.state == "deleted" for manifest in log.generations(newest, after=version - 1))
