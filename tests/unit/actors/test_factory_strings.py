"""Factory strings of every dimension are FAISS's, and indexes of odd dimensions answer."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.faiss_index import build_index, check_factory, faiss_metric
from cluster.config import KIND_OPTIONS, CollectionConfig, IndexConfig, Metric, RerankStore
from cluster.index_policy import choose, plan_index
from cluster.index_spec import RABITQ_DIMENSIONS, IndexSpec
from cluster.topk import recall_at_k

DIMENSION_MAX = 4_096
FEW_DIMENSIONS, STRIDE = 513, 17  # coprime to what dimensions are padded to
SAMPLED = (1, 2, 3, 5, 7, 8, 63, 64, 96, 100, 255, 256, 257, 384, 1_000, 1_536, 4_095, 4_096)
COUNT = 10_000  # of few lists: an untrained index with many is slow to make
CODES = ("float32", "float16", "sq8")
STORES: tuple[RerankStore, ...] = ("none", "rows", "sq8", "float16", "float32")


def named(dimension: int, count: int = COUNT) -> Iterator[IndexSpec]:
    """Every kind that can be named for a CPU, with every codes, bits and store that it takes."""
    for kind, options in KIND_OPTIONS.items():
        if kind in ("auto", "factory", "cagra") or (kind == "ivf_rabitq" and dimension > RABITQ_DIMENSIONS[1]):
            continue
        for codes in CODES[: 2 if kind == "flat" else 3] if "codes" in options else (None,):
            for bits in (4, 8) if "pq_bits" in options else (None,):
                for store in STORES if "rerank_store" in options else (None,):
                    index = IndexConfig(kind, 0.5, codes=codes, pq_bits=bits, rerank_store=store)  # type: ignore[arg-type]
                    yield choose(count, CollectionConfig(dimension, index=index))


def considered(dimension: int) -> Iterator[IndexSpec]:
    """Every index the policy may choose by itself, and the file of which a CPU can build."""
    for dtype in ("float32", "float16"):
        config = CollectionConfig(dimension, vector_dtype=dtype, index=IndexConfig(device="gpu"))  # type: ignore[arg-type]
        yield from (each.spec for each in plan_index(COUNT, config).considered if each.spec.kind != "cagra")


def assert_faiss_makes(spec: IndexSpec, dimension: int) -> None:
    index = faiss.index_factory(dimension, spec.factory_string(dimension), faiss.METRIC_L2)
    assert (index.d, index.ntotal) == (dimension, 0)


def test_every_dimension_has_factory_strings_that_faiss_takes() -> None:
    """Of the compressed lists, whose strings depend on the dimension; rotations only where they are cheap to draw.

    Every small dimension, and of the large ones those of each remainder that a string may depend on.
    """
    for bits, store in ((4, "rows"), (8, "float16")):
        index = IndexConfig("ivf_pq", 0.5, pq_bits=bits, rerank_store=store)  # type: ignore[arg-type]
        made = ""
        for dimension in (*range(1, FEW_DIMENSIONS), *range(FEW_DIMENSIONS, DIMENSION_MAX + 1, STRIDE)):
            spec = choose(78, CollectionConfig(dimension, index=index))
            string = spec.factory_string(dimension)
            if string != made:  # dimensions that are padded to the same have one string: FAISS is asked once
                assert_faiss_makes(spec, dimension)
                made = string
            padded = string.partition(",")[0].removeprefix("Pad")
            assert not padded.isdigit() or dimension < int(padded) < dimension + bits, string


def test_every_dimension_has_strings_of_the_policy_that_differ_only_in_numbers() -> None:
    """The kinds beside product quantisers have the same string for every dimension: a sample of it stands for all."""
    for kind in ("hnsw", "ivf_flat", "ivf_sq8", "ivf_rabitq", "flat"):
        largest = RABITQ_DIMENSIONS[1] if kind == "ivf_rabitq" else DIMENSION_MAX
        config = [CollectionConfig(d, index=IndexConfig(kind, 0.5)) for d in (1, largest)]  # type: ignore[arg-type]
        strings = {choose(COUNT, each).factory_string(each.dimension) for each in config}
        assert len(strings) == 1


@pytest.mark.parametrize("dimension", SAMPLED)
def test_every_index_of_a_dimension_has_a_factory_string_that_faiss_takes(dimension: int) -> None:
    strings = {spec.factory_string(dimension): spec for spec in (*named(dimension), *considered(dimension))}
    assert len(strings) > 25
    for string, spec in strings.items():
        if not string.startswith("RR,") or dimension <= 1_536:  # a rotation is drawn when it is trained
            assert_faiss_makes(spec, dimension)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_factory_strings_of_the_policy_pass_the_check_of_a_named_one(metric: Metric) -> None:
    for spec in considered(17):
        check_factory(spec.factory_string(17), 17, metric)


# ---- small odd dimensions, really built

POINTS, QUERIES, K = 300, 20, 10
FLOORS = {"flat": 1.0, "hnsw": 0.95, "ivf_flat": 0.95, "ivf_sq8": 0.8}  # every list probed, codes ranked as they are


def vectors_of(count: int, dimension: int, metric: Metric, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def small_specs(dimension: int) -> list[IndexSpec]:
    seen = {spec.factory_string(dimension): spec for spec in named(dimension, POINTS)}
    return list(seen.values())


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 7, 17])
def test_every_kind_of_an_odd_dimension_is_built_and_answers(dimension: int, metric: Metric) -> None:
    points, queries = vectors_of(POINTS, dimension, metric, 1), vectors_of(QUERIES, dimension, metric, 2)
    truth, _ = exact_search(queries, iter([(0, points)]), K, metric)
    for spec in small_specs(dimension):
        index = build_index(spec, dimension, metric, points[: spec.training_points(POINTS)], 0)
        index.add(points)
        assert index.count == POINTS
        params = dict(spec.exhaustive_params or ({"ef_search": POINTS} if spec.kind == "hnsw" else {}))
        rerank = {"rerank": POINTS / K} if spec.rerank_store not in ("none", "rows") else {}
        found, scores = index.search(queries, K, params | rerank)
        name = f"{spec.factory_string(dimension)}, {dimension} dimensions, {metric}"
        assert found.shape == (QUERIES, K), name
        assert ((found >= 0) & (found < POINTS)).all(), name
        assert np.isfinite(scores).all(), name
        assert all(len(set(line)) == K for line in found.tolist()), name
        if metric == "cosine" and dimension == 1:
            continue  # all points are the same two: any of them is right
        codes_floor = 0.8 if "sq8" in (spec.codes, spec.rerank_store) else FLOORS.get(spec.kind, 0.0)
        rounded = spec.rerank_store in ("float16", "float32") or (spec.kind == "flat" and not spec.is_exact)
        floor = 0.95 if rounded else codes_floor
        assert recall_at_k(found, truth).mean() >= floor, name


def test_metric_of_faiss_is_that_of_the_collection() -> None:
    assert [faiss_metric(metric) for metric in ("cosine", "l2", "ip")] == [
        faiss.METRIC_L2,
        faiss.METRIC_L2,
        faiss.METRIC_INNER_PRODUCT,
    ]
