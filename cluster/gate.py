"""The gate before a new generation: what was measured of it, and whether it may be served. Pure.

A target is refuted where even the upper end of the measured recall's interval is under it; being near to it by chance
refuses nothing. Latency is compared where the same was asked for: another index, target or number of shards may be
slower because somebody wants it so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from cluster.errors import Conflict

GATE_K = 10  # recall@10 is what operating points promise
ONE_SIDED_99 = 2.326  # standard normal quantile: one of a hundred sound generations would be refused
LATENCY_FACTOR = 2.0
LATENCY_FLOOR_MS = 1.0  # of difference: medians of less are noise
SUM_BITS = 64


class GateFailed(Conflict):
    """The new generation may not be served; `report` has what was measured."""

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message, report or {})
        self.report = report or {}


@dataclass(frozen=True)
class PointSum:
    """How many points, and the sum of 64-bit hashes of their ids, vectors and attributes: the same in whatever order
    they are, wherever they lie."""

    count: int = 0
    total: int = 0

    def __add__(self, other: PointSum) -> PointSum:
        return PointSum(self.count + other.count, (self.total + other.total) % 2**SUM_BITS)

    @property
    def checksum(self) -> str:
        return f"{self.total:016x}"


@dataclass(frozen=True)
class MeasuredRecall:
    """Recall@10 over the whole generation: the mean of `queries`, and the standard deviation of one.

    `binding`: whether it decides.
    """

    asked: str
    queries: int
    mean: float
    deviation: float
    binding: bool

    @property
    def interval(self) -> tuple[float, float]:
        """One-sided 99% bounds, lower and upper, of the mean (normal approximation)."""
        half = ONE_SIDED_99 * self.deviation / sqrt(max(1, self.queries))
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class MeasuredLatency:
    """Median milliseconds of one query at the operating point, of the largest shard of each generation."""

    old_ms: float
    new_ms: float
    binding: bool

    @property
    def bound_ms(self) -> float:
        return LATENCY_FACTOR * self.old_ms + LATENCY_FLOOR_MS


@dataclass(frozen=True)
class GateFacts:
    """`old` are the live points that were to be rebuilt, `new` those that were built of them, before what was written
    since. `exact`: every segment searches all of its points. `damaged` are segments that failed their self-test."""

    target_recall: float
    exact: bool
    old: PointSum
    new: PointSum
    recalls: tuple[MeasuredRecall, ...] = ()
    latency: MeasuredLatency | None = None
    damaged: tuple[str, ...] = ()


def refusals(facts: GateFacts) -> list[str]:
    """Why the generation may not be served, in words and numbers; empty where it may."""
    found = [f"self-test: {message}" for message in facts.damaged]
    if facts.old.count != facts.new.count:
        found.append(f"{facts.new.count} points were built, there are {facts.old.count}")
    elif facts.old != facts.new:
        found.append(f"the points' checksum is {facts.new.checksum}, it was {facts.old.checksum}")
    for recall in facts.recalls:
        low, high = recall.interval
        if recall.binding and not facts.exact and high < facts.target_recall:
            found.append(
                f"recall@{GATE_K} of {recall.queries} {recall.asked} is {recall.mean:.4f} ({low:.4f} to {high:.4f}), "
                f"{facts.target_recall:g} is the target: lower it, or choose an index that reaches it"
            )
    latency = facts.latency
    if latency is not None and latency.binding and latency.new_ms > latency.bound_ms:
        found.append(
            f"a query takes {latency.new_ms:.3f} ms, it took {latency.old_ms:.3f} ms: more than {LATENCY_FACTOR:g} "
            f"times as long and {LATENCY_FLOOR_MS:g} ms"
        )
    return found


def gate_report(facts: GateFacts) -> dict[str, Any]:
    """Plain data: what was measured, the bounds, and what follows."""
    latency = facts.latency
    return {
        "passed": not refusals(facts),
        "refused": refusals(facts),
        "target_recall": facts.target_recall,
        "exact": facts.exact,
        "recall": [
            asdict(recall) | {"k": GATE_K, "low": recall.interval[0], "high": recall.interval[1]}
            for recall in facts.recalls
        ],
        "latency": None if latency is None else asdict(latency) | {"bound_ms": latency.bound_ms},
        "points": {
            "old": {"count": facts.old.count, "checksum": facts.old.checksum},
            "new": {"count": facts.new.count, "checksum": facts.new.checksum},
        },
        "self_test": {"failed": list(facts.damaged)},
    }
