"""Attributes of JSON points as columns: by the collection's types, and by their values."""

from __future__ import annotations

from typing import Any

import msgspec
import pyarrow as pa
import pytest

from cluster.attributes import arrow_type, complete_columns
from cluster.errors import Exhausted, Invalid
from serve.attribute_columns import (
    ATTRIBUTES_MAX,
    CELLS_MAX,
    arrow_attributes,
    check_attribute_bytes,
    has_large_columns,
    json_attributes,
)
from serve.json_bodies import points_of


def column(values: list[Any], dtype: str) -> Any:
    rows = [{"it": value} for value in values]
    return json_attributes(rows, {"it": dtype}).columns["it"]


def refused(values: list[Any], dtype: str) -> tuple[str, str]:
    with pytest.raises(Invalid) as caught:
        column(values, dtype)
    (error,) = caught.value.errors
    return error.field, error.message


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([True, None, False], "bool"),
        ([127, None, -128], "int8"),
        ([2**64 - 1, None, 0], "uint64"),
        ([0.5, None, 2], "halffloat"),
        ([0.5, None, 3e38], "float"),
        ([0.5, None, 1e300, 2**60], "double"),
        (["ü", None, ""], "string"),
        (["ü", None, ""], "large_string"),
        (["/w==", None, ""], "binary"),
        (["AAECAw==", None], "large_binary"),
        (["2026-01-31", None, "1969-12-31"], "date32[day]"),
        (["2026-01-31", None], "date64[ms]"),
        (["01:02:03", None], "time32[s]"),
        (["01:02:03.000004", None, "23:59:59"], "time64[us]"),
        (["01:02:03.000004", None], "time64[ns]"),
        (["2026-01-31T01:02:03", None], "timestamp[s]"),
        (["2026-01-31T01:02:03.000004", None], "timestamp[us]"),
        (["PT90.5S", None, "-P1D"], "duration[ms]"),
        ([90, None, -5], "duration[s]"),
        ([1, "PT1S", None], "duration[ms]"),
    ],
    ids=str,
)
def test_values_come_back_as_answers_tell_them(values: list[Any], dtype: str) -> None:
    told = column(values, dtype)
    assert told.type == arrow_type(dtype)
    assert told.null_count == values.count(None)
    again = [msgspec.to_builtins(point)["attributes"]["it"] for point in points_of(pa.table({"it": told}), ["it"])]
    assert column(again, dtype).equals(told)  # what an answer says can be written


def test_nanoseconds_are_told_and_taken_as_text() -> None:
    told = column(["2026-01-31T01:02:03.000000004"], "timestamp[ns]")
    assert told.cast(pa.int64()).to_pylist() == [1_769_821_323_000_000_004]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1, "bool"),
        ("true", "bool"),
        (True, "int64"),
        (1.0, "int64"),
        ("1", "int64"),
        (128, "int8"),
        (-1, "uint8"),
        (2**63, "int64"),
        (2**64, "uint64"),
        (True, "double"),
        ("1", "double"),
        (10**400, "double"),
        (1e39, "float"),
        (1e5, "halffloat"),
        (1, "large_string"),
        ([1], "large_string"),
        ({"a": 1}, "large_string"),
        ("no base64!", "binary"),
        ("2026-02-30", "date32[day]"),
        ("2026-01-31T00:00:00", "date32[day]"),
        (5, "date32[day]"),
        ("2026-01-31T01:02:03.5", "timestamp[s]"),
        ("2026-01-31T01:02:03Z", "timestamp[s]"),
        (0, "timestamp[s]"),
        ("25:00:00", "time32[s]"),
        ("01:02:03.5", "time32[s]"),
        ("01:02:03Z", "time32[s]"),
        ("PT0.5S", "duration[s]"),
        ("soon", "duration[s]"),
        (1.5, "duration[s]"),
    ],
    ids=str,
)
def test_value_of_another_type_is_refused_by_its_position(value: Any, dtype: str) -> None:
    field, message = refused([None, value], dtype)
    assert field == "points[1].attributes.it"
    assert dtype in message


@pytest.mark.parametrize("dtype", ["list<item: double>", "timestamp[us, tz=UTC]", "decimal128(5, 2)", "null"])
def test_attribute_of_a_type_that_json_cannot_write_takes_null_only(dtype: str) -> None:
    assert json_attributes([{"it": None}, None], {"it": dtype}).columns == {}
    field, message = refused([None, "x"], dtype)
    assert field == "points[1].attributes.it"
    assert "JSON cannot write" in message


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([None, True], "bool"),
        ([1, None, -(2**63)], "int64"),
        ([1, 0.5], "double"),
        ([0.5, 2**60], "double"),
        (["a", None], "large_string"),
    ],
    ids=str,
)
def test_new_attribute_has_the_type_of_its_values(values: list[Any], dtype: str) -> None:
    told = json_attributes([{"it": value} for value in values], {})
    assert told.new == {"it": dtype}
    assert told.columns["it"].to_pylist() == values


@pytest.mark.parametrize(
    "values", [[1, True], [True, 1], ["a", 1], [0.5, "a"], [None, []], [None, {}], [0, 2**63]], ids=str
)
def test_new_attribute_of_mixed_or_nested_values_is_refused(values: list[Any]) -> None:
    with pytest.raises(Invalid) as caught:
        json_attributes([{"it": value} for value in values], {})
    assert caught.value.errors[0].field == "points[1].attributes.it"


