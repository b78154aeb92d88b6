"""Small real stand-ins for Ray, for a store that fails and for the clock: the whole system in one process.

A served Eagleray without Ray, inside a running event loop:

    async with serving(store, cache_dir) as eagleray:
        table = await table_when(eagleray.directory, lambda table: "words" in table.collections)
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from actors.shard import ReplicaStatus, Shard
from actors.shard_client import ServingTable
from actors.supervisor import Supervisor
from cluster.config import Settings
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.object_store import ObjectInfo, ObjectStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Hits, ShardSearch

T = TypeVar("T")
SETTINGS = Settings(data="memory://fakes", shard_cpus=0.0, reconcile_period_s=0.01, replica_timeout_s=0.2)


def run_tasks_here(
    function: Callable[[T], Iterator[Any]], items: Sequence[T], num_cpus: float, in_flight: int
) -> Iterator[tuple[int, Any]]:
    """A `jobs.importer.TaskRunner`: one item after the other in this process, each pickled as Ray would."""
    for number, item in enumerate(items):
        for event in function(pickle.loads(pickle.dumps(item))):
            yield number, pickle.loads(pickle.dumps(event))


class ManualClock:
    """A clock that stands still until it is told to move."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


# --- replicas in this process -----------------------------------------------------------------------------------


@dataclass
class _Process:
    """One replica: its shard (None while it is dead), why it loaded nothing, and a gate that is shut while it hangs."""

    shard: Shard | None
    error: str = ""
    gate: asyncio.Event | None = None


class LocalRuntime:
    """`watched_replicas.Runtime` whose replicas are `Shard`s of this process.

    `kill` makes a replica unreachable until `revive`, which starts it afresh from the newest manifest, as Ray
    restarts an actor; `lose` removes it for good (NotFound), so that the supervisor must start another; `hang`
    lets every call wait until `revive`. `started`, `stopped`, `loaded` and `retired` record what the supervisor did.
    """

    def __init__(self, store: ObjectStore, cache_dir: Path) -> None:
        self._store = store
        self._cache_dir = cache_dir
        self._processes: dict[ReplicaKey, _Process] = {}
        self.started: list[ReplicaKey] = []
        self.stopped: list[ReplicaKey] = []
        self.loaded: list[tuple[ReplicaKey, int]] = []
        self.retired: list[tuple[ReplicaKey, int]] = []

    def existing(self) -> list[ReplicaKey]:
        return sorted(self._processes)

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None:
        self.started.append(key)
        self._processes[key] = self._new_process(key)

    def stop(self, key: ReplicaKey) -> None:
        self.stopped.append(key)
        self.lose(key)

    async def status(self, key: ReplicaKey) -> ReplicaStatus:
        shard = await self._answering(key)
        status = shard.status()
        process = self._processes[key]
        return status if status.state == "ready" else ReplicaStatus("failed", error=process.error or status.error)

    async def load(self, key: ReplicaKey, version: int) -> None:
        shard = await self._answering(key)
        self.loaded.append((key, version))
        await asyncio.to_thread(shard.load, version)

    async def retire(self, key: ReplicaKey, generation: int) -> None:
        shard = await self._answering(key)
        self.retired.append((key, generation))
        shard.retire(generation)

    def client(self, key: ReplicaKey) -> LocalShardClient:
        return LocalShardClient(self, key)

    def kill(self, key: ReplicaKey) -> None:
        """The process dies; calls that hang in it fail."""
        process = self._processes[key]
        process.shard = None
        _open(process)

    def lose(self, key: ReplicaKey) -> None:
        """The process is gone for good."""
        process = self._processes.pop(key, None)
        if process is not None:
            process.shard = None
            _open(process)

    def hang(self, key: ReplicaKey) -> None:
        """Every call waits from now on."""
        self._processes[key].gate = asyncio.Event()

    def revive(self, key: ReplicaKey) -> None:
        """A dead replica starts afresh; one that hangs goes on."""
        process = self._processes[key]
        if process.shard is None:
            self._processes[key] = self._new_process(key)
        _open(process)

    def _new_process(self, key: ReplicaKey) -> _Process:
        process = _Process(Shard(self._store, key.collection, key.shard, self._cache_dir))
        try:
            process.shard.load()
        except EaglerayError as error:
            process.error = f"{type(error).__name__}: {error}"
        return process

    async def _answering(self, key: ReplicaKey) -> Shard:
        """The replica's shard once it answers; NotFound where it is gone, Unavailable where it is dead."""
        process = self._processes.get(key)
        if process is None:
            raise NotFound(f"no process for replica {key}")
        if process.gate is not None:
            await process.gate.wait()
        if process.shard is None:
            raise Unavailable(f"replica {key} is dead")
        return process.shard


def _open(process: _Process) -> None:
    gate, process.gate = process.gate, None
    if gate is not None:
        gate.set()


