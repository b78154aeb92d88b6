"""Every job that changes generations, on a real Eagleray that is searched and written to all the time, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray.job_load import JobLoad, LoadReport, LoadShape
from tests.ray.server import RunningServer, wait_until

pytestmark = pytest.mark.ray
COLLECTION = "loaded"
SHAPE = LoadShape()
TARGET = 0.95
QUIET_S = 3.0  # of searches, fetches and writes without a job
JOBS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rebuild", {"kind": "rebuild"}),
    ("1 to 3", {"kind": "rebuild", "shards": 3}),
    ("rollback", {"kind": "rollback"}),
    ("compact", {"kind": "compact"}),
)
GENERATIONS = 3  # that they make


@pytest.fixture(scope="module")
def server(eagleray: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    index = {"kind": "hnsw", "target_recall": TARGET}
    SHAPE.import_into(eagleray.client, COLLECTION, tmp_path_factory.mktemp("points") / "points.parquet", index=index)
    yield eagleray
    eagleray.client.call("DELETE", f"/v1/collections/{COLLECTION}")


def test_jobs_under_load_fail_no_search_and_lose_no_write(server: RunningServer) -> None:
    load = JobLoad(server.target, COLLECTION, SHAPE)
    load.start()
    generation = server.client.collection(COLLECTION)["generation"]
    started = time.monotonic()
    time.sleep(QUIET_S)
    phases = {"before": (started, time.monotonic())}
    for name, body in JOBS:
        started = time.monotonic()
        status = server.client.run_job(COLLECTION, body, lambda status: None)
        phases[name] = (started, time.monotonic())
        assert status["report"].get("served", True), status
    report = load.stop()
    tell(report, phases)
    assert report.wrong == []
    assert report.failed == []
    for name, times in phases.items():
        assert report.recall(*times) >= TARGET - 0.02, name
    assert {answer.generation for answer in report.answers} == set(range(generation, generation + GENERATIONS + 1))
    wait_until(  # a status is some seconds old
        lambda: server.client.collection(COLLECTION)["points"] == report.live, f"{report.live} points are told"
    )


def tell(report: LoadReport, phases: dict[str, tuple[float, float]]) -> None:
    for name, (start, stop) in phases.items():
        times = ", ".join(f"p{percent} {report.p_ms(percent, start, stop):.1f} ms" for percent in (50, 99))
        count, recall = len(report.between(start, stop)), report.recall(start, stop)
        print(f"{name}: {stop - start:.1f} s, {count} searches, {times}, recall {recall:.3f}")
    print(f"{report.writes} writes, {len(report.retried)} sent again, {report.fetches} fetches")
