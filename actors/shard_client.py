"""How a coordinator talks to a replica: the protocol, and what the coordinator knows of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.config import CollectionConfig
from cluster.errors import EaglerayError
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, ShardSearch
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome

CALL_TIMEOUT_S = 60.0  # of callers that have no deadline of their own


class ShardClient(Protocol):
    """Calls to one replica. Every method raises Unavailable when the replica cannot be reached.

    A call ends within its `timeout_s`, whether or not its caller still waits: what is abandoned does not pile up.
    """

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        """One outcome per group of the request (`Shard.search`)."""
        ...

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        """Points by an Arrow array of ids (`Shard.fetch`), once the replica has applied `min_lsn`."""
        ...

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        """One outcome per write, each acknowledged by itself.

        Fenced where the replica is not the primary (any more): nothing was applied, ask the one that is. Exhausted
        where its queue is full: nothing was applied. Unavailable: nobody knows whether it was, or will be, unless it
        says that nothing was applied: the write was still in the queue after `timeout_s`.
        """
        ...


@dataclass(frozen=True)
class ShardEndpoint:
    """Where a replica's process listens for direct connections, and the secret that proves that it is this process.

    The secret is made anew by every process, travels over Ray only, and is shown nowhere.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServedCollection:
    """What coordinators serve of one collection: one generation, and the ready replicas that hold it.

    Its logs begin behind LSN `log_start`: what has that LSN or a lower one, in whatever log, is in the generation.
    """

    config: CollectionConfig
    routing: Routing
    version: int
    generation: int
    shard_points: dict[int, int]
    attributes: Mapping[str, str]  # name -> Arrow type, as text
    replicas: dict[int, tuple[ReplicaKey, ...]]
    primaries: dict[int, ReplicaKey] = field(default_factory=dict)  # of the shards that have one
    log_start: int = 0


@dataclass(frozen=True)
class ServingTable:
    """All collections as they are served now. `stamp` differs whenever anything else does."""

    stamp: str
    collections: dict[str, ServedCollection] = field(default_factory=dict)
    unready: dict[str, str] = field(default_factory=dict)  # collection -> why it is not (fully) served
    endpoints: dict[ReplicaKey, ShardEndpoint] = field(default_factory=dict)  # of replicas that listen
    waiting: dict[str, str] = field(default_factory=dict)  # why a newer generation is not served yet, by collection


class Directory(Protocol):
    """Where coordinators learn the serving table and reach replicas."""

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        """The table, as soon as its stamp differs from `known_stamp` (or unchanged after some seconds).

        Unavailable while the supervisor is away, or has just started and does not know yet what is served.
        """
        ...

    async def refresh(self, collection: str) -> None:
        """Have the supervisor look at a collection now, after something was committed."""
        ...

    async def describe(self, collection: str) -> dict[str, Any]:
        """Manifest facts and every replica's status of a collection.

        NotFound; Corrupt where the only manifest it could know cannot be read; Unavailable.
        """
        ...

    def client(self, key: ReplicaKey) -> ShardClient:
        """A client for a replica of the last table; Unavailable where its process is not known."""
        ...
