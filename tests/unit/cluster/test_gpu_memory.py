"""Bytes on a GPU: the formulas term by term, and what holds for every index."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import index_costs
from cluster.config import CollectionConfig
from cluster.gpu_memory import (
    ADDED_AT_ONCE,
    BATCH_MAX,
    GPU_MARGIN,
    GRAPH_QUERY_BYTES,
    TILE_BYTES,
    WORKSPACE_BYTES,
    GpuNeed,
    build_bytes,
    gpu_need,
    host_build_bytes,
    host_load_bytes,
    index_bytes,
    nn_descent_bytes,
    refusal,
    search_bytes,
    sized,
)
from cluster.index_spec import IndexSpec

few = settings(max_examples=200, deadline=None, derandomize=True)


def spec(kind: Any, codes: Any = "float32", **params: int) -> IndexSpec:
    return IndexSpec(kind, params, codes, 0, "", rerank_store="rows", device="gpu")


FLAT = spec("flat")
CAGRA = spec("cagra", graph_degree=64, intermediate_graph_degree=128)
IVF_FLAT = spec("ivf_flat", nlist=100)
IVF_PQ = spec("ivf_pq", nlist=100, pq_m=48, pq_bits=8)
SPECS = [FLAT, replace(FLAT, codes="float16"), CAGRA, replace(CAGRA, codes="float16"), IVF_FLAT, IVF_PQ]


@pytest.mark.parametrize(
    ("built", "dimension", "expected"),
    [
        (FLAT, 96, 1_000_000 * (4 * 96 + 4)),
        (replace(FLAT, codes="float16"), 96, 1_000_000 * (2 * 96 + 4)),
        (CAGRA, 96, 1_000_000 * (4 * 96 + 4 * 64)),
        (replace(CAGRA, codes="float16"), 96, 1_000_000 * (2 * 96 + 4 * 64)),
        (replace(CAGRA, codes="float16"), 97, 1_000_000 * (208 + 4 * 64)),  # rows begin at multiples of 16 bytes
        (IVF_FLAT, 96, (1_000_000 + 100 * 31 / 2) * (4 * 96 + 8) + 100 * (8 * 96 + 16)),
        (
            IVF_PQ,
            96,
            (1_000_000 + 100 * 31 / 2) * (48 + 8) + 100 * (8 * 96 + 16) + 4 * 96 * 256 + 4 * 96 * (96 + 100),
        ),
    ],
)
def test_loaded_index_takes_vectors_links_labels_and_centroids(built: IndexSpec, dimension: int, expected: int) -> None:
    assert index_bytes(built, 1_000_000, dimension) == ceil(expected)


def test_codes_of_a_list_fill_whole_chunks() -> None:
    of_a_chunk, of_two = (replace(IVF_PQ, params=IVF_PQ.params | {"pq_m": size}) for size in (16, 17))
    assert index_bytes(of_two, 1_000_000, 272) - index_bytes(of_a_chunk, 1_000_000, 272) == ceil(1_001_550 * 16)


def test_kind_that_no_gpu_has_is_an_error_of_the_caller() -> None:
    with pytest.raises(KeyError):
        index_bytes(spec("hnsw", m=32, ef_construction=100), 1_000, 8)


def test_search_takes_queries_answers_the_selection_and_its_kind_of_space() -> None:
    moved = 512 * (4 * 96 + 2 * 10 * 12)
    assert search_bytes(FLAT, 96, 512, 10) == moved + TILE_BYTES
    assert search_bytes(FLAT, 96, 512, 10, 10_000) == moved + 1_250 + 2 * 4 * 512 * 10_000
    assert search_bytes(CAGRA, 96, 512, 10, 10_000) == moved + 1_250 + 512 * GRAPH_QUERY_BYTES
    few_lists = moved + 1_250 + 512 * (4 * (3 * 100 + 96) + 12 * 100 * 10)
    assert search_bytes(IVF_FLAT, 96, 512, 10, 10_000) == few_lists


def test_search_of_lists_for_many_hits_keeps_every_distance_up_to_the_workspace() -> None:
    moved = 4 * 96 + 2 * 257 * 12
    assert search_bytes(IVF_FLAT, 96, 1, 257, 8_000) == moved + 1_000 + 4 * (3 * 100 + 96) + 4 * (8_000 + 100)
    assert search_bytes(IVF_FLAT, 96, 1, 257) == moved + WORKSPACE_BYTES
    assert search_bytes(IVF_PQ, 96, 512, 2_048, 10**9) - 10**9 // 8 == 512 * (4 * 96 + 2 * 2_048 * 12) + WORKSPACE_BYTES


def test_build_peaks_beside_the_index() -> None:
    batch = 4 * 96 * ADDED_AT_ONCE
    assert build_bytes(FLAT, 10**6, 96) == index_bytes(FLAT, 10**6, 96) + batch
    assert build_bytes(CAGRA, 10**6, 96) == index_bytes(CAGRA, 10**6, 96) + 10**6 * (4 + 5 * 128)
    sample = 4 * 96 * 100 * 128
    spare = 100 * 512 * (4 * 96 + 8)
    assert build_bytes(IVF_FLAT, 10**6, 96) == index_bytes(IVF_FLAT, 10**6, 96) + batch + sample + spare
    sample, spare = 4 * 96 * 65_536, 100 * 512 * (48 + 8)
    assert build_bytes(IVF_PQ, 10**6, 96) == index_bytes(IVF_PQ, 10**6, 96) + batch + 2 * sample + spare


def test_nn_descent_takes_a_copy_of_the_vectors_and_never_less_than_the_graph() -> None:
    assert nn_descent_bytes(CAGRA, 1_000, 384) == 1_000 * (2 * 384 + 276)
    assert nn_descent_bytes(CAGRA, 1_000, 96) == 1_000 * (4 + 5 * 128)


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (CAGRA, 10**6 * 96 * 4),  # all vectors in one piece
        (replace(CAGRA, codes="float16"), 10**6 * 96 * 2),
        (IVF_FLAT, 100 * 128 * 96 * 4),
        (FLAT, 0),
        (replace(IVF_FLAT, device="cpu"), 100 * 128 * 96 * 4),
    ],
)
def test_host_memory_of_a_build_is_what_is_trained_on(built: IndexSpec, expected: int) -> None:
    assert host_build_bytes(built, 10**6, 96) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (CAGRA, 10**6 * (CAGRA.params["graph_degree"] * (8 + 4) + 12)),  # links in 64 bits, and again in 32
        (replace(CAGRA, codes="float16"), 10**6 * (CAGRA.params["graph_degree"] * (8 + 4) + 12)),
        (IVF_FLAT, 0),
        (FLAT, 0),
    ],
)
def test_host_memory_of_a_load_is_the_graph_that_is_copied_twice(spec: IndexSpec, expected: int) -> None:
    assert host_load_bytes(spec, 10**6) == expected


def test_need_has_the_margin_and_a_peak_that_is_no_less_than_the_load() -> None:
    need = GpuNeed(1_000, 200, 1_100)
    assert (need.load, need.peak) == (ceil(1_200 * GPU_MARGIN), ceil(1_200 * GPU_MARGIN))
    assert GpuNeed(1_000, 200, 5_000).peak == ceil(5_000 * GPU_MARGIN)


@few
@given(st.sampled_from(SPECS), st.integers(0, 10**8), st.sampled_from([16, 96, 768]))
def test_need_grows_with_the_count_and_covers_the_largest_batch(built: IndexSpec, count: int, dimension: int) -> None:
    need, more = (gpu_need(built, n, dimension) for n in (count, count + 1_000))
    assert need.index <= more.index
    assert need.search <= more.search
    assert need.index <= need.build <= more.build
    assert need.search >= search_bytes(built, dimension, BATCH_MAX, 10, count)
    assert need.load >= need.index + need.search


def test_float16_rows_are_there_twice_for_a_moment_while_they_are_loaded() -> None:
    full, half = (gpu_need(spec("flat", codes), 10_000_000, 768) for codes in ("float32", "float16"))
    assert (full.moved, half.moved) == (0, half.index)
    assert half.load == 2 * half.index > ceil((half.index + half.search) * GPU_MARGIN)


def test_refusal_tells_both_numbers_and_nothing_where_it_fits_or_nobody_knows() -> None:
    assert refusal(11, 10, "cagra") == "cagra takes 11 bytes of GPU memory, 10 can be had"
    assert refusal(11, -5, "it") == "it takes 11 bytes of GPU memory, 0 can be had"
    assert refusal(10, 10, "it") == refusal(10**15, None, "it") == ""


def test_spec_is_sized_for_the_gpu_and_for_its_twin() -> None:
    config = CollectionConfig(96)
    there = sized(CAGRA, 10**6, config)
    assert there.gpu_bytes == index_bytes(CAGRA, 10**6, 96)
    assert there.predicted_bytes == index_costs.index_bytes(CAGRA, 10**6, 96) == 10**6 * (4 * 96 + 4 * 64 + 16)
    assert sized(replace(IVF_FLAT, device="cpu"), 10**6, config).gpu_bytes == 0
