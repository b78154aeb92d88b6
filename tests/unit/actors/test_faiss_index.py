from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from actors.faiss_index import FaissIndex, build_index, check_factory, library_facts, load_index, use_threads
from cluster.config import IndexConfig, Metric
from cluster.errors import Corrupt, Invalid
from cluster.index_spec import IndexSpec
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k
from tests.unit.actors.points import FACTORIES, INDEXES, METRICS, built_index, spec_of, wide_open

COUNT, DIMENSION, QUERIES = 600, 16, 20
LOSSLESS = {"flat", "ivf_flat float32", "ivf_pq float32", "IVF32,Flat,RFlat"}
HALVES = {"hnsw float16", "ivf_flat float16", "ivf_pq float16", "ivf_rabitq float16"}
BYTES = {"hnsw sq8", "ivf_flat sq8", "ivf_sq8", "ivf_pq sq8", "ivf_rabitq sq8", "HNSW16,SQ8"}
SLOW = "OPQ4_8,IVF32,PQ4x4"  # its rotation trains for a second: by one metric where each test builds its own
QUICK = [name for name in INDEXES if name != SLOW]
BY_METRIC = [*product(QUICK, METRICS), (SLOW, "l2")]
Vectors = NDArray[np.float32]


def vectors_of(metric: Metric, count: int, dimension: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def true_scores(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    asked, stored = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.square(asked[:, None] - stored[None]).sum(axis=2)
    return asked @ stored.T


def true_rows(queries: Vectors, vectors: Vectors, k: int, metric: Metric) -> NDArray[np.int64]:
    scores = true_scores(queries, vectors, metric)
    return np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]


@cache
def indexed(name: str, metric: Metric, count: int = COUNT) -> tuple[IndexSpec, Vectors, FaissIndex]:
    """(spec, vectors, index of them) for tests that only search it or save it."""
    vectors = vectors_of(metric, count, DIMENSION, seed=1)
    spec = spec_of(INDEXES[name], count, DIMENSION, metric)
    return spec, vectors, built_index(spec, metric, vectors)


def expected_of(name: str) -> tuple[float, float]:
    """(recall@10 of a wide open index, greatest error of a score): what its codes alone, or its own store, can tell."""
    if name in LOSSLESS or name == "hnsw float32":
        return (1.0 if name in LOSSLESS else 0.98), 1e-4
    if name in HALVES:
        return 0.98, 2e-2
    if name in BYTES:
        return 0.95, 0.3
    return 0.2, np.inf  # one bit to a byte for 4 dimensions: candidates, to be ranked by the segment's rows


def test_every_index_has_an_expectation_of_its_own() -> None:
    rough = {name for name in INDEXES if expected_of(name)[0] < 0.5}
    assert rough == {
        "ivf_pq rows",
        "ivf_pq 8 bits",
        "ivf_pq padded",
        "ivf_rabitq rows",
        "IVF32,PQ4x4fsr",
        "OPQ4_8,IVF32,PQ4x4",
    }


@pytest.mark.parametrize(("name", "metric"), BY_METRIC)
def test_search_of_a_wide_open_index_finds_true_neighbours_and_scores(name: str, metric: Metric) -> None:
    _, vectors, index = indexed(name, metric)
    queries = vectors_of(metric, QUERIES, DIMENSION, seed=2)
    rows, scores = index.search(queries, 10, wide_open(index))
    assert rows.shape == scores.shape == (QUERIES, 10)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    truth = true_rows(queries, vectors, 10, metric)
    recall, error = expected_of(name)
    if name in LOSSLESS:
        np.testing.assert_array_equal(rows, truth)
    assert recall_at_k(rows, truth).mean() >= recall
    if np.isfinite(error):
        true = np.take_along_axis(true_scores(queries, vectors, metric), rows, axis=1)
        np.testing.assert_allclose(scores, true, atol=error)


@pytest.mark.parametrize(("name", "metric"), BY_METRIC)
def test_search_after_save_and_memory_mapped_load_is_identical(name: str, metric: Metric, tmp_path: Path) -> None:
    spec, _, index = indexed(name, metric)
    queries = vectors_of(metric, 1 if name == "flat" else QUERIES, DIMENSION, seed=4)  # a batch may be a product
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", spec, DIMENSION, metric, COUNT, "c/index.faiss")
    assert (loaded.count, loaded.knobs, loaded.lists) == (COUNT, index.knobs, index.lists)
    for params in ({}, wide_open(index)):
        for ours, theirs in zip(index.search(queries, 10, params), loaded.search(queries, 10, params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "metric"), BY_METRIC)
def test_search_of_a_selection_finds_only_its_rows(name: str, metric: Metric, tmp_path: Path) -> None:
    spec, vectors, built = indexed(name, metric)
    built.save(tmp_path / "index")
    index = load_index(tmp_path / "index", spec, DIMENSION, metric, COUNT, "index")
    mask = np.random.default_rng(22).random(COUNT) < 0.3
    kept = np.flatnonzero(mask)
    rows, _ = index.search(vectors[:QUERIES], 10, wide_open(index), RowSelection.of(mask))
    assert (rows >= 0).all()
    assert mask[rows].all()
    truth = kept[true_rows(vectors[:QUERIES], vectors[kept], 10, metric)]
    assert recall_at_k(rows, truth).mean() >= min(expected_of(name)[0], 0.98)
    # The selection went with that call alone.
    everything, _ = index.search(vectors[:QUERIES], 10, wide_open(index))
    assert not mask[everything].all()


@pytest.mark.parametrize("name", INDEXES)
def test_search_of_a_selection_of_fewer_rows_than_k_marks_what_is_missing(name: str) -> None:
    _, vectors, index = indexed(name, "l2")
    mask = np.zeros(COUNT, dtype=bool)
    mask[[5, 200, 599]] = True
    rows, _ = index.search(vectors[:4], 10, wide_open(index), RowSelection.of(mask))
    for line in rows:
        assert sorted(line[line >= 0].tolist()) == [5, 200, 599]
        assert (line[3:] == -1).all()


@pytest.mark.parametrize("name", INDEXES)
def test_search_clamps_k_to_the_count(name: str) -> None:
    _, vectors, index = indexed(name, "l2")
    rows, scores = index.search(vectors[:3], 2_048, wide_open(index))
    assert rows.shape == scores.shape == (3, COUNT)
    for line in rows:
        assert sorted(line.tolist()) == list(range(COUNT))


def test_search_without_queries_or_without_points_is_empty() -> None:
    spec = spec_of(INDEXES["hnsw float32"], COUNT, 4)
    empty = build_index(spec, 4, "l2", np.empty((0, 4), np.float32), seed=0)
    rows, scores = empty.search(np.zeros((2, 4), np.float32), 10, {})
    assert rows.shape == scores.shape == (2, 0)
    index = built_index(spec, "l2", vectors_of("l2", 20, 4, seed=6))
    rows, scores = index.search(np.empty((0, 4), np.float32), 10, {})
    assert rows.shape == scores.shape == (0, 0)


@pytest.mark.parametrize("name", ["ivf_flat float32", "ivf_pq rows", "ivf_rabitq float16"])
def test_search_of_starved_inverted_lists_marks_what_is_missing_with_minus_one(name: str) -> None:
    _, vectors, index = indexed(name, "l2")
    rows, _ = index.search(vectors[:5], COUNT, {"nprobe": 1})
    found = (rows >= 0).sum(axis=1)
    assert (found > 0).all()
    assert (found < COUNT).all()
    for line, hits in zip(rows, found, strict=True):
        assert (line[hits:] == -1).all()
        assert len(set(line[:hits].tolist())) == hits


@pytest.mark.parametrize(
    ("name", "params", "field", "known"),
    [
        ("flat", {"nprobe": 4}, "params.nprobe", "none"),
        ("flat", {"rerank": 4.0}, "params.rerank", "none"),
        ("ivf_flat float32", {"ef_search": 4}, "params.ef_search", "nprobe"),
        ("ivf_flat float32", {"nprobe": 4, "rerank": 2.0}, "params.rerank", "nprobe"),
        ("ivf_pq float16", {"ef_search": 4}, "params.ef_search", "nprobe, rerank"),
        ("hnsw float32", {"nprobe": 4, "ef_search": 16}, "params.nprobe", "ef_search"),
        ("hnsw sq8", {"nprobe": 4}, "params.nprobe", "ef_search, rerank"),
        ("HNSW16,SQ8", {"nprobe": 4}, "params.nprobe", "ef_search, rerank"),
        ("IVF32,Flat,RFlat", {"ef_search": 4}, "params.ef_search", "nprobe, rerank"),
    ],
)
def test_search_refuses_unknown_parameters_by_name_and_says_what_it_takes(
    name: str, params: dict[str, float], field: str, known: str
) -> None:
    spec, vectors, index = indexed(name, "l2")
    with pytest.raises(Invalid, match=f"does not fit a {spec.kind} index; it takes: {known}$") as caught:
        index.search(vectors[:1], 5, params)
    assert [error.field for error in caught.value.errors] == [field]


def recalls_by_effort(name: str, values: list[dict[str, float]]) -> list[float]:
    _, vectors, index = indexed(name, "l2", 3_000)
    queries = vectors_of("l2", 100, DIMENSION, seed=25)
    truth = true_rows(queries, vectors, 10, "l2")
    return [float(recall_at_k(index.search(queries, 10, params)[0], truth).mean()) for params in values]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hnsw float16", [{"ef_search": 10}, {"ef_search": 30}, {"ef_search": 300}]),
        ("HNSW16,SQ8", [{"ef_search": 10}, {"ef_search": 100}]),
        ("ivf_flat float16", [{"nprobe": 1}, {"nprobe": 6}, {"nprobe": 70}]),
        ("ivf_pq float16", [{"nprobe": 70, "rerank": 1}, {"nprobe": 70, "rerank": 4}, {"nprobe": 70, "rerank": 32}]),
        ("ivf_rabitq float16", [{"nprobe": 1, "rerank": 32}, {"nprobe": 8, "rerank": 32}]),
        ("IVF32,Flat,RFlat", [{"nprobe": 1, "rerank": 2}, {"nprobe": 8, "rerank": 2}]),
        ("IVF32,PQ4x4fsr", [{"nprobe": 1}, {"nprobe": 8}]),
    ],
)
def test_search_parameters_reach_the_level_of_the_index_that_they_are_for(
    name: str, values: list[dict[str, float]]
) -> None:
    recalls = recalls_by_effort(name, values)
    assert recalls == sorted(recalls)
    assert len(set(recalls)) == len(recalls), recalls


