"""The memory model: predicted bytes of every kind are within 10% of what a loaded index takes.

The whole grid, 50,000 and 200,000 points of 96, 384 and 768 dimensions: `python -m benchmarks.index_memory`.
"""

from __future__ import annotations

import numpy as np
import pytest

from actors.faiss_index import use_threads
from tests.recall.index_memory import CASES, measure, vectors

pytestmark = pytest.mark.recall

TOLERANCE = 0.10
EVERY_KIND = [(case, 30_000, 96) for case in CASES]
LARGER = [
    ("flat", 100_000, 384),
    ("flat float16", 100_000, 768),
    ("ivf_pq 8 bits", 20_000, 384),
    ("ivf_pq rows", 20_000, 384),
    ("ivf_rabitq rows", 50_000, 384),  # the least exact of the whole grid
    ("ivf_rabitq rows", 20_000, 768),
]


@pytest.fixture(scope="module")
def points_96() -> np.ndarray:
    return vectors(30_000, 96)


@pytest.mark.parametrize(("case", "count", "dimension"), EVERY_KIND + LARGER)
def test_predicted_bytes_are_those_of_the_loaded_index(
    case: str, count: int, dimension: int, points_96: np.ndarray
) -> None:
    use_threads(2)
    measured = measure(case, points_96 if points_96.shape == (count, dimension) else vectors(count, dimension))
    print(f"{case}, {count} x {dimension}: {measured}, ratio {measured.ratio:.3f}")
    assert measured.anonymous >= 0
    assert measured.file > 0
    assert abs(measured.ratio - 1.0) <= TOLERANCE, measured