def test_attributes_that_points_lack_are_null_and_null_alone_declares_nothing() -> None:
    told = json_attributes([{"a": 1}, None, {}, {"b": "x", "c": None}], {})
    assert {name: each.to_pylist() for name, each in told.columns.items()} == {
        "a": [1, None, None, None],
        "b": [None, None, None, "x"],
    }
    assert told.new == {"a": "int64", "b": "large_string"}


def test_collection_has_a_bounded_number_of_attributes() -> None:
    known = {f"a{number}": "int64" for number in range(ATTRIBUTES_MAX)}
    json_attributes([{"a5": 1, "null": None}], known)
    for refuse in (
        lambda: json_attributes([{"one more": 1}], known),
        lambda: arrow_attributes({"one more": pa.array([1])}, known),
    ):
        with pytest.raises(Invalid, match=f"may have {ATTRIBUTES_MAX}"):
            refuse()


def test_too_many_attributes_are_refused_before_a_column_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("a column was made")

    monkeypatch.setattr(pa, "array", forbidden)
    with pytest.raises(Invalid, match="may have"):
        json_attributes([{f"a{row}": 1} for row in range(ATTRIBUTES_MAX + 1)], {})
    points = CELLS_MAX // ATTRIBUTES_MAX + 1
    with pytest.raises(Exhausted, match=f"{points} points x {ATTRIBUTES_MAX} .*send fewer points") as caught:
        json_attributes([{f"a{row % ATTRIBUTES_MAX}": 1} for row in range(points)], {})
    assert caught.value.retry_after_s is None


def test_arrow_columns_of_too_many_values_are_refused() -> None:
    points = CELLS_MAX // 1_000 + 1
    column = pa.nulls(points - 1, pa.bool_())
    columns = {f"a{number}": pa.concat_arrays([column, pa.array([True])]) for number in range(1_000)}
    with pytest.raises(Exhausted, match="send fewer points"):
        arrow_attributes(columns, {})
    assert len(arrow_attributes({name: each[1:] for name, each in columns.items()}, {}).columns) == 1_000


def test_sparse_attributes_are_columns_of_all_points() -> None:
    rows = [{f"a{row % 3}": row} if row % 4 else None for row in range(20)]
    told = json_attributes(rows, {"a0": "int8", "a1": "double", "a9": "bool"})
    assert told.new == {"a2": "int64"}
    assert list(told.columns) == ["a0", "a1", "a2"]
    for name, each in told.columns.items():
        assert each.to_pylist() == [(row or {}).get(name) for row in rows]
    wrong = [None, {"a": 1}, {"b": 1}, None, {"a": "x"}]
    with pytest.raises(Invalid) as caught:
        json_attributes(wrong, {})
    assert caught.value.errors[0].field == "points[4].attributes.a"


@pytest.mark.parametrize(("points", "names", "large"), [(1, 20, False), (100, 20, False), (1, 1_000, True)])
def test_columns_are_large_by_names_and_points(points: int, names: int, large: bool) -> None:
    assert has_large_columns([{f"a{number}": 1 for number in range(names)}, *[None] * (points - 1)]) is large
    assert has_large_columns([{f"a{number}": 1} for number in range(5_000)])
    assert not has_large_columns([None, {}])


@pytest.mark.parametrize("name", ["", "a,b", ",", "a\0", "\n", "\x7f", "\x85", "x" * 257, "id"])
def test_name_that_requests_cannot_use_is_refused_even_for_null_unless_the_collection_has_it(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        json_attributes([None, {name: None}], {})
    assert caught.value.errors[0].field == f"points[1].attributes.{name}"
    with pytest.raises(Invalid):
        arrow_attributes({name: pa.array([1])}, {})
    assert json_attributes([{name: 1}], {name: "int64"}).new == {}  # an import brought it


@pytest.mark.parametrize("name", ["a b", "ü", "a.b", '"', "x" * 256])
def test_name_of_other_characters_is_taken(name: str) -> None:
    assert json_attributes([{name: 1}], {}).new == {name: "int64"}


def test_attribute_bytes_count_values_and_names_of_each_point() -> None:
    columns = {
        "word": pa.array(["x" * 50, None, "x" * 60], pa.large_string()),
        "n": pa.array([1, 2, None], pa.int32()),
        "nested": pa.array([[1], [2], None], pa.list_(pa.int64())),
    }
    check_attribute_bytes(columns, 10_000, str)
    with pytest.raises(Invalid) as caught:
        check_attribute_bytes({name: columns[name] for name in ("word", "n")}, 54 + 4, str)
    assert (caught.value.errors[0].field, "59 bytes" in caught.value.errors[0].message) == ("0", True)
    check_attribute_bytes({name: columns[name] for name in ("word", "n")}, 64, str)
    with pytest.raises(Invalid, match="bytes"):
        check_attribute_bytes(columns, 70, str)


def test_columns_are_completed_by_nulls_of_the_known_type() -> None:
    table = pa.table({"a": [1, 2], "b": pa.nulls(2)})
    completed = complete_columns(table, ["b", "a", "c"], {"b": "int64", "c": "list<item: double>"})
    assert completed.column_names == ["b", "a", "c"]
    assert [str(dtype) for dtype in completed.schema.types] == ["int64", "int64", "null"]
    assert complete_columns(None, ["a"], {}) is None
    assert complete_columns(completed.select(["a"]), ["a"], {}).equals(completed.select(["a"]))
