"""Columns made alike: values of another type than a segment's are converted, or null."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pytest

from actors.row_order import conformed

MOMENTS = pa.timestamp("ns")


def test_misfit_beside_nanoseconds_is_null_and_they_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    batch = pa.record_batch({"seen": pa.array(["2020-01-02T03:04:05.000000001", "soon", None, "2020-01-02"])})
    with caplog.at_level(logging.WARNING):
        (seen,) = conformed(batch, pa.schema([("seen", MOMENTS)])).columns
    assert seen.equals(pa.array([1_577_934_245_000_000_001, None, None, 1_577_923_200_000_000_000], MOMENTS))
    assert "1 values of attribute 'seen' become null: they do not fit timestamp[ns]" in caplog.text


@pytest.mark.parametrize("given", [pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), pa.array(["here", None])])
def test_attribute_of_fixed_lengths_is_null_where_it_does_not_fit(given: Any) -> None:
    wanted = pa.list_(pa.int64(), 3)
    (place,) = conformed(pa.record_batch({"place": given}), pa.schema([("place", wanted)])).columns
    assert (place.type, place.to_pylist()) == (wanted, [None, None])


def test_column_that_is_missing_is_null_and_one_of_the_type_is_not_copied() -> None:
    batch = pa.record_batch({"n": pa.array([1, 2]), "more": pa.array(["x", "y"])})
    made = conformed(batch, pa.schema([("n", pa.int64()), ("other", pa.int8())]))
    assert made.to_pydict() == {"n": [1, 2], "other": [None, None]}
    assert made.column("n").buffers()[1].address == batch.column("n").buffers()[1].address
