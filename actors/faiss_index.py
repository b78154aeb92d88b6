"""The module that imports FAISS: build, search, save and load an index. Labels are row numbers.

Rules kept here: cosine is L2 on unit vectors; k is clamped; search parameters and row selections go with the call,
as objects of the class that each level of the index asks for; a loaded index is memory-mapped and never mutated;
callers' arrays are never written to; threads are set per calling thread (`use_threads`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.faiss_library import check_faiss_installation, let_gpus_be_numbered_by_bus, let_threads_sleep
from cluster.config import Metric
from cluster.errors import Corrupt, Invalid
from cluster.index_spec import TRAINING_POINTS_PER_CENTROID, IndexSpec, fewest_training_points
from cluster.row_selection import RowSelection

let_threads_sleep()
let_gpus_be_numbered_by_bus()
check_faiss_installation()  # a missing or doubled FAISS says so, instead of failing in ways that hide the cause
import faiss  # noqa: E402

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
SELECTIVE = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)  # take a row selection
UNSELECTIVE = (faiss.IndexIVFAdditiveQuantizer, faiss.IndexIVFPQR, faiss.IndexIVFSpectralHash)  # but these do not
FACTORY_SIZES = re.compile(r"(?:IVF|HNSW|NSG|PQ|RQ|LSQ|PRQ|PLSQ|PCA|PCAR|PCAW|OPQ|Pad|RR|L2norm|ITQ)(\d+)")
FACTORY_BITS = re.compile(r"x(\d+)")
FACTORY_SIZE_MAX, FACTORY_BITS_MAX = 1_048_576, 12
BLAS_THRESHOLD = int(faiss.cvar.distance_compute_blas_threshold)  # floats of queries; FAISS's own
ParamsKey = tuple[tuple[str, float], ...]
PARAMETERS_KEPT = 256  # objects of FAISS for the parameters of searches; operating points, as widened, are few
ROOM_ABOVE = 1.1  # of the links above the lowest level of a graph, whose number is random
GRAPH_KNOBS_ON_GPU = ("itopk_size", "search_width")
COARSE_EF_MIN = 64  # candidates kept by a graph over the centroids: at least, and at least twice the lists asked for


class SearchableIndex(Protocol):
    """One index of one segment, on whatever device. Labels are row numbers 0 to `count` - 1."""

    @property
    def count(self) -> int: ...

    @property
    def knobs(self) -> tuple[str, ...]:
        """The search parameters it takes."""
        ...

    @property
    def lists(self) -> int:
        """Inverted lists; 0 where it has none."""
        ...

    def check(self, params: dict[str, float]) -> None: ...

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Rows, Vectors]: ...


def use_threads(threads: int) -> None:
    """Set FAISS's threads for the calling thread; every thread that calls FAISS must do it once."""
    faiss.omp_set_num_threads(threads)


def threads_in_use() -> int:
    """FAISS's threads of the calling thread."""
    return int(faiss.omp_get_max_threads())


def library_facts() -> dict[str, str]:
    """Version and instruction set of the FAISS in use, for segment descriptions and status."""
    return {"faiss": faiss.__version__, "simd": faiss.SIMDConfig.get_level_name()}


