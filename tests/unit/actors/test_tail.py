"""The mutable part of a shard: block borders, removal, attributes, and views that stay as they are."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import tail as tail_module
from actors.exact_search import exact_search
from actors.tail import Tail, TailView
from actors.ties import TIES_MAX, found_with_ties
from cluster.config import CollectionConfig
from cluster.ids import ID_ARROW_TYPE, hash_ids, id_array
from cluster.wal import WalRecord
from cluster.write import PointWrite
from tests.unit.actors.batches import CONFIG, all_in_threads, batch_of, record, vectors_of
from tests.unit.actors.points import METRICS, Points, brute_force, random_points, random_vectors

NO_ATTRIBUTE = pa.nulls(0, pa.int64())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "BLOCK_FLOATS", 1)  # eight rows, whatever the dimension


def add(tail: Tail, config: CollectionConfig, ids: Any, vectors: Any, **attributes: Any) -> None:
    batch = batch_of(config, ids, vectors, **attributes)
    tail.append(batch, ids, hash_ids(batch.column("id")))


def tail_of(*batches: list[int], config: CollectionConfig = CONFIG) -> Tail:
    tail = Tail(config)
    for ids in batches:
        add(tail, config, ids, vectors_of(ids, config.dimension))
    return tail


def live_ids(view: TailView) -> list[Any]:
    rows = view.selection.rows()
    return view.ids(rows[rows < view.count]).to_pylist()  # type: ignore[no-any-return]


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (8,), (9,), (1, 7), (5, 5, 5, 5), (8, 8), (40,), (0, 17, 0, 16)])
def test_points_are_found_across_the_borders_of_blocks(sizes: tuple[int, ...], small_blocks: None) -> None:
    bounds = np.cumsum([0, *sizes])
    view = tail_of(*(list(range(low, high)) for low, high in itertools.pairwise(bounds.tolist()))).view()
    count = sum(sizes)
    assert (view.count, view.points, view.size_bytes) == (count, count, count * (16 + 8))
    assert live_ids(view) == list(range(count))
    assert view.rows_of_ids(id_array(range(-1, count + 1), "int64")).tolist() == [-1, *range(count), -1]
    rows = np.arange(count)[::-1]
    assert np.array(view.vectors(rows).to_pylist(), np.float32).tolist() == vectors_of(rows.tolist()).tolist()
    found, scores = view.search(vectors_of(range(count)), 1)
    assert found[:, 0].tolist() == list(range(count))
    assert not scores.any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("metric", METRICS)
def test_search_of_what_is_left_equals_brute_force(metric: str, id_type: str, dtype: str, small_blocks: None) -> None:
    config = CollectionConfig(5, metric, id_type, vector_dtype=dtype)  # type: ignore[arg-type]
    points, queries = random_points(config, 60, seed=2), random_vectors(config, 7, seed=3)
    tail = Tail(config)
    for rows in np.array_split(np.arange(60), 7):
        part = points.take(rows)
        add(tail, config, part.ids.to_pylist(), part.vectors)
    gone, kept = points.take(np.arange(0, 60, 3)), points.take(np.flatnonzero(np.arange(60) % 3))
    assert tail.remove(gone.ids.to_pylist()).all()
    view = tail.view()
    found, _ = view.search(queries, 12)
    expected = brute_force(kept, queries, 12, config.metric)
    assert [view.ids(rows).to_pylist() for rows in found] == expected
    assert view.rows_of_ids(gone.ids).tolist() == [-1] * len(gone)
    stored = view.vectors(view.rows_of_ids(kept.ids))
    assert stored.type.value_type == (pa.float32() if dtype == "float32" else pa.float16())
    assert np.array_equal(np.array(stored.to_pylist()), kept.vectors.astype(np.float64))
    assert view.ids(np.arange(0)).type == ID_ARROW_TYPE[id_type]


def test_removed_point_may_come_again_and_is_found_where_it_is_now(small_blocks: None) -> None:
    tail = tail_of(list(range(10)))
    for again in range(20):
        assert tail.remove([3, 4, 99]).tolist() == [True, True, False]
        add(tail, CONFIG, [3, 4], vectors_of([100 + again, 200 + again]))
    view = tail.view()
    assert (view.count, view.points) == (50, 10)
    assert sorted(live_ids(view)) == list(range(10))
    rows = view.rows_of_ids(id_array([4, 3, 4, 99], "int64"))
    assert rows.tolist() == [49, 48, 49, -1]
    assert [vector[0] for vector in view.vectors(rows[:2]).to_pylist()] == [219.0, 119.0]


def test_remove_of_all_points_leaves_none_to_find(small_blocks: None) -> None:
    tail = tail_of(list(range(16)))
    assert tail.remove(range(16)).all()
    assert not tail.remove(range(16)).any()
    view = tail.view()
    assert (view.points, live_ids(view)) == (0, [])
    assert (view.search(vectors_of([0.0]), 5)[0] == -1).all()
    assert not (view.rows_of_ids(id_array(range(16), "int64")) >= 0).any()


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_empty_tail_finds_nothing(id_type: str) -> None:
    config = CollectionConfig(4, id_type=id_type)  # type: ignore[arg-type]
    view = Tail(config).view()
    ids = id_array([1] if id_type == "int64" else ["1"], config.id_type)
    assert (view.points, view.size_bytes, view.attributes) == (0, 0, {})
    assert view.rows_of_ids(ids).tolist() == [-1]
    assert view.rows_of_ids(ids.slice(0, 0)).tolist() == []
    assert view.attributes_of(np.empty(0, np.int64), {"n": pa.int64()})["n"].equals(NO_ATTRIBUTE)


def test_ids_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    def same(ids: Any) -> Any:
        return np.full(len(ids), 7, dtype=np.uint64)

    monkeypatch.setattr(tail_module, "hash_ids", same)
    tail = Tail(CONFIG)
    batch = batch_of(CONFIG, list(range(20)), vectors_of(range(20)))
    tail.append(batch, list(range(20)), same(batch))
    tail.remove([5])
    assert tail.view().rows_of_ids(id_array([19, 5, 0, 20, 8], "int64")).tolist() == [19, -1, 0, -1, 8]


# --- views ------------------------------------------------------------------------------------------------------


def test_view_never_changes_whatever_is_written_after_it(small_blocks: None) -> None:
    tail = tail_of([1, 2, 3])
    views = [tail.view()]
    expected = [[1, 2, 3]]
    for step in range(4, 40):
        tail.remove([step - 3])
        add(tail, CONFIG, [step], vectors_of([step]), n=pa.array([step]))
        views.append(tail.view())
        expected.append(list(range(step - 2, step + 1)))
    for view, ids in zip(views, expected, strict=True):
        assert live_ids(view) == ids
        assert view.points == 3
        found, _ = view.search(vectors_of([0.0]), 10)
        assert view.ids(found[0][found[0] >= 0]).to_pylist() == ids
        assert (view.rows_of_ids(id_array(range(1, 40), "int64")) >= 0).sum() == 3
    assert views[0].attributes == {}


def test_views_taken_while_another_thread_writes_are_each_of_one_moment(small_blocks: None) -> None:
    """The writer moves a window of five ids; it publishes a view after each step, as a generation does."""
    tail = tail_of(list(range(5)))
    current, steps, done = [tail.view()], 400, threading.Event()

    def write() -> None:
        try:
            for step in range(5, steps):
                tail.remove([step - 5])
                add(tail, CONFIG, [step], vectors_of([step]), n=pa.array([step]))
                current[0] = tail.view()
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            view = current[0]
            found, scores = view.search(vectors_of([0.0]), 9)
            ids = view.ids(found[0][found[0] >= 0]).to_pylist()
            assert ids == list(range(ids[0], ids[0] + 5))
            assert scores[0, :5].tolist() == [float(value**2) for value in ids]
            assert view.rows_of_ids(id_array(ids, "int64")).tolist() == found[0, :5].tolist()

    assert not all_in_threads(write, read, read)
    assert live_ids(current[0]) == list(range(steps - 5, steps))


# --- attributes -------------------------------------------------------------------------------------------------


def test_attribute_that_a_row_was_not_given_is_null(small_blocks: None) -> None:
    tail = tail_of([0, 1])
    add(tail, CONFIG, [2, 3], vectors_of([2, 3]), word=pa.array(["b", None]))
    add(tail, CONFIG, [4], vectors_of([4]))
    add(tail, CONFIG, [5, 6], vectors_of([5, 6]), n=pa.array([50, 60]), word=pa.array(["e", "f"]))
    view = tail.view()
    assert view.attributes == {"word": pa.string(), "n": pa.int64()}
    rows = np.array([6, 0, 2, 5, 4, 3, 2, 1])
    found = view.attributes_of(rows, {"word": pa.string(), "n": pa.int64(), "other": pa.int8()})
    assert found["word"].to_pylist() == ["f", None, "b", "e", None, None, "b", None]
    assert found["n"].to_pylist() == [60, None, None, 50, None, None, None, None]
    assert found["other"].equals(pa.nulls(8, pa.int8()))
    assert view.attributes_of(rows[:0], {"n": pa.int64()})["n"].equals(NO_ATTRIBUTE)


@pytest.mark.parametrize("whole", [0, 100], ids=["rows chosen", "chunks copied whole"])
def test_attributes_of_any_rows_of_large_and_small_chunks(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way a chunk's rows are taken, each row has its own value."""
    monkeypatch.setattr("actors.tail.COPIED_WHOLE", whole)
    tail = Tail(CONFIG)
    for first, count in ((0, 20), (20, 1), (21, 3), (24, 40)):
        ids = list(range(first, first + count))
        add(tail, CONFIG, ids, vectors_of(ids), n=pa.array([10 * number for number in ids]))
    rows = np.array([63, 20, 0, 23, 19, 22, 24, 0])
    assert tail.view().attributes_of(rows, {"n": pa.int64()})["n"].to_pylist() == (10 * rows).tolist()


