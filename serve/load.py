"""A load generator for the endpoint: keep-alive connections that each send the next request when answered.

Requests are encoded beforehand and answers only split, so that the generator takes as little as possible of the
cores it shares with what it measures. Run it in a process of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop


@dataclass
class LoadReport:
    """What was measured: seconds per answered request, statuses other than 200, and bodies where they were kept."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent) * 1000.0) if self.latencies_s else float("nan")


def encode_request(target: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """An HTTP/1.1 POST, ready to be sent."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(target).netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def run_load(target: str, requests: Sequence[bytes], connections: int, count: int, keep: bool = False) -> LoadReport:
    """Send `count` requests (round robin over `requests`) over `connections` connections, each closed-loop.

    With `keep` the last body of each request is kept, by its number. Raises ConnectionError when the endpoint
    closes a connection.
    """
    parts = urlsplit(target)
    run = _Run(requests, count, keep)
    return uvloop.run(_run(run, parts.hostname or "127.0.0.1", parts.port or 80, connections))


async def _run(run: _Run, host: str, port: int, connections: int) -> LoadReport:
    loop = asyncio.get_running_loop()
    run.done = loop.create_future()
    opened = [await loop.create_connection(lambda: _Connection(run), host, port) for _ in range(connections)]
    run.started_at = time.perf_counter()
    for _, connection in opened:
        connection.send_next()
    try:
        await run.done
    finally:
        run.report.seconds = time.perf_counter() - run.started_at
        for transport, _ in opened:
            transport.abort()
    return run.report


class _Run:
    """What the connections share."""

    def __init__(self, requests: Sequence[bytes], count: int, keep: bool) -> None:
        self.requests = requests
        self.count = count
        self.keep = keep
        self.sent = 0
        self.answered = 0
        self.report = LoadReport()
        self.started_at = 0.0
        self.done: asyncio.Future[None]

    def answer(self, number: int, status: int, seconds: float, body: bytes) -> None:
        self.answered += 1
        if status == 200:
            self.report.latencies_s.append(seconds)
        else:
            self.report.failures[status] = self.report.failures.get(status, 0) + 1
        if self.keep:
            self.report.bodies[number % len(self.requests)] = body
        if self.answered == self.count and not self.done.done():
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """One keep-alive connection: the next request leaves when the last one is answered."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def send_next(self) -> None:
        run = self._run
        if run.sent >= run.count:
            return
        self._number = run.sent
        run.sent += 1
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = time.perf_counter()
        self._transport.write(run.requests[self._number % len(run.requests)])

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._run.keep:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        seconds = time.perf_counter() - self._sent_at
        body, self._parts = b"".join(self._parts), []
        self._run.answer(self._number, self._parser.get_status_code(), seconds, body)
        self.send_next()

    def connection_lost(self, exc: Exception | None) -> None:
        run = self._run
        if run.answered < run.count and not run.done.done():
            run.done.set_exception(ConnectionError(f"the endpoint closed a connection: {exc}"))
