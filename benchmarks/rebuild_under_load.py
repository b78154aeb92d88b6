"""Latency of searches beside a rebuild: before and during, in turn, on one real Eagleray that is written to as well.

    python -m benchmarks.rebuild_under_load [--rounds 3] [--points 3000]

Needs nothing else on the machine. The load is that of tests/ray/one_eagleray/test_jobs_under_load.py.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.ray.job_load import JobLoad, LoadReport, LoadShape
from tests.ray.server import RunningServer

COLLECTION = "loaded"
BEFORE_S = 8.0  # of searches without a job, in each round
BAR = 3.0  # of p99 during a rebuild over p99 before
Span = tuple[float, float]


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    points: Annotated[int, typer.Option(min=100, help="In the collection, of 384 dimensions.")] = 3_000,
) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as name:
        server = RunningServer(Path(name) / "data")
        server.start()
        try:
            report, spans = measure(server, LoadShape(points=points), Path(name), rounds)
        finally:
            server.stop()
            server.client.close()
    print_table(report, spans)


def measure(
    server: RunningServer, shape: LoadShape, folder: Path, rounds: int
) -> tuple[LoadReport, list[tuple[Span, Span]]]:
    """What the clients saw, and of each round the times before and during its rebuild."""
    index = {"kind": "hnsw", "target_recall": 0.95}
    shape.import_into(server.client, COLLECTION, folder / "points.parquet", index=index)
    load = JobLoad(server.target, COLLECTION, shape)
    load.start()
    spans = []
    for _ in range(rounds):
        begun = time.monotonic()
        time.sleep(BEFORE_S)
        before = time.monotonic()
        server.client.run_job(COLLECTION, {"kind": "rebuild"}, lambda status: None)
        spans.append(((begun, before), (before, time.monotonic())))
    return load.stop(), spans


def print_table(report: LoadReport, spans: list[tuple[Span, Span]]) -> None:
    print("| before p50 | p99 ms | during p50 | p99 ms | p99 ratio |\n|---:|---:|---:|---:|---:|")
    ratios = []
    for before, during in spans:
        ratios.append(report.p_ms(99, *during) / report.p_ms(99, *before))
        numbers = [report.p_ms(percent, *span) for span in (before, during) for percent in (50, 99)]
        print("|" + "".join(f" {number:.1f} |" for number in (*numbers, ratios[-1])))
    ratio = statistics.median(ratios)
    print(f"\nmedian ratio {ratio:.2f} (bar {BAR:g}: {'met' if ratio < BAR else 'MISSED'})")
    print(
        f"{len(report.failed)} searches and fetches failed, {len(report.retried)} of {report.writes} writes sent again"
    )


if __name__ == "__main__":
    typer.run(main)
