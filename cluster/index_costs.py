"""What an index costs: bytes in memory, seconds to build, the recall it can reach, queries a second.

Bytes are exact up to what lists of unequal length add; times are those of the `Rates`, which `actors.build_rates`
measures on the machine and the vectors at hand. Constants: docs/decisions/0004-adaptive-index.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, sqrt

from cluster.config import CollectionConfig, Metric, VectorDtype
from cluster.index_spec import TRAINING_POINTS_PER_CENTROID, IndexSpec

ID_BYTES = 8  # of a row number in an inverted list
CODE_BYTES = {"float32": 4, "float16": 2, "sq8": 1}
MAPPED_LIST_BYTES = 160  # of an inverted list whose ids and codes stay in the mapped file: two views, 164 measured
COPIED_LIST_BYTES = 120  # of one that is copied into memory: two vectors, and what the allocator adds to each
FAST_SCAN_BLOCK = 32  # codes are stored 32 together; the last block of a list is half empty on average
CAPACITY_GROWTH = 0.38  # blocks get a capacity that is a power of two: 1.26 to 1.45 times their size measured ...
PAGE_BYTES = 4_096  # ... of which no more than about a page is ever touched
PRECOMPUTED_BYTES_MAX = 1 << 31  # FAISS does without a larger table of distances between centroids and codewords
COARSE_LINK_BYTES = 8 * 32 + 16  # of the graph over the centroids
KMEANS_ROUNDS = 10
CACHE_GROWTH = 0.29  # a graph's insertion slows down by this power of its bytes: 0.18 to 0.39 measured
RABITQ_FACTOR_BYTES = 8

ID_HASH_BYTES = 8
TEXT_ID_BYTES = 8 + 16  # of an id that is text: its offset, and the text of one that nobody has seen yet
PROCESS_BYTES = 150_000_000  # of a replica that has loaded nothing, measured: half of it are pages of shared libraries

# Recall@10 that can be reached with every knob open, the worst of 4 sets; the final distances are exact.
RECALL_REACHED = 0.999
RECALL_UNRANKED = {"ivf_pq": 0.55, "ivf_rabitq": 0.55, "ivf_sq8": 0.97, "hnsw": 0.99, "ivf_flat": 0.998}

# Bytes of codes a second that one thread scans in lists: measured from nprobe 32 to 64 on WordNet and the images.
SCAN_RATES = {"ivf_flat": 15e9, "ivf_sq8": 8e9, "ivf_rabitq": 1.4e9, "ivf_pq": 0.6e9}


@dataclass(frozen=True)
class Rates:
    """How fast a machine builds from the vectors at hand, with `threads` threads.

    `graph_ns` is nanoseconds per point and doubling (n log2 n) of a graph with M 32, efConstruction 100 and float16
    codes over `graph_points` points; `flops` is multiply-adds x 2 a second of a matrix product. The defaults are
    those of WordNet's 384 dimensions on two cores (AMD EPYC, AVX-512).
    """

    threads: int = 2
    graph_ns: float = 4_600.0
    graph_points: int = 20_000
    flops: float = 1.6e11
    measured: bool = False


REFERENCE = Rates()


@dataclass(frozen=True)
class ReplicaMemory:
    """Bytes of one replica. `rows` are those of a mapped file without attributes: pages of the page cache, of which
    only those are in memory that were read, and which the system takes back when it needs them."""

    index: int
    ids: int
    rows: int
    process: int = PROCESS_BYTES


def replica_memory(index: int, count: int, config: CollectionConfig) -> ReplicaMemory:
    """Of a shard of `count` points whose index takes `index` bytes."""
    ids = count * (ID_BYTES if config.id_type == "int64" else TEXT_ID_BYTES)
    return ReplicaMemory(index, ids, ids + count * (config.dimension * CODE_BYTES[config.vector_dtype] + ID_HASH_BYTES))


def index_bytes(spec: IndexSpec, count: int, dimension: int, metric: Metric = "l2") -> int:
    """Bytes of the loaded index of `count` vectors on the host; for a `factory` an estimate by its vectors alone."""
    store = CODE_BYTES.get(spec.rerank_store, 0) * dimension * count
    table = _pq_table_bytes(spec) if spec.kind == "ivf_pq" and metric != "ip" else 0
    return ceil(store + table + _BYTES[spec.kind](spec, count, dimension))


def _flat(spec: IndexSpec, count: int, dimension: int) -> float:
    return count * dimension * CODE_BYTES[spec.codes]


def _hnsw(spec: IndexSpec, count: int, dimension: int) -> float:
    """2M neighbours of 4 bytes on the ground level; upper levels, offsets and levels: 16 bytes, measured."""
    return count * (dimension * CODE_BYTES[spec.codes] + 8 * spec.params["m"] + 16)


def _cagra(spec: IndexSpec, count: int, dimension: int) -> float:
    """The twin on the host, a graph of FAISS's with half as many links M as neighbours (source, not measured)."""
    return count * (dimension * CODE_BYTES[spec.codes] + 4 * spec.params["graph_degree"] + 16)


