"""Garbage collection as a job: what nothing names is listed and, where that is asked for, deleted (`cluster.garbage`).

It looks before every batch which jobs run: a collection that one works on is left alone. A job runs as long as it
writes so to its status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from cluster import paths
from cluster.config import check_collection_name
from cluster.errors import Corrupt, Invalid, NotFound, Unavailable
from cluster.garbage import GRACE_S, JOBS, Sweep
from cluster.manifest import collection_names
from cluster.object_store import ObjectStore
from cluster.references import EVERYWHERE, InUse
from cluster.stored_object import parsed
from jobs.report import JobReporter, read_status

GRACE_MIN_S = 3600.0  # of what is deleted: the longest upload of one segment, and then some
SILENT_S = 6 * 3600.0  # a job that has written nothing for so long, and for the grace period, is dead
KIND = "collect_garbage"
BRANCH = "branch"  # its status names the origin alone


@dataclass(frozen=True)
class CollectGarbageOptions:
    """`collection` None is everything in the store. Without `delete` garbage is only listed and counted."""

    collection: str | None = None
    delete: bool = False
    grace_s: float = GRACE_S

    def check(self) -> None:
        """Raise Invalid, naming the field."""
        if self.collection is not None:
            check_collection_name(self.collection)
        if not (isfinite(self.grace_s) and self.grace_s >= 0):
            raise Invalid.at("grace_s", f"must be a number of seconds, 0 or more, not {self.grace_s!r}")
        if self.delete and self.grace_s < GRACE_MIN_S:
            raise Invalid.at(
                "grace_s",
                f"must be {GRACE_MIN_S:g} or more to delete, not {self.grace_s:g}: what is younger may be about to be "
                "named. A dry run takes any",
            )


class GarbageCollector:
    """One run. `served` tells the version of each collection that searches go to, where somebody knows it."""

    def __init__(
        self,
        store: ObjectStore,
        options: CollectGarbageOptions,
        served: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options.check()
        self._store = store
        self._options = options
        self._served = served
        self._clock = clock
        self._started = clock()
        self._sweep: Sweep | None = None

    def run(self, reporter: JobReporter) -> dict[str, Any]:
        """List, and delete; returns the report. When this raises, `report` has what was done until then.

        NotFound where nothing is stored under the collection's name.
        """
        options, job_id = self._options, reporter.status.job_id
        if options.collection is not None and options.collection not in collection_names(self._store):
            raise NotFound(f"no collection {options.collection!r}, and nothing that one of that name has left")
        reporter.phase("collect")
        now_s = stored_now(self._store, job_id)
        running = RunningJobs(self._store, now_s, max(options.grace_s, SILENT_S), self._served)
        self._sweep = Sweep(self._store, now_s, options.grace_s, running.in_use, running.runs)
        self._sweep.run(options.collection, options.delete, lambda share: reporter.progress(min(0.99, share)))
        return self.report

    @property
    def report(self) -> dict[str, Any]:
        found = self._sweep.report.to_dict() if self._sweep else {}
        seconds = round(self._clock() - self._started, 3)
        return {"deleted": self._options.delete, "grace_s": self._options.grace_s, **found, "seconds": seconds}


class RunningJobs:
    """The jobs that said within `silent_s` that they run."""

    def __init__(
        self, store: ObjectStore, now_s: float, silent_s: float, served: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self._store = store
        self._since_s = now_s - silent_s
        self._served = served
        self._running: set[str] = set()

    def in_use(self) -> InUse:
        """Look again. A status that cannot be read may be of a job on any collection."""
        served = self._served()
        running, held = set(), {}
        for info in self._store.objects(JOBS):
            name = parsed(info.key)
            if name is None or name.kind != "job" or info.modified_s < self._since_s:
                continue
            try:
                status = read_status(self._store, name.owner)
            except NotFound:
                continue
            except Corrupt as error:
                held[EVERYWHERE] = str(error)
                continue
            if status.state == "running" and status.kind != KIND:
                running.add(name.owner)
                place = EVERYWHERE if status.kind == BRANCH else status.collection
                held[place] = f"the {status.kind} job {name.owner} works on it"
        self._running = running
        return InUse(held, served)

    def runs(self, job_id: str) -> bool:
        """Whether a job ran when it was looked last."""
        return job_id in self._running


def stored_now(store: ObjectStore, job_id: str) -> float:
    """The store's own time: that of the status which the job has just written."""
    key = paths.job_status(job_id)
    for info in store.objects(key.rpartition("/")[0] + "/"):
        if info.key == key:
            return info.modified_s
    raise Unavailable(f"{key}: the status of the job could not be written, by which the store's time is known")
