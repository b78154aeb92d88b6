"""Views over segments and a tail at once: ties, tombstones, attributes, knobs, fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.shard import Shard
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.ids import id_array
from cluster.manifest import ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import Wal
from cluster.write import PointWrite
from tests.unit.actors.batches import (
    CONFIG,
    batch_of,
    created,
    delete,
    held_ids,
    hits_of,
    opened,
    record,
    upsert,
    vectors_of,
)
from tests.unit.actors.points import Points, in_row_order, manifest_log, name_of, publish, random_points, random_vectors


def imported(
    store: ObjectStore, *pieces: Points, config: CollectionConfig = CONFIG, index: tuple[str, ...] = ()
) -> None:
    """A generation with one segment for each piece, of the index kinds given."""
    kinds = index or ("flat",) * len(pieces)
    refs = tuple(
        publish(store, "words", CollectionConfig(config.dimension, config.metric, config.id_type,
                vector_dtype=config.vector_dtype, index=IndexConfig(kind)), in_row_order(points))  # type: ignore[arg-type]
        for points, kind in zip(pieces, kinds, strict=True)
    )  # fmt: skip
    log = manifest_log(store, "words")
    ends = log.wal_ends(log.newest(), 1)
    log.commit_generation(log.newest(), config, (ShardEntry(0, refs, ends[0].applied_lsn, ends[0].epoch),))


def line(*ids: int, at: float | None = None) -> Points:
    vectors = vectors_of(ids if at is None else [at] * len(ids))
    return Points(id_array(ids, "int64"), vectors)


def written(store: ObjectStore, *writes: PointWrite) -> None:
    wal = Wal(store, "words", 0, 0)
    end, _ = wal.end(0, 0)
    for lsn, write in enumerate(writes, end + 1):
        wal.append(record(lsn, write))


def asked(shard: Shard, params: SearchParams, k: int = 5, number: float = 0.0) -> Hits | Exception:
    vectors = vectors_of([number])
    (outcome,) = shard.search(ShardSearch(1, vectors, (SearchGroup(0, 1, k, params),)))
    return outcome


def test_points_that_tie_across_segments_and_tail_come_by_id(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(9, 3, 12, at=1.0), line(4, 8, 1, at=1.0))
    written(store, upsert(7, 2, 11, at=1.0), upsert(3, at=5.0), delete(1))
    shard = opened(store, tmp_path)
    for k in range(1, 9):
        assert held_ids(shard, k=k) == [2, 4, 7, 8, 9, 11, 12, 3][:k]
        assert hits_of(shard, k=k).counts.tolist() == [k]


def test_written_point_replaces_its_row_and_a_deleted_one_is_nowhere(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(1, 2, 3), line(4, 5, 6))
    written(store, upsert(2, at=50.0), delete(5, 99), upsert(5, at=60.0), delete(1), upsert(7))
    shard = opened(store, tmp_path)
    status = shard.status()
    assert (status.points, status.tail_points, status.tombstones, status.lsn) == (6, 3, 3, 5)
    assert held_ids(shard) == [3, 4, 6, 7, 2, 5]
    assert hits_of(shard, 50.0, 1).ids.to_pylist() == [2]
    assert hits_of(shard).lsn == 5
    view = shard.view(1)
    first, second = view.segments
    assert view.live_rows(first, id_array([2, 3, 1, 9], "int64")).tolist()[0::2] == [-1, -1]
    assert (view.live_rows(second, id_array([4, 6, 4], "int64")) >= 0).all()


def test_segment_of_which_nothing_is_left_is_not_searched(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(1, 2), line(3))
    written(store, delete(1, 2, 3))
    shard = opened(store, tmp_path)
    assert shard.status().points == 0
    assert hits_of(shard).counts.tolist() == [0]
    assert hits_of(shard).ids.type == pa.int64()
    found, table = shard.fetch(1, id_array([1, 3], "int64"), ["id"])
    assert (found.tolist(), table) == ([False, False], None)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_float16_points_come_back_as_they_were_stored(id_type: Any, tmp_path: Path) -> None:
    config = CollectionConfig(6, "cosine", id_type, vector_dtype="float16", index=IndexConfig("flat"))
    store, points = MemoryStore(), random_points(config, 40, seed=4)
    imported(store, points.take(np.arange(20)), config=config)
    rest = points.take(np.arange(20, 40))
    ids = rest.ids.to_pylist()
    written(store, PointWrite(batch_of(config, ids, rest.vectors, name=pa.array(rest.names, pa.large_string()))))
    shard = opened(store, tmp_path)
    found, table = shard.fetch(1, points.ids, ["vector", "name", "id"])
    assert found.all()
    assert table.column("vector").type.value_type == pa.float16()
    assert table.column("vector").to_pylist() == points.vectors.tolist()
    assert table.column("name").to_pylist() == [name_of(value) for value in points.ids.to_pylist()]
    queries = points.vectors.astype(np.float32)
    (hits,) = shard.search(ShardSearch(1, queries, (SearchGroup(0, 40, 1, SearchParams()),)))
    assert isinstance(hits, Hits)
    assert hits.ids.to_pylist() == points.ids.to_pylist()


# --- attributes -------------------------------------------------------------------------------------------------


def test_attribute_that_a_part_lacks_is_null_there_in_searches_and_fetches(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(1, 2))
    written(store, upsert(3), upsert(4, rank=pa.array([40])), upsert(5, name=pa.array(["five"])))
    shard = opened(store, tmp_path)
    expected = {
        "name": ["name of 1", "name of 2", None, None, "five"],
        "rank": [None, None, None, 40, None],
        "other": [None] * 5,
    }
    columns = hits_of(shard, columns=("name", "rank", "other")).columns
    assert columns.to_pydict() == expected
    assert columns.schema.types[:2] == [pa.large_string(), pa.int64()]
    found, table = shard.fetch(1, id_array([5, 4, 3, 2, 1, 5], "int64"), ["rank", "name"])
    assert found.all()
    assert table.to_pydict() == {name: [*reversed(expected[name]), expected[name][4]] for name in ("rank", "name")}
    assert shard.status().attributes == {1: {"name": "large_string", "rank": "int64"}}


def test_declared_attribute_that_nobody_has_is_null_of_its_type(tmp_path: Path) -> None:
    store = MemoryStore()
    created(store, tmp_path)
    manifest_log(store, "words").declare_attributes({"rank": "int32"})
    written(store, upsert(1), upsert(2, n=pa.array([1])))
    shard = opened(store, tmp_path)
    column = hits_of(shard, columns=("rank",)).columns.column(0)
    assert (column.type, column.null_count) == (pa.int32(), 2)


def test_attribute_whose_type_an_import_changed_is_null_where_it_does_not_fit(tmp_path: Path) -> None:
    """The import's `name` is text. Points were written with numbers while it ran, and with text after it."""
    store = MemoryStore()
    imported(store, line(1))
    written(store, upsert(2, name=pa.array([22])), upsert(3, name=pa.array(["three"])), upsert(4, name=pa.array([[4]])))
    shard = opened(store, tmp_path)
    expected = ["name of 1", "22", "three", None]
    assert hits_of(shard, columns=("name",)).columns["name"].to_pylist() == expected
    _, table = shard.fetch(1, id_array([1, 2, 3, 4], "int64"), ["name"])
    assert table["name"].to_pylist() == expected


