"""The whole path on real vectors: up, import, search, crashes, restart, down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.arrow_rows import vectors_array, vectors_view
from cluster.errors import Unavailable
from serve.load import encode_request, run_load
from tests.ray.server import RunningServer, alive, problem_of, wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[3]
WORDS = ROOT / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
SEED = 11


@pytest.fixture(scope="module")
def server(eagleray: RunningServer) -> RunningServer:
    """That of the folder, which is ended here: this module is the last one that uses it."""
    return eagleray


@pytest.fixture(scope="module")
def vectors() -> Any:
    return vectors_view(pq.read_table(WORDS)["vector"].combine_chunks()).astype(np.float32)


@pytest.fixture(scope="module")
def ids() -> Any:
    return pq.read_table(WORDS)["id"].to_numpy()


@pytest.fixture(scope="module")
def queries(vectors: Any) -> Any:
    """Midpoints of random pairs: no stored point."""
    pairs = np.random.default_rng(SEED).integers(0, len(vectors), (300, 2))
    return vectors[pairs[:, 0]] + vectors[pairs[:, 1]]


@pytest.fixture(scope="module")
def words(server: RunningServer) -> str:
    """The 5,000 words on 2 shards, forced to a graph so that recall can be lost."""
    made = server.cli("import", str(WORDS), "--collection", "words", "--shards", "2", "--index", "hnsw",
                      "--attribute-columns", "word,gloss", "--json")  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert problem_of(made.stdout)["report"]["points"] == 5_000
    return "words"


def recall(answers: list[list[dict[str, Any]]], queries: Any, vectors: Any, ids: Any) -> float:
    exact = ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :10]]
    return float(
        np.mean([len({h["id"] for h in hits} & set(e)) / 10 for hits, e in zip(answers, exact.tolist(), strict=True)])
    )


def test_search_after_import_reaches_the_target_recall(
    server: RunningServer, words: str, queries: Any, vectors: Any, ids: Any
) -> None:
    answers = server.answers(words, queries)
    assert all(len(hits) == 10 for hits in answers)
    assert recall(answers, queries, vectors, ids) >= 0.95


def test_fetch_of_every_point_gives_every_point(server: RunningServer, words: str, ids: Any) -> None:
    fetched = server.client.fetch(words, [*ids.tolist(), -1])
    assert [point["id"] for point in fetched["points"]] == ids.tolist()
    assert fetched["missing"] == [-1]
    assert {"word", "gloss"} == fetched["points"][0]["attributes"].keys()


def test_concurrent_single_searches_are_all_answered(server: RunningServer, words: str, queries: Any) -> None:
    bodies = [b'{"vector": %s, "k": 3}' % str(query.tolist()).encode() for query in queries[:50]]
    path = f"/v1/collections/{words}/points:search"
    requests = [encode_request(server.target, path, body, {"Content-Type": "application/json"}) for body in bodies]
    load = run_load(server.target, requests, connections=32, count=1_000)
    assert load.failures == {}
    assert len(load.latencies_s) == 1_000


def test_writes_are_found_at_once_and_after_every_process_was_killed(
    server: RunningServer, words: str, vectors: Any, ids: Any
) -> None:
    made, gone = [-1, -2, -(2**63)], ids[:5].tolist()
    written = server.client.upsert(words, made, vectors[:3] + 1.0, [{"word": "new"}] * 3)
    assert written["upserted"] == 3
    assert server.client.delete_points(words, [*gone, 2**62])["deleted"] == 5
    moved = server.client.upsert(words, [int(ids[7])], vectors[8:9])
    lsn = written["lsn"] | moved["lsn"]
    answer = server.client.search(words, vectors[:3] + 1.0, k=3, min_lsn=lsn, with_attributes=["word"])
    assert [hits[0]["id"] for hits in answer["results"]] == made
    assert answer["results"][0][0]["attributes"] == {"word": "new"}

    def as_written() -> bool:
        try:
            found = server.client.fetch(words, [*made, *gone, int(ids[7])], with_vectors=True)
        except Unavailable:
            return False
        assert found["missing"] == gone
        return bool(np.allclose(found["points"][-1]["vector"], vectors[8] / np.linalg.norm(vectors[8]), atol=1e-5))

    assert as_written()
    for pid in server.replica_pids(words):
        os.kill(pid, signal.SIGKILL)
    wait_until(as_written, "what was acknowledged is there after all replicas were killed")

    def writable_again() -> bool:
        try:
            return bool(server.client.delete_points(words, made)["deleted"] == 3)
        except Unavailable:
            return False

    wait_until(writable_again, "a new primary takes writes")
    rows = [*range(5), 7]
    assert server.client.upsert(words, ids[rows].tolist(), vectors[rows])["upserted"] == 6  # as the other tests have it


def test_import_with_a_bad_row_names_it_and_changes_nothing(
    server: RunningServer, words: str, queries: Any, tmp_path: Path
) -> None:
    before = server.answers(words, queries)
    version = server.client.collection(words)["version"]
    rows = np.ones((100, 384), np.float32)
    rows[57, 3] = np.nan
    table = pa.table({"id": np.arange(100), "vector": vectors_array(rows)})
    pq.write_table(table, tmp_path / "bad.parquet", row_group_size=50)
    failed = server.cli("import", str(tmp_path / "bad.parquet"), "--collection", words, "--json")
    assert failed.returncode == 1
    message = problem_of(failed.stdout)["report"]["message"]
    assert "bad.parquet, row group 1, row 7" in message
    assert "NaN" in message
    assert server.client.collection(words)["version"] == version
    assert server.answers(words, queries) == before


def test_second_import_is_served_without_a_failed_search(server: RunningServer, words: str, queries: Any) -> None:
    """The same rows again: a new generation, the same points; the old one answers until the switch."""
    generation = server.client.collection(words)["generation"]
    command = [
        sys.executable,
        "-m",
        "serve.cli",
        "import",
        str(WORDS),
        "--collection",
        words,
        "--target",
        server.target,
    ]
    importing = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = set()
    while importing.poll() is None:
        answer = server.client.search(words, queries[:5], k=10)
        assert answer["coverage"]["shards"] == 1.0
        seen.add(answer["generation"])
    assert importing.returncode == 0
    assert server.client.search(words, queries[:5])["generation"] == generation + 1
    assert seen <= {generation, generation + 1}
    assert server.client.collection(words)["points"] == 5_000


def test_stopped_import_leaves_the_old_manifest_served(server: RunningServer, words: str, queries: Any) -> None:
    before, version = server.answers(words, queries), server.client.collection(words)["version"]
    body = {"kind": "import", "source": str(WORDS), "create": {}}
    job_id = server.client.call("POST", f"/v1/collections/{words}/jobs", body)["job_id"]
    server.client.call("DELETE", f"/v1/jobs/{job_id}")
    wait_until(lambda: server.client.call("GET", f"/v1/jobs/{job_id}")["state"] == "stopped", "the job stopped")
    assert server.client.collection(words)["version"] == version
    assert server.answers(words, queries) == before


def test_killed_shard_is_served_again_with_the_same_answers(server: RunningServer, words: str, queries: Any) -> None:
    before = server.answers(words, queries)
    old = server.replica_pids(words)
    os.kill(old[0], signal.SIGKILL)

    def served_again() -> bool:
        try:
            return server.replica_pids(words)[0] not in (0, old[0]) and server.answers(words, queries[:1]) != []
        except Unavailable:
            return False

    wait_until(served_again, "the killed shard is served again")
    assert server.answers(words, queries) == before
    assert server.replica_pids(words)[1] == old[1]


def test_killed_supervisor_comes_back_and_still_supervises(server: RunningServer, words: str, queries: Any) -> None:
    before = server.answers(words, queries)
    supervisor = [pid for pid in server.processes() if "ray::SupervisorActor" in command_of(pid)]
    assert len(supervisor) == 1
    os.kill(supervisor[0], signal.SIGKILL)
    assert server.answers(words, queries) == before  # searches do not need it

    def supervises() -> bool:
        try:
            server.client.create("after", {"dimension": 2})
        except Unavailable:
            return False
        return True

    wait_until(supervises, "a collection can be created again")
    assert server.answers(words, queries) == before
    server.client.delete("after")


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_submitted_ray_job_imports_from_the_working_directory(server: RunningServer, ids: Any) -> None:
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", server.dashboard,
               "--working-dir", ".", "--", sys.executable, "-m", "jobs", "import", "--collection", "submitted",
               "--source", str(WORDS)]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "token"}  # `up` starts Ray with token authentication
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.client.collection("submitted")["points"] == len(ids)
    server.client.delete("submitted")


def test_second_up_on_the_same_port_is_refused(server: RunningServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.cli", "up", "--data", str(tmp_path), "--port", str(server.port)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1
    assert f"runs on port {server.port}" in refused.stderr


def test_restart_answers_the_same_and_leaves_nothing_running(server: RunningServer, words: str, queries: Any) -> None:
    before = server.answers(words, queries)
    started = server.processes()
    assert len(started) > 5
    assert server.stop() == 0
    wait_until(lambda: not any(alive(pid) for pid in started), "every process ended", timeout_s=15.0)
    server.start()
    assert server.answers(words, queries) == before
    down = subprocess.run(
        [sys.executable, "-m", "serve.cli", "down", "--port", str(server.port)], check=False, timeout=60
    )
    assert down.returncode == 0
    assert server.wait() == 0
