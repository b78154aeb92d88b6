"""A picture of what a bench measured: recall over throughput, and latency over throughput. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import Invalid
from serve.bench_report import degraded_text
from serve.bench_run import BenchReport, Row
from serve.explain import params_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (14.0, 7.0)


def check_picture(path: Path) -> None:
    """Before anything is measured: Invalid where the picture could not be drawn."""
    if path.suffix != ".svg":
        raise Invalid.at("picture", f"must be the name of an .svg file, not {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise Invalid.at("picture", f"there is no folder {path.absolute().parent}")
    try:
        import matplotlib.figure
    except ImportError as error:
        raise Invalid.at("picture", f"needs matplotlib: pip install 'eagleray[bench]' ({error})") from error
    del matplotlib


def draw_picture(report: BenchReport, path: Path) -> None:
    """Write an SVG, whose text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_recall(left, report)
        _draw_latency(right, report)
        told = [f"{report.plan.collection}, {report.queries.name}, k {report.plan.k}", degraded_text(report)]
        figure.suptitle("\n".join(filter(None, told)))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_recall(axes: Axes, report: BenchReport) -> None:
    """Of each target and batch size the fastest shape of load, point by point."""
    recalls = {(each.target, params_text(each.params)): each.recall for each in report.recalls}
    for name, rows in fastest_lines(report).items():
        points = [(row.vectors_per_s, recalls[row.target, params_text(row.params)]) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
        for row, point in zip(rows, points, strict=True):
            axes.annotate(params_text(row.params), point, textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.set(xlabel="vectors per second", ylabel=f"recall@{report.plan.k}", title="recall over throughput")
    _finish(axes)


def fastest_lines(report: BenchReport) -> dict[str, list[Row]]:
    """By label: the closed loops of one shape, by throughput; without closed loops nothing."""
    groups: dict[tuple[str, int], dict[object, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in report.rows:
        if row.shape.rate is None:
            groups[row.target, row.shape.batch][row.shape].append(row)
    lines = {}
    for (target, _), shapes in groups.items():
        rows = max(shapes.values(), key=lambda rows: max(row.vectors_per_s for row in rows))
        label = _label(report, target, str(rows[0].shape))
        lines[label] = sorted(rows, key=lambda row: row.vectors_per_s)
    return lines


def _draw_latency(axes: Axes, report: BenchReport) -> None:
    """At the first operating point: p50 dashed, p99 drawn through."""
    for name, rows in load_lines(report).items():
        reached = [row.vectors_per_s for row in rows]
        colour = None
        for percent, style in ((99.0, "-"), (50.0, "--")):
            times = [row.percentile_ms(percent) for row in rows]
            label = name if percent == 99.0 else None
            shown = [float("nan") if each is None else each for each in times]
            colour = axes.plot(reached, shown, style, marker=".", label=label, color=colour)[0].get_color()
    axes.set(xlabel="vectors per second", ylabel="ms: p99 (line), p50 (dashed)", title="latency over load")
    axes.set_yscale("log")
    _finish(axes)


def load_lines(report: BenchReport) -> dict[str, list[Row]]:
    """By label: rows of one loop, format and batch, from light load to heavy."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        if row.params == report.plan.points[0]:
            shape = row.shape
            lines[_label(report, row.target, f"{shape.loop} loop, {shape.format}, {shape.batch} a request")].append(row)
    return {name: sorted(rows, key=lambda row: row.shape.rate or row.shape.connections) for name, rows in lines.items()}


def _label(report: BenchReport, target: str, text: str) -> str:
    return f"{target}: {text}" if len(report.plan.targets) > 1 else text


def _finish(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.grid(visible=True, alpha=0.3)
    if axes.get_lines():
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
