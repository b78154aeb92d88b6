"""A small HTTP server in a thread of its own, whose every answer a test decides."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httptools


@dataclass(frozen=True)
class Answer:
    """What is sent, after so many seconds. `lost` closes the connection instead, `silent` sends nothing at all."""

    status: int = 200
    body: bytes = b""
    after_s: float = 0.0
    headers: str = ""
    chunks: tuple[bytes, ...] = ()
    lost: bool = False
    silent: bool = False

    def encoded(self) -> bytes:
        head = f"HTTP/1.1 {self.status} X\r\n{self.headers}"
        if self.chunks:
            parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*self.chunks, b""))
            return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + parts
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


@dataclass
class Responder:
    """`decide` gets a request's number, from 0 on, and its body."""

    decide: Callable[[int, bytes], Answer]
    target: str = ""
    bodies: list[bytes] = field(default_factory=list)
    transports: list[asyncio.Transport] = field(default_factory=list)
    busy: int = 0
    busy_max: int = 0

    @property
    def connections(self) -> int:
        return len(self.transports)


class _Connection(asyncio.Protocol):
    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._responder.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        responder = self._responder
        number, body, self._body = len(responder.bodies), self._body, b""
        responder.bodies.append(body)
        responder.busy += 1
        responder.busy_max = max(responder.busy_max, responder.busy)
        answer = responder.decide(number, body)
        if not answer.silent:
            asyncio.get_running_loop().call_later(answer.after_s, self._send, answer)

    def _send(self, answer: Answer) -> None:
        self._responder.busy -= 1
        if answer.lost:
            self._transport.abort()
            return
        self._transport.write(answer.encoded())
        if "Connection: close" in answer.headers:
            self._transport.close()


@contextmanager
def responding(decide: Callable[[int, bytes], Answer]) -> Iterator[Responder]:
    responder, started = Responder(decide), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    responder.target = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        server = await loop.create_server(lambda: _Connection(responder), sock=listener)
        started.set()
        await over.wait()
        while accepting := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(accepting)  # a closed server would drop the connection that is being accepted, unclosed
        server.close()
        for transport in responder.transports:
            transport.abort()
        await asyncio.sleep(0)  # for the losses of the connections to be told

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20)
    try:
        yield responder
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()
