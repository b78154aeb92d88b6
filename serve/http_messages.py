"""Requests' bodies within their bounds, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import Exhausted, Invalid
from serve.arrow_bodies import ARROW

JSON = "application/json"
LARGE_BODY_BYTES = 1024 * 1024  # larger bodies are decoded, and larger answers encoded, beside the event loop:
LARGE_NUMBERS = 20_000  # 5,000 hits take some 10 ms
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


async def read_json_body(request: Request, bound: int) -> bytes:
    """A body that must be JSON."""
    if content_type(request) not in ("", JSON):
        raise HTTPException(415, f"the body must be {JSON}")
    return await read_body(request, bound)


async def read_body(request: Request, bound: int) -> bytes:
    """The body, refused as soon as it is known to have more than `bound` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > bound):
        raise Exhausted(f"body_bytes: the body has {declared} bytes, at most {bound} are taken")
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > bound:
            raise Exhausted(f"body_bytes: the body has more than {bound} bytes")
    return b"".join(parts)


async def aside(large: bool, work: Callable[..., T], *arguments: Any) -> T:
    """Large work in a thread, so that the event loop goes on with others' requests; small work at once."""
    return await asyncio.to_thread(work, *arguments) if large else work(*arguments)


def json_response(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type=JSON)


def content_type(request: Request) -> str:
    named = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
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
