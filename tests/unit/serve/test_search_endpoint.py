"""The search's own way through the endpoint: which requests take it, when they are refused, and who watches for their
client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Match, Route

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.placement import ReplicaKey
from serve import ingress
from serve.ingress import (
    ENTRANCE,
    SEARCH_PATH,
    UNWATCHED,
    CancelledWhenClientLeaves,
    Entrance,
    UnwatchedSearches,
    searched_collection,
)
from tests.unit.actors.points import random_points
from tests.unit.serve.endpoint import Endpoint, problem, run_with_endpoint, until

CONFIG = CollectionConfig(3, metric="l2", index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 30)
SEARCH = "/v1/collections/words/points:search"
BODY = json.dumps({"vector": [1, 2, 3], "timeout_ms": 20_000}).encode()
Json = dict[str, Any]


def scope_of(path: str, method: str = "POST", root_path: str = "", *headers: tuple[bytes, bytes]) -> Json:
    named = [(b"content-length", str(len(BODY)).encode()), *headers]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": named,
        "query_string": b"",
    }


PATHS = [
    SEARCH,
    f"{SEARCH}/",
    f"{SEARCH}s",
    f"/{SEARCH}",
    "/v1/collections/points:search",
    "/v1/collections//points:search",
    "/v1/collections/a/b/points:search",
    "/v1/collections/ä /points:search",
    "/v1/collections/../points:search",
    "/v1/collections/points:search/points:search",
    "/v1/collections/words/points:fetch",
    "/v1/collections/words",
    "/v2/collections/words/points:search",
    "/",
    "",
]


@pytest.mark.parametrize("root_path", ["", "/eagleray", "/v1", "/v1/collections"])
@pytest.mark.parametrize("path", PATHS)
def test_searches_are_those_that_the_route_matches(path: str, root_path: str) -> None:
    route = Route(SEARCH_PATH, lambda request: None, methods=["POST"])
    for full_path in (path, f"{root_path}{path}"):
        scope = scope_of(full_path, root_path=root_path)
        match, more = route.matches(scope)
        expected = more["path_params"]["collection"] if match is Match.FULL else None
        assert searched_collection(scope) == expected


def test_other_methods_and_protocols_are_no_search() -> None:
    for method in ("GET", "HEAD", "PUT", "post"):
        assert searched_collection(scope_of(SEARCH, method)) is None
    for kind in ("lifespan", "websocket"):
        assert searched_collection({"type": kind, "path": SEARCH}) is None


def with_words(scenario: Any, tmp_path: Path, limits: Limits | None = None) -> None:
    async def run(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        await scenario(endpoint)

    run_with_endpoint(run, tmp_path, limits=limits or Limits(timeout_ms=20_000))


class Exchange:
    """One request as a server calls an ASGI application. `leave` is the client's leaving."""

    def __init__(self, body: bytes = BODY) -> None:
        self.body = body
        self.received = 0
        self.sent: list[Json] = []
        self.left = asyncio.Event()

    def leave(self) -> None:
        self.left.set()

    async def receive(self) -> Json:
        self.received += 1
        if self.received == 1:
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def test_each_answer_has_a_header_list_of_its_own(tmp_path: Path) -> None:
    """Serve appends to it."""

    async def scenario(endpoint: Endpoint) -> None:
        lists = []
        for _ in range(2):
            exchange = Exchange()
            await endpoint.app(scope_of(SEARCH), exchange.receive, exchange.send)
            start, body = exchange.sent
            assert (start["status"], body["type"]) == (200, "http.response.body")
            assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
            start["headers"].append((b"x-request-id", b"1"))
            lists.append(start["headers"])
        assert lists[0] is not lists[1]
        assert [len(headers) for headers in lists] == [3, 3]

    with_words(scenario, tmp_path)


