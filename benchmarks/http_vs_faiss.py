"""FAISS in process against the served endpoint: same data, index files, parameters and threads, in one run.

    python -m benchmarks.http_vs_faiss [--vectors images] [--data FILE --queries FILE --metric l2] [--shards 1]

Without files the vectors are made in code. Each round measures FAISS on the served files, FAISS built by hand (HNSW32
over plain vectors) and every load shape in turn, and an open loop of twice the rate that the endpoint reached; the
table shows medians over the rounds, and ratios to FAISS's medians. Both search with the cheapest efSearch that reaches
the recall on these queries; with --tuned the endpoint takes what its import tuned.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.faiss_base import BATCH, FaissRound, build_by_hand, measure_by_hand, measure_served_files
from benchmarks.served import (
    COLLECTION,
    Served,
    cheapest_params,
    import_file,
    index_text,
    machine,
    served_eagleray,
    served_ids,
)
from benchmarks.vector_sets import MADE, K, VectorSet, read_vectors, recall
from serve.bench_plan import Shape
from serve.bench_queries import search_requests
from serve.load import REFUSED, LoadReport, in_child, run_closed_loop, run_open_loop

CONNECTIONS = (1, 8, 64, 256)
SINGLES = tuple(Shape(wire, 1, connections) for wire in ("json", "arrow") for connections in CONNECTIONS)
BATCHES = tuple(Shape("arrow", BATCH, connections) for connections in (1, 4))
SATURATING = Shape("arrow", 1, 256)
OVERLOAD, OVERLOAD_CONNECTIONS = 2.0, 1_024  # times the rate reached; far more than the endpoint lets in at one time
WARM_UP_S, OVERLOAD_WARM_UP_S = 0.5, 1.0  # under overload HAProxy first opens its connections to the endpoint


@dataclass
class Measured:
    """Rounds of everything that is compared."""

    files: list[FaissRound] = field(default_factory=list)
    by_hand: list[FaissRound] = field(default_factory=list)
    loads: dict[Shape, list[LoadReport]] = field(default_factory=lambda: {shape: [] for shape in (*SINGLES, *BATCHES)})
    overloads: list[LoadReport] = field(default_factory=list)


def main(
    vectors: Annotated[str, typer.Option(help=f"Made in code: {' or '.join(MADE)}.")] = "images",
    data: Annotated[Path | None, typer.Option(help="Parquet with id and vector columns.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Parquet with vector and exact_ids columns.")] = None,
    metric: Annotated[str, typer.Option(help="Of those files: l2, cosine or ip.")] = "l2",
    target_recall: Annotated[float, typer.Option(help="Recall@10 that the index and FAISS by hand must reach.")] = 0.98,
    tuned: Annotated[bool, typer.Option(help="Search with what the import tuned.")] = False,
    shards: int = 1,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each load in a round.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    if (data is None) != (queries is None) or vectors not in MADE:
        raise SystemExit(f"give both --data and --queries or neither, and --vectors of {', '.join(MADE)}")
    with tempfile.TemporaryDirectory(prefix="eagleray-vectors-") as folder, served_eagleray() as served:
        chosen = read_vectors(data, queries, metric) if data and queries else MADE[vectors](Path(folder))
        described = import_file(served.client, chosen.parquet, chosen.metric, shards, {"target_recall": target_recall})
        params = {} if tuned else cheapest_params(served.client, described, chosen, target_recall)
        hand = Path(folder) / "by_hand.faiss"
        ef_search = in_child(build_by_hand, chosen, target_recall, hand)
        measured = Measured()
        for _ in range(rounds):
            measure_round(measured, served, described, params, chosen, (hand, ef_search), seconds)
        found = served_ids(served.client, chosen.queries, params)
    report = report_of(measured, index_text(described, params), chosen, ef_search, found)
    print(json.dumps(report) if as_json else as_markdown(report))


def measure_round(
    measured: Measured,
    served: Served,
    described: dict[str, Any],
    params: dict[str, int],
    vectors: VectorSet,
    by_hand: tuple[Path, int],
    seconds: float,
) -> None:
    measured.files.append(in_child(measure_served_files, served.data, described, params, vectors.queries, seconds))
    measured.by_hand.append(in_child(measure_by_hand, *by_hand, vectors.queries, seconds))
    kept: dict[tuple[str, int], list[bytes]] = {}
    for shape, loads in measured.loads.items():
        requests = kept.setdefault((shape.format, shape.batch), [])
        if not requests:
            form = (shape.format, shape.batch, {"k": K}, params)
            requests += search_requests(served.target, COLLECTION, vectors.queries, *form)
        loads.append(in_child(run_closed_loop, served.target, requests, shape.connections, seconds, WARM_UP_S))
    reached = measured.loads[SATURATING][-1].per_second
    rate, requests = max(1.0, OVERLOAD * reached), kept[SATURATING.format, SATURATING.batch]
    overload = in_child(run_open_loop, served.target, requests, OVERLOAD_CONNECTIONS, rate, seconds, OVERLOAD_WARM_UP_S)
    measured.overloads.append(overload)


def report_of(measured: Measured, index: str, vectors: VectorSet, ef_search: int, found: Any) -> dict[str, Any]:
    bases = [faiss_numbers(measured.files), faiss_numbers(measured.by_hand)]
    rows = {shape: row_of(shape, loads, bases) for shape, loads in measured.loads.items()}
    overload = overload_of(measured)
    ids = measured.files[0].ids
    return {
        "machine": machine(),
        "data": vectors.name,
        "index": index,
        "by_hand": f"HNSW32 over plain vectors, efSearch {ef_search}, 2 threads",
        "recall_faiss": recall(ids, vectors.truth),
        "recall_served": recall(found, vectors.truth),
        "same_answers": float((np.sort(found, 1) == np.sort(ids, 1)).all(axis=1).mean()),
        "faiss": bases[0],
        "faiss_by_hand": bases[1],
        "rows": list(rows.values()),
        "overload": overload,
        "bars": bars_of(rows, bases[0], overload),
    }


def faiss_numbers(rounds: list[FaissRound]) -> dict[str, float]:
    names = ("per_second", "p50_ms", "p99_ms")
    return {name: float(np.median([getattr(each, name) for each in rounds])) for name in names}


def row_of(shape: Shape, loads: list[LoadReport], bases: list[dict[str, float]]) -> dict[str, Any]:
    rate = float(np.median([load.per_second for load in loads])) * shape.batch
    p50_ms, p99_ms = (float(np.median([load.percentile_ms(percent) for load in loads])) for percent in (50, 99))
    return {
        "load": str(shape),
        "vectors_per_second": rate,
        "ratio": rate / bases[0]["per_second"],
        "ratio_by_hand": rate / bases[1]["per_second"],
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "failures": sum(sum(load.failures.values()) + load.unanswered for load in loads),
    }


def overload_of(measured: Measured) -> dict[str, float]:
    """Medians over the rounds; the answered p99 over that of the saturating closed loop just before.

    What the generator itself is late, and the requests for which it had no connection left, are told apart: both are
    in the latencies.
    """
    pairs = list(zip(measured.overloads, measured.loads[SATURATING], strict=True))
    asked = [len(load.latencies_s) + sum(load.failures.values()) + load.unanswered for load, _ in pairs]
    refused = [load.failures.get(REFUSED, 0) for load, _ in pairs]
    others = sum(sum(load.failures.values()) + load.unanswered for load, _ in pairs) - sum(refused)
    return {
        "answered_per_second": float(np.median([load.per_second for load, _ in pairs])),
        "p99_ms": float(np.median([load.percentile_ms(99) for load, _ in pairs])),
        "p99_ratio": float(np.median([load.percentile_ms(99) / closed.percentile_ms(99) for load, closed in pairs])),
        "refused_share": sum(refused) / max(1, sum(asked)),
        "other_failures": others,
        "generator_lag_p99_ms": float(np.median([load.lag_ms(99) for load, _ in pairs])),
        "queued_share": sum(load.queued for load, _ in pairs) / max(1, sum(asked)),
    }


def bars_of(rows: dict[Shape, dict[str, Any]], faiss: dict[str, float], overload: dict[str, float]) -> list[list[str]]:
    """What is asked of the endpoint beside what it reached, and whether that is enough."""

    def single(connections: int, wire: str = "arrow") -> dict[str, Any]:
        return rows[Shape(wire, 1, connections)]

    batch = max(rows[shape]["ratio"] for shape in BATCHES)
    added_ms = single(1)["p50_ms"] - faiss["p50_ms"]
    to_binary = single(64, "json")["vectors_per_second"] / single(64)["vectors_per_second"]
    wide = single(256)["vectors_per_second"] / single(64)["vectors_per_second"]
    bars = [bar(f"Arrow, batches of {BATCH}, of FAISS (the better of 1 and 4 connections)", ">=", 0.85, batch)]
    for connections in (8, 64):
        row = single(connections)
        name = f"Arrow, singles, {connections} connections"
        bars.append(bar(f"{name}, of FAISS in batches", ">=", 0.18, row["ratio"]))
        bars.append(bar(f"{name}, p99 / p50", "<", 5.0, row["p99_ms"] / row["p50_ms"]))
    return [
        *bars,
        bar("Arrow, singles, 1 connection, p50 beyond FAISS's, ms", "<", 0.5, added_ms),
        bar("JSON / Arrow, singles, 64 connections", ">=", 0.7, to_binary),
        bar("Arrow, singles, 256 connections / 64", ">=", 1.0, wide),
        bar(f"{OVERLOAD:g} x the reached rate: p99 / p99 at 256 connections", "<", 2.0, overload["p99_ratio"]),
    ]


def bar(name: str, sign: str, bound: float, reached: float) -> list[str]:
    met = reached >= bound if sign == ">=" else reached < bound
    return [name, f"{sign} {bound:g}", f"{reached:.2f}", "yes" if met else "no"]


def as_markdown(report: dict[str, Any]) -> str:
    overload = report["overload"]
    return "\n".join(
        [
            f"{report['data']}; {report['index']}; {report['machine']}",
            f"recall@{K}: FAISS in process {report['recall_faiss']:.4f}, served {report['recall_served']:.4f}; "
            f"queries with the same ids: {report['same_answers']:.1%}",
            "",
            "| load | vectors/s | of FAISS | of FAISS by hand | p50 ms | p99 ms | failed |",
            "|---|---:|---:|---:|---:|---:|---:|",
            faiss_line(report, "faiss", f"FAISS on the served files, batches of {BATCH} (times: 1 vector)"),
            faiss_line(report, "faiss_by_hand", f"FAISS by hand: {report['by_hand']} (the same)"),
            *(
                f"| {row['load']} | {row['vectors_per_second']:,.0f} | {row['ratio']:.3f} | {row['ratio_by_hand']:.3f} "
                f"| {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['failures']} |"
                for row in report["rows"]
            ),
            "",
            f"{OVERLOAD:g} times the rate of {SATURATING}, open loop: {overload['answered_per_second']:,.0f} a second "
            f"answered, p99 {overload['p99_ms']:.1f} ms, {overload['refused_share']:.1%} refused, "
            f"{overload['other_failures']:,} other failures; the generator was {overload['generator_lag_p99_ms']:.1f} "
            f"ms late (p99), and had no connection free for {overload['queued_share']:.1%}",
            "",
            "| asked of the endpoint | bar | reached | met |",
            "|---|---:|---:|---|",
            *(f"| {' | '.join(line)} |" for line in report["bars"]),
        ]
    )


def faiss_line(report: dict[str, Any], which: str, name: str) -> str:
    numbers = report[which]
    ratios = [numbers["per_second"] / report[base]["per_second"] for base in ("faiss", "faiss_by_hand")]
    return (
        f"| {name} | {numbers['per_second']:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {numbers['p50_ms']:.2f} | "
        f"{numbers['p99_ms']:.2f} | 0 |"
    )


if __name__ == "__main__":
    typer.run(main)
