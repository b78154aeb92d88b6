"""Searches, writes and fetches over HTTP from a process of its own, judged when they are over.

load = JobLoad(server.target, "words", shape)
load.start()
...
report = load.stop()

The clients only send, and keep what came: to judge it takes CPU that the server would lack meanwhile.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.arrow_rows import vectors_array, vectors_view
from serve.client import Client
from tests.acknowledged import Acknowledged, Writing

WORDS = Path(__file__).resolve().parents[2] / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
K = 10
IDS_PER_WRITE, DELETED_SHARE = 10, 0.25
FETCHED = 20
PREPARED = 400  # queries, which are asked again and again
PATIENT_MS = 20_000
RETRY_S = 0.1
JUDGED_EVERY = 4  # the nearest of all points take milliseconds
STOP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LoadShape:
    """`points` of the words' vectors to begin with, and the requests a second of each kind."""

    points: int = 3_000
    searches_per_s: float = 40.0
    writes_per_s: float = 8.0
    fetches_per_s: float = 4.0
    seed: int = 0

    def acknowledged(self) -> Acknowledged:
        pool = vectors_view(pq.read_table(WORDS, columns=["vector"])["vector"].combine_chunks()).astype(np.float32)
        return Acknowledged(pool, self.points, 2 * self.points, self.seed)

    def import_into(self, client: Client, collection: str, path: Path, **config: Any) -> None:
        """Make a collection of the points that are there from the beginning; `path` is for their file."""
        source = str(self.write_points(path))
        body = {
            "kind": "import",
            "source": source,
            "attribute_columns": ["version"],
            "create": {"metric": "l2", **config},
        }
        client.run_job(collection, body, lambda status: None)

    def write_points(self, path: Path) -> Path:
        """A Parquet file of the points that are there from the beginning."""
        points = self.acknowledged()
        ids = list(range(self.points))
        vectors = np.array([points.vector(i, 0) for i in ids])
        columns = {"id": pa.array(ids), "vector": vectors_array(vectors), "version": pa.array([0] * len(ids))}
        pq.write_table(pa.table(columns), path)
        return path


@dataclass(frozen=True)
class Answer:
    """One answered search: when it was sent, seconds until its answer was read, and what was in it.

    `recall` is judged of one in `JUDGED_EVERY`.
    """

    sent: float
    seconds: float
    generation: int
    recall: float | None


@dataclass(frozen=True)
class Failure:
    """A request that was sent then, and answered with another status than 200 (0: not at all)."""

    sent: float
    what: str


