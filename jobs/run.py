"""Jobs from their first to their last status: run, show and report progress, wait until the result is served."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from actors import ray_jobs, ray_runtime
from actors.replica_status import Statuses
from cluster.config import Settings
from cluster.gate import GateFailed
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore, open_store
from jobs.build_plan import Workers
from jobs.compact import CompactOptions, Compactor
from jobs.importer import Importer, ImportOptions
from jobs.progress_bar import progress_bar, progress_note
from jobs.rebuild import Rebuilder, RebuildOptions
from jobs.report import JobReporter, JobStatus

SERVED_TIMEOUT_S = 600.0
REFRESH_TIMEOUT_S = 10.0
T = TypeVar("T")
logger = logging.getLogger(__name__)


def run_import(settings: Settings, options: ImportOptions, status: JobStatus) -> None:
    """Run an import, show and report its progress, wait until the result is served.

    What was committed has succeeded, whatever comes after it: the report's `served` tells whether it is served.
    """
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped before it was committed"):
            statuses = partial(replica_statuses, settings.namespace, options.collection)
            importer = Importer(settings.data, store, log, options, workers(reporter), statuses)
            manifest = importer.run(status.job_id, reporter)
        finish_served(settings, reporter, manifest, {"points": manifest.points})


def run_compact(settings: Settings, options: CompactOptions, status: JobStatus) -> None:
    """Run a compaction, show and report its progress. Replicas load what it commits as they do with their own seals:
    the supervisor is told of it at the end, and looks now and then by itself."""
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped; what it had committed stays"):
            compactor = Compactor(settings.data, store, log, options, workers(reporter), settings.cache_dir)
            report = compactor.run(reporter)
        try:
            tell_supervisor(settings.namespace, options.collection)
        finally:
            reporter.finish("succeeded", report)


def run_rebuild(settings: Settings, options: RebuildOptions, status: JobStatus) -> None:
    """Run a rebuild, show and report its progress, wait until the result is served; as of an import.

    What the gate measured is in the report, also where it fails, and in the file `metric_report`.
    """
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped before it was committed"):
            statuses = partial(replica_statuses, settings.namespace, options.collection)
            place = (workers(reporter), settings.cache_dir)
            rebuilder = Rebuilder(settings.data, store, log, options, *place, statuses=statuses)
            try:
                manifest, report = rebuilder.run(status.job_id, reporter)
            except GateFailed as error:
                write_metric_report(options.metric_report, error.report)
                raise
        told = partial(write_metric_report, options.metric_report, report["gate"])
        finish_served(settings, reporter, manifest, report, told)


def write_metric_report(path: str | None, gate: dict[str, Any]) -> None:
    """Where that fails the job goes on: the report is in its status as well."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(gate, indent=2) + "\n")
    except OSError as error:
        logger.warning("the gate's report could not be written to %s: %s", path, error)


@contextmanager
def reporting(store: ObjectStore, status: JobStatus) -> Iterator[JobReporter]:
    """Reports to the store, and to a progress bar."""
    with progress_bar("starting") as show:

        def listener(now: JobStatus) -> None:
            note = progress_note(now.rate, now.unit, now.remaining_s, str(now.report.get("message", "")))
            show(now.phase, now.progress, note)

        yield JobReporter(store, status, listener)


@contextmanager
def told_if_it_fails(reporter: JobReporter, stopped: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # a cancelled job, SystemExit, has an end to report too
        state = "failed" if isinstance(error, Exception) else "stopped"
        message = str(error) if state == "failed" else stopped
        gate = {"gate": error.report} if isinstance(error, GateFailed) else {}
        reporter.finish(state, {"error": type(error).__name__, "message": message} | gate)
        raise


def workers(reporter: JobReporter) -> Workers:
    cpus, run_tasks = ray_jobs.cluster_cpus(), partial(ray_jobs.run_tasks, waiting=reporter.waiting)
    return Workers(run_tasks, cpus.total, cpus.largest_node, cpus.free, ray_jobs.cluster_gpus)


def finish_served(
    settings: Settings,
    reporter: JobReporter,
    manifest: Manifest,
    report: dict[str, Any],
    first: Callable[[], None] = lambda: None,
) -> None:
    """What was committed has succeeded, whatever comes after it: the report's `served` tells whether it is served."""
    report = {"version": manifest.version, "generation": manifest.generation} | report
    served: dict[str, Any] = {"served": False, "message": "committed; the job was stopped before it was served"}
    try:
        reporter.phase("serve")
        first()
        served = wait_until_served(settings.namespace, manifest, reporter.waiting)
    finally:
        reporter.finish("succeeded", report | served)


def wait_until_served(namespace: str, manifest: Manifest, tell: Callable[[str], None]) -> dict[str, Any]:
    """For the report: `served`, and a `message` where it is not. `tell` hears what it waits for."""
    try:
        if ray_runtime.find_supervisor(namespace) is None:
            return {"served": False, "message": f"committed; no Eagleray runs under the namespace {namespace!r}"}
        ray_runtime.wait_until_served(namespace, manifest.collection, manifest.generation, SERVED_TIMEOUT_S, tell)
    except Exception as error:  # of any kind: it is told in the report, and the import stays a success
        logger.warning("generation %d of %r is not served yet", manifest.generation, manifest.collection, exc_info=True)
        return {"served": False, "message": f"committed, but not served yet: {error}"}
    return {"served": True}


def ask_supervisor(
    namespace: str, ask: Callable[[ray_runtime.RayDirectory], Awaitable[T]], timeout_s: float
) -> T | None:
    """What the supervisor answers; None where no Eagleray runs. Whatever goes wrong is raised."""

    async def answer(directory: ray_runtime.RayDirectory) -> T:
        async with asyncio.timeout(timeout_s):
            return await ask(directory)

    supervisor = ray_runtime.find_supervisor(namespace)
    return None if supervisor is None else asyncio.run(answer(ray_runtime.RayDirectory(supervisor, namespace)))


def replica_statuses(namespace: str, collection: str) -> Statuses:
    """Of a collection's replicas, as the supervisor has them; none where it cannot be asked."""

    try:
        told = ask_supervisor(namespace, lambda directory: directory.describe(collection), REFRESH_TIMEOUT_S)
    except Exception:  # of any kind: what is not known refuses nothing
        logger.warning("the replicas of %r are not known: the memory of the switch", collection, exc_info=True)
        return {}
    return told["statuses"] if told is not None else {}


def tell_supervisor(namespace: str, collection: str) -> None:
    """Of a commit that keeps the generation; where that fails it is found a few seconds later."""
    try:
        ask_supervisor(namespace, lambda directory: directory.refresh(collection), REFRESH_TIMEOUT_S)
    except Exception:  # of any kind: the job has done its work
        logger.warning("the supervisor could not be told of the new version of %r", collection, exc_info=True)
