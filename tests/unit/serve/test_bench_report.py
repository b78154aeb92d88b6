"""What a bench tells of the loads it measured: tables, JSON, and the picture."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import Invalid
from serve.bench_picture import check_picture, draw_picture, fastest_lines, load_lines
from serve.bench_plan import BenchPlan, Shape
from serve.bench_queries import Queries
from serve.bench_report import as_json, print_report
from serve.bench_run import BenchReport, Recall, Row
from serve.load import CLOSED, LoadReport

ONE, TWO = "http://one:1", "http://two:2"
SLOW, FAST, OPEN = Shape("json", 1, 1), Shape("json", 1, 8), Shape("json", 1, 32, 500.0)
POINTS = ({"ef_search": 16}, {"ef_search": 64})


def load(per_second: int, latency_s: float, failures: dict[int, int] | None = None, unanswered: int = 0) -> LoadReport:
    """Of two seconds, all answers alike."""
    count = 2 * per_second
    return LoadReport(2.0, count, [latency_s] * count, failures or {}, unanswered, sent=count, cpu_s=count * 2e-5)


def report(targets: tuple[str, ...] = (ONE,), shapes: tuple[Shape, ...] = (SLOW, FAST, OPEN)) -> BenchReport:
    """The second target is twice as fast, a larger ef_search half as fast."""
    plan = BenchPlan(targets, "words", 10, POINTS, shapes, (Shape("json", 256, 64),), 2.0, 0.5, 3)
    recalls = [Recall(target, params, params["ef_search"] / 100, "truth") for target in targets for params in POINTS]
    rows = []
    for params in POINTS:
        for shape in shapes:
            for target in targets:
                rate = shape.connections * 20 * (2 if target == TWO else 1) * 16 // params["ef_search"]
                rounds = [
                    load(rate, 0.001),
                    load(rate + 10, 0.002, {429: 3, 503: 1}),
                    load(rate - 2, 0.009, {CLOSED: 2}, 4),
                ]
                rows.append(Row(target, params, shape, rounds))
    return BenchReport(plan, Queries("queries.parquet", np.zeros((7, 2), np.float32)), recalls, rows)


def test_json_has_medians_failures_and_recall() -> None:
    told = json.loads(json.dumps(as_json(report())))
    assert told["operating_points"][1] == {
        "target": ONE, "params": {"ef_search": 64}, "recall": 0.64, "against": "truth",
    }  # fmt: skip
    first = told["loads"][0]
    assert (first["loop"], first["format"], first["batch"], first["connections"]) == ("closed", "json", 1, 1)
    assert (first["requests_per_s"], first["vectors_per_s"]) == (20.0, 20.0)
    assert (first["p50_ms"], first["p99_ms"]) == (2.0, None)  # 36 answers have no 99th percentile
    assert (first["refused"], first["unanswered"]) == (3, 4)
    assert first["failures"] == {"503": 1, "connection closed": 2}
    assert first["answered"] == 136
    assert first["generator_us"] == pytest.approx(20.0)
    assert told["loads"][2]["rate"] == 500.0
    assert told["loads"][2]["p99_ms"] == 2.0
    assert told["ratios"] == []
    assert told["left_out"] == ["json, 256 a request, 64 connections"]


def test_json_of_two_targets_has_the_ratios_of_their_medians() -> None:
    [first, *_] = as_json(report((ONE, TWO)))["ratios"]
    assert first["params"] == {"ef_search": 16}
    assert first["requests_per_s"] == 2.0
    assert first["p50_ms"] == 1.0
    assert first["p99_ms"] is None


def shown(told: BenchReport, width: int = 80) -> str:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as capture:
        print_report(console, told)
    return capture.get()


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row of a table; cells hold no two spaces."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if re.search(r"\S  +\S", line)]


def test_tables_show_loads_failures_and_what_was_left_out() -> None:
    text = shown(report())
    assert "recall@10 0.6400 at ef_search 64, against truth" in text
    assert "searches of words, k 10: json, 1 a request, open loops on at most 32" in text
    assert text.splitlines()[3] == "ef_search 16"  # a table for each operating point
    heads, _, _, opened = rows_of(text)[:4]
    assert heads == ["load", "vectors/s", "p50 ms", "p99", "p99.9", "refused", "failed"]
    assert opened == ["500/s", "640", "2.00", "2.00", "2.00", "3", "7"]
    told = " ".join(text.split())
    failed = "2 x connection closed, 1 x 503, 4 unanswered"
    assert f"failed: ef_search 16: json, 1 a request, 32 connections, 500 vectors/s: {failed}" in told
    assert "left out: json, 256 a request, 64 connections: 16,384 vectors at one time" in told
    assert "ratios" not in text


def test_tables_of_two_targets_show_ratios() -> None:
    text = shown(report((ONE, TWO)))
    assert f"{TWO} over {ONE}: ratios of medians" in text
    assert f"{TWO}: recall@10 0.1600 at ef_search 16" in text
    ratios = rows_of(text.split("ratios of medians")[1])
    assert ratios[0] == ["load", "vectors/s", "p50", "p99", "p99.9"]
    assert ratios[3] == ["500/s", "2.00", "1.00", "1.00", "1.00"]


def test_operating_points_of_one_load_are_rows_of_one_table() -> None:
    heads, *rows = rows_of(shown(report(shapes=(FAST,))))
    assert heads[:2] == ["ef_search", "vectors/s"]
    assert [row[:2] for row in rows] == [["16", "160"], ["64", "40"]]


def test_load_that_nothing_failed_at_has_no_columns_of_failures() -> None:
    told = report(shapes=(SLOW, FAST))
    for row in told.rows:
        row.rounds[:] = [load(10, 0.001)]
    text = shown(told)
    assert "nothing was refused, nothing failed" in text
    assert rows_of(text)[0] == ["load", "vectors/s", "p50 ms", "p99", "p99.9"]


def degraded_report() -> BenchReport:
    """Of the first load 7 answers, and 2 of those that the first recall was measured by."""
    told = report(shapes=(SLOW, FAST))
    told.rows[0].rounds[0].degraded, told.rows[0].rounds[2].degraded = 3, 4
    told.recalls[0] = replace(told.recalls[0], answers=20, degraded=2)
    return told


def test_degraded_answers_are_told_where_there_are_some(tmp_path: Path) -> None:
    whole = as_json(report(shapes=(SLOW, FAST)))
    assert not any("degraded" in each for each in (*whole["loads"], *whole["operating_points"]))
    assert "degraded" not in shown(report())
    told = as_json(degraded_report())
    assert [load.get("degraded") for load in told["loads"]] == [7, None, None, None]
    assert [point.get("degraded") for point in told["operating_points"]] == [2, None]
    text = " ".join(shown(degraded_report()).split())
    assert "against truth; degraded: a CPU gave 2 of 20 answers recall@10" in text
    answered = sum(row.answered for row in degraded_report().rows)
    assert f"degraded: a CPU gave 7 of {answered:,} answers in a GPU's place" in text
    heads, first, second, *_ = rows_of(shown(degraded_report()))
    assert [cells[-1] for cells in (heads, first, second)] == ["degraded", "7", "0"]
    draw_picture(degraded_report(), tmp_path / "out.svg")
    assert f"a CPU gave 7 of {answered:,} answers" in (tmp_path / "out.svg").read_text()


def large_report() -> BenchReport:
    """Every column, and numbers as long as they may be on a large machine."""
    formats = [("json", 1, 1), ("arrow", 4_096, 1_024)]
    shapes = [Shape(*each, rate) for each in formats for rate in (None, 1_250_000.0)]
    told = report((ONE, TWO), tuple(shapes))
    for row in told.rows:
        completed, failures = 1_234_567 // row.shape.batch, {429: 12_345, 500: 1_234}
        row.rounds[:] = [LoadReport(1.0, completed, [12.3456] * 1_000, failures, 99)]
    return told


def test_tables_fit_80_columns() -> None:
    text = shown(large_report())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert ["arrow", "4,096", "1,250,000/s", "1,232,896", "12,346", "12,346", "12,346", "12,345", "1,333"] in rows_of(
        text
    )


@pytest.mark.parametrize("width", [20, 60, 79])
def test_narrow_terminal_cuts_no_number_short(width: int) -> None:
    assert rows_of(shown(report(), width))[:8] == rows_of(shown(report(), 200))[:8]
    assert "…" not in shown(large_report(), width)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.001234, "1.23"), (0.09999, "99.99"), (0.099999, "100.0"), (0.99999, "1,000"), (12, "12,000")],
)
def test_latencies_have_the_digits_that_matter(seconds: float, text: str) -> None:
    told = report(shapes=(SLOW, FAST))
    for row in told.rows:
        row.rounds[:] = [load(10, seconds)]
    assert rows_of(shown(told))[1][2] == text


def test_picture_shows_recall_of_the_fastest_shape_and_latency_of_every_load(tmp_path: Path) -> None:
    told = report((ONE, TWO))
    lines = fastest_lines(told)
    assert list(lines) == [f"{ONE}: {FAST}", f"{TWO}: {FAST}"]
    assert [row.params["ef_search"] for row in lines[f"{TWO}: {FAST}"]] == [64, 16]  # by throughput
    assert [row.shape for row in load_lines(told)[f"{ONE}: closed loop, json, 1 a request"]] == [SLOW, FAST]
    draw_picture(told, tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    for words in (
        "recall over throughput",
        "latency over load",
        "ef_search 64",
        f"{TWO}: open loop, json, 1 a request",
    ):
        assert words in text


def test_picture_of_open_loops_alone_has_no_recall_line(tmp_path: Path) -> None:
    told = report(shapes=(OPEN,))
    assert fastest_lines(told) == {}
    draw_picture(told, tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert "open loop, json" in text
    assert "degraded" not in text


def test_picture_that_could_not_be_drawn_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Invalid, match=r"picture: must be the name of an \.svg file, not 'out\.png'"):
        check_picture(tmp_path / "out.png")
    with pytest.raises(Invalid, match="picture: there is no folder"):
        check_picture(tmp_path / "missing" / "out.svg")
    check_picture(tmp_path / "out.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Invalid, match=r"picture: needs matplotlib: pip install 'eagleray\[bench\]'"):
        check_picture(tmp_path / "out.svg")