@dataclass
class LoadReport:
    """What the clients saw: `failed` searches and fetches, and writes that failed and were `retried`."""

    answers: list[Answer] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    retried: list[Failure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    writes: int = 0
    fetches: int = 0
    live: int = 0

    def between(self, start: float, stop: float) -> list[Answer]:
        return [answer for answer in self.answers if start <= answer.sent < stop]

    def p_ms(self, percent: float, start: float, stop: float) -> float:
        return float(np.percentile([answer.seconds for answer in self.between(start, stop)], percent) * 1e3)

    def recall(self, start: float, stop: float) -> float:
        return float(np.mean([answer.recall for answer in self.between(start, stop) if answer.recall is not None]))


class JobLoad:
    """The process of the clients."""

    def __init__(self, target: str, collection: str, shape: LoadShape) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._stop = context.Event()
        arguments = (target, collection, shape, self._stop, theirs)
        self._process = context.Process(target=_drive, args=arguments, daemon=True)

    def start(self) -> None:
        """Returns when the first requests were answered."""
        self._process.start()
        assert self._connection.poll(STOP_TIMEOUT_S), "the clients do not begin"
        failures = self._connection.recv()
        assert not failures, failures[:3]

    def stop(self) -> LoadReport:
        """End the load; all that was ever written was fetched then, and everything judged."""
        self._stop.set()
        assert self._connection.poll(STOP_TIMEOUT_S), "the clients do not end"
        report: LoadReport = self._connection.recv()
        self._process.join(STOP_TIMEOUT_S)
        return report


def _drive(target: str, collection: str, shape: LoadShape, stop: Any, connection: Any) -> None:
    clients = _Clients(target, collection, shape, stop)
    threads = [threading.Thread(target=work) for work in (clients.search_on, clients.write_on, clients.fetch_on)]
    for thread in threads:
        thread.start()
    while not (clients.searched and clients.fetched and clients.points.writes) and not clients.failures:
        time.sleep(0.01)
    connection.send(clients.failures)
    for thread in threads:
        thread.join()
    clients.fetch_everything()
    connection.send(clients.judged())


@dataclass(frozen=True)
class _Kept:
    """A request and its answer, as it came."""

    sent: float
    ended: float
    asked: Any
    body: bytes


class _Clients:
    def __init__(self, target: str, collection: str, shape: LoadShape, stop: Any) -> None:
        self._address = target.removeprefix("http://")
        self._path = f"/v1/collections/{collection}/points"
        self._shape = shape
        self._stop = stop
        self.points = shape.acknowledged()
        random = np.random.default_rng([shape.seed, 1])
        self._queries = [self.points.query(random) for _ in range(PREPARED)]
        more = {"k": K, "timeout_ms": PATIENT_MS}
        self._bodies = [json.dumps({"vector": q[0].tolist(), **more}).encode() for q in self._queries]
        self.searched: list[_Kept] = []
        self.fetched: list[_Kept] = []
        self._report = LoadReport()
        self._connections = threading.local()

    @property
    def failures(self) -> list[Failure]:
        return self._report.failed + self._report.retried

    def _post(self, verb: str, body: bytes) -> tuple[int, bytes]:
        """(status, body); status 0 where there was no answer."""
        connection = getattr(self._connections, "kept", None) or HTTPConnection(self._address, timeout=60)
        self._connections.kept = connection
        try:
            connection.request("POST", f"{self._path}:{verb}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException) as error:
            connection.close()
            return 0, repr(error).encode()

    def _ticks(self, per_second: float) -> Iterator[int]:
        """Numbers, so many a second, until it is over; while an answer is waited for none is due."""
        due, number = time.monotonic(), 0
        while not self._stop.is_set():
            yield number
            number, due = number + 1, max(due + 1.0 / per_second, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def search_on(self) -> None:
        for number in self._ticks(self._shape.searches_per_s):
            sent = time.monotonic()
            status, body = self._post("search", self._bodies[number % PREPARED])
            self._keep(self.searched, status, _Kept(sent, time.monotonic(), number % PREPARED, body))

    def _keep(self, kept: list[_Kept], status: int, answer: _Kept) -> None:
        if status == 200:
            kept.append(answer)
        else:
            self._report.failed.append(_failure(answer.sent, status, answer.body))

    def fetch_on(self) -> None:
        random = np.random.default_rng([self._shape.seed, 2])
        for _ in self._ticks(self._shape.fetches_per_s):
            self._fetch(random.choice(self.points.every_id(), FETCHED, replace=False).tolist())

    def _fetch(self, ids: list[int]) -> None:
        sent = time.monotonic()
        body = {"ids": ids, "with_vectors": True}
        status, answer = self._post("fetch", json.dumps(body).encode())
        self._keep(self.fetched, status, _Kept(sent, time.monotonic(), ids, answer))

    def fetch_everything(self) -> None:
        ids = self.points.every_id()
        for start in range(0, len(ids), 1_000):
            self._fetch(ids[start : start + 1_000])

    def write_on(self) -> None:
        random = np.random.default_rng([self._shape.seed, 3])
        for _ in self._ticks(self._shape.writes_per_s):
            ids = random.choice(self._shape.points * 3 // 2, IDS_PER_WRITE, replace=False).tolist()
            self._write(self.points.begin(ids, deletes=random.random() < DELETED_SHARE))

    def _write(self, writing: Writing) -> None:
        """Until it is acknowledged: sending the same again is safe."""
        verb, body = "delete", {"ids": writing.ids, "timeout_ms": PATIENT_MS}
        if not writing.deletes:
            states = zip(writing.states.items(), self.points.vectors_of(writing).tolist(), strict=True)
            points = [{"id": i, "vector": v, "attributes": {"version": s.version}} for (i, s), v in states]
            verb, body = "upsert", {"points": points, "timeout_ms": PATIENT_MS}
        encoded = json.dumps(body).encode()
        while True:
            status, answer = self._post(verb, encoded)
            if status == 200:
                lsn = {int(shard): number for shard, number in json.loads(answer)["lsn"].items()}
                self.points.acknowledge(writing, lsn)
                return
            self._report.retried.append(_failure(time.monotonic(), status, answer))
            time.sleep(RETRY_S)

    # --- afterwards -----------------------------------------------------------------------------------------------

    def judged(self) -> LoadReport:
        report = self._report
        report.writes, report.fetches = self.points.writes, len(self.fetched)
        report.live = len(self.points.live_ids())
        replay = self.points.replay()
        for number, kept in enumerate(self.searched):
            answer = json.loads(kept.body)
            (hits,) = answer["results"]
            ids, query = [hit["id"] for hit in hits], self._queries[kept.asked]
            scores = [hit["score"] for hit in hits]
            wrong = self.points.wrong_hits(query, ids, scores, K, kept.sent, kept.ended)
            if wrong or answer["coverage"]["shards"] != 1.0:
                report.wrong.append(f"at {kept.sent:.2f}, generation {answer['generation']}: {wrong or answer}")
            found = None
            if number % JUDGED_EVERY == 0:
                truth = replay.nearest(query, K, kept.sent)
                found = self.points.recall(query, ids, scores, truth, kept.sent, kept.ended)
            report.answers.append(Answer(kept.sent, kept.ended - kept.sent, answer["generation"], found))
        for kept in self.fetched:
            report.wrong += self._wrong_points(kept)
        return report

    def _wrong_points(self, kept: _Kept) -> list[str]:
        points = {point["id"]: point for point in json.loads(kept.body)["points"]}
        wrong = []
        for point_id in kept.asked:
            point = points.get(point_id)
            version, vector = (None, None) if point is None else (point["attributes"]["version"], point["vector"])
            told = self.points.wrong_point(point_id, vector, version, kept.sent, kept.ended)
            if told:
                wrong.append(f"fetched at {kept.sent:.2f}: {told}")
        return wrong


def _failure(sent: float, status: int, body: bytes) -> Failure:
    return Failure(sent, f"{status} {body[:400].decode(errors='replace')}")
