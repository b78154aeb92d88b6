from __future__ import annotations

from math import inf

import numpy as np
import pytest

from actors.search_times import FORMS_MAX, SearchTimes
from cluster.query import SearchGroup, SearchParams, ShardSearch


def asked(*groups: tuple[int, int, SearchParams], columns: tuple[str, ...] = ()) -> ShardSearch:
    """Groups as (vectors, k, params)."""
    start, made = 0, []
    for vectors, k, params in groups:
        made.append(SearchGroup(start, start + vectors, k, params, columns))
        start += vectors
    return ShardSearch(1, np.zeros((start, 4), np.float32), tuple(made))


TUNED, EXACT = SearchParams(), SearchParams(exact=True)


def test_what_was_never_measured_may_take_for_ever() -> None:
    times = SearchTimes()
    times.took(asked((2, 10, TUNED)), 0.004)
    for other in (asked((1, 11, TUNED)), asked((1, 10, EXACT)), asked((1, 10, TUNED), columns=("vector",))):
        assert times.predicted_s(other) == inf
    assert times.predicted_s(asked((1, 10, TUNED), (1, 10, EXACT))) == inf


def test_the_last_time_counts_by_vector() -> None:
    times = SearchTimes()
    times.took(asked((1, 10, TUNED)), 1.0)
    times.took(asked((2, 10, TUNED)), 0.004)
    times.took(asked((1, 10, EXACT)), 0.5)
    assert times.predicted_s(asked((5, 10, TUNED))) == pytest.approx(0.010)
    assert times.predicted_s(asked((5, 10, TUNED), (2, 10, EXACT))) == pytest.approx(1.010)


def test_fewer_vectors_are_not_promised_to_take_less() -> None:
    """Where all rows are read for one vector as for many, a share of the time of many would be far too short."""
    times = SearchTimes()
    times.took(asked((500, 10, EXACT)), 0.5)
    assert times.predicted_s(asked((1, 10, EXACT))) == pytest.approx(0.5)
    times.took(asked((1, 10, EXACT)), 0.03)
    assert times.predicted_s(asked((1, 10, EXACT))) == pytest.approx(0.03)


def test_a_form_never_measured_stays_infinite_beside_one_without_vectors() -> None:
    times = SearchTimes()
    times.took(asked((1, 10, TUNED)), 0.001)
    assert times.predicted_s(asked((0, 11, TUNED), (1, 10, TUNED))) == inf


def test_several_groups_that_took_longer_than_predicted_are_expected_to_do_so_again() -> None:
    times = SearchTimes()
    times.took(asked((1, 10, TUNED)), 0.001)
    times.took(asked((1, 10, EXACT)), 0.003)
    both = asked((1, 10, TUNED), (1, 10, EXACT))
    times.took(both, 0.002)
    assert times.predicted_s(both) == pytest.approx(0.004)
    times.took(both, 0.4)
    assert times.predicted_s(both) == pytest.approx(0.4)
    assert times.predicted_s(asked((1, 10, TUNED))) == pytest.approx(0.1)
    times.took(ShardSearch(1, np.zeros((0, 4), np.float32), ()), 0.4)
    assert times.predicted_s(both) == pytest.approx(0.4)


def test_several_groups_at_once_tell_nothing_of_each() -> None:
    times = SearchTimes()
    times.took(asked((1, 10, TUNED), (1, 10, EXACT)), 0.001)
    assert times.predicted_s(asked((1, 10, TUNED))) == inf


def test_forms_are_bounded() -> None:
    times = SearchTimes()
    for k in range(1, 3 * FORMS_MAX):
        times.took(asked((1, k, TUNED)), 0.001)
    assert len(times._last) <= FORMS_MAX
    assert times.predicted_s(asked((1, k, TUNED))) == pytest.approx(0.001)
