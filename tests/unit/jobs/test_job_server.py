"""Ray's job server as `actors.ray_jobs` meets it: its SDK has one RuntimeError for all that is not status 200."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors.ray_jobs import ClusterCpus, JobServer
from cluster.errors import NotFound, Unavailable

UNKNOWN = RuntimeError("Request failed with status code 404: Job import-1 does not exist.")
FAILURES = [
    RuntimeError("Request failed with status code 500: Traceback ... does not exist."),
    RuntimeError("Request failed with status code 404: 404: Not Found."),
    RuntimeError("Version check returned 404. Please ensure the cluster is running Ray 2.0 or higher."),
    ConnectionError("Failed to connect to Ray at address: 127.0.0.1:8265."),
    OSError("as requests.ConnectionError is one"),
]
CALLS: list[Callable[[JobServer], object]] = [
    lambda server: server.job_state("import-1"),
    lambda server: server.job_log_tail("import-1", 2),
    lambda server: server.stop_job("import-1"),
]


class Client:
    """A `JobSubmissionClient` whose every call raises `error`, if there is one."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def get_job_status(self, job_id: str) -> Any:
        return self._answer(SimpleNamespace(value="RUNNING"))

    def get_job_logs(self, job_id: str) -> Any:
        return self._answer("a\nb\nc\n")

    def stop_job(self, job_id: str) -> Any:
        return self._answer(True)

    def _answer(self, value: Any) -> Any:
        if self.error is not None:
            raise self.error
        return value


class Clients:
    def __init__(self) -> None:
        self.made: list[Client] = []

    def __call__(self) -> Client:
        self.made.append(Client())
        return self.made[-1]


def test_client_is_made_once() -> None:
    clients = Clients()
    server = JobServer(clients)
    assert server.job_state("import-1") == "RUNNING"
    assert server.job_log_tail("import-1", 2) == ["b", "c"]
    assert server.stop_job("import-1")
    assert len(clients.made) == 1


def test_job_that_does_not_exist_is_told_so_and_the_client_is_kept() -> None:
    clients = Clients()
    server = JobServer(clients)
    server.job_state("import-1")
    clients.made[0].error = UNKNOWN
    assert server.job_state("import-1") is None
    assert server.job_log_tail("import-1", 2) == []
    with pytest.raises(NotFound, match="no job 'import-1'"):
        server.stop_job("import-1")
    assert len(clients.made) == 1


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("call", CALLS)
def test_any_other_failure_is_unavailable_and_the_next_call_has_a_new_client(
    call: Callable[[JobServer], object], error: Exception
) -> None:
    clients = Clients()
    server = JobServer(clients)
    server.job_state("import-1")
    clients.made[0].error = error
    with pytest.raises(Unavailable, match="job server"):
        call(server)
    assert call(server)
    assert len(clients.made) == 2


def test_server_that_cannot_be_reached_at_all_is_unavailable() -> None:
    def refuse() -> Any:
        raise ConnectionError("refused")

    with pytest.raises(Unavailable, match="refused"):
        JobServer(refuse).job_state("import-1")


def test_cpus_of_nodes_are_whole_and_at_least_one() -> None:
    assert ClusterCpus.of([16.0, 4.0, 0.0], [3.5, 4.0]) == ClusterCpus(20, 16, 4)
    assert ClusterCpus.of([0.0], [0.0]) == ClusterCpus.of([], []) == ClusterCpus(1, 1, 1)
