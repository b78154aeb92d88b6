"""Rollback, snapshot, restore, branch and export from their first to their last status."""

from __future__ import annotations

import uuid
from dataclasses import asdict

from cluster.config import Settings
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore, open_store
from jobs.export import SEAL_SHARE, Exporter, ExportOptions
from jobs.report import JobReporter, JobStatus
from jobs.rollback import RollbackJob, RollbackOptions
from jobs.run import finish_served, reporting, tell_supervisor, told_if_it_fails, workers
from jobs.sealing import Sealer
from jobs.snapshots import (
    BranchOptions,
    RestoreOptions,
    SnapshotOptions,
    branch,
    check_branch,
    named_version,
    restore,
    take_snapshot,
)

NOTHING_DONE = "stopped before it was committed"


def run_rollback(settings: Settings, options: RollbackOptions, status: JobStatus) -> None:
    """Go back to an earlier generation with every write since, and wait until that is served."""
    store = open_store(settings.data)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, NOTHING_DONE):
            log, tasks = _log(store, options.collection), workers(reporter)
            job = RollbackJob(settings.data, store, log, options, tasks, settings.cache_dir)
            manifest, report = job.run(status.job_id, reporter)
        finish_served(settings, reporter, manifest, report)


def run_snapshot(settings: Settings, options: SnapshotOptions, status: JobStatus) -> None:
    """Seal and name a version. Replicas load what was sealed as they do with their own seals."""
    store = open_store(settings.data)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped; what it had sealed stays, the snapshot was not taken"):
            sealer = _sealer(settings, store, options.collection, reporter)
            report = asdict(take_snapshot(store, sealer, options, reporter))
        try:
            tell_supervisor(settings.namespace, options.collection)
        finally:
            reporter.finish("succeeded", report)


def run_restore(settings: Settings, options: RestoreOptions, status: JobStatus) -> None:
    """Make a snapshot the next generation, and wait until that is served."""
    store = open_store(settings.data)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, NOTHING_DONE):
            reporter.phase("commit")
            manifest = restore(store, _log(store, options.collection), options)
        finish_served(settings, reporter, manifest, {"snapshot": options.snapshot})


def run_branch(settings: Settings, options: BranchOptions, status: JobStatus) -> None:
    """Make a collection of a snapshot, or of now, and wait until it is served."""
    store = open_store(settings.data)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, NOTHING_DONE):
            log, into = _log(store, options.collection), _log(store, options.into)
            check_branch(into, options)  # before anything is sealed
            origin = _version(settings, store, options.collection, options.snapshot, reporter)
            reporter.phase("commit")
            manifest = branch(store, log, into, origin, options)
        report = {"collection": options.into, "origin": options.collection, "origin_version": origin.version}
        finish_served(settings, reporter, manifest, report)


def run_export(settings: Settings, options: ExportOptions, status: JobStatus) -> None:
    """Write a snapshot's points, or those of now, to Parquet files."""
    store = open_store(settings.data)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped; nothing was exported"):

            def version(reporter: JobReporter) -> Manifest:
                return _version(settings, store, options.collection, options.snapshot, reporter, SEAL_SHARE)

            exporter = Exporter(settings.data, store, options, workers(reporter), version, settings.cache_dir)
            report = exporter.run(status.job_id, reporter)
        reporter.finish("succeeded", report)


def _version(
    settings: Settings,
    store: ObjectStore,
    collection: str,
    snapshot: str | None,
    reporter: JobReporter,
    share: float = 0.9,
) -> Manifest:
    """The version that a snapshot names; without one that of now, sealed first."""
    if snapshot is not None:
        return named_version(store, _log(store, collection), collection, snapshot)
    return _sealer(settings, store, collection, reporter).sealed(collection, reporter, share)


def _sealer(settings: Settings, store: ObjectStore, collection: str, reporter: JobReporter) -> Sealer:
    return Sealer(settings.data, _log(store, collection), workers(reporter), settings.cache_dir)


def _log(store: ObjectStore, collection: str) -> ManifestLog:
    return ManifestLog(store, collection, lambda: uuid.uuid4().hex)
