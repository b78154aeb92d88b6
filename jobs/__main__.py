"""`python -m jobs import ...` and `compact ...`: what `ray job submit` runs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from actors import ray_jobs, ray_runtime
from cluster.config import Settings
from cluster.errors import EaglerayError, Invalid
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore, open_store
from jobs.build_plan import Workers
from jobs.compact import CompactOptions, Compactor
from jobs.import_source import Columns
from jobs.importer import DEFAULT_MEMORY_BYTES, Importer, ImportOptions
from jobs.progress_bar import progress_bar, rate_note
from jobs.report import JobReporter, JobStatus, new_job_id

SERVED_TIMEOUT_S = 600.0
REFRESH_TIMEOUT_S = 10.0
MEMORY_HELP = "Most bytes that the indexes being built at one time take on one node."
logger = logging.getLogger(__name__)
app = typer.Typer(help="Eagleray's jobs.", no_args_is_help=True, add_completion=False)


@app.callback()
def jobs() -> None:
    """Jobs run on a Ray cluster, and report their progress to object storage."""


@app.command("import")
def import_command(
    collection: Annotated[str, typer.Option(help="The collection to fill; created if it does not exist.")],
    source: Annotated[str, typer.Option(help="Parquet file, folder or object-storage URL.")],
    data: Annotated[str | None, typer.Option(help="Storage URL; taken from the running Eagleray if absent.")] = None,
    id_column: Annotated[str, typer.Option(help="Column of ids.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Column of vectors.")] = "vector",
    attribute_columns: Annotated[str, typer.Option(help="Comma-separated columns to keep, or 'all'.")] = "",
    create: Annotated[str, typer.Option(help="JSON config for a collection that does not exist yet.")] = "{}",
    memory_bytes: Annotated[int, typer.Option(help=MEMORY_HELP, min=1)] = DEFAULT_MEMORY_BYTES,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
    namespace: Annotated[str, typer.Option(help="Ray namespace of the Eagleray.")] = "eagleray",
    job_id: Annotated[str | None, typer.Option(help="Name of this run; made up if absent.")] = None,
) -> None:
    """Import a Parquet file, folder or URL: all of it becomes the collection's points, or nothing does."""
    columns = Columns(id_column, vector_column, parse_attributes(attribute_columns))
    options = ImportOptions(collection, source, columns, _json_object(create), memory_bytes, seed)
    settings = _connected(address, data, namespace)
    run_import(settings, options, _first_status("import", job_id, collection))


@app.command("compact")
def compact_command(
    collection: Annotated[str, typer.Option(help="The collection to compact.")],
    shard: Annotated[int | None, typer.Option(help="Only this shard.", min=0)] = None,
    data: Annotated[str | None, typer.Option(help="Storage URL; taken from the running Eagleray if absent.")] = None,
    memory_bytes: Annotated[int, typer.Option(help=MEMORY_HELP, min=1)] = DEFAULT_MEMORY_BYTES,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
    namespace: Annotated[str, typer.Option(help="Ray namespace of the Eagleray.")] = "eagleray",
    job_id: Annotated[str | None, typer.Option(help="Name of this run; made up if absent.")] = None,
) -> None:
    """Seal what was written into segments, and merge each shard's segments into one without deleted rows."""
    settings = _connected(address, data, namespace)
    options = CompactOptions(collection, shard, memory_bytes)
    run_compact(settings, options, _first_status("compact", job_id, collection))


def _connected(address: str | None, data: str | None, namespace: str) -> Settings:
    """Join the Ray cluster; the settings of the Eagleray there, or with `data` those of none."""
    ray_runtime.connect(address)
    settings = Settings(data=data, namespace=namespace) if data else ray_runtime.settings_of_supervisor(namespace)
    settings.check_shared()
    return settings


def _first_status(kind: str, job_id: str | None, collection: str) -> JobStatus:
    submission_id = _submission_id()
    name = job_id or submission_id or new_job_id(kind)
    return JobStatus(name, kind, collection, submitted=submission_id == name)


