"""One hop from a coordinator to a replica: the direct connection, Ray's actor call, and a bare TCP echo as the floor.

    python -m benchmarks.transports [--rounds 5] [--seconds 1.0] [--dimension 784]

Caller and replica are processes of their own, both on uvloop; the replica answers at once, so that what is measured is
the hop alone: encoding, two processes, decoding. A request is one vector, an answer ten hits. Each round measures every
transport in turn; the table has medians over the rounds, and ratios to the actor call.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import uvloop

from actors.direct_client import DirectShardClient, ShardConnection
from actors.ray_replica import ActorShardClient
from actors.shard_client import CALL_TIMEOUT_S, ShardEndpoint
from actors.shard_server import ShardServer
from cluster.errors import EaglerayError
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome

K, CONCURRENT = 10, 64
KEY = ReplicaKey("bench", 0, 0)
HOST = "127.0.0.1"
LENGTH = struct.Struct("<I")
ANSWER_BYTES = 16 * K
FRAME_BYTES_MAX = 16 * 1024 * 1024
Call = Callable[[], Awaitable[object]]


class InstantReplica:
    """Answers every search with the same hits."""

    def __init__(self) -> None:
        ids, scores = pa.array(np.arange(K)), np.arange(K, dtype=np.float32)
        self._answer = (Hits(np.array([K]), ids, scores, None, 7),)

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        return self._answer

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        raise NotImplementedError("only searches are measured")

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        raise NotImplementedError("only searches are measured")


# --- the floor: a length and so many bytes -------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    """Takes messages that begin with their length; `take` gets each of them."""

    def __init__(self, take: Callable[[asyncio.WriteTransport, memoryview], None]) -> None:
        self._take = take
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        view, at = memoryview(self._buffer), 0
        while len(view) - at >= LENGTH.size:
            stop = at + LENGTH.size + LENGTH.unpack_from(view, at)[0]
            if stop > len(view):
                break
            self._take(self._transport, view[at + LENGTH.size : stop])
            at = stop
        view.release()
        del self._buffer[:at]


def serve_echo(parent: Connection) -> None:
    answer = LENGTH.pack(ANSWER_BYTES) + bytes(ANSWER_BYTES)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Echo(lambda to, _: to.write(answer)), HOST, 0)
        parent.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, parent.recv)

    uvloop.run(serve())


async def echo_call(port: int, dimension: int) -> Call:
    """Answers come in the order of the requests."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []
    request = LENGTH.pack(4 * dimension) + bytes(4 * dimension)

    def answered(_: asyncio.WriteTransport, answer: memoryview) -> None:
        waiting.pop(0).set_result(None)

    transport, _ = await loop.create_connection(lambda: Echo(answered), HOST, port)

    async def call() -> None:
        future = loop.create_future()
        waiting.append(future)
        transport.write(request)
        await future

    return call


# --- the others -----------------------------------------------------------------------------------------------------


def serve_directly(parent: Connection) -> None:
    server = ShardServer(InstantReplica(), KEY, FRAME_BYTES_MAX)
    parent.send(server.start(HOST, range(0)))
    parent.recv()
    server.close()


@contextmanager
def process(serve: Callable[[Connection], None]) -> Iterator[Any]:
    """What a process that serves says of where it does."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(there,), daemon=True)
    child.start()
    yield here.recv()
    here.send("end")
    child.join()


@contextmanager
def actor() -> Iterator[Any]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.remote(num_cpus=0)(InstantReplica).remote()
    ray.shutdown()


def search_call(client: DirectShardClient | ActorShardClient, dimension: int) -> Call:
    vectors = np.random.default_rng(7).random((1, dimension), np.float32)
    request = ShardSearch(1, vectors, (SearchGroup(0, 1, K, SearchParams()),), 10.0)
    return lambda: client.search(request)


# --- measuring ------------------------------------------------------------------------------------------------------


async def one_by_one(call: Call, seconds: float) -> tuple[float, float]:
    """Microseconds of a call: median and 99th percentile."""
    taken = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        await call()
        taken.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(taken), float(np.percentile(taken, 99))


async def at_once(call: Call, seconds: float) -> float:
    """Calls per second while `CONCURRENT` are in flight."""
    begin, done = time.perf_counter(), 0

    async def repeat() -> None:
        nonlocal done
        while time.perf_counter() - begin < seconds:
            await call()
            done += 1

    await asyncio.gather(*(repeat() for _ in range(CONCURRENT)))
    return done / (time.perf_counter() - begin)


async def measure(endpoint: ShardEndpoint, handle: Any, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Per transport a list of (p50, p99, throughput), one per round."""
    connection = ShardConnection(KEY, endpoint)
    calls = {
        "Ray actor call": search_call(ActorShardClient(handle, KEY), args.dimension),
        "direct connection": search_call(DirectShardClient(connection), args.dimension),
        "bare TCP echo": await echo_call(port, args.dimension),
    }
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        await at_once(call, 0.3)
    for _ in range(args.rounds):
        for name, call in calls.items():
            measured[name].append((*await one_by_one(call, args.seconds), await at_once(call, args.seconds)))
    connection.close()
    return measured


def table(measured: dict[str, list[tuple[float, float, float]]], args: argparse.Namespace) -> str:
    medians = {name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in
               measured.items()}  # fmt: skip
    base = medians["Ray actor call"]
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"{args.dimension} dimensions, medians of {args.rounds} rounds of {args.seconds:g} s",
        "",
        f"| transport | round trip p50 | p99 | {CONCURRENT} at once | ratio of round trips, of throughput |",
        "|---|---|---|---|---|",
    ]
    for name, (p50, p99, throughput) in medians.items():
        ratios = f"{base[0] / p50:.1f}, {throughput / base[2]:.1f}"
        lines.append(f"| {name} | {p50:.0f} us | {p99:.0f} us | {throughput:,.0f}/s | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--dimension", type=int, default=784)
    args = parser.parse_args()
    with process(serve_directly) as endpoint, process(serve_echo) as port, actor() as handle:
        print(table(uvloop.run(measure(endpoint, handle, port, args)), args))


if __name__ == "__main__":
    main()
