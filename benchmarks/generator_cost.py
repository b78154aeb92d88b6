"""What the load generator takes of the cores that it shares with what it measures: microseconds of CPU per request.

    python -m benchmarks.generator_cost [--seconds 2] [--answer-bytes 600]

Against a responder that only splits requests and sends one fixed answer.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from typing import Annotated, Any

import httptools
import typer
import uvloop

from serve.load import LoadReport, encode_request, in_child, run_closed_loop, run_open_loop

CONNECTIONS = (1, 8, 64, 256)
BODY_BYTES = 3_200  # a vector of 784 float32 in Arrow
OPEN_SHARE = 0.5  # of the closed loop's rate at 64 connections


class _Responder(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self._answer)


def respond(listener: socket.socket, answer: bytes) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Responder(answer), sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


def main(
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 2.0,
    answer_bytes: Annotated[int, typer.Option(help="Length of the answer's body.")] = 600,
) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % answer_bytes + b"x" * answer_bytes
    listener = socket.create_server(("127.0.0.1", 0), backlog=1_024)
    target = f"http://127.0.0.1:{listener.getsockname()[1]}"
    responder = multiprocessing.get_context("spawn").Process(target=respond, args=(listener, answer), daemon=True)
    responder.start()
    try:
        measure(target, seconds)
    finally:
        responder.terminate()
        responder.join()
        listener.close()


def measure(target: str, seconds: float) -> None:
    request = encode_request(target, "/", b"x" * BODY_BYTES, {"Content-Type": "application/octet-stream"})
    for connections in CONNECTIONS:
        report = in_child(run_closed_loop, target, [request], connections, seconds)
        tell(f"closed loop, {connections} connections", report)
        if connections == 64:
            rate = OPEN_SHARE * report.per_second
    tell(f"open loop, {rate:,.0f} a second", in_child(run_open_loop, target, [request], 64, rate, seconds))


def tell(name: str, report: LoadReport) -> None:
    cost_us = report.cpu_s / max(1, len(report.latencies_s)) * 1e6
    times = ", ".join(f"p{percent:g} {report.percentile_ms(percent):.3f} ms" for percent in (50, 99))
    print(f"{name}: {cost_us:.1f} us of the generator's CPU per request, {report.per_second:,.0f} a second, {times}")


if __name__ == "__main__":
    typer.run(main)
