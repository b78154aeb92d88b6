"""What `eagleray explain` and `plan` print: which index, why, what else was considered, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Facts = dict[str, Any]
UNITS = ("B", "kB", "MB", "GB", "TB")
KINDS_WITH_CODES = ("flat", "hnsw", "ivf_flat", "cagra")  # the others have codes of their own


def explanation(description: Facts) -> Facts:
    """The part of a collection's description that is about its indexes."""
    told = ("shard", "points", "tail_points", "tombstones", "segments", "observed")
    shards = [{name: shard[name] for name in told} for shard in description["shards"]]
    return {name: description[name] for name in ("name", "config", "points", "generation", "num_gpus")} | {
        "shards": shards
    }


def print_explanation(out: Console, description: Facts) -> None:
    """Per segment: what was chosen and why, what was considered, what was measured."""
    config = description["config"]
    asked = config_line(config) if config else "its manifest cannot be read"
    print_line(out, f"{description['name']}: {description['points']:,} points, {asked}")
    if not description["ready"]:
        print_line(out, f"not ready: {description['reason']}")
    if description["num_gpus"]:
        print_line(out, f"each replica has {description['num_gpus']:g} of a GPU")
    considered: list[Facts] = []
    for shard in description["shards"]:
        for segment in shard["segments"]:
            print_segment(out, shard["shard"], segment, bool(considered) and segment["considered"] == considered)
            considered = segment["considered"]
        for observed in shard["observed"]:
            print_line(out, f"  observed by replica {observed['replica']}: {observed_text(observed)}")
        if shard["tail_points"] or shard["tombstones"]:
            print_line(out, f"\nshard {shard['shard']}: {unsealed_text(shard)}")
        elif not shard["segments"]:
            print_line(out, f"\nshard {shard['shard']}: no index, {shard['points']:,} points")


def print_line(out: Console, text: str) -> None:
    """One line, however wide: a pipe gets it whole."""
    out.print(text, soft_wrap=True)


def config_line(config: Facts) -> str:
    """Dimension, metric and what was asked of the index."""
    index = config["index"]
    bounds = [
        f"{name} {bytes_text(value) if name == 'memory_bytes' else value}"
        for name, value in index.items()
        if name not in ("kind", "target_recall", "device") and value is not None
    ]
    device = [f"device {index['device']}"] if index["device"] != "auto" else []
    asked = ", ".join([f"kind {index['kind']}, target recall {index['target_recall']:g}", *device, *bounds])
    return f"{config['dimension']} dimensions, {config['metric']}; asked for: {asked}"


def print_segment(out: Console, shard: int, segment: Facts, as_before: bool) -> None:
    """`as_before`: the segment before it was chosen from the same candidates."""
    kind, device = segment["index_kind"], segment.get("device", "cpu")
    name = index_name(kind, segment["codes"], segment["rerank_store"], segment["index_params"], device)
    print_line(out, f"\nshard {shard}, {segment['segment_id']}, {segment['count']:,} points: {name}")
    print_line(out, f"  why: {segment['reason']}")
    if as_before:
        print_line(out, "  considered: the same as above")
    elif segment["considered"]:
        out.print(considered_table(segment["considered"]))
    print_line(out, f"  measured: {_built_text(segment)}")
    if device == "gpu":
        print_line(out, f"  on the GPU: {_gpu_text(segment)}")
    if segment.get("cpu_twin"):
        print_line(out, f"  its twin on the CPU: {_twin_text(segment['cpu_twin'])}")
    out.print(_points_table(segment["operating_points"]))


def unsealed_text(shard: Facts) -> str:
    """What writes left that no segment holds yet, and what of the segments they deleted."""
    return (
        f"{shard['tail_points']:,} points written since the last segment, searched exactly; "
        f"{shard['tombstones']:,} rows of segments deleted"
    )


def considered_table(considered: Iterable[Facts]) -> Table:
    """Every index that was thought of, in order of preference, with what is predicted for it; "-" where nothing is."""
    listed = list(considered)
    some_on_gpu = any("gpu_bytes" in each for each in listed)
    table = Table("index", title="considered, best first; the numbers are predicted", title_justify="left")
    for name in ("bytes", *(["GPU bytes"] if some_on_gpu else []), "build s", "recall", "queries/s"):
        table.add_column(name, justify="right")
    table.add_column("why not")
    for each in listed:
        on_gpu = [bytes_text(each["gpu_bytes"]) if "gpu_bytes" in each else "-"] if some_on_gpu else []
        speed = each["predicted_queries_per_s"]
        table.add_row(
            index_name(each["kind"], each["codes"], each["rerank_store"], each["params"], each.get("device", "cpu")),
            bytes_text(each["predicted_bytes"]),
            *on_gpu,
            predicted_text(each["predicted_build_seconds"]),
            f"{each['reachable_recall']:g}",
            "-" if speed is None else f"{speed:,.0f}",
            each["rejected"] or "taken",
            style="" if each["rejected"] else "bold",
        )
    return table


