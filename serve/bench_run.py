"""Runs a bench plan: the recall of every operating point, then the loads, rounds and targets alternating."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import Exhausted, Invalid, Unavailable
from serve.bench_plan import BenchPlan, Shape
from serve.bench_queries import Ids, Queries, hits_of, recall, search_requests
from serve.client import Client
from serve.load import REFUSED, LoadReport, in_child, run_closed_loop, run_load, run_open_loop

RECALL_QUERIES = 1_000  # asked for the recall of one operating point
EXACT_QUERIES = 100  # of them where the endpoint's exact answers are the truth
RECALL_BATCH, RECALL_TIMEOUT_MS = 50, 30_000
REQUESTS_KEPT = 4
SETTLE_S, SETTLE_POLL_S = 20.0, 0.2
PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9}
Announce = Callable[[float, str], None]  # the share done, and what is measured now


@dataclass(frozen=True)
class Recall:
    """Recall@k of a target at an operating point, and what it was compared with.

    `degraded` of its `answers` were given by a CPU in a GPU's place.
    """

    target: str
    params: dict[str, float]
    recall: float
    against: str
    answers: int = 0
    degraded: int = 0


@dataclass
class Row:
    """One load on one target at one operating point, round after round."""

    target: str
    params: dict[str, float]
    shape: Shape
    rounds: list[LoadReport] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return float(np.median([load.per_second for load in self.rounds]))

    @property
    def vectors_per_s(self) -> float:
        return self.requests_per_s * self.shape.batch

    def percentile_ms(self, percent: float) -> float | None:
        """The median over the rounds; None where a round has too few answers to have such a percentile."""
        fewest = min(len(load.latencies_s) for load in self.rounds)
        if round(fewest * (100.0 - percent), 6) < 100.0:  # not even one answer lies above it
            return None
        return float(np.median([load.percentile_ms(percent) for load in self.rounds]))

    @property
    def refused(self) -> int:
        return sum(load.failures.get(REFUSED, 0) for load in self.rounds)

    @property
    def failures(self) -> dict[int, int]:
        """The others that were not answered with status 200, by status."""
        statuses = sorted({status for load in self.rounds for status in load.failures} - {REFUSED})
        return {status: sum(load.failures.get(status, 0) for load in self.rounds) for status in statuses}

    @property
    def unanswered(self) -> int:
        return sum(load.unanswered for load in self.rounds)

    @property
    def answered(self) -> int:
        return sum(len(load.latencies_s) for load in self.rounds)

    @property
    def degraded(self) -> int:
        """Answers of a CPU in a GPU's place."""
        return sum(load.degraded for load in self.rounds)

    @property
    def generator_us(self) -> float:
        """CPU of the load generator for a request, in microseconds."""
        return float(np.median([load.cpu_s / max(1, load.sent) for load in self.rounds]) * 1e6)


@dataclass(frozen=True)
class BenchReport:
    """Everything that a plan measured."""

    plan: BenchPlan
    queries: Queries
    recalls: list[Recall]
    rows: list[Row]


def run_bench(plan: BenchPlan, queries: Queries, announce: Announce) -> BenchReport:
    """Raises the endpoint's own error where it refuses a search of the plan."""
    for target in plan.targets:
        _try_searches(target, plan, queries, patience_s=0.0)
    recalls = [measure_recall(target, plan, queries, params) for target in plan.targets for params in plan.points]
    rows = [Row(target, params, shape) for params in plan.points for shape in plan.shapes for target in plan.targets]
    requests = _Requests(plan, queries)
    for number in range(plan.rounds):
        for index, row in enumerate(rows):
            announce((number * len(rows) + index) / (plan.rounds * len(rows)), str(row.shape))
            load = _measure(row, plan, requests.of(row))
            row.rounds.append(load)
            if load.failures or load.unanswered:
                _try_searches(row.target, plan, queries, SETTLE_S)  # what it left behind is not the next load's
    announce(1.0, "done")
    return BenchReport(plan, queries, recalls, rows)


def _try_searches(target: str, plan: BenchPlan, queries: Queries, patience_s: float) -> None:
    """One search at each operating point; an endpoint that is still busy with an earlier load gets some time."""
    give_up_s = time.monotonic() + patience_s
    with Client(target) as client:
        for params in plan.points:
            while True:
                try:
                    client.search(plan.collection, queries.vectors[:1], k=plan.k, params=params, **plan.search_options)
                except (Unavailable, Exhausted):
                    if time.monotonic() > give_up_s:
                        raise
                    time.sleep(SETTLE_POLL_S)
                else:
                    break


