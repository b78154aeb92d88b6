from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.tuner import (
    ASKED_FIRST,
    HELD_OUT_MAX,
    THROUGHPUT_BATCH,
    Knobs,
    TuningSet,
    held_out_count,
    recall_interval,
    tune,
    tune_near_and_far,
    tune_with_twin,
    tuning_queries,
)
from cluster.index_spec import RERANK_GRID, search_grid
from cluster.segment import OperatingPoint

QUERIES = np.stack([np.arange(100), np.zeros(100)], axis=1).astype(np.float32)  # each has its number
GRAPH = Knobs(("ef_search",), 10_000, 0)
LISTS = Knobs(("nprobe",), 10_000, 64)
REFINED = Knobs(("nprobe", "rerank"), 10_000, 64)
EF_GRID = search_grid("ef_search", 10_000, 0)
NPROBE_GRID = search_grid("nprobe", 10_000, 64)
Found = NDArray[np.int64]


class ManualClock:
    """Moves as the searcher says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class KnownSearcher:
    """Finds `found(params)` of the 10 true rows, for each of 100 queries; one query takes `cost_s(params)`."""

    def __init__(self, found: Callable[[Any], Found], cost_s: Callable[[Any], float] = lambda params: 1e-3) -> None:
        self._found = found
        self._cost_s = cost_s
        self.clock = ManualClock()
        self.calls: list[tuple[int, dict[str, float]]] = []

    @property
    def walked(self) -> list[dict[str, float]]:
        """The parameters, in the order in which they were first tried."""
        return [dict(values) for values in dict.fromkeys(tuple(params.items()) for _, params in self.calls)]

    def search(
        self, queries: Any, width: int, params: dict[str, float]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self.calls.append((len(queries), dict(params)))
        self.clock.now += self._cost_s(params) * len(queries)
        rows = np.where(np.arange(width) < self.found(queries, params)[:, None], np.arange(width), 1_000)
        return rows, np.zeros(rows.shape, np.float32)

    def found(self, queries: Any, params: dict[str, float]) -> Found:
        return self._found(params)[queries[:, 0].astype(int)]


def points_of(searcher: KnownSearcher, knobs: Knobs, target: float) -> tuple[OperatingPoint, ...]:
    return tune(searcher, knobs, asked_for(QUERIES), target, searcher.clock)


def asked_for(queries: Any, scores: Any = None) -> TuningSet:
    """Queries whose true rows are 0 to 9; without scores all are equally far from these."""
    truth = np.tile(np.arange(10), (len(queries), 1))
    return TuningSet(queries, truth, np.zeros(truth.shape, np.float32) if scores is None else scores)


def everywhere(found: int) -> Found:
    return np.full(100, found)


def some(short: int) -> Found:
    """All 10 for most of the 100 queries, 9 for `short` of them, which are spread over tuning and validation."""
    rank = np.random.default_rng(1).permutation(100)
    return np.where(rank < short, 9, 10)


@pytest.mark.parametrize(
    ("recalls", "expected"),
    [
        # mean .85, sample variance (.15^2 + .05^2 + .05^2 + .15^2) / 3 = .016667: .85 -+ 1.645 * .129099 / 2
        ([1.0, 0.8, 0.9, 0.7], (0.743816, 0.956184)),
        # mean .5, sample variance .5: .5 -+ 1.645 * .707107 / 1.414214
        ([0.0, 1.0], (-0.3225, 1.3225)),
        ([0.9, 0.9, 0.9], (0.9, 0.9)),
        ([1.0], (1.0, 1.0)),
        ([0.4], (0.4, 0.4)),
    ],
)
def test_recall_interval_equals_the_hand_computed_values(recalls: list[float], expected: tuple[float, float]) -> None:
    assert recall_interval(np.array(recalls)) == pytest.approx(expected, abs=1e-6)


def test_tune_finds_the_least_value_that_is_proven_for_each_target() -> None:
    def found(params: Any) -> Found:
        """At 22 the mean reaches .95, but its lower bound is .95 - 1.645 * .05 / sqrt(70) = .94: not proven."""
        ef = params["ef_search"]
        return everywhere(8) if ef < 16 else some(70) if ef < 22 else some(50) if ef < 100 else some(3)

    points = points_of(KnownSearcher(found), GRAPH, 0.95)
    least = {limit: min(ef for ef in EF_GRID if ef >= limit) for limit in (16, 100)}
    assert [(p.target_recall, p.params["ef_search"], p.met) for p in points] == [
        (0.95, least[100], True),
        (0.90, least[16], True),
        (0.99, least[100], True),
    ]
    assert points[0].recall == pytest.approx(0.997)
    assert points[0].recall_low == pytest.approx(0.997 - 1.645 * np.sqrt(0.000291 * 100 / 99) / 10)
    assert points[0].latency_ms == pytest.approx(1.0)
    assert points[0].queries_per_s == pytest.approx(1_000.0)


@pytest.mark.parametrize("needed", [EF_GRID[0], EF_GRID[1], EF_GRID[7], EF_GRID[20], EF_GRID[-2], EF_GRID[-1]])
def test_tune_finds_the_least_value_wherever_it_is_on_the_grid(needed: int) -> None:
    searcher = KnownSearcher(lambda params: everywhere(10 if params["ef_search"] >= needed else 5))
    points = points_of(searcher, GRAPH, 0.95)
    assert [(p.params, p.met) for p in points] == [({"ef_search": needed}, True)] * 3


def test_tune_gallops_and_bisects_instead_of_walking_every_value() -> None:
    searcher = KnownSearcher(lambda params: everywhere(10 if params["ef_search"] >= 500 else 5))
    points_of(searcher, GRAPH, 0.95)
    walked = [params["ef_search"] for params in searcher.walked]
    assert len(walked) <= 2 * np.log2(len(EF_GRID)) + 2 < len(EF_GRID) / 2
    assert walked[:3] == [EF_GRID[0], EF_GRID[1], EF_GRID[3]]


def test_tune_takes_perfect_recall_as_met_for_a_target_of_one() -> None:
    searcher = KnownSearcher(lambda params: everywhere(10) if params["ef_search"] >= 24 else some(1))
    points = points_of(searcher, GRAPH, 1.0)
    assert [p.target_recall for p in points] == [1.0, 0.90, 0.95, 0.99]
    assert points[0].params == {"ef_search": min(ef for ef in EF_GRID if ef >= 24)}
    assert points[0].met
    assert points[3].params == {"ef_search": EF_GRID[0]}


def test_tune_of_an_unreachable_target_gives_the_best_point_not_met() -> None:
    searcher = KnownSearcher(lambda params: everywhere(6) if params["ef_search"] == EF_GRID[-1] else everywhere(5))
    for point in points_of(searcher, GRAPH, 0.95):
        assert (point.params, point.met, point.recall) == ({"ef_search": EF_GRID[-1]}, False, 0.6)


def test_tune_meets_the_targets_that_can_be_reached_below_one_that_cannot() -> None:
    points = points_of(
        KnownSearcher(lambda params: some(70) if params["ef_search"] >= 50 else everywhere(5)), GRAPH, 0.95
    )
    assert [(p.target_recall, p.met) for p in points] == [(0.95, False), (0.90, True), (0.99, False)]


def test_tune_goes_on_where_the_validating_queries_refute_what_the_others_prove() -> None:
    def found(params: Any) -> Found:
        """From 10 on the 70 queries to tune with are all right; the 30 that validate only from 200 on."""
        return np.where((np.arange(100) < 70) | (params["ef_search"] >= 200), 10, 5)

    point = points_of(KnownSearcher(found), GRAPH, 0.95)[0]
    assert point.met
    assert point.params == {"ef_search": min(ef for ef in EF_GRID if ef >= 200)}
    refuted = points_of(KnownSearcher(lambda params: np.where(np.arange(100) < 70, 10, 5)), GRAPH, 0.95)[0]
    assert not refuted.met


class DistanceSearcher(KnownSearcher):
    """A query's first number says which `ef_search` finds all 10 true rows; less finds 5. Far ones get their own."""

    def __init__(self) -> None:
        super().__init__(lambda params: everywhere(10))

    def found(self, queries: Any, params: dict[str, float]) -> Found:
        effort = np.full(len(queries), params["ef_search"])
        if "far_score" in params:
            effort[queries[:, 1] > params["far_score"]] = params["far_ef_search"]
        return np.where(effort >= queries[:, 0], 10, 5)


