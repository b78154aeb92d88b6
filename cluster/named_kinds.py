"""Indexes that a config names, as a CPU serves them, with the options it gives; those of GPUs: `cluster.gpu_policy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.config import Codes, CollectionConfig, RerankStore
from cluster.errors import Invalid
from cluster.gpu_memory import sized
from cluster.index_spec import (
    HNSW_EF_CONSTRUCTION,
    HNSW_M,
    POINTS_PER_CENTROID_MIN,
    RABITQ_DIMENSIONS,
    IndexSpec,
    clamped_nlist,
    nlist,
    pq_m,
)


def named(count: int, config: CollectionConfig) -> IndexSpec:
    """The kind that the config names, as a CPU serves it, with its options.

    What only GPUs have becomes a graph.
    """
    index = config.index
    kind = "hnsw" if index.kind == "cagra" else index.kind
    spec = _NAMED[kind](count, config)
    return sized(replace(spec, reason=f"{index.factory or index.kind} was asked for"), count, config)


def check_options(count: int, config: CollectionConfig) -> None:
    """Invalid where the options do not go with dimension or count, on whatever device."""
    index = config.index
    if index.kind == "ivf_rabitq" and config.dimension > RABITQ_DIMENSIONS[1]:
        raise Invalid.at("index.kind", f"ivf_rabitq takes at most {RABITQ_DIMENSIONS[1]} dimensions; ivf_pq takes more")
    if index.pq_m is not None and index.pq_m > config.dimension:
        raise Invalid.at("index.pq_m", f"must be at most the dimension, {config.dimension}, not {index.pq_m}")
    if index.nlist is not None and count and clamped_nlist(index.nlist, count) < index.nlist:
        raise Invalid.at(
            "index.nlist",
            f"{index.nlist} lists need {index.nlist * POINTS_PER_CENTROID_MIN} points a shard to train, there are "
            f"{count}: at most {clamped_nlist(index.nlist, count)}, or leave it out",
        )


def _named_flat(count: int, config: CollectionConfig) -> IndexSpec:
    codes = config.index.codes or "float32"
    return IndexSpec("flat", {}, codes, 0, "", rerank_store=_rows_unless_exact(codes, config))


def _named_hnsw(count: int, config: CollectionConfig) -> IndexSpec:
    index = config.index
    params = {"m": index.m or HNSW_M, "ef_construction": index.ef_construction or HNSW_EF_CONSTRUCTION}
    codes = index.codes or "float16"
    return IndexSpec("hnsw", params, codes, 0, "", rerank_store=index.rerank_store or _rows_unless_exact(codes, config))


def _rows_unless_exact(codes: Codes, config: CollectionConfig) -> RerankStore:
    """Codes as precise as the rows need no second look at them."""
    return "none" if codes in ("float32", config.vector_dtype) else "rows"


def _named_ivf_flat(count: int, config: CollectionConfig) -> IndexSpec:
    codes = config.index.codes or config.vector_dtype
    lists = config.index.nlist or nlist(count)
    exact = codes == "float32"  # lists keep what is left of a vector beside its centroid: float16 rounds that
    store = config.index.rerank_store or ("none" if exact else "rows")
    return IndexSpec("ivf_flat", {"nlist": lists}, codes, 0, "", rerank_store=store)


def _named_ivf_sq8(count: int, config: CollectionConfig) -> IndexSpec:
    lists = config.index.nlist or nlist(count)
    return IndexSpec("ivf_sq8", {"nlist": lists}, "float32", 0, "", rerank_store=config.index.rerank_store or "rows")


def _named_ivf_pq(count: int, config: CollectionConfig) -> IndexSpec:
    index = config.index
    bits = index.pq_bits or 4
    params = {
        "nlist": index.nlist or nlist(count),
        "pq_m": index.pq_m or pq_m(config.dimension, 4 if bits == 4 else 8),
        "pq_bits": bits,
    }
    return IndexSpec("ivf_pq", params, "float32", 0, "", rerank_store=index.rerank_store or "rows")


def _named_ivf_rabitq(count: int, config: CollectionConfig) -> IndexSpec:
    lists = config.index.nlist or nlist(count)
    return IndexSpec("ivf_rabitq", {"nlist": lists}, "float32", 0, "", rerank_store=config.index.rerank_store or "rows")


def _named_factory(count: int, config: CollectionConfig) -> IndexSpec:
    store, factory = config.index.rerank_store or "rows", config.index.factory or ""
    return IndexSpec("factory", {}, "float32", 0, "", rerank_store=store, factory=factory)


_NAMED: dict[str, Callable[[int, CollectionConfig], IndexSpec]] = {
    "flat": _named_flat,
    "hnsw": _named_hnsw,
    "ivf_flat": _named_ivf_flat,
    "ivf_sq8": _named_ivf_sq8,
    "ivf_pq": _named_ivf_pq,
    "ivf_rabitq": _named_ivf_rabitq,
    "factory": _named_factory,
}