def test_search_parameters_do_not_outlive_their_call() -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=9)
    index = built_index(spec_of(INDEXES["ivf_flat float32"], COUNT, DIMENSION), "l2", vectors)
    before = index.search(vectors[:5], 50, {"nprobe": 1})[0]
    index.search(vectors[:5], 50, {"nprobe": 8})
    np.testing.assert_array_equal(index.search(vectors[:5], 50, {"nprobe": 1})[0], before)


@pytest.mark.parametrize("name", QUICK)
def test_index_with_reserved_memory_is_the_same_and_keeps_its_place(name: str) -> None:
    """Where its codes lie in one array, that is not moved while it fills."""
    vectors, queries = vectors_of("l2", COUNT, DIMENSION, 1), vectors_of("l2", QUERIES, DIMENSION, 2)
    spec = spec_of(INDEXES[name], COUNT, DIMENSION)
    plain = built_index(spec, "l2", vectors)
    index = build_index(spec, DIMENSION, "l2", vectors[: spec.training_points(COUNT)], 3)
    index.reserve(COUNT)
    places = set()
    for start in range(0, COUNT, 50):
        index.add(vectors[start : start + 50])
        places.add(place_of_codes(index))
    assert len(places) == 1
    if "hnsw" not in name.lower():  # whose links depend on what is added at one time
        for found, expected in zip(
            index.search(queries, 5, wide_open(index)), plain.search(queries, 5, wide_open(plain)), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def place_of_codes(index: FaissIndex) -> int:
    """The address of the codes; 0 of an index that keeps all of them in lists."""
    level = faiss.downcast_index(index._index)
    if isinstance(level, faiss.IndexHNSW):
        level = faiss.downcast_index(level.storage)
    level = faiss.downcast_index(getattr(level, "refine_index", level))
    return int(level.codes.data()) if isinstance(level, faiss.IndexFlatCodes) else 0


@pytest.mark.parametrize(("name", "metric"), BY_METRIC)
def test_callers_arrays_are_left_alone_and_may_be_read_only(name: str, metric: Metric) -> None:
    vectors = vectors_of(metric, 400, DIMENSION, seed=10) * np.float32(2.0)  # not unit length: normalising would show
    queries = vectors_of(metric, 10, DIMENSION, seed=11) * np.float32(3.0)
    kept = vectors.copy(), queries.copy()
    vectors.flags.writeable = queries.flags.writeable = False
    index = built_index(spec_of(INDEXES[name], 400, DIMENSION, metric), metric, vectors)
    selection = RowSelection.of(np.arange(400) % 2 == 0)
    selection.bits.flags.writeable = False
    bits = selection.bits.copy()
    index.search(queries, 10, {}, selection)
    np.testing.assert_array_equal(vectors, kept[0])
    np.testing.assert_array_equal(queries, kept[1])
    np.testing.assert_array_equal(selection.bits, bits)


def test_search_of_queries_that_are_not_contiguous_equals_that_of_a_copy() -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=12)
    index = built_index(spec_of(INDEXES["hnsw float32"], COUNT, DIMENSION), "l2", vectors)
    queries = np.asfortranarray(vectors_of("l2", 2 * QUERIES, DIMENSION, seed=13))[::2]
    for strided, copied in zip(index.search(queries, 5, {}), index.search(queries.copy("C"), 5, {}), strict=True):
        np.testing.assert_array_equal(strided, copied)


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage"])
@pytest.mark.parametrize("name", INDEXES)
def test_load_of_a_damaged_file_names_the_object(name: str, damage: str, tmp_path: Path) -> None:
    # A flipped bit inside the vectors still loads: the checksum of the segment guards against that.
    spec, _, index = indexed(name, "l2")
    path = tmp_path / "index"
    index.save(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2]}.get(damage, b"garbage" * 100))
    with pytest.raises(Corrupt, match=r"words/index\.faiss: FAISS cannot read it"):
        load_index(path, spec, DIMENSION, "l2", COUNT, "words/index.faiss")


