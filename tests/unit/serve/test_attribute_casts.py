"""Arrow columns of attributes as the collection's types: what is cast, and what is refused as values would change."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from cluster.attributes import arrow_type
from cluster.errors import Invalid
from serve.attribute_casts import cast_column

INFINITY = float("inf")


@pytest.mark.parametrize(
    ("column", "text", "values"),
    [
        (pa.array([-128, None, 127], pa.int8()), "int64", [-128, None, 127]),
        (pa.array([0, None, 255], pa.int64()), "uint8", [0, None, 255]),
        (pa.array([2**60, None, -(2**53)]), "double", [2.0**60, None, -(2.0**53)]),
        (pa.array([2**24, None], pa.uint64()), "float", [2.0**24, None]),
        (pa.array([2048, None]), "halffloat", [2048.0, None]),
        (pa.array([0.1, None, INFINITY, -INFINITY]), "float", [0.10000000149011612, None, INFINITY, -INFINITY]),
        (pa.array([0.1, None], pa.float32()), "halffloat", [0.0999755859375, None]),
        (pa.array([1.5, None], pa.float16()), "double", [1.5, None]),
        (pa.array(["ü", None]), "large_string", ["ü", None]),
        (pa.array(["ü", None], pa.large_string()), "string", ["ü", None]),
        (pa.array([b"a", None]), "large_binary", [b"a", None]),
        (pa.array([2, None], pa.timestamp("s")), "timestamp[ns]", [2_000_000_000, None]),
        (pa.array([2_000, None], pa.timestamp("ms")), "timestamp[s]", [2, None]),
        (pa.array([2 * 86_400_000, None], pa.date64()), "date32[day]", [2, None]),
        (pa.array([2, None], pa.time32("s")), "time64[us]", [2_000_000, None]),
        (pa.array([2_000, None], pa.duration("ms")), "duration[s]", [2, None]),
    ],
    ids=str,
)
def test_column_is_cast_within_its_kind(column: Any, text: str, values: list[Any]) -> None:
    cast = cast_column(column, text, "it")
    assert cast.type == arrow_type(text)
    if pa.types.is_temporal(cast.type):
        cast = cast.cast(pa.int32() if cast.type.bit_width == 32 else pa.int64())
    assert cast.to_pylist() == values


def test_column_of_the_type_is_taken_as_it_is() -> None:
    for column in (pa.array([1, None]), pa.array([INFINITY]), pa.array([[1]]), pa.array([1], pa.timestamp("s", "UTC"))):
        assert cast_column(column, str(column.type), "it") is column


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([1, None, 128]), "int8"),
        (pa.array([1, None, -1]), "uint64"),
        (pa.array([1, None, 2**63], pa.uint64()), "int64"),
        (pa.array([1, None, 2**53 + 1]), "double"),
        (pa.array([1, None, 2**63 - 1]), "double"),
        (pa.array([1, None, 2**24 + 1]), "float"),
        (pa.array([1, None, 2049]), "halffloat"),
        (pa.array([1, None, 10**6]), "halffloat"),
        (pa.array([1, None, 1e300]), "float"),
        (pa.array([INFINITY, None, -1e6, 1.0]), "halffloat"),
        (pa.array([0, None, 1], pa.timestamp("us")), "timestamp[ms]"),
        (pa.array([0, None, 2**62], pa.timestamp("s")), "timestamp[ns]"),
        (pa.array([0, None, 1], pa.date64()), "date32[day]"),
        (pa.array([0, None, 1], pa.time64("ns")), "time64[us]"),
        (pa.array([0, None, 1], pa.duration("us")), "duration[s]"),
    ],
    ids=str,
)
def test_value_that_would_change_is_refused_by_its_position(column: Any, text: str) -> None:
    with pytest.raises(Invalid) as caught:
        cast_column(column, text, "it")
    (error,) = caught.value.errors
    assert error.field == "it[2]"
    assert text in error.message


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([5]), "bool"),
        (pa.array([True]), "int64"),
        (pa.array([True]), "double"),
        (pa.array([1.0]), "int64"),
        (pa.array(["12"]), "int64"),
        (pa.array([12]), "large_string"),
        (pa.array(["1.5"]), "double"),
        (pa.array(["true"]), "bool"),
        (pa.array(["a"]), "binary"),
        (pa.array([b"a"]), "large_string"),
        (pa.array([0], pa.timestamp("s")), "date32[day]"),
        (pa.array([0], pa.date32()), "timestamp[s]"),
        (pa.array([0], pa.timestamp("s", "UTC")), "timestamp[s]"),
        (pa.array([0], pa.timestamp("s")), "timestamp[s, tz=UTC]"),
        (pa.array(["2026-01-31"]), "date32[day]"),
        (pa.array([0]), "timestamp[s]"),
        (pa.array([0], pa.timestamp("s")), "int64"),
        (pa.array([0], pa.duration("s")), "time32[s]"),
        (pa.array([0]), "null"),
        (pa.array([[1]]), "large_string"),
    ],
    ids=str,
)
def test_column_of_another_kind_is_refused(column: Any, text: str) -> None:
    with pytest.raises(Invalid) as caught:
        cast_column(column, text, "it")
    (error,) = caught.value.errors
    assert (error.field, error.message) == ("it", f"is {column.type}, the collection has {text}")


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 99])
def test_first_unfit_value_is_found_among_others(at: int) -> None:
    values = [*range(at), *[1_000] * (100 - at)]
    with pytest.raises(Invalid) as caught:
        cast_column(pa.array(values), "int8", "it")
    assert caught.value.errors[0].field == f"it[{at}]"
