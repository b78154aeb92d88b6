"""Tables of the command line: hits of a search, a collection's shards and indexes, its snapshots, and jobs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jobs.progress_bar import progress_note
from serve.explain import bytes_text, params_text, print_line


def print_hits(out: Console, hits: list[dict[str, Any]], attributes: list[str], title: str) -> None:
    table = Table("id", "score", *attributes, title=title or None)
    for hit in hits:
        values = hit.get("attributes", {})
        table.add_row(str(hit["id"]), f"{hit['score']:.4f}", *(str(values.get(name)) for name in attributes))
    out.print(table)


def print_collection(out: Console, description: dict[str, Any]) -> None:
    config = {"dimension": "?", "metric": "?"} | description["config"]
    state = "ready" if description["ready"] else f"not ready: {description['reason']}"
    where = f" on GPUs, {description['num_gpus']:g} a replica" if description["device"] == "gpu" else ""
    facts = (
        f"  {description['points']:,} points, {config['dimension']} dimensions, "
        f"{config['metric']}, generation {description['generation']}{where}, {state}"
    )
    out.print(Text.assemble((description["name"], "bold"), facts))
    for what, why in (("", description["switching"]), ("a rebuild is advised: ", description["rebuild_advised"])):
        if why:
            print_line(out, f"  {what}{why}")
    shards = description["shards"]
    for shard in shards:
        if shard["upkeep"]:
            print_line(out, f"  shard {shard['shard']}: {shard['upkeep']}")
        for replica in shard["replicas"]:
            for note in _notes(replica, config["replicas"]):
                print_line(out, f"  shard {shard['shard']}, replica {replica['replica']}: {note}")
    observed = ("observed",) if any(shard["observed"] for shard in shards) else ()
    written = ("tail", "deleted") if any(shard["tail_points"] or shard["tombstones"] for shard in shards) else ()
    on_gpu = ("GPU bytes",) if any(_on_gpu(segment) for shard in shards for segment in shard["segments"]) else ()
    heads = ("replicas", "index", "bytes", *on_gpu, "recall@10", "at", "ms")
    table = Table("shard", "points", *written, *heads, *observed)
    for shard in shards:
        unsealed = [f"{shard['tail_points']:,}", f"{shard['tombstones']:,}"] if written else []
        replicas = _replicas_cell(shard["replicas"])
        told = (_observed_cell(shard["observed"], description["serving_generation"]),) if observed else ()
        for segment in shard["segments"] or [None]:
            cells = [*unsealed, replicas, *_segment_cells(segment, bool(on_gpu)), *told]
            table.add_row(str(shard["shard"]), f"{shard['points']:,}", *cells)
    out.print(table)


def _notes(replica: dict[str, Any], replicas: int) -> Iterator[str]:
    """What is out of the ordinary with one of a shard that shall have so many."""
    if replica["degraded"]:
        yield f"degraded, the CPU answers: {replica['degraded']}"
    if replica["replica"] >= replicas and replica["device"] == "gpu":  # else it is one too many, and goes
        why = f": {replica['error']}" if replica["error"] else ""
        yield f"stands in until one that lost its GPU was started again{why}"


def _replicas_cell(replicas: list[dict[str, Any]]) -> str:
    """Each one's state; its share of a GPU while the shard has replicas of several."""
    several = len({replica["num_gpus"] for replica in replicas}) > 1
    return ", ".join(
        " ".join(filter(None, [r["state"], f"({_share(r)})" if several else "", r["error"]])) for r in replicas
    )


def _share(replica: dict[str, Any]) -> str:
    return f"{replica['num_gpus']:g} GPU" if replica["num_gpus"] else "cpu"


def _on_gpu(segment: dict[str, Any]) -> bool:
    return bool(segment.get("device", "cpu") == "gpu")


def _segment_cells(segment: dict[str, Any] | None, with_gpu: bool) -> list[str]:
    """Bytes on the GPU are those measured, else those predicted; "-" where the index is not there."""
    if segment is None:
        return ["-"] * (6 if with_gpu else 5)
    point = segment["operating_points"][0]
    at = params_text(point["params"]) or "exact"
    size = bytes_text(segment["index_bytes"])
    there = segment.get("gpu_measured_bytes") or segment.get("gpu_predicted_bytes")
    on_gpu = ["-" if there is None else bytes_text(there)] if with_gpu else []
    return [segment["index_kind"], size, *on_gpu, f"{point['recall']:.3f}", at, f"{point['latency_ms']:.2f}"]


def _observed_cell(observed: list[dict[str, Any]], generation: int | None) -> str:
    """Each replica's recall of live queries that were answered exactly as well."""
    return ", ".join(f"{each['recall']:.3f}" for each in observed if each["generation"] == generation) or "-"


def print_snapshots(out: Console, snapshots: list[dict[str, Any]]) -> None:
    if not snapshots:
        out.print("no snapshots")
        return
    table = Table("snapshot", "points", "version", "made (UTC)")
    for each in snapshots:
        table.add_row(each["name"], f"{each['points']:,}", str(each["version"]), moment_text(each["created_at"]))
    out.print(table)


def print_jobs(out: Console, jobs: list[dict[str, Any]]) -> None:
    if not jobs:
        out.print("no jobs")
        return
    table = Table(Column("job", no_wrap=True), "collection", "state", "last told (UTC)")
    for job in jobs:
        done = "" if job["state"] == "succeeded" else f", {job['progress']:.0%}"
        where = (job["collection"] or "all", job["state"] + done, moment_text(job["updated_at"]))
        table.add_row(job["job_id"], *where)
    out.print(table)
    for job in jobs:  # too long for a column
        if note := _job_note(job, job["message"]):
            print_line(out, f"{job['job_id']}: {note}")


def moment_text(told: str) -> str:
    """A moment in ISO 8601 as one of UTC, to the second."""
    return f"{datetime.fromisoformat(told).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def print_job(out: Console, status: dict[str, Any]) -> None:
    """A line on how it is, its report's numbers, and the end of its log."""
    note = _job_note(status, status["report"].get("message", ""))
    where = f"{status['job_id']}: {status['kind']} of {status['collection'] or 'all collections'}, {status['state']}"
    print_line(out, f"{where}, {status['progress']:.0%}" + (f", {note}" if note else ""))
    for name, value in status["report"].items():
        if name != "message" and not isinstance(value, list | dict):
            print_line(out, f"  {name}: {value}")
    for line in status["log"]:
        print_line(out, f"  | {line}")


def _job_note(job: dict[str, Any], message: str) -> str:
    """Of one that runs its phase, rate and time left; of any its message."""
    if job["state"] != "running":
        return message
    note = progress_note(job["rate"], job["unit"], job["remaining_s"], message)
    return f"{job['phase']}, {note}" if note else str(job["phase"])
