"""HTTP routes: decode, call the coordinator or the store, encode. One handler per row of docs/http-api.md."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from actors.coordinator import Coordinator
from actors.shard_client import Directory, ServedCollection
from cluster.config import Limits, check_collection_name
from cluster.errors import Corrupt, EaglerayError, Exhausted, Invalid, NotFound, Unavailable
from cluster.ids import id_array
from cluster.index_policy import choose
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.query import Query
from cluster.recent_queries import delete_queries
from cluster.segment import delete_segment
from jobs.report import new_job_id
from serve import arrow_bodies, metrics
from serve.arrow_bodies import ARROW
from serve.descriptions import describe_collection, describe_unreadable
from serve.job_service import JobService
from serve.json_bodies import points_of, search_answer
from serve.openapi import openapi_json
from serve.problems import problem_response
from serve.query_samples import QuerySamples
from serve.schemas import (
    CollectionBody,
    FetchBody,
    ImportBody,
    SearchBody,
    answer_numbers,
    arrow_query,
    check_answer,
    check_create,
    decode,
    decode_options,
    json_query,
)

JSON = "application/json"
READY_WAIT_S = 30.0  # how long a create or delete waits to be visible; it is committed either way
FETCH_TIMEOUT_S = 10.0
METRICS_PERIOD_S = 2.0
LAST_SAMPLES_S = 5.0
LARGE_BODY_BYTES = 1024 * 1024  # larger bodies are decoded, and larger answers encoded, beside the event loop:
LARGE_NUMBERS = 20_000  # 5,000 hits take some 10 ms
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class MetricsExchange(Protocol):
    """Where coordinators leave their counts for each other."""

    async def exchange_metrics(self, coordinator: str, samples: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Services:
    """What the routes need; made once per endpoint process."""

    coordinator: Coordinator
    directory: Directory
    store: ObjectStore
    jobs: JobService
    metrics: metrics.EndpointMetrics
    exchange: MetricsExchange
    limits: Limits
    name: str


def build_app(services: Services) -> Starlette:
    """The ASGI application. While it runs it follows the supervisor, leaves its counts there, and samples of queries
    in the store."""
    endpoint = Routes(services)
    samples = QuerySamples(services.coordinator, services.store, services.name, services.limits.recent_queries)
    collection = "/v1/collections/{collection}"
    routes = [
        _route(f"{collection}/points:search", POST=endpoint.search),
        _route(f"{collection}/points:fetch", POST=_without_parameters(endpoint.fetch)),
        _route(f"{collection}/jobs", POST=_without_parameters(endpoint.submit_job)),
        _route(
            collection,
            PUT=_without_parameters(endpoint.create_collection),
            GET=_without_parameters(endpoint.get_collection),
            DELETE=_without_parameters(endpoint.delete_collection),
        ),
        _route("/v1/collections", GET=_without_parameters(endpoint.list_collections)),
        _route(
            "/v1/jobs/{job_id}",
            GET=_without_parameters(endpoint.get_job),
            DELETE=_without_parameters(endpoint.stop_job),
        ),
        _route("/healthz", GET=_without_parameters(endpoint.healthz)),
        _route("/readyz", GET=_without_parameters(endpoint.readyz)),
        _route("/metrics", GET=_without_parameters(endpoint.prometheus)),
        _route("/openapi.json", GET=_without_parameters(endpoint.openapi)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for_ever = (services.coordinator.follow(), endpoint.leave_metrics(), samples.leave_for_ever())
        tasks = [asyncio.ensure_future(work) for work in for_ever]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(TimeoutError):  # a sample is not worth a shutdown that takes long
                await asyncio.wait_for(samples.leave(), LAST_SAMPLES_S)

    async def on_error(request: Request, error: Exception) -> Response:
        return problem_response(request, error)

    handlers: Any = {EaglerayError: on_error, HTTPException: on_error, Exception: on_error}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path with a slash too many is unknown, not elsewhere
    return app


def _route(path: str, **handlers: Handler) -> Route:
    """All methods of a path, so that 405 names them all in `Allow`. HEAD is answered as GET."""

    async def answer(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, answer, methods=list(handlers))


def _without_parameters(handler: Handler) -> Handler:
    """Nothing is ignored in silence: only an Arrow search has URL parameters."""

    async def answer(request: Request) -> Response:
        _refuse_parameters(request)
        return await handler(request)

    return answer


class Routes:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def search(self, request: Request) -> Response:
        name = request.path_params["collection"]
        started = time.perf_counter()
        outcome, vectors = "error", 0
        try:
            served = self._served(name)
            query = await self._query(request, served)
            vectors = len(query.vectors)
            _check_attributes(query, served)
            result = await self._services.coordinator.search(name, query)
            outcome = "ok" if result.coverage.shards == 1.0 else "partial"
        except Unavailable:
            outcome = "unavailable"
            raise
        finally:
            # An unknown name would make a new time series for every typo.
            known = name if self._known(name) else ""
            self._services.metrics.search(known, outcome, vectors, time.perf_counter() - started)
        large = answer_numbers(len(result.hits.scores), served.config, query.with_vectors) > LARGE_NUMBERS
        if ARROW in request.headers.get("accept", ""):
            return Response(await _aside(large, arrow_bodies.write_result, result), media_type=ARROW)
        took_ms = (time.perf_counter() - started) * 1000.0
        return await _aside(large, lambda: _json(search_answer(result, took_ms)))

    async def _query(self, request: Request, served: ServedCollection) -> Query:
        parameters, limits = request.query_params, self._services.limits
        body = await self._body(request)
        large = len(body) > LARGE_BODY_BYTES
        if _content_type(request) == ARROW:
            options = decode_options(parameters.multi_items())
            return await _aside(
                large, lambda: arrow_query(arrow_bodies.read_vectors(body), options, served.config, limits)
            )
        _refuse_parameters(request)
        return await _aside(large, lambda: json_query(decode(body, SearchBody), served.config, limits))

    async def fetch(self, request: Request) -> Response:
        name = request.path_params["collection"]
        served = self._served(name)
        body = decode(await self._json_body(request), FetchBody)
        if not 1 <= len(body.ids) <= self._services.limits.ids_per_fetch:
            raise Invalid.at("ids", f"must hold 1 to {self._services.limits.ids_per_fetch} ids, not {len(body.ids)}")
        check_answer(len(body.ids), served.config, body.with_vectors, "ids", self._services.limits)
        ids = id_array(body.ids, served.config.id_type)
        columns = ("id", *(("vector",) if body.with_vectors else ()), *served.attributes)
        found, table = await self._services.coordinator.fetch(name, ids, columns, FETCH_TIMEOUT_S)
        missing = [value for value, here in zip(body.ids, found.tolist(), strict=True) if not here]
        large = answer_numbers(len(body.ids), served.config, body.with_vectors) > LARGE_NUMBERS
        return await _aside(large, lambda: _json({"points": points_of(table, served.attributes), "missing": missing}))

    async def create_collection(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        config = decode(await self._json_body(request), CollectionBody).to_config()
        choose(0, config)  # refuses what no shard could build
        manifest, created = await asyncio.to_thread(self._log(name).create, config)
        await self._services.directory.refresh(name)
        await self._wait_for(lambda: self._serves(manifest))
        return _json(await self._describe(name), 201 if created else 200)

    async def get_collection(self, request: Request) -> Response:
        return _json(await self._describe(check_collection_name(request.path_params["collection"])))

    async def list_collections(self, request: Request) -> Response:
        return _json({"collections": await self._describe_all()})

    async def delete_collection(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        last = await asyncio.to_thread(self._log(name).delete)
        await self._services.directory.refresh(name)
        await self._wait_for(lambda: not self._known(name))
        await asyncio.to_thread(delete_queries, self._services.store, name)
        await asyncio.to_thread(self._delete_segments, name, last.version)
        return Response(status_code=204)

    async def submit_job(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        body = decode(await self._json_body(request), ImportBody)
        if body.create is not None:
            check_create(body.create)
        elif not self._known(name):
            raise NotFound(f"no collection {name!r}; give create to have the import make it")
        job_id = new_job_id("import")
        await asyncio.to_thread(self._services.jobs.submit_import, job_id, name, body)
        return _json({"job_id": job_id}, 202)

    async def get_job(self, request: Request) -> Response:
        return _json(await asyncio.to_thread(self._services.jobs.status, request.path_params["job_id"]))

    async def stop_job(self, request: Request) -> Response:
        await asyncio.to_thread(self._services.jobs.stop, request.path_params["job_id"])
        return Response(status_code=204)

    async def healthz(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        table = self._services.coordinator.table
        if table is None:
            raise Unavailable("the endpoint has not reached the supervisor yet")
        if table.unready:
            raise Unavailable("; ".join(f"{name}: {why}" for name, why in sorted(table.unready.items())))
        return _json({"status": "ready"})

    async def prometheus(self, request: Request) -> Response:
        everyone = await self._exchange_metrics()
        text = await asyncio.to_thread(metrics.render, everyone, await self._describe_all())
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return Response(openapi_json(), media_type=JSON)

    async def leave_metrics(self) -> None:
        """Leave this coordinator's counts with the supervisor, for ever."""
        while True:
            with contextlib.suppress(EaglerayError):  # follow() says in the log that the supervisor is away
                await self._exchange_metrics()
            await asyncio.sleep(METRICS_PERIOD_S)

    async def _exchange_metrics(self) -> dict[str, Any]:
        services = self._services
        return await services.exchange.exchange_metrics(services.name, services.metrics.snapshot())

    def _log(self, collection: str) -> ManifestLog:
        return ManifestLog(self._services.store, collection, lambda: uuid.uuid4().hex)

    def _served(self, name: str) -> ServedCollection:
        return self._services.coordinator.served(name)

    def _known(self, name: str) -> bool:
        table = self._services.coordinator.table
        return table is not None and (name in table.collections or name in table.unready)

    def _serves(self, manifest: Manifest) -> bool:
        table = self._services.coordinator.table
        served = table.collections.get(manifest.collection) if table else None
        return served is not None and served.version >= manifest.version and all(served.replicas.values())

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the serving table shows a commit, or `READY_WAIT_S` passed."""
        deadline = time.monotonic() + READY_WAIT_S
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _describe(self, name: str) -> dict[str, Any]:
        facts = await self._services.directory.describe(name)
        table = self._services.coordinator.table
        return describe_collection(facts, table.unready.get(name) if table else "the endpoint is starting")

    async def _describe_all(self) -> list[dict[str, Any]]:
        table = self._services.coordinator.table
        if table is None:
            raise Unavailable("the endpoint has not reached the supervisor yet")
        described = []
        for name in sorted({*table.collections, *table.unready}):
            try:
                described.append(await self._describe(name))
            except NotFound:  # deleted meanwhile
                continue
            except Corrupt as error:
                described.append(describe_unreadable(name, str(error)))
        return described

    def _delete_segments(self, name: str, version: int) -> None:
        """What manifests up to `version` named, and no more: another writer may already be filling a new collection."""
        for segment_id in self._log(name).segments_until(version):
            delete_segment(self._services.store, name, segment_id)

    async def _json_body(self, request: Request) -> bytes:
        if _content_type(request) not in ("", JSON):
            raise HTTPException(415, f"the body must be {JSON}")
        return await self._body(request)

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too large."""
        bound = self._services.limits.body_bytes
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


async def _aside(large: bool, work: Callable[..., T], *arguments: Any) -> T:
    """Large work in a thread, so that the event loop goes on with others' requests; small work at once."""
    return await asyncio.to_thread(work, *arguments) if large else work(*arguments)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type=JSON)


def _content_type(request: Request) -> str:
    content_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if content_type not in ("", JSON, ARROW):
        raise HTTPException(415, f"the body must be {JSON} or {ARROW}, not {content_type}")
    return content_type


def _refuse_parameters(request: Request) -> None:
    for name in request.query_params:
        raise Invalid.at(name, "unknown URL parameter; options are fields of the body")


def _check_attributes(query: Query, served: ServedCollection) -> None:
    for name in query.with_attributes:
        if name not in served.attributes:
            known = ", ".join(served.attributes) or "none"
            raise Invalid.at("with_attributes", f"no attribute {name!r}; the collection has: {known}")
