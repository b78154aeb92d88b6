"""The supervisor as a Ray actor, and how the cluster's actors are started, found and ended.

`ray_replica` has the replicas, `ray_jobs` what runs and ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray

from actors import ray_tls
from actors.direct_client import DirectConnections
from actors.ray_replica import (
    REPLICA_PREFIX,
    ActorShardClient,
    ShardActor,
    answer,
    node_cores,
    own_error,
    replica_name,
)
from actors.shard import ReplicaStatus
from actors.shard_client import ServingTable, ShardClient
from actors.supervisor import Supervisor
from cluster.config import Settings
from cluster.errors import Conflict, NotFound, Unavailable
from cluster.object_store import open_store
from cluster.placement import ReplicaKey, WantedReplica

__all__ = ["ActorShardClient", "ShardActor", "answer", "node_cores", "own_error"]  # of `ray_replica`, for others
SUPERVISOR = "supervisor"
SUPERVISOR_RETRY_S = 0.5
METRICS_KEPT_S = 60.0  # coordinators leave theirs every 2 s; one that stopped is gone
logger = logging.getLogger(__name__)


def connect(address: str | None) -> None:
    """Join a running Ray cluster (`None`: the one this process was started for, else the one on this machine)."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise Unavailable(f"no Ray cluster to join: {error}") from error


# --- replicas ---------------------------------------------------------------------------------------------------


class RayRuntime:
    """Replicas as detached named actors (`watched_replicas.Runtime`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.handles: dict[ReplicaKey, Any] = {}
        self._asked: dict[ReplicaKey, WantedReplica] = {}  # what was started here, not by an earlier supervisor

    def existing(self) -> list[ReplicaKey]:
        for name in _named_actors(self._settings.namespace):
            if name.startswith(REPLICA_PREFIX):
                key = ReplicaKey.parse(name.removeprefix(REPLICA_PREFIX))
                self.handles[key] = ray.get_actor(name, namespace=self._settings.namespace)
        return list(self.handles)

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None:
        """Ray's own bound of 1,000 calls at once is enough: each ends at its caller's deadline (`ShardClient`), and of
        those that wait for an LSN that nobody has seen a coordinator sends `batcher.CALLS_AHEAD_MAX`."""
        options = {
            **_detached(replica_name(key), self._settings.namespace),
            "num_cpus": wanted.num_cpus,
            "num_gpus": wanted.num_gpus,
        }
        actor = ray.remote(ShardActor).options(**options)
        self._asked[key] = wanted
        self.handles[key] = actor.remote(self._settings, key, wanted.shards, wanted.num_gpus)

    def stop(self, key: ReplicaKey) -> None:
        handle = self.handles.pop(key, None)
        self._asked.pop(key, None)
        if handle is not None:
            ray.kill(handle)

    async def status(self, key: ReplicaKey) -> ReplicaStatus:
        return await answer(self._handle(key).status.remote(), f"replica {key}", dead=NotFound)

    async def waits_for(self, key: ReplicaKey) -> str:
        """What Ray may lack to start it: such as GPUs, for which an actor waits until a node with some joins.

        Nothing where it has its place, and is loading.
        """
        if await asyncio.to_thread(_has_a_place, self._handle(key)):
            return ""
        wanted = self._asked.get(key)
        asked = {"GPU": key.num_gpus}  # of what an earlier supervisor started
        if wanted is not None:
            asked = {"CPU": wanted.num_cpus, "GPU": wanted.num_gpus}
        return await asyncio.to_thread(_lacking, asked)

    async def load(self, key: ReplicaKey, version: int) -> None:
        await answer(self._handle(key).load.remote(version), f"replica {key}", dead=NotFound)

    async def retire(self, key: ReplicaKey, generation: int) -> None:
        await answer(self._handle(key).retire.remote(generation), f"replica {key}", dead=NotFound)

    async def lead(self, key: ReplicaKey) -> None:
        await answer(self._handle(key).lead.remote(), f"replica {key}", dead=NotFound)

    def _handle(self, key: ReplicaKey) -> Any:
        if key not in self.handles:
            raise NotFound(f"no process for replica {key}")
        return self.handles[key]


def _has_a_place(actor: Any) -> bool:
    """Whether a process was started for an actor. Not documented, though a DeveloperAPI: what is asks a server."""
    return bool(ray._private.state.actors(actor._actor_id.hex())["Address"]["Port"])


def _lacking(asked: Mapping[str, float]) -> str:
    """Of the resources that a replica asks for, those of which the whole cluster has not as much free; "": none."""
    there, free = ray.cluster_resources(), ray.available_resources()
    short = [
        f"{amount:g} {name}, {free.get(name, 0.0):g} of the cluster's {there.get(name, 0.0):g} are free"
        for name, amount in asked.items()
        if amount > free.get(name, 0.0)
    ]
    return f"Ray has no place for it yet: it asks for {'; and for '.join(short)}" if short else ""


def _detached(name: str, namespace: str) -> dict[str, Any]:
    """Options of an actor that outlives its creator, is restarted for ever, and whose calls are not repeated."""
    return {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
    }


def _named_actors(namespace: str) -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [entry["name"] for entry in found if entry["namespace"] == namespace]


# --- supervisor -------------------------------------------------------------------------------------------------


class SupervisorActor:
    """The `Supervisor` in a process of its own."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._runtime = RayRuntime(settings)
        store = await asyncio.to_thread(open_store, settings.data)
        self._supervisor = Supervisor(store, self._runtime, settings)
        self._metrics: dict[str, tuple[float, Any]] = {}
        self._settings = settings
        self._rounds = asyncio.get_running_loop().create_task(self._supervisor.run())
        self._rounds.add_done_callback(_die_with)

    async def next_table(self, known_stamp: str | None) -> tuple[ServingTable, dict[ReplicaKey, Any]]:
        table = await self._supervisor.next_table(known_stamp)
        return table, dict(self._runtime.handles)

    async def refresh(self, collection: str) -> None:
        await self._supervisor.refresh(collection)

    async def describe(self, collection: str) -> dict[str, Any]:
        return self._supervisor.describe(collection)

    async def settings(self) -> Settings:
        return self._settings

    async def exchange_metrics(self, coordinator: str, samples: Any) -> dict[str, Any]:
        """Keep one coordinator's metrics, return those of all that left some lately."""
        now = time.monotonic()
        self._metrics[coordinator] = (now, samples)
        self._metrics = {name: kept for name, kept in self._metrics.items() if now - kept[0] < METRICS_KEPT_S}
        return {name: latest for name, (_, latest) in self._metrics.items()}