def check_factory(factory: str, dimension: int, metric: Metric) -> None:
    """Invalid, with FAISS's own reason, where a factory string does not make an index that can be served.

    Parts so large that making the empty index takes gigabytes are refused before FAISS sees them.
    """
    sizes = [int(number) for number in FACTORY_SIZES.findall(factory)]
    bits = [int(number) for number in FACTORY_BITS.findall(factory)]
    too_large = any(not 1 <= size <= FACTORY_SIZE_MAX for size in sizes) or max(bits, default=1) > FACTORY_BITS_MAX
    if "IMI" in factory or too_large:
        bounds = f"sizes must be 1 to {FACTORY_SIZE_MAX}, codes at most {FACTORY_BITS_MAX} bits, and IMI is not taken"
        raise Invalid.at("index.factory", f"{factory!r}: {bounds}")
    try:
        index = faiss.index_factory(dimension, factory, faiss_metric(metric))
    except (RuntimeError, MemoryError) as error:
        reason = re.split(r"\.cpp:\d+: |Error: ", str(error))[-1].strip()
        raise Invalid.at(
            "index.factory",
            f"FAISS cannot make {factory!r} for {dimension} dimensions: {reason}; "
            "such as HNSW32,SQ8 or IVF1024,PQ48x4fsr would do",
        ) from None
    levels = _levels(index)
    if any(isinstance(level, faiss.IndexIDMap) for level in levels):
        raise Invalid.at("index.factory", f"{factory!r} maps ids; labels must be row numbers: leave IDMap out")
    if index.metric_type != faiss_metric(metric):
        raise Invalid.at("index.factory", f"{factory!r} does not take the metric {metric}")
    if not isinstance(levels[-1], SELECTIVE) or isinstance(levels[-1], UNSELECTIVE):
        raise Invalid.at("index.factory", f"{factory!r} takes no filter; HNSW, Flat, SQ, and IVF of Flat, SQ or PQ do")