def _coarse(spec: IndexSpec, dimension: int) -> float:
    """The centroids, and the graph that finds them where they are many."""
    return spec.params["nlist"] * (4 * dimension + (COARSE_LINK_BYTES if spec.coarse_graph else 0))


def _mapped_lists(spec: IndexSpec, count: int, dimension: int, code_bytes: int) -> float:
    return _coarse(spec, dimension) + count * (code_bytes + ID_BYTES) + spec.params["nlist"] * MAPPED_LIST_BYTES


def _copied_lists(spec: IndexSpec, count: int, dimension: int, code_bytes: int) -> float:
    """Lists of a fast scan: whole blocks of codes, in memory that was allocated for the next power of two."""
    lists = spec.params["nlist"]
    filled = min(lists, count)
    blocks = (count / max(1, filled) + (FAST_SCAN_BLOCK - 1) / 2) * code_bytes
    spare = min(CAPACITY_GROWTH * blocks, PAGE_BYTES)
    return _coarse(spec, dimension) + filled * (blocks + spare) + count * ID_BYTES + lists * COPIED_LIST_BYTES


def _ivf_flat(spec: IndexSpec, count: int, dimension: int) -> float:
    return _mapped_lists(spec, count, dimension, dimension * CODE_BYTES[spec.codes])


def _ivf_sq8(spec: IndexSpec, count: int, dimension: int) -> float:
    return _mapped_lists(spec, count, dimension, dimension)


def _ivf_pq(spec: IndexSpec, count: int, dimension: int) -> float:
    m, bits = spec.params["pq_m"], spec.params["pq_bits"]
    padded = m * ceil(dimension / m)
    codebook = 4 * padded * (1 << bits)
    if bits == 4:
        return codebook + _copied_lists(spec, count, padded, ceil(m / 2))
    return codebook + _mapped_lists(spec, count, padded, m)


def _pq_table_bytes(spec: IndexSpec) -> int:
    """A table of every list x sub-quantizer x codeword that FAISS makes when it loads an l2 index."""
    table = 4 * spec.params["nlist"] * spec.params["pq_m"] * (1 << spec.params["pq_bits"])
    return table if table <= PRECOMPUTED_BYTES_MAX else 0


def _ivf_rabitq(spec: IndexSpec, count: int, dimension: int) -> float:
    """Codes of a bit a dimension with two factors each; the rotation."""
    code_bytes = ceil(dimension / 8) + RABITQ_FACTOR_BYTES
    return _copied_lists(spec, count, dimension, code_bytes) + 4 * dimension * dimension


def _factory(spec: IndexSpec, count: int, dimension: int) -> float:
    return count * (4 * dimension + ID_BYTES)


_BYTES = {
    "flat": _flat,
    "hnsw": _hnsw,
    "ivf_flat": _ivf_flat,
    "ivf_sq8": _ivf_sq8,
    "ivf_pq": _ivf_pq,
    "ivf_rabitq": _ivf_rabitq,
    "cagra": _cagra,
    "factory": _factory,
}


