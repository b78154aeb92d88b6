from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.faiss_index import (
    FaissIndex,
    blocks_until,
    build_index,
    exact_search,
    library_facts,
    load_index,
    training_points,
    use_threads,
)
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.errors import Corrupt, Invalid
from cluster.index_spec import IndexSpec, choose
from cluster.topk import recall_at_k

METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")
KINDS_AND_CODES = [
    ("flat", "float32"),
    ("ivf_flat", "float32"),
    ("ivf_flat", "float16"),
    ("hnsw", "float32"),
    ("hnsw", "float16"),
]
COUNT, DIMENSION, QUERIES = 600, 16, 20
WIDE = {"flat": {}, "ivf_flat": {"nprobe": 10_000}, "hnsw": {"ef_search": COUNT}}
Vectors = NDArray[np.float32]


def vectors_of(metric: Metric, count: int, dimension: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def spec_of(kind: str, codes: str, count: int, dimension: int) -> IndexSpec:
    index = IndexConfig(kind=kind)  # type: ignore[arg-type]
    return choose(count, CollectionConfig(dimension, index=index, vector_dtype=codes))  # type: ignore[arg-type]


def built(spec: IndexSpec, metric: Metric, vectors: Vectors) -> FaissIndex:
    sample = vectors[: training_points(spec, len(vectors))]
    index = build_index(spec, vectors.shape[1], metric, sample, seed=3)
    half = len(vectors) // 2
    index.add(vectors[:half])
    index.add(vectors[half:])
    return index


def true_scores(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    asked, stored = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.square(asked[:, None] - stored[None]).sum(axis=2)
    return asked @ stored.T


def true_rows(queries: Vectors, vectors: Vectors, k: int, metric: Metric) -> NDArray[np.int64]:
    scores = true_scores(queries, vectors, metric)
    return np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "codes"), KINDS_AND_CODES)
def test_search_of_a_wide_open_index_finds_true_neighbours_and_scores(kind: str, codes: str, metric: Metric) -> None:
    vectors = vectors_of(metric, COUNT, DIMENSION, seed=1)
    queries = vectors_of(metric, QUERIES, DIMENSION, seed=2)
    index = built(spec_of(kind, codes, COUNT, DIMENSION), metric, vectors)
    rows, scores = index.search(queries, 10, WIDE[kind])
    assert rows.shape == scores.shape == (QUERIES, 10)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    truth = true_rows(queries, vectors, 10, metric)
    if codes == "float32" and kind != "hnsw":
        np.testing.assert_array_equal(rows, truth)
    assert recall_at_k(rows, truth).mean() >= 0.98
    expected = np.take_along_axis(true_scores(queries, vectors, metric), rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-4 if codes == "float32" else 2e-2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "codes"), KINDS_AND_CODES)
def test_search_after_save_and_memory_mapped_load_is_identical(
    kind: str, codes: str, metric: Metric, tmp_path: Path
) -> None:
    vectors = vectors_of(metric, COUNT, DIMENSION, seed=3)
    queries = vectors_of(metric, QUERIES, DIMENSION, seed=4)
    spec = spec_of(kind, codes, COUNT, DIMENSION)
    index = built(spec, metric, vectors)
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", spec, DIMENSION, metric, COUNT, "c/index.faiss")
    assert loaded.count == COUNT
    for params in ({}, WIDE[kind]):
        for ours, theirs in zip(index.search(queries, 10, params), loaded.search(queries, 10, params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "codes"), KINDS_AND_CODES)
def test_search_clamps_k_to_the_count(kind: str, codes: str) -> None:
    vectors = vectors_of("l2", 50, 4, seed=5)
    index = built(spec_of(kind, codes, 50, 4), "l2", vectors)
    rows, scores = index.search(vectors[:3], 2_048, WIDE[kind])
    assert rows.shape == scores.shape == (3, 50)
    for line in rows:
        assert sorted(line.tolist()) == list(range(50))


def test_search_without_queries_or_without_points_is_empty() -> None:
    spec = spec_of("hnsw", "float32", COUNT, 4)
    empty = build_index(spec, 4, "l2", np.empty((0, 4), np.float32), seed=0)
    rows, scores = empty.search(np.zeros((2, 4), np.float32), 10, {})
    assert rows.shape == scores.shape == (2, 0)
    index = built(spec, "l2", vectors_of("l2", 20, 4, seed=6))
    rows, scores = index.search(np.empty((0, 4), np.float32), 10, {})
    assert rows.shape == scores.shape == (0, 0)


