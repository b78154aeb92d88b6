"""The jobs that look after what is stored, from their first to their last status: garbage collection and scrub."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from cluster.config import Settings
from cluster.errors import Corrupt, Unavailable
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from jobs.collect_garbage import CollectGarbageOptions, GarbageCollector
from jobs.report import JobStatus
from jobs.run import ask_supervisor, reporting, told_if_it_fails, workers
from jobs.scrub import Scrubber, ScrubOptions

TABLE_TIMEOUT_S = 30.0
logger = logging.getLogger(__name__)


def run_collect_garbage(settings: Settings, options: CollectGarbageOptions, status: JobStatus) -> None:
    """List garbage, or delete it. Unavailable where some of it could not be deleted, or something not be read; what was
    done until then is in the report all the same. Nothing is deleted before it is known which versions are served."""
    store = open_store(settings.data)
    first: Mapping[str, int] = {}
    with reporting(store, status) as reporter:
        collector = GarbageCollector(store, options, lambda: {**first, **_served(settings.namespace)})
        try:
            first = _table(settings.namespace) if options.delete else {}
            report = collector.run(reporter)
            if report["failed"]:
                first = report["failures"][0]
                times = "once" if report["failed"] == 1 else f"{report['failed']} times"
                raise Unavailable(
                    f"an object could {times} not be read or deleted; first {first['object']}: {first['message']}"
                )
        except BaseException as error:  # a cancelled job, SystemExit, has an end to report too
            state = "failed" if isinstance(error, Exception) else "stopped"
            told = {"error": type(error).__name__, "message": str(error) or "stopped; what it had deleted is gone"}
            reporter.finish(state, collector.report | told)
            raise
        reporter.finish("succeeded", report)


def run_scrub(settings: Settings, options: ScrubOptions, status: JobStatus) -> None:
    """Check a collection. Corrupt where something is wrong: the report, which is written first, says what."""
    store = open_store(settings.data)
    log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
    with reporting(store, status) as reporter:
        with told_if_it_fails(reporter, "stopped; nothing was changed"):
            scrubber = Scrubber(settings.data, store, log, options, workers(reporter), settings.cache_dir)
            report = scrubber.run(reporter)
        if report["sound"]:
            reporter.finish("succeeded", report)
            return
        first = report["findings"][0]
        total = report["findings_total"]
        what = "one thing is" if total == 1 else f"{total} things are"
        message = f"{what} wrong; first {first['object']}: {first['problem']}"
        reporter.finish("failed", report | {"error": "Corrupt", "message": message})
        raise Corrupt(message)


def _served(namespace: str) -> Mapping[str, int]:
    """The version of each collection that searches go to; empty where it cannot be told."""
    try:
        return _table(namespace)
    except Unavailable:
        logger.warning("what the manifests say, and what was served before, is retained all the same", exc_info=True)
        return {}


def _table(namespace: str) -> Mapping[str, int]:
    """The version of each collection that searches go to; empty where no Eagleray runs. Unavailable where it cannot be
    asked: it may serve an old version, for later ones could not be loaded."""
    try:
        table = ask_supervisor(namespace, lambda directory: directory.next_table(None), TABLE_TIMEOUT_S)
        return {name: served.version for name, served in table.collections.items()} if table is not None else {}
    except Exception as error:  # of any kind
        raise Unavailable(
            f"the supervisor could not be asked which versions are served, and these must stay: {error!r}; try again"
        ) from error
