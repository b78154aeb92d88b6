"""A real `eagleray up` in a process group of its own, for the tests of this folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.client import Client
from serve.local_cluster import free_ports

START_TIMEOUT_S = 120.0


class RunningServer:
    """`eagleray up` on a free port; `start` and `stop` may be repeated over the same data."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self.options = options
        self.port = free_ports(1)[0]
        self.target = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.target)
        self.dashboard = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "serve.cli", "up", "--data", str(self.data), "--port", str(self.port)]
        command += self.options
        said = self.data.with_name(f"{self.data.name}-said.txt")  # in a file: nobody reads a pipe while it serves
        with said.open("w") as errors:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"job server: (http://\S+)", line):
                self.dashboard = found.group(1)
            if "serves" in line:
                return
        raise AssertionError(f"eagleray up ended with {self.wait()} before it served: {said.read_text()[-4_000:]}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C reaches the whole process group; returns the exit code."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Until it ended, by itself or told by someone else; returns the exit code."""
        assert self._process is not None
        code = self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return code

    @property
    def running(self) -> bool:
        return self._process is not None

    def processes(self) -> list[int]:
        """Pids of everything this server started."""
        assert self._process is not None
        return descendants(self._process.pid)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.cli", *arguments, "--target", self.target]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)

    def replica_pids(self, collection: str) -> list[int]:
        shards = self.client.collection(collection)["shards"]
        return [replica["pid"] for shard in shards for replica in shard["replicas"]]

    def answers(self, collection: str, vectors: Any, k: int = 10) -> list[list[dict[str, Any]]]:
        return list(self.client.search(collection, vectors, k=k, timeout_ms=30_000)["results"])


def descendants(root: int) -> list[int]:
    """Children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, left = [], [root]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def problem_of(output: str) -> dict[str, Any]:
    """What a command printed with --json."""
    return dict(json.loads(output.strip().splitlines()[-1]))