def at_distances(needed: Any, distances: Any) -> TuningSet:
    queries = np.stack([needed, distances], axis=1).astype(np.float32)
    return asked_for(queries, np.tile(queries[:, 1:], (1, 10)))


def test_tune_near_and_far_proves_each_effort_with_the_queries_it_is_for() -> None:
    """Rows need 12 up to half of them, 20 from there on, the last five of a hundred 300; what is far needs 90."""
    distances = np.arange(100.0)
    rows = at_distances(np.where(distances < 50, 12, np.where(distances < 95, 20, 300)), distances)
    far = at_distances(np.full(60, 90), np.full(60, 500.0))
    point = tune_near_and_far(DistanceSearcher(), GRAPH, rows, far, "l2", 0.95, ManualClock())[0]
    least = {limit: min(ef for ef in EF_GRID if ef >= limit) for limit in (20, 90)}
    assert point.params["ef_search"] == least[20]
    assert point.params["far_ef_search"] == least[90]
    assert 94.0 <= point.params["far_score"] < 95.0
    assert point.met
    assert point.recall == pytest.approx(0.95 + 0.05 * 0.5)  # of all rows, of which the last ones need still more


def test_tune_near_and_far_takes_one_effort_where_far_queries_need_no_more() -> None:
    rows = at_distances(np.full(100, 50), np.arange(100.0))
    far = at_distances(np.full(60, 11), np.full(60, 500.0))
    point = tune_near_and_far(DistanceSearcher(), GRAPH, rows, far, "l2", 0.95, ManualClock())[0]
    assert point.params == {"ef_search": min(ef for ef in EF_GRID if ef >= 50)}


