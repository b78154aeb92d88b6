"""The adaptive policy: which index fits a shard. A pure, versioned function of plain data, and why it decided so.

The order of preference, the bounds and what was measured for them: docs/decisions/0004-adaptive-index.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from cluster import index_costs
from cluster.config import Codes, CollectionConfig, IndexConfig, RerankStore
from cluster.errors import Invalid
from cluster.index_costs import REFERENCE, Rates
from cluster.index_spec import POINTS_PER_CENTROID_MIN, IndexKind, IndexSpec, clamped_nlist, nlist

FLAT_FLOATS_MAX = 6_000_000  # count x dimension that one core scans in about 1 ms
HNSW_M, HNSW_M_SMALL = 32, 16  # 32 answers up to 1.45 times as many queries at equal recall, for 128 bytes a point
HNSW_EF_CONSTRUCTION = 100
HNSW_CHURN_MAX = 0.3  # deleted points stay in a graph and are walked through until the next rebuild
RABITQ_DIMENSIONS = (
    256,
    3_072,
)  # below, 4-bit product quantisation ranks better at the same bytes; above, sums overflow
MEMORY_MARGIN = 1.15  # of the predicted bytes, for what the prediction leaves out
STRONGER_MAX = 2  # rebuilds of an index that misses its target


@dataclass(frozen=True)
class Candidate:
    """An index that was considered, what is predicted for it, and why it was not taken ("" for the one that was)."""

    spec: IndexSpec
    build_seconds: float
    reachable_recall: float
    queries_per_s: float
    rejected: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for status, `explain` and segment.json."""
        return {
            "kind": self.spec.kind,
            "params": self.spec.params,
            "codes": self.spec.codes,
            "rerank_store": self.spec.rerank_store,
            "predicted_bytes": self.spec.predicted_bytes,
            "predicted_build_seconds": round(self.build_seconds, 3),
            "reachable_recall": self.reachable_recall,
            "predicted_queries_per_s": round(self.queries_per_s, 1),
            "rejected": self.rejected,
        }


@dataclass(frozen=True)
class IndexPlan:
    """The choice, and everything that was considered, in order of preference."""

    spec: IndexSpec
    considered: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.considered if not candidate.rejected)


def choose(count: int, config: CollectionConfig) -> IndexSpec:
    """The index for `count` points of one shard; see `plan_index`."""
    return plan_index(count, config).spec


def plan_index(count: int, config: CollectionConfig, rates: Rates = REFERENCE) -> IndexPlan:
    """Choose the index for `count` points. Raises Invalid, with the numbers, when nothing meets the bounds."""
    index = config.index
    if index.device == "gpu":
        raise Invalid.at("index.device", "this version has no GPU index kinds; use cpu")
    specs = _preferred(count, config) if index.kind == "auto" else [_named(count, config)]
    considered: list[Candidate] = []
    taken: IndexSpec | None = None
    for spec in specs:
        candidate = _candidate(spec, count, config, rates)
        if not candidate.rejected and taken is not None:
            candidate = replace(candidate, rejected=f"would do as well; {_name(taken)} is preferred")
        elif not candidate.rejected:
            taken = spec
        considered.append(candidate)
    if taken is None:
        raise _nothing_fits([c for c in considered if not _unwanted(c.spec, count, config)], index)
    return IndexPlan(taken, tuple(considered))