def build_seconds(spec: IndexSpec, count: int, dimension: int, rates: Rates) -> float | None:
    """Seconds to train and fill the index with `rates.threads` threads; without tuning. None on a GPU: not measured."""
    if spec.device == "gpu":
        return None
    if spec.kind == "hnsw":
        return _graph_seconds(spec, count, dimension, rates)
    if spec.kind in ("flat", "factory"):
        return count * dimension * 4 / 2e9
    lists = spec.params["nlist"]
    trained = min(count, lists * TRAINING_POINTS_PER_CENTROID)
    assigned = KMEANS_ROUNDS * trained + count
    flops = 2.0 * dimension * lists * assigned
    if spec.coarse_graph:  # the centroids are found by a graph when vectors are added
        flops = 2.0 * dimension * (lists * KMEANS_ROUNDS * trained + 2_000 * count)
    rotation = 2.0 * dimension * dimension * (count + trained) if spec.kind == "ivf_rabitq" else 0.0
    return (flops + rotation) / rates.flops


def _graph_seconds(spec: IndexSpec, count: int, dimension: int, rates: Rates) -> float:
    if count < 2:
        return 0.0
    m, construction = spec.params["m"], spec.params["ef_construction"]
    growth = float(max(1.0, count / rates.graph_points) ** CACHE_GROWTH)
    effort = construction / 100 * (m / 32) ** 0.25
    return float(count * log2(count) * rates.graph_ns * 1e-9 * growth * effort)


def reachable_recall(spec: IndexSpec, vector_dtype: VectorDtype = "float32") -> float:
    """Recall@10 against exact search of the stored vectors that tuning can reach, at most.

    Presumed to be the same on GPUs, where nothing was measured yet.
    """
    if spec.kind == "flat":
        return 1.0 if spec.is_exact else RECALL_REACHED
    if spec.rerank_store == "none":
        lossless = spec.codes == "float32" and spec.kind in ("hnsw", "ivf_flat")
        lossless = lossless or (spec.kind == "hnsw" and spec.codes == vector_dtype)  # lists round what is left of one
        if spec.kind == "ivf_flat" and spec.codes == "sq8":
            return RECALL_UNRANKED["ivf_sq8"]
        return RECALL_REACHED if lossless or spec.kind == "factory" else RECALL_UNRANKED[spec.kind]
    return RECALL_REACHED


def queries_per_s(spec: IndexSpec, count: int, dimension: int, target_recall: float, rates: Rates) -> float | None:
    """About how many queries a second `rates.threads` threads answer at the target; what was measured is better.

    None on a GPU.
    """
    if spec.device == "gpu":
        return None
    return rates.threads / max(1e-6, _seconds_per_query(spec, count, dimension, target_recall))


def _seconds_per_query(spec: IndexSpec, count: int, dimension: int, target_recall: float) -> float:
    """One thread. A step through a graph costs 60 ns and its bytes at 6e9 a second, scans read at `SCAN_RATES`."""
    effort = _effort(target_recall)
    if spec.kind in ("flat", "factory"):
        return count * dimension * CODE_BYTES[spec.codes] / 25e9
    if spec.kind == "hnsw":
        visits = 450 * effort * log2(max(2, count)) / 16
        return visits * (60e-9 + dimension * CODE_BYTES[spec.codes] / 6e9)
    lists = spec.params["nlist"]
    coarse = dimension * (min(lists, 2_000) if spec.coarse_graph else lists) / 25e9
    scanned = min(1.0, 0.03 * effort * sqrt(1_024 / max(1, lists))) * count
    code_bytes = {"ivf_pq": dimension / 8, "ivf_rabitq": dimension / 8 + 8, "ivf_sq8": dimension}.get(
        spec.kind, dimension * CODE_BYTES[spec.codes]
    )
    return (
        coarse
        + scanned * code_bytes / SCAN_RATES[spec.kind]
        + (80 * dimension / 10e9 if spec.rerank_store != "none" else 0.0)
    )


def _effort(target_recall: float) -> float:
    """How much more is visited for a target than for .90, measured on WordNet and clusters: .95 x 1.7, .99 x 5."""
    missing = max(0.002, 1.0 - target_recall)
    return float((0.1 / missing) ** 0.72)
