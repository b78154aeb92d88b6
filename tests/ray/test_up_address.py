"""`eagleray up --address`: serving from a cluster that was there before and stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.local_cluster import free_ports
from tests.ray.server import RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("others")]
CLUSTER = """
import sys, tempfile, shutil
import ray
folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")
context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[1]),
                   log_to_driver=False, object_store_memory=100 * 1024 * 1024, _temp_dir=folder)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
shutil.rmtree(folder, ignore_errors=True)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster in a process of its own."""
    command = [sys.executable, "-c", CLUSTER, str(free_ports(1)[0])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as cluster:  # type: ignore[call-overload]
        yield cluster.stdout.readline().strip()
        cluster.stdin.close()
        cluster.wait(timeout=60)


def test_up_on_a_running_cluster_can_be_repeated_and_refuses_a_second(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the cluster was started
    server = RunningServer(tmp_path / "data", "--address", address)
    try:
        server.start()
        assert server.client.create("tiny", {"dimension": 2})["ready"]
        other = [sys.executable, "-m", "serve.cli", "up", "--data", str(tmp_path / "other"), "--address", address]
        refused = subprocess.run(
            [*other, "--port", str(free_ports(1)[0])],
            capture_output=True, text=True, check=False, timeout=120, env=os.environ,
        )  # fmt: skip
        assert refused.returncode == 1
        assert "Ray Serve runs on" in refused.stderr
        assert server.client.collection("tiny")["ready"]  # what was served goes on
        assert server.stop() == 0
        server.start()
        assert server.client.collection("tiny")["points"] == 0
    finally:
        if server.running:
            server.stop()
        server.client.close()