def test_tune_near_and_far_is_not_met_where_far_queries_cannot_be_answered() -> None:
    rows = at_distances(np.full(100, 50), np.arange(100.0))
    far = at_distances(np.full(60, 1e9), np.full(60, 500.0))
    assert not tune_near_and_far(DistanceSearcher(), GRAPH, rows, far, "l2", 0.95, ManualClock())[0].met


def test_tune_walks_the_lists_of_an_index_up_to_all_of_them() -> None:
    searcher = KnownSearcher(lambda params: everywhere(10 if params["nprobe"] == 64 else 8))
    assert points_of(searcher, LISTS, 0.95)[0].params == {"nprobe": 64}


def lists_needed(rerank: float) -> int:
    """How many lists must be visited with so many candidates for each hit: few need many candidates."""
    wanted = {2: 1_000, 4: 30, 8: 20}.get(int(rerank), 16)
    return min((value for value in NPROBE_GRID if value >= wanted), default=wanted)


def reaching(params: Any) -> Found:
    return everywhere(10 if params["nprobe"] >= lists_needed(params["rerank"]) else 5)


@pytest.mark.parametrize("seconds_per_candidate", [1e-9, 1e-4, 1.0])
def test_tune_of_two_knobs_takes_the_fastest_pair_that_reaches_the_target(seconds_per_candidate: float) -> None:
    """Which pair is cheaper is the clock's to say."""

    def cost_s(params: Any) -> float:
        return float(params["nprobe"] * 1e-3 + params["rerank"] * seconds_per_candidate)

    point = points_of(KnownSearcher(reaching, cost_s), REFINED, 0.95)[0]
    pairs = [{"nprobe": lists_needed(rerank), "rerank": rerank} for rerank in RERANK_GRID]
    assert point.met
    assert cost_s(point.params) == min(cost_s(pair) for pair in pairs if pair["nprobe"] <= 64)
    assert reaching(point.params).min() == 10


def test_tune_of_two_knobs_that_reach_nothing_gives_the_best_pair_not_met() -> None:
    def found(params: Any) -> Found:
        return everywhere(7 if params == {"nprobe": 64, "rerank": RERANK_GRID[-1]} else 6)

    point = points_of(KnownSearcher(found), REFINED, 0.95)[0]
    assert (point.params, point.met) == ({"nprobe": 64, "rerank": RERANK_GRID[-1]}, False)
    assert point.recall == pytest.approx(0.7)


