"""An Eagleray of its own for a benchmark, the machine in words, and what an import made."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vector_sets import EF_SEARCH, K, VectorSet, recall
from cluster.errors import Unavailable
from serve.client import Client
from serve.local_cluster import free_ports

COLLECTION = "bench"
SUBMIT_S = 60.0


@dataclass(frozen=True)
class Served:
    """A running endpoint and the URL or folder of its data."""

    target: str
    data: str
    client: Client


@contextmanager
def served_eagleray(*options: str) -> Iterator[Served]:
    """`eagleray up` with those options over an empty folder; both are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as folder:
        port = free_ports(1)[0]
        server = start_server(f"{folder}/data", port, *options)
        try:
            with Client(f"http://127.0.0.1:{port}", timeout_s=120.0) as client:
                yield Served(client.target, f"{folder}/data", client)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def start_server(data: str, port: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serve.cli", "up", "--data", data, "--port", str(port), "--json", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout is not None
    for line in server.stdout:
        if "serves" in line:
            return server
    raise SystemExit("the server did not start")


def import_file(client: Client, parquet: Path, metric: str, shards: int, index: dict[str, Any]) -> dict[str, Any]:
    """The collection's description after the import."""
    create = {"metric": metric, "shards": shards, "index": index}
    body = {"kind": "import", "source": str(parquet.absolute()), "create": create}
    give_up_s = time.monotonic() + SUBMIT_S
    while True:
        try:
            client.run_job(COLLECTION, body, lambda status: None)
        except Unavailable:  # Ray's job server takes no job yet: on a busy machine it starts after the endpoint
            if time.monotonic() > give_up_s:
                raise
            time.sleep(1.0)
        else:
            return client.collection(COLLECTION)


def cheapest_params(
    client: Client, described: dict[str, Any], vectors: VectorSet, target_recall: float
) -> dict[str, int]:
    """Of a graph the least ef_search of the grid that reaches the recall, on these very queries, as peers get it.

    Nothing, which takes what the import tuned, for another index or where none reaches it.
    """
    kinds = {segment["index_kind"] for shard in described["shards"] for segment in shard["segments"]}
    for ef_search in EF_SEARCH if kinds == {"hnsw"} else ():
        params = {"ef_search": ef_search}
        if recall(served_ids(client, vectors.queries, params), vectors.truth) >= target_recall:
            return params
    return {}


def served_ids(client: Client, queries: Any, params: dict[str, int]) -> Any:
    found = []
    for start in range(0, len(queries), 256):
        part = queries[start : start + 256]
        answer = client.search(COLLECTION, part, k=K, params=params, timeout_ms=30_000)
        found += [[hit["id"] for hit in hits] for hits in answer["results"]]
    return np.array(found)


def index_text(described: dict[str, Any], params: dict[str, int]) -> str:
    """`params` are searched with; without, what the import tuned."""
    segments = [segment for shard in described["shards"] for segment in shard["segments"]]
    kinds = sorted(
        {f"{s['index_kind']} {s['index_params']} {params or s['operating_points'][0]['params']}" for s in segments}
    )
    threads = [replica["threads"] for shard in described["shards"] for replica in shard["replicas"]]
    return f"{len(threads)} shards x {threads[0]} FAISS threads, {'; '.join(kinds)}"


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}, load generator on the same cores"