def test_load_of_a_missing_file_is_no_corruption(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_index(
            tmp_path / "index",
            spec_of(INDEXES["hnsw float32"], COUNT, DIMENSION),
            DIMENSION,
            "l2",
            COUNT,
            "words/index.faiss",
        )


@pytest.mark.parametrize(
    ("dimension", "metric", "count"),
    [(17, "l2", COUNT), (16, "ip", COUNT), (16, "l2", COUNT - 1)],
    ids=["dimension", "metric", "count"],
)
@pytest.mark.parametrize("name", INDEXES)
def test_load_of_an_index_that_is_not_the_one_described_names_the_object(
    name: str, dimension: int, metric: Metric, count: int, tmp_path: Path
) -> None:
    spec, _, index = indexed(name, "l2")
    index.save(tmp_path / "index")
    with pytest.raises(Corrupt, match=r"words/index.faiss: \(dimension, count, metric\)"):
        load_index(tmp_path / "index", spec, dimension, metric, count, "words/index.faiss")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", [name for name in INDEXES if name not in FACTORIES and not INDEXES[name].pq_m])
def test_smallest_and_large_dimension_find_the_stored_vector(
    name: str, large: bool, metric: Metric, tmp_path: Path
) -> None:
    trains_slowly = name.startswith(("ivf_pq", "ivf_rabitq"))
    dimension = (1_000 if trains_slowly else 4_096) if large else 1
    vectors = vectors_of("cosine", 60, dimension, seed=19)  # of equal length: each is its own best match by any metric
    spec = spec_of(INDEXES[name], 60, dimension, metric)
    built_index(spec, metric, vectors).save(tmp_path / "index")
    index = load_index(tmp_path / "index", spec, dimension, metric, 60, "index")
    rows, scores = index.search(vectors, 1, wide_open(index))
    recall, error = expected_of(name)
    if recall > 0.5:
        np.testing.assert_allclose(scores[:, 0], 0.0 if metric == "l2" else 1.0, atol=min(error, 1e-2))
    if dimension > 1 and recall > 0.5:  # among unit vectors of one dimension half are equal
        np.testing.assert_array_equal(rows[:, 0], np.arange(60))


@pytest.mark.parametrize("name", QUICK)
def test_build_with_one_seed_gives_one_index(name: str, tmp_path: Path) -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=20)
    files = []
    for number in range(2):
        built_index(spec_of(INDEXES[name], COUNT, DIMENSION), "l2", vectors).save(tmp_path / str(number))
        files.append((tmp_path / str(number)).read_bytes())
    assert files[0] == files[1]


