"""A stand-in for the part of FAISS that runs on GPUs, on the CPU: `library` of a `GpuDevice` in tests.

Its classes are named as FAISS's, take what those take, and keep their indexes in real ones of faiss-cpu. Where FAISS
would go wrong without a word (another thread, another class of parameters, a selection without cuVS, a k over the
number of points, an array that is gone) it raises AssertionError, and what only a destructor notices is in
`violations`. It counts bytes, and runs out of memory, is lost, or miscalculates when it is told to.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from actors.gpu_device import GpuDevice

K_MAX = NPROBE_MAX = 16_384
ITOPK_MAX = 512
FUSED_K, LIST_K = 64, 256  # up to so many hits distances are not all kept: of exact search, of lists
SMALL_HASH = 8_192  # entries of the table of visited nodes that fits into shared memory
NO_NEIGHBOUR = 0xFFFFFFFF  # of a graph: labels of 32 bits, as they come
FULL = (
    "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const faiss::gpu::AllocRequest&) at "
    "/project/faiss/gpu/StandardGpuResources.cpp:530: Error: 'err == cudaSuccess' failed: StandardGpuResources: alloc "
    "fail type {what} dev 0 space Device stream 0x1 size {size} bytes (cudaMalloc error out of memory [2])\n"
)
LOST = (
    "C++ exception CUDA error encountered at: file=/opt/cuvs/libraft/include/raft/core/interruptible.hpp line=301: "
    "call='cudaStreamQuery(stream)', Reason=cudaErrorIllegalAddress:an illegal memory access was encountered"
)


def double_device(memory_bytes: int = 8 << 30, share: float = 1.0) -> GpuDevice:
    """A device of so much memory, by itself in its process; `device.library` is the `GpuDouble`."""
    library = GpuDouble(memory_bytes)
    return GpuDevice(library, library.memory, share, "double")


class GpuDouble:
    """FAISS, as a process with one GPU sees it. What is no GPU's comes from faiss-cpu."""

    graph_build_algo_IVF_PQ, graph_build_algo_NN_DESCENT = 0, 1
    INDICES_64_BIT = 3

    def __init__(self, memory_bytes: int) -> None:
        self.total_bytes = memory_bytes
        self.taken_bytes = 0
        self.threads: set[int] = set()  # those that made resources
        self.violations: list[str] = []
        self.searches: list[dict[str, Any]] = []  # what each search was asked
        self.builds: list[dict[str, Any]] = []
        self._full = 0
        self._lost = False
        self._spoiled_from: int | None = None
        for kind in (StandardGpuResources, GpuIndexFlat, GpuIndexIVFFlat, GpuIndexIVFPQ, GpuIndexCagra):
            setattr(self, kind.__name__, partial(kind, self))
        for plain in CONFIGS:
            setattr(self, plain.__name__, plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def get_compile_options(self) -> str:
        return "OPTIMIZE AVX2 GPU NVIDIA_CUVS "

    # --- what tests tell it ---

    def run_out_of_memory(self, times: int = 1) -> None:
        """So many calls from now on find no memory, then it is back."""
        self._full = times

    def lose(self) -> None:
        """Every call fails from now on."""
        self._lost = True

    def taken_by_others(self, size: int) -> None:
        self.taken_bytes += size

    def spoil_from(self, row: int | None) -> None:
        """Distances of this row and those after it are wrong; None: right again."""
        self._spoiled_from = row

    def check(self) -> None:
        """AssertionError where something was done that FAISS would have gone wrong with."""
        assert not self.violations, self.violations

    # --- what the indexes ask it ---

    def memory(self) -> tuple[int, int]:
        return self.total_bytes - self.taken_bytes, self.total_bytes

    def enter(self, resources: StandardGpuResources | None = None) -> None:
        """A call of FAISS begins. A process may have several resources, each in a thread of its own."""
        assert self._is_at_home(resources), "called in another thread than that of the resources"
        if self._lost:
            raise RuntimeError(LOST)
        if self._full:
            self._full -= 1
            raise MemoryError("std::bad_alloc")  # what becomes of rmm::out_of_memory

    def fits(self, size: int, what: str) -> None:
        if size > self.total_bytes - self.taken_bytes:
            raise RuntimeError(FULL.format(what=what, size=size))

    def take(self, size: int, what: str) -> None:
        self.fits(size, what)
        self.taken_bytes += size

    def _is_at_home(self, resources: StandardGpuResources | None) -> bool:
        threads = self.threads if resources is None else {resources.thread}
        return threading.get_ident() in threads

    def gone(self, size: int, what: str, resources: StandardGpuResources | None = None) -> None:
        """A destructor ran. On a lost device it would have ended the process."""
        if not self._is_at_home(resources):
            self.violations.append(f"{what} was destroyed in another thread")
        if self._lost:
            self.violations.append(f"{what} was destroyed on a lost device")
        self.taken_bytes -= size

    def spoiled(self, distances: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._spoiled_from is None:
            return distances, labels
        wrong = np.where(labels >= self._spoiled_from, distances * 3 + 1, distances).astype(np.float32)
        order = np.argsort(wrong, axis=1, kind="stable")
        return np.take_along_axis(wrong, order, 1), np.take_along_axis(labels, order, 1)

    def index_cpu_to_gpu(self, resources: Any, device: int, index: Any, options: Any) -> Any:
        assert options.use_cuvs, "use_cuvs is not set"
        if options.indicesOptions != self.INDICES_64_BIT:
            raise RuntimeError("Error: 'indicesOptions == INDICES_64_BIT' failed: only INDICES_64_BIT is supported")
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexFlat):
            config = GpuIndexFlatConfig()
        elif isinstance(index, faiss.IndexIVFPQ):
            config = GpuIndexIVFPQConfig()
            config.interleavedLayout = True
        elif isinstance(index, faiss.IndexIVFFlat):
            config = GpuIndexIVFFlatConfig()
        else:
            raise RuntimeError("Error: '!use_cuvs' failed: this type of index is not implemented for cuVS")
        config.device, config.use_cuvs = device, True
        kind = {"GpuIndexFlatConfig": GpuIndexFlat, "GpuIndexIVFPQConfig": GpuIndexIVFPQ}.get(type(config).__name__)
        return (kind or GpuIndexIVFFlat)(self, resources, index, config)

    def index_gpu_to_cpu(self, index: Any) -> Any:
        self.enter(index._resources)
        assert not isinstance(index, GpuIndexCagra), "of float16 it may come as float32: copyTo says"
        return index.on_cpu()


# --- plain data ---------------------------------------------------------------------------------------------------


class _Settings:
    """Attributes that may be set; another is an error, as FAISS's classes have it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name) and name not in type(self).__annotations__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'.")
        object.__setattr__(self, name, value)


class GpuIndexFlatConfig(_Settings):
    device = 0
    use_cuvs = False
    useFloat16 = False


class GpuClonerOptions(_Settings):
    use_cuvs = False
    indicesOptions = 3
    useFloat16 = False


class GpuIndexIVFFlatConfig(_Settings):
    device = 0
    use_cuvs = False
    indicesOptions = 3
    flatConfig: GpuIndexFlatConfig

    def __init__(self) -> None:
        self.flatConfig = GpuIndexFlatConfig()


class GpuIndexIVFPQConfig(_Settings):
    device = 0
    use_cuvs = False
    indicesOptions = 3
    interleavedLayout = False
    useFloat16LookupTables = False
    flatConfig: GpuIndexFlatConfig

    def __init__(self) -> None:
        self.flatConfig = GpuIndexFlatConfig()


class GpuIndexCagraConfig(_Settings):
    device = 0
    use_cuvs = False
    intermediate_graph_degree = 128
    graph_degree = 64
    build_algo = 0
    nn_descent_niter = 20
    store_dataset = True


class SearchParametersCagra(_Settings):
    itopk_size = 64
    search_width = 1
    max_iterations = 0
    sel: Any = None

    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            setattr(self, name, value)


CONFIGS: tuple[type[_Settings], ...] = (
    GpuIndexFlatConfig,
    GpuClonerOptions,
    GpuIndexIVFFlatConfig,
    GpuIndexIVFPQConfig,
    GpuIndexCagraConfig,
    SearchParametersCagra,
)


# --- what is on the device ----------------------------------------------------------------------------------------


class StandardGpuResources:
    def __init__(self, library: GpuDouble) -> None:
        self.library = library
        self.thread = threading.get_ident()
        library.threads.add(self.thread)
        self._temp_bytes, self._pinned_bytes = 1536 << 20, 256 << 20
        self._taken_bytes = 0

    def setTempMemory(self, size: int) -> None:
        assert not self._taken_bytes, "temporary memory is set before the first use"
        self._temp_bytes = size

    def setPinnedMemory(self, size: int) -> None:
        assert not self._taken_bytes, "pinned memory is set before the first use"
        self._pinned_bytes = size

    def syncDefaultStreamCurrentDevice(self) -> None:
        self.library.enter(self)
        self.initialise()

    def initialise(self) -> None:
        if not self._taken_bytes:
            self.library.take(self._temp_bytes, "TemporaryMemoryBuffer")
            self._taken_bytes = self._temp_bytes

    def __del__(self) -> None:
        self.library.gone(self._taken_bytes, "StandardGpuResources", self)


class _GpuIndex:
    """What all kinds share: thread, memory, limits."""

    parameters: type[Any] = faiss.SearchParameters

    def __init__(self, library: GpuDouble, resources: StandardGpuResources, d: int, metric: int, config: Any) -> None:
        self._library, self._resources, self._config = library, resources, config
        self._taken_bytes = 0
        assert isinstance(resources, StandardGpuResources)
        library.enter(resources)
        assert config.device == 0
        assert config.use_cuvs, "use_cuvs is not set"
        resources.initialise()
        self.d, self.metric_type, self.ntotal = d, metric, 0

    def __del__(self) -> None:
        self._library.gone(self._taken_bytes, type(self).__name__, self._resources)

    def _take(self, size: int, what: str) -> None:
        self._library.take(size, what)
        self._taken_bytes += size

    def _scratch_bytes(self, queries: int, k: int, params: Any) -> int:
        """What cuVS takes for itself while it searches (see tests.gpu.provoke)."""
        raise NotImplementedError

    def _asked(self, x: NDArray[Any], k: int, params: Any) -> None:
        """A search begins."""
        self._library.enter(self._resources)
        assert x.shape[1] == self.d
        if k > K_MAX:
            raise RuntimeError(f"GPU index only supports min/max-K selection up to {K_MAX} (requested {k})")
        assert 0 < k <= self.ntotal, f"k {k} of {self.ntotal} points: rows of answers would be written short"
        assert params is None or type(params) is self.parameters, f"{type(params)} for {type(self).__name__}"
        selector = None if params is None else params.sel
        if selector is not None:
            assert isinstance(_own(params), faiss.IDSelectorBitmap), "others are converted row by row at each search"
        moved = len(x) * (4 * self.d + 12 * k)
        self._library.fits(moved + self._scratch_bytes(len(x), k, params), "TemporaryMemoryOverflow")
        told = {
            name: getattr(params, name) for name in ("nprobe", "itopk_size", "search_width") if hasattr(params, name)
        }
        self._library.searches.append({"n": len(x), "k": k, "selected": selector is not None} | told)


class GpuIndexFlat(_GpuIndex):
    """(resources, d, metric, config) or (resources, index, config). Its distances are a product of matrices."""

    def __init__(self, library: GpuDouble, resources: Any, *given: Any) -> None:
        source = given[0] if len(given) == 2 else None
        d, metric = (source.d, source.metric_type) if source is not None else given[:2]
        super().__init__(library, resources, d, metric, given[-1])
        self._bytes = 2 if self._config.useFloat16 else 4
        self._vectors = np.empty((0, d), np.float16 if self._config.useFloat16 else np.float32)
        if source is not None and source.ntotal:
            self.add(faiss.rev_swig_ptr(source.get_xb(), source.ntotal * d).reshape(-1, d))

    def add(self, x: NDArray[Any]) -> None:
        """FAISS makes room for all that there then is, copies, and gives the old place back."""
        self._library.enter(self._resources)
        size = (self.ntotal + len(x)) * (self.d * self._bytes + 4)
        self._library.fits(size, "FlatData")
        self._library.taken_bytes += size - self._taken_bytes
        self._taken_bytes = size
        self._vectors = np.concatenate([self._vectors, x.astype(self._vectors.dtype)])
        self.ntotal = len(self._vectors)

    def _scratch_bytes(self, queries: int, k: int, params: Any) -> int:
        return 0 if k <= FUSED_K else 4 * queries * self.ntotal

    def search(self, x: NDArray[Any], k: int, *, params: Any = None) -> tuple[NDArray[Any], NDArray[Any]]:
        self._asked(x, k, params)
        vectors, queries = self._vectors.astype(np.float32), x.astype(self._vectors.dtype).astype(np.float32)
        products = queries @ vectors.T
        if self.metric_type == faiss.METRIC_L2:
            norms = np.square(vectors).sum(axis=1), np.square(queries).sum(axis=1)[:, None]
            cost = norms[1] + norms[0] - np.float32(2) * products
        else:
            cost = -products
        kept = _kept(None if params is None else _own(params), self.ntotal)
        cost = np.where(kept, cost, np.float32(np.inf))
        nearest = np.argpartition(cost, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(cost, nearest, 1), axis=1, kind="stable")
        labels = np.take_along_axis(nearest, order, 1)
        found = np.take_along_axis(cost, labels, 1)
        labels = np.where(np.isinf(found), -1, labels)
        return self._library.spoiled(found if self.metric_type == faiss.METRIC_L2 else -found, labels)

    def on_cpu(self) -> Any:
        index = faiss.IndexFlat(self.d, self.metric_type)
        index.add(self._vectors.astype(np.float32))
        return index


def _own(parameters: Any) -> Any:
    """The selector as its own class: what comes from an attribute of FAISS has only the general one."""
    kept = getattr(parameters, "_sp_field_refs", None)
    return kept["sel"] if kept and "sel" in kept else parameters.sel


def _kept(selector: Any, count: int) -> NDArray[np.bool_]:
    """Which rows a bitmap selects."""
    if selector is None:
        return np.ones(count, dtype=bool)
    bits = faiss.rev_swig_ptr(selector.bitmap, selector.n)
    return np.unpackbits(bits, count=count, bitorder="little").astype(bool)


class _Lists(_GpuIndex):
    """An index of faiss-cpu in disguise."""

    parameters = faiss.SearchParametersIVF

    def __init__(self, library: GpuDouble, resources: Any, *given: Any) -> None:
        source = given[0] if len(given) == 2 else None
        config = given[-1]
        d, metric = (source.d, source.metric_type) if source is not None else (given[0], given[-2])
        super().__init__(library, resources, d, metric, config)
        if config.indicesOptions != 3:
            raise RuntimeError("Error: failed: only INDICES_64_BIT is supported for cuVS index")
        self._cpu = self._empty(*given[:-2]) if source is None else faiss.clone_index(source)
        self.nlist = self._cpu.nlist
        self.ntotal = self._cpu.ntotal
        if source is not None:
            self._take(self.ntotal * self._code_bytes() + self.nlist * 8 * d, "IVFLists")

    def _empty(self, *sizes: int) -> Any:
        raise NotImplementedError

    def _code_bytes(self) -> int:
        return int(self._cpu.code_size) + 8

    def train(self, x: NDArray[Any]) -> None:
        self._library.enter(self._resources)
        if len(x) // 2 < self.nlist:  # it samples half
            raise RuntimeError("C++ exception RAFT failure: number of rows can't be less than n_clusters")
        self._library.fits(x.nbytes, "TemporaryMemoryOverflow")
        for clustering in (self._cpu.cp, *([self._cpu.pq.cp] if hasattr(self._cpu, "pq") else [])):
            clustering.min_points_per_centroid = 1
        self._cpu.train(x)
        self._library.builds.append({"kind": type(self).__name__, "rows": len(x)})

    def add(self, x: NDArray[Any]) -> None:
        self._library.enter(self._resources)
        assert self._cpu.is_trained
        self._take(len(x) * self._code_bytes(), "IVFLists")
        self._cpu.add(x)
        self.ntotal = self._cpu.ntotal

    def _scratch_bytes(self, queries: int, k: int, params: Any) -> int:
        """All distances, where there are more hits than the scan of a list keeps; lists of equal length."""
        probed = min(1.0, (1 if params is None else params.nprobe) / self.nlist)
        return 0 if k <= LIST_K else int(4 * queries * self.ntotal * probed)

    def search(self, x: NDArray[Any], k: int, *, params: Any = None) -> tuple[NDArray[Any], NDArray[Any]]:
        self._asked(x, k, params)
        if params is not None:
            if params.nprobe > NPROBE_MAX:
                raise RuntimeError(f"GPU IVF index only supports nprobe selection up to {NPROBE_MAX}")
            assert 0 < params.nprobe <= self.nlist, f"nprobe {params.nprobe} of {self.nlist} lists"
        distances, labels = self._cpu.search(np.ascontiguousarray(x), k, params=params)
        return self._library.spoiled(distances, labels)

    def on_cpu(self) -> Any:
        return faiss.clone_index(self._cpu)


class GpuIndexIVFFlat(_Lists):
    """(resources, d, nlist, metric, config), or of a CPU's index."""

    def _empty(self, *sizes: int) -> Any:
        return faiss.index_factory(sizes[0], f"IVF{sizes[1]},Flat", self.metric_type)


class GpuIndexIVFPQ(_Lists):
    """(resources, d, nlist, M, bits, metric, config), or of a CPU's index."""

    def __init__(self, library: GpuDouble, resources: Any, *given: Any) -> None:
        super().__init__(library, resources, *given)
        assert self._config.interleavedLayout, "cuVS searches interleaved codes alone"
        if self._cpu.do_polysemous_training:
            raise RuntimeError("Error: failed: GPU: polysemous codes not supported")

    def _empty(self, *sizes: int) -> Any:
        assert sizes[0] % sizes[2] == 0, "M must divide d"
        return faiss.index_factory(sizes[0], f"IVF{sizes[1]},PQ{sizes[2]}x{sizes[3]}np", self.metric_type)


class GpuIndexCagra(_GpuIndex):
    """A graph of the nearest neighbours, a quarter of them random so that it hangs together."""

    parameters = SearchParametersCagra

    def __init__(self, library: GpuDouble, resources: Any, d: int, metric: int, config: Any) -> None:
        super().__init__(library, resources, d, metric, config)
        assert metric == faiss.METRIC_L2, "cuVS links badly by an inner product"
        self._numeric_type = faiss.Float32
        self._vectors: Any = lambda: None  # a weak reference to what it was made from
        self._graph = np.empty((0, 0), np.int64)
        self._searched: Any = lambda: None

    def train(self, x: NDArray[Any], *, numeric_type: int = 0) -> None:
        self._library.enter(self._resources)
        assert not self.ntotal, "a second call adds nothing"
        assert len(x) >= 5, "three or four points never come back"
        assert x.dtype == _dtype(numeric_type), "FAISS would keep a pointer to a copy that is gone"
        assert x.flags.c_contiguous
        self._numeric_type, self._vectors = numeric_type, weakref.ref(x)
        degree = self._config.graph_degree
        assert self._config.intermediate_graph_degree >= degree
        near = degree - degree // 4
        self._take(x.nbytes + 4 * len(x) * degree, "CAGRA")
        self._library.fits(len(x) * 5 * self._config.intermediate_graph_degree, "CAGRA build")
        points = x.astype(np.float32)
        found = faiss.knn(points, points, min(near + 1, len(x)))[1][:, 1:]
        others = np.random.default_rng(0).integers(0, len(x), (len(x), degree - found.shape[1]))
        self._graph = np.concatenate([found, others], axis=1)
        self.ntotal = len(x)
        own = faiss.IndexHNSWCagra()
        self._fill(own, points, faiss.Float32)
        self._searched = lambda: own
        self._library.builds.append({"kind": "GpuIndexCagra", "rows": len(x), "algo": self._config.build_algo})

    def copyTo(self, index: Any) -> None:
        self._library.enter(self._resources)
        vectors = self._vectors()
        assert vectors is not None, "the vectors that it was made from are gone"
        if self._numeric_type == faiss.Float16 and not index.base_level_only:
            raise RuntimeError("Only base level copy is supported for FP16 types in GpuIndexCagra::copyTo")
        self._fill(index, vectors, self._numeric_type)

    def _fill(self, index: Any, vectors: NDArray[Any], numeric_type: int) -> None:
        """As GpuIndexCagra.cu does it: vectors, upper levels where they are wanted, and the graph as the lowest one."""
        half = numeric_type == faiss.Float16
        code = faiss.ScalarQuantizer.QT_fp16
        storage = faiss.IndexScalarQuantizer(self.d, code, faiss.METRIC_L2) if half else faiss.IndexFlatL2(self.d)
        storage.this.disown()
        index.d, index.metric_type, index.is_trained = self.d, faiss.METRIC_L2, True
        index.storage, index.own_fields, index.keep_max_size_level0 = storage, True, True
        index.set_numeric_type(numeric_type)
        links, levels = self._graph.shape[1] // 2, index.hnsw
        levels.reset()
        levels.assign_probas.clear()
        levels.cum_nneighbor_per_level.clear()
        levels.set_default_probas(links, 1.0 / np.log(links))
        index.init_level0 = False
        if index.base_level_only:
            levels.prepare_level_tab(self.ntotal, False)
            if half:
                storage.add_sa_codes(vectors.view(np.uint8).reshape(self.ntotal, -1))
            else:
                storage.add(vectors)
            index.ntotal = self.ntotal
        else:
            index.add(vectors)
        starts = faiss.vector_to_array(levels.offsets)[: self.ntotal].astype(np.int64)
        neighbours = faiss.vector_to_array(levels.neighbors)
        neighbours[starts[:, None] + np.arange(2 * links)] = self._graph[:, : 2 * links]
        faiss.copy_array_to_vector(neighbours, levels.neighbors)
        index.init_level0 = True

    def copyFrom_ex(self, index: Any, numeric_type: int) -> None:
        self._library.enter(self._resources)
        assert numeric_type == index.get_numeric_type(), "codes would be read as numbers of another size"
        self._numeric_type, self._searched, self.ntotal = numeric_type, weakref.ref(index), index.ntotal
        size = self.d * (2 if numeric_type == faiss.Float16 else 4)
        self._take(index.ntotal * (size + 4 * index.hnsw.nb_neighbors(0)), "CAGRA")

    def _scratch_bytes(self, queries: int, k: int, params: Any) -> int:
        """A large hash table, half full, where the small one of 8 Ki entries would be more than that."""
        searched = self._searched()
        assert searched is not None, "the CPU's index that it was copied from is gone"
        given, degree = params or SearchParametersCagra(), searched.hnsw.nb_neighbors(0)
        if given.itopk_size + given.search_width * degree <= SMALL_HASH / 2:
            return 0
        steps = given.itopk_size // given.search_width + int(np.ceil(np.log(self.ntotal) / np.log(degree / 2)))
        visited = given.itopk_size + given.search_width * degree * steps
        return 4 * queries * (1 << int(2 * visited - 1).bit_length())

    def search(
        self, x: NDArray[Any], k: int, *, params: Any = None, numeric_type: int = 0
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        self._asked(x, k, params)
        searched = self._searched()
        assert searched is not None, "the CPU's index that it was copied from is gone"
        if numeric_type != self._numeric_type:
            raise RuntimeError("Inconsistent numeric type for train and search")
        params = SearchParametersCagra() if params is None else params
        if k > params.itopk_size:
            raise RuntimeError(f"C++ exception RAFT failure: topk = {k} must be smaller than {params.itopk_size}")
        if params.itopk_size > ITOPK_MAX:
            raise RuntimeError(f"C++ exception RAFT failure: itopk_size cannot be larger than {ITOPK_MAX}")
        effort = params.itopk_size + 8 * (params.search_width - 1)
        chosen = {} if params.sel is None else {"sel": params.sel}
        asked = np.ascontiguousarray(x.astype(_dtype(numeric_type)).astype(np.float32))
        distances, labels = searched.search(asked, k, params=faiss.SearchParametersHNSW(efSearch=effort, **chosen))
        return self._library.spoiled(distances, np.where(labels < 0, NO_NEIGHBOUR, labels))


def _dtype(numeric_type: int) -> Any:
    return np.dtype(np.float16 if numeric_type == faiss.Float16 else np.float32)
