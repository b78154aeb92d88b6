"""Which index a GPU gets, whether it gets one at all, and the limits of the kinds. Pure functions of plain data.

The order of preference is that of docs/decisions/0008-gpu.md. No constant here was measured by us: "documentation" and
"source" are those of cuVS 26.06 and FAISS 1.15.1, "presumed" is what is neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import floor, log2

from cluster.config import Codes, CollectionConfig
from cluster.errors import FieldError, Invalid, Unavailable
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need, refusal, sized
from cluster.index_costs import CODE_BYTES, RECALL_REACHED
from cluster.index_spec import ITOPK_MAX, IndexKind, IndexSpec, clamped_nlist

GPU_KINDS = ("flat", "ivf_flat", "ivf_pq", "cagra")
K_MAX = NPROBE_MAX = 16_384  # source: of exact search and of lists; of a graph k is at most itopk, that 512
SCAN_BYTES_MAX = 860_000_000  # presumed: 1 ms at 0.86 TB/s, the data sheet's bandwidth of an L40S
POINTS_MIN = 1_000  # presumed: below, cuVS may be unable to cluster or link them, and a scan is short anyhow
GRAPH_POINTS_MIN = 10_000  # presumed: below, a scan is as fast
GRAPH_CHURN_MAX = 0.3  # presumed: deleted points stay in a graph, as in a CPU's
GRAPH_DIMENSION_MAX = 8_192  # source: a query lies in the shared memory of its block: 32 of the 48 KiB that there are
GRAPH_DEGREE_SMALL, GRAPH_DEGREE, GRAPH_DEGREE_MAX = 32, 64, 128  # documentation: 64 of 128 intermediate neighbours
GRAPH_LARGE = 1_000_000  # points from which a graph has that many
POINTS_PER_LIST = 1_000  # documentation: 1,000 to 10,000
PQ_SHARES = (2, 4, 8)  # dimensions of a sub-quantizer of 8 bits
FRACTIONS = 1e-6  # shares of GPUs that differ by less are equal


def k_limit(kind: str) -> int:
    """The most candidates that a GPU's index of the kind can be asked for at once."""
    return ITOPK_MAX if kind == "cagra" else K_MAX


# --- the order of preference --------------------------------------------------------------------------------------


def preferred(count: int, config: CollectionConfig) -> list[IndexSpec]:
    """Every index that the policy may choose for a GPU, best first."""
    graph = f"{count} points: a graph, searched on the GPU"
    lists = "lists of whole vectors on the GPU, which stand deletions, and a CPU can build them"
    specs = list(_flat(count, config))
    if count >= POINTS_MIN:
        specs += _cagra(count, config, graph)
        specs += _ivf_flat(count, config, lists)
        specs += _ivf_pq(count, config, "compressed lists on the GPU; exact rerank from the memory-mapped rows")
    return [sized(spec, count, config) for spec in specs]


def named(count: int, config: CollectionConfig, gpu: GpuFacts | None) -> list[IndexSpec]:
    """The kind that the config names with what it leaves open, and what that steps down to on a GPU, best first."""
    index = config.index
    asked = f"{index.kind} was asked for"
    if index.kind == "flat":
        specs = [replace(spec, reason=asked) for spec in _flat(count, config)]
    elif count < POINTS_MIN:
        few = f"{asked}; {count} points are too few for it: from {POINTS_MIN} on"
        specs = [replace(spec, reason=few) for spec in _flat(count, config)]
    else:
        specs = list(_KINDS[index.kind](count, config, asked))
        if index.kind == "cagra" and gpu is not None and not gpu.builds:
            specs += _ivf_flat(count, config, f"{asked}; lists can be built without a GPU")
        if index.kind == "cagra" and index.gpu_full == "step_down":
            specs += _ivf_pq(count, config, f"{asked}; compressed lists take less of the GPU")
    return [sized(spec, count, config) for spec in specs]


