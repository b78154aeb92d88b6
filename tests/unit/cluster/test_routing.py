"""Routing: which shard takes a point, by ranges of the id's hash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Corrupt
from cluster.ids import hash_ids, id_array
from cluster.routing import Routing, slots_of_hashes

HASH_MAX = 2**64 - 1
hash_lists = st.lists(st.integers(0, HASH_MAX), min_size=1, max_size=50)
slot_counts = st.integers(1, 100_000)
few = settings(max_examples=100, deadline=None, derandomize=True)


def slots(hashes: list[int], count: int) -> list[int]:
    result = slots_of_hashes(np.array(hashes, dtype=np.uint64), count)
    assert result.dtype == np.int64
    return [int(slot) for slot in result]


@few
@given(hash_lists, slot_counts)
def test_slots_are_in_range_and_equal_the_formula(hashes: list[int], count: int) -> None:
    found = slots(hashes, count)
    assert found == [((value >> 32) * count) >> 32 for value in hashes]
    assert all(0 <= slot < count for slot in found)


@few
@given(hash_lists, slot_counts)
def test_slots_are_contiguous_ranges_of_hashes(hashes: list[int], count: int) -> None:
    found = slots(sorted(hashes), count)
    assert found == sorted(found)


@few
@given(hash_lists, st.integers(1, 1_024), st.integers(1, 1_000))
def test_slots_nest_in_the_slots_of_fewer(hashes: list[int], shards: int, pieces: int) -> None:
    assert [slot // pieces for slot in slots(hashes, shards * pieces)] == slots(hashes, shards)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1_024])
def test_first_and_last_hash_go_to_first_and_last_slot(count: int) -> None:
    assert slots([0, HASH_MAX], count) == [0, count - 1]


@pytest.mark.parametrize("shards", [2, 3, 8, 64])
def test_consecutive_ids_are_spread_evenly(shards: int) -> None:
    points = 200_000
    counts = np.bincount(Routing(shards).shards_of_ids(id_array(range(points), "int64")), minlength=shards)
    expected = points / shards
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)  # five standard deviations


def test_string_ids_are_spread_evenly() -> None:
    ids = id_array([f"n{number:08d}" for number in range(20_000)], "string")
    counts = np.bincount(Routing(8).shards_of_ids(ids), minlength=8)
    assert np.abs(counts - 2_500).max() < 5 * np.sqrt(2_500)


def test_shards_of_ids_are_pinned() -> None:
    ids = id_array([0, 1, -1, 2, 10**12], "int64")
    assert Routing(4).shards_of_ids(ids).tolist() == [3, 2, 3, 2, 3]
    assert Routing(4).shards_of_ids(ids).tolist() == [int(digest) >> 62 for digest in hash_ids(ids)]


def test_hash_routing_searches_every_shard() -> None:
    assert Routing(3).shards_to_search() == (0, 1, 2)


def test_routing_survives_its_dict() -> None:
    assert Routing(5).to_dict() == {"kind": "hash", "shards": 5}
    assert Routing.from_dict({"kind": "hash", "shards": 5}) == Routing(shards=5, kind="hash")


@pytest.mark.parametrize("kind", ["content", None, 1])
def test_routing_of_unknown_kind_is_corrupt(kind: object) -> None:
    with pytest.raises(Corrupt, match="unknown routing kind"):
        Routing.from_dict({"kind": kind, "shards": 5})
