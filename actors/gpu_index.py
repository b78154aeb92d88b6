"""Indexes in a GPU's memory: built there, placed there beside a CPU's index, searched there. Labels are row numbers.

Rules kept here, each because FAISS 1.15.1 does not (docs/decisions/0008-gpu.md): cuVS is asked for by name, as without
it a row selection is ignored; k is clamped to the points there are; parameters go with the call and are of the class
that the index takes, another is a null pointer to a graph; a selection is a bitmap, which alone is quick to convert;
labels that stand for nothing, or for rows that are not selected, become -1. A graph refers to the host's memory that it
was made from: `GpuIndex` keeps the CPU's index for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.code_check import CHECKED_ROWS, codes_fit
from actors.faiss_index import FaissIndex, Vectors, build_index, check_knobs, faiss_metric, to_scores
from actors.faiss_index import Rows as Labels
from actors.gpu_device import GpuDevice, GpuRefused, OnDevice
from cluster.config import Metric
from cluster.errors import FieldError
from cluster.gpu_memory import ADDED_AT_ONCE, BATCH_MAX, GPU_MARGIN, gpu_need, index_bytes, nn_descent_bytes, refusal
from cluster.gpu_policy import NPROBE_MAX, k_limit
from cluster.index_spec import ITOPK_MAX, ITOPK_STEP, IndexSpec, fewest_training_points
from cluster.row_selection import RowSelection
from cluster.segment import Rows

WARM_K = 10
NN_DESCENT_ROWS_MAX = 5_000_000  # from so many on Elasticsearch, which measured it, has an IVF-PQ find the neighbours
CENTRED_FROM = 4.0  # squared length of the mean, in mean squared distances from it
CENTRE_ROWS = 10_000
ADDED_BYTES = 256 << 20  # host memory of the vectors that are copied at a time
Progress = Callable[[float], None]


def build_on_gpu(
    device: GpuDevice,
    spec: IndexSpec,
    dimension: int,
    metric: Metric,
    rows: Rows,
    seed: int,
    progress: Progress = lambda share: None,
) -> tuple[FaissIndex, GpuIndex]:
    """(the CPU's index, to be saved; the same on the GPU) of all rows, trained and linked on the GPU.

    GpuMemoryFull, with the numbers, where it is not predicted to fit; GpuLost. `seed` is not that of cuVS's clustering,
    which has none to be set. `progress` is told the share done, 0 to 1.
    """
    need = gpu_need(spec, rows.count, dimension)
    words = refusal(need.peak, device.left_bytes(), f"building {spec.kind} of {rows.count} rows")
    if words:
        raise GpuRefused(words)
    build = {"flat": _flat_on_cpu, "cagra": _graph}.get(spec.kind, _lists)
    cpu = build(device, spec, dimension, metric, rows, seed, progress)
    gpu = place_on_gpu(device, cpu, spec, dimension, metric, rows)
    progress(1.0)
    return cpu, gpu


def _flat_on_cpu(
    device: GpuDevice, spec: IndexSpec, dimension: int, metric: Metric, rows: Rows, seed: int, progress: Progress
) -> FaissIndex:
    """Nothing is computed to build it."""
    index = build_index(spec, dimension, metric, rows.vectors(0, spec.training_points(rows.count)), seed)
    index.reserve(rows.count)
    for first, vectors in rows.blocks():
        index.add(vectors)
        progress((first + len(vectors)) / rows.count * 0.8)
    return index


def _lists(
    device: GpuDevice, spec: IndexSpec, dimension: int, metric: Metric, rows: Rows, seed: int, progress: Progress
) -> FaissIndex:
    """cuVS clusters half of the sample that it is given, at random, and wants no fewer points than lists."""
    library, sample = device.library, rows.vectors(0, spec.training_points(rows.count))
    fewest = max(2 * spec.params["nlist"], fewest_training_points(spec))
    if len(sample) < fewest:
        sample = np.tile(sample, (-(-fewest // len(sample)), 1))
    building = device.keep(lambda resources: _empty_lists(library, resources, spec, dimension, metric), 0)
    try:
        building.use(lambda index: index.train(sample))
        progress(0.3)
        for first, vectors in _pieces(rows):
            _add(building, vectors)
            progress(0.3 + 0.5 * (first + len(vectors)) / rows.count)
        return FaissIndex(building.use(library.index_gpu_to_cpu), spec, metric)
    finally:
        building.close()


def _add(held: OnDevice, vectors: Vectors) -> None:
    held.use(lambda index: index.add(vectors))


def _empty_lists(library: Any, resources: Any, spec: IndexSpec, dimension: int, metric: Metric) -> Any:
    pq = spec.kind == "ivf_pq"
    config = library.GpuIndexIVFPQConfig() if pq else library.GpuIndexIVFFlatConfig()
    config.device = 0
    config.use_cuvs = config.flatConfig.use_cuvs = True
    config.indicesOptions = library.INDICES_64_BIT  # cuVS knows no other
    if not pq:
        return library.GpuIndexIVFFlat(resources, dimension, spec.params["nlist"], faiss_metric(metric), config)
    config.interleavedLayout = True  # as where a CPU's index is copied for cuVS
    sizes = spec.params["nlist"], spec.params["pq_m"], spec.params["pq_bits"]
    return library.GpuIndexIVFPQ(resources, dimension, *sizes, faiss_metric(metric), config)


def _graph(
    device: GpuDevice, spec: IndexSpec, dimension: int, metric: Metric, rows: Rows, seed: int, progress: Progress
) -> FaissIndex:
    """All vectors at once: a graph takes no more later. They are read again as it is copied, and live until then."""
    library = device.library
    vectors = _matrix(rows, dimension, spec)
    progress(0.1)
    config = library.GpuIndexCagraConfig()
    config.device = 0
    config.use_cuvs = True
    config.graph_degree = spec.params["graph_degree"]
    config.intermediate_graph_degree = spec.params["intermediate_graph_degree"]
    halves = codes_fit(rows.vectors(0, min(rows.count, CHECKED_ROWS)), "float16", metric)
    config.build_algo = _build_algo(device, spec, rows.count, dimension, halves)
    metric_type = faiss_metric(metric)
    building = device.keep(lambda resources: library.GpuIndexCagra(resources, dimension, metric_type, config), 0)
    try:
        building.use(lambda index: index.train(vectors, numeric_type=_numbers(library, spec)))
        progress(0.7)
        return FaissIndex(building.use(lambda index: _copied_graph(library, index, spec)), spec, metric)
    finally:
        building.close()


def _matrix(rows: Rows, dimension: int, spec: IndexSpec) -> NDArray[Any]:
    """All vectors in one piece, as the graph keeps them."""
    vectors = np.empty((rows.count, dimension), np.float16 if spec.codes == "float16" else np.float32)
    for first, block in rows.blocks():
        vectors[first : first + len(block)] = block
    return vectors


def _build_algo(device: GpuDevice, spec: IndexSpec, count: int, dimension: int, halves: bool) -> int:
    """Who finds the neighbours that the graph is made of: NN-descent is quicker, and takes more memory.

    It looks at a float16 copy: `halves` says whether the vectors survive that.
    """
    left, library = device.left_bytes(), device.library
    need = index_bytes(spec, count, dimension) + nn_descent_bytes(spec, count, dimension)
    fits = left is None or GPU_MARGIN * need <= left
    quick = fits and halves and count < NN_DESCENT_ROWS_MAX
    return int(library.graph_build_algo_NN_DESCENT if quick else library.graph_build_algo_IVF_PQ)


def _copied_graph(library: Any, index: Any, spec: IndexSpec) -> Any:
    """The CPU's form. Of float16 FAISS copies the lowest level alone; a search then begins at random points."""
    copied = library.IndexHNSWCagra()
    copied.base_level_only = spec.codes == "float16"
    index.copyTo(copied)
    return copied


def _numbers(library: Any, spec: IndexSpec) -> int:
    return int(library.Float16 if spec.codes == "float16" else library.Float32)


def _pieces(rows: Rows) -> Iterator[tuple[int, Vectors]]:
    """(first row, vectors) of all rows, so many at a time as are copied to a GPU at once."""
    step = max(1, min(ADDED_AT_ONCE, ADDED_BYTES // (4 * rows.dimension)))
    for start in range(0, rows.count, step):
        yield start, rows.vectors(start, min(start + step, rows.count))


# --- what is served -----------------------------------------------------------------------------------------------


def place_on_gpu(
    device: GpuDevice, cpu: FaissIndex, spec: IndexSpec, dimension: int, metric: Metric, rows: Rows
) -> GpuIndex:
    """Copy an index into the GPU's memory, and search it a little, which links the kernels of its searches.

    Searches of other indexes wait meanwhile. GpuMemoryFull, with the numbers, where it is not predicted to fit what
    this process may still take, or does not; GpuLost.
    """
    centre = _centre(rows, metric) if spec.kind == "flat" else None
    by_pieces = spec.kind == "flat" and (spec.codes == "float16" or centre is not None)
    need = gpu_need(spec, rows.count, dimension)
    searching = replace(need, search=max(need.search, device.search_bytes))  # the others', too, one at a time
    moving = 2 * need.index if by_pieces else 0  # each piece moves what is there to a larger place
    loading = max(searching.load, moving)
    words = refusal(loading, device.left_bytes(), f"{spec.kind} of {rows.count} rows")
    if words:
        raise GpuRefused(words)
    library = device.library
    if by_pieces:
        held = device.keep(
            lambda resources: _empty_flat(library, resources, spec, dimension, metric), need.index, need.search
        )
        measured = _fill(device, held, rows, centre)
    else:
        held = device.keep(
            lambda resources: _copy(library, resources, cpu.faiss_object, spec, metric), need.index, need.search
        )
        measured = held.measured_bytes
    index = GpuIndex(library, held, cpu, spec, metric, _Placed(need.index, measured, centre))
    try:
        _warm_up(index, rows)
    except Exception:
        index.close()
        raise
    return index


def _copy(library: Any, resources: Any, source: Any, spec: IndexSpec, metric: Metric) -> Any:
    if spec.kind == "cagra":  # FAISS's general copy does not ask a graph for the type of its numbers in every version
        config = library.GpuIndexCagraConfig()
        config.device = 0
        config.use_cuvs = True
        index = library.GpuIndexCagra(resources, int(source.d), faiss_metric(metric), config)
        index.copyFrom_ex(source, _numbers(library, spec))
        return index
    options = library.GpuClonerOptions()
    options.use_cuvs = True
    options.indicesOptions = library.INDICES_64_BIT
    return library.index_cpu_to_gpu(resources, 0, source, options)


def _empty_flat(library: Any, resources: Any, spec: IndexSpec, dimension: int, metric: Metric) -> Any:
    """FAISS does not copy a CPU's float16 codes for cuVS."""
    config = library.GpuIndexFlatConfig()
    config.device = 0
    config.use_cuvs = True
    config.useFloat16 = spec.codes == "float16"
    return library.GpuIndexFlat(resources, dimension, faiss_metric(metric), config)


def _fill(device: GpuDevice, held: OnDevice, rows: Rows, centre: Vectors | None) -> int | None:
    """Bytes that were taken meanwhile; closes the index where it does not fit."""
    before = device.free_bytes()
    try:
        for _, vectors in _pieces(rows):
            _add(held, vectors if centre is None else vectors - centre)
    except Exception:
        held.close()
        raise
    after = device.free_bytes()
    return None if before is None or after is None else max(0, before - after)


def _centre(rows: Rows, metric: Metric) -> Vectors | None:
    """The mean of the rows where it is far from the origin, (d,); None where it is not, or the metric is not l2.

    cuVS scans by |x|^2 + |q|^2 - 2xq in float32, which cancels where all points lie far out (see
    `faiss_index.blas_threshold`). Distances are the same between points that were all moved.
    """
    if metric != "l2" or rows.count == 0:
        return None
    sample = rows.vectors(0, min(rows.count, CENTRE_ROWS))
    mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = float(np.square(sample - mean).sum(axis=1).mean())
    return mean if float(np.square(mean).sum()) > CENTRED_FROM * spread else None


def _warm_up(index: GpuIndex, rows: Rows) -> None:
    """Kernels differ by whether the batch fills the GPU, and whether rows are selected."""
    if index.count == 0:
        return
    queries = rows.vectors(0, min(rows.count, BATCH_MAX))
    for batch in (queries[:1], queries):
        for selection in (None, RowSelection.everything(rows.count)):
            index.search(batch, WARM_K, {}, selection)


@dataclass(frozen=True)
class _Placed:
    """Bytes of an index on the GPU, as predicted and as measured, and what was taken from its vectors."""

    predicted_bytes: int
    measured_bytes: int | None
    centre: Vectors | None


class GpuIndex:
    """`SearchableIndex` in a GPU's memory. The scores of a search are for ranking: exact ones come from the rows."""

    def __init__(
        self, library: Any, held: OnDevice, cpu: FaissIndex, spec: IndexSpec, metric: Metric, placed: _Placed
    ) -> None:
        self._library = library
        self._held = held
        self._cpu = cpu
        self._spec = spec
        self._metric = metric
        self._centre = placed.centre
        self._dimension = int(cpu.faiss_object.d)
        self.count = cpu.count
        self.lists = cpu.lists
        self.predicted_bytes = placed.predicted_bytes
        self.measured_bytes = placed.measured_bytes
        self.knobs = {"flat": (), "cagra": ("itopk_size", "search_width")}.get(spec.kind, ("nprobe",)) + (
            ("rerank",) if spec.rerank_store != "none" else ()
        )

    def takes(self, k: int, params: dict[str, float]) -> bool:
        """Whether that is within the limits of the kind."""
        return self.over_limit(k, params) is None

    def over_limit(self, k: int, params: dict[str, float]) -> FieldError | None:
        """What of a search is more than the kind takes; None where nothing is."""
        asked: dict[str, tuple[float, int]] = {"k": (min(k, self.count), k_limit(self._spec.kind))}
        if self.lists:
            asked["params.nprobe"] = min(params.get("nprobe", 1), self.lists), NPROBE_MAX
        if self._spec.kind == "cagra":
            asked["params.itopk_size"] = params.get("itopk_size", 0), ITOPK_MAX
        for field, (value, limit) in asked.items():
            if value > limit:
                words = f"{value:g} is more than {self._spec.kind} takes on a GPU, at most {limit}"
                return FieldError(field, words)
        return None

    def check(self, params: dict[str, float]) -> None:
        """Invalid, by name, where a parameter is not one of `knobs`. A graph leaves its twin's own alone."""
        known = (*self.knobs, "ef_search") if self._spec.kind == "cagra" else self.knobs
        check_knobs(params, known, self._spec.kind)

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Labels, Vectors]:
        """As `FaissIndex.search`; GpuMemoryFull, GpuLost, IndexClosed. ValueError beyond the limits: ask `takes`."""
        total, k = len(queries), min(k, self.count)
        if k == 0 or total == 0:
            return np.empty((total, 0), np.int64), np.empty((total, 0), np.float32)
        if queries.shape != (total, self._dimension):
            raise ValueError(f"queries are {queries.shape}, the index has {self._dimension} dimensions")
        if (over := self.over_limit(k, params)) is not None:
            raise ValueError(f"{over.field}: {over.message}")
        self.check(params)
        queries = np.ascontiguousarray(queries if self._centre is None else queries - self._centre, dtype=np.float32)
        asked = self._parameters(k, params, selection)
        parts = [self._found(queries[first : first + BATCH_MAX], k, asked) for first in range(0, total, BATCH_MAX)]
        distances, labels = parts[0] if len(parts) == 1 else (np.concatenate(each) for each in zip(*parts, strict=True))
        labels, distances = self._sound(labels, distances, selection)
        return labels, to_scores(distances, self._metric)

    def close(self) -> None:
        """Free its memory on the GPU. Searches that are on their way raise IndexClosed."""
        self._held.close()

    def _found(self, queries: Vectors, k: int, asked: dict[str, Any]) -> tuple[Vectors, Labels]:
        answer: tuple[Vectors, Labels] = self._held.use(lambda index: index.search(queries, k, **asked))
        return answer

    def _parameters(self, k: int, params: dict[str, float], selection: RowSelection | None) -> dict[str, Any]:
        """The arguments of FAISS's search that say how. A graph keeps as many candidates as it is to give."""
        library = self._library
        chosen = {} if selection is None else {"sel": library.IDSelectorBitmap(selection.bits)}
        if self._spec.kind == "cagra":
            candidates = max(k, int(params.get("itopk_size", 2 * ITOPK_STEP)))
            given = {"itopk_size": -(-candidates // ITOPK_STEP) * ITOPK_STEP}
            if "search_width" in params:
                given["search_width"] = int(params["search_width"])
            made = library.SearchParametersCagra(**given, **chosen)
            return {"params": made, "numeric_type": _numbers(library, self._spec)}
        if self.lists:
            nprobe = min(int(params.get("nprobe", 1)), self.lists)
            return {"params": library.SearchParametersIVF(nprobe=nprobe, **chosen)}
        return {"params": library.SearchParameters(**chosen) if chosen else None}

    def _sound(self, labels: Labels, distances: Vectors, selection: RowSelection | None) -> tuple[Labels, Vectors]:
        """Label -1, last and infinitely far, for what stands for no row: cuVS has several marks for that.

        A row without a finite distance is none, too: it fills a place, or the query was too large for float16.
        """
        none = (labels < 0) | (labels >= self.count) | ~(np.abs(distances) < np.finfo(np.float32).max)
        if selection is not None:
            none |= ~selection.holds(np.where(none, 0, labels))
        if not none.any():
            return labels, distances
        far = -np.inf if self._metric == "ip" else np.inf
        labels, distances = np.where(none, -1, labels), np.where(none, np.float32(far), distances)
        order = np.argsort(none, axis=1, kind="stable")
        return np.take_along_axis(labels, order, 1), np.take_along_axis(distances, order, 1)