def test_search_under_a_root_path_is_answered(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        exchange = Exchange()
        await endpoint.app(scope_of(f"/prefix{SEARCH}", "POST", "/prefix"), exchange.receive, exchange.send)
        assert exchange.sent[0]["status"] == 200

    with_words(scenario, tmp_path)


def test_first_of_repeated_headers_counts(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        headers = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
        assert (await endpoint.http.post(SEARCH, content=BODY, headers=headers)).status_code == 200
        problem(await endpoint.http.post(SEARCH, content=BODY, headers=headers[::-1]), 415)

    with_words(scenario, tmp_path)


def test_unexpected_error_is_logged_and_told_without_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    async def scenario(endpoint: Endpoint) -> None:
        monkeypatch.setattr(endpoint.coordinator, "search", broken)
        answer = problem(await endpoint.http.post(SEARCH, content=BODY), 500)
        assert "secret" not in json.dumps(answer)
        assert [SEARCH in record.message for record in caplog.records if "failed" in record.message] == [True]

    with_words(scenario, tmp_path)


# ---- refused before the body is read


def test_search_that_is_not_admitted_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        waiting = [asyncio.ensure_future(endpoint.search("words", vector=[1, 2, 3])) for _ in range(3)]
        await until(lambda: endpoint.coordinator._admissions.total == 3)
        exchange = Exchange()
        await endpoint.app(scope_of(SEARCH), exchange.receive, exchange.send)
        assert exchange.received == 0
        assert exchange.sent[0]["status"] == 429
        endpoint.eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 3
        assert (await endpoint.search("words", vector=[1, 2, 3])).status_code == 200

    with_words(scenario, tmp_path, Limits(timeout_ms=20_000, requests_in_flight=3))


def test_search_that_is_refused_later_is_in_flight_no_more(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        attributes = b'{"vector": [1, 2, 3], "with_attributes": ["nothing"]}'
        for field, body in (("body", b"{"), ("vector", b'{"vector": [1]}'), ("with_attributes", attributes)):
            problem(await endpoint.http.post(SEARCH, content=body), 400, field)
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path)


def test_body_that_does_not_come_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http_messages.BODY_TIMEOUT_S", 0.01)

    async def scenario(endpoint: Endpoint) -> None:
        parts = [{"type": "http.request", "body": BODY[:5], "more_body": True}]
        exchange = Exchange()

        async def receive() -> Json:
            return parts.pop() if parts else await exchange.receive()

        exchange.received = 1  # nothing more comes
        await endpoint.app(scope_of(SEARCH), receive, exchange.send)
        assert exchange.sent[0]["status"] == 408
        assert b"5 bytes did" in exchange.sent[1]["body"]
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path)


# ---- let in or refused before Serve


class Serve:
    """What is between the middleware and the application."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.searches = 0
        self.around = UnwatchedSearches(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.searches += 1
        await self._endpoint.app(scope, receive, send)

    async def search(self, path: str = SEARCH) -> tuple[int, Json]:
        """(status, body) of the answer."""
        exchange = Exchange()
        await self.around(scope_of(path), exchange.receive, exchange.send)
        start, body = exchange.sent
        assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
        return start["status"], json.loads(body["body"])


def test_search_is_in_flight_once_from_the_middleware_to_its_answer(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        serve = Serve(endpoint)
        waiting = [asyncio.ensure_future(serve.search()) for _ in range(3)]
        await until(lambda: serve.searches == 3)
        assert endpoint.coordinator._admissions.total == 3
        status, refusal = await serve.search()
        assert (status, refusal["title"], refusal["type"]) == (
            429,
            "Too Many Requests",
            "urn:eagleray:problem:exhausted",
        )
        assert serve.searches == 3  # Serve has not seen it
        metrics = (await endpoint.http.get("/metrics")).text
        assert 'eagleray_queries_total{collection="words",coordinator="endpoint-1",outcome="refused"} 1.0' in metrics
        endpoint.eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path, Limits(timeout_ms=20_000, requests_in_flight=3))


def test_search_that_ends_before_the_application_has_it_is_in_flight_no_more(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        serving = asyncio.Event()

        async def broken(scope: Any, receive: Any, send: Any) -> None:
            serving.set()
            await asyncio.Event().wait()

        exchange = Exchange()
        request = asyncio.ensure_future(UnwatchedSearches(broken)(scope_of(SEARCH), exchange.receive, exchange.send))
        await serving.wait()
        assert endpoint.coordinator._admissions.total == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path)


def test_what_is_no_question_of_how_many_there_are_is_told_by_the_endpoint(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        serve = Serve(endpoint)
        assert (await serve.search(SEARCH.replace("words", "letters")))[0] == 404
        assert serve.searches == 1

    with_words(scenario, tmp_path)


def test_nobody_is_let_in_for_another_event_loop_or_after_the_endpoint_has_ended(tmp_path: Path) -> None:
    def refuse(collection: str) -> None:
        raise AssertionError(collection)

    entrance = Entrance()

    async def keep() -> None:
        entrance.keep(refuse)

    async def ask() -> None:
        assert entrance.ask("words") is None

    asyncio.run(keep())
    asyncio.run(ask())

    async def scenario(endpoint: Endpoint) -> None:
        admission = ENTRANCE.ask("words")
        assert endpoint.coordinator._admissions.total == 1
        admission.release()  # type: ignore[union-attr]

    with_words(scenario, tmp_path)
    asyncio.run(ask_after_the_end())


async def ask_after_the_end() -> None:
    assert ENTRANCE.ask("words") is None


@pytest.mark.parametrize("route", ["search", "upsert"])
def test_body_that_does_not_begin_to_come_is_given_up(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends the headers alone holds a place as well."""
    monkeypatch.setattr("serve.http_messages.BODY_TIMEOUT_S", 0.01)

    async def scenario(endpoint: Endpoint) -> None:
        exchange = Exchange()
        exchange.received = 1
        task = asyncio.ensure_future(
            endpoint.app(scope_of(f"/v1/collections/words/points:{route}"), exchange.receive, exchange.send)
        )
        await task
        assert exchange.sent[0]["status"] == 408
        assert b"0 bytes did" in exchange.sent[1]["body"]
        assert task.cancelling() == 0
        assert endpoint.coordinator._admissions.total == 0
        assert (await endpoint.search("words", vector=[1, 2, 3])).status_code == 200

    with_words(scenario, tmp_path)


def test_cancelled_search_whose_body_does_not_come_is_not_taken_for_a_late_one(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        exchange = Exchange()
        exchange.received = 1
        request = asyncio.ensure_future(endpoint.app(scope_of(SEARCH), exchange.receive, exchange.send))
        await until(lambda: exchange.received == 2)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert exchange.sent == []
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path)


# ---- clients that leave


def test_only_searches_are_marked_for_serve_to_leave_them_alone() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("headers"))

    async def run() -> None:
        (middleware,) = ingress.middlewares()
        wrapped: Any = middleware.cls(app, *middleware.args, **middleware.kwargs)
        assert isinstance(wrapped, UnwatchedSearches)
        exchange = Exchange()
        for scope in (scope_of(SEARCH), scope_of("/v1/collections/words/points:fetch"), {"type": "lifespan"}):
            await wrapped(scope, exchange.receive, exchange.send)

    asyncio.run(run())
    assert [UNWATCHED in (headers or []) for headers in seen] == [True, False, False]


