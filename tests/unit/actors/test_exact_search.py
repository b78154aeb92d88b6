"""Brute force over blocks of vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.exact_search import blocks_until, exact_search, faiss, nearest
from cluster.config import Metric
from cluster.topk import recall_at_k

METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")
COUNT, DIMENSION, QUERIES, K = 500, 16, 40, 10
SEED = 20261130
Vectors = NDArray[np.float32]


def vectors_of(metric: Metric, count: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def blocks(vectors: Vectors, size: int) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def true_scores(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    asked, stored = queries.astype(np.float64), vectors.astype(np.float64)
    if metric != "l2":
        return np.asarray(asked @ stored.T)
    return np.array([np.square(stored - query).sum(axis=1) for query in asked])


def true_rows(scores: NDArray[np.float64], k: int, metric: Metric) -> NDArray[np.int64]:
    return np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]


@pytest.fixture(params=["no_matrix_product", "always_matrix_product"])
def threshold(request: pytest.FixtureRequest) -> Iterator[int]:
    """FAISS's own bound on the floats of queries, from which on it multiplies matrices; put back afterwards."""
    before = faiss.cvar.distance_compute_blas_threshold
    value = 2**31 - 1 if request.param == "no_matrix_product" else 1
    faiss.cvar.distance_compute_blas_threshold = value
    yield value
    faiss.cvar.distance_compute_blas_threshold = before


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [COUNT, 128, 7, 1])
def test_exact_search_equals_brute_force_whatever_the_blocks(metric: Metric, size: int) -> None:
    vectors, queries = vectors_of(metric, COUNT, SEED), vectors_of(metric, QUERIES, SEED + 1)
    rows, scores = exact_search(queries, blocks(vectors, size), K, metric)
    truth = true_scores(queries, vectors, metric)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(rows, true_rows(truth, K, metric))
    np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_of_fewer_rows_than_k_ends_with_minus_one(metric: Metric) -> None:
    rows, scores = exact_search(vectors_of(metric, 3, SEED), blocks(vectors_of(metric, 4, SEED + 1), 3), 6, metric)
    assert rows.shape == scores.shape == (3, 6)
    assert [sorted(line) for line in rows[:, :4].tolist()] == [[0, 1, 2, 3]] * 3
    assert (rows[:, 4:] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_without_rows_or_queries_is_empty(metric: Metric) -> None:
    rows, _ = exact_search(vectors_of(metric, 2, SEED), [], 3, metric)
    assert (rows == -1).all()
    rows, scores = exact_search(np.empty((0, DIMENSION), np.float32), blocks(vectors_of(metric, 9, SEED), 4), 3, metric)
    assert rows.shape == scores.shape == (0, 3)


def test_exact_search_of_equal_points_takes_the_lowest_rows_first() -> None:
    vectors = np.ones((30, DIMENSION), np.float32)
    rows, _ = exact_search(vectors[:2], blocks(vectors, 8), 12, "l2")
    assert rows.tolist() == [list(range(12))] * 2


def test_exact_search_of_thousands_of_queries_far_from_the_origin_loses_nothing() -> None:
    """By a matrix product in float32 such distances cancel (`faiss_index.blas_threshold`)."""
    random = np.random.default_rng(SEED)
    vectors = (1_000.0 + 0.1 * random.normal(size=(3_000, 64))).astype(np.float32)
    queries = (1_000.0 + 0.1 * random.normal(size=(5_000, 64))).astype(np.float32)
    rows, _ = exact_search(queries, blocks(vectors, 1_000), K, "l2")
    # Shifted by a constant that float32 holds, in float64 a matrix product is exact enough to be the truth.
    stored, asked = vectors.astype(np.float64) - 1_000.0, queries.astype(np.float64) - 1_000.0
    squared = np.square(stored).sum(axis=1) - 2.0 * asked @ stored.T
    truth = np.argpartition(squared, K, axis=1)[:, :K]
    assert recall_at_k(rows, truth).mean() == 1.0, f"seed {SEED}"


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_leaves_the_threshold_of_the_process_as_it_was(metric: Metric, threshold: int) -> None:
    vectors = vectors_of(metric, COUNT, SEED)
    rows, _ = exact_search(vectors[:QUERIES], blocks(vectors, 100), K, metric)
    assert faiss.cvar.distance_compute_blas_threshold == threshold
    np.testing.assert_array_equal(rows, true_rows(true_scores(vectors[:QUERIES], vectors, metric), K, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_leaves_its_arguments_as_they_are(metric: Metric) -> None:
    vectors, queries = vectors_of(metric, COUNT, SEED), vectors_of(metric, QUERIES, SEED + 1)
    before = vectors.copy(), queries.copy()
    vectors.flags.writeable = queries.flags.writeable = False
    exact_search(queries, blocks(vectors, 100), K, metric)
    np.testing.assert_array_equal(vectors, before[0])
    np.testing.assert_array_equal(queries, before[1])


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_is_the_best_centroid_of_each_point(metric: Metric) -> None:
    points, centroids = vectors_of(metric, 300, SEED), vectors_of(metric, 20, SEED + 1)
    expected = true_rows(true_scores(points, centroids, metric), 1, metric)
    np.testing.assert_array_equal(nearest(points, centroids, metric), expected)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (4, 1)]),
        (10, [(0, 4), (4, 4), (8, 2)]),
        (99, [(0, 4), (4, 4), (8, 2)]),
    ],
)
def test_blocks_until_cuts_the_block_that_holds_the_stop(stop: int, expected: list[tuple[int, int]]) -> None:
    vectors = vectors_of("l2", 10, SEED)
    found = list(blocks_until(blocks(vectors, 4), stop))
    assert [(first, len(part)) for first, part in found] == expected
    for first, part in found:
        np.testing.assert_array_equal(part, vectors[first : first + len(part)])
