"""What the benchmark programs make of what they measured; the measuring itself needs a quiet machine and no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import http_vs_faiss, peers, speed_guard
from benchmarks.faiss_base import FaissRound, build_by_hand, measure_by_hand
from benchmarks.peer_servers import Peer, _chroma_body, _chroma_ids
from benchmarks.vector_sets import K, VectorSet, make_clusters, make_images, read_vectors, recall
from serve.bench_plan import Shape
from serve.load import LoadReport


def load(per_second: float, p50_s: float, p99_s: float, refused: int = 0) -> LoadReport:
    latencies_s = [p50_s] * 98 + [p99_s] * 2
    failures = {429: refused} if refused else {}
    return LoadReport(1.0, int(per_second), latencies_s, failures, lags_s=[0.0015], queued=refused // 4)


def measured(**rates: float) -> http_vs_faiss.Measured:
    """A round in which FAISS answers 1,000 a second; loads as the bars ask, unless a rate is given by name."""
    reached = {"arrow_1": 250, "arrow_8": 400, "arrow_64": 500, "arrow_256": 500, "json_64": 400, "arrow_256_1": 900}
    told = http_vs_faiss.Measured()
    told.files.append(FaissRound(1_000.0, 0.1, 0.2, np.zeros((2, K), int)))
    told.by_hand.append(FaissRound(2_000.0, 0.1, 0.2, np.zeros((2, K), int)))
    for shape, loads in told.loads.items():
        name = f"{shape.format}_{shape.connections}" if shape.batch == 1 else f"arrow_{shape.batch}_{shape.connections}"
        loads.append(load((reached | rates).get(name, 100) / shape.batch, 0.0005, 0.002))
    told.overloads.append(load(500, 0.001, rates.get("overload_p99_s", 0.003), refused=100))
    return told


def bars(told: http_vs_faiss.Measured) -> dict[str, list[str]]:
    vectors = VectorSet(Path("x"), np.zeros((2, 3)), np.zeros((2, K), int), "l2", "two points")
    report = http_vs_faiss.report_of(told, "hnsw", vectors, 16, np.zeros((2, K), int))
    assert json.loads(json.dumps(report)) == report
    text = http_vs_faiss.as_markdown(report)
    assert "| arrow, 1 a request, 64 connections | 500 | 0.500 | 0.250 | 0.50 | 2.00 | 0 |" in text
    assert (
        "50.0% refused, 0 other failures; the generator was 1.5 ms late (p99), and had no connection free for 12.5%"
        in text
    )
    return {line[0]: line[1:] for line in report["bars"]}


def test_bars_are_met_by_what_they_ask() -> None:
    told = bars(measured(arrow_256_1=256 * 4))
    assert {line[-1] for line in told.values()} == {"yes"}
    assert told["JSON / Arrow, singles, 64 connections"] == [">= 0.7", "0.80", "yes"]
    assert told["Arrow, singles, 1 connection, p50 beyond FAISS's, ms"] == ["< 0.5", "0.40", "yes"]
    assert told["2 x the reached rate: p99 / p99 at 256 connections"] == ["< 2", "1.50", "yes"]


@pytest.mark.parametrize(
    ("rates", "missed"),
    [
        ({"arrow_256_1": 256 * 3}, "Arrow, batches of 256, of FAISS (the better of 1 and 4 connections)"),
        ({"arrow_8": 170}, "Arrow, singles, 8 connections, of FAISS in batches"),
        ({"json_64": 300}, "JSON / Arrow, singles, 64 connections"),
        ({"arrow_256": 400}, "Arrow, singles, 256 connections / 64"),
        ({"overload_p99_s": 0.005}, "2 x the reached rate: p99 / p99 at 256 connections"),
    ],
)
def test_missed_bar_is_told(rates: dict[str, float], missed: str) -> None:
    told = bars(measured(**({"arrow_256_1": 256 * 4} | rates)))
    assert [name for name, line in told.items() if line[-1] == "no"] == [missed]


def test_peers_are_compared_with_the_first_by_load() -> None:
    def peer(name: str) -> Peer:
        return Peer(name, f"{name} at 7", "http://h:1", "/", _chroma_body, _chroma_ids, {})

    both = [peers.Measured(peer("one"), 0.99), peers.Measured(peer("two"), 0.98)]
    for each, rate, refused in ((both[0], 200, 0), (both[1], 100, 5)):
        for (_, batch), loads in each.loads.items():
            loads += [load(rate, 0.001 * batch, 0.002 * batch, refused)] * 2
    vectors = VectorSet(Path("x"), np.zeros((2, 3)), np.zeros((2, K), int), "l2", "two points")
    text = peers.as_markdown(peers.report_of(both, vectors, 12_345.6, 16))
    lines = text.splitlines()
    assert "12,346 vectors/s" in lines[0]
    [one, two] = [line for line in lines if line.startswith(("| one", "| two"))]
    assert one.startswith("| one | 0.9900 | 200 (1.00) 1.00 / 2.0 |")
    assert two.startswith("| two | 0.9800 | 100 (0.50) 1.00 / 2.0, 10 failed |")
    assert two.endswith("| 25,600 (0.50) 256.00 / 512.0, 10 failed |")
    assert lines[-1] == "- two: two at 7"


def test_chroma_is_asked_and_read_in_its_own_words() -> None:
    asked = json.loads(_chroma_body(np.ones((2, 3), np.float32)))
    assert asked == {"query_embeddings": [[1.0] * 3] * 2, "n_results": K, "include": ["distances"]}
    assert _chroma_ids(b'{"ids": [["3", "1"], ["2", "0"]], "distances": []}', 2) == [[3, 1], [2, 0]]


def test_loss_of_more_than_a_quarter_is_told() -> None:
    recorded = {"singles": 0.2, "batches": 0.8}
    assert speed_guard.losses({"singles": 0.151, "batches": 0.61}, recorded) == []
    assert speed_guard.losses({"singles": 0.149, "batches": 0.9}, recorded) == [
        "singles: 0.149 of FAISS in process, recorded 0.200"
    ]


def test_recorded_ratios_are_of_the_loads_that_are_measured() -> None:
    recorded = speed_guard.read_recorded()
    assert recorded.keys() == speed_guard.LOADS.keys()
    assert all(ratio > 0 for ratio in recorded.values())


@pytest.mark.parametrize(("make", "metric", "dimension"), [(make_images, "l2", 784), (make_clusters, "cosine", 128)])
def test_made_vectors_are_the_same_every_time_and_have_their_true_neighbours(
    tmp_path: Path, make: Any, metric: str, dimension: int
) -> None:
    first, again = (make(tmp_path, count=1_500, asked=20) for _ in range(2))
    points, ids = first.points()
    assert (points.shape, first.queries.shape, first.metric) == ((1_500, dimension), (20, dimension), metric)
    assert first.queries.tolist() == again.queries.tolist()
    nearest = np.argsort(((first.queries[:, None] - points[None]) ** 2).sum(axis=2), axis=1)[:, :K]
    assert recall(ids[nearest], first.truth) >= 0.99  # ties and rounding


def test_read_vectors_are_those_of_the_files(tmp_path: Path) -> None:
    made = make_images(tmp_path, count=300, asked=5)
    table = pq.read_table(made.parquet).slice(0, 5)
    pq.write_table(table.append_column("exact_ids", [made.truth.tolist()]), tmp_path / "queries.parquet")
    found = read_vectors(made.parquet, tmp_path / "queries.parquet", "l2")
    assert found.truth.tolist() == made.truth.tolist()
    assert found.queries.shape == (5, 784)


def test_faiss_by_hand_takes_the_least_ef_search_that_reaches_the_recall(tmp_path: Path) -> None:
    vectors = make_images(tmp_path, count=2_000, asked=50)
    index = tmp_path / "index.faiss"
    ef_search = build_by_hand(vectors, 0.9, index)
    found = measure_by_hand(index, ef_search, vectors.queries, seconds=0.01)
    assert recall(found.ids, vectors.truth) >= 0.9
    assert found.per_second > 0
    with pytest.raises(SystemExit, match=r"does not reach recall 1\.1"):
        build_by_hand(vectors, 1.1, index)


def test_load_shapes_of_the_benchmark_hold_what_the_bars_need() -> None:
    assert {
        Shape("arrow", 1, 256),
        Shape("json", 1, 64),
        Shape("arrow", 256, 4),
    } <= http_vs_faiss.Measured().loads.keys()
