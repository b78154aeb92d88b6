"""The adaptive index against FAISS indexes tuned by hand: same vectors, threads and batches, alternating in one run.

    python benchmarks/index_by_hand.py clusters-128 clusters-768
    python benchmarks/index_by_hand.py words --words FILE --word-queries FILE
    python benchmarks/index_by_hand.py images --images train-images-idx3-ubyte.gz --image-queries t10k-...gz

By hand means with the answers at hand: each FAISS index gets the cheapest parameters that reach a recall on the very
queries that are measured. The adaptive index is tuned without them. Each is searched in batches of 256 through its
Python API; rates are medians over rounds in which all take turns.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from actors.build_rates import measure_rates
from actors.exact_search import exact_search
from actors.faiss_index import use_threads
from actors.segment_builder import BuildOptions, build_segment, publish_segment
from actors.segment_loader import LoadedSegment, load_segment
from actors.tuner import Knobs, TuningSet, tune
from cluster import paths
from cluster.arrow_rows import vectors_array, vectors_view
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.ids import hash_ids
from cluster.index_spec import knob_grid, nlist
from cluster.object_store import open_store
from cluster.query import SearchParams
from cluster.segment import rows_per_batch, rows_schema, write_rows
from cluster.topk import recall_at_k
from cluster.vectors import as_searched

K, BATCH, TARGETS = 10, 256, (0.90, 0.95, 0.99)
CENTRES, SPREAD = 2_000, 1.0  # of the synthetic clusters: they overlap


@dataclass(frozen=True)
class Work:
    """Vectors to index, queries to measure with and, where there are some, others of the same kind to tune with."""

    name: str
    metric: Metric
    vectors: Any
    queries: Any
    recorded: Any = None


@dataclass
class Contender:
    """Something that answers a batch at given parameters."""

    name: str
    search: Callable[[Any, Any], Any]  # (queries, parameters) -> rows (n, K)
    recall: float = 0.0
    parameters: Any = None
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return float(np.median(self.rates))


def main(
    sets: list[str],
    words: Annotated[Path | None, typer.Option(help="Parquet with vector.")] = None,
    word_queries: Annotated[Path | None, typer.Option(help="Parquet with vector.")] = None,
    images: Annotated[Path | None, typer.Option(help="IDX file of images, gzip.")] = None,
    image_queries: Annotated[Path | None, typer.Option(help="IDX file of images, gzip.")] = None,
    threads: int = 2,
    rounds: int = 5,
    index: Annotated[str, typer.Option(help="IndexConfig of the adaptive index, JSON.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    makers: dict[str, Callable[[], Work]] = {
        "clusters-128": lambda: clusters(200_000, 128),
        "clusters-768": lambda: clusters(100_000, 768),
        "words": lambda: read_words(_given(words), _given(word_queries)),
        "images": lambda: read_images(_given(images), _given(image_queries)),
    }
    use_threads(threads)
    for name in sets:
        report = compare(makers[name](), IndexConfig(**json.loads(index)), threads, rounds)
        print(json.dumps(report) if as_json else as_markdown(report), flush=True)


def _given(path: Path | None) -> Path:
    if path is None:
        raise SystemExit("this set needs its files: see --help")
    return path


def clusters(count: int, dimension: int) -> Work:
    """Overlapping Gaussian clusters whose dimensions matter less and less (1 / sqrt(i)), on the sphere."""
    random = np.random.default_rng(7)
    scale = 1.0 / np.sqrt(np.arange(1, dimension + 1))
    centres = random.standard_normal((CENTRES, dimension)) * scale
    which = random.integers(0, CENTRES, count + 2_000)
    points = centres[which] + SPREAD * random.standard_normal((count + 2_000, dimension)) * scale
    points = as_searched(points.astype(np.float32), "cosine")
    name = f"clusters {count} x {dimension}"
    return Work(name, "cosine", points[:count], points[count : count + 1_000], points[count + 1_000 :])


def read_words(data: Path, queries: Path) -> Work:
    vectors, asked = (as_searched(_parquet_vectors(path), "cosine") for path in (data, queries))
    return Work(f"{data.stem} {vectors.shape[0]} x {vectors.shape[1]}", "cosine", vectors, asked)


def _parquet_vectors(path: Path) -> Any:
    return vectors_view(pq.read_table(path, columns=["vector"])["vector"].combine_chunks()).astype(np.float32)


def read_images(data: Path, queries: Path) -> Work:
    vectors, asked = _idx(data), _idx(queries)
    return Work(f"images {vectors.shape[0]} x {vectors.shape[1]}", "l2", vectors, asked[:1_000], asked[1_000:2_000])


def _idx(path: Path) -> Any:
    with gzip.open(path) as file:
        data = file.read()
    return np.frombuffer(data, np.uint8, offset=16).reshape(int.from_bytes(data[4:8], "big"), -1).astype(np.float32)


def compare(work: Work, index: IndexConfig, threads: int, rounds: int) -> dict[str, Any]:
    truth, _ = exact_search(work.queries, [(0, work.vectors)], K, work.metric)
    _MEASURED.clear()
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as folder:
        segment, built = build_adaptive(work, index, threads, Path(folder))
        adaptive = adaptive_contenders(segment, work, truth)
        hand = by_hand(work)
        rows = [row(name, target, auto, hand, work, truth, rounds) for name, target, auto in adaptive]
    return {"set": work.name, "metric": work.metric, "threads": threads, "built": built, "rows": rows}


def build_adaptive(work: Work, index: IndexConfig, threads: int, folder: Path) -> tuple[LoadedSegment, dict[str, Any]]:
    """As an import builds it: rows in order of their hash, rates measured on a sample, then the build."""
    config = CollectionConfig(work.vectors.shape[1], work.metric, index=index)
    ids = pa.array(np.arange(len(work.vectors)))
    order = np.argsort(hash_ids(ids), kind="stable")
    write_rows(folder / paths.ROWS, rows_schema(config, {}), _batches(config, work.vectors, order))
    rates = measure_rates(work.vectors[order[:20_000]], work.metric, threads)
    options = BuildOptions(threads, rates=rates)
    started = time.perf_counter()
    description = build_segment(folder, "adaptive", config, len(order), rows_per_batch(config), options)
    seconds = time.perf_counter() - started
    store = open_store(f"{folder}/data")
    segment = load_segment(store, "bench", publish_segment(store, "bench", folder, "adaptive"), work.metric, folder)
    facts = description.built | {
        "all_seconds": round(seconds, 1),
        "predicted_bytes": description.spec["predicted_bytes"],
        "bytes": description.files[paths.INDEX].size_bytes,
        "index": f"{segment.spec.kind} {segment.spec.params} {segment.spec.codes}, rerank {segment.spec.rerank_store}",
    }
    return segment, facts


def _batches(config: CollectionConfig, vectors: Any, order: Any) -> Any:
    step = rows_per_batch(config)
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        ids = pa.array(rows)
        yield pa.record_batch([ids, vectors_array(vectors[rows]), pa.array(hash_ids(ids))], rows_schema(config, {}))


def adaptive_contenders(segment: LoadedSegment, work: Work, truth: Any) -> list[tuple[str, float, Contender]]:
    """At each target, as tuned by itself; and as it is once there are recorded queries to tune with."""
    ids = segment.ids.to_numpy()

    def ask(queries: Any, params: Any) -> Any:
        return ids[segment.search(queries, K, params)[0]]

    def contender(name: str, params: SearchParams) -> Contender:
        found = recall_of(np.concatenate([ask(batch, params) for batch in batches(work.queries)]), truth)
        return Contender(name, ask, found, params)

    points = {point.target_recall: point for point in segment.description.operating_points}
    found = [
        (
            "alone",
            t,
            contender(f"{points[t].params}{'' if points[t].met else ' NOT MET'}", SearchParams(target_recall=t)),
        )
        for t in TARGETS
    ]
    if work.recorded is not None:
        asked = TuningSet(work.recorded, *exact_search(work.recorded, segment.rows.blocks(), K, work.metric))
        searcher = segment.searcher
        knobs = Knobs(segment.spec.tuned_knobs, segment.rows.count, searcher.index.lists)
        tuned = tune(searcher, knobs, asked, 0.95)
        by_target = {point.target_recall: point for point in tuned}
        found += [
            ("recorded", t, contender(str(by_target[t].params), SearchParams(**by_target[t].params))) for t in TARGETS
        ]
    return found


def by_hand(work: Work) -> list[tuple[str, Any, Sequence[Any]]]:
    """(name, index, parameters from cheap to dear) of the FAISS indexes that people build."""
    count, dimension = work.vectors.shape
    metric, lists = faiss.METRIC_L2, nlist(count)
    strings = {
        "HNSW32": "HNSW32,Flat",
        "HNSW32 fp16": "HNSW32,SQfp16",
        "IVF PQ fast scan + refine": f"IVF{lists},PQ{dimension // 4}x4fsr,Refine(SQfp16)",
        "IVF RaBitQ fast scan + refine": f"RR,IVF{lists},RaBitQfs,Refine(SQfp16)",
        "IVFFlat": f"IVF{lists},Flat",
    }
    found = []
    for name, string in strings.items():
        index = faiss.index_factory(dimension, string, metric)
        if string.startswith("HNSW"):
            index.hnsw.efConstruction = 100
        index.train(work.vectors)
        index.add(work.vectors)
        found.append((name, index, list(_hand_parameters(string, lists))))
    return found


def _hand_parameters(string: str, lists: int) -> Any:
    if string.startswith("HNSW"):
        return [faiss.SearchParametersHNSW(efSearch=ef) for ef in knob_grid(10, 1_000)]
    if "Refine" not in string:
        return [faiss.SearchParametersIVF(nprobe=probes) for probes in knob_grid(1, lists)]
    return [_refined(string, probes, factor) for probes in knob_grid(1, lists) for factor in (4, 8, 16)]


def _refined(string: str, nprobe: int, factor: int) -> Any:
    base = faiss.SearchParametersIVF(nprobe=nprobe)
    if string.startswith("RR"):
        base = faiss.SearchParametersPreTransform(index_params=base)
    return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)


def row(name: str, target: float, auto: Contender, hand: Any, work: Work, truth: Any, rounds: int) -> dict[str, Any]:
    """Auto beside the best by hand that reaches the target, and beside the best that reaches auto's own recall."""
    best, same = (fastest(cheapest(hand, work, truth, recall), work) for recall in (target, auto.recall))
    everyone = [auto, best, same]
    for contender in everyone:
        one_round(contender, work.queries)  # warm up
        contender.rates.clear()
    for _ in range(rounds):
        for contender in everyone:
            one_round(contender, work.queries)
    return {
        "tuned": name,
        "target": target,
        "recall": auto.recall,
        "parameters": auto.name,
        "rate": auto.rate,
        "best_at_target": {"name": best.name, "recall": best.recall, "rate": best.rate, "ratio": auto.rate / best.rate},
        "best_at_recall": {"name": same.name, "recall": same.recall, "rate": same.rate, "ratio": auto.rate / same.rate},
    }


