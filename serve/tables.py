"""Tables of the command line: hits of a search, and a collection's shards and indexes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.explain import bytes_text, params_text


def print_hits(out: Console, hits: list[dict[str, Any]], attributes: list[str], title: str) -> None:
    table = Table("id", "score", *attributes, title=title or None)
    for hit in hits:
        values = hit.get("attributes", {})
        table.add_row(str(hit["id"]), f"{hit['score']:.4f}", *(str(values.get(name)) for name in attributes))
    out.print(table)


def print_collection(out: Console, description: dict[str, Any]) -> None:
    config = {"dimension": "?", "metric": "?"} | description["config"]
    state = "ready" if description["ready"] else f"not ready: {description['reason']}"
    facts = (
        f"  {description['points']:,} points, {config['dimension']} dimensions, "
        f"{config['metric']}, generation {description['generation']}, {state}"
    )
    out.print(Text.assemble((description["name"], "bold"), facts))
    shards = description["shards"]
    observed = ("observed",) if any(shard["observed"] for shard in shards) else ()
    written = ("tail", "deleted") if any(shard["tail_points"] or shard["tombstones"] for shard in shards) else ()
    table = Table("shard", "points", *written, "replicas", "index", "bytes", "recall@10", "at", "ms", *observed)
    for shard in shards:
        unsealed = [f"{shard['tail_points']:,}", f"{shard['tombstones']:,}"] if written else []
        replicas = ", ".join(f"{r['state']} {r['error']}".strip() for r in shard["replicas"])
        told = (_observed_cell(shard["observed"], description["serving_generation"]),) if observed else ()
        for segment in shard["segments"] or [None]:
            cells = [*unsealed, replicas, *_segment_cells(segment), *told]
            table.add_row(str(shard["shard"]), f"{shard['points']:,}", *cells)
    out.print(table)


def _segment_cells(segment: dict[str, Any] | None) -> list[str]:
    if segment is None:
        return ["-"] * 5
    point = segment["operating_points"][0]
    at = params_text(point["params"]) or "exact"
    size = bytes_text(segment["index_bytes"])
    return [segment["index_kind"], size, f"{point['recall']:.3f}", at, f"{point['latency_ms']:.2f}"]


def _observed_cell(observed: list[dict[str, Any]], generation: int | None) -> str:
    """Each replica's recall of live queries that were answered exactly as well."""
    return ", ".join(f"{each['recall']:.3f}" for each in observed if each["generation"] == generation) or "-"