def test_attribute_of_several_types_is_read_as_the_one_asked_for_or_null() -> None:
    """An import changed the type between two writes of one tail."""
    tail = Tail(CONFIG)
    add(tail, CONFIG, [0, 1], vectors_of([0, 1]), n=pa.array(["17", "seventeen"]))
    add(tail, CONFIG, [2], vectors_of([2]), n=pa.array([2]))
    add(tail, CONFIG, [3], vectors_of([3]), n=pa.array([2.5]))
    view, rows = tail.view(), np.array([3, 1, 0, 2])
    assert view.attributes_of(rows, {"n": pa.int64()})["n"].to_pylist() == [None, None, 17, 2]
    assert view.attributes_of(rows, {"n": pa.string()})["n"].to_pylist() == ["2.5", "seventeen", "17", "2"]
    assert view.attributes_of(rows, {"n": pa.list_(pa.date32())})["n"].null_count == 4


def test_attribute_of_dictionaries_has_their_values() -> None:
    tail = Tail(CONFIG)
    for number, words in enumerate((["a", "b"], ["b", "c"])):
        ids = [2 * number, 2 * number + 1]
        add(tail, CONFIG, ids, vectors_of(ids), word=pa.array(words).dictionary_encode())
    view = tail.view()
    for dtype in (pa.string(), view.attributes["word"]):
        assert view.attributes_of(np.array([3, 0, 2, 1]), {"word": dtype})["word"].to_pylist() == ["c", "a", "b", "b"]


