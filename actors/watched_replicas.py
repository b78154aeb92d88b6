"""The replicas that run, as the supervisor sees them: asked for their status for ever, and called one at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from actors.shard import ReplicaStatus
from cluster.config import Settings
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.placement import NEAR_RECORDS, Candidate, ObservedReplica, ReplicaKey, WantedReplica

CALL_RETRY_S = 5.0  # after a call to a replica that failed
LEAD_TIMEOUT_S = 60.0  # applying the rest of the WAL and loading the newest version
LEADING = "leading its shard"
LOST_GPU_PAUSE_S = 300.0  # between two processes of a replica each of which is ended because its GPU was lost
SILENT_TIMEOUTS_MAX = 6  # a replica that hung for so many `replica_timeout_s` is ended
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """Replica processes: start, stop, talk to. Every call may raise Unavailable."""

    def existing(self) -> list[ReplicaKey]:
        """Replicas that already run, such as those of an earlier supervisor."""
        ...

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None: ...

    def stop(self, key: ReplicaKey) -> None: ...

    async def status(self, key: ReplicaKey) -> ReplicaStatus: ...

    async def waits_for(self, key: ReplicaKey) -> str:
        """What keeps a replica from starting; "" where nothing is known of it."""
        ...

    async def load(self, key: ReplicaKey, version: int) -> None: ...

    async def retire(self, key: ReplicaKey, generation: int) -> None: ...

    async def lead(self, key: ReplicaKey) -> None:
        """Have a replica become the primary of its shard; nothing where it is."""
        ...


class WatchedReplicas:
    """Replicas with a watcher each. `wake` is set when something changed that a round should look at."""

    def __init__(self, runtime: Runtime, settings: Settings, clock: Callable[[], float], wake: asyncio.Event) -> None:
        self._runtime = runtime
        self._settings = settings
        self._clock = clock
        self._wake = wake
        self._keys = set(runtime.existing())
        self._statuses: dict[ReplicaKey, ReplicaStatus] = {}
        self._watchers: dict[ReplicaKey, asyncio.Task[None]] = {}
        self._silent_since = dict.fromkeys(self._keys, clock())  # replicas that do not answer, but may be at work
        self._calls: dict[ReplicaKey, asyncio.Task[None]] = {}  # the load, retire or lead of a replica
        self._told_to_lead: set[ReplicaKey] = set()
        self._call_after: dict[tuple[ReplicaKey, str], float] = {}
        self._start_after: dict[ReplicaKey, float] = {}
        self._ended_for_gpu: dict[ReplicaKey, float] = {}  # when a replica was ended because its GPU was lost

    def watch(self) -> None:
        """Watch every replica that is not watched yet."""
        for key in self._keys - self._watchers.keys():
            self._watchers[key] = asyncio.ensure_future(self._watch(key))

    def close(self) -> None:
        """Stop watching; the replicas go on."""
        for task in (*self._watchers.values(), *self._calls.values()):
            task.cancel()

    async def first_answers(self) -> None:
        """Until every replica answered, or `replica_timeout_s` passed."""
        try:
            async with asyncio.timeout(self._settings.replica_timeout_s):
                while self._keys - self._statuses.keys():
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            logger.warning("no answer yet from: %s", ", ".join(map(str, sorted(self._keys - self._statuses.keys()))))

    def status(self, key: ReplicaKey) -> ReplicaStatus:
        return self._statuses.get(key, ReplicaStatus("starting"))

    def statuses(self, collection: str) -> dict[ReplicaKey, ReplicaStatus]:
        """Those of a collection's replicas that run, wanted or not."""
        return {key: self.status(key) for key in self._keys if key.collection == collection}

    def observed(self) -> dict[ReplicaKey, ObservedReplica]:
        statuses = {key: self.status(key) for key in self._keys}
        return {
            key: ObservedReplica(
                s.state,
                max(s.versions, default=0),
                s.generations,
                s.crossing,
                s.epoch,
                gpu_lost=self._gpu_is_lost(key),
                on_gpu=s.gpu is not None and not s.gpu["lost"],
                has_twin=s.has_twin,
            )
            for key, s in statuses.items()
        }

    def _gpu_is_lost(self, key: ReplicaKey) -> bool:
        """And its process worth another one: a GPU that each loses, or does not find, does not have it started again
        and again. A process that found none, and could load nothing without, does not look for it again."""
        status, since = self.status(key), self._ended_for_gpu.get(key, float("-inf"))
        if status.gpu is not None:
            lost = bool(status.gpu["lost"])
        else:
            lost = key.device == "gpu" and status.state == "failed" and status.pid != 0
        return lost and self._clock() >= since + LOST_GPU_PAUSE_S

    def candidates(self, collection: str, shard: int) -> dict[ReplicaKey, Candidate]:
        """The replicas of a shard that run, by what decides which of them leads it."""
        keys = (key for key in self._keys if (key.collection, key.shard) == (collection, shard))
        return {key: self._candidate(key) for key in keys}

    def _candidate(self, key: ReplicaKey) -> Candidate:
        status, now = self.status(key), self._clock()
        silent_s = now - self._silent_since[key] if key in self._silent_since else None
        refused = now < self._call_after.get((key, LEADING), 0.0)
        log_set = status.log_set if status.generations and not status.log_ended else None
        return Candidate(status.state, status.lsn, status.epoch, silent_s, key in self._told_to_lead, refused, log_set)

    def versions(self, collection: str) -> list[int]:
        """The versions of a collection that ready replicas hold, newest first."""
        ready = [s for k, s in self._statuses.items() if k.collection == collection and s.state == "ready"]
        return sorted({version for status in ready for version in status.versions}, reverse=True)

    def holding_before(self, collection: str, generation: int) -> list[ReplicaKey]:
        """Ready replicas of a collection that hold a generation older than this one."""
        ready = {k: s for k, s in self._statuses.items() if k.collection == collection and s.state == "ready"}
        return [key for key, status in ready.items() if any(held < generation for held in status.generations)]

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None:
        """Start a replica; one whose process ended while it was starting has to wait."""
        if self._clock() < self._start_after.get(key, 0.0):
            return
        self._start_after.pop(key, None)
        self._runtime.start(key, wanted)
        self._keys.add(key)
        self.watch()

    def stop(self, key: ReplicaKey) -> None:
        if self._gpu_is_lost(key):
            now = self._clock()  # of others that were ended just now nothing runs yet
            paused = {one: at for one, at in self._ended_for_gpu.items() if now < at + LOST_GPU_PAUSE_S}
            self._ended_for_gpu = {**paused, key: now}
        self._runtime.stop(key)
        self._forget(key)

    def load(self, key: ReplicaKey, version: int) -> None:
        self._call(key, f"loading version {version}", lambda: self._runtime.load(key, version))

    def retire(self, key: ReplicaKey, generation: int) -> None:
        what = f"retiring generations before {generation}"
        self._call(key, what, lambda: self._runtime.retire(key, generation), self._settings.replica_timeout_s)

    def lead(self, key: ReplicaKey) -> None:
        """Have a replica lead its shard. Until that is done, or has failed, `candidates` says that it was asked."""

        async def tell() -> None:
            self._told_to_lead.add(key)
            try:
                await self._runtime.lead(key)
            finally:
                self._told_to_lead.discard(key)

        self._call(key, LEADING, tell, LEAD_TIMEOUT_S)

    def _call(
        self, key: ReplicaKey, what: str, call: Callable[[], Awaitable[None]], timeout_s: float | None = None
    ) -> None:
        """Call a replica in a task of its own, unless another call to it is under way or this one failed lately."""
        if key not in self._calls and self._clock() >= self._call_after.get((key, what), 0.0):
            task = asyncio.ensure_future(self._called(key, what, call, timeout_s))
            self._calls[key] = task
            task.add_done_callback(lambda done: self._call_done(key, done))  # also when cancelled before it began

    def _call_done(self, key: ReplicaKey, task: asyncio.Task[None]) -> None:
        if self._calls.get(key) is task:
            del self._calls[key]

    async def _called(
        self, key: ReplicaKey, what: str, call: Callable[[], Awaitable[None]], timeout_s: float | None
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await call()
                self._set_status(key, await self._runtime.status(key))  # or the next round would call again
            self._call_after.pop((key, what), None)
        except Exception as error:  # noqa: BLE001  # logged, and done again later
            log_failure(f"{key}: {what}", error)
            now = self._clock()
            waiting = {call: at for call, at in self._call_after.items() if at > now}  # of old versions none is left
            self._call_after = {**waiting, (key, what): now + CALL_RETRY_S}

    async def _watch(self, key: ReplicaKey) -> None:
        """Ask a replica for its status for ever; a call that is late is waited for, not repeated."""
        while key in self._keys:
            call = asyncio.ensure_future(self._runtime.status(key))
            call.add_done_callback(_look_at_error)  # a cancelled watcher leaves it unread
            if not await self._answered(key, call):
                if self._end(key):
                    return
                continue
            try:
                self._set_status(key, call.result())
            except NotFound as error:
                log_failure(f"{key}: its process is gone", error)
                if self.status(key).state == "starting":  # one that cannot start must not be started in a busy loop
                    self._start_after[key] = self._clock() + CALL_RETRY_S
                self._forget(key)
                return
            except Unavailable as error:
                self._set_status(key, ReplicaStatus("unreachable", error=str(error)))
            except Exception as error:  # noqa: BLE001  # a watcher that ends would leave its replica as it is for ever
                log_failure(f"{key}: its status", error)
                self._set_status(key, ReplicaStatus("failed", error=str(error) or repr(error)))
            await asyncio.sleep(self._settings.reconcile_period_s)

    async def _answered(self, key: ReplicaKey, call: asyncio.Future[ReplicaStatus]) -> bool:
        """False for a replica that hangs. One that is starting may take long: Ray may have no place for it yet."""
        silent = 0
        while not (await asyncio.wait({call}, timeout=self._settings.replica_timeout_s))[0]:
            if self.status(key).state == "starting":
                self._set_status(key, ReplicaStatus("starting", error=await self._why_it_waits(key)))
            else:
                self._set_status(key, ReplicaStatus("unreachable", error="it does not answer"))
                silent += 1
                if silent >= SILENT_TIMEOUTS_MAX:
                    return False
        return True

    async def _why_it_waits(self, key: ReplicaKey) -> str:
        try:
            return await self._runtime.waits_for(key)
        except Exception as error:  # noqa: BLE001  # it is only told
            log_failure(f"{key}: what it waits for", error)
            return ""

    def _end(self, key: ReplicaKey) -> bool:
        """End a replica that hangs: it would do so until someone acts. The next round starts another."""
        logger.warning("%s hangs and is ended", key)
        try:
            self.stop(key)
        except Exception as error:  # noqa: BLE001  # it is asked again, and ended later
            log_failure(f"{key}: stop", error)
            return False
        return True

    def _set_status(self, key: ReplicaKey, status: ReplicaStatus) -> None:
        if key not in self._keys:
            return
        before = self._statuses.get(key)
        self._statuses[key] = status
        if status.state == "unreachable":
            self._silent_since.setdefault(key, self._clock())
        elif status.state != "starting":  # one of an earlier supervisor, of which nothing is known, may be at work
            self._silent_since.pop(key, None)
        if before is None or _decisive(before) != _decisive(status):
            self._wake.set()

    def _forget(self, key: ReplicaKey) -> None:
        """A replica's process is gone for good: the next round starts another if it is wanted."""
        self._keys.discard(key)
        self._statuses.pop(key, None)
        self._silent_since.pop(key, None)
        self._told_to_lead.discard(key)
        watcher = self._watchers.pop(key, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        if key in self._calls:
            self._calls.pop(key).cancel()
        self._call_after = {(k, what): at for (k, what), at in self._call_after.items() if k != key}
        self._wake.set()


def _decisive(status: ReplicaStatus) -> tuple[object, ...]:
    """What a round must look at without delay. The rest, such as the LSN, changes each second under writes."""
    s = status
    near = tuple(generation for generation, lag in s.crossing.items() if lag <= NEAR_RECORDS)
    logs = s.log_set, s.log_ended, near
    return s.state, s.error, s.versions, s.generations, s.epoch, s.attributes, s.endpoint, logs


def log_failure(what: str, error: Exception) -> None:
    """An error that is not of ours is a bug, and is logged with its traceback."""
    ours = isinstance(error, EaglerayError | TimeoutError)
    logger.warning("%s: %s", what, str(error) or repr(error), exc_info=None if ours else error)


def _look_at_error(call: asyncio.Future[Any]) -> None:
    if not call.cancelled():
        call.exception()
