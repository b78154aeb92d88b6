from __future__ import annotations

import pytest

from actors.call_rates import CALLS_MIN, KINDS_MAX, CallRates


def test_too_few_calls_give_no_estimate() -> None:
    rates = CallRates()
    for _ in range(CALLS_MIN - 1):
        rates.measured({"a": 10}, 1.0)
    assert rates.seconds_per_vector("a") is None
    rates.measured({"a": 10}, 1.0)
    assert rates.seconds_per_vector("a") == pytest.approx(0.1)
    assert rates.seconds_per_vector("b") is None


def test_large_calls_count_more_than_small_ones() -> None:
    """A call of one vector takes mostly what every call takes."""
    rates = CallRates()
    for _ in range(20):
        rates.measured({"a": 1}, 0.001)
    rates.measured({"a": 200}, 0.020)
    estimate = rates.seconds_per_vector("a")
    assert estimate is not None
    assert estimate < 0.000_15


def test_one_slow_call_says_little_but_several_are_believed() -> None:
    rates = CallRates()
    for _ in range(20):
        rates.measured({"a": 1}, 0.001)
    rates.measured({"a": 1}, 5.0)
    assert (rates.seconds_per_vector("a") or 1.0) < 0.003
    for _ in range(12):
        rates.measured({"a": 1}, 5.0)
    assert (rates.seconds_per_vector("a") or 0.0) > 2.0


def test_slow_calls_are_forgotten_after_some_fast_ones() -> None:
    rates = CallRates()
    for _ in range(20):
        rates.measured({"a": 1}, 5.0)
    for _ in range(40):
        rates.measured({"a": 1}, 0.001)
    assert rates.seconds_per_vector("a") == pytest.approx(0.001, rel=1.0)


def test_kinds_of_one_call_share_its_time_as_predicted() -> None:
    rates = CallRates()
    for _ in range(CALLS_MIN):
        rates.measured({"cheap": 10}, 0.010)
        rates.measured({"dear": 10}, 0.090)
    for _ in range(30):
        rates.measured({"cheap": 10, "dear": 10}, 0.200)
    assert rates.seconds_per_vector("cheap") == pytest.approx(0.002, rel=0.01)
    assert rates.seconds_per_vector("dear") == pytest.approx(0.018, rel=0.01)


def test_kind_that_was_never_measured_counts_as_the_call_does() -> None:
    rates = CallRates()
    for _ in range(CALLS_MIN):
        rates.measured({"a": 30, "b": 10}, 0.4)
    assert rates.seconds_per_vector("a") == pytest.approx(0.01)
    assert rates.seconds_per_vector("b") == pytest.approx(0.01)


def test_kinds_that_were_measured_longest_ago_are_forgotten() -> None:
    rates = CallRates()
    for kind in range(KINDS_MAX + 1):
        for _ in range(CALLS_MIN):
            rates.measured({kind: 1}, 1.0)
            rates.measured({0: 1}, 1.0)
    assert rates.seconds_per_vector(1) is None
    assert rates.seconds_per_vector(0) == pytest.approx(1.0)
    assert rates.seconds_per_vector(KINDS_MAX) == pytest.approx(1.0)


def test_call_that_took_no_time_gives_an_estimate_of_none() -> None:
    rates = CallRates()
    for _ in range(CALLS_MIN):
        rates.measured({"a": 3}, 0.0)
    assert rates.seconds_per_vector("a") == 0.0
    rates.measured({"a": 3}, 3.0)
    assert (rates.seconds_per_vector("a") or 0.0) > 0.1
