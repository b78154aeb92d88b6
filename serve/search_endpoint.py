"""The hot path: `POST /v1/collections/{collection}/points:search` as an ASGI application of its own.

Every request of it passes the one event loop of the endpoint process, so there is nothing here that a search does not
need: no request and response objects, no routing but a comparison of the path (`ingress.searched_collection`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request

from actors.shard_client import ServedCollection
from cluster.errors import EaglerayError, Exhausted, Invalid, Unavailable
from cluster.query import Query, SearchResult
from serve.arrow_bodies import ARROW
from serve.declared_attributes import DeclaredAttributes
from serve.decoding import decode_parameters
from serve.hit_streams import write_result
from serve.http_messages import JSON, LARGE_BODY_BYTES, LARGE_NUMBERS, FirstParts, aside, body_type, receive_body
from serve.ingress import ADMISSION, UNWATCHED, Admitted, CancelledWhenClientLeaves, Receive, Refusal, Scope, Send
from serve.json_bodies import search_answer
from serve.problems import own_problem, problem_response
from serve.search_bodies import (
    SearchBody,
    SearchOptions,
    answer_numbers,
    arrow_query,
    decode_naming_keys,
    json_query,
)
from serve.services import Services
from serve.vector_streams import VectorStreams

ARROW_BYTES, JSON_BYTES = ARROW.encode(), JSON.encode()
REMEMBERED_PARAMETERS_BYTES = 512  # clients send the same options again and again


class SearchEndpoint:
    """Decode, call the coordinator, encode. `scope["path_params"]` names the collection."""

    def __init__(self, services: Services, attributes: DeclaredAttributes) -> None:
        self._services = services
        self._attributes = attributes
        self._streams, self._first_parts = VectorStreams(), FirstParts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            media_type, body = await self._answer(scope, receive)
        except ClientDisconnect:
            return  # nobody waits for an answer
        except Exception as error:  # noqa: BLE001  # told to the client and, where it is not one of ours, logged
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        # A list of their own: Serve appends to it.
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def let_in(self, collection: str) -> Admitted | Refusal | None:
        """For `ingress.Entrance`. None where it is no question of how many there are: that the search itself tells."""
        try:
            return self._services.coordinator.admit(collection)
        except Exhausted as error:
            self._services.metrics.search(collection, "refused", 0, 0.0)
            answer = own_problem(error)
            return Refusal(answer.status_code, [*answer.raw_headers], bytes(answer.body))
        except EaglerayError:
            return None

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[bytes, bytes]:
        """(media type, body) of the answer."""
        started = time.perf_counter()
        services, name = self._services, scope["path_params"]["collection"]
        headers = _first_headers(scope)
        outcome, vectors = "error", 0
        try:
            with scope.get(ADMISSION) or services.coordinator.admit(name):  # before the body is read
                served = services.coordinator.served(name)
                query = await self._query(scope, headers, receive, served)
                vectors = len(query.vectors)
                if query.with_attributes:
                    _check_attributes(query, self._attributes.known(name, served))
                result = await self._result(scope, name, query, receive)
            outcome = "ok" if result.coverage.shards == 1.0 else "partial"
            if result.degraded:
                services.metrics.degraded(name)
        except Unavailable:
            outcome = "unavailable"
            raise
        except Exhausted as error:
            outcome = "error" if error.retry_after_s is None else "refused"
            raise
        finally:
            # An unknown name as label would make a new time series for every typo.
            known = name if services.known(name) else ""
            services.metrics.search(known, outcome, vectors, time.perf_counter() - started)
        large = answer_numbers(len(result.hits.scores), served.config, query.with_vectors) > LARGE_NUMBERS
        if ARROW_BYTES in headers.get(b"accept", b""):
            return ARROW_BYTES, await aside(large, write_result, result)
        return JSON_BYTES, await aside(large, _json_answer, result, started)

    async def _result(self, scope: Scope, name: str, query: Query, receive: Receive) -> SearchResult:
        if UNWATCHED not in scope["headers"]:
            return await self._services.coordinator.search(name, query)
        with CancelledWhenClientLeaves(receive):
            return await self._services.coordinator.search(name, query)

    async def _query(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, served: ServedCollection
    ) -> Query:
        limits, parameters = self._services.limits, scope["query_string"]
        announced = headers.get(b"content-length", b"")
        body = await receive_body(receive, announced, limits.body_bytes, self._first_parts)
        large = len(body) > LARGE_BODY_BYTES
        if body_type(headers.get(b"content-type", b"")) == ARROW:
            options = _search_options(parameters)
            return await aside(large, lambda: arrow_query(self._streams.read(body), options, served.config, limits))
        if parameters:
            _refuse_parameters(parameters)
        return await aside(large, lambda: json_query(decode_naming_keys(body, SearchBody), served.config, limits))


def _first_headers(scope: Scope) -> dict[bytes, bytes]:
    """Headers by name; the first of each counts."""
    return dict(reversed(scope["headers"]))


def _json_answer(result: SearchResult, started: float) -> bytes:
    return msgspec.json.encode(search_answer(result, (time.perf_counter() - started) * 1000.0))


def _search_options(parameters: bytes) -> SearchOptions:
    if len(parameters) > REMEMBERED_PARAMETERS_BYTES:
        return _decoded_options.__wrapped__(parameters)
    return _decoded_options(parameters)


@lru_cache(maxsize=256)
def _decoded_options(parameters: bytes) -> SearchOptions:
    """Never changed by anybody, so that requests may share them."""
    return decode_parameters(QueryParams(parameters).multi_items(), SearchOptions)


def _refuse_parameters(parameters: bytes) -> None:
    for name in QueryParams(parameters):
        raise Invalid.at(name, "unknown URL parameter; options are fields of the body")


def _check_attributes(query: Query, known: Mapping[str, Any]) -> None:
    for name in query.with_attributes:
        if name not in known:
            raise Invalid.at(
                "with_attributes", f"no attribute {name!r}; the collection has: {', '.join(known) or 'none'}"
            )
