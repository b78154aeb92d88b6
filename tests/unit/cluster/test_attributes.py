"""Attribute columns: completed by nulls, and read as another type than they were written with."""

from __future__ import annotations

import datetime
import decimal
import logging
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from cluster.attributes import arrow_type, complete_columns, fitted

DICTIONARY = pa.dictionary(pa.int32(), pa.string())
NUMBERS = pa.list_(pa.int64())

# --- another type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        (pa.array([1, None, -2]), pa.string(), ["1", None, "-2"]),
        (pa.array([1, None, 2]), pa.float64(), [1.0, None, 2.0]),
        (pa.array([True, False]), pa.string(), ["true", "false"]),
        (pa.array(["a", None]), pa.large_string(), ["a", None]),
        (pa.array(["b", "a", "b", None]).dictionary_encode(), pa.string(), ["b", "a", "b", None]),
        (pa.array(["a", "b"]), DICTIONARY, ["a", "b"]),
        (pa.array([[1, 2], None]), pa.list_(pa.string()), [["1", "2"], None]),
        (pa.nulls(3), pa.int64(), [None] * 3),
        (pa.array([None, None], NUMBERS), pa.string(), [None, None]),
    ],
)
def test_values_that_all_fit_are_converted_without_a_warning(
    column: Any, dtype: Any, values: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cluster.attributes"):
        assert fitted(column, dtype, "n").equals(pa.array(values, dtype))
    if not pa.types.is_list(column.type):  # lists of nothing but nulls are converted one by one
        assert caplog.records == []


@pytest.mark.parametrize(
    ("column", "dtype", "values"),
    [
        (pa.array(["17", "x", None, "-3"]), pa.int64(), [17, None, None, -3]),
        (pa.array(["1.5", "", "2"]), pa.float64(), [1.5, None, 2.0]),
        (pa.array(["true", "maybe"]), pa.bool_(), [True, None]),
        (pa.array(["2020-01-02", "soon"]), pa.date32(), [datetime.date(2020, 1, 2), None]),
        (pa.array(["7", "a"]), pa.decimal128(5, 2), [decimal.Decimal("7.00"), None]),
        (pa.array([1.5, 2.0, float("nan"), float("inf"), None]), pa.int32(), [None, 2, None, None, None]),
        (pa.array([300, 7, -129]), pa.int8(), [None, 7, None]),
        (pa.array([2**53 + 1, 8]), pa.float64(), [None, 8.0]),
        (pa.array([b"a", b"\xff"]), pa.string(), ["a", None]),
        (pa.array(["1", "b", "1"]).dictionary_encode(), pa.int64(), [1, None, 1]),
        (pa.array([[1], None, [2]]), pa.string(), [None] * 3),
        (pa.array([1, 2]), NUMBERS, [None, None]),
        (pa.array([[1, 2], [3]]), pa.list_(pa.int64(), 2), [[1, 2], None]),
        (pa.array([{"a": 1}]), pa.int64(), [None]),
        (pa.array([1, 2]), DICTIONARY, [None, None]),
        (pa.array(["x", None]), pa.null(), [None, None]),
    ],
)
def test_value_that_does_not_fit_is_null_and_the_others_are_not(
    column: Any, dtype: Any, values: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cluster.attributes"):
        found = fitted(column, dtype, "n")
    assert (found.type, found.to_pylist()) == (dtype, values)
    lost = found.null_count - column.null_count
    assert f"{lost} values of attribute 'n' become null: they do not fit {dtype}" in caplog.text
    repeated = fitted(pa.concat_arrays([column] * 3).slice(1, 2 * len(column)), dtype, "n")
    assert repeated.to_pylist() == (values * 3)[1 : 1 + 2 * len(values)], "a part of a longer column"


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list, lambda item: pa.list_(item, 1)])
def test_list_that_does_not_fit_leaves_those_of_other_rows_as_they_are(lists: Callable[[Any], Any]) -> None:
    given, expected = [["1"], ["?"], None, ["3"]], [[1], None, None, [3]]
    for start in range(len(given)):
        column = pa.array(given, lists(pa.string()))[start:]
        assert fitted(column, lists(pa.int64()), "n").to_pylist() == expected[start:]
    column = pa.array([{"a": each} for each in given], pa.struct([("a", lists(pa.string()))]))
    found = fitted(column, pa.struct([("a", lists(pa.int64()))]), "n").to_pylist()
    assert found == [{"a": [1]}, None, {"a": None}, {"a": [3]}]


