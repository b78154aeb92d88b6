"""Merging hits, against a model in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.arrow_rows import vectors_array, vectors_view
from cluster.config import IdType, Metric
from cluster.ids import ID_ARROW_TYPE
from cluster.query import Hits
from cluster.topk import best_of_each, join_queries, merge_hits, recall_at_k, smaller_is_better, split_hits

few = settings(max_examples=120, deadline=None, derandomize=True)

# Few distinct scores, so that ties are common.
SCORES = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 1e-30, 3e38]


@dataclass(frozen=True)
class Point:
    """One hit of the model; `column` goes along with it."""

    id: Any
    score: float
    column: int


ModelHits = list[list[Point]]  # per query, best first


@dataclass(frozen=True)
class Case:
    parts: list[ModelHits]
    k: int
    metric: Metric
    id_type: IdType
    with_columns: bool

    def merged(self) -> ModelHits:
        sign = 1.0 if self.metric == "l2" else -1.0
        return [
            sorted((point for part in queries for point in part), key=lambda p: (sign * p.score, p.id))[: self.k]
            for queries in zip(*self.parts, strict=True)
        ]


def hits_of(model: ModelHits, id_type: IdType, with_columns: bool) -> Hits:
    points = [point for query in model for point in query]
    columns = None
    if with_columns and points:
        numbers = np.array([point.column for point in points])
        columns = pa.table({"number": numbers, "vector": vectors_array(np.stack([numbers, -numbers], axis=1))})
    return Hits(
        np.array([len(query) for query in model], dtype=np.int64),
        pa.array([point.id for point in points], type=ID_ARROW_TYPE[id_type]),
        np.array([point.score for point in points], dtype=np.float32),
        columns,
    )


def model_of(hits: Hits) -> ModelHits:
    assert hits.scores.dtype == np.float32
    assert len(hits.ids) == len(hits.scores) == hits.counts.sum()
    numbers = [0] * len(hits.scores)
    if hits.columns is not None:
        numbers = hits.columns["number"].to_pylist()
        assert hits.columns["vector"].to_pylist() == [[number, -number] for number in numbers]
    points = [Point(*row) for row in zip(hits.ids.to_pylist(), hits.scores.tolist(), numbers, strict=True)]
    ends = np.cumsum(hits.counts).tolist()
    return [points[end - count : end] for end, count in zip(ends, hits.counts.tolist(), strict=True)]


def without_columns(model: ModelHits) -> ModelHits:
    return [[Point(point.id, point.score, 0) for point in query] for query in model]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    metric: Metric = draw(st.sampled_from(["l2", "ip", "cosine"]))
    id_type: IdType = draw(st.sampled_from(["int64", "string"]))
    ids = st.integers(-(2**63), 2**63 - 1) if id_type == "int64" else st.text(max_size=3)
    parts_count, queries = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    parts: list[ModelHits] = [[[] for _ in range(queries)] for _ in range(parts_count)]
    scores = st.sampled_from([float(np.float32(score)) for score in SCORES])
    number = 0
    for query in range(queries):
        for value in draw(st.lists(ids, unique=True, max_size=8)):  # a point is in one part only
            number += 1
            part = draw(st.integers(0, parts_count - 1))
            parts[part][query].append(Point(value, draw(scores), number))
    for part_hits in parts:
        for found in part_hits:  # a part is best first, its ties in any order: FAISS leaves them so
            found.sort(key=lambda point: point.score, reverse=metric != "l2")
    return Case(parts, draw(st.integers(1, 10)), metric, id_type, draw(st.booleans()))


@few
@given(cases())
def test_merge_is_the_sorted_union_cut_to_k(case: Case) -> None:
    parts = [hits_of(part, case.id_type, case.with_columns) for part in case.parts]
    merged = merge_hits(parts, case.k, case.metric)
    expected = case.merged() if case.with_columns else without_columns(case.merged())
    assert model_of(merged) == expected
    assert merged.ids.type == ID_ARROW_TYPE[case.id_type]
    assert (merged.columns is not None) == (case.with_columns and any(any(part) for part in case.parts))


@few
@given(cases())
def test_merge_does_not_depend_on_the_order_of_parts(case: Case) -> None:
    parts = [hits_of(part, case.id_type, case.with_columns) for part in case.parts]
    forward, backward = merge_hits(parts, case.k, case.metric), merge_hits(parts[::-1], case.k, case.metric)
    assert model_of(forward) == model_of(backward)


@few
@given(cases(), st.data())
def test_split_then_join_gives_back_the_hits(case: Case, data: st.DataObject) -> None:
    model = case.parts[0]
    hits = hits_of(model, case.id_type, case.with_columns)
    sizes, left = [], len(model)
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    if not sizes:
        return
    parts = split_hits(hits, sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    expected = model if case.with_columns else without_columns(model)
    assert [model_of(part) for part in parts] == [
        expected[start : start + size] for start, size in zip(starts, sizes, strict=True)
    ]
    assert model_of(join_queries(parts)) == expected


def test_merge_of_one_sorted_part_copies_nothing() -> None:
    hits = hits_of([[Point(1, 0.0, 0), Point(2, 1.0, 0)]], "int64", with_columns=False)
    assert merge_hits([hits], 2, "l2") is hits


def test_merge_of_one_part_with_ties_orders_them_by_id() -> None:
    hits = hits_of([[Point(9, 1.0, 0), Point(-2, 1.0, 0), Point(5, 1.0, 0)]], "int64", with_columns=False)
    assert merge_hits([hits], 3, "ip").ids.to_pylist() == [-2, 5, 9]


def test_merge_orders_string_ties_by_code_point() -> None:
    words = ["z", "Z", "é", "", "日", "🐟", "a"]
    parts = [hits_of([[Point(word, 1.0, 0)]], "string", with_columns=False) for word in words]
    assert merge_hits(parts, 7, "cosine").ids.to_pylist() == sorted(words)


def test_merge_of_int64_extremes_is_exact() -> None:
    ids = [2**63 - 1, -(2**63), 2**53 + 1, 2**53]
    parts = [hits_of([[Point(value, 0.5, 0)]], "int64", with_columns=False) for value in ids]
    assert merge_hits(parts, 4, "l2").ids.to_pylist() == sorted(ids)


def test_merge_keeps_vectors_as_rows_of_the_columns() -> None:
    parts = [hits_of([[Point(i, float(i), i)]], "int64", with_columns=True) for i in (2, 1)]
    merged = merge_hits(parts, 2, "l2")
    assert vectors_view(merged.columns["vector"].combine_chunks()).tolist() == [[1, -1], [2, -2]]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("which", [None, 0, 1])
def test_answer_is_degraded_where_a_part_is(which: int | None, queries: int, columns: bool) -> None:
    parts = [hits_of([[Point(i, float(i), i), Point(i + 9, 9.0, i)]] * queries, "int64", columns) for i in (1, 2)]
    parts = [replace(part, degraded="cpu") if number == which else part for number, part in enumerate(parts)]
    told = "" if which is None else "cpu"
    merged = merge_hits(parts, 1, "l2")
    joined = join_queries(parts)
    assert [merged.degraded, joined.degraded] == [told, told]
    assert [part.degraded for part in split_hits(joined, [queries, queries])] == [told, told]
    assert best_of_each(joined, 1).degraded == told
    assert model_of(best_of_each(joined, 1)) == [query[:1] for query in model_of(joined)]


def test_merge_does_not_write_to_its_parts() -> None:
    parts = [hits_of([[Point(3, 0.5, 0)], []], "int64", False), hits_of([[Point(1, 0.5, 0)], []], "int64", False)]
    for part in parts:
        part.scores.flags.writeable = False
        part.counts.flags.writeable = False
    assert model_of(merge_hits(parts, 1, "l2")) == [[Point(1, 0.5, 0)], []]


def test_split_of_a_query_without_hits_is_empty() -> None:
    first, second, third = split_hits(hits_of([[], [Point(1, 0.0, 0)], []], "int64", False), [1, 1, 1])
    assert (len(first.ids), len(second.ids), len(third.ids)) == (0, 1, 0)
    assert (first.counts.tolist(), second.counts.tolist(), third.counts.tolist()) == ([0], [1], [0])


@pytest.mark.parametrize(("metric", "smaller"), [("l2", True), ("ip", False), ("cosine", False)])
def test_smaller_is_better_only_under_l2(metric: Metric, smaller: bool) -> None:
    assert smaller_is_better(metric) is smaller


@pytest.mark.parametrize(
    ("found", "truth", "recall"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], [1.0]),
        ([[3, 1, 2]], [[1, 2, 3]], [1.0]),
        ([[1, 8, 9]], [[1, 2, 3]], [1 / 3]),
        ([[7, 8, 9]], [[1, 2, 3]], [0.0]),
        ([[1, -1, -1]], [[1, 2, -1]], [0.5]),  # -1 is no row: it is neither wanted nor found
        ([[-1, -1, -1]], [[-1, -1, -1]], [1.0]),
        ([[1], [2]], [[1], [3]], [1.0, 0.0]),
        ([[5, 6]], [[6]], [1.0]),
        ([[6]], [[5, 6]], [0.5]),
    ],
)
def test_recall_at_k_is_the_share_of_truth_found(
    found: list[list[int]], truth: list[list[int]], recall: list[float]
) -> None:
    result = recall_at_k(np.array(found, dtype=np.int64), np.array(truth, dtype=np.int64))
    assert result.tolist() == pytest.approx(recall, abs=1e-12)


def test_recall_at_k_of_no_queries_is_empty() -> None:
    empty = np.empty((0, 10), dtype=np.int64)
    assert recall_at_k(empty, empty).shape == (0,)


def test_lsn_is_the_lowest_of_merged_and_joined_parts_and_goes_along_with_split_ones() -> None:
    parts = [
        Hits(np.array([1, 0]), pa.array([number], pa.int64()), np.array([float(number)], np.float32), lsn=lsn)
        for number, lsn in [(1, 9), (2, 7)]
    ]
    assert merge_hits(parts, 10, "l2").lsn == 7
    assert merge_hits(parts[:1], 10, "l2").lsn == 9
    assert join_queries(parts).lsn == 7
    assert [part.lsn for part in split_hits(parts[0], [1, 1])] == [9, 9]


def test_column_that_a_part_does_not_know_is_null_in_its_rows() -> None:
    def part(number: int, columns: Any) -> Hits:
        return Hits(np.array([1]), pa.array([number], pa.int64()), np.array([float(number)], np.float32), columns)

    old = part(1, pa.table({"word": pa.array(["a"], pa.large_string())}))
    new = part(2, pa.table({"gloss": pa.array([5]), "word": pa.array(["b"], pa.large_string())}))
    for joined in (merge_hits([old, new], 10, "l2"), join_queries([old, new])):
        assert joined.columns.select(["word", "gloss"]).to_pylist() == [
            {"word": "a", "gloss": None},
            {"word": "b", "gloss": 5},
        ]
        assert joined.columns.schema.field("gloss").type == pa.int64()


def test_column_of_nulls_takes_the_type_that_another_part_knows() -> None:
    def part(number: int, values: Any) -> Hits:
        columns = pa.table({"gloss": values})
        return Hits(np.array([1]), pa.array([number], pa.int64()), np.array([float(number)], np.float32), columns)

    merged = merge_hits([part(1, pa.nulls(1)), part(2, pa.array([5]))], 10, "l2")
    assert merged.columns["gloss"].to_pylist() == [None, 5]
    assert merged.columns.schema.field("gloss").type == pa.int64()
