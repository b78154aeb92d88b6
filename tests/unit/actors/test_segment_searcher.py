"""How a segment is searched: candidates and their exact scores, filters, and scans where an index would not pay."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import actors.segment_searcher
from actors.segment_searcher import SCAN_FLOATS_MAX, SegmentSearcher, gathered_blocks, widening
from cluster.config import CollectionConfig, Metric, RerankStore
from cluster.errors import Invalid
from cluster.index_spec import IndexSpec
from cluster.row_selection import RowSelection
from cluster.segment import Rows
from cluster.topk import recall_at_k
from tests.unit.actors.points import (
    INDEXES,
    METRICS,
    Points,
    built_index,
    in_row_order,
    random_points,
    random_vectors,
    spec_of,
    true_rows_of,
    wide_open,
    write_points,
)

COUNT, DIMENSION = 500, 16
Vectors = NDArray[np.float32]


@dataclass
class FakeIndex:
    """Finds the first rows that the selection holds, in order, and records what it was asked."""

    count: int
    knobs: tuple[str, ...] = ("nprobe", "rerank")
    lists: int = 64
    asked: list[tuple[int, int, dict[str, float], bool]] = field(default_factory=list)

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[NDArray[np.int64], Vectors]:
        self.asked.append((len(queries), k, dict(params), selection is not None))
        rows = np.arange(self.count) if selection is None else selection.rows()
        labels = np.full(min(k, self.count), -1, dtype=np.int64)
        labels[: len(rows)] = rows[: len(labels)]
        return np.tile(labels, (len(queries), 1)), np.zeros((len(queries), len(labels)), np.float32)

    def check(self, params: dict[str, float]) -> None:
        if params.keys() - set(self.knobs):
            raise Invalid.at("params", "unknown")

    def add(self, vectors: Vectors) -> None:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        raise NotImplementedError


def line_of_rows(folder: Path, count: int = COUNT) -> Rows:
    """Row i is the vector (i, 0, 0, ...)."""
    vectors = np.zeros((count, DIMENSION), np.float32)
    vectors[:, 0] = np.arange(count)
    config = CollectionConfig(DIMENSION, "l2")
    points = in_row_order(Points(pa.array(np.arange(count)), vectors))
    return write_points(folder, config, Points(points.ids, vectors))


def spec_with(store: RerankStore, kind: Any = "ivf_pq", codes: Any = "float32") -> IndexSpec:
    return IndexSpec(kind, {"nlist": 64, "pq_m": 4, "pq_bits": 4}, codes, 0, "", rerank_store=store)


# --- candidates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "params", "candidates", "passed"),
    [
        (spec_with("none"), {"nprobe": 3}, 7, {"nprobe": 3}),
        (spec_with("rows"), {"nprobe": 3, "rerank": 8.0}, 56, {"nprobe": 3}),
        (spec_with("rows"), {"nprobe": 3, "rerank": 1.5}, 11, {"nprobe": 3}),
        (spec_with("rows"), {"nprobe": 3}, 7, {"nprobe": 3}),
        (spec_with("rows", "ivf_sq8"), {"nprobe": 3}, 14, {"nprobe": 3}),
        (spec_with("rows", "hnsw", "sq8"), {}, 14, {}),
        (spec_with("float16"), {"nprobe": 3, "rerank": 8.0}, 7, {"nprobe": 3, "rerank": 8.0}),
        (spec_with("float32"), {"nprobe": 3, "rerank": 8.0}, 7, {"nprobe": 3, "rerank": 8.0}),
        (spec_with("sq8"), {"nprobe": 3, "rerank": 8.0}, 14, {"nprobe": 3, "rerank": 4.0}),
        (spec_with("sq8"), {"nprobe": 3}, 14, {"nprobe": 3}),
    ],
)
def test_search_asks_the_index_for_as_many_candidates_as_its_store_needs(
    spec: IndexSpec, params: dict[str, float], candidates: int, passed: dict[str, float], tmp_path: Path
) -> None:
    index = FakeIndex(COUNT)
    rows, scores = SegmentSearcher(index, spec, line_of_rows(tmp_path), "l2").search(
        np.zeros((2, DIMENSION), np.float32), 7, params
    )
    assert index.asked == [(2, candidates, passed, False)]
    assert rows.shape == scores.shape == (2, 7)


@pytest.mark.parametrize("store", ["rows", "float16", "sq8"])
def test_scores_are_those_of_the_rows_where_the_index_rounds(store: RerankStore, tmp_path: Path) -> None:
    """The index knows no distances at all; its candidates are ordered by those of the rows."""
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with(store), line_of_rows(tmp_path), "l2")
    query = np.zeros((1, DIMENSION), np.float32)
    query[0, 0] = 5.2
    rows, scores = searcher.search(query, 8, {"nprobe": 1, "rerank": 4.0})
    assert rows[0, :5].tolist() == [5, 6, 4, 7, 3]
    np.testing.assert_allclose(scores[0, :2], [0.04, 0.64], rtol=1e-4)


def test_search_of_more_queries_than_fit_at_once_is_done_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.segment_searcher, "CANDIDATES_MAX", 100)
    index = FakeIndex(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows"), line_of_rows(tmp_path), "l2")
    rows, scores = searcher.search(np.zeros((12, DIMENSION), np.float32), 4, {"rerank": 5.0})
    assert [asked[0] for asked in index.asked] == [5, 5, 2]
    assert rows.shape == scores.shape == (12, 4)
    assert (rows == np.arange(4)).all()


def test_search_of_no_queries_is_empty(tmp_path: Path) -> None:
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with("rows"), line_of_rows(tmp_path), "l2")
    rows, scores = searcher.search(np.empty((0, DIMENSION), np.float32), 4, {})
    assert rows.shape == scores.shape == (0, 4)


@dataclass
class GraphOfLine(FakeIndex):
    """Finds the rows nearest to a query's first number, as `line_of_rows` has them, among those of the selection."""

    knobs: tuple[str, ...] = ("ef_search", "rerank")
    lists: int = 0

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[NDArray[np.int64], Vectors]:
        self.asked.append((len(queries), k, dict(params), selection is not None))
        rows = np.arange(self.count) if selection is None else selection.rows()
        distances = np.square(rows[None, :] - queries[:, :1]).astype(np.float32)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return rows[order], np.take_along_axis(distances, order, 1)


