"""A load generator for the endpoint, over keep-alive connections.

A closed loop sends a connection's next request when its last one is answered. An open loop sends at a constant rate
whatever happens: a request that finds no free connection waits for one, and its latency counts from the time it was
due, so that a slow endpoint can't hide by being asked less (coordinated omission).

Requests are encoded beforehand and answers only split, so that the generator takes as little as possible of the
cores it shares with what it measures. Run it in a process of its own: `in_child`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

from serve.ticks import Alarm

CLOSED = 0  # the status of a request whose connection was closed before it was answered
REFUSED = 429
DRAIN_S = 10.0  # after the last request was sent, for those still unanswered
DEGRADED = (b'"degraded":"', b"\x08\0\0\0degraded\0")  # how JSON, and the schema of an Arrow stream, tell that it is so
MARK_BYTES = max(map(len, DEGRADED))
TICK_S = 0.000_25  # requests due within it are sent together
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class LoadReport:
    """What was measured, of the requests due in the measured seconds.

    `latencies_s` are of answers with status 200, `failures` the number of others by status. `completed` answers with
    status 200 came within `seconds`; `unanswered` requests had none when the run was given up. `cpu_s` is what the
    generator took for the `sent` requests of the whole run. `bodies` are kept on demand, by the request's number.
    `lags_s` of an open loop are from when requests were due to when the generator saw that they were, `queued` of them
    found no free connection then: both are part of their latencies. `degraded` is how many of those with latencies say
    that a CPU answered in a GPU's place.
    """

    seconds: float = 0.0
    completed: int = 0
    latencies_s: list[float] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)
    unanswered: int = 0
    sent: int = 0
    cpu_s: float = 0.0
    lags_s: list[float] = field(default_factory=list)
    queued: int = 0
    bodies: dict[int, bytes] = field(default_factory=dict)
    degraded: int = 0

    @property
    def per_second(self) -> float:
        return self.completed / self.seconds if self.seconds else 0.0

    def percentile_ms(self, percent: float) -> float:
        return _percentile_ms(self.latencies_s, percent)

    def lag_ms(self, percent: float) -> float:
        return _percentile_ms(self.lags_s, percent)


def _percentile_ms(seconds: list[float], percent: float) -> float:
    return float(np.percentile(seconds, percent) * 1000.0) if seconds else float("nan")


def encode_request(target: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """An HTTP/1.1 POST, ready to be sent."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(target).netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def run_load(target: str, requests: Sequence[bytes], connections: int, count: int, keep: bool = False) -> LoadReport:
    """A closed loop of `count` requests, round robin over `requests`; `keep` keeps the last body of each.

    Raises ConnectionError, as all runs do, when no connection can be opened.
    """
    return _run(_ClosedLoop(requests, count, keep), target, connections, None)


def run_closed_loop(
    target: str, requests: Sequence[bytes], connections: int, seconds: float, warm_up_s: float = 0.0
) -> LoadReport:
    """A closed loop of that time; the warm-up before it is not reported."""
    return _run(_ClosedLoop(requests, None, False), target, connections, (warm_up_s, seconds))


def run_open_loop(
    target: str, requests: Sequence[bytes], connections: int, rate: float, seconds: float, warm_up_s: float = 0.0
) -> LoadReport:
    """`rate` requests a second over at most so many connections; the warm-up before is not reported."""
    return _run(_OpenLoop(requests, rate), target, connections, (warm_up_s, seconds))


