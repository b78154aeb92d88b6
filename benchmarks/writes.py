"""Acknowledged upserts beside what the store and FAISS do alone, in one run: `python -m benchmarks.writes`.

    python -m benchmarks.writes [--data URL] [--rounds 3] [--seconds 1.0] [--no-http] [--json]

Every round measures all of it in turn. Before each load the store puts objects as large as the load's WAL records,
one at a time: the ratio of a load is its rate to that one. `in process` is a shard's own write path (`Shard` and
`Primary`), `HTTP` a served Eagleray: JSON for single points, Arrow for batches. Writers send their next write when the
last one was acknowledged. Searches come at a constant rate, whatever happens; their times begin when they were due.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import typer

from actors.primary import Primary
from actors.shard import Shard
from benchmarks.served import machine, start_server
from cluster.arrow_rows import stream_of, vectors_array
from cluster.config import CollectionConfig, Limits, Upkeep
from cluster.manifest import ManifestLog
from cluster.object_store import ObjectStore, open_store
from cluster.wal import WalRecord
from cluster.write import PointWrite
from serve.arrow_bodies import ARROW
from serve.client import Client
from serve.load import encode_request, in_child, run_load
from serve.local_cluster import free_ports

WRITERS, BATCHES = (1, 8, 64), (1, 1_000)
BATCH_RATIO_BAR, GROUP_RATIO_BAR = 0.5, 10.0
PATHS = ("in process", "HTTP")
FAISS_INDEXES = ("Flat", "HNSW32")
FAISS_POINTS = {"Flat": 100_000, "HNSW32": 4_000}  # added in a round; a graph of more takes long
SEARCHED_POINTS, SEARCHES_PER_S, SEARCH_K = 20_000, 50, 10
WRITTEN_POINTS_PER_S = 5_000  # beside searches, at most
HTTP_WRITES_MAX = 4_000  # of one load, which are encoded beforehand, and as few as hold so many points:
HTTP_POINTS_MAX = 60_000
NO_BOUND = Upkeep(tail_bytes_max=1 << 40)  # in process nobody seals
SEED = 11


@dataclass(frozen=True)
class Load:
    """Closed-loop writers, and the points in each of their writes."""

    writers: int
    batch: int

    def __str__(self) -> str:
        return f"{self.writers} writers x {self.batch}"


LOADS = tuple(Load(writers, batch) for batch in BATCHES for writers in WRITERS)


@dataclass(frozen=True)
class Measured:
    """Writes acknowledged per second, puts of such records per second just before, and the milliseconds of a write."""

    writes_per_s: float
    puts_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int = 0


def main(
    data: Annotated[str | None, typer.Option(help="Storage URL; none: a folder that is deleted afterwards.")] = None,
    dimension: int = 384,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each load, and about as long of puts.")] = 1.0,
    http: bool = True,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as folder:
        url = data or f"{folder}/data"
        bench = Bench(open_store(url), unit_vectors(max(BATCHES), dimension), seconds, Path(folder))
        report: dict[str, Any] = {"machine": machine(), "data": url.split(":")[0] if data else "file", **sizes(bench)}
        report |= {"faiss": [], **{path: [] for path in PATHS}, "searches": []}
        measure(bench, report, rounds)
        if http:
            with served(url) as target:
                measure_http(bench, target, report, rounds)
    print(json.dumps(report) if as_json else as_text(report))


def unit_vectors(points: int, dimension: int) -> Any:
    vectors = np.random.default_rng(SEED).standard_normal((points, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Bench:
    """What all loads share: the store, vectors that every batch has, and ids that none of its collection had before."""

    def __init__(self, store: ObjectStore, vectors: Any, seconds: float, folder: Path) -> None:
        self.store = store
        self.vectors = vectors
        self.seconds = seconds
        self.folder = folder
        self._next_ids = count()

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def upserts(self, points: int) -> Any:
        """A record batch of new ids."""
        ids = np.arange(points) + points * next(self._next_ids)
        return pa.record_batch([pa.array(ids), vectors_array(self.vectors[:points])], names=["id", "vector"])

    def record_bytes(self, points: int) -> int:
        return len(WalRecord(1, 1, "write", uuid.uuid4().hex, self.upserts(points)).encode(0))


def sizes(bench: Bench) -> dict[str, Any]:
    return {"dimension": bench.dimension, "record_bytes": {batch: bench.record_bytes(batch) for batch in BATCHES}}


# --- the store and FAISS alone --------------------------------------------------------------------------------------


def puts_per_s(bench: Bench, points: int) -> float:
    """New objects of a record's size, one at a time."""
    data = [np.random.default_rng(seed).bytes(bench.record_bytes(points)) for seed in range(4)]
    prefix = f"collections/bench-{uuid.uuid4().hex}/shards/0000/wal"
    done, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < bench.seconds / 2:
        assert bench.store.put_if_absent(f"{prefix}/{done:020d}.arrow", data[done % len(data)])
        done += 1
    for number in range(done):
        bench.store.delete(f"{prefix}/{number:020d}.arrow")
    return done / took


