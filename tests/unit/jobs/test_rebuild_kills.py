"""Processes die in every phase of a rebuild, under load: what is served stays right, running the job again completes.

A process dies at one of its calls to the storage, chosen by seed: that call and all after it do nothing. A replica dies
at a moment chosen by seed. `python -m tests.unit.jobs.test_rebuild_kills [SEED]` goes on with new seeds until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from cluster.errors import EaglerayError, Unavailable
from cluster.object_store import open_store
from jobs import rebuild_task, sealing
from jobs.report import JobStatus
from tests.fakes import FaultyStore
from tests.unit.jobs.under_load import Job, Load, Shape, run_under_load

PHASES = ("seal", "plan", "build", "catch up", "gate", "commit", "serve")
PHASES_OF = {
    "driver": PHASES[:-1],  # what comes after the commit is not its work
    "task": ("plan", "build", "catch up", "gate"),  # in which there always is one
    "supervisor": PHASES,
    "replica": PHASES,
}
DRIVER_CALLS, TASK_CALLS, SUPERVISOR_CALLS = 12, 8, 4  # to the storage, at most, before the process dies
DEAD_S = 0.05  # at most, before a replica or a supervisor is started again
T = TypeVar("T")


class MortalTasks:
    """A `TaskRunner` of this process. After `kill` the task that runs, or the next one, dies at a call to the storage;
    it is begun again, as Ray does, or, where `lost`, given up."""

    def __init__(self, data: str, lost: bool) -> None:
        self._data = data
        self._lost = lost
        self._store = FaultyStore(open_store(data), fault="die")

    def open_store(self, url: str) -> Any:
        """What tasks are given instead of `cluster.object_store.open_store`."""
        return self._store if url == self._data else open_store(url)

    def kill(self, calls: int) -> None:
        self._store.at = self._store.calls + calls

    def __call__(
        self,
        function: Callable[[T], Iterator[Any]],
        items: Sequence[T],
        num_cpus: float,
        in_flight: int,
        num_gpus: float = 0.0,
    ) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(items):
            told = 0  # events of an earlier try are not told twice
            while True:
                try:
                    for event in itertools.islice(function(pickle.loads(pickle.dumps(item))), told, None):
                        told += 1
                        yield number, pickle.loads(pickle.dumps(event))
                    break
                except EaglerayError:
                    if not 0 < self._store.at <= self._store.calls:
                        raise
                self._store = FaultyStore(open_store(self._data), fault="die")
                if self._lost:
                    raise Unavailable(f"a {function.__name__} task was lost")


class Killer:
    """Rebuilds, one after the other, in each of which one process dies. They go from one shard to two and back."""

    def __init__(self, load: Load, seed: int, patch: pytest.MonkeyPatch) -> None:
        self._load = load
        self._random = np.random.default_rng(seed)
        self._patch = patch
        self._loop = asyncio.get_running_loop()
        self._under_way: list[asyncio.Task[None]] = []
        self.failed_jobs = 0

    async def driver(self, phase: str) -> None:
        store, calls = FaultyStore(self._load.store, fault="die"), self._calls(DRIVER_CALLS)

        def die() -> None:
            store.at = store.calls + calls

        await self._rebuild(phase, self._job(), die, store)

    async def task(self, phase: str) -> None:
        tasks, calls = MortalTasks(self._load.data, lost=bool(self._random.integers(2))), self._calls(TASK_CALLS)
        with self._patch.context() as patch:
            patch.setattr(rebuild_task, "open_store", tasks.open_store)
            patch.setattr(sealing, "open_store", tasks.open_store)
            await self._rebuild(phase, self._job(run_tasks=tasks), lambda: tasks.kill(calls))

    async def supervisor(self, phase: str) -> None:
        await self._rebuild(
            phase, self._job(), self._soon(self._load.kill_supervisor(self._calls(SUPERVISOR_CALLS), self._moment()))
        )

    async def replica(self, phase: str) -> None:
        await self._rebuild(phase, self._job(), self._soon(self._kill_a_replica(self._moment(), self._moment())))

    async def _kill_a_replica(self, after_s: float, dead_s: float) -> None:
        runtime = self._load.runtime
        await asyncio.sleep(after_s)
        key = runtime.existing()[self._random.integers(len(runtime.existing()))]
        runtime.kill(key)
        await asyncio.sleep(dead_s)
        if key in runtime.existing():
            runtime.revive(key)

    def _calls(self, most: int) -> int:
        return int(self._random.integers(1, most + 1))

    def _moment(self) -> float:
        return float(self._random.uniform(0.0, DEAD_S))

    def _soon(self, work: Coroutine[Any, Any, None]) -> Callable[[], None]:
        """What begins it, from any thread."""
        return lambda: self._loop.call_soon_threadsafe(lambda: self._under_way.append(asyncio.ensure_future(work)))

    def _job(self, **options: Any) -> Job:
        return self._load.rebuild(shards=1 + len(self._load.log.newest_live().shards) % 2, **options)

    async def _rebuild(self, phase: str, job: Job, kill: Callable[[], Any], store: Any = None) -> None:
        """Run the job, and `kill` as soon as it is in that phase; where it fails, another one."""
        load, before, again = self._load, self._load.log.newest_live(), self._job()
        reached: list[str] = []

        def listener(status: JobStatus) -> None:
            if status.phase == phase and not reached:
                reached.append(phase)
                kill()

        try:
            await load.run_job(f"killed in {phase}", job, store, listener)
        except EaglerayError as error:
            print(f"  {phase}: {error}")
            self.failed_jobs += 1
            newest = load.log.newest_live()
            assert newest.generation - before.generation in (0, 1)  # nobody knows of a driver that died in its commit
            if newest.generation == before.generation:
                await load.run_job(f"again after {phase}", again)
        assert reached, f"the job had no phase {phase}"
        await asyncio.gather(*self._under_way)
        await load.served(load.log.newest_live().generation)
        assert len(load.log.newest_live().shards) != len(before.shards)


async def die_in_every_phase(victim: str, phases: Sequence[str], seed: int, patch: Any, load: Load) -> None:
    print(f"{victim}, seed {seed}")
    killer = Killer(load, seed, patch)
    for phase in phases:
        await getattr(killer, victim)(phase)


def run(victim: str, phases: Sequence[str], seed: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
    replicas = 2 if victim == "replica" else 1
    shape = Shape(points=300, replicas=replicas, index={"kind": "flat"}, seed=seed)
    run_under_load(partial(die_in_every_phase, victim, phases, seed, patch), folder, shape)


@pytest.mark.parametrize(
    ("victim", "count", "seed"), [("driver", 3, 1), ("task", 2, 2), ("supervisor", 2, 3), ("replica", 2, 4)]
)
def test_killed_process_harms_nothing(
    victim: str, count: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some phases, chosen by seed; supervisors and replicas also while the new generation is taken up."""
    phases, last = PHASES_OF[victim], PHASES_OF[victim][-1]
    chosen = {last, *np.random.default_rng(seed).choice(phases[:-1], count - 1, replace=False).tolist()}
    run(victim, sorted(chosen, key=PHASES.index), seed, tmp_path, monkeypatch)


if __name__ == "__main__":
    for number in itertools.count(int(sys.argv[1]) if sys.argv[1:] else 100):
        for who, when in PHASES_OF.items():
            with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
                run(who, when, number, Path(name), patched)
