"""A job's progress and outcome, kept in object storage where every process finds them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster import paths
from cluster.errors import Corrupt
from cluster.object_store import ObjectStore

WRITE_PERIOD_S = 0.5


@dataclass(frozen=True)
class JobStatus:
    """`progress` is the share done, 0 to 1; `rate` is rows per second of the phase; `report` is the outcome."""

    job_id: str
    kind: str
    collection: str
    state: str = "running"  # running, succeeded, failed
    submitted: bool = True  # False: run by hand, unknown to Ray's job server
    phase: str = "starting"
    progress: float = 0.0
    rate: float = 0.0
    remaining_s: float | None = None
    report: dict[str, Any] = field(default_factory=dict)


def read_status(store: ObjectStore, job_id: str) -> JobStatus:
    """The last status a job wrote; NotFound if it wrote none."""
    key = paths.job_status(job_id)
    data = store.get(key)
    try:
        return JobStatus(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise Corrupt(f"{key}: not a job status: {error}") from error


class JobReporter:
    """Writes a job's status to the store now and then, and tells a listener of every change (a progress bar)."""

    def __init__(
        self,
        store: ObjectStore,
        status: JobStatus,
        listener: Callable[[JobStatus], None] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._listener = listener
        self._clock = clock
        self._started = clock()
        self._phase_started = self._started
        self._written_at = float("-inf")
        self.status = status
        self._write()

    def phase(self, name: str) -> None:
        self._phase_started = self._clock()
        self._update(replace(self.status, phase=name, rate=0.0), force=True)

    def progress(self, share: float, rows_done: int | None = None) -> None:
        """Report the share done of the whole job, and the rows done of the phase."""
        now = self._clock()
        spent = now - self._started
        remaining = spent * (1.0 - share) / share if share > 0.01 else None
        rate = self.status.rate if rows_done is None else rows_done / max(1e-6, now - self._phase_started)
        self._update(replace(self.status, progress=share, rate=rate, remaining_s=remaining))

    def finish(self, state: str, report: dict[str, Any]) -> None:
        share = 1.0 if state == "succeeded" else self.status.progress
        done = replace(self.status, state=state, progress=share, remaining_s=0.0, report=report)
        self._update(done, force=True)

    def _update(self, status: JobStatus, *, force: bool = False) -> None:
        self.status = status
        self._listener(status)
        if force or self._clock() - self._written_at >= WRITE_PERIOD_S:
            self._write()

    def _write(self) -> None:
        self._store.put(paths.job_status(self.status.job_id), json.dumps(asdict(self.status)).encode())
        self._written_at = self._clock()