class CountingSearcher(KnownSearcher):
    """Counts how often each query is asked with each parameters, but for what is timed: one query, or the first 256."""

    def __init__(self, found: Callable[[Any], Found], cost_s: Callable[[Any], float] = lambda params: 1e-3) -> None:
        super().__init__(found, cost_s)
        self.asked: dict[tuple[tuple[str, float], ...], NDArray[np.int64]] = {}

    def found(self, queries: Any, params: dict[str, float]) -> Found:
        numbers = queries[:, 0].astype(int)
        if len(numbers) > 1 and not np.array_equal(numbers, np.arange(THROUGHPUT_BATCH)):
            counts = self.asked.setdefault(tuple(params.items()), np.zeros(1_000, np.int64))
            counts[numbers] += 1
        return super().found(queries, params)


def numbered(count: int) -> Any:
    return np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.float32)


def test_tune_asks_every_pair_each_query_once_whatever_the_targets_ask_again() -> None:
    searcher = CountingSearcher(lambda params: np.tile(reaching(params), 10))
    points = tune(searcher, REFINED, asked_for(numbered(600)), 0.95, searcher.clock)
    assert len(searcher.asked) > 3
    assert max(counts.max() for counts in searcher.asked.values()) == 1
    for point in points:  # what is told of them was measured with all
        assert searcher.asked[tuple(point.params.items())].sum() == 600


def test_parameters_that_miss_the_target_are_asked_few_queries() -> None:
    """A quarter of the queries finds 5 of 10 below 500: the mean is .875."""
    short = np.arange(1_000) % 4 == 0
    searcher = CountingSearcher(lambda params: np.where(short & (params["ef_search"] < 500), 5, 10))
    points = tune(searcher, GRAPH, asked_for(numbered(1_000)), 0.95, searcher.clock)
    least = min(ef for ef in EF_GRID if ef >= 500)
    assert [(point.params, point.met, point.recall) for point in points] == [({"ef_search": least}, True, 1.0)] * 3
    missing = [counts.sum() for ((_, ef),), counts in searcher.asked.items() if ef < 500]
    assert len(missing) > 5
    assert np.median(missing) <= 8 * ASKED_FIRST