def faiss_adds_per_s(bench: Bench, name: str, batch: int) -> float:
    """Points added per second to an index in this process, `batch` at a time, by all cores."""
    index = faiss.index_factory(bench.dimension, name, faiss.METRIC_L2)
    done, started = 0, time.perf_counter()
    while done < FAISS_POINTS[name] and time.perf_counter() - started < bench.seconds:
        at = done % (len(bench.vectors) - batch + 1)
        index.add(bench.vectors[at : at + batch])
        done += batch
    return done / (time.perf_counter() - started)


# --- a shard's own write path ---------------------------------------------------------------------------------------


def measure(bench: Bench, report: dict[str, Any], rounds: int) -> None:
    for _ in range(rounds):
        for name in FAISS_INDEXES:
            for batch in BATCHES:
                rate = in_child(_faiss_alone, bench.vectors, bench.seconds, name, batch)
                report["faiss"].append({"index": name, "batch": batch, "points_per_s": rate})
        for load in LOADS:
            puts = puts_per_s(bench, load.batch)
            report["in process"].append(asdict(load) | asdict(in_process(bench, load, puts)))


def _faiss_alone(vectors: Any, seconds: float, name: str, batch: int) -> float:
    from cluster.memory_store import MemoryStore

    return faiss_adds_per_s(Bench(MemoryStore(), vectors, seconds, Path()), name, batch)


def in_process(bench: Bench, load: Load, puts: float) -> Measured:
    """A new shard that takes a load as its actor would: from an event loop, each write acknowledged by itself."""
    name = f"bench-{uuid.uuid4().hex}"
    ManifestLog(bench.store, name, lambda: uuid.uuid4().hex).create(CollectionConfig(bench.dimension))
    shard = Shard(bench.store, name, 0, bench.folder / "cache")
    shard.load()
    primary = Primary.claim(shard, Limits(), NO_BOUND)
    try:
        times = asyncio.run(_acknowledged(bench, primary, load))
    finally:
        primary.stop()
        for info in list(bench.store.objects(f"collections/{name}/")):
            bench.store.delete(info.key)
    return Measured(len(times) / bench.seconds, puts, *percentiles_ms(times))


async def _acknowledged(bench: Bench, primary: Primary, load: Load) -> list[float]:
    """Seconds of every write that was acknowledged in time."""
    times: list[float] = []
    until = time.perf_counter() + bench.seconds

    async def write_on() -> None:
        while (began := time.perf_counter()) < until:
            await asyncio.wrap_future(primary.write(PointWrite(bench.upserts(load.batch))))
            if (ended := time.perf_counter()) < until:
                times.append(ended - began)

    await asyncio.gather(*(write_on() for _ in range(load.writers)))
    return times