def fastest(contenders: list[Contender], work: Work) -> Contender:
    """By two passes over some queries each."""
    for _ in range(2):
        for contender in contenders:
            one_round(contender, work.queries[:BATCH])
    return max(contenders, key=lambda contender: max(contender.rates))


HOPELESS = 3.0  # times as slow as another that reaches the recall: not walked any further
_MEASURED: dict[tuple[str, int], tuple[float, float]] = {}  # (index, parameters) of one set -> (recall, seconds)


def cheapest(hand: Any, work: Work, truth: Any, wanted: float) -> list[Contender]:
    """Of each index: its cheapest parameters that reach the recall (of refined ones, by each factor)."""
    found: list[Contender] = []
    best_s = float("inf")
    for name, index, parameters in hand:

        def search(queries: Any, params: Any, index: Any = index) -> Any:
            return index.search(queries, K, params=params)[1]

        factors = 3 if "refine" in name else 1
        for offset in range(factors):
            for number in range(offset, len(parameters), factors):
                key = (name, number)
                if key not in _MEASURED:
                    started = time.perf_counter()
                    recall = recall_of(search(work.queries, parameters[number]), truth)
                    _MEASURED[key] = recall, time.perf_counter() - started
                recall, seconds = _MEASURED[key]
                if recall >= wanted:
                    found.append(Contender(name, search, recall, parameters[number]))
                    best_s = min(best_s, seconds)
                if recall >= wanted or seconds > HOPELESS * best_s:
                    break
    return found


