"""The endpoint of `endpoint.py` behind a real socket on a free loopback port, for clients that need one."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from cluster.config import CollectionConfig, IndexConfig, Limits
from serve.client import Client
from tests.unit.actors.points import Points, random_points
from tests.unit.serve.endpoint import Endpoint, EndpointOptions, memory_url, pass_over_unread_calls, running_endpoint

CONFIG = CollectionConfig(3, metric="l2", shards=2, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 25)
DEFAULT_LIMITS = Limits()
Served = dict[str, tuple[CollectionConfig, Points]]


class ListeningEndpoint:
    """An endpoint in a thread of its own that listens on a port of the operating system's choice.

    It serves `words` and the collections in `served`.
    """

    def __init__(self, cache_dir: Path, limits: Limits, served: Served) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._cache_dir = cache_dir
        self._options = EndpointOptions(limits)
        self._served = {"words": (CONFIG, POINTS)} | served
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.endpoint: Endpoint
        self.target = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(20)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(pass_over_unread_calls)
        async with running_endpoint(memory_url(), self._cache_dir, self._options) as self.endpoint:
            for name, (config, points) in self._served.items():
                await self.endpoint.publish(name, config, points)
            self._server = uvicorn.Server(uvicorn.Config(self.endpoint.app, lifespan="off", log_level="error"))
            self._started.set()
            await self._server.serve([self._socket])


@contextmanager
def listening(
    tmp_path: Path, limits: Limits = DEFAULT_LIMITS, served: Served | None = None
) -> Iterator[tuple[Client, Endpoint]]:
    server = ListeningEndpoint(tmp_path, limits, served or {})
    server.start()
    client = Client(server.target)
    try:
        yield client, server.endpoint
    finally:
        client.close()
        server.stop()
