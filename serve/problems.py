"""Errors as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import logging
from http import HTTPStatus
from math import ceil
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import Conflict, Corrupt, EaglerayError, Exhausted, Fenced, Invalid, NotFound, Unavailable
from serve.json_bodies import lsn_answer

PROBLEM = "application/problem+json"
STATUS: dict[type[EaglerayError], int] = {
    Invalid: 400,
    NotFound: 404,
    Conflict: 409,
    Fenced: 409,
    Exhausted: 413,
    Unavailable: 503,
    Corrupt: 500,
}
logger = logging.getLogger(__name__)


def problem_response(request: Request, error: Exception) -> Response:
    """The answer to any exception; one that is not of ours is logged and told without its details."""
    if isinstance(error, EaglerayError) and type(error) in STATUS:
        return own_problem(error)
    if isinstance(error, HTTPException):
        return _problem(error.status_code, "Http", error.detail, headers=dict(error.headers or {}))
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _problem(500, "Internal", "an unexpected error; the server's log has it")


def own_problem(error: EaglerayError) -> Response:
    """The answer to an error of a type in `STATUS`."""
    status = STATUS[type(error)]
    headers: dict[str, str] = {}
    more: dict[str, Any] = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        status = 429 if isinstance(error, Exhausted) else status
        headers["Retry-After"] = str(max(1, ceil(retry_after_s)))
    if isinstance(error, Invalid) and error.errors:
        more["errors"] = [{"field": e.field, "message": e.message} for e in error.errors]
    if isinstance(error, Unavailable) and error.coverage is not None:
        more["coverage"] = error.coverage
    if isinstance(error, Unavailable) and error.lsn is not None:
        more |= {"lsn": lsn_answer(error.lsn), "failed": list(error.failed)}
    return _problem(status, type(error).__name__, str(error), headers, more)


def _problem(
    status: int, kind: str, detail: str, headers: dict[str, str] | None = None, more: dict[str, Any] | None = None
) -> Response:
    body = {
        "type": f"urn:eagleray:problem:{kind.lower()}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **(more or {}),
    }
    return Response(msgspec.json.encode(body), status, headers, PROBLEM)