def _points_table(points: Iterable[Facts]) -> Table:
    """Operating points; the recall's bound is the lower one of its one-sided 95% interval."""
    table = Table("target", "params", "recall@10", "at least", "ms, 1 query", "queries/s, 256", "met")
    for point in points:
        table.add_row(
            f"{point['target_recall']:g}",
            params_text(point["params"]) or "exact",
            f"{point['recall']:.4f}",
            f"{point['recall_low']:.4f}",
            f"{point['latency_ms']:.2f}",
            f"{point['queries_per_s']:,.0f}" if point["queries_per_s"] else "-",
            "yes" if point["met"] else "no",
        )
    return table


def _built_text(segment: Facts) -> str:
    """The index's size and build time, each beside its prediction; of one for GPUs also what it was measured on."""
    built = segment["built"]
    parts = [f"index file {bytes_text(segment['index_bytes'])} (predicted {bytes_text(segment['predicted_bytes'])})"]
    if "seconds" in built:
        expected = built.get("predicted_seconds")
        predicted = "" if expected is None else f" (predicted {seconds_text(expected)} s)"
        parts.append(f"built in {seconds_text(built['seconds'])} s{predicted} with {threads_text(built['threads'])}")
    if "tuning_seconds" in built:
        parts.append(f"tuned in {seconds_text(built['tuning_seconds'])} s on {built['tuned_on']}")
    if segment.get("device", "cpu") == "gpu":
        parts.append(f"all on {built.get('gpu', 'a CPU')}")
    if "faiss" in built:
        parts.append(f"FAISS {built['faiss']} {built['simd']}")
    return ", ".join(parts)


def _gpu_text(segment: Facts) -> str:
    """Bytes there, predicted and measured, and what keeps the index from being there."""
    predicted = segment.get("gpu_predicted_bytes")
    parts = ["not there" if predicted is None else f"{bytes_text(predicted)} predicted"]
    if segment.get("gpu_measured_bytes") is not None:
        parts.append(f"{bytes_text(segment['gpu_measured_bytes'])} measured")
    if segment.get("out_of_memory"):
        parts.append(f"out of memory in {segment['out_of_memory']:,} searches")
    degraded = f"; the CPU answers: {segment['degraded']}" if segment.get("degraded") else ""
    return ", ".join(parts) + degraded


def _twin_text(twin: Facts) -> str:
    """What the CPU's index was tuned to, for the collection's own target."""
    point = twin["operating_points"][0]
    params = params_text(point["params"]) or "exact"
    return f"recall@10 {point['recall']:.4f} at {params}, {point['latency_ms']:.2f} ms a query"


def plan_line(plan: Facts) -> str:
    """What an import is going to build, in one line."""
    index = plan["index"]
    name = index_name(index["kind"], index["codes"], "none", {}, index.get("device", "cpu"))
    seconds = plan["predicted_build_seconds"]
    took = "" if seconds is None else f", about {seconds_text(seconds)} s"
    return f"builds: {plan['segments']} x {name}, {bytes_text(plan['predicted_bytes'])}{took}"


def index_name(kind: str, codes: str, rerank_store: str, params: Facts, device: str = "cpu") -> str:
    """Kind, codes, rerank store and build parameters in a few words, such as `hnsw (float16 codes, m 32)`."""
    inside = [f"{codes} codes"] if kind in KINDS_WITH_CODES else []
    if rerank_store == "rows":
        inside.append("rerank from rows")
    elif rerank_store != "none":
        inside.append(f"{rerank_store} copy")
    inside += [params_text(params)] if params else []
    name = f"{kind} on a GPU" if device == "gpu" else kind
    return f"{name} ({', '.join(inside)})" if inside else name


def params_text(params: Facts) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in params.items())


def observed_text(observed: Facts) -> str:
    """Recall of live queries that were answered exactly as well, with its 95% interval."""
    interval = f"{observed['low']:.3f} to {observed['high']:.3f}"
    queries = f"{observed['queries']:,} live queries of generation {observed['generation']}"
    return f"recall@{observed['k']} {observed['recall']:.3f} ({interval}) on {queries}"


def bytes_text(size: float) -> str:
    """Three digits or so, in decimal units: `110 MB`."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1_000, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if size >= 99.5 or unit == 0 else f"{size:.1f} {UNITS[unit]}"


def threads_text(threads: int) -> str:
    return f"{threads} thread{'s' if threads != 1 else ''}"


def predicted_text(seconds: float | None) -> str:
    """ "-" where nothing was measured that it could be predicted by."""
    return "-" if seconds is None else seconds_text(seconds)


def seconds_text(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"