def _submission_id() -> str | None:
    """The name under which Ray's job server runs this process, if it does."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return str(json.loads(config)["metadata"]["job_submission_id"]) if config else None


def parse_attributes(text: str) -> tuple[str, ...] | str:
    return "all" if text == "all" else tuple(name for name in text.split(",") if name)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Invalid.at("create", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Invalid.at("create", "must be a JSON object")
    return value


def run_import(settings: Settings, options: ImportOptions, status: JobStatus) -> None:
    """Run an import, show and report its progress, wait until the result is served.

    What was committed has succeeded, whatever comes after it: the report's `served` tells whether it is served.
    """
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with _reporter(store, status) as reporter:
        with _told_if_it_fails(reporter, "stopped before it was committed"):
            manifest = Importer(settings.data, store, log, options, _workers(reporter)).run(status.job_id, reporter)
        report = {"points": manifest.points, "version": manifest.version, "generation": manifest.generation}
        served: dict[str, Any] = {"served": False, "message": "committed; the job was stopped before it was served"}
        try:
            reporter.phase("serve")
            served = _wait_until_served(settings.namespace, manifest)
        finally:
            reporter.finish("succeeded", report | served)


def run_compact(settings: Settings, options: CompactOptions, status: JobStatus) -> None:
    """Run a compaction, show and report its progress. Replicas load what it commits as they do with their own seals:
    the supervisor is told of it at the end, and looks now and then by itself."""
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with _reporter(store, status) as reporter:
        with _told_if_it_fails(reporter, "stopped; what it had committed stays"):
            compactor = Compactor(settings.data, store, log, options, _workers(reporter), settings.cache_dir)
            report = compactor.run(reporter)
        try:
            _tell_supervisor(settings.namespace, options.collection)
        finally:
            reporter.finish("succeeded", report)


@contextmanager
def _reporter(store: ObjectStore, status: JobStatus) -> Iterator[JobReporter]:
    """Reports to the store, and to a progress bar."""
    with progress_bar("starting") as show:

        def listener(now: JobStatus) -> None:
            show(now.phase, now.progress, rate_note(now.rate) or str(now.report.get("message", "")))

        yield JobReporter(store, status, listener)


@contextmanager
def _told_if_it_fails(reporter: JobReporter, stopped: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # a cancelled job, SystemExit, has an end to report too
        state = "failed" if isinstance(error, Exception) else "stopped"
        message = str(error) if state == "failed" else stopped
        reporter.finish(state, {"error": type(error).__name__, "message": message})
        raise


def _workers(reporter: JobReporter) -> Workers:
    cpus = ray_jobs.cluster_cpus()
    return Workers(partial(ray_jobs.run_tasks, waiting=reporter.waiting), cpus.total, cpus.largest_node, cpus.free)


def _wait_until_served(namespace: str, manifest: Manifest) -> dict[str, Any]:
    """For the report: `served`, and a `message` where it is not."""
    try:
        if ray_runtime.find_supervisor(namespace) is None:
            return {"served": False, "message": f"committed; no Eagleray runs under the namespace {namespace!r}"}
        ray_runtime.wait_until_served(namespace, manifest.collection, manifest.generation, SERVED_TIMEOUT_S)
    except Exception as error:  # of any kind: it is told in the report, and the import stays a success
        logger.warning("generation %d of %r is not served yet", manifest.generation, manifest.collection, exc_info=True)
        return {"served": False, "message": f"committed, but not served yet: {error}"}
    return {"served": True}


def _tell_supervisor(namespace: str, collection: str) -> None:
    """Of a commit that keeps the generation; where that fails it is found a few seconds later."""

    async def refresh(directory: ray_runtime.RayDirectory) -> None:
        async with asyncio.timeout(REFRESH_TIMEOUT_S):
            await directory.refresh(collection)

    try:
        supervisor = ray_runtime.find_supervisor(namespace)
        if supervisor is not None:
            asyncio.run(refresh(ray_runtime.RayDirectory(supervisor, namespace)))
    except Exception:  # of any kind: the job has done its work
        logger.warning("the supervisor could not be told of the new version of %r", collection, exc_info=True)


def main() -> None:
    """Run; an error of ours ends with its message and exit code 1."""
    try:
        app()
    except EaglerayError as error:
        print(f"eagleray: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
