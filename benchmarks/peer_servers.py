"""Servers measured beside Eagleray: each is started here, filled, brought to a recall, and ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np

from benchmarks.served import COLLECTION, Served
from benchmarks.vector_sets import K, VectorSet, recall
from serve.arrow_bodies import ARROW
from serve.bench_queries import arrow_body, hits_of
from serve.load import encode_request, in_child, run_load
from serve.local_cluster import free_ports

CHROMA = "chromadb==1.5.9"
CHROMA_EF_SEARCH = (10, 16, 24, 32, 48, 64, 100, 150, 200, 300, 400)
CHROMA_M, CHROMA_EF_CONSTRUCTION = 32, 100
CHROMA_SPACES = {"l2": "l2", "cosine": "cosine", "ip": "ip"}
CHROMA_ROWS = 1_000  # of one request that adds points: 16 MB of JSON at 784 dimensions
JSON_HEADERS = {"Content-Type": "application/json"}
START_TIMEOUT_S, STOP_TIMEOUT_S = 180.0, 30.0


@dataclass(frozen=True)
class Peer:
    """Where a search goes to, how it is written, and where the answer has the ids."""

    name: str
    setting: str
    target: str
    path: str
    encode: Callable[[Any], bytes]
    read_ids: Callable[[bytes, int], Any]  # of an answer to so many queries
    headers: dict[str, str]

    def requests(self, queries: Any, batch: int) -> list[bytes]:
        bodies = (self.encode(queries[at : at + batch]) for at in range(0, len(queries) - batch + 1, batch))
        return [encode_request(self.target, self.path, body, self.headers) for body in bodies]

    def recall(self, vectors: VectorSet) -> float:
        """Of the first thousand queries."""
        batch, asked = 100, vectors.queries[:1_000]
        requests = self.requests(asked, batch)
        load = in_child(run_load, self.target, requests, 1, len(requests), keep=True)
        if load.failures:
            raise SystemExit(f"{self.name} answers {load.failures}: {next(iter(load.bodies.values()))[:300]!r}")
        found = [ids for number in range(len(requests)) for ids in self.read_ids(load.bodies[number], batch)]
        return recall(np.array(found), vectors.truth[: len(found)])


def eagleray_peers(served: Served, setting: str, params: dict[str, int]) -> list[Peer]:
    path = f"/v1/collections/{COLLECTION}/points:search"
    arrow = {"Content-Type": ARROW, "Accept": ARROW}
    with_options = f"{path}?{urlencode({'k': K, **params})}"

    def in_json(vectors: Any) -> bytes:
        return json.dumps({"vectors": vectors.tolist(), "k": K, "params": params}).encode()

    return [
        Peer("Eagleray, JSON", setting, served.target, path, in_json, _results_ids, JSON_HEADERS),
        Peer("Eagleray, Arrow", setting, served.target, with_options, arrow_body, hits_of, arrow),
    ]


@contextmanager
def ray_serve_peers(index: Path, ef_search: int) -> Iterator[list[Peer]]:
    """A plain deployment with defaults, and with max_ongoing_requests=100, over one index file."""
    port = free_ports(1)[0]
    options = ["--ef-search", str(ef_search), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peer_ray_serve", str(index), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        if not any("serves" in line for line in process.stdout):
            raise SystemExit("the Ray Serve deployment did not start")
        target, setting = f"http://127.0.0.1:{port}", f"HNSW32, efSearch {ef_search}"
        names = {"defaults": "Ray Serve + FAISS, defaults", "hundred": "Ray Serve + FAISS, max_ongoing_requests=100"}
        yield [
            Peer(name, setting, target, f"/{path}", _vectors_body, _plain_ids, JSON_HEADERS)
            for path, name in names.items()
        ]
    finally:
        end(process)


def install_chroma(folder: Path) -> Path:
    """An environment of its own with Chroma's package; gives its program."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", CHROMA]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    return folder / "bin" / "chroma"


