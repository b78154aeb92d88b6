from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from serve.process_tuning import COLLECT_AFTER_OBJECTS, LISTENERS, accept_many, tune_process
from tests.unit.serve.endpoint import until


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int, int]]:
    """What they were, and will be again."""
    monkeypatch.setattr(uvicorn.Server, "startup", uvicorn.Server.startup)
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_collections_become_rare_but_do_not_end(thresholds: tuple[int, int, int]) -> None:
    tune_process()
    assert gc.get_threshold() == (COLLECT_AFTER_OBJECTS, *thresholds[1:])
    assert gc.isenabled()


async def no_content(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_server_listens_on_copies_of_its_socket_and_closes_them_all(thresholds: tuple[int, int, int]) -> None:
    tune_process()

    async def run() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        address = listening.getsockname()
        server = uvicorn.Server(uvicorn.Config(no_content, lifespan="off", log_config=None))
        serving = asyncio.ensure_future(server._serve([listening]))  # `serve` without handlers of signals
        await until(lambda: server.started)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 204")
        writer.close()
        sockets = [each for listener in server.servers for each in listener.sockets]
        assert [each.getsockname() for each in sockets] == [address] * LISTENERS
        server.should_exit = True
        await serving
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)

    asyncio.run(run())


def test_server_without_a_socket_of_its_own_starts_as_ever() -> None:
    started: list[Any] = []

    async def startup(server: Any, sockets: Any = "none") -> None:
        started.append((server, sockets))

    asyncio.run(accept_many(startup)("server"))
    assert started == [("server", "none")]