class LocalShardClient:
    """`ShardClient` of one replica of a `LocalRuntime`."""

    def __init__(self, runtime: LocalRuntime, key: ReplicaKey) -> None:
        self._runtime = runtime
        self._key = key

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        return (await self._shard()).search(request)

    async def fetch(self, generation: int, ids: Any, columns: Sequence[str]) -> tuple[Any, Any]:
        return (await self._shard()).fetch(generation, ids, columns)

    async def _shard(self) -> Shard:
        try:
            return await self._runtime._answering(self._key)
        except NotFound as error:
            raise Unavailable(str(error)) from error


class LocalDirectory:
    """`shard_client.Directory` over a plain `Supervisor` and the `LocalRuntime` it drives."""

    def __init__(self, supervisor: Supervisor, runtime: LocalRuntime) -> None:
        self._supervisor = supervisor
        self._runtime = runtime
        self._metrics: dict[str, Any] = {}

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        return await self._supervisor.next_table(known_stamp)

    async def refresh(self, collection: str) -> None:
        await self._supervisor.refresh(collection)

    async def describe(self, collection: str) -> dict[str, Any]:
        return self._supervisor.describe(collection)

    async def exchange_metrics(self, coordinator: str, samples: Any) -> dict[str, Any]:
        """Keep one coordinator's metrics, return those of all."""
        self._metrics[coordinator] = samples
        return self._metrics

    def client(self, key: ReplicaKey) -> LocalShardClient:
        return self._runtime.client(key)


@dataclass(frozen=True)
class Serving:
    """An Eagleray without endpoint: replicas, supervisor, and the directory a coordinator asks."""

    runtime: LocalRuntime
    supervisor: Supervisor
    directory: LocalDirectory


@asynccontextmanager
async def serving(
    store: ObjectStore,
    cache_dir: Path,
    settings: Settings = SETTINGS,
    clock: Callable[[], float] = time.monotonic,
    runtime: LocalRuntime | None = None,
) -> AsyncIterator[Serving]:
    """A supervisor doing its rounds over in-process replicas (`runtime`: those of an earlier supervisor)."""
    runtime = runtime or LocalRuntime(store, cache_dir)
    supervisor = Supervisor(store, runtime, settings, clock)
    rounds = asyncio.create_task(supervisor.run())
    try:
        yield Serving(runtime, supervisor, LocalDirectory(supervisor, runtime))
    finally:
        rounds.cancel()
        supervisor.close()
        await asyncio.wait({rounds})


async def table_when(
    directory: LocalDirectory | Supervisor, wanted: Callable[[ServingTable], bool], timeout_s: float = 20.0
) -> ServingTable:
    """The first serving table for which `wanted` is true; needs a running `supervisor.run()`."""
    stamp = None
    async with asyncio.timeout(timeout_s):
        while True:
            table = await directory.next_table(stamp)
            if wanted(table):
                return table
            stamp = table.stamp


# --- a store that fails -----------------------------------------------------------------------------------------

Fault = Literal["fail", "lose_answer", "die"]
ALL_CALLS = frozenset({"get", "put", "put_if_absent", "upload", "download", "objects", "folders", "delete"})


class FaultyStore:
    """An object store whose `at`-th call (from 1; 0: none) goes wrong with Unavailable.

    "fail" does nothing; "lose_answer" does it and then raises; "die" does nothing, then or ever after, like a
    process that was killed there. Only the methods in `counted` count (and, short of "die", fail). `calls` is how
    many there were; `at` may be moved while it is in use.
    """

    def __init__(
        self, inner: ObjectStore, at: int = 0, fault: Fault = "fail", counted: frozenset[str] = ALL_CALLS
    ) -> None:
        self._inner = inner
        self.at = at
        self._fault = fault
        self._counted = counted
        self._lock = threading.Lock()
        self._dead = False
        self.calls = 0

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._call("put_if_absent", key, data)

    def upload(self, path: Path, key: str) -> None:
        self._call("upload", path, key)

    def download(self, key: str, path: Path) -> None:
        self._call("download", key, path)

    def local_path(self, key: str) -> Path | None:
        return self._inner.local_path(key)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._call("objects", prefix)

    def folders(self, prefix: str) -> list[str]:
        return self._call("folders", prefix)

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def _call(self, method: str, *args: Any) -> Any:
        wrong = self._goes_wrong(method)
        if wrong and self._fault != "lose_answer":
            raise Unavailable(f"{method} {args[0]}: the store failed, as it was told to at call {self.at}")
        answer = getattr(self._inner, method)(*args)
        if wrong:
            raise Unavailable(f"{method} {args[0]}: the store's answer was lost, as it was told to at call {self.at}")
        return answer

    def _goes_wrong(self, method: str) -> bool:
        with self._lock:
            if method in self._counted:
                self.calls += 1
                if self.calls == self.at:
                    self._dead = self._fault == "die"
                    return True
            return self._dead