def test_search_of_starved_inverted_lists_marks_what_is_missing_with_minus_one() -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=7)
    index = built(spec_of("ivf_flat", "float32", COUNT, DIMENSION), "l2", vectors)
    rows, _ = index.search(vectors[:5], COUNT, {"nprobe": 1})
    found = (rows >= 0).sum(axis=1)
    assert (found > 0).all()
    assert (found < COUNT).all()
    for line, hits in zip(rows, found, strict=True):
        assert (line[hits:] == -1).all()
        assert len(set(line[:hits].tolist())) == hits


@pytest.mark.parametrize(
    ("kind", "params", "field"),
    [
        ("flat", {"nprobe": 4}, "params.nprobe"),
        ("flat", {"ef_search": 4}, "params.ef_search"),
        ("ivf_flat", {"ef_search": 4}, "params.ef_search"),
        ("hnsw", {"nprobe": 4}, "params.nprobe"),
        ("hnsw", {"nprobe": 4, "ef_search": 16}, "params.nprobe"),
    ],
)
def test_search_refuses_parameters_of_another_kind_by_name(kind: str, params: dict[str, int], field: str) -> None:
    vectors = vectors_of("l2", 100, 4, seed=8)
    index = built(spec_of(kind, "float32", 100, 4), "l2", vectors)
    with pytest.raises(Invalid, match=f"does not fit a {kind} index") as caught:
        index.search(vectors[:1], 5, params)
    assert [error.field for error in caught.value.errors] == [field]


def test_search_parameters_do_not_outlive_their_call() -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=9)
    index = built(spec_of("ivf_flat", "float32", COUNT, DIMENSION), "l2", vectors)
    before = index.search(vectors[:5], 50, {"nprobe": 1})[0]
    index.search(vectors[:5], 50, {"nprobe": 8})
    np.testing.assert_array_equal(index.search(vectors[:5], 50, {"nprobe": 1})[0], before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "codes"), KINDS_AND_CODES)
def test_callers_arrays_are_left_alone_and_may_be_read_only(kind: str, codes: str, metric: Metric) -> None:
    vectors = vectors_of(metric, 300, 8, seed=10) * np.float32(2.0)  # not unit length: normalising would show
    queries = vectors_of(metric, 10, 8, seed=11) * np.float32(3.0)
    kept = vectors.copy(), queries.copy()
    vectors.flags.writeable = queries.flags.writeable = False
    index = built(spec_of(kind, codes, 300, 8), metric, vectors)
    index.search(queries, 10, {})
    exact_search(queries, [(0, vectors)], 10, metric)
    np.testing.assert_array_equal(vectors, kept[0])
    np.testing.assert_array_equal(queries, kept[1])


def test_search_of_queries_that_are_not_contiguous_equals_that_of_a_copy() -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=12)
    index = built(spec_of("hnsw", "float32", COUNT, DIMENSION), "l2", vectors)
    queries = np.asfortranarray(vectors_of("l2", 2 * QUERIES, DIMENSION, seed=13))[::2]
    for strided, copied in zip(index.search(queries, 5, {}), index.search(queries.copy("C"), 5, {}), strict=True):
        np.testing.assert_array_equal(strided, copied)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "hnsw"])
def test_load_of_a_damaged_file_names_the_object(kind: str, damage: str, tmp_path: Path) -> None:
    # A flipped bit inside the vectors still loads: the checksum of the segment guards against that.
    spec, path = spec_of(kind, "float32", 200, 4), tmp_path / "index"
    built(spec, "l2", vectors_of("l2", 200, 4, seed=14)).save(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2]}.get(damage, b"garbage" * 100))
    if damage == "missing":
        path.unlink()
    with pytest.raises(Corrupt, match=r"words/index\.faiss: FAISS cannot read it"):
        load_index(path, spec, 4, "l2", 200, "words/index.faiss")


