"""What an index is built of: kind, parameters, codes, rerank store; its FAISS factory string and its knobs.

`cluster.index_policy` chooses one, `cluster.index_costs` predicts what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2, sqrt
from typing import Any, Literal

from cluster.config import Codes, RerankStore, ServedOn
from cluster.errors import Invalid

IndexKind = Literal["flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq", "cagra", "factory"]

POLICY_VERSION = 2
HNSW_M, HNSW_M_SMALL = 32, 16  # 32 answers up to 1.45 times as many queries at equal recall, for 128 bytes a point
HNSW_EF_CONSTRUCTION = 100
RABITQ_DIMENSIONS = (
    256,
    3_072,
)  # below, 4-bit product quantisation ranks better at the same bytes; above, sums overflow
POINTS_PER_CENTROID_MIN = 39  # below it FAISS warns that k-means is starved
TRAINING_POINTS_PER_CENTROID = 128  # recall grows up to here: .942 at 10, .958 at 39, .972 at 128 and at 190
TRAINING_POINTS_FACTORY = 100_000  # for a factory string, whose parts are not known
TRAINING_POINTS_SQ8 = 20_000  # the range of each dimension
TRAINING_POINTS_PQ = 256 * 256  # FAISS takes at most 256 a centroid of a sub-quantizer
GRAPH_COARSE_LISTS = 16_384  # from so many lists on a graph finds the nearest centroids faster than a scan
KNOB_STEP = 1.06  # neighbouring values of a search grid
EF_SEARCH_MAX = 2_048
FAR_SCORE, FAR_EF_SEARCH = "far_score", "far_ef_search"  # of operating points: see `actors.tuner.tune_near_and_far`
RERANK_GRID = (2, 4, 8, 16, 32, 128)
ITOPK_STEP, ITOPK_MAX = (
    32,
    512,
)  # candidates kept by a GPU's graph search: a multiple of 32, at most 512 (cuVS's source)
SEARCH_WIDTHS = (1, 2, 4, 8)  # of them expanded at a time; what cuVS's own benchmark tries
REFINED_KINDS = ("ivf_pq", "ivf_rabitq", "factory")  # their codes rank candidates too roughly to be taken as they are


@dataclass(frozen=True)
class IndexSpec:
    """An index to build: kind, build parameters, the bytes it should take in memory and why it was chosen.

    `device` is where it is served: on a GPU `gpu_bytes` are those of its loaded index, `predicted_bytes` those of its
    twin on the host. `codes` is how graphs, flat indexes and `ivf_flat` keep vectors. `rerank_store` is where
    candidates' exact distances come from: "rows" (the segment's own memory-mapped rows), a copy inside the index, or
    "none".
    """

    kind: IndexKind
    params: dict[str, int]
    codes: Codes
    predicted_bytes: int
    reason: str
    policy_version: int = POLICY_VERSION
    rerank_store: RerankStore = "none"
    factory: str = ""
    device: ServedOn = "cpu"
    gpu_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is about GPUs only where there is something to say."""
        told = asdict(self)
        return told if self.device == "gpu" else {k: v for k, v in told.items() if k not in ("device", "gpu_bytes")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> IndexSpec:
        return cls(**data)

    @property
    def is_exact(self) -> bool:
        """True where every search visits every point at full precision.

        float16 codes with a rerank store are rounded: rows have more digits, or a GPU rounds the queries to them.
        """
        return self.kind == "flat" and (self.codes == "float32" or self.rerank_store == "none")

    @property
    def tuned_knobs(self) -> tuple[str, ...]:
        """Search parameters that the tuner walks, for all kinds but `factory` (there the index tells)."""
        if self.kind == "flat":
            return ()
        if self.kind == "hnsw":
            return ("ef_search",)
        if self.kind == "cagra":
            return ("itopk_size", "search_width")
        return ("nprobe", "rerank") if self.kind in REFINED_KINDS and self.rerank_store != "none" else ("nprobe",)

    @property
    def rerank(self) -> float:
        """Candidates per hit whose exact distance is computed, where the search does not say."""
        if self.kind == "flat" and not self.is_exact:
            return 2.0
        return 2.0 if "sq8" in (self.codes, self.rerank_store) or self.kind == "ivf_sq8" else 1.0

    @property
    def exhaustive_params(self) -> dict[str, float] | None:
        """Search parameters that visit every point, where the kind has some."""
        return {"nprobe": self.params["nlist"]} if self.kind.startswith("ivf") else None

    @property
    def coarse_graph(self) -> bool:
        """Whether a graph finds the nearest centroids: no GPU has one."""
        return self.device == "cpu" and self.params.get("nlist", 0) >= GRAPH_COARSE_LISTS

    def training_points(self, count: int) -> int:
        """How many of `count` vectors the index trains on: 128 per centroid, as the memory of a build has them.

        A GPU's graph is made of all of them at once.
        """
        if self.kind == "cagra":
            return count
        wanted = 1 if self.codes == "float16" else 0
        if self.kind == "factory":
            wanted = TRAINING_POINTS_FACTORY
        if self.kind.startswith("ivf"):
            wanted = self.params["nlist"] * TRAINING_POINTS_PER_CENTROID
        if self.kind == "ivf_pq":
            wanted = max(wanted, min(TRAINING_POINTS_PQ, 256 << self.params["pq_bits"]))
        if "sq8" in (self.codes, self.rerank_store) or self.kind == "ivf_sq8":
            wanted = max(wanted, TRAINING_POINTS_SQ8)
        return min(count, wanted)

    def factory_string(self, dimension: int) -> str:
        """The string FAISS's `index_factory` builds the index from; Invalid for a kind that only a GPU builds."""
        if self.kind == "cagra":
            raise Invalid.at(
                "index.kind", "cagra is built on a GPU: there is none in this process; ivf_flat needs none"
            )
        base = self.factory or _FACTORIES[self.kind](self, dimension)
        return base + _STORES[self.rerank_store]


_CODES = {"float32": "Flat", "float16": "SQfp16", "sq8": "SQ8"}
_STORES = {"none": "", "rows": "", "sq8": ",Refine(SQ8)", "float16": ",Refine(SQfp16)", "float32": ",RFlat"}


def _flat(spec: IndexSpec, dimension: int) -> str:
    return _CODES[spec.codes]


def _hnsw(spec: IndexSpec, dimension: int) -> str:
    return f"HNSW{spec.params['m']},{_CODES[spec.codes]}"


def _lists(spec: IndexSpec) -> str:
    return f"IVF{spec.params['nlist']}" + ("_HNSW32" if spec.coarse_graph else "")


def _ivf_flat(spec: IndexSpec, dimension: int) -> str:
    return f"{_lists(spec)},{_CODES[spec.codes]}"


def _ivf_sq8(spec: IndexSpec, dimension: int) -> str:
    return f"{_lists(spec)},SQ8"


def _ivf_pq(spec: IndexSpec, dimension: int) -> str:
    """Zeros are appended where the sub-quantizers do not divide the dimension; 4 bits take the fast scan.

    Without `np`, 8 bits train codes for a Hamming filter that is not used: 1.5 s a sub-quantizer.
    """
    m, bits = spec.params["pq_m"], spec.params["pq_bits"]
    padded = m * ceil(dimension / m)
    pad = f"Pad{padded}," if padded != dimension else ""
    return f"{pad}{_lists(spec)},PQ{m}x{bits}" + ("fsr" if bits == 4 else "np")


def _ivf_rabitq(spec: IndexSpec, dimension: int) -> str:
    """A random rotation first: one bit a dimension presumes that dimensions are alike."""
    return f"RR,{_lists(spec)},RaBitQfs"


_FACTORIES = {
    "flat": _flat,
    "hnsw": _hnsw,
    "ivf_flat": _ivf_flat,
    "ivf_sq8": _ivf_sq8,
    "ivf_pq": _ivf_pq,
    "ivf_rabitq": _ivf_rabitq,
}


def nlist(count: int) -> int:
    """Number of inverted lists: the power of two nearest 4 sqrt(n), 16,384 from 1M, 65,536 from 10M, at most n/39."""
    if count < 1_000_000:
        lists = 1 << round(log2(4 * sqrt(max(1, count))))
    else:
        lists = 16_384 if count < 10_000_000 else 65_536
    return clamped_nlist(lists, count)


def clamped_nlist(lists: int, count: int) -> int:
    return max(1, min(lists, count // POINTS_PER_CENTROID_MIN))


def pq_m(dimension: int, floats_each: int) -> int:
    """Sub-quantizers of `floats_each` dimensions; zeros fill the last one."""
    return ceil(dimension / floats_each)


def knob_grid(low: int, high: int) -> tuple[int, ...]:
    """Integers from `low` to `high`, both included, each about `KNOB_STEP` times the one before."""
    values, value = [low], float(low)
    while values[-1] < high:
        value = max(value * KNOB_STEP, values[-1] + 1)
        values.append(min(high, round(value)))
    return tuple(values)


def fewest_training_points(spec: IndexSpec) -> int:
    """Below so many vectors FAISS refuses to train the index."""
    return 1 << spec.params["pq_bits"] if spec.kind == "ivf_pq" else 1


def search_grid(knob: str, count: int, lists: int) -> Sequence[int]:
    """Values of a knob to try, cheapest first, for an index of `count` points with `lists` inverted lists."""
    if knob == "ef_search":
        return knob_grid(10, max(10, min(EF_SEARCH_MAX, count)))
    if knob == "nprobe":
        return knob_grid(1, max(1, lists))
    if knob == "itopk_size":
        return range(ITOPK_STEP, ITOPK_MAX + 1, ITOPK_STEP)
    if knob == "search_width":
        return SEARCH_WIDTHS
    return RERANK_GRID