def in_child(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Run in a fresh process: no threads, caches or event loops are shared between what is compared."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments, options)


class Arrivals:
    """When the requests of an open loop are due: every 1 / rate seconds from the start."""

    def __init__(self, start_s: float, rate: float) -> None:
        self._start_s, self._rate, self._taken = start_s, rate, 0

    @property
    def next_s(self) -> float:
        return self._start_s + self._taken / self._rate

    def due(self, now_s: float) -> list[float]:
        """When each of those was due that are due by now and were not taken yet."""
        first, self._taken = self._taken, max(self._taken, floor((now_s - self._start_s) * self._rate) + 1)
        return [self._start_s + number / self._rate for number in range(first, self._taken)]


def _run(load: _Load, target: str, connections: int, times_s: tuple[float, float] | None) -> LoadReport:
    parts = urlsplit(target)
    return uvloop.run(load.run(parts.hostname or "127.0.0.1", parts.port or 80, connections, times_s))


class _Load:
    """What the connections of a run share: what is sent next, and the report."""

    def __init__(self, requests: Sequence[bytes], keep: bool) -> None:
        self.report = LoadReport()
        self.keep = keep
        self.stopping = False
        self._requests = requests
        self._outstanding = 0
        self._from_s, self._until_s = 0.0, float("inf")
        self._opening: set[asyncio.Task[None]] = set()
        self._open: set[_Connection] = set()
        self._done: asyncio.Future[None]

    async def run(self, host: str, port: int, connections: int, times_s: tuple[float, float] | None) -> LoadReport:
        """`times_s`: the seconds of the warm-up, and those measured; without them the load ends by itself."""
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self._address = (host, port)
        try:
            async with asyncio.TaskGroup() as group:
                opened = [group.create_task(self._connect()) for _ in range(connections)]
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if not isinstance(first, OSError):
                raise
            raise ConnectionError(f"{host}:{port} can't be reached: {first}") from None
        started_s, cpu_s = time.perf_counter(), time.process_time()
        if times_s is not None:
            self._from_s = started_s + times_s[0]
            self._until_s = self._from_s + times_s[1]
            self._loop.call_later(sum(times_s), self._stop)
        self.begin(started_s)
        for task in opened:
            self.ready(task.result())
        try:
            await self._done
        finally:
            self.end()
        self.report.cpu_s = time.process_time() - cpu_s
        self.report.seconds = times_s[1] if times_s is not None else time.perf_counter() - started_s
        return self.report

    def begin(self, now_s: float) -> None:
        """All connections are open."""

    def end(self) -> None:
        self.stopping = True
        for task in self._opening:
            task.cancel()
        for connection in self._open:
            connection.drop()

    def ready(self, connection: _Connection) -> None:
        """A connection is free."""
        raise NotImplementedError

    def waiting(self) -> int:
        """Requests that were due and are not sent yet."""
        return 0

    def send(self, connection: _Connection, due_s: float) -> None:
        report = self.report
        number = report.sent % len(self._requests)
        report.sent += 1
        self._outstanding += 1
        connection.send(self._requests[number], number, due_s)

    def answered(self, due_s: float, status: int, degraded: bool = False) -> None:
        now_s = time.perf_counter()
        self._outstanding -= 1
        report, asked_in_time = self.report, self._from_s <= due_s < self._until_s
        if status == 200:
            if self._from_s <= now_s <= self._until_s:
                report.completed += 1
            if asked_in_time:
                report.latencies_s.append(now_s - due_s)
                report.degraded += degraded
        elif asked_in_time:
            report.failures[status] = report.failures.get(status, 0) + 1
        if self.stopping:
            self._finish_if_all_answered()

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)

    def lost(self, connection: _Connection) -> None:
        """Another connection takes its place."""
        self._open.discard(connection)
        if not self.stopping:
            task = self._loop.create_task(self._reconnect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> _Connection:
        return (await self._loop.create_connection(lambda: _connection_of(self), *self._address))[1]

    async def _reconnect(self) -> None:
        try:
            self.ready(await self._connect())
        except OSError as error:
            if not self._done.done():
                self._done.set_exception(ConnectionError(f"the endpoint closed a connection and takes none: {error}"))

    def _stop(self) -> None:
        self.stopping = True
        self._loop.call_later(DRAIN_S, self._give_up)
        self._finish_if_all_answered()

    def _finish_if_all_answered(self) -> None:
        if self._outstanding + self.waiting() == 0 and not self._done.done():
            self._done.set_result(None)

    def _give_up(self) -> None:
        if not self._done.done():
            self.report.unanswered = self._outstanding + self.waiting()
            self._done.set_result(None)


class _ClosedLoop(_Load):
    def __init__(self, requests: Sequence[bytes], count: int | None, keep: bool) -> None:
        super().__init__(requests, keep)
        self._count = count

    def ready(self, connection: _Connection) -> None:
        if self.report.sent == self._count:
            self.stopping = True
            self._finish_if_all_answered()
        elif not self.stopping:
            self.send(connection, time.perf_counter())


class _OpenLoop(_Load):
    """Due requests that find no free connection wait in line."""

    def __init__(self, requests: Sequence[bytes], rate: float) -> None:
        super().__init__(requests, False)
        self._rate = rate
        self._line: deque[float] = deque()
        self._free: list[_Connection] = []
        self._alarm = Alarm()

    def begin(self, now_s: float) -> None:
        self._arrivals = Arrivals(now_s, self._rate)
        self._loop.add_reader(self._alarm.fd, self._tick)
        self._alarm.set(now_s)

    def end(self) -> None:
        super().end()
        self._loop.remove_reader(self._alarm.fd)
        self._alarm.close()

    def _tick(self) -> None:
        now_s = time.perf_counter()
        for due_s in self._arrivals.due(min(now_s, self._until_s)):
            if due_s >= self._until_s:
                break
            measured = due_s >= self._from_s
            if measured:
                self.report.lags_s.append(now_s - due_s)
            if self._free:
                self.send(self._free.pop(), due_s)
            else:
                self._line.append(due_s)
                self.report.queued += measured
        self._alarm.set(max(self._arrivals.next_s, now_s + TICK_S) if now_s < self._until_s else now_s + 2 * DRAIN_S)

    def ready(self, connection: _Connection) -> None:
        if self._line:
            self.send(connection, self._line.popleft())
        else:
            self._free.append(connection)

    def lost(self, connection: _Connection) -> None:
        if connection in self._free:
            self._free.remove(connection)
        super().lost(connection)

    def waiting(self) -> int:
        return len(self._line)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._busy = False
        self._degraded = False
        self._end = b""  # of what was received, in which a mark may begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._load.opened(self)

    def send(self, request: bytes, number: int, due_s: float) -> None:
        self._number, self._due_s, self._busy = number, due_s, True
        self._degraded, self._end = False, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._end + data if self._end else data
        if b"degraded" in received:
            self._degraded = self._degraded or any(mark in received for mark in DEGRADED)
        self._end = received[-MARK_BYTES:]
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self._busy = False
        parser, load = self._parser, self._load
        load.answered(self._due_s, parser.get_status_code(), self._degraded)
        if parser.should_keep_alive():
            load.ready(self)
        else:
            self.transport.close()

    def drop(self) -> None:
        """The run is over: a request in flight counts no more."""
        self._busy = False
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy:
            self._busy = False
            self._load.answered(self._due_s, CLOSED)
        self._load.lost(self)


class _KeepingConnection(_Connection):
    """A parser makes no bytes of a body that nobody asks for: only this one does."""

    def __init__(self, load: _Load) -> None:
        super().__init__(load)
        self._parts: list[bytes] = []

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._load.report.bodies[self._number] = b"".join(self._parts)
        self._parts.clear()
        super().on_message_complete()


def _connection_of(load: _Load) -> _Connection:
    return _KeepingConnection(load) if load.keep else _Connection(load)
