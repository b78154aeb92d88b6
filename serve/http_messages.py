"""Requests' bodies within their bounds, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import Exhausted, Invalid
from serve.arrow_bodies import ARROW
from serve.ingress import Receive

JSON = "application/json"
LARGE_BODY_BYTES = 1024 * 1024  # larger bodies are decoded, and larger answers encoded, beside the event loop:
LARGE_NUMBERS = 20_000  # 5,000 hits take some 10 ms
BODY_TIMEOUT_S = 30.0  # 64 MiB at 18 Mbit/s
LOOK_S = 1.0  # how often requests are looked for whose body does not begin to come
T = TypeVar("T")
BODY_TYPES = {b"": "", JSON.encode(): JSON, ARROW.encode(): ARROW}  # as they are mostly sent
Handler = Callable[[Request], Awaitable[Response]]


async def read_json_body(request: Request, bound: int) -> bytes:
    """A body that must be JSON."""
    if content_type(request) not in ("", JSON):
        raise HTTPException(415, f"the body must be {JSON}")
    return await read_body(request, bound)


async def read_body(request: Request, bound: int) -> bytes:
    """The body, refused as soon as it is known to have more than `bound` bytes."""
    return await receive_body(request.receive, request.headers.get("content-length", "").encode("latin-1"), bound)


async def receive_body(receive: Receive, announced: bytes, bound: int, first: FirstParts | None = None) -> bytes:
    """The same from ASGI messages; `announced` is the header Content-Length. ClientDisconnect.

    What has not come after `BODY_TIMEOUT_S` is a 408: a client that sends slowly holds a place of others. Its first
    part has as long again.
    """
    if announced.isdigit() and (len(announced) > 18 or int(announced) > bound):
        raise Exhausted(f"body_bytes: the body has {announced.decode()} bytes, at most {bound} are taken")
    part, more = await (first or FirstParts()).receive(receive)
    if not more and len(part) <= bound:  # as nearly all are
        return part
    parts, size = [part], len(part)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more and size <= bound:
                part, more = await _receive_part(receive)
                parts.append(part)
                size += len(part)
    except TimeoutError:
        raise _late(size) from None
    if size > bound:
        raise Exhausted(f"body_bytes: the body has more than {bound} bytes")
    return b"".join(parts)


async def _receive_part(receive: Receive) -> tuple[bytes, bool]:
    """A part of the body, and whether more follow. ClientDisconnect."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _late(size: int) -> HTTPException:
    return HTTPException(408, f"the body did not come within {BODY_TIMEOUT_S:g} s: {size} bytes did")


class FirstParts:
    """Requests whose body has not begun to come, though their headers have. Looks for late ones once a second.

    Nearly all bodies are there at once: a timer for each would cost more than receiving it.
    """

    def __init__(self) -> None:
        self._since: dict[asyncio.Task[Any] | None, float] = {}
        self._late: set[asyncio.Task[Any] | None] = set()
        self._looking: asyncio.TimerHandle | None = None

    async def receive(self, receive: Receive) -> tuple[bytes, bool]:
        """The first part, and whether more follow. HTTPException 408; ClientDisconnect."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        self._since[task] = loop.time()
        if self._looking is None:
            self._looking = loop.call_later(min(LOOK_S, BODY_TIMEOUT_S), self._look, loop)
        try:
            return await _receive_part(receive)
        except asyncio.CancelledError:
            if task is not None and task in self._late and task.uncancel() == 0:
                raise _late(0) from None
            raise
        finally:
            del self._since[task]
            self._late.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        for task, since in self._since.items():
            if loop.time() - since >= BODY_TIMEOUT_S and task is not None and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._looking = loop.call_later(min(LOOK_S, BODY_TIMEOUT_S), self._look, loop) if self._since else None


async def aside(large: bool, work: Callable[..., T], *arguments: Any) -> T:
    """Large work in a thread, so that the event loop goes on with others' requests; small work at once."""
    return await asyncio.to_thread(work, *arguments) if large else work(*arguments)


def json_response(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type=JSON)


def content_type(request: Request) -> str:
    return body_type(request.headers.get("content-type", "").encode("latin-1"))


def body_type(header: bytes) -> str:
    """`ARROW`, `JSON` or, where the header Content-Type names none, nothing."""
    known = BODY_TYPES.get(header)
    if known is not None:
        return known
    named = header.decode("latin-1").split(";", 1)[0].strip().lower()
    if named not in ("", JSON, ARROW):
        raise HTTPException(415, f"the body must be {JSON} or {ARROW}, not {named}")
    return named


def refuse_parameters(request: Request) -> None:
    for name in request.query_params:
        raise Invalid.at(name, "unknown URL parameter; options are fields of the body")


def without_parameters(handler: Handler) -> Handler:
    """Nothing is ignored in silence: only Arrow bodies go with URL parameters."""

    async def answer(request: Request) -> Response:
        refuse_parameters(request)
        return await handler(request)

    return answer
