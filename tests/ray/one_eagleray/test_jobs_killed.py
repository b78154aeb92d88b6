"""kill -9 of a rebuild's processes, and of those that serve, on a real Eagleray under load; phases chosen by seed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import EaglerayError, Unavailable
from tests.ray.job_load import JobLoad, LoadReport, LoadShape
from tests.ray.server import RunningServer, wait_until

pytestmark = pytest.mark.ray
COLLECTION = "killed"
SHAPE = LoadShape(points=2_000, searches_per_s=20.0, writes_per_s=4.0, fetches_per_s=2.0)
SEED = 3
PHASES = ("starting", "seal", "plan", "build", "catch up", "gate", "commit", "serve")
TASKS = {"build": "ray::build_range", "gate": "ray::look_at_segment"}
LOOK_S = 0.02
LATER_S = 0.3  # into a phase, at most
BACK_S = 60.0
JOB_TIMEOUT_S = 120.0
ENDED = ("succeeded", "failed", "stopped")


@pytest.fixture(scope="module")
def server(eagleray: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    SHAPE.import_into(
        eagleray.client, COLLECTION, tmp_path_factory.mktemp("points") / "points.parquet", index={"kind": "hnsw"}
    )
    yield eagleray
    eagleray.client.call("DELETE", f"/v1/collections/{COLLECTION}")


class Killing:
    """Rebuilds during which something dies."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.random = np.random.default_rng(SEED)
        self.outages: list[tuple[float, float]] = []  # of a shard's only replica: its searches may fail

    def submit(self, shards: int) -> str:
        body = {"kind": "rebuild", "shards": shards}
        return str(self.server.client.call("POST", f"/v1/collections/{COLLECTION}/jobs", body)["job_id"])

    def status(self, job_id: str) -> dict[str, Any]:
        return dict(self.server.client.call("GET", f"/v1/jobs/{job_id}"))

    def ended(self, job_id: str) -> str:
        """How it ended."""
        wait_until(lambda: self.status(job_id)["state"] in ENDED, f"{job_id} ends", JOB_TIMEOUT_S)
        return str(self.status(job_id)["state"])

    def described(self) -> dict[str, Any]:
        """The collection, as soon as there is a supervisor to ask."""
        found: list[dict[str, Any]] = []

        def is_described() -> bool:
            try:
                found.append(self.server.client.collection(COLLECTION))
            except Unavailable:
                return False
            return True

        wait_until(is_described, "the collection is described", BACK_S)
        return found[0]

    def reached(self, job_id: str, phase: str) -> str:
        """Wait until the job is in that phase, or behind it; returns the phase it is in."""
        deadline, later = time.monotonic() + JOB_TIMEOUT_S, PHASES[PHASES.index(phase) :]
        while (status := self.status(job_id))["phase"] not in later and status["state"] not in ENDED:
            assert time.monotonic() < deadline, status
            time.sleep(LOOK_S)
        return str(status["phase"])

    def kill(self, who: str, name: str, job_id: str, phase: str) -> None:
        """One of the processes of that name, some time after the job reached that phase."""
        self.reached(job_id, phase)
        time.sleep(self.random.uniform(0.0, LATER_S))
        pids = self.named(name)
        assert pids, f"there is no {who}: {self.status(job_id)}"
        self._kill(who, int(self.random.choice(pids)), job_id)

    def kill_task(self, job_id: str, phase: str) -> None:
        """A task of that phase, as soon as there is one; it may be over before."""
        self.reached(job_id, phase)
        while not (pids := self.named(TASKS[phase])) and self.status(job_id)["phase"] == phase:
            time.sleep(LOOK_S)
        if pids:
            self._kill("task", pids[0], job_id)

    def _kill(self, who: str, pid: int, job_id: str) -> None:
        print(f"seed {SEED}: the {who} is killed in phase {self.status(job_id)['phase']!r}")
        os.kill(pid, signal.SIGKILL)

    def kill_shard(self, job_id: str, phase: str) -> None:
        """Returns when it answers again."""
        self.reached(job_id, phase)
        started = time.monotonic()
        self.kill("shard", "ray::ShardActor", job_id, phase)
        time.sleep(0.5)

        def answers() -> bool:
            try:
                self.server.answers(COLLECTION, np.zeros((1, 384), np.float32))
            except EaglerayError:
                return False
            return True

        wait_until(answers, "the shard answers again", BACK_S)
        self.outages.append((started, time.monotonic() + 1.0))

    def named(self, name: str) -> list[int]:
        return [pid for pid in self.server.processes() if command_of(pid).startswith(name)]

    def kill_driver(self, job_id: str, phase: str) -> None:
        self.reached(job_id, phase)
        time.sleep(self.random.uniform(0.0, LATER_S))
        found = [pid for pid in self.server.processes() if f"--job-id={job_id}" in command_of(pid)]
        drivers = [pid for pid in found if "python" in command_of(pid).split(" ")[0]]
        assert drivers, [command_of(pid) for pid in found]
        self._kill("driver", drivers[-1], job_id)

    def check(self, report: LoadReport) -> None:
        print(
            f"{len(report.answers)} searches and {report.fetches} fetches, {len(report.failed)} failed; "
            f"{report.writes} writes, {len(report.retried)} sent again"
        )
        assert report.wrong == []
        outside = [f for f in report.failed if not any(start <= f.sent <= stop for start, stop in self.outages)]
        assert outside == []
        wait_until(  # a status is some seconds old
            lambda: self.described()["points"] == report.live, f"{report.live} points are told", BACK_S
        )


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_killed_processes_of_a_rebuild_harm_nothing_and_it_is_completed(server: RunningServer) -> None:
    load = JobLoad(server.target, COLLECTION, SHAPE)
    load.start()
    killing = Killing(server)
    a_task_the_supervisor_and_a_shard_die(killing)
    the_driver_dies(killing)
    killing.check(load.stop())


def a_task_the_supervisor_and_a_shard_die(killing: Killing) -> None:
    """Each in a phase of its own. The job goes on; where it does not, running it again completes it."""
    task_dies_in = str(killing.random.choice(list(TASKS)))
    others = [phase for phase in ("build", "catch up", "gate", "serve") if phase != task_dies_in]
    supervisor_dies_in, shard_dies_in = killing.random.permutation(others)[:2].tolist()
    job_id = killing.submit(shards=2)
    for phase in PHASES:
        if phase == task_dies_in:
            killing.kill_task(job_id, phase)
        elif phase == supervisor_dies_in:
            killing.kill("supervisor", "ray::SupervisorActor", job_id, phase)
        elif phase == shard_dies_in:
            killing.kill_shard(job_id, phase)
    if killing.ended(job_id) != "succeeded":
        job_id = killing.submit(shards=2)
        assert killing.ended(job_id) == "succeeded", killing.status(job_id)
    wait_until(lambda: len(killing.described()["shards"]) == 2, "two shards are served", BACK_S)


def the_driver_dies(killing: Killing) -> None:
    """What is served stays; running the job again completes it."""
    generation = killing.described()["generation"]
    job_id = killing.submit(shards=1)
    killing.kill_driver(job_id, str(killing.random.choice(["seal", "plan", "build", "catch up"])))
    assert killing.ended(job_id) == "failed", killing.status(job_id)
    assert killing.described()["generation"] == generation
    again = killing.submit(shards=1)
    assert killing.ended(again) == "succeeded", killing.status(again)
    described = killing.described()
    assert described["generation"] == generation + 1
    assert len(described["shards"]) == 1
