"""Compares what a shard answers with what it must hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.shard import Shard
from actors.shard_view import ShardView
from cluster.arrow_rows import vectors_view
from cluster.ids import ID_ARROW_TYPE
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.model.cases import ATTRIBUTES, Case, type_of
from tests.model.truth import Id, Point, State

ROUNDING = 2e-5  # of float32 scores of vectors that are no small integers


def ask(
    shard: Shard, generation: int, queries: NDArray[np.float32], k: int, exact: bool, columns: tuple[str, ...]
) -> Hits:
    group = SearchGroup(0, len(queries), k, SearchParams(exact=exact), columns)
    (outcome,) = shard.search(ShardSearch(generation, queries, (group,)))
    if not isinstance(outcome, Hits):
        raise outcome
    return outcome


def check_hits(case: Case, state: State, queries: NDArray[np.float32], k: int, exact: bool, hits: Hits) -> None:
    """Nothing dead, nothing twice, true scores, best first, as many as there are; exact ones are the best."""
    bounds = np.concatenate([[0], np.cumsum(hits.counts)]).tolist()
    ids = hits.ids.to_pylist()
    truth = state.scores(queries, case.config.metric)
    column = {point_id: number for number, point_id in enumerate(state.ids)}
    smaller = case.config.metric == "l2"
    for query, (start, stop) in enumerate(pairwise(bounds)):
        found, scores = ids[start:stop], hits.scores[start:stop]
        dead = [point_id for point_id in found if point_id not in column]
        assert not dead, f"{dead} are deleted, or were never written"
        assert len(set(found)) == len(found), f"an id twice: {found}"
        assert len(found) == min(k, len(column)), f"{len(found)} hits for k = {k} of {len(column)} points"
        true = truth[query, [column[point_id] for point_id in found]]
        _close(case, scores, true, "scores that are not those of the current vectors")
        costs = scores if smaller else -scores
        ties_by_id = zip(pairwise(costs.tolist()), pairwise(found), strict=True)
        assert all((a, one) <= (b, other) for (a, b), (one, other) in ties_by_id), f"not best first: {found} {scores}"
        if exact:
            best = np.argsort(truth[query] if smaller else -truth[query], kind="stable")[:k]
            _close(case, scores, truth[query, best], "scores that are not the best")
            if case.exact:
                expected = [state.ids[number] for number in best.tolist()]
                assert found == expected, f"found {found}, not {expected}"


def _close(case: Case, scores: NDArray[np.float32], true: NDArray[np.float64], wrong: str) -> None:
    tolerance = 0.0 if case.exact else ROUNDING
    assert np.allclose(scores, true, rtol=tolerance, atol=tolerance), f"{wrong}: {scores.tolist()}, not {true.tolist()}"


def check_columns(state: State, hits: Hits, columns: Sequence[str]) -> None:
    assert hits.columns is not None or not columns or not state.points
    if hits.columns is not None:
        _check_table(state, hits.ids.to_pylist(), columns, hits.columns)


def check_fetch(case: Case, view: ShardView, state: State, ids: Sequence[Id], columns: Sequence[str]) -> None:
    found, table = view.fetch(pa.array(ids, ID_ARROW_TYPE[case.config.id_type]), columns)
    expected = [point_id in state.points for point_id in ids]
    assert found.tolist() == expected, f"found {found.tolist()} of {ids}, not {expected}"
    present = [point_id for point_id in ids if point_id in state.points]
    assert (table is not None) == bool(present)
    if present:
        _check_table(state, present, columns, table)


def _check_table(state: State, ids: Sequence[Id], columns: Sequence[str], table: pa.Table) -> None:
    assert table.column_names == list(columns)
    for name in columns:
        points = [state.points[point_id] for point_id in ids]
        if name == "vector":
            expected = [point.numbers for point in points]
        else:
            expected = [point.attributes.get(name) for point in points]
            assert table[name].type in (type_of(name), pa.null()), f"{name} is {table[name].type}"
        values = table[name].to_pylist()
        assert values == expected, f"{name} of {ids}: {values}, not {expected}"


def contents(case: Case, view: ShardView) -> State:
    """Every point of a view whose id is one of the case; fails where it has others."""
    columns = ("vector", *ATTRIBUTES)
    found, table = view.fetch(pa.array(case.ids, ID_ARROW_TYPE[case.config.id_type]), columns)
    ids = [point_id for point_id, here in zip(case.ids, found.tolist(), strict=True) if here]
    assert view.points == len(ids), f"{view.points} points, {len(ids)} of them are known"
    if not ids:
        return State({})
    vectors = vectors_view(table["vector"].combine_chunks()).astype(np.float32)
    given: list[dict[str, Any]] = [{} for _ in ids]
    for name in ATTRIBUTES:
        column = table[name]
        for of, value in zip(given, column.to_pylist(), strict=True) if column.null_count < len(ids) else ():
            if value is not None:
                of[name] = value
    return State({point_id: Point(vectors[row], given[row]) for row, point_id in enumerate(ids)})


def differences(found: State, expected: State) -> list[str]:
    """What `found` has or lacks, in words; empty where they are equal."""
    told = [f"lacks {point_id!r}" for point_id in expected.points.keys() - found.points.keys()]
    told += [f"has {point_id!r}" for point_id in found.points.keys() - expected.points.keys()]
    for point_id in found.points.keys() & expected.points.keys():
        one, other = found.points[point_id], expected.points[point_id]
        if not one.equals(other):
            told.append(f"{point_id!r} is {one}, not {other}")
    return told


def check_view(case: Case, view: ShardView, state: State) -> None:
    """Everything is there, nothing else, and the counts are right."""
    told = differences(contents(case, view), state)
    assert not told, f"generation {view.generation} at LSN {view.lsn}: {'; '.join(told[:5])} ({len(told)} differ)"
