"""The adaptive policy: which index fits a segment. A pure, versioned function of plain data.

Numbers come from docs/decisions/0002-index-policy.md: measured on faiss-cpu 1.15.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, log2, sqrt
from typing import Any, Literal

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid

POLICY_VERSION = 1
IndexKind = Literal["flat", "ivf_flat", "hnsw"]

FLAT_FLOATS_MAX = 6_000_000  # count x dimension that one core scans in about 1 ms
POINTS_PER_CENTROID_MIN = 39  # below it FAISS warns that k-means is starved
TRAINING_POINTS_PER_CENTROID = 128  # recall grows up to here: .942 at 10, .958 at 39, .972 at 128 and at 190
HNSW_EF_CONSTRUCTION = 100
MEMORY_MARGIN = 1.15  # of the predicted bytes, for what the prediction leaves out

EF_SEARCH_GRID = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
NPROBE_GRID = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class IndexSpec:
    """An index to build: its kind, its build parameters, the bytes it should take and why it was chosen."""

    kind: IndexKind
    params: dict[str, int]
    codes: Literal["float32", "float16"]
    predicted_bytes: int
    reason: str
    policy_version: int = POLICY_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> IndexSpec:
        return cls(**data)

    @property
    def search_param(self) -> str | None:
        """The name of the one knob that trades recall for speed; None where the search is exact."""
        return {"flat": None, "ivf_flat": "nprobe", "hnsw": "ef_search"}[self.kind]

    @property
    def exhaustive_params(self) -> dict[str, int] | None:
        """Search parameters that visit every point, where the kind has some."""
        return {"nprobe": self.params["nlist"]} if self.kind == "ivf_flat" else None

    def search_grid(self) -> tuple[int, ...]:
        """Values of `search_param` to try, cheapest first."""
        if self.kind == "hnsw":
            return EF_SEARCH_GRID
        if self.kind == "ivf_flat":
            nlist = self.params["nlist"]
            return (*(value for value in NPROBE_GRID if value < nlist), nlist)
        return ()


def choose(count: int, config: CollectionConfig) -> IndexSpec:
    """The index for `count` points. Raises Invalid, with the numbers, when nothing fits the memory bound."""
    index = config.index
    if index.device == "gpu":
        raise Invalid.at("index.device", "this version has no GPU index kinds; use cpu")
    if index.kind != "auto":
        spec = _SPECS[index.kind](count, config, f"{index.kind} was asked for")
        _refuse_over_memory([spec], index)
        return spec
    candidates = _candidates(count, config)
    fitting = [spec for spec in candidates if _fits(spec, index)]
    if not fitting:
        _refuse_over_memory(candidates, index)
    return fitting[0]


def _candidates(count: int, config: CollectionConfig) -> list[IndexSpec]:
    """Specs in order of preference."""
    floats = count * config.dimension
    if config.index.target_recall >= 1.0:
        return [_flat(count, config, "target recall 1.0 asks for exact search")]
    if floats <= FLAT_FLOATS_MAX:
        why = f"{count} x {config.dimension} = {floats} floats are scanned exactly in about a millisecond"
        return [_flat(count, config, why)]
    return [
        _hnsw(count, config, f"{count} points: a graph is fastest and fits the memory"),
        _ivf_flat(count, config, f"{count} points: a graph would not fit the memory, inverted lists do"),
    ]


def _fits(spec: IndexSpec, index: IndexConfig) -> bool:
    return index.memory_bytes is None or spec.predicted_bytes * MEMORY_MARGIN <= index.memory_bytes


def _refuse_over_memory(specs: list[IndexSpec], index: IndexConfig) -> None:
    if any(_fits(spec, index) for spec in specs):
        return
    needs = ", ".join(f"{spec.kind} {ceil(spec.predicted_bytes * MEMORY_MARGIN)}" for spec in specs)
    raise Invalid.at(
        "index.memory_bytes",
        f"{index.memory_bytes} bytes for one shard's index are too few; needed are: {needs}. "
        "Raise it, use more shards, or store float16",
    )


def _code_bytes(config: CollectionConfig) -> int:
    return config.dimension * (4 if config.vector_dtype == "float32" else 2)


def _flat(count: int, config: CollectionConfig, reason: str) -> IndexSpec:
    return IndexSpec("flat", {}, "float32", count * config.dimension * 4, reason)


def _hnsw(count: int, config: CollectionConfig, reason: str) -> IndexSpec:
    m = 16 if count < 1_000_000 else 32
    links = 8 * m + 16  # 2M neighbours of 4 bytes on the ground level, upper levels, offsets: measured
    params = {"m": m, "ef_construction": HNSW_EF_CONSTRUCTION}
    return IndexSpec("hnsw", params, config.vector_dtype, count * (_code_bytes(config) + links), reason)


def _ivf_flat(count: int, config: CollectionConfig, reason: str) -> IndexSpec:
    lists = nlist(count)
    stored = count * (_code_bytes(config) + 8) + lists * config.dimension * 4
    return IndexSpec("ivf_flat", {"nlist": lists}, config.vector_dtype, stored, reason)


_SPECS: dict[str, Callable[[int, CollectionConfig, str], IndexSpec]] = {
    "flat": _flat,
    "hnsw": _hnsw,
    "ivf_flat": _ivf_flat,
}


def nlist(count: int) -> int:
    """Number of inverted lists: the power of two nearest 4 sqrt(n), 16,384 from 1M, 65,536 from 10M, at most n/39."""
    if count < 1_000_000:
        lists = 1 << round(log2(4 * sqrt(max(1, count))))
    else:
        lists = 16_384 if count < 10_000_000 else 65_536
    return max(1, min(lists, count // POINTS_PER_CENTROID_MIN))
