from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.tuner import held_out_count, recall_lower_bound, tune, tuning_queries
from cluster.index_spec import EF_SEARCH_GRID, IndexSpec

HNSW = IndexSpec("hnsw", {"m": 16, "ef_construction": 100}, "float32", 0, "")
IVF = IndexSpec("ivf_flat", {"nlist": 6}, "float32", 0, "")
FLAT = IndexSpec("flat", {}, "float32", 0, "")
QUERIES = np.zeros((100, 2), np.float32)
TRUTH = np.tile(np.arange(10), (100, 1))


class LadderIndex:
    """An index that finds `found_at[value]` of the 10 true rows, per query, at that value of its one knob."""

    def __init__(self, found_at: Callable[[int], NDArray[np.int64]]) -> None:
        self._found_at = found_at
        self.walked: list[int] = []

    def search(self, queries: Any, k: int, params: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        (value,) = params.values() or (0,)
        if len(queries) > 1:
            self.walked.append(value)
        found = self._found_at(value)[: len(queries)]
        rows = np.where(np.arange(k) < found[:, None], np.arange(k), 1_000)
        return rows, np.zeros(rows.shape, np.float32)


def everywhere(found: int) -> NDArray[np.int64]:
    return np.full(100, found)


def some(short: int) -> NDArray[np.int64]:
    """All 10 for most of the 100 queries, 9 for `short` of them."""
    return np.where(np.arange(100) < short, 9, 10)


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that moves by `step_s` each time it is read."""
    ticks = count()
    return lambda: next(ticks) * step_s


@pytest.mark.parametrize(
    ("recalls", "expected"),
    [
        # mean .85, sample variance (.15^2 + .05^2 + .05^2 + .15^2) / 3 = .016667: .85 - 1.645 * .129099 / 2
        ([1.0, 0.8, 0.9, 0.7], 0.743816),
        # mean .5, sample variance .5: .5 - 1.645 * .707107 / 1.414214
        ([0.0, 1.0], -0.3225),
        ([0.9, 0.9, 0.9], 0.9),
        ([1.0], 1.0),
        ([0.4], 0.4),
    ],
)
def test_recall_lower_bound_equals_the_hand_computed_value(recalls: list[float], expected: float) -> None:
    assert recall_lower_bound(np.array(recalls)) == pytest.approx(expected, abs=1e-6)


def test_tune_picks_the_cheapest_value_that_is_proven_for_each_target() -> None:
    # At 24 the mean reaches .95, but its lower bound is .95 - 1.645 * .0503 / 10 = .9417: not proven.
    index = LadderIndex(lambda ef: {16: everywhere(9), 24: some(50), 32: some(3)}[ef])
    points = tune(index, HNSW, QUERIES, TRUTH, 0.95, ticking(0.001))  # type: ignore[arg-type]
    assert [(p.target_recall, p.params["ef_search"], p.met) for p in points] == [
        (0.95, 32, True),
        (0.90, 16, True),
        (0.99, 32, True),
    ]
    assert points[0].recall == pytest.approx(0.997)
    assert points[0].recall_low == pytest.approx(0.997 - 1.645 * np.sqrt(0.000291 * 100 / 99) / 10)
    assert points[0].latency_ms == pytest.approx(1.0)


def test_tune_stops_walking_at_the_first_value_that_proves_every_target() -> None:
    index = LadderIndex(lambda ef: everywhere(9) if ef < 48 else everywhere(10))
    tune(index, HNSW, QUERIES, TRUTH, 0.97, ticking(0.001))  # type: ignore[arg-type]
    assert index.walked == [16, 24, 32, 48]


def test_tune_takes_perfect_recall_as_met_for_a_target_of_one() -> None:
    index = LadderIndex(lambda ef: everywhere(10) if ef >= 24 else some(1))
    points = tune(index, HNSW, QUERIES, TRUTH, 1.0, ticking(0.001))  # type: ignore[arg-type]
    assert [p.target_recall for p in points] == [1.0, 0.90, 0.95, 0.99]
    assert (points[0].params, points[0].met) == ({"ef_search": 24}, True)
    assert points[3].params == {"ef_search": 16}


def test_tune_of_an_unreachable_target_gives_the_best_point_not_met() -> None:
    index = LadderIndex(lambda ef: everywhere(6) if ef == 64 else everywhere(5))
    points = tune(index, HNSW, QUERIES, TRUTH, 0.95, ticking(0.001))  # type: ignore[arg-type]
    assert index.walked == list(EF_SEARCH_GRID)
    for point in points:
        assert (point.params, point.met, point.recall) == ({"ef_search": 64}, False, 0.6)


def test_tune_walks_the_lists_of_an_ivf_index_up_to_all_of_them() -> None:
    index = LadderIndex(lambda nprobe: everywhere(10) if nprobe == 6 else everywhere(8))
    points = tune(index, IVF, QUERIES, TRUTH, 0.95, ticking(0.001))  # type: ignore[arg-type]
    assert index.walked == [1, 2, 4, 6]
    assert points[0].params == {"nprobe": 6}


def test_tune_of_a_flat_index_is_exact_for_every_target() -> None:
    index = LadderIndex(lambda _: everywhere(10))
    points = tune(index, FLAT, QUERIES, np.empty((0, 10), np.int64), 0.97, ticking(0.002))  # type: ignore[arg-type]
    assert [p.target_recall for p in points] == [0.97, 0.90, 0.95, 0.99]
    for point in points:
        assert (point.params, point.recall, point.recall_low, point.met) == ({}, 1.0, 1.0, True)
        assert point.latency_ms == pytest.approx(2.0)


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (9, 0), (10, 1), (5_000, 500), (10_000, 1_000), (10**7, 1_000)])
def test_held_out_count_is_a_tenth_up_to_a_thousand(rows: int, held_out: int) -> None:
    assert held_out_count(rows) == held_out


def test_tuning_queries_are_a_third_rows_and_two_thirds_midpoints() -> None:
    held_out = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    held_out.flags.writeable = False
    queries = tuning_queries(held_out, "l2")
    assert queries.dtype == np.float32
    np.testing.assert_array_equal(queries[:3], held_out[:3])
    before = [8, 3, 4, 5, 6, 7]  # the neighbour of each of the rest, the first one's is the last
    np.testing.assert_allclose(queries[3:], (held_out[3:] + held_out[before]) / 2, rtol=1e-6)


def test_tuning_queries_are_unit_vectors_under_cosine_even_of_opposite_rows() -> None:
    held_out = np.array([[1, 0], [0, 1], [1, 0], [-1, 0], [0.6, 0.8]], np.float32)
    queries = tuning_queries(held_out, "cosine")
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(queries[3], held_out[3])  # its midpoint with row 2 has no direction


def test_tuning_queries_of_one_row_are_that_row() -> None:
    row = np.array([[0.6, 0.8]], np.float32)
    np.testing.assert_array_equal(tuning_queries(row, "cosine"), row)
