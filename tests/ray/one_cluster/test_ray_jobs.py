"""Tasks on a real Ray that do not get what they ask for, or lose their process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors import ray_jobs
from actors.niceness import BACKGROUND
from cluster.errors import Unavailable

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("one_cluster")]


def count_up(limit: int) -> Iterator[int]:
    for number in range(limit):  # noqa: UP028  # Ray drives generators with send(), which a range has not
        yield number


def die_after_one(marker: str) -> Iterator[str]:
    yield "one"
    path = Path(marker)
    if not path.exists():
        path.touch()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    yield "two"


def tell_priority(_: int) -> Iterator[int]:
    yield min(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task"))


def die(_: int) -> Iterator[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield 0


@ray.remote(num_cpus=2)
class Holder:
    def ready(self) -> bool:
        return True


def test_cpus_of_a_cluster_are_those_of_its_nodes() -> None:
    cpus = ray_jobs.cluster_cpus()
    assert (cpus.total, cpus.largest_node) == (2, 2)
    assert 1 <= cpus.free <= 2


def test_tasks_leave_the_processor_to_searches() -> None:
    ((_, niceness),) = ray_jobs.run_tasks(tell_priority, [0], num_cpus=1, in_flight=1)
    assert niceness >= BACKGROUND > os.getpriority(os.PRIO_PROCESS, 0)


def test_tasks_that_no_node_can_take_say_so_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "WAIT_TOLD_S", 0.2)
    monkeypatch.setattr(ray_jobs, "WAIT_MAX_S", 0.7)
    told: list[str] = []
    with pytest.raises(Unavailable, match="given up waiting for a node with 64 free CPUs"):
        list(ray_jobs.run_tasks(count_up, [3], num_cpus=64, in_flight=1, waiting=told.append))
    assert "2 is all of the largest node" in told[0]


def test_tasks_that_wait_for_cpus_say_so_until_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "WAIT_TOLD_S", 0.2)
    holder = Holder.remote()  # type: ignore[attr-defined]
    assert ray.get(holder.ready.remote())
    told: list[str] = []

    def waiting(message: str) -> None:
        told.append(message)
        if len(told) == 1:
            ray.kill(holder)

    events = list(ray_jobs.run_tasks(count_up, [3], num_cpus=1, in_flight=1, waiting=waiting))
    assert events == [(0, 0), (0, 1), (0, 2)]
    assert "waiting for a node with 1 free CPUs" in told[0]
    assert "0 are free in the whole cluster" in told[0]
    assert told[-1] == ""


def test_task_whose_process_dies_amid_its_events_goes_on_where_it_was(tmp_path: Path) -> None:
    events = list(ray_jobs.run_tasks(die_after_one, [str(tmp_path / "died")], num_cpus=1, in_flight=1))
    assert events == [(0, "one"), (0, "two")]


def test_task_whose_process_dies_each_time_is_unavailable_with_a_way_out() -> None:
    with pytest.raises(Unavailable, match=r"a die task was lost, also after 3 retries: .*--memory-bytes"):
        list(ray_jobs.run_tasks(die, [1], num_cpus=1, in_flight=1))
