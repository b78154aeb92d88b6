"""The one module that imports FAISS: build, search, save and load an index. Labels are row numbers.

Rules kept here: cosine is L2 on unit vectors; k is clamped; a label -1 never leaves; search parameters go with
the call; a loaded index is memory-mapped and never mutated; callers' arrays are never written to; threads are
set per calling thread (`use_threads`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.faiss_library import check_faiss_installation
from cluster.config import Metric
from cluster.errors import Corrupt, Invalid
from cluster.index_spec import TRAINING_POINTS_PER_CENTROID, IndexSpec

check_faiss_installation()  # a missing or doubled FAISS says so, instead of failing in ways that hide the cause
import faiss  # noqa: E402

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
NEVER = 2**31 - 1  # a number of query floats that no batch has


def use_threads(threads: int) -> None:
    """Set FAISS's threads for the calling thread; every thread that calls FAISS must do it once."""
    faiss.omp_set_num_threads(threads)


def library_facts() -> dict[str, str]:
    """Version and instruction set of the FAISS in use, for segment descriptions and status."""
    return {"faiss": faiss.__version__, "simd": faiss.SIMDConfig.get_level_name()}


def build_index(spec: IndexSpec, dimension: int, metric: Metric, sample: Vectors, seed: int) -> FaissIndex:
    """A trained, empty index. `sample` is what `training_points` asks for, shape (n, dimension)."""
    index = _new_index(spec, dimension, _faiss_metric(metric))
    if spec.kind == "ivf_flat":
        index.cp.seed = seed
        index.cp.max_points_per_centroid = TRAINING_POINTS_PER_CENTROID
        index.cp.min_points_per_centroid = 1  # the policy keeps 39; a forced kind on few points is its user's choice
    if not index.is_trained:
        index.train(np.ascontiguousarray(sample, dtype=np.float32))
    return FaissIndex(index, spec, metric)


def training_points(spec: IndexSpec, count: int) -> int:
    """How many of `count` vectors the index trains on."""
    if spec.kind == "ivf_flat":
        return min(count, spec.params["nlist"] * TRAINING_POINTS_PER_CENTROID)
    return 0 if spec.codes == "float32" else min(count, 1)


def _new_index(spec: IndexSpec, dimension: int, metric: int) -> Any:
    half = spec.codes == "float16"
    if spec.kind == "flat":
        return faiss.IndexFlat(dimension, metric)
    if spec.kind == "hnsw":
        m = spec.params["m"]
        index = (
            faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_fp16, m, metric)
            if half
            else faiss.IndexHNSWFlat(dimension, m, metric)
        )
        index.hnsw.efConstruction = spec.params["ef_construction"]
        return index
    quantizer = faiss.IndexFlat(dimension, metric)
    lists = spec.params["nlist"]
    index = (
        faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, faiss.ScalarQuantizer.QT_fp16, metric, False)
        if half
        else faiss.IndexIVFFlat(quantizer, dimension, lists, metric)
    )
    quantizer.this.disown()  # the IVF index frees it
    index.own_fields = True
    return index


def _faiss_metric(metric: Metric) -> int:
    return int(faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2)


def to_scores(distances: Vectors, metric: Metric) -> Vectors:
    """FAISS's distances as the metric's own values; cosine from squared L2 of unit vectors: 1 - D / 2."""
    return (np.float32(1.0) - distances / np.float32(2.0)) if metric == "cosine" else distances


class FaissIndex:
    """One index of one segment."""

    def __init__(self, index: Any, spec: IndexSpec, metric: Metric) -> None:
        self._index = index
        self._spec = spec
        self._metric = metric

    @property
    def count(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: Vectors) -> None:
        """Append vectors, shape (n, dimension); their labels follow those already there."""
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def search(self, queries: Vectors, k: int, params: dict[str, int]) -> tuple[Rows, Vectors]:
        """(labels, scores), both (n, min(k, count)); a label is -1 where fewer were found."""
        k = min(k, self.count)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        distances, labels = self._index.search(queries, k, params=self._search_parameters(params))
        return labels, to_scores(distances, self._metric)

    def _search_parameters(self, params: dict[str, int]) -> Any:
        unknown = params.keys() - {self._spec.search_param}
        if unknown:
            known = self._spec.search_param or "none"
            raise Invalid.at(f"params.{min(unknown)}", f"does not fit a {self._spec.kind} index; it takes: {known}")
        if not params:
            return None
        if self._spec.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=params["ef_search"])
        return faiss.SearchParametersIVF(nprobe=min(params["nprobe"], self._index.nlist))

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


def load_index(path: Path, spec: IndexSpec, dimension: int, metric: Metric, count: int, name: str) -> FaissIndex:
    """Memory-map a saved index; Corrupt, naming the object, where it is not the one described."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise Corrupt(f"{name}: FAISS cannot read it: {error}") from error
    facts = (index.d, index.ntotal, index.metric_type)
    if facts != (dimension, count, _faiss_metric(metric)):
        raise Corrupt(f"{name}: (dimension, count, metric) are {facts}, described as {(dimension, count, metric)}")
    if spec.kind == "flat":
        faiss.cvar.distance_compute_blas_threshold = _blas_threshold(metric, dimension)
    return FaissIndex(index, spec, metric)


def _blas_threshold(metric: Metric, dimension: int) -> int:
    """From how many floats of queries on exact search multiplies matrices; it pays from about 8 vectors on.

    Never for l2: FAISS then takes |x|^2 + |q|^2 - 2xq in float32, which cancels. Points of 64 dimensions at offset
    1,000 with spread 0.1 had recall 1.0 asked one by one and 0.0 in a batch of 16. Unit vectors (cosine) are safe.
    """
    return NEVER if metric == "l2" else 8 * dimension


@contextmanager
def _exact_distances(metric: Metric, dimension: int) -> Iterator[None]:
    """For a brute-force search inside a build, whose training wants FAISS's own threshold."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _blas_threshold(metric, dimension)
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def exact_search(
    queries: Vectors, blocks: Iterable[tuple[int, Vectors]], k: int, metric: Metric
) -> tuple[Rows, Vectors]:
    """Brute force over (first row, vectors) blocks: (rows, scores), both (queries, k), best first; -1 where none."""
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    worst = -np.inf if metric == "ip" else np.inf
    distances = np.full((len(queries), k), worst, dtype=np.float32)
    for first, vectors in blocks:
        part = _knn(queries, vectors, min(k, len(vectors)), metric)
        rows, distances = _best_of(rows, distances, part[0] + first, part[1], k, metric)
    return rows, to_scores(distances, metric)


def _knn(queries: Vectors, vectors: Vectors, k: int, metric: Metric) -> tuple[Rows, Vectors]:
    with _exact_distances(metric, queries.shape[1]):
        distances, rows = faiss.knn(queries, np.ascontiguousarray(vectors), k, metric=_faiss_metric(metric))
    return rows, distances


def _best_of(
    rows: Rows, distances: Vectors, more_rows: Rows, more_distances: Vectors, k: int, metric: Metric
) -> tuple[Rows, Vectors]:
    all_rows = np.concatenate([rows, more_rows], axis=1)
    all_distances = np.concatenate([distances, more_distances], axis=1)
    cost = -all_distances if metric == "ip" else all_distances
    order = np.argsort(cost, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_rows, order, 1), np.take_along_axis(all_distances, order, 1)


def blocks_until(blocks: Iterable[tuple[int, Vectors]], stop: int) -> Iterator[tuple[int, Vectors]]:
    """The part of consecutive blocks below row `stop`."""
    for first, vectors in blocks:
        if first >= stop:
            return
        yield first, vectors[: stop - first]
