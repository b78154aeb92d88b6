"""The jobs that an endpoint submits, run in this process by their own command lines, as soon as they are submitted."""

from __future__ import annotations

import asyncio
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import typer

import jobs.__main__ as jobs_main
from actors import ray_jobs, ray_runtime
from cluster.config import Settings
from cluster.errors import EaglerayError, Unavailable
from jobs import report
from tests.fakes import run_tasks_here
from tests.unit.serve.endpoint import Endpoint, Json, LocalJobs


class JobsHere(LocalJobs):
    """In the place of Ray's job server, and of Ray where the jobs ask for it."""

    @classmethod
    def of(cls, endpoint: Endpoint, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> JobsHere:
        """In the place of the endpoint's own, which only records."""
        jobs = cls()
        endpoint.services.jobs._runner = jobs

        def connected(address: str | None, data: str | None, namespace: str) -> Settings:
            return Settings(endpoint.data, namespace, cache_dir=str(cache_dir))

        def served(namespace: str, collection: str, generation: int, timeout_s: float, tell: Any) -> None:
            asyncio.run_coroutine_threadsafe(endpoint.eagleray.directory.refresh(collection), endpoint.loop).result(10)
            until(lambda: generation_of(endpoint, collection) >= generation)

        monkeypatch.setattr(jobs_main, "_connected", connected)
        monkeypatch.setattr(ray_jobs, "run_tasks", lambda *args, waiting: run_tasks_here(*args))
        monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(1, 1, 1))
        monkeypatch.setattr(ray_jobs, "cluster_gpus", ray_jobs.ClusterGpus)
        monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
        monkeypatch.setattr(ray_runtime, "wait_until_served", served)
        monkeypatch.setattr(ray_runtime, "RayDirectory", lambda *place: DirectoryElsewhere(endpoint))
        monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0,))
        return jobs

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        super().submit_job(job_id, entrypoint)
        self.states[job_id] = "RUNNING"
        try:
            typer.main.get_command(jobs_main.app).main(shlex.split(entrypoint)[3:], standalone_mode=False)
        except EaglerayError as error:
            self.logs[job_id] = [str(error)]
            self.states[job_id] = "FAILED"
        else:
            self.states[job_id] = "SUCCEEDED"


class DirectoryElsewhere:
    """The endpoint's directory, for a thread that its event loop does not run in."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def refresh(self, collection: str) -> None:
        await self._there(self._endpoint.eagleray.directory.refresh(collection))

    async def next_table(self, known_stamp: str | None) -> Any:
        return await self._there(self._endpoint.eagleray.directory.next_table(known_stamp))

    async def describe(self, collection: str) -> Json:
        return dict(await self._there(self._endpoint.eagleray.directory.describe(collection)))

    async def _there(self, call: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._endpoint.loop))


def generation_of(endpoint: Endpoint, collection: str) -> int:
    """The one that is served; 0 where none is."""
    table = endpoint.coordinator.table
    served = table.collections.get(collection) if table else None
    return served.generation if served else 0


def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable("it did not come to it")
        time.sleep(0.005)
