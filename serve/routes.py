"""HTTP routes: the application, and the handlers of collections and health; `point_routes` and `job_routes` have the
others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.config import check_collection_name
from cluster.deletion import delete_files
from cluster.errors import Corrupt, EaglerayError, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.recent_queries import delete_queries
from serve import metrics
from serve.declared_attributes import DeclaredAttributes
from serve.decoding import decode
from serve.descriptions import describe_collection, describe_unreadable
from serve.gpu_checks import check_new_collection
from serve.http_messages import JSON, Handler, json_response, read_json_body, without_parameters
from serve.ingress import ENTRANCE, SEARCH_PATH, Receive, Scope, Send, searched_collection
from serve.job_routes import JobRoutes
from serve.openapi import openapi_json
from serve.point_routes import PointRoutes
from serve.problems import problem_response
from serve.query_samples import QuerySamples
from serve.schemas import CollectionBody
from serve.search_endpoint import SearchEndpoint
from serve.services import Services as Services

READY_WAIT_S = 30.0  # how long a create or delete waits to be visible; it is committed either way
METRICS_PERIOD_S = 2.0
LAST_SAMPLES_S = 5.0


class _NotAnAction(Convertor[str]):
    """A part of a path that ends in none of the actions which are paths of their own: else a GET of such a path would
    be one of a collection of that name, and not a 405."""

    regex = "[^/]+(?<!:rollback)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("not_an_action", _NotAnAction())


def build_app(services: Services) -> EndpointApp:
    """The ASGI application. While it runs it follows the supervisor, leaves its counts there, and samples of queries
    in the store."""
    attributes = DeclaredAttributes(services.log)
    endpoint, points, search = Routes(services), PointRoutes(services, attributes), SearchEndpoint(services, attributes)
    jobs = JobRoutes(services, endpoint.wait_until_served)
    samples = QuerySamples(services.coordinator, services.store, services.name, services.limits.recent_queries)
    collection, one_job = "/v1/collections/{collection}", "/v1/jobs/{job_id}"
    routes = [
        Route(SEARCH_PATH, search, methods=["POST"]),
        _route(f"{collection}/points:fetch", POST=without_parameters(points.fetch)),
        _route(f"{collection}/points:upsert", POST=points.upsert),
        _route(f"{collection}/points:delete", POST=points.delete),
        _route(f"{collection}/jobs", POST=without_parameters(jobs.submit_job)),
        _route(f"{collection}/snapshots", GET=without_parameters(jobs.list_snapshots)),
        _route(f"{collection}/snapshots/{{name}}", DELETE=without_parameters(jobs.delete_snapshot)),
        _route(f"{collection}:rollback", POST=without_parameters(jobs.roll_back)),
        _route(
            "/v1/collections/{collection:not_an_action}",
            PUT=without_parameters(endpoint.create_collection),
            GET=without_parameters(endpoint.get_collection),
            DELETE=without_parameters(endpoint.delete_collection),
        ),
        _route("/v1/collections", GET=without_parameters(endpoint.list_collections)),
        _route("/v1/jobs", GET=without_parameters(jobs.list_jobs), POST=without_parameters(jobs.submit_job_of_all)),
        _route(one_job, GET=without_parameters(jobs.get_job), DELETE=without_parameters(jobs.stop_job)),
        _route("/healthz", GET=without_parameters(endpoint.healthz)),
        _route("/readyz", GET=without_parameters(endpoint.readyz)),
        _route("/metrics", GET=without_parameters(endpoint.prometheus)),
        _route("/openapi.json", GET=without_parameters(endpoint.openapi)),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for_ever = (services.coordinator.follow(), endpoint.leave_metrics(), samples.leave_for_ever())
        tasks = [asyncio.ensure_future(work) for work in for_ever]
        ENTRANCE.keep(search.let_in)
        try:
            yield
        finally:
            ENTRANCE.leave(search.let_in)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(TimeoutError):  # a sample is not worth a shutdown that takes long
                async with asyncio.timeout(LAST_SAMPLES_S):
                    await samples.leave()

    async def on_error(request: Request, error: Exception) -> Response:
        return problem_response(request, error)

    handlers: Any = {EaglerayError: on_error, HTTPException: on_error, Exception: on_error}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path with a slash too many is unknown, not elsewhere
    return EndpointApp(search, app)


class EndpointApp:
    """Searches on the shortest way, all else by Starlette, whose route of searches answers their other methods.

    It has no `routes` on purpose: with them Serve would try the path against each, for every request.
    """

    def __init__(self, search: SearchEndpoint, rest: Starlette) -> None:
        self._search = search
        self.rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = searched_collection(scope)
        if name is None:
            await self.rest(scope, receive, send)
            return
        scope["path_params"] = {"collection": name}
        await self._search(scope, receive, send)


def _route(path: str, **handlers: Handler) -> Route:
    """All methods of a path, so that 405 names them all in `Allow`. HEAD is answered as GET."""

    async def answer(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, answer, methods=list(handlers))


class Routes:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def create_collection(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        config = decode(await read_json_body(request, self._services.limits.body_bytes), CollectionBody).to_config()
        await asyncio.to_thread(check_new_collection, config, self._services.gpus, self._services.known(name))
        manifest, created = await asyncio.to_thread(self._services.log(name).create, config)
        await self.wait_until_served(manifest)
        return json_response(await self._describe(name), 201 if created else 200)

    async def get_collection(self, request: Request) -> Response:
        return json_response(await self._describe(check_collection_name(request.path_params["collection"])))

    async def list_collections(self, request: Request) -> Response:
        return json_response({"collections": await self._describe_all()})

    async def delete_collection(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        deleted = await asyncio.to_thread(self._services.log(name).delete)
        await self._services.directory.refresh(name)
        await self._wait_for(lambda: not self._services.known(name))
        await asyncio.to_thread(delete_queries, self._services.store, name)
        await asyncio.to_thread(delete_files, self._services.store, self._services.log(name), deleted)
        return Response(status_code=204)

    async def healthz(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        table = self._services.coordinator.table
        if table is None:
            raise Unavailable("the endpoint has not reached the supervisor yet")
        if table.unready:
            raise Unavailable("; ".join(f"{name}: {why}" for name, why in sorted(table.unready.items())))
        return json_response({"status": "ready"})

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

    async def wait_until_served(self, manifest: Manifest) -> None:
        """Have the supervisor look at a commit, and wait until it is served, or `READY_WAIT_S` passed."""
        await self._services.directory.refresh(manifest.collection)
        await self._wait_for(lambda: self._serves(manifest))

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
