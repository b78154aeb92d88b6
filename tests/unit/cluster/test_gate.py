"""What the gate lets through, and what it says of the rest."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from cluster.gate import (
    LATENCY_FACTOR,
    LATENCY_FLOOR_MS,
    GateFacts,
    GateFailed,
    MeasuredLatency,
    MeasuredRecall,
    PointSum,
    gate_report,
    refusals,
)

POINTS = PointSum(1_000, 77)
RECALL = MeasuredRecall("rows with noise", 500, 0.96, 0.1, binding=True)
LATENCY = MeasuredLatency(2.0, 3.0, binding=True)
GOOD = GateFacts(0.95, False, POINTS, POINTS, (RECALL,), LATENCY)


def test_a_sound_generation_passes() -> None:
    assert refusals(GOOD) == []
    report = gate_report(GOOD)
    assert report["passed"] is True
    assert report["recall"][0]["mean"] == 0.96
    assert report["latency"]["bound_ms"] == LATENCY_FACTOR * 2.0 + LATENCY_FLOOR_MS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new": PointSum(999, 77)}, "999 points were built, there are 1000"),
        ({"new": PointSum(1_000, 78)}, "checksum is 000000000000004e, it was 000000000000004d"),
        ({"damaged": ("a/index.faiss: the self-test found 0.1",)}, "self-test: a/index.faiss"),
        (
            {"recalls": (replace(RECALL, mean=0.93),)},
            r"recall@10 of 500 rows with noise is 0.9300 \(0.9196 to 0.9404\)",
        ),
        ({"recalls": (RECALL, replace(RECALL, asked="recent queries", mean=0.5))}, "500 recent queries is 0.5000"),
        ({"latency": MeasuredLatency(2.0, 5.1, binding=True)}, "takes 5.100 ms, it took 2.000 ms"),
    ],
)
def test_what_is_wrong_is_said_with_the_numbers(change: dict[str, Any], words: str) -> None:
    facts = replace(GOOD, **change)
    (message,) = refusals(facts)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(message)
    assert gate_report(facts)["refused"] == [message]
    assert gate_report(facts)["passed"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"recalls": (replace(RECALL, mean=0.945),)},  # the interval reaches 0.955
        {"recalls": (replace(RECALL, mean=0.90, queries=2),)},
        {"recalls": (replace(RECALL, mean=0.5, binding=False),)},
        {"recalls": (replace(RECALL, mean=0.5),), "exact": True},
        {"latency": MeasuredLatency(2.0, 5.0, binding=True)},
        {"latency": MeasuredLatency(0.1, 1.1, binding=True)},  # within the floor
        {"latency": MeasuredLatency(2.0, 50.0, binding=False)},
        {"latency": None, "recalls": ()},
    ],
)
def test_what_refutes_nothing_passes(change: dict[str, Any]) -> None:
    assert refusals(replace(GOOD, **change)) == []


def test_sums_do_not_depend_on_order_and_stay_in_64_bits() -> None:
    parts = [PointSum(1, 2**64 - 1), PointSum(2, 5), PointSum(3, 2**63)]
    assert sum(parts, PointSum()) == sum(reversed(parts), PointSum()) == PointSum(6, 2**63 + 4)


def test_failure_keeps_its_report_between_processes() -> None:
    error = pickle.loads(pickle.dumps(GateFailed("no", {"passed": False})))
    assert (str(error), error.report) == ("no", {"passed": False})