def one_round(contender: Contender, queries: Any) -> None:
    started = time.perf_counter()
    for batch in batches(queries):
        contender.search(batch, contender.parameters)
    contender.rates.append(len(queries) / (time.perf_counter() - started))


def batches(queries: Any) -> list[Any]:
    return [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]


def recall_of(found: Any, truth: Any) -> float:
    return float(recall_at_k(found, truth).mean())


def as_markdown(report: dict[str, Any]) -> str:
    built = report["built"]
    lines = [
        f"### {report['set']}, {report['metric']}, {report['threads']} threads ({built['simd']})",
        "",
        f"auto: {built['index']}; build {built['seconds']:.1f} s ({built['predicted_seconds']:.1f} predicted), tuning "
        f"{built['tuning_seconds']:.1f} s; {built['bytes']:,} bytes ({built['predicted_bytes']:,} predicted)",
        "",
        "| tuned on | target | recall | auto q/s | best by hand at the target | ratio | at auto's recall | ratio |",
        "|---|---:|---:|---:|---|---:|---|---:|",
    ]
    for r in report["rows"]:
        best, same = r["best_at_target"], r["best_at_recall"]
        lines.append(
            f"| {r['tuned']}, {r['parameters']} | {r['target']:.2f} | {r['recall']:.4f} | {r['rate']:,.0f} "
            f"| {best['name']} {best['rate']:,.0f} ({best['recall']:.4f}) | {best['ratio']:.2f} "
            f"| {same['name']} {same['rate']:,.0f} ({same['recall']:.4f}) | {same['ratio']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
