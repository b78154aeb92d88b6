"""Exact search of vectors that are kept in fewer digits than the rows have: ranked by the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.config import CollectionConfig, IndexConfig
from cluster.query import SearchParams
from cluster.topk import recall_at_k
from tests.unit.actors.points import build, in_row_order, load, random_points, random_vectors, true_rows_of

COUNT, K = 2_000, 10


def test_flat_of_float16_codes_ranks_by_the_rows_and_tells_its_recall(tmp_path: Path) -> None:
    config = CollectionConfig(32, "l2", index=IndexConfig("flat", codes="float16"))
    points = in_row_order(random_points(config, COUNT))
    description = build(tmp_path, "s1", config, points)
    assert description.spec["codes"] == "float16"
    assert description.built["tuned_on"] == "200 rows with noise"  # which were kept out: the recall is measured
    assert description.operating_points[0].met
    segment = load(tmp_path, config, description)
    queries = random_vectors(config, 50, seed=5)
    rows, scores = segment.search(queries, K, SearchParams())
    truth, exact_scores = true_rows_of(points, queries, K, "l2")
    assert recall_at_k(rows, truth).mean() > 0.999
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-5)
