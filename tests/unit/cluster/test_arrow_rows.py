"""Rows in record batches: zero-copy views, and gathering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.arrow_rows import gather, vector_type, vectors_array, vectors_view


def batch_of(numbers: list[int], nullable: bool = True) -> Any:
    vectors: NDArray[np.float32] = np.array([[n, n + 0.5] for n in numbers], dtype=np.float32).reshape(-1, 2)
    lists = pa.field("vector", vector_type(2, "float32"), nullable=nullable)
    schema = pa.schema([pa.field("number", pa.int64()), lists])
    return pa.record_batch([pa.array(numbers, pa.int64()), vectors_array(vectors)], schema=schema)


def batches_of(sizes: list[int], nullable: bool = True) -> tuple[list[Any], list[list[int]]]:
    numbers = [list(range(100 * place, 100 * place + size)) for place, size in enumerate(sizes)]
    return [batch_of(row, nullable) for row in numbers], numbers


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_array_and_view_copy_nothing(dtype: type) -> None:
    vectors: NDArray[Any] = np.arange(12, dtype=dtype).reshape(4, 3)
    column = vectors_array(vectors)
    assert column.type == vector_type(3, np.dtype(dtype).name)
    view = vectors_view(column)
    assert view.tolist() == vectors.tolist()
    assert view.dtype == dtype
    assert np.shares_memory(view, vectors)


def test_vectors_view_of_a_slice_is_that_slice_without_copying() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    view = vectors_view(vectors_array(vectors).slice(1, 2))
    assert view.tolist() == vectors[1:3].tolist()
    assert view.__array_interface__["data"][0] == vectors[1:].__array_interface__["data"][0]


def test_vectors_array_takes_a_strided_array() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    assert vectors_view(vectors_array(vectors)).tolist() == vectors.tolist()


def test_vectors_array_of_no_rows_keeps_its_dimension() -> None:
    column = vectors_array(np.empty((0, 5), dtype=np.float32))
    assert vectors_view(column).shape == (0, 5)


@pytest.mark.parametrize(("dtype", "value_type"), [("float32", pa.float32()), ("float16", pa.float16())])
def test_vector_type_has_the_dimension_and_the_element(dtype: str, value_type: pa.DataType) -> None:
    assert vector_type(7, dtype) == pa.list_(value_type, 7)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.data())
def test_gather_is_a_lookup_per_row(sizes: list[int], nullable: bool, data: st.DataObject) -> None:
    batches, numbers = batches_of(sizes, nullable)
    places = [(which, row) for which, size in enumerate(sizes) for row in range(size)]
    asked = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=20))
    which, rows = (np.array(column, dtype=np.int64) for column in zip(*asked, strict=True))
    result = gather(batches, which, rows, ["vector", "number"])
    assert result.schema == batches[0].select(["vector", "number"]).schema
    assert gather(batches, which, rows, ["vector"]).column(0).equals(result.column(0))
    expected = [numbers[place][row] for place, row in asked]
    assert result.schema.names == ["vector", "number"]
    assert result.column("number").to_pylist() == expected
    assert result.column("vector").to_pylist() == [[number, number + 0.5] for number in expected]


def test_gather_takes_only_the_named_columns() -> None:
    batches, _ = batches_of([3])
    result = gather(batches, np.array([0]), np.array([2]), ["number"])
    assert result.to_pydict() == {"number": [2]}


def test_gather_of_one_row_many_times_repeats_it() -> None:
    batches, _ = batches_of([2, 2])
    result = gather(batches, np.array([1, 0, 1, 1]), np.array([0, 1, 0, 0]), ["number"])
    assert result.column("number").to_pylist() == [100, 1, 100, 100]


def test_gather_does_not_write_to_the_rows_asked_for() -> None:
    batches, _ = batches_of([2, 2])
    which, rows = np.array([1, 0]), np.array([0, 1])
    which.flags.writeable = rows.flags.writeable = False
    assert gather(batches, which, rows, ["number"]).column("number").to_pylist() == [100, 1]