def like(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec:
    """The same kind of GPU index for another count; so few that there can be none of it are scanned exactly."""
    if spec.kind != "flat" and count < POINTS_MIN:
        few = f"{spec.reason}; {count} points are scanned exactly"
        return sized(replace(next(_flat(count, config)), reason=few), count, config)
    params = dict(spec.params)
    if "nlist" in params:
        params["nlist"] = _nlist(count, config)
    return sized(replace(spec, params=params), count, config)


def stronger(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec | None:
    """A graph with twice the neighbours, or codes of twice the bytes; None where there is none."""
    params = dict(spec.params)
    if spec.kind == "cagra" and 2 * params["graph_degree"] <= GRAPH_DEGREE_MAX:
        params = {name: 2 * value for name, value in params.items()}
    elif spec.kind == "ivf_pq":
        larger = [size for size in pq_sizes(config.dimension) if size > params["pq_m"]]
        params["pq_m"] = min(larger, default=params["pq_m"])
    return sized(replace(spec, params=params), count, config) if params != spec.params else None


def without_codes(spec: IndexSpec, count: int, config: CollectionConfig) -> list[IndexSpec]:
    """What ranks by the rows, where codes of whole vectors lose neighbours and larger ones do not fit; best first."""
    return [sized(each, count, config) for each in _ivf_pq(count, config, spec.reason)]


def _on_gpu(kind: IndexKind, params: dict[str, int], reason: str, codes: Codes = "float32") -> IndexSpec:
    return IndexSpec(kind, params, codes, 0, reason, rerank_store="rows", device="gpu")


def _flat(count: int, config: CollectionConfig) -> Iterator[IndexSpec]:
    """In the rows' own precision, and where that rounds the queries, in full as well."""
    chosen = config.index.codes
    codes: tuple[Codes, ...] = ("float16", "float32") if config.vector_dtype == "float16" else ("float32",)
    for each in codes if chosen is None else (chosen,):
        size = _scan_bytes(count, config, each)
        reason = f"{count} x {config.dimension} vectors, {size} bytes, are scanned exactly on the GPU"
        yield _on_gpu("flat", {}, reason, each)


def _cagra(count: int, config: CollectionConfig, reason: str) -> Iterator[IndexSpec]:
    index = config.index
    degree = index.graph_degree or (GRAPH_DEGREE if count >= GRAPH_LARGE else GRAPH_DEGREE_SMALL)
    params = {"graph_degree": degree, "intermediate_graph_degree": 2 * degree}
    codes: tuple[Codes, ...] = ("float16",) if config.vector_dtype == "float16" else ("float32", "float16")
    for each in codes if index.codes is None else (index.codes,):
        yield _on_gpu("cagra", params, reason, each)


def _ivf_flat(count: int, config: CollectionConfig, reason: str) -> Iterator[IndexSpec]:
    yield _on_gpu("ivf_flat", {"nlist": _nlist(count, config)}, reason)


def _ivf_pq(count: int, config: CollectionConfig, reason: str) -> Iterator[IndexSpec]:
    chosen = config.index.pq_m
    for size in pq_sizes(config.dimension) if chosen is None else (chosen,):
        yield _on_gpu("ivf_pq", {"nlist": _nlist(count, config), "pq_m": size, "pq_bits": 8}, reason)


_KINDS = {"cagra": _cagra, "ivf_flat": _ivf_flat, "ivf_pq": _ivf_pq}


def _nlist(count: int, config: CollectionConfig) -> int:
    """The power of two nearest n/1000, at most as many as can all be probed."""
    own = 1 << round(log2(max(1.0, count / POINTS_PER_LIST)))
    return clamped_nlist(min(NPROBE_MAX, config.index.nlist or own), count)


def pq_sizes(dimension: int) -> tuple[int, ...]:
    """Sub-quantizers, most first, of about 2, 4 and 8 dimensions each; they must divide the dimension (source).

    Multiples of 8 are preferred: they are searched faster (documentation). Without any divisor each dimension has one.
    """
    sizes = []
    for share in PQ_SHARES:
        most = dimension // share
        dividing = [size for size in range(most, most // 2, -1) if dimension % size == 0]
        sizes += [next((size for size in dividing if size % 8 == 0), dividing[0])] if dividing else []
    return tuple(dict.fromkeys(sizes)) or (dimension,)


def _scan_bytes(count: int, config: CollectionConfig, codes: str) -> int:
    return count * config.dimension * CODE_BYTES[codes]


# --- why not ------------------------------------------------------------------------------------------------------


def unwanted(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    """Why the policy does not choose the GPU index, whatever memory there is; "" where it may."""
    index = config.index
    if config.metric == "ip" and spec.kind != "flat":
        return "cuVS clusters and links badly by an inner product"
    if spec.kind == "cagra":
        return _unwanted_graph(count, config, gpu)
    if index.kind != "auto" or spec.kind != "flat" or index.target_recall >= RECALL_REACHED:
        return ""
    only = index.device == "gpu" and config.metric == "ip"  # nothing else is taken there
    size = _scan_bytes(count, config, spec.codes)
    if size > SCAN_BYTES_MAX and not only:
        return f"a scan reads {size} bytes; over {SCAN_BYTES_MAX} there is to be an index"
    return ""


def _unwanted_graph(count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    index = config.index
    if gpu is not None and not gpu.builds:
        return "only a GPU builds a graph for GPUs, and the build has none"
    if config.dimension > GRAPH_DIMENSION_MAX:
        return f"a graph on GPUs takes at most {GRAPH_DIMENSION_MAX} dimensions"
    if index.kind == "auto" and count < GRAPH_POINTS_MIN:
        return f"{count} points are few for a graph: from {GRAPH_POINTS_MIN} on"
    if index.kind == "auto" and index.churn > GRAPH_CHURN_MAX:
        return f"a graph slows down with deleted points: churn {index.churn:g} is over {GRAPH_CHURN_MAX:g}"
    return ""


def too_large(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    """Why the index does not fit the share of a GPU that a replica has, with the numbers; "" where it does."""
    if gpu is None or gpu.memory_bytes is None:
        return ""
    need = gpu_need(spec, count, config.dimension)
    name = f"{spec.kind} of {_codes(spec)}"
    told = refusal(PROCESS_BYTES + need.load, gpu.memory_bytes, f"{name}, with its process and a search,")
    if told or not gpu.builds:
        return told
    return refusal(PROCESS_BYTES + need.peak, gpu.memory_bytes, f"to build {name}, with its process,")


def _codes(spec: IndexSpec) -> str:
    return f"{spec.params['pq_m']}-byte codes" if spec.kind == "ivf_pq" else f"{spec.codes} codes"


# --- what a config may ask for ------------------------------------------------------------------------------------


def named_error(config: CollectionConfig) -> FieldError | None:
    """What keeps the kind and the options that a config names from a GPU, and the way out; None where nothing does."""
    index = config.index
    if index.kind not in ("auto", *GPU_KINDS):
        kinds = ", ".join(("auto", *GPU_KINDS))
        return FieldError("index.kind", f"{index.kind} is not served on GPUs: they take {kinds}; or use device cpu")
    if config.metric == "ip" and index.kind not in ("auto", "flat"):
        return FieldError(
            "index.kind",
            f"{index.kind} is not served on GPUs under metric ip, by which cuVS clusters and links badly: use flat, or "
            "device cpu with another kind",
        )
    if index.kind == "cagra" and config.dimension > GRAPH_DIMENSION_MAX:
        most = f"takes at most {GRAPH_DIMENSION_MAX} dimensions, not {config.dimension}"
        return FieldError("index.kind", f"cagra {most}; ivf_pq takes more")
    return _option_error(config)


def _option_error(config: CollectionConfig) -> FieldError | None:
    index = config.index
    if index.kind == "ivf_flat" and index.codes not in (None, "float32"):
        return FieldError("index.codes", f"must be float32 for ivf_flat on GPUs, not {index.codes}; or use device cpu")
    if index.rerank_store not in (None, "rows"):
        return FieldError(
            "index.rerank_store",
            f"must be rows on GPUs, not {index.rerank_store}: exact distances come from the memory-mapped rows",
        )
    if index.pq_bits not in (None, 8):
        return FieldError("index.pq_bits", f"must be 8 on GPUs, not {index.pq_bits}; or use device cpu")
    if index.pq_m is not None and config.dimension % index.pq_m:
        fitting = ", ".join(map(str, pq_sizes(config.dimension)))
        return FieldError(
            "index.pq_m",
            f"must divide the dimension, {config.dimension}, on GPUs: {index.pq_m} does not; such as {fitting}",
        )
    if index.nlist is not None and index.nlist > NPROBE_MAX:
        return FieldError("index.nlist", f"must be at most {NPROBE_MAX} on GPUs, which probe no more: {index.nlist}")
    return None


def check_asked(config: CollectionConfig, gpu: GpuFacts | None) -> None:
    """Invalid where a user asks GPUs for what they do not have, or for their kind where there are to be none."""
    index = config.index
    error = named_error(config)
    if error is not None and (index.device == "gpu" or index.kind == "cagra"):
        raise Invalid.at(error.field, error.message)
    if index.kind == "cagra" and not on_gpus(config, gpu):
        where = "on device cpu" if index.device == "cpu" else "here: there are no GPUs, or too few are free"
        raise Invalid.at(
            "index.kind",
            f"cagra is for GPUs, it cannot be had {where}; take kind hnsw, or device gpu: with wait_for_gpu it "
            "is taken before there are GPUs",
        )


def on_gpus(config: CollectionConfig, gpu: GpuFacts | None) -> bool:
    """Whether GPUs come into question. Invalid where what is asked of them by name cannot be."""
    index = config.index
    if index.device == "cpu" or (index.device == "auto" and gpu is None):
        return False
    error = named_error(config)
    if error is not None and index.device == "gpu":
        raise Invalid.at(error.field, error.message)
    return error is None


# --- whether there are enough -------------------------------------------------------------------------------------


def gpu_for(
    config: CollectionConfig,
    num_gpus: float,
    total: float,
    free: float,
    memory_bytes: int | None,
    name: str,
    held: float,
    builds: bool,
    held_otherwise: float = 0.0,
) -> GpuFacts | None:
    """What a plan is told of a cluster's GPUs, of which each replica is to have `num_gpus`; None where the collection
    goes without.

    `total` and `free` are GPUs of the cluster, `held` what this collection's own replicas with such a share have of
    them, `memory_bytes` the smallest one's: `device: auto` takes only GPUs of which that is known. Invalid where GPUs
    are asked for that the cluster does not have, unless `wait_for_gpu`; Unavailable where others hold them now, or its
    own replicas with another share: `held_otherwise`.
    """
    index = config.index
    if index.device == "cpu" or (index.device == "auto" and named_error(config) is not None):
        return None
    if index.device == "auto" and index.kind != "cagra" and memory_bytes is None:
        return None  # counted by Ray, but no driver tells of them, or the FAISS that is installed there knows none
    missing = missing_gpus(config, num_gpus, held)
    facts = GpuFacts(None if memory_bytes is None else floor(memory_bytes * num_gpus), name, builds)
    if total > 0 and missing <= free + FRACTIONS:
        return facts
    if index.device == "auto" and index.kind != "cagra":
        return None
    if index.wait_for_gpu:
        return facts
    raise _no_gpus(config, num_gpus, total, free, missing, held_otherwise)


def missing_gpus(config: CollectionConfig, num_gpus: float, held: float) -> float:
    """GPUs that replicas of such a share need beside those that the collection's own have; with what no other replica
    can use of them."""
    return max(0.0, config.shards * config.replicas - held / num_gpus) * share_with_rest(num_gpus)


def share_with_rest(num_gpus: float) -> float:
    """A share of a GPU, with what no other share of that size can use of it: 1 where it is over a half."""
    return 1.0 / floor(1.0 / num_gpus + FRACTIONS)


def _no_gpus(
    config: CollectionConfig, num_gpus: float, total: float, free: float, missing: float, held_otherwise: float
) -> Invalid | Unavailable:
    if total <= 0:
        return Invalid.at(
            "index.device",
            f"this cluster has no GPU: use {_on_cpu(config)}, add a node with a GPU, or set wait_for_gpu to wait for "
            "one",
        )
    asked = f"{config.shards} shards x {config.replicas} replicas of {num_gpus:g} GPUs"
    wanted = missing_gpus(config, num_gpus, 0.0)
    if wanted > total + FRACTIONS:
        return Invalid.at(
            "index.device",
            f"{asked} take {wanted:g} GPUs, this cluster has {total:g}: use fewer shards or replicas, a smaller "
            f"num_gpus, {_on_cpu(config)}, or set wait_for_gpu to wait for more",
        )
    way = "try again when others have given theirs back"
    if held_otherwise:
        way = f"its own have {held_otherwise:g} with another share, until these take over: keep it, {way}"
    return Unavailable(
        f"{asked} take {missing:g} GPUs more, {free:g} of {total:g} are free: {way}, or set index.wait_for_gpu to wait "
        "for them",
        retry_after_s=10.0,
    )


def _on_cpu(config: CollectionConfig) -> str:
    """How to do without GPUs, for a message."""
    return "kind hnsw on device cpu" if config.index.kind == "cagra" else "device cpu"