def test_client_that_leaves_before_its_whole_body_came_gets_no_answer(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        exchange = Exchange()
        exchange.received = 1  # its first message is that it left
        exchange.leave()
        await endpoint.app(scope_of(SEARCH), exchange.receive, exchange.send)
        assert exchange.sent == []
        assert endpoint.coordinator._admissions.total == 0

    with_words(scenario, tmp_path)


def test_marked_search_is_cancelled_when_its_client_leaves(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        exchange = Exchange()
        scope = scope_of(SEARCH, "POST", "", UNWATCHED)
        request = asyncio.ensure_future(endpoint.app(scope, exchange.receive, exchange.send))
        await until(lambda: exchange.received == 2)  # it watches
        assert not request.done()
        exchange.leave()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert exchange.sent == []
        assert endpoint.coordinator._admissions.total == 0
        endpoint.eagleray.runtime.revive(ReplicaKey("words", 0, 0))

    with_words(scenario, tmp_path)


def test_search_that_serve_watches_does_not_watch(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        exchange = Exchange()
        await endpoint.app(scope_of(SEARCH), exchange.receive, exchange.send)
        assert exchange.received == 1
        assert exchange.sent[0]["status"] == 200

    with_words(scenario, tmp_path)


def test_search_that_is_answered_while_it_watches_ends_its_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "WATCH_AFTER_S", 0.0)

    async def run() -> None:
        exchange, answered = Exchange(), asyncio.Event()
        exchange.received = 1

        async def search() -> str:
            with CancelledWhenClientLeaves(exchange.receive):
                await answered.wait()
            exchange.leave()
            await asyncio.sleep(0)
            return "answered"

        request = asyncio.ensure_future(search())
        await until(lambda: exchange.received == 2)
        answered.set()
        assert await request == "answered"
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(run())
