"""Hashes of Arrow values: equal for equal values wherever they lie, different for everything else."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.value_hashes import hash_row_values, hash_values

TEXTS = ["", "a", "b", "a\0", "\0a", "a\0\0", "ab", "\u00e9", "e\u0301", "a longer text than eight bytes", "0" * 300]
LISTS = [[], [0], [1], [0, 0], [0, 1], [1, 0], [None], [None, None], [1, None], [None, 1], [1, 0, 0]]
VALUES: list[tuple[Any, list[Any]]] = [
    (pa.bool_(), [True, False]),
    (pa.int8(), [0, 1, -1, 127, -128]),
    (pa.uint16(), [0, 1, 256, 65_535]),
    (pa.int64(), [0, 1, -1, 2**62, 2**32, -(2**63)]),
    (pa.float16(), [np.float16(0.5), np.float16(-0.5), np.float16(2.0)]),
    (pa.float32(), [0.0, -0.0, 1.5, float("inf"), float("nan")]),
    (pa.float64(), [0.0, 1.0, 1.0 + 2.0**-52, float("nan"), float("-inf")]),
    (pa.decimal128(20, 2), [Decimal("0.00"), Decimal("1.00"), Decimal("-1.00"), Decimal("123456789012345678.90")]),
    (pa.decimal256(50, 2), [Decimal("1.00"), Decimal("-1.00"), Decimal(10) ** 40]),
    (pa.date32(), [date(2020, 1, 1), date(2020, 1, 2)]),
    (pa.time64("us"), [time(1, 2, 3), time(1, 2, 4)]),
    (pa.timestamp("ms", tz="UTC"), [datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 2, tzinfo=UTC)]),
    (pa.duration("s"), [timedelta(seconds=1), timedelta(seconds=-1)]),
    (pa.string(), TEXTS),
    (pa.large_string(), TEXTS),
    (pa.dictionary(pa.int8(), pa.string()), TEXTS),
    (pa.binary(), [b"", b"\0", b"\0\0", b"a\0b", b"a\0c", b"\xff"]),
    (pa.binary(3), [b"abc", b"abd", b"\0\0\0", b"ab\0"]),
    (pa.binary(17), [bytes(17), bytes(16) + b"a", b"a" + bytes(16)]),
    (pa.list_(pa.int32()), LISTS),
    (pa.large_list(pa.int64()), LISTS),
    (pa.list_(pa.int32(), 2), [[0, 0], [0, 1], [1, 0], [None, 0], [0, None]]),
    (pa.list_(pa.list_(pa.string())), [[], [[]], [["a"], ["b"]], [["a", "b"]], [["a", "b"], []], [[], ["a"]], [None]]),
    (
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
        [{"a": 1, "b": "x"}, {"a": None, "b": "x"}, {"a": 1, "b": None}, {"a": None, "b": None}, {"a": 2, "b": "x"}],
    ),
    (pa.map_(pa.string(), pa.int64()), [[], [("a", 1)], [("a", None)], [("b", 1)], [("a", 1), ("b", 2)]]),
]  # fmt: skip
IDS = [str(dtype) for dtype, _ in VALUES]


@pytest.mark.parametrize(("dtype", "values"), VALUES, ids=IDS)
def test_values_that_differ_have_other_hashes_and_null_has_none(dtype: Any, values: list[Any]) -> None:
    hashes = hash_values(pa.array([*values, None], dtype))
    assert len(set(hashes.tolist())) == len(values) + 1
    assert hashes.dtype == np.uint64
    assert [*map(bool, hashes)] == [True] * len(values) + [False]


@pytest.mark.parametrize(("dtype", "values"), VALUES, ids=IDS)
def test_hash_is_that_of_the_value_wherever_it_lies(dtype: Any, values: list[Any]) -> None:
    """In a slice, after a null, taken in another order, in parts, and in a column that holds what is null otherwise."""
    column = pa.array([None, *values, None, *values[:1]], dtype)
    expected = hash_values(column)
    assert expected[1] == expected[-1]
    for start in range(len(column)):
        np.testing.assert_array_equal(hash_values(column[start:]), expected[start:])
        np.testing.assert_array_equal(hash_values(column[start : start + 2]), expected[start : start + 2])
    order = np.random.default_rng(1).permutation(len(column))
    np.testing.assert_array_equal(hash_values(column.take(pa.array(order))), expected[order])
    stored = pa.ipc.open_stream(_stream(column)).read_next_batch().column(0)
    np.testing.assert_array_equal(hash_values(stored), expected)
    assert hash_values(column[:0]).tolist() == []
    assert hash_values(pa.nulls(3, dtype)).tolist() == [0, 0, 0]


def _stream(column: Any) -> Any:
    batch = pa.record_batch([column], ["x"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write(batch)
    return sink.getvalue()


def test_what_is_behind_a_null_counts_for_nothing() -> None:
    valid = pa.array([True, False, True]).buffers()[1]
    columns = [pa.Array.from_buffers(pa.int64(), 3, [valid, pa.py_buffer(np.array([1, n, 3]))]) for n in (2, 99)]
    np.testing.assert_array_equal(hash_values(columns[0]), hash_values(columns[1]))


def test_dictionary_stands_for_its_values() -> None:
    plain = pa.array(["b", None, "a", "b"])
    one, other = plain.dictionary_encode(), pa.DictionaryArray.from_arrays([2, None, 0, 2], ["a", "-", "b", None])
    for column in (one, other):
        np.testing.assert_array_equal(hash_values(column), hash_values(plain))
    assert hash_values(pa.DictionaryArray.from_arrays(pa.array([3, 0]), ["a", "-", "b", None])).tolist()[0] == 0


@pytest.mark.parametrize(("dtype", "values"), [(pa.string_view(), TEXTS), (pa.list_view(pa.int32()), LISTS)])
def test_view_is_hashed_as_what_it_shows(dtype: Any, values: list[Any]) -> None:
    hashes = hash_values(pa.array([*values, None], dtype))
    assert len(set(hashes.tolist())) == len(values) + 1
    np.testing.assert_array_equal(hash_values(pa.array([None, *values, None], dtype)[1:]), hashes)


def test_type_without_a_rule_of_its_own_is_hashed_value_by_value() -> None:
    union = pa.UnionArray.from_sparse(
        pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["a", "b", "c"])]
    )  # 1, "b", 3
    assert len(set(hash_values(union).tolist())) == 3
    np.testing.assert_array_equal(hash_values(union.take(pa.array([2, 0]))), hash_values(union)[[2, 0]])


def test_rows_have_the_hash_of_their_columns_by_name_whatever_their_order() -> None:
    batch = pa.record_batch({"a": pa.array([1, 2, None]), "b": pa.array([1, None, None])})
    expected = hash_row_values(batch)
    np.testing.assert_array_equal(hash_row_values(batch.select(["b", "a"])), expected)
    more = pa.record_batch([*batch.columns, pa.nulls(3, pa.string())], ["a", "b", "never written"])
    np.testing.assert_array_equal(hash_row_values(more), expected)
    assert expected[2] == 0
    renamed = hash_row_values(batch.rename_columns(["b", "a"]))
    assert renamed[0] == expected[0], "both are 1"
    assert renamed[1] != expected[1]