def in_lists(count: int, seed: int = 5) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each query's ten true rows, (count, 10): in which list of the 64 they are, nearest first, and how many rows
    of all lists up to one more come before them by their codes."""
    random = np.random.default_rng(seed)
    lists = np.minimum(63, (random.exponential(8.0, (count, 1)) * random.exponential(1.0, (count, 10))).astype(int))
    return lists, random.poisson(random.exponential(0.8, (count, 10)))


def coded(count: int) -> Callable[[Any], Found]:
    """What an index of lists of codes finds of them: who is in a list that is visited, and among the candidates."""
    lists, before = in_lists(count)

    def found(params: Any) -> Found:
        nearer = before * np.log2(1 + params["nprobe"])
        return ((lists < params["nprobe"]) & (nearer < 10 * params["rerank"] / 2)).sum(axis=1)

    return found


def least_of(found: Callable[[Any], Found], target: float, count: int) -> set[tuple[float, float]]:
    """For each number of candidates the fewest lists that are proven to reach a target, by all queries of all pairs."""
    reached = set()
    for rerank in RERANK_GRID[:-1]:
        for nprobe in NPROBE_GRID:
            shares = found({"nprobe": nprobe, "rerank": rerank}) / 10
            if recall_interval(shares)[0] >= target and recall_interval(shares[round(0.7 * count) :])[1] >= target:
                reached.add((float(nprobe), float(rerank)))
                break
    return reached


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95, 0.97])
def test_what_follows_from_other_parameters_changes_no_point(target: float) -> None:
    """As by all queries of all pairs, of which few are asked: here lists are what costs."""
    found = coded(1_000)
    searcher = CountingSearcher(found, lambda params: params["nprobe"] * 1e-3 + params["rerank"] * 1e-7)
    point = tune(searcher, REFINED, asked_for(numbered(1_000)), target, searcher.clock)[0]
    expected = min(least_of(found, target, 1_000))
    assert point.met
    assert (point.params["nprobe"], point.params["rerank"]) == expected
    assert point.recall == pytest.approx(found(point.params).mean() / 10)
    asked = sum(counts.sum() for counts in searcher.asked.values())
    assert asked < 0.6 * 1_000 * len(searcher.asked)


def test_what_followed_wrongly_is_asked_before_it_is_chosen() -> None:
    """Half of the queries find all in 1 or 2 lists, and in 32 or more, but nothing between, where the others do."""

    def found(params: Any) -> Found:
        easy = 0 if 2 < params["nprobe"] < 32 else 10
        return np.where(np.arange(100) % 2, easy, 10 if params["nprobe"] >= 20 else 5)

    searcher = KnownSearcher(found)
    points = tune(searcher, LISTS, asked_for(numbered(30)), 0.95, searcher.clock)  # all of them in one call
    for point in points:
        assert (point.met, point.recall) == (True, 1.0)
        assert found(point.params).min() == 10


def test_what_fewer_candidates_found_proves_nothing_of_queries_that_were_asked() -> None:
    """More candidates find less here, as where rows have the same codes, and are faster."""
    searcher = KnownSearcher(
        lambda params: some(8 if params["rerank"] > 2 else 0) * (params["nprobe"] >= 8),
        lambda params: 1e-3 / params["rerank"],
    )
    points = points_of(searcher, REFINED, 0.95)
    assert [point.met for point in points[:2]] == [True, True]
    assert points[0].recall == pytest.approx(0.992), "the faster ones, with more candidates"
    assert all(point.recall_low >= point.target_recall for point in points if point.met)


def test_tune_of_an_index_without_knobs_is_exact_for_every_target() -> None:
    searcher = KnownSearcher(lambda params: everywhere(10), lambda params: 2e-3)
    nothing = TuningSet(QUERIES, np.empty((0, 10), np.int64), np.empty((0, 10), np.float32))
    points = tune(searcher, Knobs((), 1_000, 0), nothing, 0.97, searcher.clock)
    assert [p.target_recall for p in points] == [0.97, 0.90, 0.95, 0.99]
    for point in points:
        assert (point.params, point.recall, point.recall_low, point.met) == ({}, 1.0, 1.0, True)
        assert point.latency_ms == pytest.approx(2.0)
        assert point.queries_per_s == pytest.approx(500.0)


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (9, 0), (10, 1), (5_000, 500), (10_000, 1_000), (10**7, 1_000)])
def test_held_out_count_is_a_tenth_up_to_a_thousand(rows: int, held_out: int) -> None:
    assert held_out_count(rows) == held_out


def test_tuning_queries_are_rows_with_noise_of_the_samples_covariance() -> None:
    """Spread 3, 1 and 0 along three axes, 5 away from the origin: so is the noise, around each row."""
    random = np.random.default_rng(1)
    sample = (5.0 + random.normal(size=(HELD_OUT_MAX, 3)) * [3.0, 1.0, 0.0]).astype(np.float32)
    held_out = np.tile(np.array([[7.0, 5.0, 5.0]], np.float32), (2_000, 1))
    sample.flags.writeable = held_out.flags.writeable = False
    queries = tuning_queries(held_out, sample, "l2", seed=2)
    assert queries.dtype == np.float32
    noise = queries - held_out
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.3)
    np.testing.assert_allclose(np.cov(noise.T), np.diag([9.0, 1.0, 0.0]), atol=0.9)
    np.testing.assert_allclose(noise[:, 2], 0.0, atol=1e-4)


def test_tuning_queries_depend_on_the_seed_alone() -> None:
    rows = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32)
    np.testing.assert_array_equal(tuning_queries(rows, rows, "ip", 4), tuning_queries(rows, rows, "ip", 4))
    assert (tuning_queries(rows, rows, "ip", 4) != tuning_queries(rows, rows, "ip", 5)).any()


def test_tuning_queries_are_unit_vectors_under_cosine() -> None:
    rows = np.random.default_rng(3).normal(size=(200, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(tuning_queries(rows, rows, "cosine", 1), axis=1), 1.0, rtol=1e-6)


def test_tuning_queries_of_one_row_are_that_row() -> None:
    row = np.array([[0.6, 0.8]], np.float32)  # the centred sample is zero: no noise
    np.testing.assert_allclose(tuning_queries(row, row, "cosine", 1), row, rtol=1e-6)


def test_tuning_queries_without_direction_under_cosine_are_the_rows() -> None:
    held_out, sample = np.zeros((2, 2), np.float32), np.array([[0.6, 0.8]], np.float32)
    np.testing.assert_array_equal(tuning_queries(held_out, sample, "cosine", 1), held_out)


# --- on a GPU, with a twin ----------------------------------------------------------------------------------------

ON_GPU = Knobs(("itopk_size", "search_width"), 10_000, 0)


def with_twin(gpu: KnownSearcher, cpu: KnownSearcher, knobs: Knobs) -> Any:
    cpu.clock = gpu.clock
    return tune_with_twin(gpu, cpu, knobs, asked_for(QUERIES), 0.95, gpu.clock)


def test_graph_on_a_gpu_and_its_twin_are_tuned_each_with_its_own_knobs() -> None:
    gpu = KnownSearcher(lambda params: everywhere(10 if params["itopk_size"] * params["search_width"] >= 256 else 5))
    cpu = KnownSearcher(lambda params: everywhere(10 if params["ef_search"] >= 50 else 5))
    points, twins = with_twin(gpu, cpu, ON_GPU)
    least = min(ef for ef in EF_GRID if ef >= 50)
    assert [point.target_recall for point in points] == [twin.target_recall for twin in twins] == [0.95, 0.90, 0.99]
    for point, twin in zip(points, twins, strict=True):
        assert point.params["itopk_size"] * point.params["search_width"] >= 256
        assert point.params["ef_search"] == least
        assert twin.params == {"ef_search": least}
        assert point.met
        assert twin.met
    assert all("ef_search" not in params for params in gpu.walked)
    assert all(params.keys() == {"ef_search"} for params in cpu.walked)


def test_graph_on_a_gpu_is_asked_all_queries_at_once() -> None:
    """cuVS chooses by their number how it searches: what is told is not to be of both ways."""
    gpu = KnownSearcher(lambda params: everywhere(10 if params["itopk_size"] >= 256 else 5))
    with_twin(gpu, KnownSearcher(lambda params: everywhere(10)), ON_GPU)
    assert {size for size, _ in gpu.calls} == {1, len(QUERIES)}  # one: its latency


def test_lists_of_a_gpu_are_measured_on_their_twin_with_the_same_parameters() -> None:
    gpu = KnownSearcher(lambda params: everywhere(10 if params["nprobe"] >= 8 else 5))
    cpu = KnownSearcher(lambda params: some(70))
    points, twins = with_twin(gpu, cpu, LISTS)
    assert [point.params for point in points] == [twin.params for twin in twins]
    assert [(twin.target_recall, twin.met) for twin in twins] == [(0.95, False), (0.90, True), (0.99, False)]
    assert all(twin.recall == pytest.approx(0.93) for twin in twins)
    assert all(point.met for point in points)


def test_exact_index_of_a_gpu_has_nothing_to_measure_on_its_twin() -> None:
    cpu = KnownSearcher(lambda params: everywhere(10))
    gpu, nothing = KnownSearcher(lambda params: everywhere(10)), np.empty((0, 10))
    exact = TuningSet(asked_for(QUERIES).queries, nothing.astype(np.int64), nothing.astype(np.float32))
    points, twins = tune_with_twin(gpu, cpu, Knobs((), 10_000, 0), exact, 0.95, gpu.clock)
    assert [point.params for point in points] == [{}, {}, {}]
    assert (twins, cpu.calls) == ((), [])


def test_rounded_index_of_a_gpu_is_measured_on_its_twin_though_nothing_is_tuned() -> None:
    gpu, cpu = KnownSearcher(lambda params: everywhere(10)), KnownSearcher(lambda params: everywhere(5))
    points, twins = with_twin(gpu, cpu, Knobs((), 10_000, 0))
    assert [(point.params, point.recall, point.met) for point in points] == [({}, 1.0, True)] * 3
    assert [(twin.params, twin.recall, twin.met) for twin in twins] == [({}, 0.5, False)] * 3
