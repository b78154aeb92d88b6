"""The same collections through a running Eagleray: its shard's actor by the direct connection, and HTTP Arrow batches.

`eagleray up` over the folder of the benchmark finds what is committed there. This process joins its Ray to learn where
the actor listens.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_collection import Made
from benchmarks.gpu_sets import K, cores
from benchmarks.gpu_ways import hits_of, timed_calls
from cluster.config import Settings
from cluster.errors import EaglerayError, Unavailable

NEEDED = ("ray", "starlette", "httpx", "uvloop", "httptools")
START_S, END_S = 90.0, 30.0
READY_S, LOOK_S = 90.0, 0.2
NAMESPACE = Settings(data="memory://").namespace


def missing() -> str:
    """Which modules of the serving stack are not installed; "" where all are."""
    return ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)


@dataclass(frozen=True)
class Server:
    """A running Eagleray; `ray` is joined. `failures` are the collections that it did not serve."""

    target: str
    client: Any
    ray: Any
    failures: list[str] = field(default_factory=list)

    def wait_for(self, made: Made) -> Any:
        """The handle of the collection's one actor, once it answers from its device."""
        from actors.ray_replica import replica_name

        give_up_s, why = time.monotonic() + READY_S, ""
        while time.monotonic() < give_up_s:
            try:
                answer = self.client.search(made.name, made.segment.rows.vectors(0, 1), k=1, timeout_ms=30_000)
                if not answer.get("degraded"):
                    return self.ray.get_actor(replica_name(made.key), namespace=NAMESPACE)
                why = "the twin on host memory answers"
            except (EaglerayError, ValueError) as error:
                why = str(error)
            time.sleep(LOOK_S)
        raise Unavailable(f"{made.name} was not served within {READY_S:g} s: {why}")

    def trouble(self, name: str) -> str:
        """Why answers of a collection were not all its GPU's, as its replicas tell; "" where they were."""
        for shard in self.client.collection(name)["shards"]:
            for replica in shard["replicas"]:
                if replica["degraded"]:
                    return f"the served replica: {replica['degraded']}"
                if searches := (replica["gpu"] or {}).get("out_of_memory", 0):
                    return f"{searches} searches of the served replica found no memory"
        return ""


@contextmanager
def running(data: Path) -> Iterator[Server]:
    """`eagleray up` over the folder, with all cores for the one shard that is asked at a time."""
    os.environ["RAY_AUTH_MODE"] = "token"  # as that Ray asks of who joins; read when Ray is imported
    import ray

    from serve.client import Client
    from serve.local_cluster import free_ports

    port, began_s = free_ports(1)[0], time.time()
    server = _started(str(data), port)
    try:
        ray.init(address=_address_since(began_s), log_to_driver=False, logging_level="ERROR")
        with Client(f"http://127.0.0.1:{port}", timeout_s=120.0) as client:
            yield Server(client.target, client, ray)
    finally:
        ray.shutdown()
        _end(server)


def _started(data: str, port: int) -> subprocess.Popen[str]:
    """`eagleray up`, once it serves; Unavailable, with what it said, where that takes more than `START_S`."""
    command = [sys.executable, "-m", "serve.cli", "up", "--data", data, "--port", str(port), "--json"]
    command += ["--shard-threads", str(cores())]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said: deque[str] = deque(maxlen=50)
    known, serves = threading.Event(), threading.Event()

    def read() -> None:
        assert server.stdout is not None
        with server.stdout:
            for line in server.stdout:
                said.append(line)
                if "Eagleray serves" in line:
                    serves.set()
                    known.set()
        known.set()

    threading.Thread(target=read, daemon=True).start()
    known.wait(START_S)
    if serves.is_set():
        return server
    _end(server)
    raise Unavailable(f"`eagleray up` did not serve within {START_S:g} s: {''.join(list(said))}")


def _end(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _address_since(began_s: float) -> str:
    """Of the Ray that `eagleray up` started: it leaves its address in its temporary folder."""
    started = [path for path in Path("/tmp").glob("er-*/ray_current_cluster") if path.stat().st_mtime >= began_s - 1.0]
    if not started:
        raise Unavailable("no Ray of an `eagleray up` was found under /tmp")
    return max(started, key=lambda path: path.stat().st_mtime).read_text().strip()


class ActorWay:
    """Searches of the shard's actor over the direct connection, as a coordinator makes them."""

    def __init__(self, made: Made, handle: Any, server: Server, in_flight: int) -> None:
        self.name = f"actor x{in_flight}"
        self._made, self._in_flight = made, in_flight
        self._key = made.key
        self._endpoint = server.ray.get(handle.status.remote()).endpoint
        if self._endpoint is None:
            raise Unavailable(f"replica {self._key} takes no direct connections")

    async def _with_client(self, use: Any) -> Any:
        from actors.direct_client import DirectShardClient, ShardConnection

        client = DirectShardClient(ShardConnection(self._key, self._endpoint))
        try:
            return await use(client)
        finally:
            client.connection.close()

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        async def ask_all(client: Any) -> float:
            async def ask(part: Any) -> None:
                await client.search(self._made.request(part))

            await ask(parts[0])  # the connection is made
            return await timed_calls(ask, parts, seconds, self._in_flight)

        return float(self._run(ask_all))

    def ids(self, queries: Any) -> Any:
        async def ask(client: Any) -> Any:
            return await client.search(self._made.request(queries))

        return hits_of(self._run(ask))

    def _run(self, use: Any) -> Any:
        return _on_uvloop(self._with_client(use))


def _on_uvloop(work: Any) -> Any:
    """As coordinators run."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


class HttpWay:
    """Arrow batches to the endpoint, whose coordinator asks the actor; closed loop over keep-alive connections."""

    def __init__(self, made: Made, server: Server, connections: int) -> None:
        self.name = f"HTTP x{connections}"
        self._made, self._server, self._connections = made, server, connections
        self._requests: dict[int, list[bytes]] = {}  # by batch

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        from serve.load import run_closed_loop

        batch = len(parts[0])
        if batch not in self._requests:
            self._requests = {batch: self._encoded(parts)}
        requests = self._requests[batch]
        report = run_closed_loop(self._server.target, requests, self._connections, max(seconds, 0.5), 0.2)
        if report.failures or report.unanswered:
            raise Unavailable(f"HTTP answered {report.failures}, {report.unanswered} not at all")
        return report.per_second * batch

    def _encoded(self, parts: Sequence[Any]) -> list[bytes]:
        from serve.bench_queries import search_requests

        form = ("arrow", len(parts[0]), {"k": K, "timeout_ms": 30_000}, {})
        return search_requests(self._server.target, self._made.name, np.concatenate(parts), *form)

    def ids(self, queries: Any) -> Any:
        answer = self._server.client.search(self._made.name, queries, k=K, timeout_ms=30_000)
        return np.array([[hit["id"] for hit in hits] for hits in answer["results"]])
