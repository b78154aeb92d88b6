from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cluster.errors import (
    Conflict,
    Corrupt,
    EaglerayError,
    Exhausted,
    Fenced,
    FieldError,
    Invalid,
    NotFound,
    Unavailable,
)
from serve.problems import PROBLEM, STATUS, problem_response
from tests.fakes import LocalDirectory
from tests.unit.serve.endpoint import Endpoint, problem, run_with_endpoint

COVERAGE = {"shards": 0.5, "points": 0.4, "missing": [1]}


def answer_to(error: Exception) -> tuple[int, dict[str, str], dict[str, Any]]:
    """(status, headers, body) of the answer to an error."""
    request = Request({"type": "http", "method": "GET", "path": "/v1/secret", "headers": [], "query_string": b""})
    response = problem_response(request, error)
    return response.status_code, dict(response.headers), json.loads(bytes(response.body))


@pytest.mark.parametrize(
    ("error", "status", "title", "retry_after"),
    [
        (Invalid("wrong"), 400, "Bad Request", None),
        (NotFound("no collection"), 404, "Not Found", None),
        (Conflict("differs"), 409, "Conflict", None),
        (Fenced("another writer"), 409, "Conflict", None),
        (Exhausted("too large"), 413, None, None),
        (Exhausted("too many", 0.1), 429, "Too Many Requests", "1"),
        (Exhausted("too many", 0.0), 429, "Too Many Requests", "1"),
        (Unavailable("away"), 503, "Service Unavailable", "1"),
        (Unavailable("away", 2.1), 503, "Service Unavailable", "3"),
        (Corrupt("segments/1: checksum"), 500, "Internal Server Error", None),
    ],
)
def test_error_becomes_its_status(
    error: EaglerayError, status: int, title: str | None, retry_after: str | None
) -> None:
    answered, headers, body = answer_to(error)
    assert (answered, body["status"]) == (status, status)
    assert headers["content-type"] == PROBLEM
    assert body["title"] == title or title is None
    assert body["type"] == f"urn:eagleray:problem:{type(error).__name__.lower()}"
    assert body["detail"] == str(error)
    assert headers.get("retry-after") == retry_after
    assert body.keys() == {"type", "title", "status", "detail"}


def test_every_error_class_has_a_status() -> None:
    assert set(EaglerayError.__subclasses__()) == set(STATUS)


def test_wrong_fields_are_listed() -> None:
    errors = (FieldError("vectors[3]", "is short"), FieldError("k", "is 0"))
    _, _, body = answer_to(Invalid("two things", errors))
    assert body["errors"] == [{"field": "vectors[3]", "message": "is short"}, {"field": "k", "message": "is 0"}]


def test_coverage_is_told() -> None:
    assert answer_to(Unavailable("coverage 0.5", coverage=COVERAGE))[2]["coverage"] == COVERAGE


def test_shards_that_acknowledged_a_write_and_those_that_did_not_are_told() -> None:
    _, _, body = answer_to(Unavailable("acknowledged by shard 2", lsn={2: 17}, failed=(0, 1)))
    assert (body["lsn"], body["failed"]) == ({"2": 17}, [0, 1])
    _, _, body = answer_to(Unavailable("by none", lsn={}, failed=(0,)))
    assert (body["lsn"], body["failed"]) == ({}, [0])


def test_http_error_keeps_its_headers() -> None:
    status, headers, body = answer_to(HTTPException(405, headers={"Allow": "GET"}))
    assert (status, headers["allow"], body["title"]) == (405, "GET", "Method Not Allowed")


def test_unexpected_error_is_logged_and_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, _, body = answer_to(RuntimeError("password=hunter2 in /root/secrets"))
    assert (status, body["type"]) == (500, "urn:eagleray:problem:internal")
    assert "hunter2" not in json.dumps(body)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "hunter2" in str(record.exc_info[1])
    assert "/v1/secret" in record.getMessage()


def test_unexpected_error_in_a_handler_is_a_problem_without_its_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: LocalDirectory, collection: str) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(LocalDirectory, "describe", broken)

    async def scenario(endpoint: Endpoint) -> None:
        response = await endpoint.http.get("/v1/collections/words")
        assert problem(response, 500)["type"] == "urn:eagleray:problem:internal"
        assert "hunter2" not in response.text
        assert "Traceback" not in response.text

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("text", ['quote " and \\', "line\nend", "ä😀", "\x00\x1f", "<script>"])
def test_message_of_any_characters_is_json(text: str) -> None:
    assert answer_to(NotFound(text))[2]["detail"] == text


def test_message_that_quotes_a_lone_surrogate_is_json() -> None:
    assert "detail" in answer_to(NotFound(f"no collection {chr(0xD800)!r}"))[2]
