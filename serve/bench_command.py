"""`eagleray bench`: throughput, latency and recall of a running endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import Invalid
from jobs.progress_bar import progress_bar
from serve.bench_plan import (
    BenchPlan,
    check_target,
    load_shapes,
    operating_points,
    read_formats,
    read_numbers,
)
from serve.command_options import DEFAULT_TARGET, JsonOption, TargetOption
from serve.index_options import given


def bench(
    collection: Annotated[str, typer.Option(help="The collection to search.")],
    data: Annotated[Path, typer.Option(help="Parquet file of queries; with true neighbours, if there are.")],
    vector_column: Annotated[str, typer.Option(help="Column of the queries.")] = "vector",
    truth_column: Annotated[
        str | None, typer.Option(help="Column of the true neighbours' ids, best first; exact_ids if there is one.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1)] = 10,
    connections: Annotated[str, typer.Option(help="Of closed loops, which send when answered.")] = "1,8,64,256",
    batch: Annotated[str, typer.Option(help="Vectors in a request.")] = "1,256",
    format_names: Annotated[str, typer.Option("--format", help="json, arrow or both.")] = "json,arrow",
    rate: Annotated[
        str | None, typer.Option(help="Vectors per second of open loops; latency counts from when a request was due.")
    ] = None,
    open_connections: Annotated[int, typer.Option(help="Most connections of an open loop.", min=1)] = 256,
    in_flight: Annotated[int, typer.Option(help="Most vectors that a closed loop asks at one time.", min=1)] = 4_096,
    seconds: Annotated[float, typer.Option(help="Of each load.", min=0.05)] = 5.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before it that are not reported.", min=0.0)] = 1.0,
    rounds: Annotated[int, typer.Option(help="Of all loads in turn; medians are shown.", min=1)] = 1,
    params: Annotated[str, typer.Option(help="Search parameters, such as ef_search=32,rerank=2.")] = "",
    target_recall: Annotated[float | None, typer.Option(help="Take what was tuned for this recall@10.")] = None,
    sweep: Annotated[str | None, typer.Option(help="Operating points, such as ef_search=16,32,64.")] = None,
    timeout_ms: Annotated[float | None, typer.Option(help="Of each search; the endpoint's own.", min=1.0)] = None,
    compare: Annotated[str | None, typer.Option(help="Another endpoint, measured in turn with the first.")] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG to draw; needs the extra 'bench'.")] = None,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Measure searches: throughput, latency and recall, at each load and operating point."""
    rates = read_numbers("rate", rate, float, 0.01) if rate is not None else []
    sizes = (read_numbers("batch", batch, int, 1), read_numbers("connections", connections, int, 1))
    shapes, left_out = load_shapes(read_formats(format_names), *sizes, rates, open_connections, in_flight)
    if not shapes:
        raise Invalid.at("in_flight", f"leaves no load out of {len(left_out)}: allow more, or ask smaller ones")
    plan = BenchPlan(
        _targets(target, compare),
        collection,
        k,
        operating_points(params, target_recall, sweep),
        shapes,
        left_out,
        seconds,
        warm_up,
        rounds,
        given(timeout_ms=timeout_ms),
    )
    _measure_and_tell(plan, (data, vector_column, truth_column), picture, as_json)


def _measure_and_tell(plan: BenchPlan, data: tuple[Path, str, str | None], picture: Path | None, as_json: bool) -> None:
    """`data`: the file of queries, and its columns of vectors and of true neighbours."""
    from serve.bench_picture import check_picture, draw_picture
    from serve.bench_queries import read_queries
    from serve.bench_report import as_json as report_json
    from serve.bench_report import print_report
    from serve.bench_run import run_bench

    if picture is not None:
        check_picture(picture)
    path, vector_column, truth_column = data
    queries = read_queries(path, plan.k, vector_column, truth_column)
    with progress_bar("recall", hidden=as_json) as show:
        report = run_bench(plan, queries, lambda share, note: show("measuring", share, note))
    if picture is not None:
        draw_picture(report, picture)
    if as_json:
        print(json.dumps(report_json(report)))
    else:
        print_report(Console(markup=False, highlight=False), report)


def _targets(target: str, compare: str | None) -> tuple[str, ...]:
    first = check_target("target", target)
    if compare is None:
        return (first,)
    second = check_target("compare", compare)
    if first == second:
        raise Invalid.at("compare", f"is {first} again: there is nothing to compare")
    return (first, second)