def test_build_with_another_seed_gives_other_lists(tmp_path: Path) -> None:
    vectors = vectors_of("l2", COUNT, DIMENSION, seed=20)
    for seed in (1, 2):
        built_index(spec_of(INDEXES["ivf_flat float32"], COUNT, DIMENSION), "l2", vectors, seed).save(
            tmp_path / f"{seed}"
        )
    assert (tmp_path / "1").read_bytes() != (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    ("name", "knob", "values"),
    [
        ("ivf_pq float16", "nprobe", (1, 60)),
        ("hnsw float16", "ef_search", (10, 400)),
        ("ivf_flat float32", "nprobe", (1, 60)),
    ],
)
def test_two_threads_with_different_parameters_get_their_own_results(
    name: str, knob: str, values: tuple[int, int]
) -> None:
    _, _, index = indexed(name, "l2", 3_000)
    queries = vectors_of("l2", 64, DIMENSION, seed=27)
    alone = {value: index.search(queries, 10, {knob: value})[0] for value in values}
    assert (alone[values[0]] != alone[values[1]]).any()

    def many(value: int) -> list[Any]:
        use_threads(1)
        return [index.search(queries, 10, {knob: value})[0] for _ in range(30)]

    with ThreadPoolExecutor(2) as pool:
        for value, found in zip(values, pool.map(many, values), strict=True):
            assert all(np.array_equal(rows, alone[value]) for rows in found)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("metric", METRICS)