def percentiles_ms(times: list[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(times, (50, 99)) * 1_000.0 if times else (float("nan"), float("nan"))
    return float(p50), float(p99)


# --- over HTTP ------------------------------------------------------------------------------------------------------


@contextmanager
def served(url: str) -> Iterator[str]:
    """The target of an Eagleray that runs meanwhile."""
    port = free_ports(1)[0]
    server = start_server(url, port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def measure_http(bench: Bench, target: str, report: dict[str, Any], rounds: int) -> None:
    client, first_id = Client(target), count(step=HTTP_WRITES_MAX * max(BATCHES))
    config = {"dimension": bench.dimension, "metric": "cosine"}
    for _ in range(rounds):
        for load in LOADS:
            name = f"bench-{uuid.uuid4().hex[:12]}"
            client.create(name, config)
            wait_until_served(client, name, bench.vectors)
            puts = puts_per_s(bench, load.batch)
            loaded = in_child(http_load, target, name, load, bench.vectors, bench.seconds, next(first_id))
            report["HTTP"].append(asdict(load) | asdict(loaded) | {"puts_per_s": puts})
            client.delete(name)
    name = f"bench-{uuid.uuid4().hex[:12]}"
    client.create(name, config)
    wait_until_served(client, name, bench.vectors)
    send(target, upserts_of(target, name, bench.vectors, 1_000, SEARCHED_POINTS // 1_000, next(first_id)), 4)
    for _ in range(rounds):
        for writing in (None, Load(8, 1), None, Load(1, 1_000)):
            report["searches"].append(searches_beside(bench, target, name, writing, next(first_id)))
    client.delete(name)


def wait_until_served(client: Client, name: str, vectors: Any) -> None:
    """Until a write is acknowledged: a new collection gets its replicas and a primary first."""
    for attempt in range(100):
        try:
            client.upsert(name, [-1], vectors[:1])
            return
        except Exception:
            if attempt == 99:
                raise
            time.sleep(0.2)


def upserts_of(target: str, name: str, vectors: Any, batch: int, writes: int, first_id: int) -> list[bytes]:
    """Requests of new ids: JSON for single points, Arrow for batches."""
    path, kind = f"/v1/collections/{name}/points:upsert", "application/json" if batch == 1 else ARROW
    bodies = (upsert_body(vectors, batch, at) for at in range(first_id, first_id + writes * batch, batch))
    return [encode_request(target, path, body, {"Content-Type": kind}) for body in bodies]


def upsert_body(vectors: Any, batch: int, first_id: int) -> bytes:
    if batch == 1:
        return json.dumps({"points": [{"id": first_id, "vector": vectors[first_id % len(vectors)].tolist()}]}).encode()
    ids = pa.array(np.arange(first_id, first_id + batch))
    rows = pa.record_batch([ids, vectors_array(vectors[:batch])], names=["id", "vector"])
    return bytes(stream_of(rows))


def send(target: str, requests: list[bytes], writers: int) -> Any:
    return run_load(target, requests, writers, len(requests))


def http_load(target: str, name: str, load: Load, vectors: Any, seconds: float, first_id: int) -> Measured:
    """Warms up by a tenth of a second or so; then as many writes as take about `seconds`."""
    trial = 2 * load.writers
    warm = send(target, upserts_of(target, name, vectors, load.batch, trial, first_id), load.writers)
    most = min(HTTP_WRITES_MAX, HTTP_POINTS_MAX // load.batch)
    writes = int(min(most, max(trial, warm.per_second * seconds)))
    report = send(
        target, upserts_of(target, name, vectors, load.batch, writes, first_id + trial * load.batch), load.writers
    )
    failures = sum(report.failures.values())
    return Measured(report.per_second, 0.0, report.percentile_ms(50), report.percentile_ms(99), failures)


def searches_beside(bench: Bench, target: str, name: str, writing: Load | None, first_id: int) -> dict[str, Any]:
    """Searches at a constant rate, while another process writes or none does."""
    context = multiprocessing.get_context("spawn")
    stop, writes = context.Event(), context.Value("q", 0)
    arguments = (target, name, writing, bench.vectors, first_id, stop, writes)
    writer = context.Process(target=keep_writing, args=arguments) if writing else None
    if writer:
        writer.start()
        while not writes.value and writer.is_alive():
            time.sleep(0.01)
    began, before = time.perf_counter(), writes.value
    times = in_child(paced_searches, target, name, bench.vectors, 4.0 * bench.seconds)
    written = (writes.value - before) / (time.perf_counter() - began)
    if writer:
        assert writer.is_alive(), "the writer ended"
        stop.set()
        writer.join()
        assert writer.exitcode == 0
    p50, p99 = percentiles_ms(times)
    points = written * writing.batch if writing else 0.0
    return {"writing": str(writing) if writing else "", "points_per_s": points, "p50_ms": p50, "p99_ms": p99}


def keep_writing(target: str, name: str, load: Load, vectors: Any, first_id: int, stop: Any, writes: Any) -> None:
    """Write on, at no more than `WRITTEN_POINTS_PER_S`."""
    at_once, started = 4 * load.writers, time.perf_counter()
    while not stop.is_set():
        time.sleep(max(0.0, started + writes.value * load.batch / WRITTEN_POINTS_PER_S - time.perf_counter()))
        requests = upserts_of(target, name, vectors, load.batch, at_once, first_id)
        writes.value += len(send(target, requests, load.writers).latencies_s)
        first_id += at_once * load.batch


def paced_searches(target: str, name: str, vectors: Any, seconds: float) -> list[float]:
    """Seconds from when each search was due until its answer was read."""
    connection = HTTPConnection(target.removeprefix("http://"), timeout=60)
    bodies = [json.dumps({"vector": vector.tolist(), "k": SEARCH_K}) for vector in vectors[:200]]
    times, started = [], time.perf_counter() + 0.1
    for number in range(int(seconds * SEARCHES_PER_S)):
        due = started + number / SEARCHES_PER_S
        time.sleep(max(0.0, due - time.perf_counter()))
        connection.request("POST", f"/v1/collections/{name}/points:search", bodies[number % len(bodies)])
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        times.append(time.perf_counter() - due)
    return times


# --- the report -----------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']}; store {report['data']}; {report['dimension']} dimensions; medians over rounds", ""]
    lines += ["| added to FAISS in process | points/s |", "|---|---:|"]
    for (name, batch), rows in grouped(report["faiss"], "index", "batch").items():
        lines.append(f"| {name}, {batch} at a time | {median(rows, 'points_per_s'):,.0f} |")
    for path in PATHS:
        if report[path]:
            lines += ["", *loads_as_text(path, report)]
    if report["searches"]:
        title = f"{SEARCHES_PER_S} searches/s over HTTP"
        lines += ["", f"| {title} | points written/s | p50 ms | p99 ms |", "|---|---:|---:|---:|"]
        for (writing,), rows in grouped(report["searches"], "writing").items():
            beside = f"beside {writing}" if writing else "alone"
            cells = f"{median(rows, 'p50_ms'):.2f} | {median(rows, 'p99_ms'):.2f}"
            lines.append(f"| {beside} | {median(rows, 'points_per_s'):,.0f} | {cells} |")
    return "\n".join(lines)


def loads_as_text(path: str, report: dict[str, Any]) -> list[str]:
    lines = [
        f"| {path} | puts/s of a record | writes/s | points/s | writes/puts | p50 ms | p99 ms | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (writers, batch), rows in grouped(report[path], "writers", "batch").items():
        rate = median(rows, "writes_per_s")
        cells = [f"{median(rows, 'puts_per_s'):,.0f}", f"{rate:,.0f}", f"{rate * batch:,.0f}", f"{of_puts(rows):.2f}"]
        cells += [
            f"{median(rows, 'p50_ms'):.2f}",
            f"{median(rows, 'p99_ms'):.2f}",
            f"{sum(r['failures'] for r in rows)}",
        ]
        lines.append(f"| {Load(writers, batch)} | {' | '.join(cells)} |")
    most, shared = ratios(report[path])
    lines += ["", f"batches of {BATCHES[-1]:,}, writes/puts: {most:.2f} at best (bar {BATCH_RATIO_BAR:g})"]
    lines.append(f"{WRITERS[-1]} single writers / 1 writer: {shared:.1f} (bar {GROUP_RATIO_BAR:g})")
    return lines


def ratios(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(the best writes/puts of large batches, the rate of many single writers to that of one)."""
    loads = grouped(rows, "writers", "batch")
    of_single = [median(loads[writers, 1], "writes_per_s") for writers in (WRITERS[-1], WRITERS[0])]
    return max(of_puts(loads[writers, BATCHES[-1]]) for writers in WRITERS), of_single[0] / of_single[1]


def of_puts(rows: list[dict[str, Any]]) -> float:
    return float(np.median([row["writes_per_s"] / row["puts_per_s"] for row in rows]))


def grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def median(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


if __name__ == "__main__":
    typer.run(main)
