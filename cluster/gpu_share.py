"""Which share of a GPU each replica of a generation gets, where its config leaves that open. Pure functions.

A replica has its share from its start to its end, and the share is in its key: a generation with another one is served
by other replicas (docs/decisions/0008-gpu.md). So a share is chosen for what is built, and kept where that is not much
too large: to keep it starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor

from cluster.config import CollectionConfig
from cluster.errors import Invalid
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need
from cluster.index_policy import plan_index
from cluster.index_spec import IndexSpec

SHARES = (0.125, 0.25, 0.5, 1.0)  # presumed: each fills a GPU without a rest; a smaller one is little but its process
GROWTH = 2  # presumed: times its bytes that an index may take until a rebuild chooses again
SHRINK_FROM = 4  # presumed: times the share that would be chosen, from which on a collection gives up the one it has
WORDS = {0.125: "an eighth of a GPU", 0.25: "a quarter of a GPU", 0.5: "half a GPU", 1.0: "a whole GPU"}


@dataclass(frozen=True)
class GpuShare:
    """What each replica asks of a GPU, and why: in words that go after those on the index."""

    num_gpus: float
    reason: str


def in_words(num_gpus: float) -> str:
    return WORDS.get(num_gpus, f"{num_gpus:g} of a GPU")


def choose_share(
    count: int,
    config: CollectionConfig,
    memory_bytes: int | None,
    builds: Callable[[float], bool] = lambda share: True,
    had: float = 0.0,
) -> GpuShare:
    """The share for indexes of `count` points of a shard.

    `memory_bytes` are those of the cluster's smallest GPU; `builds` tells whether a build that asks for such a share
    gets one, too. `had` is the share that the collection's replicas have, 0 where they have none.

    Where the config says a share it is that one. Else the smallest at which the policy chooses the very index that it
    would choose with all of the GPU, with room for `GROWTH` times its bytes. A share that the collection has already is
    kept while that index fits it, and it is less than `SHRINK_FROM` times as large: others would be started beside it
    and load everything, and want a place on a GPU meanwhile. So room to grow is asked of a new share alone; else each
    rebuild of a collection that grows or shrinks a little around a bound would go from one share to the other. Where no
    twin may answer meanwhile it is asked of the old one as well: both generations have to be there at once.
    """
    asked = config.index.num_gpus
    if asked is not None:
        return GpuShare(asked, f"{in_words(asked)} was asked for")
    if memory_bytes is None:
        return GpuShare(1.0, "a whole GPU, since nobody tells how much memory the GPUs have")
    gpu = _Gpu(count, config, memory_bytes, builds)
    fresh = _smallest(gpu)
    if had in (0.0, fresh.num_gpus) or had >= SHRINK_FROM * fresh.num_gpus:
        return fresh
    kept = gpu.best(had)
    if kept is None or kept.device == "cpu" or not gpu.has_the_best(had):
        return fresh
    twin_may_answer = config.index.cpu_twin and config.index.gpu_full == "step_down"
    if not twin_may_answer and not gpu.has_room(kept, had):
        return fresh
    return GpuShare(had, f"it keeps {in_words(had)}, which holds its {kept.gpu_bytes} bytes: its replicas go on")


def share_without_points(config: CollectionConfig) -> float:
    """The share of a new collection: the least where a GPU is asked for, else none."""
    return least_share(config).num_gpus if config.index.device == "gpu" else 0.0


def least_share(config: CollectionConfig, had: float = 0.0) -> GpuShare:
    """The share for an index that is small, or not known."""
    if config.index.num_gpus is not None:
        return GpuShare(config.index.num_gpus, f"{in_words(config.index.num_gpus)} was asked for")
    if 0.0 < had < SHRINK_FROM * SHARES[0]:
        return GpuShare(had, f"it keeps {in_words(had)}: its replicas go on")
    return GpuShare(SHARES[0], f"{in_words(SHARES[0])}, the least")


def _smallest(gpu: _Gpu) -> GpuShare:
    """A whole GPU where none has room to grow, and where no index meets the bounds: then its plan says why."""
    for share in SHARES:
        spec = gpu.best(share)
        if spec is not None and spec.device == "cpu":
            return GpuShare(share, "it takes no GPU")
        if spec is not None and gpu.has_the_best(share) and gpu.has_room(spec, share):
            return GpuShare(share, f"{in_words(share)} holds twice its {spec.gpu_bytes} bytes")
    spec = gpu.best(1.0)
    size = 0 if spec is None else spec.gpu_bytes
    return GpuShare(1.0, f"a whole GPU: not even that holds twice its {size} bytes")


@dataclass(frozen=True)
class _Gpu:
    """The cluster's smallest GPU, and what is to be on it."""

    count: int
    config: CollectionConfig
    memory_bytes: int
    builds: Callable[[float], bool]

    def has_the_best(self, share: float) -> bool:
        best = self.best(share)
        return best is not None and best == self._index(floor(self.memory_bytes * share), share)

    def best(self, share: float) -> IndexSpec | None:
        """The index with all of its memory, where builds ask for that share; None where none meets the bounds."""
        return self._index(self.memory_bytes, share)

    def _index(self, memory_bytes: int, share: float) -> IndexSpec | None:
        facts = GpuFacts(memory_bytes, builds=self.builds(share))
        try:
            return plan_index(self.count, self.config, gpu=facts).spec
        except Invalid:
            return None

    def has_room(self, spec: IndexSpec, share: float) -> bool:
        need = gpu_need(spec, self.count, self.config.dimension)
        grown = replace(need, index=GROWTH * need.index, moved=GROWTH * need.moved)
        return PROCESS_BYTES + grown.load <= floor(self.memory_bytes * share)