def test_check_accepts_factories_that_can_be_served(factory: str, metric: Metric) -> None:
    check_factory(factory, DIMENSION, metric)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("nonsense", "could not parse"),
        ("IVF32,PQ5", r"d % M == 0|multiple|divi"),
        ("IDMap,Flat", "labels must be row numbers: leave IDMap out"),
        ("IDMap2,HNSW16,SQ8", "leave IDMap out"),
        ("IVF100000000,Flat", "sizes must be 1 to 1048576"),
        ("IVF0,Flat", "sizes must be 1 to 1048576"),
        ("PQ8x24", "at most 12 bits"),
        ("IMI2x8,Flat", "IMI is not taken"),
        ("NSG32", "takes no filter"),
        ("PQ4", "takes no filter"),
        ("IVF16,RQ4x4", "takes no filter"),
        ("IVF16,PQ4+2", "takes no filter"),
        ("PCA8,IVF16,PQ4+2", "takes no filter"),
        ("IVF16,ITQ8,SH", "takes no filter"),
    ],
)
def test_check_refuses_a_factory_with_the_reason_and_what_would_do(factory: str, reason: str) -> None:
    with pytest.raises(Invalid, match=reason) as caught:
        check_factory(factory, DIMENSION, "l2")
    assert [error.field for error in caught.value.errors] == ["index.factory"]
    assert repr(factory) in str(caught.value)


def test_check_refuses_a_factory_that_does_not_take_the_metric() -> None:
    with pytest.raises(Invalid, match="does not take the metric ip"):
        check_factory("HNSW16,PQ4", DIMENSION, "ip")


def test_build_of_a_factory_from_too_few_points_says_so() -> None:
    spec = IndexSpec("factory", {}, "float32", 0, "", factory="IVF32,Flat")
    with pytest.raises(Invalid, match=r"IVF32,Flat of 20 points"):
        build_index(spec, DIMENSION, "l2", np.zeros((20, DIMENSION), np.float32), seed=0)


def test_library_facts_name_version_and_instruction_set() -> None:
    facts: dict[str, Any] = library_facts()
    assert set(facts) == {"faiss", "simd"}
    assert all(facts.values())


def test_index_of_an_odd_dimension_is_padded_and_keeps_its_dimension(tmp_path: Path) -> None:
    spec = spec_of(IndexConfig("ivf_pq", rerank_store="float32"), COUNT, 13)
    vectors = vectors_of("l2", COUNT, 13, seed=28)
    built_index(spec, "l2", vectors).save(tmp_path / "index")
    index = load_index(tmp_path / "index", spec, 13, "l2", COUNT, "index")
    rows, scores = index.search(vectors[:50], 1, wide_open(index))
    np.testing.assert_array_equal(rows[:, 0], np.arange(50))
    np.testing.assert_allclose(scores, 0.0, atol=1e-5)