def build_index(spec: IndexSpec, dimension: int, metric: Metric, sample: Vectors, seed: int) -> FaissIndex:
    """A trained, empty index. `sample` is what `IndexSpec.training_points` asks for, shape (n, dimension)."""
    index = faiss.index_factory(dimension, spec.factory_string(dimension), faiss_metric(metric))
    kept = [_prepare(level, spec, seed) for level in _levels(index)]
    if not index.is_trained:
        sample = np.ascontiguousarray(sample, dtype=np.float32)
        repeats = -(-fewest_training_points(spec) // max(1, len(sample)))
        try:
            index.train(np.tile(sample, (repeats, 1)) if repeats > 1 else sample)
        except RuntimeError as error:
            reason = str(error).rsplit("Error: ", 1)[-1].strip()
            raise Invalid.at("index", f"{spec.factory_string(dimension)} of {len(sample)} points: {reason}") from None
    del kept  # FAISS held only pointers
    return FaissIndex(index, spec, metric)


def _prepare(level: Any, spec: IndexSpec, seed: int) -> list[Any]:
    """Set what a factory string cannot say, before training; returns what must live until that is over."""
    if isinstance(level, faiss.IndexHNSW) and spec.kind == "hnsw":
        level.hnsw.efConstruction = spec.params["ef_construction"]
    if isinstance(level, faiss.IndexIVF):
        level.cp.seed = seed
        level.cp.max_points_per_centroid = TRAINING_POINTS_PER_CENTROID
        level.cp.min_points_per_centroid = 1  # the policy keeps 39; a forced kind on few points is its user's choice
    quantizer = getattr(level, "pq", None)
    if quantizer is not None:
        quantizer.cp.seed = seed
        quantizer.cp.min_points_per_centroid = 1
    if not isinstance(level, faiss.IndexPreTransform):
        return []
    transforms = [faiss.downcast_VectorTransform(level.chain.at(number)) for number in range(level.chain.size())]
    return [_prepared_rotation(each, seed) for each in transforms if isinstance(each, faiss.OPQMatrix)]


def _prepared_rotation(rotation: Any, seed: int) -> Any:
    """The quantizer that an OPQ rotation trains with, as others are prepared."""
    quantizer = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    rotation.pq = quantizer
    return quantizer


def _levels(index: Any) -> list[Any]:
    """The index and those it wraps, outermost first, each as its own class."""
    levels = [faiss.downcast_index(index)]
    while True:
        inner = getattr(levels[-1], "base_index", None) or (
            levels[-1].index if isinstance(levels[-1], faiss.IndexPreTransform) else None
        )
        if inner is None:
            return levels
        levels.append(faiss.downcast_index(inner))


def faiss_metric(metric: Metric) -> int:
    return int(faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2)


def to_scores(distances: Vectors, metric: Metric) -> Vectors:
    """FAISS's distances as the metric's own values; cosine from squared L2 of unit vectors: 1 - D / 2."""
    return (np.float32(1.0) - distances / np.float32(2.0)) if metric == "cosine" else distances


class FaissIndex:
    """`SearchableIndex` on the CPU."""

    def __init__(self, index: Any, spec: IndexSpec, metric: Metric) -> None:
        self._index = faiss.downcast_index(index)
        self._owner = index
        self._spec = spec
        self._metric = metric
        self._dimension = int(index.d)
        self._known: dict[ParamsKey, Any] = {}
        self._known_of: tuple[RowSelection | None, dict[ParamsKey, Any]] = None, {}  # for the last selection
        self.count = int(index.ntotal)
        self.kind = spec.kind
        levels = _levels(index)
        innermost = levels[-1]
        self._flat = isinstance(innermost, faiss.IndexFlat)
        self._ignored = GRAPH_KNOBS_ON_GPU if spec.kind == "cagra" else ()
        self.lists = int(innermost.nlist) if isinstance(innermost, faiss.IndexIVF) else 0
        self.knobs = (
            *(("nprobe",) if self.lists else ()),
            *(("ef_search",) if isinstance(innermost, faiss.IndexHNSW) else ()),
            *(("rerank",) if spec.rerank_store != "none" or isinstance(levels[0], faiss.IndexRefine) else ()),
        )

    def reserve(self, count: int) -> None:
        """For an empty index that is about to get `count` points.

        FAISS's arrays double when they are full, and are copied then. Made long and short again they keep their room.
        Inverted lists are left as they are: each is small.
        """
        for level in _levels(self._index):
            graph = isinstance(level, faiss.IndexHNSW)
            codes = faiss.downcast_index(level.storage if graph else getattr(level, "refine_index", level))
            if isinstance(codes, faiss.IndexFlatCodes):
                _keep_room(codes.codes, count * codes.code_size)
            if graph:
                links = level.hnsw.nb_neighbors(1)  # of each point on a level above, which one of M points reaches
                above = links / (links - 1) * ROOM_ABOVE
                _keep_room(level.hnsw.neighbors, int(count * (level.hnsw.nb_neighbors(0) + above)))

    def add(self, vectors: Vectors) -> None:
        """Append vectors, shape (n, dimension); their labels follow those already there."""
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        self.count = int(self._index.ntotal)

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Rows, Vectors]:
        """(labels, scores), both (n, min(k, count)); a label is -1 where fewer were found.

        Only rows of the selection are found. Invalid where a parameter is not one of `knobs`.
        """
        count, k = len(queries), min(k, self.count)
        if k == 0 or count == 0:
            return np.empty((count, 0), np.int64), np.empty((count, 0), np.float32)
        if queries.shape != (count, self._dimension):
            raise ValueError(f"queries are {queries.shape}, the index has {self._dimension} dimensions")
        parameters = self._parameters(params, selection)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        distances, labels = np.empty((count, k), dtype=np.float32), np.empty((count, k), dtype=np.int64)
        arrays = faiss.swig_ptr(queries), k, faiss.swig_ptr(distances), faiss.swig_ptr(labels)
        self._index.search_c(count, *arrays, parameters)  # what FAISS's own `search` in Python calls
        return labels, to_scores(distances, self._metric)

    def _parameters(self, params: dict[str, float], selection: RowSelection | None) -> Any:
        """FAISS's object for these parameters, which no search changes: made once for all threads."""
        known, key = self._known_for(selection), tuple(params.items())
        if key in known:
            return known[key]
        self.check(params)
        if len(known) >= PARAMETERS_KEPT:
            known.clear()
        known[key] = made = _search_parameters(self._index, params, self._selector(selection))
        return made

    def _known_for(self, selection: RowSelection | None) -> dict[ParamsKey, Any]:
        """What was made for a selection; of those that leave something out only the last one asked for is kept."""
        if selection is None:
            return self._known
        known_of, known = self._known_of
        if known_of is not selection:
            known = {}
            self._known_of = selection, known
        return known

    def _selector(self, selection: RowSelection | None) -> Any:
        if selection is not None:
            return faiss.IDSelectorBitmap(selection.bits)
        return faiss.IDSelectorAll() if self._flat and self._metric == "l2" else None  # see `blas_threshold`

    def check(self, params: dict[str, float]) -> None:
        """Invalid, by name, where a parameter is not one of `knobs`. The twin of a graph leaves its GPU's own alone."""
        check_knobs(params, (*self.knobs, *self._ignored), self._spec.kind)

    @property
    def faiss_object(self) -> Any:
        """FAISS's own object, for what copies it to a GPU. It lives no longer than this one, and a copy may need it."""
        return self._index

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


