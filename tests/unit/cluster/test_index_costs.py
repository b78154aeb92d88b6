"""What an index costs: bytes by hand, and how predictions move with their inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Codes, RerankStore
from cluster.index_costs import (
    PRECOMPUTED_BYTES_MAX,
    RECALL_REACHED,
    RECALL_UNRANKED,
    REFERENCE,
    build_seconds,
    index_bytes,
    queries_per_s,
    reachable_recall,
)
from cluster.index_spec import GRAPH_COARSE_LISTS, IndexSpec, nlist

few = settings(max_examples=200, deadline=None, derandomize=True)
KINDS = ("flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq", "factory")


def spec(kind: Any, codes: Codes = "float32", store: RerankStore = "none", **params: int) -> IndexSpec:
    return IndexSpec(kind, params, codes, 0, "", rerank_store=store)


def spec_at(kind: Any, count: int, dimension: int) -> IndexSpec:
    """With the parameters that the policy gives it at that count."""
    params = {"m": 32, "ef_construction": 100} if kind == "hnsw" else {}
    if kind.startswith("ivf"):
        params = {"nlist": nlist(count), "pq_m": -(-dimension // 4), "pq_bits": 4}
    return spec(kind, **params)


# ---- bytes, each term by hand


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (spec("flat"), 1_000 * 96 * 4),
        (spec("flat", "float16"), 1_000 * 96 * 2),
        (spec("factory"), 1_000 * (96 * 4 + 8)),
        # codes, 2 M neighbours of 4 bytes, 16 for what else a point has
        (spec("hnsw", "float32", m=32, ef_construction=1), 1_000 * (96 * 4 + 2 * 32 * 4 + 16)),
        (spec("hnsw", "float16", m=16, ef_construction=1), 1_000 * (96 * 2 + 2 * 16 * 4 + 16)),
        (spec("hnsw", "sq8", m=32, ef_construction=1), 1_000 * (96 + 2 * 32 * 4 + 16)),
        # codes and row numbers; per list a centroid and two views
        (spec("ivf_flat", nlist=20), 1_000 * (96 * 4 + 8) + 20 * (96 * 4 + 160)),
        (spec("ivf_flat", "float16", nlist=20), 1_000 * (96 * 2 + 8) + 20 * (96 * 4 + 160)),
        (spec("ivf_sq8", nlist=20), 1_000 * (96 + 8) + 20 * (96 * 4 + 160)),
        # and 256 codewords, with each list's distances to them
        (
            spec("ivf_pq", nlist=20, pq_m=12, pq_bits=8),
            1_000 * (12 + 8) + 20 * (96 * 4 + 160) + 96 * 256 * 4 + 20 * 12 * 256 * 4,
        ),
        # 50 a list: 65.5 with the block half empty, 12 bytes each, 1.38 times as much allocated
        (
            spec("ivf_pq", nlist=20, pq_m=24, pq_bits=4),
            20 * 65.5 * 12 * 1.38 + 1_000 * 8 + 20 * (96 * 4 + 120) + 96 * 16 * 4 + 20 * 24 * 16 * 4,
        ),
        # 96 bits and two factors; the rotation
        (
            spec("ivf_rabitq", nlist=20),
            20 * 65.5 * 20 * 1.38 + 1_000 * 8 + 20 * (96 * 4 + 120) + 96 * 96 * 4,
        ),
    ],
)
def test_bytes_of_a_thousand_vectors_of_96_dimensions(built: IndexSpec, expected: float) -> None:
    assert index_bytes(built, 1_000, 96) == pytest.approx(expected, abs=1.0)


def test_spare_capacity_of_a_long_list_is_a_page() -> None:
    codes = (100_000 + 15.5) * 20
    assert index_bytes(spec("ivf_rabitq", nlist=1), 100_000, 96) == pytest.approx(
        codes + 4_096 + 800_000 + 96 * 4 + 120 + 96 * 96 * 4, abs=1.0
    )


def test_dimensions_that_are_filled_up_are_stored() -> None:
    odd = index_bytes(spec("ivf_pq", nlist=20, pq_m=24, pq_bits=4), 1_000, 93)
    assert odd == index_bytes(spec("ivf_pq", nlist=20, pq_m=24, pq_bits=4), 1_000, 96)


@pytest.mark.parametrize(
    ("store", "number_bytes"), [("none", 0), ("rows", 0), ("sq8", 1), ("float16", 2), ("float32", 4)]
)
def test_rerank_store_adds_its_copy_of_the_vectors(store: RerankStore, number_bytes: int) -> None:
    base = spec("ivf_rabitq", nlist=20)
    added = index_bytes(replace(base, rerank_store=store), 1_000, 96) - index_bytes(base, 1_000, 96)
    assert added == 1_000 * 96 * number_bytes


def test_many_lists_have_a_graph_over_them() -> None:
    below, above = (index_bytes(spec("ivf_sq8", nlist=lists), 10**6, 8) for lists in (16_383, 16_384))
    assert GRAPH_COARSE_LISTS == 16_384
    assert above - below == 8 * 4 + 160 + 16_384 * (8 * 32 + 16)


def test_table_of_codeword_distances_that_is_too_large_is_not_made() -> None:
    lists = PRECOMPUTED_BYTES_MAX // (128 * 256 * 4)
    most, over = (index_bytes(spec("ivf_pq", nlist=n, pq_m=128, pq_bits=8), 0, 128) for n in (lists, lists + 1))
    assert most - over > 0.9 * PRECOMPUTED_BYTES_MAX


@pytest.mark.parametrize("kind", KINDS)
def test_empty_index_has_no_bytes_per_vector(kind: str) -> None:
    assert index_bytes(spec_at(kind, 0, 96), 0, 96) < 100_000


@few
@given(st.sampled_from(KINDS), st.integers(1, 2_000_000), st.integers(1, 2_000), st.integers(1, 2_000))
def test_bytes_grow_with_dimension_and_count(kind: str, count: int, dimension: int, more: int) -> None:
    built = spec_at(kind, count, dimension)
    assert index_bytes(built, count, dimension) <= index_bytes(built, count + more, dimension)
    wider = spec_at(kind, count, dimension + more)
    assert index_bytes(built, count, dimension) <= index_bytes(wider, count, dimension + more)
    assert isinstance(index_bytes(built, count, dimension), int)


# ---- seconds to build


@few
@given(st.sampled_from(KINDS), st.integers(0, 900_000), st.integers(1, 2_000), st.integers(1, 2_000))
def test_build_seconds_grow_with_dimension_and_count(kind: str, count: int, dimension: int, more: int) -> None:
    built = spec_at(kind, count, dimension)
    seconds = build_seconds(built, count, dimension, REFERENCE)
    assert 0.0 <= seconds <= build_seconds(built, count + more, dimension, REFERENCE)
    assert seconds <= build_seconds(built, count, dimension + more, REFERENCE)


def test_build_seconds_are_those_of_the_rates() -> None:
    graph, lists = spec_at("hnsw", 50_000, 96), spec_at("ivf_rabitq", 50_000, 96)
    for built, slower in ((graph, replace(REFERENCE, graph_ns=9_200.0)), (lists, replace(REFERENCE, flops=0.8e11))):
        seconds = build_seconds(built, 50_000, 96, REFERENCE)
        assert build_seconds(built, 50_000, 96, slower) == pytest.approx(2 * seconds)


def test_more_effort_at_construction_takes_longer() -> None:
    graph = spec("hnsw", m=32, ef_construction=100)
    seconds = build_seconds(graph, 50_000, 96, REFERENCE)
    more_effort = replace(graph, params={"m": 32, "ef_construction": 200})
    more_links = replace(graph, params={"m": 64, "ef_construction": 100})
    assert build_seconds(more_effort, 50_000, 96, REFERENCE) == pytest.approx(2 * seconds)
    assert seconds < build_seconds(more_links, 50_000, 96, REFERENCE) < 2 * seconds


# ---- recall and speed


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (spec("flat"), 1.0),
        (spec("flat", "float16"), 1.0),
        (spec("hnsw", "float32"), RECALL_REACHED),
        (spec("hnsw", "float16"), RECALL_UNRANKED["hnsw"]),
        (spec("hnsw", "float16", "rows"), RECALL_REACHED),
        (spec("ivf_flat"), RECALL_REACHED),
        (spec("ivf_flat", "float16"), RECALL_UNRANKED["ivf_flat"]),
        (spec("ivf_sq8"), RECALL_UNRANKED["ivf_sq8"]),
        (spec("ivf_pq"), RECALL_UNRANKED["ivf_pq"]),
        (spec("ivf_pq", store="sq8"), RECALL_REACHED),
        (spec("ivf_rabitq", store="rows"), RECALL_REACHED),
        (spec("factory"), RECALL_REACHED),
    ],
)
def test_reachable_recall_of_codes_and_stores(built: IndexSpec, expected: float) -> None:
    assert reachable_recall(built) == expected


def test_codes_as_precise_as_the_rows_lose_nothing_in_a_graph() -> None:
    assert reachable_recall(spec("hnsw", "float16"), "float16") == RECALL_REACHED
    assert reachable_recall(spec("hnsw", "sq8"), "float16") == RECALL_UNRANKED["hnsw"]
    assert reachable_recall(spec("ivf_flat", "float16"), "float16") == RECALL_UNRANKED["ivf_flat"]


@pytest.mark.parametrize("kind", KINDS)
def test_more_recall_is_never_faster_and_more_threads_never_slower(kind: str) -> None:
    built = spec_at(kind, 200_000, 384)
    rates = [queries_per_s(built, 200_000, 384, target, REFERENCE) for target in (0.5, 0.9, 0.95, 0.99, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0
    four = queries_per_s(built, 200_000, 384, 0.95, replace(REFERENCE, threads=4))
    assert four == pytest.approx(2 * rates[2])