@pytest.mark.parametrize(
    ("dimension", "metric", "count"),
    [(5, "l2", 200), (4, "ip", 200), (4, "l2", 199)],
    ids=["dimension", "metric", "count"],
)
def test_load_of_an_index_that_is_not_the_one_described_names_the_object(
    dimension: int, metric: Metric, count: int, tmp_path: Path
) -> None:
    spec = spec_of("flat", "float32", 200, 4)
    built(spec, "l2", vectors_of("l2", 200, 4, seed=15)).save(tmp_path / "index")
    with pytest.raises(Corrupt, match=r"words/index.faiss: \(dimension, count, metric\)"):
        load_index(tmp_path / "index", spec, dimension, metric, count, "words/index.faiss")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(500,), (1, 3, 496), (100,) * 5], ids=str)
def test_exact_search_over_blocks_equals_brute_force(metric: Metric, sizes: tuple[int, ...]) -> None:
    vectors = vectors_of(metric, 500, 12, seed=16)
    queries = vectors_of(metric, 9, 12, seed=17)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
    blocks = [(start, vectors[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    rows, scores = exact_search(queries, blocks, 7, metric)
    np.testing.assert_array_equal(rows, true_rows(queries, vectors, 7, metric))
    expected = np.take_along_axis(true_scores(queries, vectors, metric), rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_of_fewer_points_than_k_pads_with_minus_one(metric: Metric) -> None:
    vectors = vectors_of(metric, 3, 4, seed=18)
    rows, _ = exact_search(vectors, [(0, vectors[:2]), (2, vectors[2:])], 5, metric)
    assert rows.shape == (3, 5)
    assert (rows[:, 3:] == -1).all()
    for line in rows:
        assert sorted(line[:3].tolist()) == [0, 1, 2]


def test_blocks_until_cuts_the_block_that_reaches_over() -> None:
    vectors = np.arange(20, dtype=np.float32).reshape(10, 2)
    blocks = [(0, vectors[:4]), (4, vectors[4:8]), (8, vectors[8:])]
    cut = list(blocks_until(blocks, 6))
    assert [first for first, _ in cut] == [0, 4]
    np.testing.assert_array_equal(np.concatenate([part for _, part in cut]), vectors[:6])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 4096])
@pytest.mark.parametrize(("kind", "codes"), KINDS_AND_CODES)
def test_smallest_and_large_dimension_find_the_stored_vector(
    kind: str, codes: str, dimension: int, metric: Metric, tmp_path: Path
) -> None:
    vectors = vectors_of("cosine", 60, dimension, seed=19)  # of equal length: each is its own best match by any metric
    spec = spec_of(kind, codes, 60, dimension)
    built(spec, metric, vectors).save(tmp_path / "index")
    index = load_index(tmp_path / "index", spec, dimension, metric, 60, "index")
    rows, scores = index.search(vectors, 1, WIDE[kind])
    best = 0.0 if metric == "l2" else 1.0
    np.testing.assert_allclose(scores[:, 0], best, atol=2e-3 if codes == "float16" else 1e-5)
    if dimension > 1:  # among unit vectors of one dimension half are equal
        np.testing.assert_array_equal(rows[:, 0], np.arange(60))


def test_build_with_one_seed_gives_one_index(tmp_path: Path) -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=20)
    use_threads(1)
    files = []
    for number in range(2):
        built(spec_of("ivf_flat", "float32", COUNT, DIMENSION), "l2", vectors).save(tmp_path / str(number))
        files.append((tmp_path / str(number)).read_bytes())
    assert files[0] == files[1]


def test_training_points_are_bounded_and_none_where_nothing_is_trained() -> None:
    assert training_points(spec_of("flat", "float32", 1000, 4), 1000) == 0
    assert training_points(spec_of("hnsw", "float32", 1000, 4), 1000) == 0
    assert training_points(spec_of("hnsw", "float16", 1000, 4), 1000) == 1
    spec = IndexSpec("ivf_flat", {"nlist": 8}, "float32", 0, "")
    assert training_points(spec, 100) == 100
    assert training_points(spec, 100_000) == 8 * 128


def test_library_facts_name_version_and_instruction_set() -> None:
    facts: dict[str, Any] = library_facts()
    assert set(facts) == {"faiss", "simd"}
    assert all(facts.values())