def _die_with(rounds: asyncio.Task[None]) -> None:
    """A supervisor without its rounds is worse than none: end the process, Ray starts it afresh."""
    if not rounds.cancelled():
        logger.error("the supervisor's rounds ended", exc_info=rounds.exception())
        os._exit(1)


async def ensure_supervisor(settings: Settings) -> Any:
    """The handle of a supervisor with these settings: the running one, else a new one in its place.

    A supervisor holds no state, so replacing it loses nothing. Conflict where the one that runs has other data.
    """
    supervisor = _start_supervisor(settings)
    running: Settings = await answer(supervisor.settings.remote(), "the supervisor")
    if running == settings:
        return supervisor
    if running.data != settings.data:
        raise Conflict(
            f"an Eagleray with data in {running.data} runs under the namespace {settings.namespace!r}; "
            f"stop it, or give the one for {settings.data} another namespace"
        )
    logger.warning("the settings changed: a new supervisor takes over")
    ray.kill(supervisor)
    return _start_supervisor(settings)


def _start_supervisor(settings: Settings) -> Any:
    """Ray lets one name exist once: the running supervisor if there is one."""
    options = _detached(SUPERVISOR, settings.namespace) | {"num_cpus": 0}
    return ray.remote(SupervisorActor).options(**options).remote(settings)


def find_supervisor(namespace: str) -> Any | None:
    """The handle of a running supervisor, or None."""
    try:
        return ray.get_actor(SUPERVISOR, namespace=namespace)
    except ValueError:
        return None