def like(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec:
    """The same kind of index for another count: as the segments of one import are, whatever hashing gives each."""
    params = dict(spec.params)
    if "nlist" in params:
        params["nlist"] = clamped_nlist(config.index.nlist or nlist(count), count)
    return _sized(replace(spec, params=params), count, config)


def stronger(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec | None:
    """What to build when `spec` missed its target on the real vectors; None where there is nothing better that fits.

    A graph gets twice the links and twice the effort, up to `STRONGER_MAX` times, the smallest codes make room for
    those twice their size; the memory bound holds.
    """
    if config.index.kind != "auto":
        return None
    reason = f"{spec.reason}; built again, since {_name(spec)} missed the target"
    if spec.kind == "hnsw" and spec.params["ef_construction"] < HNSW_EF_CONSTRUCTION << STRONGER_MAX:
        better = replace(spec, params={name: 2 * value for name, value in spec.params.items()}, reason=reason)
    elif spec.params == _smallest_params(count, config):
        params = _refined_params(count, config)
        better = replace(spec, kind=_refined_kind(config), params=params, reason=reason)
    else:
        return None
    better = _sized(better, count, config)
    same = (better.kind, better.params) == (spec.kind, spec.params)
    return better if _fits(better, config.index) and not same else None


def with_codes(spec: IndexSpec, codes: Codes, count: int, config: CollectionConfig, why: str) -> IndexSpec:
    """`spec`, a graph, with other codes, because the vectors at hand ask for it; where these do not fit, lists.

    Compressed lists code what is left of a vector beside its centroid, and rank by the rows.
    """
    reason = f"{spec.reason}; {why}"
    coded = _sized(replace(spec, codes=codes, reason=reason), count, config)
    if _fits(coded, config.index):
        return coded
    if config.index.kind != "auto":
        raise Invalid.at("index.memory_bytes", f"{why}; {codes} codes need {_needed(coded)} bytes: raise it")
    lists = IndexSpec(_refined_kind(config), _refined_params(count, config), "float32", 0, reason, rerank_store="rows")
    return _sized(lists, count, config)


def with_store(spec: IndexSpec, store: RerankStore, count: int, config: CollectionConfig, why: str) -> IndexSpec:
    """`spec` with another rerank store, because the vectors at hand ask for it."""
    return _sized(replace(spec, rerank_store=store, reason=f"{spec.reason}; {why}"), count, config)


def _sized(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec:
    return replace(spec, predicted_bytes=index_costs.index_bytes(spec, count, config.dimension, config.metric))


def _name(spec: IndexSpec) -> str:
    """Kind, codes and store in a few words, such as `hnsw M 32 (float16 codes)`."""
    store = {"none": "", "rows": ", rerank from rows"}.get(spec.rerank_store, f", {spec.rerank_store} rerank store")
    codes = f"{spec.codes} codes" if spec.kind in ("flat", "hnsw", "ivf_flat") else ""
    inside = f"{codes}{store if spec.kind != 'hnsw' else ''}".removeprefix(", ")
    kind = f"hnsw M {spec.params['m']}" if spec.kind == "hnsw" else spec.kind
    return f"{kind} ({inside})" if inside else kind


# --- the order of preference --------------------------------------------------------------------------------------


def _preferred(count: int, config: CollectionConfig) -> list[IndexSpec]:
    """Every kind that the policy may choose, best first."""

    def spec(kind: IndexKind, params: dict[str, int], reason: str, codes: Codes, store: RerankStore) -> IndexSpec:
        return _sized(IndexSpec(kind, params, codes, 0, reason, rerank_store=store), count, config)

    graph, lists = _graph_params(HNSW_M), _refined_params(count, config)
    refined, small = _refined_kind(config), _smallest_params(count, config)
    floats = count * config.dimension
    exact = f"{count} x {config.dimension} = {floats} floats are scanned exactly in about {_scan_ms(floats):.1f} ms"
    specs = [
        spec("flat", {}, exact, "float32", "none"),
        spec("hnsw", graph, f"{count} points: a graph is fastest and fits", "float16", "rows"),
        spec("hnsw", graph, "a graph of 8-bit codes fits, of float16 it would not", "sq8", "rows"),
        spec("hnsw", _graph_params(HNSW_M_SMALL), "a graph with half the links fits", "sq8", "rows"),
        spec(refined, lists, "compressed lists with a float16 copy for the exact rerank", "float32", "float16"),
        spec(refined, lists, "compressed lists with an 8-bit copy to rerank from", "float32", "sq8"),
        spec(refined, lists, "compressed lists; exact rerank from the memory-mapped rows", "float32", "rows"),
        spec("ivf_pq", small, "the smallest codes; exact rerank from the memory-mapped rows", "float32", "rows"),
    ]
    if config.vector_dtype == "float16":  # as exact as the rows are
        specs.insert(1, spec("flat", {}, exact, "float16", "none"))
    return specs


def _graph_params(m: int) -> dict[str, int]:
    return {"m": m, "ef_construction": HNSW_EF_CONSTRUCTION}


def _refined_kind(config: CollectionConfig) -> IndexKind:
    return "ivf_rabitq" if RABITQ_DIMENSIONS[0] <= config.dimension <= RABITQ_DIMENSIONS[1] else "ivf_pq"


def _smallest_params(count: int, config: CollectionConfig) -> dict[str, int]:
    return {"nlist": nlist(count), "pq_m": _pq_m(config.dimension, 8), "pq_bits": 4}


def _refined_params(count: int, config: CollectionConfig) -> dict[str, int]:
    if _refined_kind(config) == "ivf_rabitq":
        return {"nlist": nlist(count)}
    return {"nlist": nlist(count), "pq_m": _pq_m(config.dimension, 4), "pq_bits": 4}


def _pq_m(dimension: int, floats_each: int) -> int:
    """Sub-quantizers of `floats_each` dimensions; zeros fill the last one."""
    return ceil(dimension / floats_each)


def _candidate(spec: IndexSpec, count: int, config: CollectionConfig, rates: Rates) -> Candidate:
    seconds = index_costs.build_seconds(spec, count, config.dimension, rates)
    recall = index_costs.reachable_recall(spec, config.vector_dtype)
    speed = index_costs.queries_per_s(spec, count, config.dimension, config.index.target_recall, rates)
    candidate = Candidate(spec, seconds, recall, speed)
    return replace(candidate, rejected=_rejection(candidate, count, config))


def _rejection(candidate: Candidate, count: int, config: CollectionConfig) -> str:
    """Why the index cannot be taken; "" where it can."""
    spec, index = candidate.spec, config.index
    if candidate.reachable_recall < index.target_recall:
        return f"reaches recall {candidate.reachable_recall:g}, {index.target_recall:g} is the target"
    if not _fits(spec, index):
        return f"needs {_needed(spec)} bytes, memory_bytes allows {index.memory_bytes}"
    if index.build_seconds is not None and candidate.build_seconds > index.build_seconds:
        return f"takes {candidate.build_seconds:.0f} s to build, build_seconds allows {index.build_seconds:g}"
    return _unwanted(spec, count, config)


def _unwanted(spec: IndexSpec, count: int, config: CollectionConfig) -> str:
    """Why the policy does not choose the index, whatever memory and time there are; "" where it may."""
    index, floats = config.index, count * config.dimension
    if index.kind != "auto":
        return ""
    if spec.kind == "flat" and index.target_recall < index_costs.RECALL_REACHED and floats > FLAT_FLOATS_MAX:
        return f"a scan of {floats} floats takes about {_scan_ms(floats):.0f} ms a query"
    if spec.kind == "hnsw" and index.churn > HNSW_CHURN_MAX:
        return f"a graph slows down with deleted points: churn {index.churn:g} is over {HNSW_CHURN_MAX:g}"
    return ""


def _scan_ms(floats: int) -> float:
    return floats * 4 / 25e9 * 1e3


def _needed(spec: IndexSpec) -> int:
    return ceil(spec.predicted_bytes * MEMORY_MARGIN)


def _fits(spec: IndexSpec, index: IndexConfig) -> bool:
    return index.memory_bytes is None or spec.predicted_bytes * MEMORY_MARGIN <= index.memory_bytes


def _nothing_fits(considered: list[Candidate], index: IndexConfig) -> Invalid:
    """The bound that everything fails on, with what each index needs: with that much it would be taken."""
    reaching = [c for c in considered if c.reachable_recall >= index.target_recall]
    if not reaching:
        best = max(c.reachable_recall for c in considered)
        return Invalid.at(
            "index.target_recall",
            f"{_name(considered[0].spec)} reaches recall {best:g} at most, {index.target_recall:g} is asked for; "
            "give it a rerank_store, lower the target, or use kind auto",
        )
    small = [c for c in reaching if _fits(c.spec, index)]
    if not small:
        needs = ", ".join(f"{_name(c.spec)} {_needed(c.spec)}" for c in reaching)
        return Invalid.at(
            "index.memory_bytes",
            f"{index.memory_bytes} bytes for one shard's index are too few for recall {index.target_recall:g}; "
            f"needed are: {needs}. Raise it, use more shards, or lower target_recall",
        )
    quickest = ", ".join(f"{_name(c.spec)} {ceil(c.build_seconds * 10) / 10}" for c in small)
    return Invalid.at(
        "index.build_seconds",
        f"{index.build_seconds:g} s to build one shard's index are too few; predicted are: {quickest}. "
        "Raise it, or use more shards",
    )


# --- a kind that was named ----------------------------------------------------------------------------------------


def _named(count: int, config: CollectionConfig) -> IndexSpec:
    """The kind that the config names, with its options; Invalid where they do not go with dimension or count."""
    index = config.index
    _check_options(count, config)
    spec = _NAMED[index.kind](count, config)
    return _sized(replace(spec, reason=f"{_named_as(index)} was asked for"), count, config)


def _named_as(index: IndexConfig) -> str:
    return index.factory or index.kind


def _check_options(count: int, config: CollectionConfig) -> None:
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
    return IndexSpec("flat", {}, "float32", 0, "")


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
        "pq_m": index.pq_m or _pq_m(config.dimension, 4 if bits == 4 else 8),
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
