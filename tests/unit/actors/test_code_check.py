"""Vectors that must not be rounded are told from those that may be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.code_check import CHECKED_K, CHECKED_ROWS, KEPT_MIN, codes_fit, neighbours_kept
from cluster.config import Codes, Metric

DIMENSION = 64
SEED = 20261130
LOSSY: tuple[Codes, ...] = ("float16", "sq8")
METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")
Vectors = NDArray[np.float32]


def gaussian(count: int = CHECKED_ROWS, metric: Metric = "l2") -> Vectors:
    vectors = np.random.default_rng(SEED).normal(size=(count, DIMENSION)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codes", LOSSY)
def test_gaussian_embeddings_keep_their_neighbours(codes: Codes, metric: Metric) -> None:
    kept = neighbours_kept(gaussian(metric=metric), codes, metric)
    assert KEPT_MIN[codes] <= kept <= 1.0
    assert codes_fit(gaussian(metric=metric), codes, metric)


@pytest.mark.parametrize(
    "vectors",
    [1_000.0 + 0.1 * gaussian(), 1e6 * gaussian(), 1e-9 * gaussian()],
    ids=["far_from_the_origin", "beyond_float16", "below_float16"],
)
def test_vectors_of_another_range_do_not_fit_float16(vectors: Vectors) -> None:
    vectors = vectors.astype(np.float32)
    assert neighbours_kept(vectors, "float16", "l2") < 0.5
    assert not codes_fit(vectors, "float16", "l2")
    assert codes_fit(vectors, "float32", "l2")


@pytest.mark.parametrize("offset_and_scale", [(1_000.0, 0.1), (0.0, 1e6), (0.0, 1e-9)])
def test_vectors_of_another_range_fit_8_bits_which_are_trained(offset_and_scale: tuple[float, float]) -> None:
    offset, scale = offset_and_scale
    assert codes_fit((offset + scale * gaussian()).astype(np.float32), "sq8", "l2")


def test_an_outlier_in_every_dimension_does_not_fit_8_bits() -> None:
    """One row stretches the 255 steps of each dimension so far that all others fall onto one."""
    vectors = gaussian()
    vectors[-1] = 1e4
    assert not codes_fit(vectors, "sq8", "l2")
    assert codes_fit(vectors, "float16", "l2")


@pytest.mark.parametrize("codes", LOSSY)
def test_too_few_rows_to_tell_pass(codes: Codes) -> None:
    vectors = 1e6 * gaussian(CHECKED_K + 1)
    vectors[-1] = 1e10
    assert not codes_fit(vectors, "float16", "l2")
    for count in range(CHECKED_K + 1):
        assert neighbours_kept(vectors[:count], codes, "l2") == 1.0
        assert codes_fit(vectors[:count], codes, "l2")


@pytest.mark.parametrize("codes", LOSSY)
def test_a_dimension_of_one_value_is_kept(codes: Codes) -> None:
    vectors = gaussian()
    vectors[:, 3] = 0.5
    assert codes_fit(vectors, codes, "l2")


def test_rows_beyond_those_that_are_checked_do_not_count() -> None:
    vectors = np.concatenate([gaussian(), 1e6 * gaussian()])
    assert neighbours_kept(vectors, "float16", "l2") == neighbours_kept(gaussian(), "float16", "l2")


def test_vectors_stored_as_float16_lose_nothing_as_float16() -> None:
    assert neighbours_kept(gaussian().astype(np.float16), "float16", "l2") == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("codes", LOSSY)
def test_the_check_leaves_the_sample_as_it_is(codes: Codes) -> None:
    sample = gaussian(200)
    before = sample.copy()
    sample.flags.writeable = False
    neighbours_kept(sample, codes, "l2")
    np.testing.assert_array_equal(sample, before)
