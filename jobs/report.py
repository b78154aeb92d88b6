"""A job's progress and outcome, kept in object storage where every process finds them."""

from __future__ import annotations

import heapq
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster import paths
from cluster.errors import Corrupt, EaglerayError, Invalid, NotFound
from cluster.object_store import ObjectStore

JOB_ID = re.compile(r"[a-zA-Z0-9_-]{1,128}")
WRITE_PERIOD_S = 0.5
FINISH_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between the attempts to write the outcome
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobStatus:
    """`progress` is the share done, 0 to 1; `rate` is how many of `unit` a second the phase gets through.

    `report` is the outcome; while the job waits, its `message` says for what. `plan` is what is going to be built,
    as soon as that is known, with the bytes and seconds it should take.
    """

    job_id: str
    kind: str
    collection: str
    state: str = "running"  # running, succeeded, failed, stopped; pending: submitted, has not told anything itself yet
    submitted: bool = True  # False: run by hand, unknown to Ray's job server
    phase: str = "starting"
    progress: float = 0.0
    rate: float = 0.0
    unit: str = "rows"
    remaining_s: float | None = None
    report: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)


def new_job_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:16]}"


def check_job_id(job_id: str) -> None:
    """Invalid where it is none: it is part of object keys, and of URLs."""
    if not JOB_ID.fullmatch(job_id):
        raise Invalid.at("job_id", f"{job_id!r} does not match {JOB_ID.pattern}")


def read_status(store: ObjectStore, job_id: str) -> JobStatus:
    """The last status a job wrote; NotFound if it wrote none."""
    key = paths.job_status(job_id)
    data = store.get(key)
    try:
        return JobStatus(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise Corrupt(f"{key}: not a job status: {error}") from error


def write_pending(store: ObjectStore, status: JobStatus) -> None:
    """Say of a job that was submitted that it waits to run, unless it has said something itself already."""
    pending = replace(status, state="pending", phase="pending")
    store.put_if_absent(paths.job_status(status.job_id), json.dumps(asdict(pending)).encode())


def newest_statuses(store: ObjectStore, count: int) -> list[tuple[JobStatus, float]]:
    """The jobs that wrote last, and when (seconds since the epoch), newest first; what cannot be read is left out."""
    written = (info for info in store.objects(paths.jobs_prefix()) if paths.job_of_status(info.key) is not None)
    found: list[tuple[JobStatus, float]] = []
    for info in heapq.nlargest(count, written, key=lambda info: (info.modified_s, info.key)):
        try:
            found.append((read_status(store, str(paths.job_of_status(info.key))), info.modified_s))
        except NotFound:  # collected since it was listed
            continue
        except Corrupt as error:
            logger.warning("a job is left out of the list: %s", error)
    return found


class JobReporter:
    """Writes a job's status to the store now and then, and tells a listener of every change (a progress bar).

    It never raises for a status that cannot be written: hours of work are worth more than a line about them.
    """

    def __init__(
        self,
        store: ObjectStore,
        status: JobStatus,
        listener: Callable[[JobStatus], None] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._listener = listener
        self._clock = clock
        self._sleep = sleep
        self._started = clock()
        self._phase_started = self._started
        self._waiting_since: float | None = None
        self._written_at = float("-inf")
        self.status = status
        self._write()

    def phase(self, name: str, unit: str = "rows") -> None:
        """Begin a phase, whose rate counts `unit`."""
        self._go_on()
        self._phase_started = self._clock()
        self._update(replace(self.status, phase=name, rate=0.0, unit=unit, report={}), force=True)

    def progress(self, share: float, rows_done: int | None = None) -> None:
        """Report the share done of the whole job, and the rows (or what the phase counts) done of the phase.

        The time left is that of the share done, scaled: time in which the job only waited counts for neither.
        """
        self._go_on()
        now = self._clock()
        spent = now - self._started
        remaining = spent * (1.0 - share) / share if share > 0.01 else None
        rate = self.status.rate if rows_done is None else rows_done / max(1e-6, now - self._phase_started)
        self._update(replace(self.status, progress=share, rate=rate, remaining_s=remaining, report={}))

    def plan(self, plan: dict[str, Any]) -> None:
        """Report what is going to be built."""
        self._update(replace(self.status, plan=plan), force=True)

    def waiting(self, message: str) -> None:
        """Report what the job waits for, until it goes on ("")."""
        report = {"message": message} if message else {}
        if message and self._waiting_since is None:
            self._waiting_since = self._clock()
        elif not message:
            self._go_on()
        self._update(replace(self.status, rate=0.0, remaining_s=None, report=report), force=True)

    def finish(self, state: str, report: dict[str, Any]) -> None:
        """Report the outcome; tried again where the storage is away, since nothing else can tell it."""
        share = 1.0 if state == "succeeded" else self.status.progress
        self.status = replace(self.status, state=state, progress=share, remaining_s=0.0, report=report)
        self._listener(self.status)
        for pause_s in FINISH_PAUSES_S:
            if self._write():
                return
            self._sleep(pause_s)
        self._write()

    def _go_on(self) -> None:
        """Leave out of the job's and the phase's time what it waited, if it did."""
        if self._waiting_since is not None:
            waited = self._clock() - self._waiting_since
            self._started += waited
            self._phase_started += waited
            self._waiting_since = None

    def _update(self, status: JobStatus, *, force: bool = False) -> None:
        self.status = status
        self._listener(status)
        if force or self._clock() - self._written_at >= WRITE_PERIOD_S:
            self._write()

    def _write(self) -> bool:
        """Whether the status was written; a failed attempt is not repeated before the next period."""
        self._written_at = self._clock()
        try:
            self._store.put(paths.job_status(self.status.job_id), json.dumps(asdict(self.status)).encode())
        except EaglerayError as error:
            logger.warning("the status of job %s could not be written: %s", self.status.job_id, error)
            return False
        return True
