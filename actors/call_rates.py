"""What a shard's calls cost: predicted seconds per vector, by kind of search, from the last ones that were measured."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

DECAY = 0.8  # of what earlier calls count with each new one: five calls make a new estimate
JUMP_MAX = 10.0  # times its prediction a call counts at most: one pause of a process says little of the next call
CALLS_MIN = 4  # an estimate from fewer is none: the first call after a start may wait for pages of the index
KINDS_MAX = 64  # beyond that the kind that was measured longest ago is forgotten


@dataclass(slots=True)
class _Totals:
    """Seconds and vectors, each decayed alike: their ratio is led by the large calls, which tell more."""

    seconds: float = 0.0
    vectors: float = 0.0
    calls: int = 0


class CallRates:
    """Estimates of one shard. With several replicas they are of all together: what the shard gets done."""

    def __init__(self) -> None:
        self._totals: dict[Hashable, _Totals] = {}

    def seconds_per_vector(self, kind: Hashable) -> float | None:
        """None while too few calls were measured."""
        totals = self._totals.get(kind)
        return totals.seconds / totals.vectors if totals is not None and totals.calls >= CALLS_MIN else None

    def measured(self, vectors: Mapping[Hashable, int], seconds: float) -> None:
        """A call took `seconds` for so many vectors of each kind. Kinds share them as they were predicted to."""
        mean = seconds / max(1, sum(vectors.values()))
        known = {kind: self.seconds_per_vector(kind) for kind in vectors}
        shares = {kind: count * (known[kind] or mean) for kind, count in vectors.items()}
        scale = seconds / (sum(shares.values()) or 1.0)
        for kind, count in vectors.items():
            totals = self._totals.pop(kind, None) or _Totals()
            believed = min(scale, JUMP_MAX) if known[kind] else scale
            totals.seconds = DECAY * totals.seconds + shares[kind] * believed
            totals.vectors = DECAY * totals.vectors + count
            totals.calls += 1
            self._totals[kind] = totals  # at the end: the first one is the one measured longest ago
        while len(self._totals) > KINDS_MAX:
            del self._totals[next(iter(self._totals))]
