"""What a shard adds to FAISS: searches of a view in process, beside FAISS's own search with the same parameters.

    python benchmarks/shard_cost.py [--count 20000] [--dimension 128] [--dtype float32] [--segment FOLDER]

Times are CPU time of one thread, so that a busy machine changes them little; medians of rounds in which all are asked
in turn. "us" is what a query costs beyond FAISS; with rows of float32 it includes the exact scores from the rows.
With tombstones and with a tail FAISS is asked as without. FOLDER has the files of a segment with an l2 graph.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import typer

from actors.faiss_index import load_index, use_threads
from actors.segment_builder import BuildOptions, build_segment
from actors.segment_loader import LoadedSegment
from actors.shard_view import ShardView
from actors.tail import Tail
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import hash_ids
from cluster.index_spec import FAR_EF_SEARCH, FAR_SCORE, IndexSpec
from cluster.query import SearchGroup, SearchParams, ShardSearch
from cluster.row_selection import RowSelection
from cluster.segment import Rows, SegmentDescription, rows_per_batch, rows_schema, write_rows

BATCHES = (1, 16, 64, 256)
K = 10
ROUNDS, QUERIES = 15, 1_024
TAIL_POINTS, DELETED_SHARE = 100, 0.01
SEED = 7


def main(
    count: int = 20_000,
    dimension: int = 128,
    dtype: Annotated[str, typer.Option(help="Of the stored vectors: float32 or float16.")] = "float32",
    segment: Annotated[Path | None, typer.Option(help="A segment that is there already.")] = None,
) -> None:
    use_threads(1)
    with tempfile.TemporaryDirectory(prefix="eagleray-cost-") as folder:
        place = segment or Path(folder)
        if segment is None:
            build(place, count, CollectionConfig(dimension, "l2", vector_dtype=dtype, index=IndexConfig("hnsw")))  # type: ignore[arg-type]
        description = SegmentDescription.decode((place / paths.DESCRIPTION).read_bytes(), paths.DESCRIPTION)
        print_costs(description, place)


def build(folder: Path, count: int, config: CollectionConfig) -> None:
    """A segment of vectors around 1,000 centres."""
    random = np.random.default_rng(SEED)
    centres = random.standard_normal((1_000, config.dimension))
    vectors = centres[random.integers(0, len(centres), count)] + random.standard_normal((count, config.dimension))
    ids = pa.array(np.arange(count))
    hashes = hash_ids(ids)
    order = np.argsort(hashes)
    columns = [ids.take(pa.array(order)), vectors_array(vectors[order].astype(config.vector_dtype))]
    whole = pa.record_batch([*columns, pa.array(hashes[order])], schema=rows_schema(config, {}))
    step = rows_per_batch(config)
    batches = (pa.concat_batches([whole.slice(start, step)]) for start in range(0, count, step))
    write_rows(folder / paths.ROWS, whole.schema, batches)
    build_segment(folder, "segment", config, count, step, BuildOptions(threads=2))


def print_costs(description: SegmentDescription, folder: Path) -> None:
    segment, queries = loaded(description, folder), asked(description, folder)
    point = segment.operating_point.params
    print(f"{machine()}; {description.count} x {description.dimension} {description.vector_dtype}")
    print(f"{segment.spec.kind} {segment.spec.params} {segment.spec.codes}, {point}")
    print("| queries a call | FAISS us | one segment | us | tombstones | us | tail | us |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    bare = faiss.read_index(str(folder / paths.INDEX), faiss.IO_FLAG_MMAP_IFC)
    for batch in BATCHES:
        own, *others = times(bare, list(views(segment, queries)), queries, batch, int(point["ef_search"]))
        cells = [f"{each / own:.2f} | {each - own:.1f}" for each in others]
        print(f"| {batch} | {own:.1f} | {' | '.join(cells)} |")


def loaded(description: SegmentDescription, folder: Path) -> LoadedSegment:
    """Every query counts as near: FAISS, beside it, knows no other effort for far ones."""
    spec = IndexSpec.from_dict(description.spec)
    points = tuple(replace(point, params=near(point.params)) for point in description.operating_points)
    description = replace(description, operating_points=points)
    rows = Rows(folder / paths.ROWS, description.count, description.dimension, description.rows_per_batch)
    index = load_index(folder / paths.INDEX, spec, description.dimension, "l2", description.count, paths.INDEX)
    return LoadedSegment(description, rows, index, "l2")


def near(params: dict[str, float]) -> dict[str, float]:
    ef_search = params["ef_search"]
    return {"ef_search": ef_search, FAR_EF_SEARCH: ef_search, FAR_SCORE: np.inf}


def asked(description: SegmentDescription, folder: Path) -> Any:
    """Stored vectors, moved a little."""
    rows = Rows(folder / paths.ROWS, description.count, description.dimension, description.rows_per_batch)
    random = np.random.default_rng(SEED)
    vectors = rows.gather_vectors(random.integers(0, description.count, QUERIES))
    return (vectors + 0.1 * vectors.std() * random.standard_normal(vectors.shape)).astype(np.float32)


def views(segment: LoadedSegment, queries: Any) -> Iterator[ShardView]:
    """One segment; with tombstones; with a tail."""
    description = segment.description
    config = CollectionConfig(description.dimension, "l2", vector_dtype=description.vector_dtype)  # type: ignore[arg-type]
    plain = ShardView(1, 1, config, (segment,))
    yield plain
    kept = np.random.default_rng(SEED).random(description.count) >= DELETED_SHARE
    yield replace(plain, selections={description.segment_id: RowSelection.of(kept)})
    tail, ids = Tail(config), list(range(-TAIL_POINTS, 0))
    vectors = vectors_array(queries[:TAIL_POINTS].astype(description.vector_dtype))
    batch = pa.record_batch({"id": pa.array(ids), "vector": vectors})
    tail.append(batch, ids, hash_ids(batch.column("id")))
    yield replace(plain, tail=tail.view())


def times(bare: Any, compared: list[ShardView], queries: Any, batch: int, ef_search: int) -> list[float]:
    """CPU microseconds a query: of FAISS, then of each view."""
    parameters = faiss.SearchParametersHNSW(efSearch=ef_search)
    group = (SearchGroup(0, batch, K, SearchParams()),)
    searches: list[Callable[[Any], Any]] = [lambda part: bare.search(part, K, params=parameters)]
    searches += [lambda part, view=view: view.search(ShardSearch(1, part, group)) for view in compared]
    parts = [queries[start : start + batch] for start in range(0, QUERIES, batch)]
    taken = np.array([[cpu_s(search, parts) for search in searches] for _ in range(ROUNDS)])
    return [float(each) for each in np.median(taken, axis=0) / QUERIES * 1e6]


def cpu_s(search: Callable[[Any], Any], parts: list[Any]) -> float:
    started = time.thread_time()
    for part in parts:
        search(part)
    return time.thread_time() - started


def machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, FAISS {faiss.__version__} {faiss.SIMDConfig.get_level_name()}"
    )


if __name__ == "__main__":
    typer.run(main)
