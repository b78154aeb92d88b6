"""The adaptive policy: which index fits a shard. A pure, versioned function of plain data, and why it decided so.

The order of preference, the bounds and what was measured for them: docs/decisions/0004-adaptive-index.md; on GPUs:
`cluster.gpu_policy`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from cluster import gpu_policy, index_costs
from cluster.config import Codes, CollectionConfig, IndexConfig, RerankStore
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts, sized
from cluster.index_costs import REFERENCE, Rates
from cluster.index_spec import (
    HNSW_EF_CONSTRUCTION,
    HNSW_M,
    HNSW_M_SMALL,
    RABITQ_DIMENSIONS,
    IndexKind,
    IndexSpec,
    clamped_nlist,
    nlist,
    pq_m,
)
from cluster.named_kinds import check_options, named

FLAT_FLOATS_MAX = 6_000_000  # count x dimension that one core scans in about 1 ms
HNSW_CHURN_MAX = 0.3  # deleted points stay in a graph and are walked through until the next rebuild
MEMORY_MARGIN = 1.15  # of the predicted bytes, for what the prediction leaves out
STRONGER_MAX = 2  # rebuilds of an index that misses its target


@dataclass(frozen=True)
class Candidate:
    """An index that was considered, what is predicted for it, and why it was not taken ("" for the one that was).

    None where nothing was measured that a prediction could come from: on GPUs.
    """

    spec: IndexSpec
    build_seconds: float | None
    reachable_recall: float
    queries_per_s: float | None
    rejected: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for status, `explain` and segment.json; what is about GPUs only of those that are for one."""
        on_gpu = {"device": "gpu", "gpu_bytes": self.spec.gpu_bytes} if self.spec.device == "gpu" else {}
        return {
            "kind": self.spec.kind,
            "params": self.spec.params,
            "codes": self.spec.codes,
            "rerank_store": self.spec.rerank_store,
            "predicted_bytes": self.spec.predicted_bytes,
            "predicted_build_seconds": rounded(self.build_seconds, 3),
            "reachable_recall": self.reachable_recall,
            "predicted_queries_per_s": rounded(self.queries_per_s, 1),
            "rejected": self.rejected,
            **on_gpu,
        }


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


@dataclass(frozen=True)
class IndexPlan:
    """The choice, and everything that was considered, in order of preference."""

    spec: IndexSpec
    considered: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.considered if not candidate.rejected)


def choose(count: int, config: CollectionConfig, gpu: GpuFacts | None = None) -> IndexSpec:
    """The index for `count` points of one shard of a collection that is asked for: Invalid, too, where its kind is for
    GPUs and there are to be none. See `plan_index`."""
    gpu_policy.check_asked(config, gpu)
    return plan_index(count, config, gpu=gpu).spec


def plan_index(
    count: int, config: CollectionConfig, rates: Rates = REFERENCE, gpu: GpuFacts | None = None
) -> IndexPlan:
    """Choose the index for `count` points. Raises Invalid, with the numbers, when nothing meets the bounds.

    `gpu` is what is known of the GPUs that it may be served on. Without it `device: auto` means CPUs, and `device: gpu`
    a GPU whose memory bounds nothing. On a CPU a graph stands in for the one that only GPUs have.
    """
    index = config.index
    if index.kind != "auto":
        check_options(count, config)
    considered: list[Candidate] = []
    taken: IndexSpec | None = None
    for candidate in _candidates(count, config, rates, gpu):
        if not candidate.rejected and taken is not None:
            candidate = replace(candidate, rejected=f"would do as well; {_name(taken)} is preferred")
        elif not candidate.rejected:
            taken = candidate.spec
        considered.append(candidate)
    if taken is None:
        wanted = [c for c in considered if not _unwanted(c.spec, count, config, gpu)]
        if not wanted:
            raise Invalid.at("index.kind", f"{considered[0].rejected}; take another kind, or gpu_full step_down")
        raise _nothing_fits(wanted, index)
    return IndexPlan(taken, tuple(considered))


