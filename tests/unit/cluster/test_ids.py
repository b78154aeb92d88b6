"""Ids: what is refused, and the hash that stored data depends on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import IdType
from cluster.errors import Invalid
from cluster.ids import INT64_MAX, INT64_MIN, hash_ids, id_array

# Stored rows are ordered and routed by these values: a change here loses every stored point.
INT64_GOLDEN = {
    0: 0xE220A8397B1DCDAF,  # the first output of SplitMix64 seeded with 0, as published
    1: 0x910A2DEC89025CC1,
    2: 0x975835DE1C9756CE,
    -1: 0xE4D971771B652C20,
    -2: 0xF3203E9039F4A821,
    10**12: 0xF321EACBEA530978,
    -(10**12): 0xA16C8D29C1D320A5,
    INT64_MAX: 0x2A67D7552E039EA7,
    INT64_MIN: 0x481EC0A212A9F3DB,
}
STRING_GOLDEN = {
    "": 0x2D06800538D394C2,  # XXH3_64bits of nothing, as in xxHash's own test vectors
    "a": 0xE6C632B61E964E1F,
    "0": 0x1982E3A7BB241055,
    "hello world": 0xD447B1EA40E6988B,
    "löwe": 0x466BF7BDD2F5563A,
    "日本語": 0x11FEC42C806050B7,
    "🐟": 0xCAA3A4C4F312AB68,
    "a\0b": 0xD5A06CD078125351,
    "x" * 300: 0xA5D1B4607DC83554,
}


def splitmix64(value: int) -> int:
    """The published finaliser, on Python integers."""
    mask = 2**64 - 1
    mixed = (value + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def hashes(values: list[int] | list[str], id_type: IdType) -> list[int]:
    result = hash_ids(id_array(values, id_type))
    assert result.dtype == np.uint64
    return [int(value) for value in result]


@pytest.mark.parametrize(("value", "digest"), INT64_GOLDEN.items())
def test_int64_hash_is_pinned(value: int, digest: int) -> None:
    assert hashes([value], "int64") == [digest]


@pytest.mark.parametrize(("value", "digest"), STRING_GOLDEN.items())
def test_string_hash_is_pinned(value: str, digest: int) -> None:
    assert hashes([value], "string") == [digest]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(INT64_MIN, INT64_MAX), max_size=20))
def test_int64_hash_is_the_published_function(values: list[int]) -> None:
    assert hashes(values, "int64") == [splitmix64(value % 2**64) for value in values]


def test_hash_of_a_slice_is_the_slice_of_the_hash() -> None:
    for ids in (id_array(list(range(-5, 5)), "int64"), id_array([f"id {i}" for i in range(10)], "string")):
        assert hash_ids(ids.slice(3, 4)).tolist() == hash_ids(ids)[3:7].tolist()


def test_string_hash_does_not_depend_on_the_arrow_string_type() -> None:
    texts = ["", "a", "löwe", "日本"]
    assert hash_ids(pa.array(texts, pa.string())).tolist() == hash_ids(pa.array(texts, pa.large_string())).tolist()


def test_id_array_has_the_type_of_the_collection() -> None:
    assert id_array([1, INT64_MIN, INT64_MAX], "int64").type == pa.int64()
    assert id_array([1, INT64_MIN, INT64_MAX], "int64").to_pylist() == [1, INT64_MIN, INT64_MAX]
    assert id_array(["", "a"], "string").type == pa.large_string()
    assert id_array([], "int64").type == pa.int64()
    assert len(id_array([], "string")) == 0


@pytest.mark.parametrize("wrong", [INT64_MAX + 1, INT64_MIN - 1, 1.0, "1", None, True, b"1"])
def test_id_array_refuses_what_is_no_int64_and_names_the_position(wrong: object) -> None:
    with pytest.raises(Invalid) as caught:
        id_array([0, 1, wrong, wrong], "int64")  # type: ignore[list-item]
    assert [error.field for error in caught.value.errors] == ["ids[2]"]
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", [1, None, b"a", 1.5, True])
def test_id_array_refuses_what_is_no_string_and_names_the_position(wrong: object) -> None:
    with pytest.raises(Invalid) as caught:
        id_array(["a", wrong], "string")  # type: ignore[list-item]
    assert [error.field for error in caught.value.errors] == ["ids[1]"]


def test_id_array_refuses_a_lone_surrogate() -> None:
    with pytest.raises(Invalid, match="UTF-8"):
        id_array(["a", "\ud800"], "string")
