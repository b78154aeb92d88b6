"""`serve run` with the shipped Serve config file: the same application without `eagleray up`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from serve.client import Client
from serve.local_cluster import free_ports, serve_environment
from tests.ray.server import alive, descendants, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("others")]
ROOT = Path(__file__).resolve().parents[2]


def test_serve_run_with_the_shipped_config_serves(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    config = local_config(tmp_path / "data", port)
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(tmp_path / "serve.yaml")]
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")  # short: HAProxy's socket lies in it
    environment = os.environ | serve_environment(folder, port)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    client = Client(f"http://127.0.0.1:{port}")
    try:
        wait_until(
            lambda: ready(port) or process.poll() is not None,
            f"serve run is ready; its log: {tmp_path / 'log'}",
            timeout_s=120.0,
        )
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert client.create("tiny", {"dimension": 2})["ready"]
        assert client.search("tiny", np.ones((1, 2)))["results"] == [[]]
        started = descendants(process.pid)
    finally:
        client.close()
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=90)
        shutil.rmtree(folder, ignore_errors=True)
    wait_until(lambda: not any(alive(pid) for pid in started), "every process ended", timeout_s=30.0)


def local_config(data: Path, port: int) -> dict[str, object]:
    """serve-config.yaml for one small machine."""
    config = yaml.safe_load((ROOT / "serve-config.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] = {"data": data.as_uri(), "shard_cpus": 0}
    application["deployments"][0] |= {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    return dict(config)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
