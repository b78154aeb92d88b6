"""Replicas as Ray actors: calls to them, what a primary pushes to the others, and the processes of its upkeep.

Turns Ray's errors into ours.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import ray_tls
from actors.faiss_index import use_threads
from actors.frames import BYTES_MAX
from actors.gpu_device import GpuDevice
from actors.niceness import work_in_background
from actors.replica import Replica
from actors.replica_status import ReplicaStatus
from actors.replica_upkeep import ReplicaUpkeep, Work
from actors.scratch import private_folder
from actors.segment_loader import sweep_cache
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from actors.shard_client import CALL_TIMEOUT_S, ShardEndpoint
from actors.shard_server import ShardServer
from cluster.config import Limits, Settings, parse_ports
from cluster.errors import EaglerayError, Unavailable
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import open_store
from cluster.placement import ReplicaKey, search_threads
from cluster.query import Fetched, Hits, ShardSearch
from cluster.upkeep import Seal
from cluster.write import PointWrite, WriteOutcome

REPLICA_PREFIX = "replica:"
PUSHES_WAITING = 4  # records that wait to be sent; one that finds no place is left to be found in the WAL
PUSHES_IN_FLIGHT = 4  # to one replica; while it has not taken these it gets no more
SWITCH_INTERVAL_S = 0.0005  # of the GIL: see `ShardActor`
UNKNOWN_S = 5.0  # how long a replica whose process was not found is not looked for again
T = TypeVar("T")
logger = logging.getLogger(__name__)


def node_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def answer(reference: Awaitable[T], who: str, dead: type[EaglerayError] = Unavailable) -> T:
    """Await an actor call; its own errors as they are, a dead actor as `dead`, one that restarts as Unavailable."""
    try:
        return await reference
    except RayTaskError as error:
        raise own_error(error) from None
    except ActorDiedError as error:
        raise dead(f"{who} is gone: {error}") from error
    except (RayActorError, RayError) as error:
        raise Unavailable(f"{who} does not answer: {type(error).__name__}") from error


def own_error(error: RayTaskError) -> EaglerayError:
    """What the remote function raised; one that is not of ours, a bug, as the root of our errors with its traceback."""
    cause = error.cause
    return cause if isinstance(cause, EaglerayError) else EaglerayError(str(error))


class ShardActor:
    """A `Replica` in a process of its own.

    Python lets a thread that computes keep the GIL for 5 ms before another that waits for it gets it, and a call takes
    it several times. With half a millisecond the 99th percentile of a call beside a thread busy in Python was a quarter
    to a fifth (docs/decisions/0006-speed.md); where no thread is busy in Python it changes nothing.
    """

    def __init__(self, settings: Settings, key: ReplicaKey, shards: int, num_gpus: float = 0.0) -> None:
        """`num_gpus` is what Ray gave it of a GPU; one that cannot be used is told in its status."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._settings = settings
        self._key = key
        self._device, self._no_gpu = open_gpu(key, num_gpus)
        threads = search_threads(shards, settings, node_cores())
        pushes = PeerPushes(key, settings.namespace, lambda: self._replica.replicas)
        upkeep = ReplicaUpkeep(
            str(key), settings.upkeep, self._manifest, self._run, lambda v: self._replica.begin_load(v)
        )
        self._replica = Replica(key, self._open, settings, threads, pushes.push, upkeep, device=self._device)
        self._replica.keep_ticking()
        self._endpoint = listen_directly(self._replica, key, settings)

    def _open(self) -> Shard:
        cache_dir = cache_folder(self._settings)
        sweep_cache(cache_dir, time.time())
        store = open_store(self._settings.data)
        place = (store, self._key.collection, self._key.shard, cache_dir)
        return Shard(*place, device=self._device, on_cpus=self._key.device == "cpu", no_gpu=self._no_gpu)

    def _manifest(self, version: int) -> Manifest:
        return ManifestLog(open_store(self._settings.data), self._key.collection, _new_nonce).read(version)

    def _run(self, work: Work) -> int | None:
        return run_in_own_process(do_upkeep, self._settings, self._key, work)

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        return await self._replica.search(request)

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        return await self._replica.fetch(generation, ids, columns, min_lsn, timeout_s)

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        return await self._replica.write(writes, timeout_s)

    async def receive(self, data: bytes) -> None:
        """A record that the primary pushed; returns when it was applied, or left to be found in the WAL."""
        applied = self._replica.receive(data)
        if applied is not None:
            await asyncio.wrap_future(applied)

    async def load(self, version: int) -> None:
        await self._replica.load(version)

    async def retire(self, generation: int) -> None:
        await self._replica.retire(generation)

    async def lead(self) -> None:
        await self._replica.lead()

    async def status(self) -> ReplicaStatus:
        return replace(self._replica.status(), endpoint=self._endpoint)


def open_gpu(key: ReplicaKey, share: float) -> tuple[GpuDevice | None, str]:
    """The GPU of a replica's process, or why it has none, though it should: then the twins of its indexes answer."""
    if key.device == "cpu":
        return None, ""
    try:
        return GpuDevice.open(share), ""
    except Unavailable as error:
        logger.error("%s goes on without a GPU: %s", key, error)
        return None, str(error)


def listen_directly(replica: Replica, key: ReplicaKey, settings: Settings) -> ShardEndpoint | None:
    """Serve direct connections on this node's address, for as long as this process runs.

    None where the settings say so, or where that failed: then the replica is reached by actor calls.
    """
    if settings.shard_transport != "direct":
        return None
    try:
        server = ShardServer(replica, key, frame_bytes_max(settings.limits), ray_tls.server_context())
        return server.start(ray.util.get_node_ip_address(), parse_ports(settings.shard_ports))
    except (EaglerayError, OSError) as error:
        logger.error("%s takes no direct connections, only actor calls, which are slower: %s", key, error)
        return None


