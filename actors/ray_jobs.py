"""What runs and ends on Ray: tasks of a job, and jobs submitted to Ray's job server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from actors.ray_runtime import own_error
from cluster.errors import NotFound

TASK_RETRIES = 3  # of a task whose process or node died; errors of ours are not retried
T = TypeVar("T")


def run_tasks(
    function: Callable[[T], Iterator[Any]], items: Sequence[T], num_cpus: float, in_flight: int
) -> Iterator[tuple[int, Any]]:
    """Run a generator function on every item in Ray tasks, `in_flight` at a time; yields (item number, what it yields).

    The first error ends everything: it is raised here, and the other tasks are cancelled.
    """
    options = {"num_returns": "streaming", "num_cpus": num_cpus, "max_retries": TASK_RETRIES}
    task = ray.remote(function).options(**options)
    waiting = deque(enumerate(items))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < in_flight:
                number, item = waiting.popleft()
                running[task.remote(item)] = number
            for stream in ray.wait(list(running), num_returns=1)[0]:
                try:
                    yield running[stream], ray.get(next(stream))
                except StopIteration:
                    del running[stream]
    except RayTaskError as error:
        raise own_error(error) from None
    finally:
        for stream in running:
            ray.cancel(stream)


def _jobs_client() -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(ray.get_runtime_context().gcs_address)


def submit_job(job_id: str, entrypoint: str) -> None:
    """Submit a Ray job that runs the same code as this process."""
    environment = dict(ray.get_runtime_context().runtime_env)
    kept = {name: environment[name] for name in ("working_dir", "py_modules", "env_vars") if environment.get(name)}
    _jobs_client().submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=kept)


def job_state(job_id: str) -> str | None:
    """Ray's state of a job: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None where Ray does not know it."""
    try:
        return str(_jobs_client().get_job_status(job_id).value)
    except RuntimeError:
        return None


def job_log_tail(job_id: str, lines: int) -> list[str]:
    try:
        return str(_jobs_client().get_job_logs(job_id)).splitlines()[-lines:]
    except RuntimeError:
        return []


def stop_job(job_id: str) -> bool:
    """Ask a job to stop; NotFound where Ray does not know it."""
    try:
        return bool(_jobs_client().stop_job(job_id))
    except RuntimeError as error:
        raise NotFound(f"no job {job_id!r}: {error}") from error