# --- fetches ----------------------------------------------------------------------------------------------------


def test_fetch_of_repeated_ids_over_all_parts_keeps_the_order(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(1, 2, 3), line(4, 5, 6))
    written(store, upsert(7, 8), upsert(2, at=22.0), delete(5))
    ids = [7, 2, 99, 6, 5, 7, 1, 2, 4, 99, 8, 6]
    found, table = opened(store, tmp_path).fetch(1, id_array(ids, "int64"), ["vector", "id"])
    here = [value for value in ids if value not in (99, 5)]
    assert found.tolist() == [value not in (99, 5) for value in ids]
    assert table["id"].to_pylist() == here
    assert [vector[0] for vector in table["vector"].to_pylist()] == [22.0 if v == 2 else float(v) for v in here]


# --- raw knobs --------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Shard:
    """A flat segment, one with lists, and one with a graph; a tail."""
    store = MemoryStore()
    vectors = random_vectors(CONFIG, 120, seed=1)
    pieces = [Points(id_array(range(at, at + 40), "int64"), vectors[at : at + 40]) for at in (0, 40, 80)]
    imported(store, *pieces, index=("flat", "ivf_flat", "hnsw"))
    written(store, upsert(1_000, 1_001))
    return opened(store, tmp_path)


@pytest.mark.parametrize("params", [SearchParams(nprobe=1_000), SearchParams(ef_search=64)])
def test_raw_knob_goes_to_the_segments_that_take_it(params: SearchParams, mixed: Shard) -> None:
    exact, found = asked(mixed, SearchParams(exact=True)), asked(mixed, params)
    assert isinstance(exact, Hits)
    assert isinstance(found, Hits), found
    assert found.counts.tolist() == [5]
    if params.ef_search:  # lists as they were tuned, so that some may be missed; the other parts are all there
        return
    assert found.ids.to_pylist() == exact.ids.to_pylist()


def test_two_knobs_of_different_kinds_are_both_taken(mixed: Shard) -> None:
    exact, found = asked(mixed, SearchParams(exact=True)), asked(mixed, SearchParams(nprobe=1_000, ef_search=64))
    assert isinstance(found, Hits), found
    assert isinstance(exact, Hits)
    assert found.ids.to_pylist() == exact.ids.to_pylist()


@pytest.mark.parametrize("params", [SearchParams(nprobe=4), SearchParams(ef_search=64)])
def test_raw_knob_that_no_segment_takes_is_invalid(params: SearchParams, tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(1, 2), line(3, 4))
    written(store, upsert(5))
    refused = asked(opened(store, tmp_path), params)
    assert isinstance(refused, Invalid)
    assert [error.field for error in refused.errors] == [f"params.{next(iter(params.given))}"]


def test_knob_beside_one_that_fits_nowhere_does_not_save_it(tmp_path: Path) -> None:
    store = MemoryStore()
    imported(store, line(*range(40)), index=("ivf_flat",))
    shard = opened(store, tmp_path)
    refused = asked(shard, SearchParams(nprobe=1_000, ef_search=64))
    assert isinstance(refused, Invalid)
    assert [error.field for error in refused.errors] == ["params.ef_search"]
    assert isinstance(asked(shard, SearchParams(nprobe=1_000)), Hits)
