"""Building: train and add of a segment beside FAISS in process; two shards built at once beside one with two threads.

    python -m benchmarks.build_throughput [--count 60000] [--data FILE.parquet] [--rounds 5]

Segments: `actors.segment_builder.build_segment` is given rows in a file, and FAISS the same vectors in memory, in the
same order; the index is of the segment's own factory string, trained on as many vectors, with the same parameters and
threads. Both take turns, and in who is first. A segment's time is what it states of itself (`seconds`: train and add,
its rows read from their file); what it does beside that (exact answers, tuning, the self-test, saving) is told in a
column of its own.

Shards: the import job on a Ray of this machine, one shard with two threads and two shards with one each, by turns.
Train and add are what the slower of the segments, built at one time, states of itself; the whole phase `build`, which
gathers, tunes and publishes as well, is told beside it (tuning tries what the segment's own points ask for).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer

from actors import ray_jobs
from actors.faiss_index import faiss_metric, use_threads
from actors.segment_builder import BuildOptions, build_segment
from actors.segment_loader import read_description
from benchmarks.served import machine
from benchmarks.vector_sets import make_clusters
from cluster import paths
from cluster.arrow_rows import vectors_array, vectors_view
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.ids import hash_ids
from cluster.index_spec import TRAINING_POINTS_PER_CENTROID, IndexSpec
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from cluster.segment import rows_per_batch, rows_schema, write_rows
from cluster.vectors import as_searched
from jobs.build_plan import Workers
from jobs.importer import Importer, ImportOptions
from jobs.report import JobReporter, JobStatus

METRIC: Metric = "l2"
TARGET = 0.5  # so that the first index is the last: one that misses its target is built again, stronger, and counted
INDEXES = {
    "HNSW": IndexConfig("hnsw", TARGET),
    "HNSW, float16": IndexConfig("hnsw", TARGET, codes="float16"),
    "IVF, PQ": IndexConfig("ivf_pq", TARGET),
    "IVF, RaBitQ": IndexConfig("ivf_rabitq", TARGET),
    "flat": IndexConfig("flat", TARGET),
}
SHARDED = ("HNSW", "IVF, PQ")
SEGMENT_BAR, SHARDS_BAR = 0.9, 1.0
PER_CENTROID_MIN = 1  # as `actors.faiss_index` has it: no warning


@dataclass(frozen=True)
class Built:
    """One build of a segment: seconds of train and add, and of all it did."""

    seconds: float
    all_seconds: float
    spec: IndexSpec


def main(
    count: Annotated[int, typer.Option(help="Vectors, where no file is given: clusters of 128 dimensions.")] = 60_000,
    data: Annotated[Path | None, typer.Option(help="Parquet with vector, to take instead.")] = None,
    rounds: int = 5,
    only: Annotated[str, typer.Option(help="segments, shards or all.")] = "all",
    index: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(INDEXES)}; all if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    with tempfile.TemporaryDirectory(prefix="eagleray-build-bench-") as name:
        folder = Path(name)
        source = data or make_clusters(folder, count, 10).parquet
        vectors = vectors_view(pq.read_table(source, columns=["vector"])["vector"].combine_chunks())
        vectors = np.ascontiguousarray(vectors, np.float32)
        report: dict[str, Any] = {"machine": machine(), "set": f"{len(vectors):,} x {vectors.shape[1]}"}
        chosen = tuple(index or INDEXES)
        if only in ("segments", "all"):
            report["segments"] = [
                segment_row(name, vectors, threads, rounds, folder) for name in chosen for threads in (1, 2)
            ]
        if only in ("shards", "all"):
            report["shards"] = compare_shards(source, [name for name in chosen if name in SHARDED], rounds, folder)
        print(json.dumps(report) if as_json else as_markdown(report))


# --- segments -----------------------------------------------------------------------------------------------------


def segment_row(name: str, vectors: Any, threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    config = CollectionConfig(vectors.shape[1], METRIC, index=INDEXES[name])
    ids = pa.array(np.arange(len(vectors)))
    order = np.argsort(hash_ids(ids), kind="stable")
    ordered = np.ascontiguousarray(as_searched(vectors, METRIC)[order])
    write_rows(folder / paths.ROWS, rows_schema(config, {}), _batches(config, ordered, order))
    spec = build(folder, config, len(order), threads).spec  # warms up, too
    ours, theirs = [], []
    for number in range(rounds):
        if number % 2:
            theirs.append(build_in_faiss(spec, ordered, threads))
        ours.append(build(folder, config, len(order), threads))
        if not number % 2:
            theirs.append(build_in_faiss(spec, ordered, threads))
    ratios = [base / own.seconds for own, base in zip(ours, theirs, strict=True)]
    return {
        "index": f"{name} ({ours[0].spec.factory_string(config.dimension)})",
        "threads": threads,
        "seconds": _median([own.seconds for own in ours]),
        "faiss_seconds": _median(theirs),
        "points_per_s": len(order) / _median([own.seconds for own in ours]),
        "beside_seconds": _median([own.all_seconds - own.seconds for own in ours]),
        "ratio": _median(ratios),
        "ratios": ratios,
    }


def _batches(config: CollectionConfig, ordered: Any, order: Any) -> Any:
    step = rows_per_batch(config)
    for start in range(0, len(order), step):
        ids = pa.array(order[start : start + step])
        columns = [ids, vectors_array(ordered[start : start + step]), pa.array(hash_ids(ids))]
        yield pa.record_batch(columns, rows_schema(config, {}))


def build(folder: Path, config: CollectionConfig, count: int, threads: int) -> Built:
    started = time.perf_counter()
    made = build_segment(folder, "bench", config, count, rows_per_batch(config), BuildOptions(threads))
    return Built(made.built["seconds"], time.perf_counter() - started, IndexSpec.from_dict(made.spec))


def build_in_faiss(spec: IndexSpec, vectors: Any, threads: int) -> float:
    """Seconds of train and add, as somebody would who has all vectors in memory."""
    use_threads(threads)
    index = faiss.index_factory(vectors.shape[1], spec.factory_string(vectors.shape[1]), faiss_metric(METRIC))
    _set_parameters(index, spec)
    started = time.perf_counter()
    if not index.is_trained:
        index.train(vectors[: spec.training_points(len(vectors))])
    index.add(vectors)
    return time.perf_counter() - started


def _set_parameters(index: Any, spec: IndexSpec) -> None:
    """What a factory string cannot say, as a segment has it."""
    if spec.kind == "hnsw":
        faiss.ParameterSpace().set_index_parameter(index, "efConstruction", spec.params["ef_construction"])
    if spec.kind.startswith("ivf"):
        lists = faiss.extract_index_ivf(index)
        lists.cp.max_points_per_centroid = TRAINING_POINTS_PER_CENTROID
        lists.cp.min_points_per_centroid = PER_CENTROID_MIN


# --- shards -------------------------------------------------------------------------------------------------------


def compare_shards(source: Path, names: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """The import job in a Ray of two CPUs; the first round warms up."""
    environment = {"PYTHONPATH": os.getcwd()}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    try:
        return [shards_row(source, name, rounds, folder) for name in names]
    finally:
        ray.shutdown()


def shards_row(source: Path, name: str, rounds: int, folder: Path) -> dict[str, Any]:
    one, two = [], []
    for number in range(rounds + 1):
        order = (1, 2) if number % 2 else (2, 1)
        took = {shards: import_seconds(source, INDEXES[name], shards, folder) for shards in order}
        if number:
            one.append(took[1])
            two.append(took[2])
    ratios = [first[0] / second[0] for first, second in zip(one, two, strict=True)]
    row = {"index": name, "ratio": _median(ratios), "ratios": ratios}
    for shards, times in (("one", one), ("two", two)):
        row[f"{shards}_seconds"] = _median([built for built, _ in times])
        row[f"{shards}_phase_seconds"] = _median([phase for _, phase in times])
    return row


def import_seconds(source: Path, index: IndexConfig, shards: int, folder: Path) -> tuple[float, float]:
    """Of train and add, and of the phase `build`, of one import into a collection of its own."""
    collection, data = f"bench-{uuid.uuid4().hex[:12]}", f"{folder}/data"
    create = {
        "metric": METRIC,
        "shards": shards,
        "index": {"kind": index.kind, "target_recall": TARGET} | index.options,
    }
    store = open_store(data)
    log = ManifestLog(store, collection, lambda: uuid.uuid4().hex)
    options = ImportOptions(collection, str(source), create=create)
    cpus = ray_jobs.cluster_cpus()
    phases: list[tuple[str, float]] = []
    reporter = JobReporter(
        store, JobStatus("bench", "import", collection), lambda now: phases.append((now.phase, time.perf_counter()))
    )
    workers = Workers(partial(ray_jobs.run_tasks, waiting=reporter.waiting), cpus.total, cpus.largest_node, 2)
    manifest = Importer(data, store, log, options, workers).run("bench", reporter)
    built = [read_description(store, collection, ref).built["seconds"] for ref in manifest.segments.values()]
    began = next(at for phase, at in phases if phase == "build")
    return max(built), next(at for phase, at in phases if phase == "commit") - began


# --- the report ---------------------------------------------------------------------------------------------------


def _median(values: list[float]) -> float:
    return float(np.median(values))


def as_markdown(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']}; {report['set']}, {METRIC}; medians over rounds", ""]
    if "segments" in report:
        lines += [
            "| segment | threads | train + add s | points/s | FAISS s | FAISS / Eagleray | worst round | beside s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_segment_line(row) for row in report["segments"]]
        least = min(row["ratio"] for row in report["segments"])
        lines += [
            "",
            f"least ratio: {least:.2f} (bar {SEGMENT_BAR:g}: {'met' if least >= SEGMENT_BAR else 'MISSED'})",
            "",
        ]
    if "shards" in report:
        lines += [
            "| import job | 1 shard, 2 threads: train + add s | phase s | 2 shards, 1 thread each | phase s | ratio |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_shards_line(row) for row in report["shards"]]
        least = min(row["ratio"] for row in report["shards"])
        lines += ["", f"least ratio: {least:.2f} (bar {SHARDS_BAR:g}: {'met' if least >= SHARDS_BAR else 'MISSED'})"]
    return "\n".join(lines)


def _segment_line(row: dict[str, Any]) -> str:
    cells = [f"{row['seconds']:.2f}", f"{row['points_per_s']:,.0f}", f"{row['faiss_seconds']:.2f}"]
    cells += [f"{row['ratio']:.2f}", f"{min(row['ratios']):.2f}", f"{row['beside_seconds']:.2f}"]
    return f"| {row['index']} | {row['threads']} | {' | '.join(cells)} |"


def _shards_line(row: dict[str, Any]) -> str:
    times = (row[f"{shards}_{what}"] for shards in ("one", "two") for what in ("seconds", "phase_seconds"))
    return f"| {row['index']} | {' | '.join(f'{time:.2f}' for time in times)} | {row['ratio']:.2f} |"


if __name__ == "__main__":
    typer.run(main)
