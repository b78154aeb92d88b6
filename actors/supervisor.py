"""The control plane: compares wanted with observed, starts, loads and retires replicas, publishes who serves what.

A plain class; Ray is behind the `Runtime` protocol. It keeps no state that it could not find again: wanted comes
from the manifests in object storage, observed from the replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.shard import ReplicaStatus
from actors.shard_client import ServedCollection, ServingTable
from cluster.config import Settings
from cluster.errors import Corrupt, EaglerayError, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog, collection_names
from cluster.object_store import ObjectStore
from cluster.placement import (
    Load,
    ObservedReplica,
    ReplicaKey,
    Start,
    Stop,
    WantedReplica,
    plan,
    publishable_version,
    replica_resources,
    replicas_of,
)

TABLE_WAIT_S = 10.0  # how long `next_table` waits for a change
STORE_POLL_S = 5.0  # how often manifests are looked for without being told
RETIRE_AFTER_S = 10.0  # an old generation stays loaded for queries that began under it
LOAD_RETRY_S = 5.0
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """Replica processes: start, stop, talk to. Every call may raise Unavailable."""

    def existing(self) -> list[ReplicaKey]:
        """Replicas that already run, such as those of an earlier supervisor."""
        ...

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None: ...

    def stop(self, key: ReplicaKey) -> None: ...

    async def status(self, key: ReplicaKey) -> ReplicaStatus: ...

    async def load(self, key: ReplicaKey, version: int) -> None: ...

    async def retire(self, key: ReplicaKey, generation: int) -> None: ...


@dataclass(frozen=True)
class _Retirement:
    generation: int
    at: float


class Supervisor:
    """One per Eagleray. `reconcile` is one round; `run` does rounds for ever."""

    def __init__(
        self,
        store: ObjectStore,
        runtime: Runtime,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        new_nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self._settings = settings
        self._clock = clock
        self._new_nonce = new_nonce
        self._manifests: dict[str, Manifest] = {}
        self._broken: dict[str, str] = {}
        self._statuses: dict[ReplicaKey, ReplicaStatus] = {}
        self._replicas = set(runtime.existing())
        self._loading: dict[ReplicaKey, asyncio.Task[None]] = {}
        self._load_after: dict[ReplicaKey, float] = {}
        self._retirements: dict[str, _Retirement] = {}
        self._watchers: dict[ReplicaKey, asyncio.Task[None]] = {}
        self._polled_at = clock() - STORE_POLL_S
        self._reading = asyncio.Lock()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._table = ServingTable(new_nonce())

    async def run(self) -> None:
        """Rounds for ever: one per period, and at once when a replica's state changed."""
        while True:
            try:
                await self.reconcile()
            except EaglerayError as error:  # storage or Ray away: the next round tries again
                logger.warning("reconcile: %s", error)
            try:
                async with asyncio.timeout(self._settings.reconcile_period_s):  # wait_for may lose a cancellation
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def reconcile(self) -> None:
        """One round: read manifests when that is due, act on what the watchers saw, publish."""
        self._wake.clear()
        if self._clock() - self._polled_at >= STORE_POLL_S:
            await self._read_manifests()
        self._round()
        await self._retire()

    async def refresh(self, collection: str) -> None:
        """Look at one collection now, because something was committed to it."""
        await self._read_manifest(collection)
        self._round()

    def close(self) -> None:
        """Stop watching; the replicas go on."""
        for task in (*self._watchers.values(), *self._loading.values()):
            task.cancel()

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        """The table once its stamp is not `known_stamp`, or unchanged after `TABLE_WAIT_S`."""
        if self._table.stamp == known_stamp:
            changed = self._changed
            try:
                async with asyncio.timeout(TABLE_WAIT_S):
                    await changed.wait()
            except TimeoutError:
                return self._table
        return self._table

    def describe(self, collection: str) -> dict[str, Any]:
        """A collection's manifest facts and its replicas' statuses, as plain data; NotFound."""
        manifest = self._manifests.get(collection)
        if manifest is None:
            raise NotFound(f"no collection {collection!r}")
        served = self._table.collections.get(collection)
        return {
            "manifest": manifest,
            "serving_generation": served.generation if served else None,
            "statuses": {key: self._status(key) for key in self._wanted_of(manifest)},
        }

    async def _read_manifests(self) -> None:
        known = self._manifests.keys() | self._broken.keys()  # what `refresh` adds meanwhile is not in the list
        names = await asyncio.to_thread(collection_names, self._store)
        for name in names:
            await self._read_manifest(name)
        for name in known - set(names):
            self._manifests.pop(name, None)
            self._broken.pop(name, None)
        self._polled_at = self._clock()

    async def _read_manifest(self, name: str) -> None:
        """A corrupt manifest stops its own collection from changing, not the others.

        One read at a time: a slow one must not bring back what a later one saw replaced.
        """
        log = ManifestLog(self._store, name, self._new_nonce)
        async with self._reading:
            try:
                manifest = await asyncio.to_thread(log.newest)
            except (Corrupt, NotFound) as error:
                self._broken[name] = str(error)
            else:
                self._keep(name, manifest)

    def _keep(self, name: str, manifest: Manifest | None) -> None:
        self._broken.pop(name, None)
        if manifest is None or manifest.state == "deleted":
            self._manifests.pop(name, None)
        else:
            self._manifests[name] = manifest

    def _wanted_of(self, manifest: Manifest) -> dict[ReplicaKey, WantedReplica]:
        shards = len(manifest.shards)
        resources = replica_resources(manifest.config, self._settings)
        wanted = WantedReplica(manifest.version, manifest.generation, shards, *resources)
        return dict.fromkeys(replicas_of(manifest.collection, manifest.config, shards), wanted)

    def _round(self) -> None:
        for key in self._replicas - self._watchers.keys():
            self._watchers[key] = asyncio.ensure_future(self._watch(key))
        wanted: dict[ReplicaKey, WantedReplica] = {}
        for manifest in self._manifests.values():
            wanted |= self._wanted_of(manifest)
        for action in plan(wanted, self._observed()):
            self._perform(action)
        self._publish()

    async def _watch(self, key: ReplicaKey) -> None:
        """Ask a replica for its status for ever; a call that is late is waited for, not repeated."""
        while key in self._replicas:
            call = asyncio.ensure_future(self._runtime.status(key))
            call.add_done_callback(_look_at_error)  # a cancelled watcher leaves it unread
            while not (await asyncio.wait({call}, timeout=self._settings.replica_timeout_s))[0]:
                if self._status(key).state != "starting":
                    self._set_status(key, ReplicaStatus("unreachable", error="it does not answer"))
            try:
                self._set_status(key, call.result())
            except Unavailable as error:
                self._set_status(key, ReplicaStatus("unreachable", error=str(error)))
            except NotFound:
                self._forget(key)
                return
            except EaglerayError as error:
                self._set_status(key, ReplicaStatus("failed", error=str(error)))
            await asyncio.sleep(self._settings.reconcile_period_s)

    def _set_status(self, key: ReplicaKey, status: ReplicaStatus) -> None:
        if key in self._replicas and self._statuses.get(key) != status:
            self._statuses[key] = status
            self._wake.set()

    def _forget(self, key: ReplicaKey) -> None:
        """A replica's process is gone for good: the next round starts another if it is wanted."""
        self._replicas.discard(key)
        self._statuses.pop(key, None)
        watcher = self._watchers.pop(key, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        self._wake.set()

    def _observed(self) -> Mapping[ReplicaKey, ObservedReplica]:
        statuses = {key: self._status(key) for key in self._replicas}
        return {key: ObservedReplica(status.state, status.versions) for key, status in statuses.items()}

    def _status(self, key: ReplicaKey) -> ReplicaStatus:
        return self._statuses.get(key, ReplicaStatus("starting"))

    def _perform(self, action: Start | Stop | Load) -> None:
        if isinstance(action, Start):
            self._runtime.start(action.key, action.wanted)
            self._replicas.add(action.key)
            self._watchers[action.key] = asyncio.ensure_future(self._watch(action.key))
        elif isinstance(action, Stop):
            self._runtime.stop(action.key)
            self._forget(action.key)
        elif action.key not in self._loading and self._clock() >= self._load_after.get(action.key, 0.0):
            self._loading[action.key] = asyncio.ensure_future(self._load(action))

    async def _load(self, action: Load) -> None:
        try:
            await self._runtime.load(action.key, action.version)
            self._load_after.pop(action.key, None)
            self._set_status(action.key, await self._runtime.status(action.key))  # or the next round loads it again
        except EaglerayError as error:
            logger.warning("%s: loading version %d: %s", action.key, action.version, error)
            self._load_after[action.key] = self._clock() + LOAD_RETRY_S
        finally:
            self._loading.pop(action.key, None)

    def _publish(self) -> None:
        collections, unready = {}, dict(self._broken)
        for name, manifest in self._manifests.items():
            served = self._serving(manifest)
            if served is not None:
                collections[name] = served
            why = self._why_unready(manifest, served)
            if why:
                unready[name] = why
        table = replace(self._table, collections=collections, unready=unready)
        if table != self._table:
            self._table = replace(table, stamp=self._new_nonce())
            self._changed.set()
            self._changed = asyncio.Event()

    def _serving(self, manifest: Manifest) -> ServedCollection | None:
        """The newest generation if it may be switched to; else the one served so far, with its ready replicas."""
        wanted = self._wanted_of(manifest)
        before = self._table.collections.get(manifest.collection)
        if before is None or before.version != manifest.version:
            if not publishable_version(wanted, self._observed(), manifest.version):
                return before and self._with_ready_replicas(before, wanted)
            at = self._clock() + RETIRE_AFTER_S
            self._retirements[manifest.collection] = _Retirement(manifest.generation, at)
        served = ServedCollection(
            manifest.config,
            manifest.routing,
            manifest.version,
            manifest.generation,
            {entry.shard: entry.points for entry in manifest.shards},
            _attributes([self._status(key) for key in wanted]),
            {},
        )
        return self._with_ready_replicas(served, wanted)

    def _with_ready_replicas(
        self, served: ServedCollection, wanted: Mapping[ReplicaKey, WantedReplica]
    ) -> ServedCollection:
        replicas: dict[int, tuple[ReplicaKey, ...]] = dict.fromkeys(served.shard_points, ())
        for key in sorted(wanted):
            status = self._status(key)
            if key.shard in replicas and status.state == "ready" and served.generation in status.generations:
                replicas[key.shard] += (key,)
        return replace(served, replicas=replicas)

    def _why_unready(self, manifest: Manifest, served: ServedCollection | None) -> str:
        reasons = []
        for key in sorted(self._wanted_of(manifest)):
            status = self._status(key)
            if status.state != "ready":
                reasons.append(f"replica {key} is {status.state}" + (f" ({status.error})" if status.error else ""))
        if served is None and not reasons:
            reasons.append("its replicas are loading")
        return "; ".join(reasons)

    async def _retire(self) -> None:
        """Drop generations that were replaced long enough ago for the queries that began under them."""
        for name, retirement in list(self._retirements.items()):
            if self._clock() < retirement.at:
                continue
            del self._retirements[name]
            for key in [key for key in self._replicas if key.collection == name]:
                try:
                    await self._runtime.retire(key, retirement.generation)
                except (Unavailable, NotFound) as error:
                    logger.warning("%s: retiring old generations: %s", key, error)


def _look_at_error(call: asyncio.Future[Any]) -> None:
    if not call.cancelled():
        call.exception()


def _attributes(statuses: Sequence[ReplicaStatus]) -> tuple[str, ...]:
    """Names of the attributes that any segment holds."""
    return tuple(sorted({name for s in statuses for segment in s.segments for name in segment["attributes"]}))