def _candidates(count: int, config: CollectionConfig, rates: Rates, gpu: GpuFacts | None) -> Iterable[Candidate]:
    """Every index that comes into question, those of GPUs first. Invalid where one of these must do, and does not."""
    index = config.index
    on_gpu: list[Candidate] = []
    if gpu_policy.on_gpus(config, gpu):
        specs = gpu_policy.preferred(count, config) if index.kind == "auto" else gpu_policy.named(count, config, gpu)
        on_gpu = [_candidate(spec, count, config, rates, gpu) for spec in specs]
        if index.gpu_full == "refuse":
            _refuse_full(on_gpu, count, config, gpu)
            if index.device == "gpu":
                return on_gpu
    specs = _preferred(count, config) if index.kind == "auto" else [named(count, config)]
    if index.device == "gpu":
        specs = [replace(spec, reason=f"{spec.reason}; on a CPU, since no GPU takes it") for spec in specs]
    return [*on_gpu, *(_candidate(spec, count, config, rates, gpu) for spec in specs)]


def _refuse_full(on_gpu: list[Candidate], count: int, config: CollectionConfig, gpu: GpuFacts | None) -> None:
    """Invalid where the kind that the policy wants does not fit a GPU, in any codes."""
    roomy = None if gpu is None else replace(gpu, memory_bytes=None)
    wanted = [c.spec for c in on_gpu if not _rejection(c, count, config, roomy)]
    kind = [spec for spec in wanted if spec.kind == wanted[0].kind]
    reasons = [gpu_policy.too_large(spec, count, config, gpu) for spec in kind]
    if kind and all(reasons):
        more = "" if config.index.num_gpus in (None, 1.0) else "raise num_gpus, "
        raise Invalid.at("index.gpu_full", f"{'; '.join(reasons)}: {more}use more shards, or set gpu_full to step_down")


def like(spec: IndexSpec, count: int, config: CollectionConfig) -> IndexSpec:
    """The same kind of index for another count: as the segments of one import are, whatever hashing gives each."""
    if spec.device == "gpu":
        return gpu_policy.like(spec, count, config)
    params = dict(spec.params)
    if "nlist" in params:
        params["nlist"] = clamped_nlist(config.index.nlist or nlist(count), count)
    return sized(replace(spec, params=params), count, config)


def stronger(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None = None) -> IndexSpec | None:
    """What to build when `spec` missed its target on the real vectors; None where there is nothing better that fits.

    A graph gets twice the links and twice the effort, up to `STRONGER_MAX` times, the smallest codes make room for
    those twice their size; the memory bounds hold.
    """
    if config.index.kind != "auto":
        return None
    reason = f"{spec.reason}; built again, since {_name(spec)} missed the target"
    if spec.device == "gpu":
        more = gpu_policy.stronger(replace(spec, reason=reason), count, config)
        return more if more is not None and _fits_both(more, count, config, gpu) else None
    if spec.kind == "hnsw" and spec.params["ef_construction"] < HNSW_EF_CONSTRUCTION << STRONGER_MAX:
        better = replace(spec, params={name: 2 * value for name, value in spec.params.items()}, reason=reason)
    elif spec.params == _smallest_params(count, config):
        params = _refined_params(count, config)
        better = replace(spec, kind=_refined_kind(config), params=params, reason=reason)
    else:
        return None
    better = sized(better, count, config)
    same = (better.kind, better.params) == (spec.kind, spec.params)
    return better if _fits(better, config.index) and not same else None


