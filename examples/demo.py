"""`make demo`: real vectors on this machine, from import to cold restart. Ends by itself, leaves nothing running."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cluster.arrow_rows import vectors_view
from serve.client import Client
from serve.load import encode_request, run_load
from serve.local_cluster import free_ports

WORDS = Path(__file__).parent / "words" / "wordnet-minilm-384-5k.parquet"
SHOWN = ("guitar", "river", "doctor", "winter", "wine")
COLLECTION = "words"
K = 10
TARGET_RECALL = 0.95
console = Console()


def main() -> int:
    table = pq.read_table(WORDS)
    vectors = vectors_view(table["vector"].combine_chunks()).astype(np.float32)
    parent = Path("eagleray-data")
    parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=parent))
    target = f"http://127.0.0.1:{free_ports(1)[0]}"
    try:
        with serving(folder, target):
            import_words(target)
            show_words(Client(target), table)
            recall = measure_recall(Client(target), table["id"].to_numpy(), vectors)
            show_load(target, vectors)
            written = write_points(Client(target), table)
            before = answers(Client(target), vectors)
        console.rule("cold restart from storage")
        with serving(folder, target):
            same = answers(Client(target), vectors) == before
            console.print(f"{len(before)} queries answered as before the restart: {'yes' if same else 'NO'}")
    finally:
        shutil.rmtree(folder)
    return 0 if same and written and recall >= TARGET_RECALL else 1


@contextmanager
def serving(folder: Path, target: str) -> Iterator[None]:
    """`eagleray up` while this lasts, then Ctrl-C."""
    port = target.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "serve.cli", "up", "--data", str(folder), "--port", port]
    console.print(f"[bold]$ eagleray up --data {folder} --port {port}[/bold]")
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "serves" in line:
                break
        else:
            raise SystemExit(f"the server ended: {''.join(lines)}")
        console.print(f"ready after {time.perf_counter() - started:.1f} s")
        yield
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=60)
        console.print(f"stopped by Ctrl-C, exit code {code}")


def import_words(target: str) -> None:
    command = ["import", str(WORDS), "--collection", COLLECTION, "--shards", "2", "--attribute-columns", "word,gloss"]
    for arguments in (command, ["status", COLLECTION]):
        console.print(f"[bold]$ eagleray {' '.join(arguments)}[/bold]")
        subprocess.run([sys.executable, "-m", "serve.cli", *arguments, "--target", target], check=True)


def show_words(client: Client, table: Any) -> None:
    """A few words and the words nearest by meaning."""
    words, ids = table["word"].to_pylist(), table["id"].to_pylist()
    shown = Table("word", "nearest by meaning", title="the first sense of a word, and its neighbours")
    for word in SHOWN:
        vector = client.vector_of(COLLECTION, ids[words.index(word)])
        hits = client.search(COLLECTION, vector, k=K, with_attributes=["word"])["results"][0]
        nearest = dict.fromkeys(hit["attributes"]["word"] for hit in hits)
        shown.add_row(word, ", ".join(other for other in nearest if other != word))
    console.print(shown)


def measure_recall(client: Client, ids: Any, vectors: Any) -> float:
    """Recall@10 of the served answers against brute force, on queries that are no stored point: midpoints of pairs."""
    random = np.random.default_rng(0)
    pairs = random.integers(0, len(vectors), (1_000, 2))
    queries = vectors[pairs[:, 0]] + vectors[pairs[:, 1]]
    exact = ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :K]]
    found = client.search(COLLECTION, queries, k=K)["results"]
    shares = [
        len({hit["id"] for hit in hits} & set(line)) / K for hits, line in zip(found, exact.tolist(), strict=True)
    ]
    recall = float(np.mean(shares))
    console.print(f"recall@{K} against exact search, {len(queries)} queries: [bold]{recall:.4f}[/bold]")
    return recall


def show_load(target: str, vectors: Any) -> None:
    """Queries per second and latency of single-vector JSON requests over HTTP."""
    path = f"/v1/collections/{COLLECTION}/points:search"
    bodies = [json.dumps({"vector": vector.tolist(), "k": K}).encode() for vector in vectors[:500]]
    requests = [encode_request(target, path, body, {"Content-Type": "application/json"}) for body in bodies]
    shown = Table("connections", "queries/s", "p50 ms", "p99 ms", "failed", title="single-vector searches over HTTP")
    for connections, count in ((1, 500), (8, 2_000), (64, 4_000)):
        run_load(target, requests, connections, count // 5)  # warm up
        load = run_load(target, requests, connections, count)
        failed = sum(load.failures.values())
        cells = (f"{load.per_second:,.0f}", f"{load.percentile_ms(50):.2f}", f"{load.percentile_ms(99):.2f}")
        shown.add_row(str(connections), *cells, str(failed))
    console.print(shown)


def write_points(client: Client, table: Any) -> bool:
    """A point is added and another one deleted; whether the next search has seen both."""
    guitar = table["id"].to_pylist()[table["word"].to_pylist().index("guitar")]
    vector = client.vector_of(COLLECTION, guitar)
    lsn = client.upsert(COLLECTION, [-1], vector, [{"word": "my own guitar"}])["lsn"]
    lsn |= client.delete_points(COLLECTION, [guitar])["lsn"]
    hits = client.search(COLLECTION, vector, k=3, min_lsn=lsn, with_attributes=["word"])["results"][0]
    found = ", ".join(hit["attributes"]["word"] for hit in hits)
    console.print(f"guitar was deleted, and a point of our own written in its place; nearest is now: {found}")
    return hits[0]["id"] == -1 and guitar not in [hit["id"] for hit in hits]


def answers(client: Client, vectors: Any) -> list[list[dict[str, Any]]]:
    """Every hit, id and score, of 200 queries."""
    return list(client.search(COLLECTION, vectors[:200], k=K)["results"])


if __name__ == "__main__":
    sys.exit(main())
