from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.vectors import LENGTH_MAX, vector_problem

NOT_FINITE, ZERO, LONG = "NaN or infinity", "zero vector", "longer than"
CASES: list[tuple[Any, list[float], str | None]] = [
    ("l2", [1.0, 2.0], None),
    ("l2", [0.0, 0.0], None),
    ("l2", [1e-45, 0.0], None),
    ("l2", [np.nan, 0.0], NOT_FINITE),
    ("l2", [np.inf, np.nan], NOT_FINITE),
    ("ip", [0.0, -np.inf], NOT_FINITE),
    ("l2", [LENGTH_MAX * 0.999, 0.0], None),
    ("l2", [LENGTH_MAX * 1.001, 0.0], LONG),
    ("ip", [3e38, 3e38], LONG),
    ("cosine", [3e38, 3e38], None),
    ("cosine", [1e-45, 0.0], None),
    ("cosine", [0.0, -0.0], ZERO),
    ("cosine", [np.inf, 0.0], NOT_FINITE),
]


@pytest.mark.parametrize(("metric", "vector", "problem"), CASES)
def test_problem_of_one_vector_and_of_the_same_among_others(metric: Any, vector: list[float], problem: Any) -> None:
    """One vector alone is checked on a shorter way."""
    one = np.array([vector], np.float32)
    among = np.array([[1.0, 2.0], vector, [3.0, 4.0]], np.float32)
    for vectors, row in ((one, 0), (among, 1)):
        found = vector_problem(vectors, metric)
        assert (found is None) == (problem is None), found
        if found is not None:
            assert found[0] == row
            assert problem in found[1]


def test_no_vectors_have_no_problem() -> None:
    for metric in ("l2", "ip", "cosine"):
        assert vector_problem(np.empty((0, 3), np.float32), metric) is None  # type: ignore[arg-type]
