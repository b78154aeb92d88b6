"""What an index takes of a GPU's memory: loaded, while the largest batch is searched, and while it is built.

None of it was measured by us. Formulas are those of cuVS 26.06 and FAISS 1.15.1: "documentation" means cuVS's pages on
the kinds of index, "source" their code, "estimate" neither. What is predicted is compared with what was measured in the
status of each replica.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from cluster import index_costs
from cluster.config import CollectionConfig
from cluster.index_costs import CODE_BYTES, ID_BYTES
from cluster.index_spec import ITOPK_MAX, IndexSpec

GPU_MARGIN = 1.25  # documentation: keep 20 to 30% for the allocator and for what a prediction leaves out
CONTEXT_BYTES = 512 << 20  # estimate: a CUDA context with the kernels of FAISS and cuVS loaded
TEMP_BYTES = 256 << 20  # what a process gives FAISS for temporary memory: queries and answers; the rest is cuVS's own
PROCESS_BYTES = CONTEXT_BYTES + TEMP_BYTES  # of a process before it has an index

BATCH_MAX = 512  # vectors of one call to a shard: `Limits.batch_vectors`
HIT_BYTES = 8 + 4  # a label and a distance
TILE_BYTES = 1 << 30  # source: of distances that exact search keeps at a time, both halves
TILE_ROWS = 512  # source: queries of one tile, of more than 32 dimensions
WORKSPACE_BYTES = 1 << 30  # source: searches of lists cut a batch so that it takes no more
LOCAL_TOP_K = 256  # source: up to this k a list's best are kept while it is scanned, beyond all its distances are
GRAPH_QUERY_BYTES = 1 << 17  # estimate: visited nodes (a hash table) and candidates of one query in a graph
SIZED_K = 2_048  # the k that a search is sized for: `Limits.k`, and where rerank takes more, that many times ...
RERANKED = 8  # ... candidates a hit

ROW_ALIGNMENT = 16  # source: a graph's vectors begin at multiples of 16 bytes
LIST_GROUP = 32  # source: lists grow by groups of 32 vectors
LIST_SPARE = 512  # source: lists that vectors are added to grow by 1,024, half of it unused; one from a file is tight
PQ_CHUNK = 16  # source: bytes of one chunk of interleaved codes
GRAPH_LINK_BYTES = 4
LINK_LOAD_BYTES = 8 + 4  # source: of each link while a graph is copied to a GPU, as FAISS numbers rows and as cuVS does
POINT_LOAD_BYTES = 4 + 8  # source: of each point meanwhile, its level and where its links begin
LINK_BUILD_BYTES = 5  # documentation: of each intermediate neighbour while a graph is built, and 4 a point
NN_DESCENT_BYTES = 276  # documentation: of each point, beside a float16 copy of it, where NN-descent links them
ADDED_AT_ONCE = 65_536  # vectors copied to the GPU at a time


@dataclass(frozen=True)
class GpuFacts:
    """What a plan is told of the GPUs. `memory_bytes` is what one replica may use, its share of the smallest GPU.

    None: not known, then nothing is bounded by it. `builds`: the process that builds has such a GPU, too.
    """

    memory_bytes: int | None = None
    name: str = ""
    builds: bool = True


@dataclass(frozen=True)
class GpuNeed:
    """Bytes on a GPU: of the loaded index, of a search of the largest batch on top of it, of a build at its peak.

    `moved` is what loading takes beside the index where it grows piece by piece: what is there moves to a larger place.
    """

    index: int
    search: int
    build: int
    moved: int = 0

    @property
    def load(self) -> int:
        """What must be free to load and search, with the margin."""
        return max(ceil((self.index + self.search) * GPU_MARGIN), self.index + self.moved)

    @property
    def peak(self) -> int:
        """What must be free to build there and tune, with the margin."""
        return max(self.load, ceil(self.build * GPU_MARGIN))


def gpu_need(spec: IndexSpec, count: int, dimension: int) -> GpuNeed:
    """Of an index of `count` vectors, for the largest batch and k that a shard is asked for."""
    k = ITOPK_MAX if spec.kind == "cagra" else SIZED_K * (RERANKED if spec.kind == "ivf_pq" else 1)
    search, index = search_bytes(spec, dimension, BATCH_MAX, k, count), index_bytes(spec, count, dimension)
    moved = index if spec.kind == "flat" and spec.codes == "float16" else 0  # FAISS does not copy these codes for cuVS
    return GpuNeed(index, search, build_bytes(spec, count, dimension), moved)


def refusal(need_bytes: int, free_bytes: int | None, what: str) -> str:
    """Why `what` does not fit, with the numbers; "" where it does, and where nobody knows what is free."""
    if free_bytes is None or need_bytes <= free_bytes:
        return ""
    return f"{what} takes {need_bytes} bytes of GPU memory, {max(0, free_bytes)} can be had"


# --- the loaded index ---------------------------------------------------------------------------------------------


def index_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Bytes on the GPU of an index of `count` vectors that was loaded from its file. KeyError for a CPU's kind."""
    return ceil(_INDEX[spec.kind](spec, count, dimension))


def _flat(spec: IndexSpec, count: int, dimension: int) -> float:
    """Source: the vectors, and the norm of each."""
    return count * (dimension * CODE_BYTES[spec.codes] + 4)