class _Requests:
    """The requests of a row; those of the last few rows are kept, since rows differ in connections only."""

    def __init__(self, plan: BenchPlan, queries: Queries) -> None:
        self._plan, self._queries = plan, queries
        self._kept: dict[tuple[Any, ...], list[bytes]] = {}

    def of(self, row: Row) -> list[bytes]:
        plan, shape = self._plan, row.shape
        key = (row.target, tuple(row.params.items()), shape.format, shape.batch)
        if key not in self._kept:
            while len(self._kept) >= REQUESTS_KEPT:
                del self._kept[next(iter(self._kept))]
            options = {"k": plan.k, **plan.search_options}
            self._kept[key] = search_requests(
                row.target, plan.collection, self._queries.vectors, shape.format, shape.batch, options, row.params
            )
        return self._kept[key]


def _measure(row: Row, plan: BenchPlan, requests: list[bytes]) -> LoadReport:
    shape = row.shape
    try:
        if shape.requests_per_s is None:
            return in_child(run_closed_loop, row.target, requests, shape.connections, plan.seconds, plan.warm_up_s)
        return in_child(
            run_open_loop, row.target, requests, shape.connections, shape.requests_per_s, plan.seconds, plan.warm_up_s
        )
    except ConnectionError as error:
        raise Unavailable(f"{row.target} was lost while it was measured ({shape}): {error}") from error


def measure_recall(target: str, plan: BenchPlan, queries: Queries, params: dict[str, float]) -> Recall:
    """Against the true neighbours where they are known, else against the endpoint's exact answers to a sample."""
    if queries.truth is not None:
        asked, truth = queries.vectors[:RECALL_QUERIES], queries.truth[:RECALL_QUERIES]
        against = f"the true neighbours of {len(asked):,} queries in {queries.name}"
        found = found_ids(target, plan, asked, params)
        _check_id_types(found.ids, truth)
    else:
        asked = queries.vectors[:EXACT_QUERIES]
        truth = found_ids(target, plan, asked, {}, exact=True).ids
        against = f"the endpoint's own exact answers to {len(asked):,} queries"
        found = found_ids(target, plan, asked, params)
    return Recall(target, params, recall(found.ids, truth), against, found.answers, found.degraded)


@dataclass
class Found:
    """The ids that an endpoint finds for each vector, in so many answers, of which a CPU gave some in a GPU's place."""

    ids: list[Ids] = field(default_factory=list)
    answers: int = 0
    degraded: int = 0


def found_ids(
    target: str, plan: BenchPlan, vectors: NDArray[np.float32], params: dict[str, float], exact: bool = False
) -> Found:
    """By batches of `RECALL_BATCH`."""
    options = {"k": plan.k, "timeout_ms": RECALL_TIMEOUT_MS, **plan.search_options}
    options |= {"exact": "true"} if exact else {}
    found = Found()
    full = len(vectors) - len(vectors) % RECALL_BATCH
    for part, batch in ((vectors[:full], RECALL_BATCH), (vectors[full:], len(vectors) - full)):
        if len(part):
            requests = search_requests(target, plan.collection, part, "arrow", batch, options, params)
            load = run_load(target, requests, 1, len(requests), keep=True)
            if load.failures:
                raise _error_of(load)
            found.ids += [ids for number in range(len(requests)) for ids in hits_of(load.bodies[number], batch)]
            found.answers += len(requests)
            found.degraded += load.degraded
    return found


def _error_of(load: LoadReport) -> Unavailable:
    status = min(load.failures)
    details = [json.loads(body).get("detail") for body in load.bodies.values() if body.startswith(b"{")]
    told = f": {details[0]}" if details else ""
    return Unavailable(f"searches for the recall were answered with status {status}{told}")


def _check_id_types(found: Sequence[Ids], truth: Sequence[Ids]) -> None:
    kinds = [{type(point_id).__name__ for ids in side for point_id in ids} for side in (found, truth)]
    if kinds[0] and kinds[1] and kinds[0] != kinds[1]:
        raise Invalid.at("data", f"the true neighbours are {kinds[1].pop()} ids, the collection has {kinds[0].pop()}")