def test_size_counts_what_ids_and_attributes_take() -> None:
    for id_type, ids in (("int64", [1, 2]), ("string", ["x" * 1_000, "y" * 2_000])):
        config = CollectionConfig(4, "l2", id_type)  # type: ignore[arg-type]
        tail, ids_bytes = Tail(config), id_array(ids, config.id_type).nbytes
        add(tail, config, ids, vectors_of([1, 2]))
        before = tail.view()
        assert before.size_bytes == 2 * 16 + ids_bytes
        words = pa.array(["a" * 5_000, "b" * 5_000], pa.large_string())
        tail.remove(ids)
        add(tail, config, ids, vectors_of([1, 2]), word=words, n=pa.array([1, 2]))
        assert tail.view().size_bytes == 4 * 16 + 2 * ids_bytes + words.nbytes + 16
        assert before.size_bytes == 2 * 16 + ids_bytes, "a view never changes"


def test_tail_does_not_keep_the_record_whose_attributes_it_holds() -> None:
    ids = list(range(100))
    columns = {"word": pa.array([str(value) for value in ids]), "n": pa.array(ids), "flag": pa.array([True, None] * 50)}
    data = record(1, PointWrite(upserts=batch_of(CONFIG, ids, vectors_of(ids), **columns))).encode(0)
    holders = sys.getrefcount(data)
    upserts = WalRecord.decode(data, "record 1", 0, 1, "words").upserts
    assert sys.getrefcount(data) > holders, "a decoded record looks into its bytes"
    tail = Tail(CONFIG)
    tail.append(upserts, ids, hash_ids(upserts.column("id")))
    del upserts
    assert sys.getrefcount(data) == holders
    part = pa.array(["x" * 1_000] * 100).slice(50, 2)
    before = tail.view().size_bytes
    add(tail, CONFIG, [200, 201], vectors_of([0, 0]), word=part)
    assert tail.view().size_bytes - before < 3_000, "of a column that is a part of another, only that is kept"
    assert tail.view().attributes_of(np.array([99, 101]), {"word": pa.string()})["word"].to_pylist() == [
        "99",
        "x" * 1_000,
    ]


