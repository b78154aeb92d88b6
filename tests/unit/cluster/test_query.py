"""Coverage and search parameters."""

from __future__ import annotations

import pytest

from cluster.query import Coverage, SearchParams, coverage_of


@pytest.mark.parametrize(
    ("shard_points", "answered", "expected"),
    [
        ({0: 10, 1: 30}, {0, 1}, Coverage(1.0, 1.0, ())),
        ({0: 10, 1: 30}, {0}, Coverage(0.5, 0.25, (1,))),
        ({0: 10, 1: 30}, {1}, Coverage(0.5, 0.75, (0,))),
        ({0: 10, 1: 30}, set(), Coverage(0.0, 0.0, (0, 1))),
        ({3: 1, 0: 1, 2: 1, 1: 1}, {2}, Coverage(0.25, 0.25, (0, 1, 3))),
        ({0: 0, 1: 0}, {0, 1}, Coverage(1.0, 1.0, ())),
        ({0: 0, 1: 0}, {1}, Coverage(0.5, 0.5, (0,))),  # no points to lose: the shards count
        ({0: 5, 1: 0}, {0}, Coverage(0.5, 1.0, (1,))),
        ({}, set(), Coverage(1.0, 1.0, ())),
        ({0: 5}, {0, 7}, Coverage(1.0, 1.0, ())),  # an answer of a shard that was not asked adds nothing
    ],
)
def test_coverage_of_answers(shard_points: dict[int, int], answered: set[int], expected: Coverage) -> None:
    assert coverage_of(shard_points, answered) == expected


def test_coverage_as_dict_is_plain_json_data() -> None:
    assert Coverage(0.5, 0.25, (1, 2)).to_dict() == {"shards": 0.5, "points": 0.25, "missing": [1, 2]}


@pytest.mark.parametrize(
    ("params", "given"),
    [
        (SearchParams(), {}),
        (SearchParams(nprobe=4), {"nprobe": 4}),
        (SearchParams(nprobe=4, rerank=2.5), {"nprobe": 4, "rerank": 2.5}),
        (SearchParams(ef_search=16), {"ef_search": 16}),
        (SearchParams(target_recall=0.9), {}),
        (SearchParams(exact=True), {}),
        (SearchParams(ef_search=16, target_recall=0.9, exact=True), {"ef_search": 16}),
    ],
)
def test_given_params_are_only_the_raw_knobs_that_were_set(params: SearchParams, given: dict[str, float]) -> None:
    assert params.given == given


def test_params_that_are_equal_may_share_a_batch() -> None:
    """They are keys: requests with equal ones are searched together."""
    assert len({SearchParams(nprobe=4), SearchParams(nprobe=4), SearchParams(nprobe=4, exact=True)}) == 2
