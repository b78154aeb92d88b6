"""Ends the logs that a generation leaves behind, so that its shards can go on with their own. Once is for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from actors.known_manifests import KnownManifests
from actors.watched_replicas import log_failure
from cluster.entry_log import end_logs
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore

RETRY_S = 0.5


class LogEnds:
    """A task for each collection whose logs are to end; doing it again is harmless. `wake` is set when it is done."""

    def __init__(
        self, store: ObjectStore, known: KnownManifests, new_nonce: Callable[[], str], wake: asyncio.Event
    ) -> None:
        self._store = store
        self._known = known
        self._new_nonce = new_nonce
        self._wake = wake
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: dict[str, int] = {}  # collection -> the generation that was waiting for it

    def begin(self, manifest: Manifest) -> None:
        """End all logs that the newest generation of a collection is behind, unless that is under way."""
        name = manifest.collection
        if name not in self._tasks:
            self._tasks[name] = asyncio.ensure_future(self._end(manifest))
            self._tasks[name].add_done_callback(lambda _: self._tasks.pop(name, None))

    def ended(self, manifest: Manifest) -> bool:
        """Whether that was done here."""
        return self._ended.get(manifest.collection) == manifest.generation

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _end(self, manifest: Manifest) -> None:
        """Until it is done, or another generation takes the place of this one."""
        name = manifest.collection
        while True:
            try:
                await self._known.read(name)  # a generation that was taken back must end nothing
                newest = self._known.newest.get(name)
                if newest is None or newest.generation != manifest.generation:
                    return
                await self._end_all(manifest)
                self._ended[name] = manifest.generation
                return
            except Exception as error:  # noqa: BLE001  # logged, and done again
                log_failure(f"ending the logs behind generation {manifest.generation} of {name}", error)
            finally:
                self._wake.set()
            await asyncio.sleep(RETRY_S)

    async def _end_all(self, manifest: Manifest) -> None:
        """The logs of the oldest set all at once, for writes wait; later sets begin where it ended."""
        oldest = manifest.behind[0]
        sets = [(replace(oldest, positions=(position,)),) for position in oldest.positions]
        ends = [asyncio.to_thread(end_logs, self._store, manifest.collection, one, self._nonce) for one in sets]
        await asyncio.gather(*ends)
        if len(manifest.behind) > 1:
            await asyncio.to_thread(end_logs, self._store, manifest.collection, manifest.behind, self._nonce)

    def _nonce(self) -> str:
        return self._new_nonce()