def with_codes(
    spec: IndexSpec, codes: Codes, count: int, config: CollectionConfig, why: str, gpu: GpuFacts | None = None
) -> IndexSpec:
    """`spec`, a graph, with other codes, because the vectors at hand ask for it; where these do not fit, lists.

    Compressed lists code what is left of a vector beside its centroid, and rank by the rows.
    """
    reason = f"{spec.reason}; {why}"
    coded = sized(replace(spec, codes=codes, reason=reason), count, config)
    if _fits_both(coded, count, config, gpu):
        return coded
    if config.index.kind != "auto":
        raise Invalid.at("index.memory_bytes", f"{why}; {codes} codes need {_needed(coded)} bytes: raise it")
    if spec.device == "gpu":
        lists_there = gpu_policy.without_codes(coded, count, config)
        return next((each for each in lists_there if _fits_both(each, count, config, gpu)), lists_there[-1])
    lists = IndexSpec(_refined_kind(config), _refined_params(count, config), "float32", 0, reason, rerank_store="rows")
    return sized(lists, count, config)


def with_store(spec: IndexSpec, store: RerankStore, count: int, config: CollectionConfig, why: str) -> IndexSpec:
    """`spec` with another rerank store, because the vectors at hand ask for it."""
    return sized(replace(spec, rerank_store=store, reason=f"{spec.reason}; {why}"), count, config)


def _name(spec: IndexSpec) -> str:
    """Kind, codes and store in a few words, such as `hnsw M 32 (float16 codes)`."""
    store = {"none": "", "rows": ", rerank from rows"}.get(spec.rerank_store, f", {spec.rerank_store} rerank store")
    codes = f"{spec.codes} codes" if spec.kind in ("flat", "hnsw", "ivf_flat", "cagra") else ""
    if spec.device == "gpu":
        return f"{spec.kind} on a GPU ({codes or _name_of_params(spec)})"
    inside = f"{codes}{store if spec.kind != 'hnsw' else ''}".removeprefix(", ")
    kind = f"hnsw M {spec.params['m']}" if spec.kind == "hnsw" else spec.kind
    return f"{kind} ({inside})" if inside else kind


def _name_of_params(spec: IndexSpec) -> str:
    return ", ".join(f"{name} {value}" for name, value in spec.params.items())


# --- the order of preference --------------------------------------------------------------------------------------


def _preferred(count: int, config: CollectionConfig) -> list[IndexSpec]:
    """Every kind that the policy may choose, best first."""

    def spec(kind: IndexKind, params: dict[str, int], reason: str, codes: Codes, store: RerankStore) -> IndexSpec:
        return sized(IndexSpec(kind, params, codes, 0, reason, rerank_store=store), count, config)

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
    return {"nlist": nlist(count), "pq_m": pq_m(config.dimension, 8), "pq_bits": 4}


def _refined_params(count: int, config: CollectionConfig) -> dict[str, int]:
    if _refined_kind(config) == "ivf_rabitq":
        return {"nlist": nlist(count)}
    return {"nlist": nlist(count), "pq_m": pq_m(config.dimension, 4), "pq_bits": 4}


def _candidate(spec: IndexSpec, count: int, config: CollectionConfig, rates: Rates, gpu: GpuFacts | None) -> Candidate:
    on_cpu = spec.kind != "cagra" and gpu is not None and not gpu.builds  # what builds it, whatever serves it
    built = replace(spec, device="cpu") if on_cpu else spec
    seconds = index_costs.build_seconds(built, count, config.dimension, rates)
    recall = index_costs.reachable_recall(spec, config.vector_dtype)
    speed = index_costs.queries_per_s(spec, count, config.dimension, config.index.target_recall, rates)
    candidate = Candidate(spec, seconds, recall, speed)
    return replace(candidate, rejected=_rejection(candidate, count, config, gpu))