def frame_bytes_max(limits: Limits) -> int:
    """What a request may have: as JSON a vector takes at least half of its bytes, and a batch has more than one."""
    return min(4 * max(limits.body_bytes, limits.queued_write_bytes_per_shard, limits.wal_object_bytes), BYTES_MAX)


def cache_folder(settings: Settings) -> Path:
    """Where the replicas of this node keep what they fetched."""
    return Path(settings.cache_dir) if settings.cache_dir else private_folder("cache")


class ActorShardClient:
    """`ShardClient` by plain actor call."""

    def __init__(self, handle: Any, key: ReplicaKey) -> None:
        self._handle = handle
        self._who = f"replica {key}"

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        return await answer(self._handle.search.remote(request), self._who)

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        return await answer(self._handle.fetch.remote(generation, ids, columns, min_lsn, timeout_s), self._who)

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        return await answer(self._handle.write.remote(writes, timeout_s), self._who)


# --- what a primary pushes ----------------------------------------------------------------------------------------


class PeerPushes:
    """Sends records to the other replicas of a shard with the same share of a GPU: there are `replicas()` in all, and
    on GPUs perhaps one more that stands in (`placement.stand_ins`).

    Those with another share are there while the collection goes over to it, and read the WAL.

    `push` never blocks and promises nothing: a replica that is missing, slow or dead finds the record in the WAL. A
    thread sends, for Ray takes milliseconds to find an actor by its name; handles are kept until their actor died.
    """

    def __init__(self, key: ReplicaKey, namespace: str, replicas: Callable[[], int]) -> None:
        self._key = key
        self._namespace = namespace
        self._replicas = replicas
        self._more = 1 if key.device == "gpu" else 0
        self._waiting: queue.Queue[bytes] = queue.Queue(PUSHES_WAITING)
        self._handles: dict[ReplicaKey, Any] = {}
        self._in_flight: dict[ReplicaKey, list[Any]] = {}
        self._look_after: dict[ReplicaKey, float] = {}
        self._thread: threading.Thread | None = None

    def push(self, data: bytes) -> None:
        """Called by one thread at a time."""
        if self._replicas() + self._more < 2:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_for_ever, name="push", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(data)
        except queue.Full:
            logger.debug("%s: a record is not pushed, %d wait", self._key, PUSHES_WAITING)

    def _send_for_ever(self) -> None:
        while True:
            data = self._waiting.get()
            try:
                self._send(data)
            except Exception:  # whatever Ray raises: the next record is tried again
                logger.exception("%s: pushing a record", self._key)

    def _send(self, data: bytes) -> None:
        peers = [replace(self._key, replica=number) for number in range(self._replicas() + self._more)]
        willing = [peer for peer in peers if peer != self._key and self._takes(peer)]
        reference = ray.put(data) if len(willing) > 1 else data  # one copy for all
        for peer in willing:
            self._in_flight.setdefault(peer, []).append(self._handles[peer].receive.remote(reference))

    def _takes(self, peer: ReplicaKey) -> bool:
        """Whether a replica is known and has taken what it was sent."""
        self._forget_done(peer)
        if len(self._in_flight.get(peer, ())) >= PUSHES_IN_FLIGHT:
            return False
        if peer not in self._handles and time.monotonic() >= self._look_after.get(peer, 0.0):
            try:
                self._handles[peer] = ray.get_actor(replica_name(peer), namespace=self._namespace)
            except ValueError:
                self._look_after[peer] = time.monotonic() + UNKNOWN_S
        return peer in self._handles

    def _forget_done(self, peer: ReplicaKey) -> None:
        references = self._in_flight.pop(peer, [])
        if not references:
            return
        done, pending = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            try:
                ray.get(reference)
            except ActorDiedError:  # another may be started under its name
                self._handles.pop(peer, None)
                pending = []
            except RayError as error:
                logger.debug("%s: a record pushed to %s: %s", self._key, peer, error)
        self._in_flight[peer] = pending


def replica_name(key: ReplicaKey) -> str:
    """The name of a replica's actor."""
    return f"{REPLICA_PREFIX}{key}"


# --- upkeep -------------------------------------------------------------------------------------------------------


def do_upkeep(settings: Settings, key: ReplicaKey, work: Work) -> int | None:
    """Seal or merge the shard of a replica, in this process; the manifest version that was committed."""
    work_in_background()
    use_threads(1)
    store, place = open_store(settings.data), (key.collection, key.shard)
    if isinstance(work, Seal):
        manifest = seal_tail(store, *place, cache_folder(settings), _new_nonce, threads=1)
    else:
        manifest = merge_segments(store, *place, work.segment_ids, cache_folder(settings), _new_nonce, threads=1)
    return manifest.version if manifest is not None else None


def _new_nonce() -> str:
    return uuid.uuid4().hex


def run_in_own_process(function: Callable[..., T], *args: Any) -> T:
    """Run a function in a process of its own, on this node if that is possible; blocks.

    It is not repeated when the process dies (Unavailable): whoever wants it looks first whether it is still wanted.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1, scheduling_strategy=here)(function)
    try:
        result: T = ray.get(task.remote(*args))
    except RayTaskError as error:
        raise own_error(error) from None
    except RayError as error:
        raise Unavailable(f"the process of {function.__name__} was lost: {type(error).__name__}: {error}") from error
    return result
