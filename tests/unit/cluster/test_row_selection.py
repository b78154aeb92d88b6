"""Bitmaps of the rows that may be found."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.row_selection import RowSelection


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1_001])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_selection_of_a_mask_has_its_rows(count: int, share: float) -> None:
    mask = np.random.default_rng(count).random(count) < share
    selection = RowSelection.of(mask)
    assert selection.rows().tolist() == np.flatnonzero(mask).tolist()
    assert selection.rows().dtype == np.int64
    assert (selection.kept, selection.count) == (int(mask.sum()), count)
    assert selection.kept == mask.sum()


def test_bit_of_a_row_is_counted_from_the_low_end_of_its_byte() -> None:
    mask = np.zeros(20, dtype=bool)
    mask[[0, 9, 19]] = True
    assert RowSelection.of(mask).bits.tolist() == [0b1, 0b10, 0b1000]


def test_rows_beyond_the_last_byte_are_not_made_up() -> None:
    selection = RowSelection.of(np.ones(9, dtype=bool))
    assert selection.bits.dtype == np.uint8
    assert len(selection.bits) == 2
    assert selection.rows().tolist() == list(range(9))


def test_selection_of_no_rows_keeps_all_of_none() -> None:
    selection = RowSelection.of(np.zeros(0, dtype=bool))
    assert (selection.kept, selection.count) == (0, 0)
    assert selection.rows().tolist() == []