def _rejection(candidate: Candidate, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    """Why the index cannot be taken; "" where it can."""
    spec, index = candidate.spec, config.index
    if candidate.reachable_recall < index.target_recall:
        return f"reaches recall {candidate.reachable_recall:g}, {index.target_recall:g} is the target"
    if not _fits(spec, index):
        what = "its twin on the host needs" if spec.device == "gpu" else "needs"
        return f"{what} {_needed(spec)} bytes, memory_bytes allows {index.memory_bytes}"
    if index.build_seconds is not None and (candidate.build_seconds or 0.0) > index.build_seconds:
        return f"takes {candidate.build_seconds:.0f} s to build, build_seconds allows {index.build_seconds:g}"
    return _unwanted(spec, count, config, gpu)


def _unwanted(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    """Why the policy does not choose the index, whatever memory and time there are; "" where it may."""
    index, floats = config.index, count * config.dimension
    if spec.device == "gpu":
        return _unwanted_on_gpu(spec, count, config, gpu)
    if index.kind != "auto":
        return ""
    if spec.kind == "flat" and index.target_recall < index_costs.RECALL_REACHED and floats > FLAT_FLOATS_MAX:
        return f"a scan of {floats} floats takes about {_scan_ms(floats):.0f} ms a query"
    if spec.kind == "hnsw" and index.churn > HNSW_CHURN_MAX:
        return f"a graph slows down with deleted points: churn {index.churn:g} is over {HNSW_CHURN_MAX:g}"
    return ""


def _unwanted_on_gpu(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> str:
    """The memory of a GPU is what it is, too."""
    floats = count * config.dimension
    if config.index.device == "auto" and config.index.kind != "cagra" and floats <= FLAT_FLOATS_MAX:
        return f"a CPU scans {floats} floats in about {_scan_ms(floats):.1f} ms: no GPU is taken for that"
    why = gpu_policy.unwanted(spec, count, config, gpu)
    return why or gpu_policy.too_large(spec, count, config, gpu)


def _scan_ms(floats: int) -> float:
    return floats * 4 / 25e9 * 1e3


def _needed(spec: IndexSpec) -> int:
    return ceil(spec.predicted_bytes * MEMORY_MARGIN)


def _fits(spec: IndexSpec, index: IndexConfig) -> bool:
    """The host's memory: the twin of a GPU's index takes none where there is to be none."""
    if index.memory_bytes is None or (spec.device == "gpu" and not index.cpu_twin):
        return True
    return spec.predicted_bytes * MEMORY_MARGIN <= index.memory_bytes


def _fits_both(spec: IndexSpec, count: int, config: CollectionConfig, gpu: GpuFacts | None) -> bool:
    on_gpu = spec.device != "gpu" or not gpu_policy.too_large(spec, count, config, gpu)
    return on_gpu and _fits(spec, config.index)


def _nothing_fits(considered: list[Candidate], index: IndexConfig) -> Invalid:
    """The bound that everything fails on, with what each index needs: with that much it would be taken."""
    reaching = [c for c in considered if c.reachable_recall >= index.target_recall]
    if not reaching:
        best = max(c.reachable_recall for c in considered)
        return Invalid.at(
            "index.target_recall",
            f"{_name(considered[0].spec)} reaches recall {best:g} at most, {index.target_recall:g} is asked for; "
            f"{'give it a rerank_store, ' if considered[0].spec.rerank_store == 'none' else ''}lower the target, "
            "or use kind auto",
        )
    small = [c for c in reaching if _fits(c.spec, index)]
    if not small:
        needs = ", ".join(f"{_name(c.spec)} {_needed(c.spec)}" for c in reaching)
        return Invalid.at(
            "index.memory_bytes",
            f"{index.memory_bytes} bytes for one shard's index are too few for recall {index.target_recall:g}; "
            f"needed are: {needs}. Raise it, use more shards, or lower target_recall",
        )
    timed = [(c.spec, c.build_seconds) for c in small if c.build_seconds is not None]
    quickest = ", ".join(f"{_name(spec)} {ceil(seconds * 10) / 10}" for spec, seconds in timed)
    return Invalid.at(
        "index.build_seconds",
        f"{index.build_seconds:g} s to build one shard's index are too few; predicted are: {quickest}. "
        "Raise it, or use more shards",
    )