def test_types_of_attributes_are_worked_out_once_and_stay_as_a_view_has_them() -> None:
    tail = tail_of([0])
    add(tail, CONFIG, [1], vectors_of([1]), n=pa.array([1]))
    first = tail.view()
    add(tail, CONFIG, [2], vectors_of([2]), n=pa.array([2]))
    add(tail, CONFIG, [3], vectors_of([3]))
    assert tail.view().attributes is first.attributes
    add(tail, CONFIG, [4], vectors_of([4]), n=pa.array(["4"]), word=pa.array(["d"]))
    assert tail.view().attributes == {"n": pa.string(), "word": pa.string()}
    assert first.attributes == {"n": pa.int64()}


# --- ties and brute force ---------------------------------------------------------------------------------------


def test_all_that_tie_with_the_last_hit_are_found(small_blocks: None) -> None:
    tail = Tail(CONFIG)
    add(tail, CONFIG, list(range(40)), vectors_of([1.0] * 40))
    add(tail, CONFIG, [40, 41], vectors_of([0.0, 9.0]))
    tail.remove([0, 8])
    rows, scores = tail.view().search(vectors_of([0.0, 9.0]), 3)
    assert rows[0, 0] == 40
    assert sorted(rows[0][rows[0] >= 0].tolist()) == sorted([40, *set(range(40)) - {0, 8}])
    assert rows[1, 0] == 41
    assert set(rows[1][rows[1] >= 0].tolist()) == {41, *set(range(40)) - {0, 8}}
    assert scores[0, :3].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("k", "tied", "found"), [(1, 0, [1, 1]), (2, 1, [5, 2]), (3, 2, [5, 6]), (5, 1, [5, 6]), (9, 0, [7, 7])]
)
def test_only_queries_whose_last_hit_ties_are_asked_again(k: int, tied: int, found: list[int]) -> None:
    points = np.array([[0.0], [1.0], [1.0], [1.0], [1.0], [5.0], [7.0]], np.float32)
    asked = []

    def find(queries: Any, width: int) -> Any:
        asked.append((len(queries), width))
        return exact_search(queries, [(0, points)], min(width, 7), "l2")

    rows, _ = found_with_ties(find, np.array([[0.0], [6.5]], np.float32), k)
    assert asked == [(2, k + 1), *([(tied, k + TIES_MAX)] if tied else [])]
    assert [len(set(row[row >= 0].tolist())) for row in rows] == found


@pytest.mark.parametrize("metric", METRICS)
def test_brute_force_under_a_selection_finds_its_rows_alone(metric: Any) -> None:
    config = CollectionConfig(4, metric)
    points, queries = random_points(config, 45, seed=5), random_vectors(config, 3, seed=6)
    mask = np.random.default_rng(1).random(45) < 0.4
    mask[8:16], mask[16:24] = True, False  # one block whole, one without any
    kept = Points(points.ids, points.vectors).take(np.flatnonzero(mask))
    blocks = [(first, points.vectors[first : first + 8]) for first in range(0, 45, 8)]
    rows, _ = exact_search(queries, blocks, 45, metric, tail_module.RowSelection.of(mask))
    ids = [points.ids.take(pa.array(row[row >= 0])).to_pylist() for row in rows]
    assert ids == brute_force(kept, queries, 45, metric)