@pytest.mark.parametrize("dtype", [pa.int64(), pa.string(), DICTIONARY, NUMBERS, pa.struct([("a", pa.int8())])])
@pytest.mark.parametrize("given", [pa.string(), pa.int64(), NUMBERS, pa.null()])
def test_empty_column_has_the_type_asked_for(given: Any, dtype: Any) -> None:
    assert fitted(pa.array([], given), dtype, "n").equals(pa.array([], dtype))


# --- columns ----------------------------------------------------------------------------------------------------


def test_columns_come_in_the_order_asked_and_no_others() -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None], "id": [7, 8]})
    assert complete_columns(table, ["a", "b", "id"], {}) is table
    assert complete_columns(table, ["id", "b"], {"a": "string"}).equals(table.select(["id", "b"]))
    assert complete_columns(table, ["id", "b", "a"], {}).column_names == ["id", "b", "a"]
    assert complete_columns(table, [], {}).column_names == []


def test_column_that_is_missing_or_of_no_type_is_null_and_of_the_type_in_the_serving_table() -> None:
    table = pa.table({"a": [1, 2], "none": pa.nulls(2)})
    types = {"none": "bool", "new": "timestamp[us]", "a": "string"}
    found = complete_columns(table, ["new", "a", "none", "nobody's"], types)
    assert found.schema.types == [pa.timestamp("us"), pa.int64(), pa.bool_(), pa.null()]
    assert found.to_pydict() == {"new": [None] * 2, "a": [1, 2], "none": [None] * 2, "nobody's": [None] * 2}
    assert complete_columns(table, ["a", "none"], types).schema.types == [pa.int64(), pa.bool_()]


def test_column_of_a_type_without_a_name_stays_of_no_type() -> None:
    table = pa.table({"a": pa.nulls(2)})
    found = complete_columns(table, ["a", "b"], {"a": "list<item: double>", "b": "struct<x: int64>"})
    assert found.schema.types == [pa.null(), pa.null()]
    assert found.num_rows == 2
    nested = pa.table({"a": pa.array([[1.0], None])})
    assert complete_columns(nested, ["a", "b"], {"b": "int8"}).equals(nested.append_column("b", pa.nulls(2, pa.int8())))


def test_columns_of_no_rows_have_their_types_all_the_same() -> None:
    found = complete_columns(pa.table({"a": pa.nulls(0)}), ["a", "b"], {"a": "string", "b": "int8"})
    assert (found.num_rows, found.schema.types) == (0, [pa.string(), pa.int8()])


@pytest.mark.parametrize("columns", [[], ["a"]])
def test_no_table_stays_none(columns: list[str]) -> None:
    assert complete_columns(None, columns, {"a": "int64"}) is None


def test_type_is_known_by_the_name_that_arrow_gives_it_where_it_has_one() -> None:
    named = [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string()]
    named += [
        pa.large_string(),
        pa.binary(),
        pa.date32(),
        pa.timestamp("us"),
        pa.duration("s"),
        pa.time64("ns"),
        pa.null(),
    ]
    for dtype in named:
        assert arrow_type(str(dtype)) == dtype
    for text in ("", "text", "int65", *map(str, (NUMBERS, DICTIONARY, pa.struct([("a", pa.int8())])))):
        assert arrow_type(text) is None, text
