"""FAISS in process against the served endpoint: same data, index files, parameters and threads, in one run.

    python benchmarks/http_vs_faiss.py [--data FILE --queries FILE] [--shards 2] [--rounds 3]

Without files it makes 60,000 x 128 clustered vectors. Each round measures FAISS and every load shape in turn; the
table shows medians over the rounds, and ratios to the median of FAISS.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from cluster.arrow_rows import vectors_array
from serve.arrow_bodies import ARROW
from serve.client import Client
from serve.load import LoadReport, encode_request, run_load
from serve.local_cluster import free_ports

COLLECTION = "bench"
K = 10
BATCH = 256


@dataclass(frozen=True)
class Work:
    """Vectors to index and to ask, and the exact answer."""

    parquet: Path
    queries: Any  # float32 (n, d), unit length under cosine
    truth: Any  # ids (n, K)
    metric: str
    name: str


@dataclass(frozen=True)
class Shape:
    """A load: connections, vectors per request, wire format, and requests per round."""

    name: str
    connections: int
    vectors: int
    arrow: bool
    requests: int


SHAPES = (
    Shape("JSON, 1 vector, 1 connection", 1, 1, False, 1_000),
    Shape("JSON, 1 vector, 8 connections", 8, 1, False, 3_000),
    Shape("JSON, 1 vector, 64 connections", 64, 1, False, 6_000),
    Shape("Arrow, 1 vector, 64 connections", 64, 1, True, 6_000),
    Shape(f"Arrow, {BATCH} vectors, 1 connection", 1, BATCH, True, 60),
    Shape(f"Arrow, {BATCH} vectors, 4 connections", 4, BATCH, True, 120),
)


def main(
    data: Annotated[Path | None, typer.Option(help="Parquet with id and vector columns.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Parquet with vector and exact_ids columns.")] = None,
    metric: str = "cosine",
    shards: int = 2,
    rounds: int = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    if (data is None) != (queries is None):
        raise SystemExit("give both --data and --queries, or neither")
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as folder:
        work = read_work(data, queries, metric) if data and queries else make_work(Path(folder))
        port = free_ports(1)[0]
        target = f"http://127.0.0.1:{port}"
        server = start_server(f"{folder}/data", port)
        try:
            client = Client(target)
            import_work(client, work, shards)
            report = measure(client, target, work, f"{folder}/data", rounds)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    print(json.dumps(report) if as_json else as_markdown(report))


def read_work(data: Path, queries: Path, metric: str) -> Work:
    table = pq.read_table(queries)
    vectors = table["vector"].combine_chunks()
    asked = vectors.flatten().to_numpy().astype(np.float32).reshape(len(vectors), -1)
    truth = np.array([line[:K] for line in table["exact_ids"].to_pylist()])
    return Work(data, _searched(asked, metric), truth, metric, data.stem)


def make_work(folder: Path, count: int = 60_000, dimension: int = 128, asked: int = 1_000) -> Work:
    """Vectors around 1,000 centres (noise 0.7), with the exact answers by brute force."""
    random = np.random.default_rng(7)
    centres = random.standard_normal((1_000, dimension))
    which = random.integers(0, len(centres), count + asked)
    points = (centres[which] + 0.7 * random.standard_normal((count + asked, dimension))).astype(np.float32)
    points = _searched(points, "cosine")
    ids = np.arange(count)
    pq.write_table(pa.table({"id": ids, "vector": vectors_array(points[:count])}), folder / "points.parquet")
    scores = points[count:] @ points[:count].T
    truth = np.argsort(-scores, axis=1)[:, :K]
    return Work(folder / "points.parquet", points[count:], truth, "cosine", f"clusters {count} x {dimension}")


def _searched(vectors: Any, metric: str) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if metric == "cosine" else vectors


def start_server(data: str, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serve.cli", "up", "--data", data, "--port", str(port), "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout is not None
    for line in server.stdout:
        if "serves" in line:
            return server
    raise SystemExit("the server did not start")


def import_work(client: Client, work: Work, shards: int) -> None:
    create = {"metric": work.metric, "shards": shards}
    body = {"kind": "import", "source": str(work.parquet.absolute()), "create": create}
    client.run_job(COLLECTION, body, lambda status: None)


def measure(client: Client, target: str, work: Work, data: str, rounds: int) -> dict[str, Any]:
    described = client.collection(COLLECTION)
    requests = {shape.name: make_requests(target, work, shape) for shape in SHAPES}
    faiss_rounds, loads = [], {shape.name: [] for shape in SHAPES}  # type: ignore[var-annotated]
    for shape in SHAPES:  # warm up
        in_child(run_load, target, requests[shape.name], shape.connections, max(8, shape.requests // 10))
    for _ in range(rounds):
        faiss_rounds.append(in_child(measure_faiss, data, described, work.queries))
        for shape in SHAPES:
            load = in_child(run_load, target, requests[shape.name], shape.connections, shape.requests)
            loads[shape.name].append(load)
    served = served_ids(target, work)
    in_process = faiss_rounds[0]["ids"]
    base = float(np.median([each["per_second"] for each in faiss_rounds]))
    return {
        "machine": machine(),
        "data": work.name,
        "index": index_name(described),
        "recall_faiss": recall(in_process, work.truth),
        "recall_served": recall(served, work.truth),
        "same_answers": float((np.sort(served, 1) == np.sort(in_process, 1)).all(axis=1).mean()),
        "faiss_per_second": base,
        "faiss_p50_ms": float(np.median([each["p50_ms"] for each in faiss_rounds])),
        "faiss_p99_ms": float(np.median([each["p99_ms"] for each in faiss_rounds])),
        "rows": [row_of(shape, loads[shape.name], base) for shape in SHAPES],
    }


def make_requests(target: str, work: Work, shape: Shape) -> list[bytes]:
    """All queries once, as requests of `shape.vectors` vectors."""
    path = f"/v1/collections/{COLLECTION}/points:search"
    requests = []
    for start in range(0, len(work.queries) - shape.vectors + 1, shape.vectors):
        vectors = work.queries[start : start + shape.vectors]
        if shape.arrow:
            headers = {"Content-Type": ARROW, "Accept": ARROW}
            requests.append(encode_request(target, f"{path}?k={K}", arrow_body(vectors), headers))
        else:
            body = json.dumps({"vectors": vectors.tolist(), "k": K}).encode()
            requests.append(encode_request(target, path, body, {"Content-Type": "application/json"}))
    return requests


def arrow_body(vectors: Any) -> bytes:
    batch = pa.record_batch({"vector": vectors_array(vectors.astype(np.float32))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def measure_faiss(data: str, described: dict[str, Any], queries: Any) -> dict[str, Any]:
    """Search the very index files that are served: shards one after the other, all their threads together."""
    from actors.faiss_index import use_threads
    from actors.shard import Shard
    from cluster.object_store import open_store
    from cluster.query import SearchGroup, SearchParams, ShardSearch
    from cluster.topk import merge_hits

    shards = [Shard(open_store(data), COLLECTION, entry["shard"], Path(data)) for entry in described["shards"]]
    for shard in shards:
        shard.load()
    use_threads(sum(entry["replicas"][0]["threads"] for entry in described["shards"]))

    def search(part: Any) -> Any:
        group = SearchGroup(0, len(part), K, SearchParams())
        request = ShardSearch(described["generation"], part, (group,))
        hits = [shard.search(request)[0] for shard in shards]
        return merge_hits(hits, K, described["config"]["metric"])  # type: ignore[arg-type]

    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    search(batches[0])
    started, searched = time.perf_counter(), 0
    while time.perf_counter() - started < 2.0:
        searched += sum(len(search(batch).counts) for batch in batches)
    per_second = searched / (time.perf_counter() - started)
    singles = []
    for query in queries[:300]:
        at = time.perf_counter()
        search(query[None, :])
        singles.append(time.perf_counter() - at)
    ids = np.concatenate([search(batch).ids.to_numpy().reshape(-1, K) for batch in batches])
    p50_ms, p99_ms = (float(np.percentile(singles, percent) * 1000.0) for percent in (50, 99))
    return {"per_second": per_second, "p50_ms": p50_ms, "p99_ms": p99_ms, "ids": ids}


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a fresh process: no threads, caches or event loops are shared between what is compared."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def served_ids(target: str, work: Work) -> Any:
    client = Client(target)
    found = []
    for start in range(0, len(work.queries), BATCH):
        answer = client.search(COLLECTION, work.queries[start : start + BATCH], k=K, timeout_ms=30_000)
        found += [[hit["id"] for hit in hits] for hits in answer["results"]]
    return np.array(found)


def recall(found: Any, truth: Any) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def row_of(shape: Shape, loads: list[LoadReport], base: float) -> dict[str, Any]:
    rates = [load.per_second * shape.vectors for load in loads]
    return {
        "load": shape.name,
        "vectors_per_second": float(np.median(rates)),
        "ratio": float(np.median(rates)) / base,
        "p50_ms": float(np.median([load.percentile_ms(50) for load in loads])),
        "p99_ms": float(np.median([load.percentile_ms(99) for load in loads])),
        "failures": sum(sum(load.failures.values()) for load in loads),
    }


def index_name(described: dict[str, Any]) -> str:
    segments = [segment for shard in described["shards"] for segment in shard["segments"]]
    kinds = sorted({f"{s['index_kind']} {s['index_params']} {s['operating_points'][0]['params']}" for s in segments})
    threads = [replica["threads"] for shard in described["shards"] for replica in shard["replicas"]]
    return f"{len(threads)} shards x {threads[0]} FAISS threads, {'; '.join(kinds)}"


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}, load generator on the same cores"


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['data']}; {report['index']}; {report['machine']}",
        f"recall@{K}: FAISS in process {report['recall_faiss']:.4f}, served {report['recall_served']:.4f}; "
        f"queries with the same ids: {report['same_answers']:.1%}",
        "",
        "| load | vectors/s | of FAISS | p50 ms | p99 ms | failed |",
        "|---|---:|---:|---:|---:|---:|",
        f"| FAISS in process, batches of {BATCH} (times: 1 vector) | {report['faiss_per_second']:,.0f} | 1.00 | "
        f"{report['faiss_p50_ms']:.2f} | {report['faiss_p99_ms']:.2f} | 0 |",
    ]
    lines += [
        f"| {row['load']} | {row['vectors_per_second']:,.0f} | {row['ratio']:.2f} | {row['p50_ms']:.2f} | "
        f"{row['p99_ms']:.2f} | {row['failures']} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
