"""The whole HTTP endpoint in this process: the Starlette app over in-process replicas, reached without a socket.

async def scenario(endpoint: Endpoint) -> None:
    await endpoint.publish("words", config, points)
    answer = await endpoint.http.post("/v1/collections/words/points:search", json={...})

run_with_endpoint(scenario, tmp_path)
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import typer
from numpy.typing import NDArray

from actors.coordinator import Coordinator
from cluster.arrow_rows import vectors_array
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig, Limits
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.manifest import ManifestLog
from cluster.object_store import ObjectStore, open_store
from jobs.__main__ import app as jobs_app
from jobs.__main__ import parse_attributes
from jobs.import_source import Columns
from jobs.importer import Importer, ImportOptions, Workers
from jobs.report import JobReporter, JobStatus
from serve.arrow_bodies import ARROW
from serve.gpu_checks import CountGpus
from serve.job_service import JobService
from serve.metrics import EndpointMetrics
from serve.problems import PROBLEM
from serve.routes import EndpointApp, Services, build_app
from tests.fakes import LocalDirectory, Serving, run_tasks_here, serving
from tests.unit.actors.points import Points, commit

TEST_TIMEOUT_S = 60.0
PATIENT_MS = 20_000  # of searches that must not fail because the machine is busy
Json = dict[str, Any]


class LocalJobs:
    """`job_service.JobRunner` that records what was submitted, and runs an import where a test says so.

    `states` are what Ray would say of each job (a job it forgot is taken out), `logs` its log.
    """

    def __init__(self) -> None:
        self.entrypoints: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.logs: dict[str, list[str]] = {}

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        self.entrypoints[job_id] = entrypoint
        self.states[job_id] = "PENDING"

    def job_state(self, job_id: str) -> str | None:
        return self.states.get(job_id)

    def job_log_tail(self, job_id: str, lines: int) -> list[str]:
        return self.logs.get(job_id, [])[-lines:]

    def stop_job(self, job_id: str) -> bool:
        if job_id not in self.states:
            raise NotFound(f"no job {job_id!r}")
        self.states[job_id] = "STOPPED"
        return True

    def arguments(self, job_id: str) -> Json:
        """What `python -m jobs` reads from the command line that was submitted."""
        executable, *module, kind = shlex.split(self.entrypoints[job_id])[:4]
        assert (executable, module, kind) == (sys.executable, ["-m", "jobs"], job_id.rsplit("-", 1)[0])
        group = typer.main.get_command(jobs_app)
        command = group.commands[kind]  # type: ignore[attr-defined]  # a group, because the app has a callback
        context = command.make_context(kind, shlex.split(self.entrypoints[job_id])[4:])
        return dict(context.params)

    def run(self, job_id: str, data: str) -> JobStatus:
        """Run the import that was submitted, in this thread, as `jobs.run.run_import` does."""
        given = self.arguments(job_id)
        columns = Columns(given["id_column"], given["vector_column"], parse_attributes(given["attribute_columns"]))
        create = json.loads(given["create"])
        options = ImportOptions(given["collection"], given["source"], columns, create, given["memory_bytes"])
        store = open_store(data)
        log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
        reporter = JobReporter(store, JobStatus(job_id, "import", options.collection))
        self.states[job_id] = "RUNNING"
        try:
            manifest = Importer(data, store, log, options, Workers(run_tasks_here, 1)).run(job_id, reporter)
        except EaglerayError as error:
            reporter.finish("failed", {"error": type(error).__name__, "message": str(error)})
            self.states[job_id] = "FAILED"
        else:
            reporter.finish("succeeded", {"points": manifest.points, "generation": manifest.generation})
            self.states[job_id] = "SUCCEEDED"
        return reporter.status


@dataclass(frozen=True)
class Endpoint:
    """One endpoint process and what it stands on."""

    http: httpx.AsyncClient
    app: EndpointApp
    services: Services
    eagleray: Serving
    jobs: LocalJobs
    data: str
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def store(self) -> ObjectStore:
        return self.services.store

    @property
    def coordinator(self) -> Coordinator:
        return self.services.coordinator

    async def publish(self, collection: str, config: CollectionConfig, points: Points) -> None:
        """Make `points` the collection's next generation, and wait until it is served."""
        manifest = await asyncio.to_thread(commit, self.store, collection, config, points)
        await self.eagleray.directory.refresh(collection)
        await self.served(collection, manifest.version)

    async def served(self, collection: str, version: int = 1) -> None:
        """Wait until this endpoint serves a version with all replicas ready."""

        def is_served() -> bool:
            table = self.coordinator.table
            served = table.collections.get(collection) if table else None
            return served is not None and served.version >= version and collection not in table.unready  # type: ignore[union-attr]

        await until(is_served)

    async def create(self, collection: str, **config: Any) -> Json:
        response = await self.http.put(f"/v1/collections/{collection}", json=config)
        assert response.status_code == 201, response.text
        return dict(response.json())

    async def search(self, collection: str, **body: Any) -> httpx.Response:
        body = {"timeout_ms": PATIENT_MS} | body
        return await self.http.post(f"/v1/collections/{collection}/points:search", json=body)

    async def search_arrow(
        self, collection: str, body: bytes, accept: str = "application/json", **options: Any
    ) -> httpx.Response:
        return await self.http.post(
            f"/v1/collections/{collection}/points:search",
            content=body,
            params={"timeout_ms": PATIENT_MS} | options,
            headers={"Content-Type": ARROW, "Accept": accept},
        )

    async def run_import(self, job_id: str) -> JobStatus:
        """Run a submitted import, and tell the supervisor of it, as the job itself does."""
        status = await asyncio.to_thread(self.jobs.run, job_id, self.data)
        await self.eagleray.directory.refresh(status.collection)
        return status


