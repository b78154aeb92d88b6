"""What runs and ends on Ray: tasks of a job, and jobs submitted to Ray's job server."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.background_task import run_in_background
from actors.faiss_library import gpus_are_supported
from actors.gpu_probe import seen_gpus
from actors.niceness import BACKGROUND
from actors.ray_runtime import own_error
from cluster.cluster_gpus import NO_GPUS, ClusterGpus
from cluster.errors import NotFound, Unavailable

TASK_RETRIES = 3  # of a task whose process or node died; errors of ours are not retried
WAIT_TOLD_S = 60.0  # without any task running: say what is waited for, and again each time
WAIT_MAX_S = 15 * 60.0  # without any task running: give up
PROBE_S = 20.0  # for the driver of a node to tell of its GPUs; else their memory is not known
T = TypeVar("T")
logger = logging.getLogger(__name__)


# --- tasks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterCpus:
    """CPUs of all nodes, of the largest one, and the most that are free on any one node."""

    total: int
    largest_node: int
    free: int

    @classmethod
    def of(cls, nodes: Sequence[float], free: Sequence[float]) -> ClusterCpus:
        """Whole CPUs, at least one: a cluster may have none as long as it has no worker."""
        return cls(max(1, int(sum(nodes))), max(1, int(max(nodes, default=0))), max(1, int(max(free, default=0))))


def cluster_cpus() -> ClusterCpus:
    return ClusterCpus.of([node.get("CPU", 0.0) for node in _nodes().values()], _free("CPU"))


def cluster_gpus() -> ClusterGpus:
    """GPUs of all nodes; a task on each node that has some asks their driver, and waits for no GPU."""
    nodes = {node: resources["GPU"] for node, resources in _nodes().items() if resources.get("GPU", 0.0) > 0}
    if not nodes:
        return NO_GPUS
    asked = [
        ray.remote(_seen_memory)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in nodes
    ]
    answered, late = ray.wait(asked, num_returns=len(asked), timeout=PROBE_S)
    seen: list[tuple[int, str]] = []
    for reference in (*answered, *late):
        try:
            seen += ray.get(reference, timeout=0)
        except (RayError, GetTimeoutError) as error:  # what is not known bounds nothing
            logger.warning("a node does not tell of its GPUs: %s", error)
            ray.cancel(reference, force=True)
    return ClusterGpus.of(nodes.values(), _free("GPU"), seen)


def counted_gpus() -> ClusterGpus:
    """GPUs as Ray counts them; no driver is asked, so that nothing is known of their memory."""
    return ClusterGpus.of([node.get("GPU", 0.0) for node in _nodes().values()], _free("GPU"), ())


def _seen_memory() -> list[tuple[int, str]]:
    """Of the GPUs of this node; of none where the FAISS that is installed here cannot use them."""
    return [(gpu.total_bytes, gpu.name) for gpu in seen_gpus()] if gpus_are_supported() else []


def _nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are alive, by their id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _free(resource: str) -> list[float]:
    """Of each node. Not documented, though a DeveloperAPI: what is documented sums over the nodes."""
    return [free.get(resource, 0.0) for free in ray._private.state.available_resources_per_node().values()]


def run_tasks(
    function: Callable[[T], Iterator[Any]],
    items: Sequence[T],
    num_cpus: float,
    in_flight: int,
    num_gpus: float = 0.0,
    waiting: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[int, Any]]:
    """Run a generator function on every item in Ray tasks, `in_flight` at a time; yields (item number, what it yields).

    The first error ends everything: it is raised here, and the other tasks are cancelled. While none of them gets
    the CPUs and GPUs it asks for `waiting` is told so ("" once one does), and after `WAIT_MAX_S` it ends with
    Unavailable.
    """
    asked = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    options = {"num_returns": "streaming", "max_retries": TASK_RETRIES, **asked}
    task = ray.remote(run_in_background).options(name=function.__name__, **options)
    queue = deque(enumerate(items))
    running: dict[Any, int] = {}
    started: set[Any] = set()
    patience = _Patience(num_cpus, num_gpus, waiting)
    try:
        while queue or running:
            while queue and len(running) < in_flight:
                number, item = queue.popleft()
                running[task.remote(ray.cloudpickle.dumps((function, item)))] = number
            ready = ray.wait(list(running), num_returns=1, timeout=WAIT_TOLD_S)[0]
            patience.look(bool(started), bool(ready))
            for stream in ready:
                try:
                    event = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    started.discard(stream)
                    continue
                if stream in started:
                    yield running[stream], event
                started.add(stream)
    except RayTaskError as error:
        raise own_error(error) from None
    except RayError as error:
        raise _lost(function.__name__, error) from error
    finally:
        for stream in running:
            ray.cancel(stream)


class _Patience:
    """With tasks that Ray does not start: says why, and at last gives up."""

    def __init__(self, num_cpus: float, num_gpus: float, waiting: Callable[[str], None]) -> None:
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._waiting = waiting
        self._since = time.monotonic()
        self._told = False

    def look(self, some_run: bool, some_ready: bool) -> None:
        """Called after each wait; Unavailable when nothing has run for too long."""
        now = time.monotonic()
        # A task that began may have lost its node, and wait for another one that has as much, for ever.
        if some_ready or (some_run and self._has_a_node()):
            self._since = now
            if self._told:
                self._waiting("")
            self._told = False
            return
        message = self._message(now - self._since)
        if now - self._since >= WAIT_MAX_S:
            raise Unavailable(f"given up {message}; replicas hold CPUs (shard_cpus): add nodes, or wait for other jobs")
        logger.warning(message)
        self._waiting(message)
        self._told = True

    def _has_a_node(self) -> bool:
        return any(
            max(1, int(node.get("CPU", 0.0))) >= self._num_cpus and node.get("GPU", 0.0) >= self._num_gpus
            for node in _nodes().values()
        )

    def _message(self, waited_s: float) -> str:
        free, largest = ray.available_resources(), cluster_cpus().largest_node
        if not self._num_gpus:
            return (
                f"waiting for a node with {self._num_cpus:g} free CPUs for {waited_s:.0f} s: "
                f"{free.get('CPU', 0.0):g} are free in the whole cluster, {largest} is all of the largest node"
            )
        return (
            f"waiting for a node with {self._num_cpus:g} free CPUs and {self._num_gpus:g} free GPUs for "
            f"{waited_s:.0f} s: {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs are free in the whole "
            f"cluster, {largest} CPUs is all of the largest node"
        )


def _lost(name: str, error: RayError) -> Unavailable:
    """Of a task that Ray could not bring to its end."""
    return Unavailable(
        f"a {name} task was lost, also after {TASK_RETRIES} retries: {type(error).__name__}: {error}. Where workers "
        "were killed for want of memory give less --memory-bytes, or more memory; else see Ray's logs, and try again"
    )


# --- jobs -------------------------------------------------------------------------------------------------------


class JobServer:
    """Ray's job server. All methods block, may be called from any thread, and raise Unavailable where it is away."""

    def __init__(self, new_client: Callable[[], Any]) -> None:
        self._new_client = new_client
        self._lock = threading.Lock()
        self._kept: Any = None

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        """Submit a Ray job that runs the same code as this process, of a low priority from its first import on."""
        environment = dict(ray.get_runtime_context().runtime_env)
        kept = {name: environment[name] for name in ("working_dir", "py_modules", "env_vars") if environment.get(name)}
        with self._client(job_id) as client:
            client.submit_job(entrypoint=f"nice -n {BACKGROUND} {entrypoint}", submission_id=job_id, runtime_env=kept)

    def job_state(self, job_id: str) -> str | None:
        """Ray's state of a job: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None where Ray does not know it."""
        try:
            with self._client(job_id) as client:
                return str(client.get_job_status(job_id).value)
        except NotFound:
            return None

    def job_log_tail(self, job_id: str, lines: int) -> list[str]:
        """The end of a job's log, all of which is downloaded for it; empty where Ray does not know the job."""
        try:
            with self._client(job_id) as client:
                return str(client.get_job_logs(job_id)).splitlines()[-lines:]
        except NotFound:
            return []

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to stop; NotFound where Ray does not know it."""
        with self._client(job_id) as client:
            return bool(client.stop_job(job_id))

    @contextmanager
    def _client(self, job_id: str) -> Iterator[Any]:
        """The client, made once and again after a failure: the server may have moved. Its errors become ours."""
        try:
            with self._lock:
                self._kept = self._kept or self._new_client()
                client = self._kept
            yield client
        except (RuntimeError, OSError, RayError) as error:  # the SDK has one RuntimeError for any answer but 200
            if _does_not_exist(error):
                raise NotFound(f"no job {job_id!r}") from error
            with self._lock:
                self._kept = None
            raise Unavailable(f"Ray's job server does not answer: {error}") from error


def _does_not_exist(error: Exception) -> bool:
    """As `SubmissionClient._raise_error` and `JobHead` of Ray 2.60 word it."""
    return "failed with status code 404" in str(error) and "does not exist" in str(error)


def _new_jobs_client() -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(ray.get_runtime_context().gcs_address)


job_server = JobServer(_new_jobs_client)
