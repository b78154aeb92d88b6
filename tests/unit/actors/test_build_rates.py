"""How fast a machine builds: what is made of the seconds that a clock tells."""

from __future__ import annotations

from itertools import pairwise
from math import log2

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.build_rates import CENTROIDS, PRODUCT_POINTS, SAMPLE_MIN, SAMPLE_POINTS, measure_rates
from cluster.config import Metric
from cluster.index_costs import REFERENCE, Rates, build_seconds
from cluster.index_spec import IndexSpec

DIMENSION = 4
SEED = 20261130


class FakeClock:
    """Tells these times, one a call, and fails when asked once more."""

    def __init__(self, *times_s: float) -> None:
        self.left = list(times_s)

    def __call__(self) -> float:
        return self.left.pop(0)


def sample(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).normal(size=(count, DIMENSION)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_rates_are_the_work_over_the_seconds(metric: Metric) -> None:
    count, clock = SAMPLE_MIN, FakeClock(100.0, 103.0, 200.0, 200.5)
    rates = measure_rates(sample(count), metric, threads=3, clock=clock)
    assert clock.left == []
    assert rates.threads == 3
    assert rates.graph_points == count
    assert rates.graph_ns == pytest.approx(3.0e9 / (count * log2(count)))
    assert rates.flops == pytest.approx(2 * count * CENTROIDS * DIMENSION / 0.5)
    assert rates.measured


def test_rates_predict_the_graph_that_was_measured() -> None:
    rates = measure_rates(sample(SAMPLE_MIN), "l2", threads=1, clock=FakeClock(0.0, 2.5, 5.0, 6.0))
    spec = IndexSpec("hnsw", {"m": 32, "ef_construction": 100}, "float16", 0, "")
    assert build_seconds(spec, SAMPLE_MIN, DIMENSION, rates) == pytest.approx(2.5)


@pytest.mark.parametrize("count", [0, 1, SAMPLE_MIN - 1])
def test_rates_of_too_few_rows_are_those_of_the_reference_machine(count: int) -> None:
    rates = measure_rates(sample(count), "l2", threads=7, clock=FakeClock())
    assert rates is REFERENCE
    assert not rates.measured


def test_rates_of_many_rows_count_only_those_that_were_used() -> None:
    rates = measure_rates(sample(SAMPLE_POINTS + 500), "l2", threads=1, clock=FakeClock(0.0, 1.0, 1.0, 2.0))
    assert rates.graph_points == SAMPLE_POINTS
    assert rates.graph_ns == pytest.approx(1e9 / (SAMPLE_POINTS * log2(SAMPLE_POINTS)))
    assert rates.flops == pytest.approx(2 * PRODUCT_POINTS * CENTROIDS * DIMENSION)


def test_rates_of_a_product_too_quick_for_the_clock_are_finite() -> None:
    rates = measure_rates(sample(SAMPLE_MIN), "l2", threads=1, clock=FakeClock(0.0, 1.0, 2.0, 2.0))
    assert 0.0 < rates.flops < float("inf")


def test_rates_by_the_machines_own_clock_are_positive() -> None:
    rates = measure_rates(sample(SAMPLE_MIN), "l2", threads=1)
    assert isinstance(rates, Rates)
    assert rates.graph_ns > 0
    assert rates.flops > 0
    assert rates.measured


def test_more_seconds_are_slower_rates() -> None:
    rates = [
        measure_rates(sample(SAMPLE_MIN), "l2", threads=1, clock=FakeClock(0.0, s, s, 2 * s)) for s in (0.5, 1.0, 4.0)
    ]
    for quick, slow in pairwise(rates):
        assert quick.graph_ns < slow.graph_ns
        assert quick.flops > slow.flops
