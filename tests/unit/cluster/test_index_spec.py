"""What a spec is built from and searched with: factory strings, grids, numbers of lists and of training points."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import CollectionConfig, IndexConfig, RerankStore
from cluster.errors import Invalid
from cluster.index_policy import choose
from cluster.index_spec import (
    EF_SEARCH_MAX,
    GRAPH_COARSE_LISTS,
    KNOB_STEP,
    POINTS_PER_CENTROID_MIN,
    RERANK_GRID,
    TRAINING_POINTS_FACTORY,
    TRAINING_POINTS_PQ,
    TRAINING_POINTS_SQ8,
    IndexSpec,
    clamped_nlist,
    fewest_training_points,
    knob_grid,
    nlist,
    search_grid,
)

few = settings(max_examples=200, deadline=None, derandomize=True)


def spec(kind: Any, codes: Any = "float32", store: RerankStore = "none", factory: str = "", **params: int) -> IndexSpec:
    return IndexSpec(kind, params, codes, 0, "", rerank_store=store, factory=factory)


FLAT = spec("flat")
HNSW = spec("hnsw", "float16", "rows", m=32, ef_construction=100)
IVF_FLAT = spec("ivf_flat", nlist=64)
IVF_PQ = spec("ivf_pq", store="rows", nlist=64, pq_m=24, pq_bits=4)
RABITQ = spec("ivf_rabitq", store="float16", nlist=64)
CAGRA = replace(
    spec("cagra", "float16", "rows", graph_degree=32, intermediate_graph_degree=64), device="gpu", gpu_bytes=9
)


# ---- the string FAISS builds it from


@pytest.mark.parametrize(
    ("built", "dimension", "expected"),
    [
        (FLAT, 96, "Flat"),
        (spec("flat", "float16"), 96, "SQfp16"),
        (HNSW, 96, "HNSW32,SQfp16"),
        (spec("hnsw", "float32", m=16, ef_construction=40), 96, "HNSW16,Flat"),
        (spec("hnsw", "sq8", "rows", m=16, ef_construction=40), 96, "HNSW16,SQ8"),
        (IVF_FLAT, 96, "IVF64,Flat"),
        (spec("ivf_flat", "float16", nlist=64), 96, "IVF64,SQfp16"),
        (spec("ivf_flat", "float16", nlist=16_384), 96, "IVF16384_HNSW32,SQfp16"),
        (spec("ivf_flat", "float16", nlist=16_383), 96, "IVF16383,SQfp16"),
        (spec("ivf_sq8", store="rows", nlist=64), 96, "IVF64,SQ8"),
        (IVF_PQ, 96, "IVF64,PQ24x4fsr"),
        (IVF_PQ, 95, "Pad96,IVF64,PQ24x4fsr"),
        (IVF_PQ, 97, "Pad120,IVF64,PQ24x4fsr"),
        (spec("ivf_pq", nlist=64, pq_m=12, pq_bits=8), 96, "IVF64,PQ12x8np"),
        (spec("ivf_pq", nlist=64, pq_m=12, pq_bits=8), 91, "Pad96,IVF64,PQ12x8np"),
        (RABITQ, 384, "RR,IVF64,RaBitQfs,Refine(SQfp16)"),
        (replace(RABITQ, rerank_store="sq8"), 384, "RR,IVF64,RaBitQfs,Refine(SQ8)"),
        (replace(RABITQ, rerank_store="float32"), 384, "RR,IVF64,RaBitQfs,RFlat"),
        (replace(RABITQ, rerank_store="rows"), 384, "RR,IVF64,RaBitQfs"),
        (spec("factory", factory="OPQ8,IVF4,PQ8"), 96, "OPQ8,IVF4,PQ8"),
        (spec("factory", store="float16", factory="IVF4,PQ8"), 96, "IVF4,PQ8,Refine(SQfp16)"),
    ],
)
def test_factory_string_of_a_spec(built: IndexSpec, dimension: int, expected: str) -> None:
    assert built.factory_string(dimension) == expected


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (FLAT, "Flat"),
        (spec("flat", "float16", "rows"), "SQfp16"),
        (spec("ivf_flat", store="rows", nlist=GRAPH_COARSE_LISTS), "IVF16384,Flat"),
        (spec("ivf_pq", store="rows", nlist=GRAPH_COARSE_LISTS, pq_m=12, pq_bits=8), "IVF16384,PQ12x8np"),
    ],
)
def test_index_of_a_gpu_is_one_that_cpu_and_gpu_can_read(built: IndexSpec, expected: str) -> None:
    """Without a graph over the centroids: no GPU has one."""
    assert replace(built, device="gpu").factory_string(96) == expected


def test_graph_of_gpus_is_not_made_from_a_string() -> None:
    with pytest.raises(Invalid, match=r"cagra is built on a GPU: there is none in this process"):
        CAGRA.factory_string(96)


def test_lists_are_found_by_a_graph_from_a_bound_on() -> None:
    assert f"IVF{GRAPH_COARSE_LISTS}_HNSW32," in spec("ivf_sq8", nlist=GRAPH_COARSE_LISTS).factory_string(8)
    assert f"IVF{GRAPH_COARSE_LISTS - 1}," in spec("ivf_sq8", nlist=GRAPH_COARSE_LISTS - 1).factory_string(8)


# ---- how it is searched and tuned


@pytest.mark.parametrize(
    ("built", "knobs"),
    [
        (FLAT, ()),
        (HNSW, ("ef_search",)),
        (IVF_FLAT, ("nprobe",)),
        (spec("ivf_sq8", store="rows", nlist=4), ("nprobe",)),
        (IVF_PQ, ("nprobe", "rerank")),
        (RABITQ, ("nprobe", "rerank")),
        (replace(RABITQ, rerank_store="none"), ("nprobe",)),
        (CAGRA, ("itopk_size", "search_width")),
    ],
)
def test_tuned_knobs_belong_to_the_kind(built: IndexSpec, knobs: tuple[str, ...]) -> None:
    assert built.tuned_knobs == knobs


@pytest.mark.parametrize(
    ("built", "candidates"),
    [
        (FLAT, 1.0),
        (HNSW, 1.0),
        (replace(HNSW, codes="sq8"), 2.0),
        (spec("ivf_sq8", store="rows", nlist=4), 2.0),
        (RABITQ, 1.0),
        (replace(RABITQ, rerank_store="sq8"), 2.0),
        (CAGRA, 1.0),
        (spec("flat", "float16"), 1.0),  # the rows' own precision
        (spec("flat", "float16", "rows"), 2.0),
        (spec("flat", "float32", "rows"), 1.0),
    ],
)
def test_rounded_codes_have_twice_the_candidates_reranked(built: IndexSpec, candidates: float) -> None:
    assert built.rerank == candidates


def test_only_flat_is_exact_whatever_the_knobs() -> None:
    assert [s.is_exact for s in (FLAT, HNSW, IVF_FLAT, IVF_PQ, RABITQ, CAGRA)] == [True, *[False] * 5]
    flats = [spec("flat", "float16"), spec("flat", "float32", "rows"), spec("flat", "float16", "rows")]
    assert [s.is_exact for s in flats] == [True, True, False]


def test_lists_are_exhaustive_when_all_are_probed_and_graphs_never() -> None:
    assert (FLAT.exhaustive_params, HNSW.exhaustive_params, CAGRA.exhaustive_params) == (None, None, None)
    assert [s.exhaustive_params for s in (IVF_FLAT, IVF_PQ, RABITQ)] == [{"nprobe": 64}] * 3


@few
@given(st.integers(1, 300), st.integers(0, 5_000))
def test_knob_grid_ascends_in_small_steps_from_end_to_end(low: int, more: int) -> None:
    high = low + more
    grid = knob_grid(low, high)
    assert (grid[0], grid[-1]) == (low, high)
    assert list(grid) == sorted(set(grid))
    assert all(after <= before * KNOB_STEP + 1.5 for before, after in pairwise(grid))


@pytest.mark.parametrize(
    ("knob", "count", "lists", "ends"),
    [
        ("ef_search", 1_000_000, 0, (10, EF_SEARCH_MAX)),
        ("ef_search", 500, 0, (10, 500)),
        ("ef_search", 3, 0, (10, 10)),
        ("ef_search", 0, 0, (10, 10)),
        ("nprobe", 1_000, 25, (1, 25)),
        ("nprobe", 1_000, 1, (1, 1)),
        ("nprobe", 0, 0, (1, 1)),
        ("rerank", 1_000, 25, (RERANK_GRID[0], RERANK_GRID[-1])),
        ("itopk_size", 1_000, 0, (32, 512)),
        ("search_width", 1_000, 0, (1, 8)),
    ],
)
def test_search_grid_ends_where_the_index_does(knob: str, count: int, lists: int, ends: tuple[int, int]) -> None:
    grid = search_grid(knob, count, lists)
    assert (grid[0], grid[-1]) == ends
    assert list(grid) == sorted(set(grid))


def test_candidates_of_a_gpu_s_graph_are_multiples_of_32() -> None:
    assert list(search_grid("itopk_size", 10**6, 0)) == [32 * step for step in range(1, 17)]
    assert list(search_grid("search_width", 10**6, 0)) == [1, 2, 4, 8]


# ---- lists and training points


@pytest.mark.parametrize(
    ("count", "lists"),
    [
        (0, 1),
        (1, 1),
        (38, 1),
        (77, 1),
        (78, 2),
        (1_000, 25),
        (10_000, 256),
        (50_000, 1_024),
        (100_000, 1_024),
        (200_000, 2_048),
        (999_999, 4_096),
        (1_000_000, 16_384),
        (9_999_999, 16_384),
        (10_000_000, 65_536),
        (10**9, 65_536),
    ],
)
def test_nlist_is_pinned(count: int, lists: int) -> None:
    assert nlist(count) == lists


@few
@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_lists_never_starve_a_centroid(count: int, wanted: int) -> None:
    for lists in (nlist(count), clamped_nlist(wanted, count)):
        assert lists == 1 or lists * POINTS_PER_CENTROID_MIN <= count
    assert 1 <= clamped_nlist(wanted, count) <= wanted
    if wanted * POINTS_PER_CENTROID_MIN <= count:
        assert clamped_nlist(wanted, count) == wanted


@few
@given(st.integers(0, 30_000_000), st.sampled_from(["ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq"]))
def test_lists_train_on_128_points_per_centroid(count: int, kind: Any) -> None:
    lists = nlist(count)
    built = spec(kind, nlist=lists, pq_m=4, pq_bits=4)
    least = {"ivf_pq": 256 * 16, "ivf_sq8": TRAINING_POINTS_SQ8}.get(kind, 0)
    assert built.training_points(count) == min(count, max(128 * lists, least))


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (FLAT, 0),
        (spec("flat", "float16"), 1),
        (spec("hnsw", "float32", m=32, ef_construction=100), 0),
        (HNSW, 1),
        (replace(HNSW, codes="sq8"), TRAINING_POINTS_SQ8),
        (replace(RABITQ, rerank_store="sq8"), TRAINING_POINTS_SQ8),
        (spec("ivf_pq", nlist=2, pq_m=4, pq_bits=8), TRAINING_POINTS_PQ),
        (spec("factory", factory="IVF4,SQ8"), TRAINING_POINTS_FACTORY),
        (CAGRA, 10**6),
    ],
)
def test_training_points_of_codes_and_stores(built: IndexSpec, expected: int) -> None:
    assert built.training_points(10**6) == expected
    assert built.training_points(7) == min(7, expected)


@pytest.mark.parametrize(("built", "least"), [(IVF_PQ, 16), (replace(IVF_PQ, params={"pq_bits": 8}), 256), (FLAT, 1)])
def test_fewest_training_points_are_one_per_codeword(built: IndexSpec, least: int) -> None:
    assert fewest_training_points(built) == least


# ---- as data


@pytest.mark.parametrize("built", [FLAT, HNSW, IVF_FLAT, IVF_PQ, RABITQ, CAGRA, spec("factory", factory="IVF4,SQ8")])
def test_spec_survives_json(built: IndexSpec) -> None:
    assert IndexSpec.from_dict(json.loads(json.dumps(built.to_dict()))) == built


def test_spec_tells_of_gpus_only_where_it_is_for_one() -> None:
    assert {"device", "gpu_bytes"} & HNSW.to_dict().keys() == set()
    assert (CAGRA.to_dict()["device"], CAGRA.to_dict()["gpu_bytes"]) == ("gpu", 9)


@pytest.mark.parametrize("kind", ["auto", "flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq"])
def test_chosen_spec_survives_json(kind: Any) -> None:
    chosen = choose(50_000, CollectionConfig(384, index=IndexConfig(kind=kind)))
    assert IndexSpec.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_spec_of_the_first_policy_is_read_without_the_newer_fields() -> None:
    written = {
        "kind": "hnsw",
        "params": {"m": 16, "ef_construction": 100},
        "codes": "float16",
        "predicted_bytes": 912,
        "reason": "a graph is fastest and fits",
        "policy_version": 1,
    }
    read = IndexSpec.from_dict(written)
    assert (read.rerank_store, read.factory, read.policy_version) == ("none", "", 1)
    assert read.factory_string(8) == "HNSW16,SQfp16"
    assert read.tuned_knobs == ("ef_search",)