FAR = {"ef_search": 20.0, "far_ef_search": 60.0, "far_score": 100.0}


def on_the_line(*numbers: float) -> Vectors:
    queries = np.zeros((len(numbers), DIMENSION), np.float32)
    queries[:, 0] = numbers
    return queries


def test_far_queries_are_searched_again_with_their_own_effort(tmp_path: Path) -> None:
    """The tenth row lies within 6 of a query among the rows, 39 away from one that is 30 beside them."""
    index = GraphOfLine(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows", "hnsw"), line_of_rows(tmp_path), "l2")
    rows, scores = searcher.search(on_the_line(100.2, -30.0, 300.2), 3, FAR)
    assert [asked[:3] for asked in index.asked] == [(3, 10, {"ef_search": 20.0}), (1, 3, {"ef_search": 60.0})]
    assert rows.tolist() == [[100, 101, 99], [0, 1, 2], [300, 301, 299]]
    np.testing.assert_allclose(scores[1], [900.0, 961.0, 1_024.0])
    index.asked.clear()
    assert searcher.search(on_the_line(100.2, 300.2), 12, FAR)[0].shape == (2, 12)
    assert searcher.search(on_the_line(-30.0), 12, FAR)[0].tolist() == [list(range(12))]
    assert [asked[:2] for asked in index.asked] == [(2, 12), (1, 12), (1, 12)]


def test_parameters_of_far_queries_reach_no_index_and_keep_the_rerank_that_was_asked_for(tmp_path: Path) -> None:
    index = GraphOfLine(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows", "hnsw"), line_of_rows(tmp_path), "l2")
    searcher.search(on_the_line(-30.0), 10, FAR | {"rerank": 2.0})
    assert [asked[1:3] for asked in index.asked] == [(20, {"ef_search": 20.0}), (20, {"ef_search": 60.0})]


def test_query_whose_neighbours_are_deleted_counts_as_far_and_is_searched_as_under_a_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 500 rows 100 to 139 are deleted: whoever asks there finds the tenth row 20 and more away."""
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)
    mask = np.ones(COUNT, dtype=bool)
    mask[100:140] = False
    index = GraphOfLine(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows", "hnsw"), line_of_rows(tmp_path), "l2")
    rows, _ = searcher.search(on_the_line(300.2, 119.6), 2, FAR, RowSelection.of(mask))
    assert rows.tolist() == [[300, 301], [140, 99]]
    assert index.asked[0] == (2, 10, {"ef_search": 22}, True)  # 20 / .92: what is deleted is visited as well
    assert [asked[0] for asked in index.asked[1:]] == [1]  # what is near it is looked at; nothing is kept there: a scan


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [name for name in INDEXES if not name.startswith("OPQ")])
def test_search_of_a_wide_open_index_is_exact(name: str, metric: Metric, tmp_path: Path) -> None:
    config = CollectionConfig(DIMENSION, metric, index=INDEXES[name])
    points = in_row_order(random_points(config, COUNT, seed=2))
    spec = spec_of(INDEXES[name], COUNT, DIMENSION, metric)
    index = built_index(spec, metric, points.vectors)
    queries = random_vectors(config, 20, seed=3)
    searcher = SegmentSearcher(index, spec, write_points(tmp_path, config, points), metric)
    rows, scores = searcher.search(queries, 10, wide_open(index))
    truth, true_scores = true_rows_of(points, queries, 10, metric)
    assert recall_at_k(rows, truth).mean() >= 0.98
    same = rows == truth
    np.testing.assert_allclose(scores[same], true_scores[same], rtol=1e-5, atol=1e-5)


def test_search_with_a_parameter_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = CollectionConfig(DIMENSION, "l2", index=INDEXES["hnsw sq8"])
    points = in_row_order(random_points(config, COUNT))
    spec = spec_of(config.index, COUNT, DIMENSION)
    index = built_index(spec, "l2", points.vectors)
    searcher = SegmentSearcher(index, spec, write_points(tmp_path, config, points), "l2")
    with pytest.raises(Invalid, match="it takes: ef_search, rerank"):
        searcher.search(points.vectors[:1], 5, {"nprobe": 4})


# --- filters ------------------------------------------------------------------------------------------------------


def selecting(rows: Any, count: int = COUNT) -> RowSelection:
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return RowSelection.of(mask)


@pytest.fixture
def no_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)


def test_selection_of_all_rows_is_none_at_all(tmp_path: Path) -> None:
    index = FakeIndex(COUNT)
    searcher = SegmentSearcher(index, spec_with("none"), line_of_rows(tmp_path), "l2")
    searcher.search(np.zeros((1, DIMENSION), np.float32), 4, {"nprobe": 2}, selecting(slice(None)))
    assert index.asked == [(1, 4, {"nprobe": 2}, False)]


def test_few_kept_rows_are_scanned_without_asking_the_index(tmp_path: Path) -> None:
    assert COUNT * DIMENSION < SCAN_FLOATS_MAX
    index = FakeIndex(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows"), line_of_rows(tmp_path), "l2")
    query = np.zeros((1, DIMENSION), np.float32)
    query[0, 0] = 251.2
    rows, scores = searcher.search(query, 4, {"nprobe": 2}, selecting([7, 250, 252, 400, 499]))
    assert index.asked == []
    assert rows.tolist() == [[252, 250, 400, 7]]
    np.testing.assert_allclose(scores[0, :2], [0.64, 1.44], rtol=1e-4)


@pytest.mark.usefixtures("no_scans")
@pytest.mark.parametrize(
    ("near_kept", "nprobe"),
    [(32, 8), (28, 8), (16, 16), (8, 32), (4, 64), (2, 64)],
)
def test_index_visits_more_where_fewer_of_the_nearest_rows_are_kept(
    near_kept: int, nprobe: int, tmp_path: Path
) -> None:
    """32 nearest rows are looked at with a quarter of the effort; no more lists are visited than there are."""
    index = FakeIndex(COUNT)
    searcher = SegmentSearcher(index, spec_with("none"), line_of_rows(tmp_path), "l2")
    selection = selecting([*range(near_kept), *range(100, 400)])
    rows, _ = searcher.search(np.zeros((3, DIMENSION), np.float32), 4, {"nprobe": 8}, selection)
    assert index.asked == [(3, 32, {"nprobe": 2}, False), (3, 4, {"nprobe": nprobe}, True)]
    assert (rows >= 0).all()


@pytest.mark.usefixtures("no_scans")
@pytest.mark.parametrize("near_kept", [0, 1])
def test_rows_are_scanned_where_almost_none_of_the_nearest_is_kept(near_kept: int, tmp_path: Path) -> None:
    index = FakeIndex(COUNT)
    searcher = SegmentSearcher(index, spec_with("rows"), line_of_rows(tmp_path), "l2")
    selection = selecting([*range(near_kept), *range(100, 400)])
    rows, _ = searcher.search(np.zeros((2, DIMENSION), np.float32), 3, {"nprobe": 8}, selection)
    assert index.asked == [(2, 32, {"nprobe": 2}, False)]
    assert rows.tolist() == [selection.rows()[:3].tolist()] * 2


class TwoSidedIndex(FakeIndex):
    """Near a query with a positive first number are the last rows, near another the first ones."""

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[NDArray[np.int64], Vectors]:
        labels, scores = super().search(queries, k, params, selection)
        if selection is None:
            labels[queries[:, 0] > 0] = self.count - 1 - labels[queries[:, 0] > 0]
        return labels, scores


@pytest.mark.usefixtures("no_scans")
def test_each_query_gets_the_effort_that_its_own_neighbourhood_takes(tmp_path: Path) -> None:
    """The second half of the rows is kept: all that is near one query, nothing that is near the other."""
    index = TwoSidedIndex(COUNT, ("ef_search",), 0)
    searcher = SegmentSearcher(index, spec_with("none", "hnsw"), line_of_rows(tmp_path), "l2")
    queries = np.zeros((4, DIMENSION), np.float32)
    queries[[1, 2], 0] = 1_000.0
    rows, scores = searcher.search(queries, 3, {"ef_search": 100}, selecting(slice(COUNT // 2, COUNT)))
    assert index.asked == [(4, 32, {"ef_search": 25}, False), (2, 3, {"ef_search": 100}, True)]
    assert rows.tolist() == [[250, 251, 252]] * 4  # of the fake index for two, by brute force for the others
    assert scores[0, 0] == scores[3, 0] == 250.0**2
    assert scores[1, 0] == scores[2, 0] == 0.0


@pytest.mark.usefixtures("no_scans")
def test_index_without_effort_to_set_is_searched_once(tmp_path: Path) -> None:
    index = FakeIndex(COUNT, (), 0)
    searcher = SegmentSearcher(index, spec_with("none", "flat"), line_of_rows(tmp_path), "l2")
    searcher.search(np.zeros((1, DIMENSION), np.float32), 4, {}, selecting(range(300, 400)))
    assert index.asked == [(1, 4, {}, True)]


@pytest.mark.usefixtures("no_scans")
def test_missing_rows_are_marked_where_fewer_are_kept_than_asked_for(tmp_path: Path) -> None:
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with("rows"), line_of_rows(tmp_path), "l2")
    rows, _ = searcher.search(np.zeros((1, DIMENSION), np.float32), 6, {"nprobe": 4}, selecting([480, 490]))
    assert rows.tolist() == [[480, 490, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("share", "factor"),
    [(1.0, 1), (0.75, 1), (0.70, 2), (0.5, 2), (0.25, 4), (0.125, 8), (0.1, 8), (1 / 16, 16), (1 / 32, 32)],
)
def test_widening_is_the_nearest_power_of_two(share: float, factor: int) -> None:
    assert widening(np.array([share])).tolist() == [factor]


def test_widening_where_nothing_is_kept_is_beyond_all_bounds() -> None:
    assert widening(np.array([0.0]))[0] > actors.segment_searcher.WIDEN_MAX


# --- brute force --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_exact_of_a_selection_equals_brute_force_over_it(metric: Metric, tmp_path: Path) -> None:
    config = CollectionConfig(DIMENSION, metric)
    points = in_row_order(random_points(config, COUNT, seed=4))
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with("none"), write_points(tmp_path, config, points), metric)
    kept = np.flatnonzero(np.random.default_rng(5).random(COUNT) < 0.4)
    queries = random_vectors(config, 9, seed=6)
    rows, scores = searcher.exact(queries, 12, selecting(kept))
    truth, true_scores = true_rows_of(points.take(kept), queries, 12, metric)
    np.testing.assert_array_equal(rows, kept[truth])
    np.testing.assert_allclose(scores, true_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kept", "width"), [(0, 0), (3, 3), (400, 12)])
def test_exact_is_as_wide_as_there_are_rows_to_find(kept: int, width: int, tmp_path: Path) -> None:
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with("none"), line_of_rows(tmp_path), "l2")
    rows, scores = searcher.exact(np.zeros((2, DIMENSION), np.float32), 12, selecting(range(kept)))
    assert rows.shape == scores.shape == (2, width)
    assert (rows == np.arange(width)).all()


@pytest.mark.parametrize("floats", [1, 100, 1_000, 10**9])
def test_kept_rows_are_gathered_a_bounded_number_at_a_time(
    floats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.segment_searcher, "GATHER_FLOATS", floats)
    kept = np.arange(3, 400, 7)
    blocks = list(gathered_blocks(line_of_rows(tmp_path), kept))
    assert all(len(vectors) <= max(1, floats // DIMENSION) for _, vectors in blocks)
    assert [first for first, _ in blocks] == np.cumsum([0, *(len(v) for _, v in blocks)])[:-1].tolist()
    np.testing.assert_array_equal(np.concatenate([vectors[:, 0] for _, vectors in blocks]), kept)


@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_selection_tells_of_any_rows_whether_it_holds_them(count: int) -> None:
    mask = np.random.default_rng(7).random(count) < 0.5
    rows = np.random.default_rng(8).integers(count, size=(4, 6))
    np.testing.assert_array_equal(RowSelection.of(mask).holds(rows), mask[rows])


@pytest.mark.parametrize("kept", [3, COUNT // 2])
def test_filtered_search_refuses_knobs_that_the_index_does_not_take(kept: int, tmp_path: Path) -> None:
    rows = line_of_rows(tmp_path)
    searcher = SegmentSearcher(FakeIndex(COUNT), spec_with("rows"), rows, "l2")
    with pytest.raises(Invalid):
        searcher.search(
            np.zeros((1, DIMENSION), np.float32), 2, {"ef_search": 9}, RowSelection.of(np.arange(COUNT) < kept)
        )