def check_knobs(params: dict[str, float], knobs: tuple[str, ...], kind: str) -> None:
    """Invalid, by name, where a parameter is not one of the knobs of an index."""
    unknown = params.keys() - set(knobs)
    if unknown:
        known = ", ".join(knobs) or "none"
        raise Invalid.at(f"params.{min(unknown)}", f"does not fit a {kind} index; it takes: {known}")


def _keep_room(numbers: Any, size: int) -> None:
    """Give an empty array of FAISS room for so many."""
    numbers.resize(size)
    numbers.resize(0)


def _search_parameters(index: Any, params: dict[str, float], selector: Any) -> Any:
    """FAISS's parameters for one call, nested as the index is; None where there is nothing to say."""
    index = faiss.downcast_index(index)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexRefine):
        base = _search_parameters(index.base_index, params, selector)
        factor = max(1.0, params.get("rerank", 1.0))
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_search_parameters(index.index, params, selector))
    if isinstance(index, faiss.IndexIVF):
        return _list_parameters(index, params, chosen)
    if isinstance(index, faiss.IndexHNSW):
        found = {"efSearch": int(params["ef_search"])} if "ef_search" in params else {}
        return faiss.SearchParametersHNSW(**found, **chosen) if found or chosen else None
    return faiss.SearchParameters(**chosen) if chosen else None


def _list_parameters(index: Any, params: dict[str, float], chosen: dict[str, Any]) -> Any:
    nprobe = min(int(params.get("nprobe", index.nprobe)), index.nlist)
    if isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW):
        chosen = chosen | {"quantizer_params": faiss.SearchParametersHNSW(efSearch=max(COARSE_EF_MIN, 2 * nprobe))}
    return faiss.SearchParametersIVF(nprobe=nprobe, **chosen)


def load_index(path: Path, spec: IndexSpec, dimension: int, metric: Metric, count: int, name: str) -> FaissIndex:
    """Memory-map a saved index; Corrupt, naming the object, where it is not the one described; FileNotFoundError.

    Sets for the whole process when a batch of distances is a matrix product (`blas_threshold`).
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise Corrupt(f"{name}: FAISS cannot read it: {error}") from error
    facts = (index.d, index.ntotal, index.metric_type)
    if facts != (dimension, count, faiss_metric(metric)):
        raise Corrupt(f"{name}: (dimension, count, metric) are {facts}, described as {(dimension, count, metric)}")
    faiss.cvar.distance_compute_blas_threshold = blas_threshold(metric, dimension)
    return FaissIndex(index, spec, metric)


def blas_threshold(metric: Metric, dimension: int) -> int:
    """From how many floats of queries on a flat index multiplies matrices; it pays from about 8 vectors on.

    Not of l2: FAISS then takes |x|^2 + |q|^2 - 2xq in float32, which cancels. Points of 64 dimensions at offset
    1,000 with spread 0.1 had recall 1.0 asked one by one and 0.0 in a batch of 16. So a flat l2 index is never asked
    without a selector, which has FAISS take differences; its own threshold is for finding lists: where that is inexact
    the tuning has seen it. Unit vectors (cosine) are safe.
    """
    return BLAS_THRESHOLD if metric == "l2" else 8 * dimension