def stop_actors(namespace: str) -> int:
    """Kill the supervisor and then every replica of a namespace; returns how many there were."""
    names = sorted(_named_actors(namespace), key=lambda name: name != SUPERVISOR)
    for name in names:
        ray.kill(ray.get_actor(name, namespace=namespace))
    return len(names)


class RayDirectory:
    """`Directory` over the supervisor actor, found again by its name if another took over.

    Replicas that listen are called directly, the others by actor call.
    """

    def __init__(self, supervisor: Any, namespace: str) -> None:
        self._supervisor = supervisor
        self._namespace = namespace
        self._handles: dict[ReplicaKey, Any] = {}
        self._direct = DirectConnections(ray_tls.client_context())

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        table: ServingTable
        table, self._handles = await self._call(self._supervisor.next_table.remote(known_stamp))
        self._direct.update(table.endpoints)
        return table

    async def refresh(self, collection: str) -> None:
        await self._call(self._supervisor.refresh.remote(collection))

    async def describe(self, collection: str) -> dict[str, Any]:
        facts: dict[str, Any] = await self._call(self._supervisor.describe.remote(collection))
        return facts

    async def exchange_metrics(self, coordinator: str, samples: Any) -> dict[str, Any]:
        everyone: dict[str, Any] = await self._call(self._supervisor.exchange_metrics.remote(coordinator, samples))
        return everyone

    def client(self, key: ReplicaKey) -> ShardClient:
        if key not in self._handles:
            raise Unavailable(f"replica {key} is not known yet")
        return self._direct.client(key) or ActorShardClient(self._handles[key], key)

    def close(self) -> None:
        """End the direct connections."""
        self._direct.close()

    async def _call(self, reference: Awaitable[Any]) -> Any:
        try:
            return await answer(reference, "the supervisor")
        except Unavailable:
            self._supervisor = await asyncio.to_thread(find_supervisor, self._namespace) or self._supervisor
            raise


def wait_until_served(
    namespace: str, collection: str, generation: int, timeout_s: float, tell: Callable[[str], None] = lambda why: None
) -> None:
    """Tell the supervisor of a commit and wait until it is served; returns at once where none runs.

    `tell` hears what it waits for, whenever that changes.
    """
    supervisor = find_supervisor(namespace)
    if supervisor is None:
        return
    asyncio.run(_wait_until_served(RayDirectory(supervisor, namespace), collection, generation, timeout_s, tell))


async def _wait_until_served(
    directory: RayDirectory, collection: str, generation: int, timeout_s: float, tell: Callable[[str], None]
) -> None:
    reason = "it loads"

    def hear(why: str) -> None:
        nonlocal reason
        if why and why != reason:
            reason = why
            tell(why)

    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await directory.refresh(collection)
                    return await _served(directory, collection, generation, hear)
                except Unavailable as error:  # the supervisor starts, or is being replaced
                    reason = str(error)
                    await asyncio.sleep(SUPERVISOR_RETRY_S)
    except TimeoutError:
        committed = f"generation {generation} of {collection!r} is committed, but not served after {timeout_s:g} s"
        raise Unavailable(f"{committed}: {reason}") from None


async def _served(directory: RayDirectory, collection: str, generation: int, tell: Callable[[str], None]) -> None:
    """Until the serving table has that generation, on all replicas; `tell` hears what it waits for, such as GPUs."""
    stamp = None
    while True:
        table = await directory.next_table(stamp)
        served = table.collections.get(collection)
        if served is not None and served.generation >= generation and collection not in table.unready:
            return
        tell(table.waiting.get(collection) or table.unready.get(collection, ""))
        stamp = table.stamp


def settings_of_supervisor(namespace: str) -> Settings:
    """The settings of the Eagleray that runs in this cluster; NotFound where none does."""
    supervisor = find_supervisor(namespace)
    if supervisor is None:
        raise NotFound(f"no Eagleray runs in this cluster under the namespace {namespace!r}: give --data")
    settings: Settings = ray.get(supervisor.settings.remote())
    return settings