class _ChromaServer:
    """Chroma's own server over HTTP, without telemetry; it is sent vectors, so that it loads no model of its own."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program, self._folder = program, folder
        self._port = free_ports(1)[0]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=300.0)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def restart(self) -> None:
        self.stop()
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--path", str(self._folder / "chroma")]
        with (self._folder / "chroma.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._program), "run", *options],
                env=os.environ | {"ANONYMIZED_TELEMETRY": "False"},
                cwd=self._folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        _wait_for(self.http, "/api/v2/heartbeat", self._process)

    def stop(self) -> None:
        if self._process is not None:
            end(self._process)
            self._process = None


@contextmanager
def chroma_peers(program: Path, folder: Path, vectors: VectorSet, target_recall: float) -> Iterator[list[Peer]]:
    """Filled with the vectors, at the least ef_search of its grid that reaches the recall."""
    server = _ChromaServer(program, folder)
    try:
        server.restart()
        path = _fill_chroma(server.http, vectors)
        yield [_tuned_chroma(server, path, vectors, target_recall)]
    finally:
        server.stop()
        server.http.close()


def _fill_chroma(http: httpx.Client, vectors: VectorSet) -> str:
    """The path of the collection that was made."""
    collections = "/api/v2/tenants/default_tenant/databases/default_database/collections"
    hnsw = {
        "space": CHROMA_SPACES[vectors.metric],
        "ef_construction": CHROMA_EF_CONSTRUCTION,
        "max_neighbors": CHROMA_M,
        "ef_search": CHROMA_EF_SEARCH[0],
    }
    made = http.post(collections, json={"name": COLLECTION, "configuration": {"hnsw": hnsw}}).raise_for_status()
    path = f"{collections}/{made.json()['id']}"
    points, ids = vectors.points()
    for at in range(0, len(points), CHROMA_ROWS):
        rows = slice(at, at + CHROMA_ROWS)
        body = {"ids": [str(each) for each in ids[rows]], "embeddings": points[rows].tolist()}
        http.post(f"{path}/add", json=body).raise_for_status()
    return path


def _tuned_chroma(server: _ChromaServer, path: str, vectors: VectorSet, target_recall: float) -> Peer:
    """A changed ef_search holds for an index that is loaded after it: the server is started anew each time."""
    for ef_search in CHROMA_EF_SEARCH:
        server.http.put(path, json={"new_configuration": {"hnsw": {"ef_search": ef_search}}}).raise_for_status()
        server.restart()
        setting = f"HNSW{CHROMA_M}, ef_search {ef_search}"
        where = (server.target, f"{path}/query")
        peer = Peer(f"Chroma ({CHROMA})", setting, *where, _chroma_body, _chroma_ids, JSON_HEADERS)
        if peer.recall(vectors) >= target_recall:
            return peer
    raise SystemExit(f"Chroma does not reach recall {target_recall} with ef_search {CHROMA_EF_SEARCH[-1]}")


def _wait_for(http: httpx.Client, path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            http.get(path).raise_for_status()
        except httpx.HTTPError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{process.args!r} does not answer: {error}") from error
            time.sleep(0.2)
        else:
            return


def end(process: subprocess.Popen[Any]) -> None:
    """Ask it to end; a process group that does not is killed."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _vectors_body(vectors: Any) -> bytes:
    return json.dumps({"vectors": vectors.tolist(), "k": K}).encode()


def _chroma_body(vectors: Any) -> bytes:
    return json.dumps({"query_embeddings": vectors.tolist(), "n_results": K, "include": ["distances"]}).encode()


def _plain_ids(body: bytes, queries: int) -> list[list[int]]:
    return list(json.loads(body)["ids"])


def _chroma_ids(body: bytes, queries: int) -> list[list[int]]:
    return [[int(each) for each in ids] for ids in json.loads(body)["ids"]]


def _results_ids(body: bytes, queries: int) -> list[list[int]]:
    return [[hit["id"] for hit in hits] for hits in json.loads(body)["results"]]
