"""Exact scores of candidates from the rows of a segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import actors.rerank
from actors.rerank import exact_scores, rerank
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Metric, VectorDtype
from cluster.ids import hash_ids
from cluster.segment import Rows, rows_schema, write_rows

METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")
DTYPES: tuple[VectorDtype, ...] = ("float32", "float16")
DIMENSION, COUNT, PER_BATCH = 37, 250, 64  # odd; four record batches, the last one short
TOLERANCE = 1e-6  # relative, to the sum of the magnitudes that are added up
SEED = 20261130
Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]


def rows_of(folder: Path, vectors: NDArray[np.floating], metric: Metric = "l2", per_batch: int = PER_BATCH) -> Rows:
    """`vectors` (n, d), float32 or float16, as the mapped rows of a segment."""
    count, dimension = vectors.shape
    config = CollectionConfig(dimension, metric, vector_dtype=vectors.dtype.name)  # type: ignore[arg-type]
    ids = pa.array(np.arange(count))
    columns = [ids, vectors_array(vectors), pa.array(np.sort(hash_ids(ids)))]
    batch = pa.record_batch(columns, schema=rows_schema(config, {}))
    pieces = (pa.concat_batches([batch.slice(at, per_batch)]) for at in range(0, count, per_batch))
    write_rows(folder / "rows.arrow", batch.schema, pieces)
    return Rows(folder / "rows.arrow", count, dimension, per_batch)


def vectors_of(metric: Metric, count: int, dimension: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def true_scores(stored: NDArray[np.floating], queries: Vectors, labels: Labels, metric: Metric) -> NDArray[np.float64]:
    """float64, of the vectors as they are stored; cosine is that of unit vectors: 1 - squared distance / 2."""
    candidates, asked = stored.astype(np.float64)[labels], queries.astype(np.float64)[:, None, :]
    if metric == "ip":
        return np.asarray((candidates * asked).sum(axis=2))
    squared = np.square(candidates - asked).sum(axis=2)
    return np.asarray(squared if metric == "l2" else 1.0 - squared / 2.0)


def magnitudes(stored: NDArray[np.floating], queries: Vectors, labels: Labels, metric: Metric) -> NDArray[np.float64]:
    """What a rounding error is relative to: sums of products may cancel."""
    if metric == "l2":
        return true_scores(stored, queries, labels, "l2")
    if metric == "cosine":
        return np.ones(labels.shape)
    return true_scores(np.abs(stored), np.abs(queries), labels, "ip")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_scores_equal_brute_force_in_float64(metric: Metric, dtype: VectorDtype, tmp_path: Path) -> None:
    stored = vectors_of(metric, COUNT, DIMENSION, SEED).astype(dtype)
    queries = vectors_of(metric, 30, DIMENSION, SEED + 1)
    labels = np.random.default_rng(SEED + 2).integers(COUNT, size=(30, 20))
    scores = exact_scores(rows_of(tmp_path, stored, metric), queries, labels, metric, threads=1)
    assert scores.dtype == np.float32
    expected = true_scores(stored, queries, labels, metric)
    error = np.abs(scores - expected) / magnitudes(stored, queries, labels, metric)
    assert error.max() <= TOLERANCE, f"seed {SEED}"


@pytest.mark.parametrize("metric", METRICS)
def test_rerank_of_all_rows_is_the_order_of_brute_force(metric: Metric, tmp_path: Path) -> None:
    stored, queries = vectors_of(metric, COUNT, DIMENSION, SEED), vectors_of(metric, 7, DIMENSION, SEED + 1)
    random = np.random.default_rng(SEED)
    labels = np.array([random.permutation(COUNT) for _ in queries])
    found, scores = rerank(rows_of(tmp_path, stored, metric), queries, labels, metric, threads=1)
    everything = np.tile(np.arange(COUNT), (len(queries), 1))
    truth = true_scores(stored, queries, everything, metric)
    np.testing.assert_array_equal(found, np.argsort(truth if metric == "l2" else -truth, axis=1))
    np.testing.assert_allclose(scores, np.take_along_axis(truth, found, axis=1), rtol=1e-5, atol=1e-5)


def test_exact_scores_far_from_the_origin_do_not_cancel(tmp_path: Path) -> None:
    random = np.random.default_rng(SEED)
    stored = (1_000.0 + 0.1 * random.normal(size=(100, 64))).astype(np.float32)
    queries = (1_000.0 + 0.1 * random.normal(size=(20, 64))).astype(np.float32)
    labels = np.tile(np.arange(100), (20, 1))
    scores = exact_scores(rows_of(tmp_path, stored), queries, labels, "l2", threads=1)
    np.testing.assert_allclose(scores, true_scores(stored, queries, labels, "l2"), rtol=TOLERANCE)


@pytest.mark.parametrize("metric", METRICS)
def test_rerank_split_over_threads_equals_that_of_one(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, queries = 40, vectors_of(metric, 801, DIMENSION, SEED + 1)
    monkeypatch.setattr(actors.rerank, "SPLIT_FLOATS_MIN", len(queries) * width * DIMENSION)
    rows = rows_of(tmp_path, vectors_of(metric, COUNT, DIMENSION, SEED), metric)
    labels = np.random.default_rng(SEED).integers(-1, COUNT, size=(len(queries), width))
    asked_of = []
    threads = actors.rerank._threads
    monkeypatch.setattr(actors.rerank, "_threads", lambda count: asked_of.append(count) or threads(count))
    alone = rerank(rows, queries, labels, metric, threads=1)
    assert asked_of == []
    together = rerank(rows, queries, labels, metric, threads=3)
    assert asked_of == [3, 3]  # the calling thread does a part itself
    np.testing.assert_array_equal(together[0], alone[0])
    found = alone[0] >= 0
    np.testing.assert_array_equal(together[1][found], alone[1][found])


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_rerank_puts_negative_labels_last(metric: Metric, queries: int, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, vectors_of(metric, COUNT, DIMENSION, SEED), metric)
    labels = np.tile(np.array([-1, 9, -1, 120, 240, -1]), (queries, 1))
    found, _ = rerank(rows, vectors_of(metric, queries, DIMENSION, SEED + 1), labels, metric, threads=1)
    assert (found[:, 3:] == -1).all()
    assert [sorted(line) for line in found[:, :3].tolist()] == [[9, 120, 240]] * queries


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_rerank_orders_ties_by_label(metric: Metric, queries: int, tmp_path: Path) -> None:
    """Rows 0 to 79 are one point, which is nearest, and 80 to 159 another: both lie in two record batches."""
    near, far = np.eye(2, DIMENSION, dtype=np.float32)
    rows = rows_of(tmp_path, np.repeat([near, far], 80, axis=0), metric)
    labels = np.tile(np.array([150, 70, 81, -1, 3, 66, 80]), (queries, 1))
    found, scores = rerank(rows, np.tile(near, (queries, 1)), labels, metric, threads=1)
    assert found.tolist() == [[3, 66, 70, 80, 81, 150, -1]] * queries
    assert (scores[:, :3] == (0.0 if metric == "l2" else 1.0)).all()


def test_rerank_of_no_candidates_or_no_queries_is_empty(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, vectors_of("l2", 10, 4, SEED))
    for shape in ((0, 5), (3, 0), (1, 0)):
        found, scores = rerank(rows, np.zeros((shape[0], 4), np.float32), np.empty(shape, np.int64), "l2", threads=2)
        assert found.shape == scores.shape == shape


def test_rerank_leaves_its_arguments_as_they_are(tmp_path: Path) -> None:
    queries, labels = vectors_of("l2", 4, DIMENSION, SEED + 1), np.array([[3, -1, 7]] * 4)
    before = queries.copy(), labels.copy()
    queries.flags.writeable = labels.flags.writeable = False
    rerank(rows_of(tmp_path, vectors_of("l2", COUNT, DIMENSION, SEED)), queries, labels, "l2", threads=1)
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(labels, before[1])