def _lists(spec: IndexSpec, count: int, dimension: int, code_bytes: int) -> float:
    """Codes and labels in groups of `LIST_GROUP`; the centroids twice: cuVS's own, and those of FAISS's quantizer."""
    lists = spec.params["nlist"]
    spare = min(lists, count) * (LIST_GROUP - 1) / 2
    return (count + spare) * (code_bytes + ID_BYTES) + lists * (2 * 4 * dimension + 16)


def _ivf_flat(spec: IndexSpec, count: int, dimension: int) -> float:
    """Source: dimensions are read four at a time where they can be, which pads nothing."""
    return _lists(spec, count, dimension, dimension * CODE_BYTES[spec.codes])


def _ivf_pq(spec: IndexSpec, count: int, dimension: int) -> float:
    """Source: codes fill whole chunks; a codebook of 256 words, a rotation, and the rotated centroids."""
    code_bytes = PQ_CHUNK * ceil(spec.params["pq_m"] * spec.params["pq_bits"] / 8 / PQ_CHUNK)
    words = 4 * dimension << spec.params["pq_bits"]
    rotated = 4 * dimension * (dimension + spec.params["nlist"])
    return _lists(spec, count, dimension, code_bytes) + words + rotated


def _cagra(spec: IndexSpec, count: int, dimension: int) -> float:
    """Documentation: the vectors, and `graph_degree` neighbours of 4 bytes each."""
    return count * (_row_bytes(spec, dimension) + GRAPH_LINK_BYTES * spec.params["graph_degree"])


def _row_bytes(spec: IndexSpec, dimension: int) -> int:
    return ROW_ALIGNMENT * ceil(dimension * CODE_BYTES[spec.codes] / ROW_ALIGNMENT)


_INDEX = {"flat": _flat, "ivf_flat": _ivf_flat, "ivf_pq": _ivf_pq, "cagra": _cagra}


# --- a search -----------------------------------------------------------------------------------------------------


def search_bytes(spec: IndexSpec, dimension: int, batch: int, k: int, count: int | None = None) -> int:
    """Temporary bytes of a search of `batch` queries for `k` hits; without `count` those of any number of vectors."""
    moved = batch * (4 * dimension + 2 * k * HIT_BYTES)  # queries, answers, and answers before they are merged
    selection = 0 if count is None else ceil(count / 8)  # a bit for each row that may be found
    if spec.kind == "flat":
        tile = TILE_BYTES if count is None else min(TILE_BYTES, 2 * 4 * min(batch, TILE_ROWS) * count)
        return moved + selection + tile
    if spec.kind == "cagra":
        return moved + selection + batch * GRAPH_QUERY_BYTES
    return moved + selection + min(WORKSPACE_BYTES, batch * _scan_bytes(spec, dimension, k, count))


def _scan_bytes(spec: IndexSpec, dimension: int, k: int, count: int | None) -> int:
    """Source: of one query that visits all lists: distances of centroids, then the best of each list or all of them."""
    lists = spec.params["nlist"]
    coarse = 4 * (3 * lists + dimension)
    if k <= LOCAL_TOP_K:
        return coarse + HIT_BYTES * lists * k
    return WORKSPACE_BYTES if count is None else coarse + 4 * (count + lists)


# --- a build ------------------------------------------------------------------------------------------------------


def build_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Bytes at the peak of a build on the GPU, the index with it."""
    index = index_bytes(spec, count, dimension)
    batch = 4 * dimension * min(count, ADDED_AT_ONCE)
    if spec.kind == "flat":
        return index + batch
    if spec.kind == "cagra":
        return index + graph_build_bytes(spec, count)
    trained = 4 * dimension * spec.training_points(count)
    codes = spec.params["pq_m"] if spec.kind == "ivf_pq" else dimension * CODE_BYTES[spec.codes]
    spare = min(count, spec.params["nlist"] * LIST_SPARE) * (codes + ID_BYTES)
    copies = 2 if spec.kind == "ivf_pq" else 1  # source: what is left of the sample beside its centroids is coded
    return index + spare + batch + copies * trained


def graph_build_bytes(spec: IndexSpec, count: int) -> int:
    """Beside the index, where an IVF-PQ finds the neighbours that a graph is made of (documentation)."""
    return count * (4 + LINK_BUILD_BYTES * spec.params["intermediate_graph_degree"])


def nn_descent_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Beside the index, where NN-descent finds the neighbours (documentation): quicker where it fits."""
    return max(graph_build_bytes(spec, count), count * (2 * dimension + NN_DESCENT_BYTES))


def host_build_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Bytes of host memory beside the index while it is built: of a graph all vectors in one piece, else the sample."""
    if spec.kind == "cagra":
        return count * dimension * CODE_BYTES[spec.codes]
    return spec.training_points(count) * dimension * 4


def host_load_bytes(spec: IndexSpec, count: int) -> int:
    """Bytes of host memory that loading an index from its mapped file onto a GPU takes until it is there.

    Source: FAISS copies the lists of neighbours of a graph, twice; its vectors go to the GPU from the pages of the
    file, which the system takes back. Other kinds are copied piece by piece.
    """
    if spec.kind != "cagra":
        return 0
    return count * (LINK_LOAD_BYTES * spec.params["graph_degree"] + POINT_LOAD_BYTES)


def sized(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec:
    """`spec` with the bytes that it takes of `count` vectors: on the host, and of a GPU where it is served there."""
    on_gpu = index_bytes(spec, count, config.dimension) if spec.device == "gpu" else 0
    on_host = index_costs.index_bytes(spec, count, config.dimension, config.metric)
    return replace(spec, predicted_bytes=on_host, gpu_bytes=on_gpu)
