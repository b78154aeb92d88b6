"""What a bench measured, as JSON and as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from serve.bench_plan import BenchPlan, Shape
from serve.bench_run import PERCENTILES, BenchReport, Recall, Row
from serve.explain import params_text
from serve.load import CLOSED

Json = dict[str, Any]
Column = tuple[str, list[str]]  # its head, and a cell per row
SHOWN = {"p50 ms": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}  # of the percentiles; the JSON has all


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
            | _degraded_json(each)
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
    } | _degraded_json(row)


def _degraded_json(measured: Row | Recall) -> Json:
    return {"degraded": measured.degraded} if measured.degraded else {}


def _ratio_json(ratio: Ratio) -> Json:
    return _place(ratio.base) | {name: ratio.of(name) for name in numbers_of(ratio.base)}


def _status_text(status: int) -> str:
    return "connection closed" if status == CLOSED else str(status)


def print_report(out: Console, report: BenchReport) -> None:
    """Tables that fit 80 columns, unless answers were degraded: what is the same in all rows is said above, failures in
    words below."""
    plan = report.plan
    for each in report.recalls:
        at = params_text(each.params) or "the collection's own target"
        told = f"; degraded: a CPU gave {each.degraded:,} of {each.answers:,} answers" if each.degraded else ""
        out.print(f"{_at(plan, each.target)}recall@{plan.k} {each.recall:.4f} at {at}, against {each.against}{told}")
    out.print(f"searches of {plan.collection}, k {plan.k}{_shared_text(plan.shapes)}")
    for title, rows in _tables(report):
        _print_table(out, title, [*_place_columns(plan, rows), *_number_columns(rows)])
    if not any(row.refused or failed_text(row) for row in report.rows):
        out.print("nothing was refused, nothing failed")
    if degraded := degraded_text(report):
        out.print(degraded)
    for row in report.rows:
        if failed := failed_text(row):
            out.print(f"failed: {_at(plan, row.target)}{_params_prefix(row)}{row.shape}: {failed}")
    if len(plan.targets) == 2:
        out.print(f"{plan.targets[1]} over {plan.targets[0]}: ratios of medians")
        for params in _table_params(plan):
            _print_ratios(out, plan, [r for r in ratios_of(report) if params is None or r.base.params == params])
    times = f"{plan.rounds} x {plan.seconds:g} s, after {plan.warm_up_s:g} s unreported"
    out.print(f"each load: {times}; the load generator shares {os.cpu_count()} cores of this machine")
    for shape in plan.left_out:
        out.print(f"left out: {shape}: {shape.in_flight:,} vectors at one time (--in-flight allows more)")


def _at(plan: BenchPlan, target: str) -> str:
    return f"{target}: " if len(plan.targets) > 1 else ""


def _params_prefix(row: Row) -> str:
    return f"{params_text(row.params)}: " if row.params else ""


def _shared_text(shapes: Sequence[Shape]) -> str:
    """What `_place_columns` leaves out, since all loads have it."""
    if len(shapes) == 1:
        return f": {shapes[0]}"
    formats, batches = {shape.format for shape in shapes}, {shape.batch for shape in shapes}
    shared = [*formats] if len(formats) == 1 else []
    shared += [f"{shapes[0].batch} a request"] if len(batches) == 1 else []
    opened = [shape.connections for shape in shapes if shape.rate is not None]
    shared += [f"open loops on at most {opened[0]} connections"] if opened else []
    return f": {', '.join(shared)}" if shared else ""


def _table_params(plan: BenchPlan) -> list[dict[str, float] | None]:
    """Those of each table; one table has all operating points where there is one load alone."""
    return list(plan.points) if len(plan.points) > 1 and len(plan.shapes) > 1 else [None]


def _tables(report: BenchReport) -> Iterator[tuple[str, list[Row]]]:
    plan = report.plan
    for params in _table_params(plan):
        for target in plan.targets:
            rows = [row for row in report.rows if row.target == target and (params is None or row.params == params)]
            titles = [*([target] if len(plan.targets) > 1 else []), *([params_text(params)] if params else [])]
            yield ", ".join(titles), rows


def _place_columns(plan: BenchPlan, rows: Sequence[Row]) -> list[Column]:
    """What tells the rows of one table apart."""
    if len(plan.shapes) == 1:
        varied = [name for name in plan.points[0] if len({point[name] for point in plan.points}) > 1]
        return [(name, [f"{row.params[name]:g}" for row in rows]) for name in varied]
    shapes = [row.shape for row in rows]
    columns = [("format", [shape.format for shape in shapes]), ("batch", [f"{shape.batch:,}" for shape in shapes])]
    varied_columns = [(name, cells) for name, cells in columns if len(set(cells)) > 1]
    return [*varied_columns, ("load", [_load_text(shape) for shape in shapes])]


def _load_text(shape: Shape) -> str:
    return f"{shape.connections} conn." if shape.rate is None else f"{shape.rate:,.10g}/s"


def _number_columns(rows: Sequence[Row]) -> list[Column]:
    columns = [("vectors/s", [f"{row.vectors_per_s:,.0f}" for row in rows])]
    columns += [
        (head, [_ms_text(row.percentile_ms(PERCENTILES[name])) for row in rows]) for head, name in SHOWN.items()
    ]
    counts = {"refused": [row.refused for row in rows], "failed": [_failed(row) for row in rows]}
    counts["degraded"] = [row.degraded for row in rows]
    return columns + [(head, [f"{count:,}" for count in each]) for head, each in counts.items() if any(each)]


def _print_ratios(out: Console, plan: BenchPlan, ratios: Sequence[Ratio]) -> None:
    columns = _place_columns(plan, [ratio.base for ratio in ratios])
    for head, name in {"vectors/s": "vectors_per_s", **SHOWN}.items():
        numbers = [ratio.of(name) for ratio in ratios]
        columns.append((head.removesuffix(" ms"), ["-" if number is None else f"{number:.2f}" for number in numbers]))
    _print_table(out, params_text(ratios[0].base.params) if len(_table_params(plan)) > 1 else "", columns)


def _print_table(out: Console, title: str, columns: Sequence[Column]) -> None:
    """As wide as its cells, even if the terminal is not: a number that is cut short is another number."""
    if title:
        out.print(title)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for head, _ in columns:
        table.add_column(head, justify="right" if head != "format" else "left", no_wrap=True)
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    table.width = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    out.print(table, no_wrap=True, overflow="ignore", crop=False)


def _failed(row: Row) -> int:
    return sum(row.failures.values()) + row.unanswered


def failed_text(row: Row) -> str:
    """Failures other than refusals: by status, and requests that were never answered; nothing without any."""
    failures = [f"{count:,} x {_status_text(status)}" for status, count in row.failures.items()]
    return ", ".join([*failures, *([f"{row.unanswered:,} unanswered"] if row.unanswered else [])])


def degraded_text(report: BenchReport) -> str:
    """Of all loads; nothing where no answer was."""
    degraded, answered = sum(row.degraded for row in report.rows), sum(row.answered for row in report.rows)
    return f"degraded: a CPU gave {degraded:,} of {answered:,} answers in a GPU's place" if degraded else ""


def _ms_text(value: float | None) -> str:
    """With four digits at most, or as many as it has before the point."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 99.995 else f"{value:,.1f}" if value < 999.95 else f"{value:,.0f}"
