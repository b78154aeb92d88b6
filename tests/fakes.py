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
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from actors.gpu_device import GpuDevice
from actors.replica import Replica
from actors.replica_upkeep import ReplicaUpkeep, Work
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import ReplicaStatus, Shard
from actors.shard_client import CALL_TIMEOUT_S, ServingTable
from actors.supervisor import Supervisor
from cluster.config import Settings
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.manifest import ManifestLog
from cluster.object_store import ObjectInfo, ObjectStore, Seen, unseen
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Fetched, Hits, ShardSearch
from cluster.upkeep import Seal
from cluster.write import PointWrite, WriteOutcome

T = TypeVar("T")
SETTINGS = Settings(data="memory://fakes", shard_cpus=0.0, reconcile_period_s=0.01, replica_timeout_s=0.2)
PAUSED_S_MAX = 30.0  # what waits for a test to let it go on does not do so for ever


def run_tasks_here(
    function: Callable[[T], Iterator[Any]],
    items: Sequence[T],
    num_cpus: float,
    in_flight: int,
    num_gpus: float = 0.0,
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


class _ProcessStore:
    """The store as one process has it: after `die` every call fails, and while it is `paused` every call waits."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._dead = False
        self._running = threading.Event()
        self._running.set()

    def die(self) -> None:
        self._dead = True
        self._running.set()

    def pause(self) -> None:
        self._running.clear()

    def go_on(self) -> None:
        self._running.set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if not self._running.wait(PAUSED_S_MAX) or self._dead:
                raise Unavailable(f"{name}: the process is dead")
            return getattr(self._inner, name)(*args)

        return call


@dataclass
class _Process:
    """One replica (None while it is dead), its store, calls to it under way, and a gate that is shut while it hangs.

    `num_gpus` are those that it has, or asks for while it `waits` for them. `device` is the GPU that was opened in it.
    """

    replica: Replica | None
    store: _ProcessStore
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    gate: asyncio.Event | None = None
    num_gpus: float = 0.0
    waits: bool = False
    device: GpuDevice | None = None

    def die(self) -> None:
        """Whatever is in memory is gone: calls under way fail, and nothing is put any more."""
        replica, self.replica = self.replica, None
        self.store.die()
        for call in self.calls:
            call.cancel()
        if replica is not None:
            threading.Thread(target=self._end, args=(replica,), daemon=True).start()
        self.open()

    def _end(self, replica: Replica) -> None:
        replica.close()
        if self.device is not None:
            self.device.close()

    def open(self) -> None:
        self.store.go_on()
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.set()


class LocalRuntime:
    """`watched_replicas.Runtime` whose replicas are `Replica`s of this process, which push to each other.

    `kill` makes a replica unreachable until `revive`, which starts it afresh from the newest manifest, as Ray
    restarts an actor; `lose` removes it for good (NotFound), so that the supervisor must start another; `hang`
    stops it like SIGSTOP, with every call to it and from it to the store, until `revive`. `started`, `stopped`,
    `loaded`, `retired` and `led` record what the supervisor did. Followers read the WAL for a search that waits, when
    they are told to (`replica(key).catch_up()`), and each `tick_s` where that is given. `drop_pushes` loses all pushes.
    A primary seals and merges, in this process, at each tick (`replica(key).tick()`).

    There are `gpus`, of which each replica opens its share with `open_gpu`, which may find none; those that ask for
    more than are free wait, as Ray's actors do, until `add_gpus`.
    """

    def __init__(
        self,
        store: ObjectStore,
        cache_dir: Path,
        settings: Settings = SETTINGS,
        tick_s: float | None = None,
        gpus: float = 0.0,
        open_gpu: Callable[[float], GpuDevice | None] = lambda share: None,
    ) -> None:
        self._store = store
        self._cache_dir = cache_dir
        self._settings = settings
        self._tick_s = tick_s
        self._gpus = gpus
        self._open_gpu = open_gpu
        self._processes: dict[ReplicaKey, _Process] = {}
        self.drop_pushes = False
        self.started: list[ReplicaKey] = []
        self.stopped: list[ReplicaKey] = []
        self.loaded: list[tuple[ReplicaKey, int]] = []
        self.retired: list[tuple[ReplicaKey, int]] = []
        self.led: list[ReplicaKey] = []
        weakref.finalize(self, _end_all, self._processes)  # the threads of primaries would go on

    def existing(self) -> list[ReplicaKey]:
        return sorted(self._processes)

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None:
        self.started.append(key)
        if wanted.num_gpus > self.free_gpus:
            store = _ProcessStore(self._store)
            self._processes[key] = _Process(None, store, gate=asyncio.Event(), num_gpus=wanted.num_gpus, waits=True)
        else:
            self._processes[key] = self._new_process(key, wanted.num_gpus)

    @property
    def free_gpus(self) -> float:
        return self._gpus - sum(process.num_gpus for process in self._processes.values() if not process.waits)

    def add_gpus(self, gpus: float) -> None:
        """A node with so many joins: replicas that wait for some are started."""
        self._gpus += gpus
        for key, process in sorted(self._processes.items()):
            if process.waits and process.num_gpus <= self.free_gpus:
                self._processes[key] = self._new_process(key, process.num_gpus)
                process.open()

    async def waits_for(self, key: ReplicaKey) -> str:
        process = self._processes.get(key)
        if process is None or not process.waits:
            return ""
        return f"it asks for {process.num_gpus:g} GPU, {self.free_gpus:g} of {self._gpus:g} are free"

    def stop(self, key: ReplicaKey) -> None:
        self.stopped.append(key)
        self.lose(key)

    async def status(self, key: ReplicaKey) -> ReplicaStatus:
        return (await self._answering(key)).status()

    async def load(self, key: ReplicaKey, version: int) -> None:
        self.loaded.append((key, version))
        await self.ask(key, lambda replica: replica.load(version))

    async def retire(self, key: ReplicaKey, generation: int) -> None:
        await self.ask(key, lambda replica: replica.retire(generation))
        self.retired.append((key, generation))

    async def lead(self, key: ReplicaKey) -> None:
        self.led.append(key)
        await self.ask(key, lambda replica: replica.lead())

    def client(self, key: ReplicaKey) -> LocalShardClient:
        return LocalShardClient(self, key)

    def replica(self, key: ReplicaKey) -> Replica:
        """What runs in the process; for tests that look inside."""
        replica = self._processes[key].replica
        assert replica is not None
        return replica

    def kill(self, key: ReplicaKey) -> None:
        """The process dies; calls to it that are under way fail."""
        self._processes[key].die()

    def lose(self, key: ReplicaKey) -> None:
        """The process is gone for good."""
        process = self._processes.pop(key, None)
        if process is not None:
            process.die()

    def hang(self, key: ReplicaKey) -> None:
        """Every call waits from now on."""
        self._processes[key].gate = asyncio.Event()
        self._processes[key].store.pause()

    def revive(self, key: ReplicaKey) -> None:
        """A dead replica starts afresh; one that hangs goes on."""
        process = self._processes[key]
        if process.replica is None:
            self._processes[key] = self._new_process(key, process.num_gpus)
        process.open()

    def close(self) -> None:
        """End all replicas."""
        _end_all(self._processes)

    def _new_process(self, key: ReplicaKey, num_gpus: float) -> _Process:
        device = self._open_gpu(num_gpus) if num_gpus else None
        process = _Process(None, _ProcessStore(self._store), num_gpus=num_gpus, device=device)
        runtime, store = weakref.ref(self), cast(ObjectStore, process.store)

        def push(data: bytes) -> None:
            here = runtime()
            if here is not None and process.replica is not None:
                here._push(key, data)

        def open_shard() -> Shard:
            on_cpus = key.device == "cpu"
            return Shard(store, key.collection, key.shard, self._cache_dir, device=device, on_cpus=on_cpus)

        upkeep = self._upkeep(key, store, lambda version: process.replica.begin_load(version))
        process.replica = Replica(key, open_shard, self._settings, 1, push, upkeep, device=device)
        if self._tick_s is not None:
            process.replica.keep_ticking(self._tick_s)
        return process

    def _upkeep(self, key: ReplicaKey, store: ObjectStore, load: Callable[[int | None], Any]) -> ReplicaUpkeep:
        collection, shard, cache_dir = key.collection, key.shard, self._cache_dir

        def run(work: Work) -> int | None:
            if isinstance(work, Seal):
                manifest = seal_tail(store, collection, shard, cache_dir, _new_nonce)
            else:
                manifest = merge_segments(store, collection, shard, work.segment_ids, cache_dir, _new_nonce)
            return manifest.version if manifest is not None else None

        read = ManifestLog(store, collection, _new_nonce).read
        return ReplicaUpkeep(str(key), self._settings.upkeep, read, run, load)

    def _push(self, sender: ReplicaKey, data: bytes) -> None:
        for key, process in list(self._processes.items()):
            same_shard = replace(key, replica=0) == replace(sender, replica=0)  # and share of a GPU
            if same_shard and key != sender and process.replica and not process.gate and not self.drop_pushes:
                process.replica.receive(data)

    async def ask(self, key: ReplicaKey, call: Callable[[Replica], Coroutine[Any, Any, T]]) -> T:
        """Call a replica; NotFound where it is gone, Unavailable where it is dead, or dies meanwhile."""
        replica, process = await self._answering(key), self._processes[key]
        task = asyncio.ensure_future(call(replica))
        process.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if process.replica is replica:
                raise
            raise Unavailable(f"replica {key} died") from None
        finally:
            process.calls.discard(task)

    async def _answering(self, key: ReplicaKey) -> Replica:
        process = self._processes.get(key)
        if process is None:
            raise NotFound(f"no process for replica {key}")
        if process.gate is not None:
            await process.gate.wait()
            if process.waits:
                return await self._answering(key)
        if process.replica is None:
            raise Unavailable(f"replica {key} is dead")
        return process.replica


def _new_nonce() -> str:
    return uuid.uuid4().hex


def _end_all(processes: dict[ReplicaKey, _Process]) -> None:
    for process in processes.values():
        process.die()
    processes.clear()


class LocalShardClient:
    """`ShardClient` of one replica of a `LocalRuntime`."""

    def __init__(self, runtime: LocalRuntime, key: ReplicaKey) -> None:
        self._runtime = runtime
        self._key = key

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        return await self._ask(lambda replica: replica.search(request))

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        return await self._ask(lambda replica: replica.fetch(generation, ids, columns, min_lsn, timeout_s))

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        return await self._ask(lambda replica: replica.write(writes, timeout_s))

    async def _ask(self, call: Callable[[Replica], Coroutine[Any, Any, T]]) -> T:
        try:
            return await self._runtime.ask(self._key, call)
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
    mine = LocalRuntime(store, cache_dir, settings) if runtime is None else None
    runtime = runtime or mine
    assert runtime is not None
    supervisor = Supervisor(store, runtime, settings, clock)
    rounds = asyncio.create_task(supervisor.run())
    try:
        yield Serving(runtime, supervisor, LocalDirectory(supervisor, runtime))
    finally:
        rounds.cancel()
        supervisor.close()
        await asyncio.wait({rounds})
        if mine is not None:
            mine.close()


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

Fault = Literal["fail", "lose_answer", "die", "stall"]
ALL_CALLS = frozenset({"get", "put", "put_if_absent", "upload", "download", "objects", "folders", "delete"})


class FaultyStore:
    """An object store whose `at`-th call (from 1; 0: none) goes wrong with Unavailable.

    "fail" does nothing; "lose_answer" does it and then raises; "die" does nothing, then or ever after, like a
    process that was killed there; "stall" sets `stalled`, waits for `go_on`, and then does it. Only the methods in
    `counted` count (and, short of "die", fail). `calls` is how many there were; `at` may be moved while it is in use.
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
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._call("put_if_absent", key, data)

    def upload(self, path: Path, key: str) -> None:
        self._call("upload", path, key)

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        self._call("download", key, path, seen)

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
        if wrong and self._fault == "stall":
            self.stalled.set()
            if not self.go_on.wait(PAUSED_S_MAX):
                raise Unavailable(f"{method} {args[0]}: nobody let the store go on")
            wrong = False
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
