"""What a bench measured, as JSON and as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.bench_plan import BenchPlan
from serve.bench_run import PERCENTILES, BenchReport, Row
from serve.explain import params_text
from serve.load import CLOSED

Json = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """A second target's medians over the first's, for one load; None where one of them is missing or zero."""

    base: Row
    other: Row

    def of(self, name: str) -> float | None:
        base, other = numbers_of(self.base)[name], numbers_of(self.other)[name]
        return other / base if base and other is not None else None


def numbers_of(row: Row) -> dict[str, float | None]:
    percentiles = {name: row.percentile_ms(percent) for name, percent in PERCENTILES.items()}
    return {"requests_per_s": row.requests_per_s, "vectors_per_s": row.vectors_per_s, **percentiles}


def ratios_of(report: BenchReport) -> Iterator[Ratio]:
    """Of every load, where two targets were measured: they lie side by side."""
    if len(report.plan.targets) == 2:
        for base, other in zip(report.rows[::2], report.rows[1::2], strict=True):
            yield Ratio(base, other)


def as_json(report: BenchReport) -> Json:
    plan = report.plan
    return {
        "collection": plan.collection,
        "targets": list(plan.targets),
        "k": plan.k,
        "queries": {"name": report.queries.name, "vectors": len(report.queries.vectors)},
        "seconds": plan.seconds,
        "warm_up_seconds": plan.warm_up_s,
        "rounds": plan.rounds,
        "load_generator": {"on": f"{os.cpu_count()} cores of this machine"},
        "operating_points": [
            {"target": each.target, "params": dict(each.params), "recall": each.recall, "against": each.against}
            for each in report.recalls
        ],
        "loads": [_load_json(row) for row in report.rows],
        "ratios": [_ratio_json(ratio) for ratio in ratios_of(report)],
        "left_out": [str(shape) for shape in plan.left_out],
    }


def _place(row: Row) -> Json:
    shape = row.shape
    return {
        "params": dict(row.params),
        "loop": shape.loop,
        "format": shape.format,
        "batch": shape.batch,
        "connections": shape.connections,
        "rate": shape.rate,
    }


def _load_json(row: Row) -> Json:
    return {
        "target": row.target,
        **_place(row),
        **numbers_of(row),
        "answered": row.answered,
        "refused": row.refused,
        "failures": {_status_text(status): count for status, count in row.failures.items()},
        "unanswered": row.unanswered,
        "generator_us": row.generator_us,
    }


def _ratio_json(ratio: Ratio) -> Json:
    return _place(ratio.base) | {name: ratio.of(name) for name in numbers_of(ratio.base)}


def _status_text(status: int) -> str:
    return "connection closed" if status == CLOSED else str(status)


def print_report(out: Console, report: BenchReport) -> None:
    plan = report.plan
    for each in report.recalls:
        at = params_text(each.params) or "the collection's own target"
        out.print(f"{_at(plan, each.target)}recall@{plan.k} {each.recall:.4f} at {at}, against {each.against}")
    out.print(_loads_table(report))
    if len(plan.targets) == 2:
        out.print(_ratios_table(report))
    times = f"{plan.rounds} x {plan.seconds:g} s, after {plan.warm_up_s:g} s unreported"
    out.print(f"each load: {times}; the load generator shares {os.cpu_count()} cores of this machine")
    for shape in plan.left_out:
        out.print(f"left out: {shape}: {shape.in_flight:,} vectors at one time (--in-flight allows more)")


def _at(plan: BenchPlan, target: str) -> str:
    return f"{target}: " if len(plan.targets) > 1 else ""


def _heads(report: BenchReport) -> list[str]:
    points = ["at"] if len(report.plan.points) > 1 else []
    return [*points, "load", "format", "batch", "connections"]


def _place_cells(report: BenchReport, row: Row) -> list[str]:
    shape = row.shape
    points = [params_text(row.params)] if len(report.plan.points) > 1 else []
    load = "closed" if shape.rate is None else f"{shape.rate:,g}/s"
    return [*points, load, shape.format, str(shape.batch), str(shape.connections)]


def _loads_table(report: BenchReport) -> Table:
    plan = report.plan
    targets = ["target"] if len(plan.targets) > 1 else []
    numbers = ["requests/s", "vectors/s", "p50 ms", "p90", "p99", "p99.9", "refused", "failed"]
    table = Table(*targets, *_heads(report), title=f"searches of {plan.collection}, k {plan.k}")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in report.rows:
        target = [row.target] if targets else []
        rates = [f"{row.requests_per_s:,.0f}", f"{row.vectors_per_s:,.0f}"]
        times = [_ms_text(row.percentile_ms(percent)) for percent in PERCENTILES.values()]
        table.add_row(*target, *_place_cells(report, row), *rates, *times, f"{row.refused:,}", failed_text(row))
    return table


def _ratios_table(report: BenchReport) -> Table:
    base, other = report.plan.targets
    table = Table(*_heads(report), title=f"{other} over {base}: ratios of medians")
    for name in ("requests/s", "p50", "p90", "p99", "p99.9"):
        table.add_column(name, justify="right")
    for ratio in ratios_of(report):
        numbers = [ratio.of(name) for name in ("requests_per_s", *PERCENTILES)]
        table.add_row(*_place_cells(report, ratio.base), *("-" if n is None else f"{n:.2f}" for n in numbers))
    return table


def failed_text(row: Row) -> str:
    """Failures other than refusals: by status, and requests that were never answered."""
    failures = [f"{count:,} x {_status_text(status)}" for status, count in row.failures.items()]
    return ", ".join([*failures, *([f"{row.unanswered:,} unanswered"] if row.unanswered else [])]) or "0"


def _ms_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
