"""What runs a compaction that the endpoint submitted, in this process."""

from __future__ import annotations

import uuid
from pathlib import Path

from cluster.errors import EaglerayError
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from jobs.build_plan import Workers
from jobs.compact import CompactOptions, Compactor
from jobs.report import JobReporter, JobStatus
from tests.fakes import run_tasks_here
from tests.unit.serve.endpoint import Endpoint, LocalJobs


class CompactJobs(LocalJobs):
    """Records what was submitted, and runs a compaction where a test says so; with `at_once` as it is submitted."""

    def __init__(self, data: str, cache_dir: Path, at_once: bool = False) -> None:
        super().__init__()
        self._data = data
        self._cache_dir = cache_dir
        self._at_once = at_once

    @classmethod
    def of(cls, endpoint: Endpoint, cache_dir: Path, at_once: bool = False) -> CompactJobs:
        """In the place of the endpoint's own."""
        jobs = cls(endpoint.data, cache_dir, at_once)
        endpoint.services.jobs._runner = jobs
        return jobs

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        super().submit_job(job_id, entrypoint)
        if self._at_once:
            self.compact(job_id)

    def compact(self, job_id: str) -> None:
        """Run what was submitted, in this thread, as `jobs.run.run_compact` does."""
        given, store = self.arguments(job_id), open_store(self._data)
        options = CompactOptions(given["collection"], given["shard"], given["memory_bytes"])
        log = ManifestLog(store, options.collection, lambda: uuid.uuid4().hex)
        reporter = JobReporter(store, JobStatus(job_id, "compact", options.collection))
        self.states[job_id] = "RUNNING"
        workers = Workers(run_tasks_here, 1)
        try:
            report = Compactor(self._data, store, log, options, workers, str(self._cache_dir)).run(reporter)
        except EaglerayError as error:
            reporter.finish("failed", {"error": type(error).__name__, "message": str(error)})
            self.states[job_id] = "FAILED"
        else:
            reporter.finish("succeeded", report)
            self.states[job_id] = "SUCCEEDED"