@dataclass(frozen=True)
class EndpointOptions:
    limits: Limits = field(default_factory=Limits)
    name: str = "endpoint-1"
    follow: bool = True  # False: an endpoint that never reaches the supervisor
    gpus: CountGpus = ClusterGpus  # that it has none


@asynccontextmanager
async def running_endpoint(
    data: str, cache_dir: Path, options: EndpointOptions = EndpointOptions()
) -> AsyncIterator[Endpoint]:
    """An Eagleray over the storage URL `data`, with one endpoint."""
    async with (
        serving(open_store(data), cache_dir) as eagleray,
        another_endpoint(eagleray, data, options) as endpoint,
    ):
        yield endpoint


@asynccontextmanager
async def another_endpoint(eagleray: Serving, data: str, options: EndpointOptions) -> AsyncIterator[Endpoint]:
    """An endpoint process of an Eagleray that runs: a coordinator behind the app, its lifespan running."""
    store, metrics, jobs = open_store(data), EndpointMetrics(), LocalJobs()
    directory = eagleray.directory if options.follow else SilentDirectory(eagleray)
    services = Services(
        coordinator=Coordinator(directory, options.limits, metrics),
        directory=directory,
        store=store,
        jobs=JobService(store, jobs, "eagleray"),
        metrics=metrics,
        exchange=directory,
        limits=options.limits,
        name=options.name,
        gpus=options.gpus,
    )
    app = build_app(services)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.rest.router.lifespan_context(app.rest),
        httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http,
    ):
        if options.follow:
            await until(lambda: services.coordinator.table is not None)
        yield Endpoint(http, app, services, eagleray, jobs, data)


class SilentDirectory(LocalDirectory):
    """A supervisor that never answers with a table."""

    def __init__(self, eagleray: Serving) -> None:
        super().__init__(eagleray.supervisor, eagleray.runtime)

    async def next_table(self, known_stamp: str | None) -> Any:
        await asyncio.Event().wait()


def run_with_endpoint(
    scenario: Callable[[Endpoint], Awaitable[None]],
    tmp_path: Path,
    data: str | None = None,
    **options: Any,
) -> None:
    """Run a scenario on a fresh Eagleray, in memory unless `data` is another storage URL."""

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(pass_over_unread_calls)
        url = data or memory_url()
        async with (
            asyncio.timeout(TEST_TIMEOUT_S),
            running_endpoint(url, tmp_path / "cache", EndpointOptions(**options)) as endpoint,
        ):
            await scenario(endpoint)

    asyncio.run(run())


def pass_over_unread_calls(loop: asyncio.AbstractEventLoop, context: Json) -> None:
    """Report what goes wrong unseen, but for the calls to dead replicas that a supervisor leaves when it is closed.

    Their report would be written whenever they are collected, in the middle of another test; on Python 3.11 that
    even breaks an `ast.parse` that runs at the time.
    """
    if not isinstance(context.get("exception"), Unavailable):
        loop.default_exception_handler(context)


def memory_url() -> str:
    """A store of this process that nothing else uses."""
    return f"memory://{uuid.uuid4().hex}"


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return as soon as the condition holds; TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def problem(response: httpx.Response, status: int, *fields: str) -> Json:
    """The body of an answer that must be a problem of that status, about exactly those fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body: Json = response.json()
    assert body["status"] == status
    assert body["title"] == HTTPStatus(status).phrase
    assert body["type"].startswith("urn:eagleray:problem:")
    assert body["detail"]
    assert [error["field"] for error in body.get("errors", [])] == list(fields), body
    assert all(error["message"] for error in body.get("errors", []))
    return body


def arrow_stream(*columns: NDArray[Any], name: str = "vector", **write_options: Any) -> bytes:
    """A record batch stream with one batch per array of vectors."""
    batches = [pa.record_batch([vectors_array(vectors)], names=[name]) for vectors in columns]
    return stream_of(batches, batches[0].schema, **write_options)


def stream_of(batches: list[Any], schema: Any, **write_options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**write_options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def read_stream(response: httpx.Response) -> Any:
    """The table of an Arrow answer."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW
    return pa.ipc.open_stream(response.content).read_all()


def hit_ids(answer: Json) -> list[list[int | str]]:
    return [[hit["id"] for hit in hits] for hits in answer["results"]]


def points_of(values: list[int] | list[str], vectors: NDArray[Any]) -> Points:
    """Points with those ids."""
    return Points(
        pa.array(values, pa.int64() if isinstance(values[0], int) else pa.large_string()), np.asarray(vectors)
    )
