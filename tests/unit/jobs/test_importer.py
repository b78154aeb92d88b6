from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors import build_rates
from actors.shard import Shard
from cluster import index_policy, index_spec, paths, segment
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Conflict, Fenced, Invalid, NotFound, Unavailable
from cluster.file_store import FileStore
from cluster.ids import ID_ARROW_TYPE, hash_ids, id_array
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore, open_store
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.recent_queries import QuerySample, delete_queries, store_queries
from cluster.routing import Routing
from cluster.segment import SegmentDescription
from cluster.wal import Wal, WalRecord
from jobs import build_plan, import_source, importer, row_reader, segment_task
from jobs.build_plan import Workers
from jobs.import_source import Columns
from jobs.importer import STALE_STAGING_S, Importer, ImportOptions
from jobs.report import JobReporter, JobStatus, read_status
from jobs.row_reader import RowPlace, checked_vectors
from jobs.snapshots import BranchOptions, branch
from tests.fakes import Fault, FaultyStore, run_tasks_here
from tests.unit.jobs.imports import (
    JOB,
    assert_left_alone,
    expected,
    log_of,
    new_data_url,
    random_table,
    run_import,
    stored,
    table_of,
    write,
)

ALL = Columns(attributes="all")


def fixed(values: list[Any], size: int, dtype: Any = None) -> pa.Array:
    return pa.array(values, pa.list_(dtype or pa.float32(), size))


def in_hash_order(ids: Sequence[Any], id_type: str) -> list[Any]:
    hashes = hash_ids(pa.array(ids, ID_ARROW_TYPE[id_type])).tolist()
    return [point_id for _, point_id in sorted(zip(hashes, ids, strict=True))]


# --- what is stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_import_of_a_folder_keeps_every_point_exactly_once(
    id_type: str, dtype: str, metric: Any, tmp_path: Path
) -> None:
    tables = [random_table(size, id_type=id_type, seed=n, first=100 * n) for n, size in enumerate((57, 1, 33))]
    for number, table in enumerate(tables):
        write(tmp_path / f"{number}.parquet", table)
    data = new_data_url()
    create = {"shards": 2, "metric": metric, "vector_dtype": dtype}
    manifest = run_import(data, tmp_path, columns=ALL, create=create)
    assert (manifest.version, manifest.generation, manifest.points) == (1, 1, 91)
    assert manifest.config == CollectionConfig(4, metric, id_type, shards=2, vector_dtype=dtype)  # type: ignore[arg-type]
    found = stored(open_store(data), manifest)
    whole = pa.concat_tables(table.unify_dictionaries() for table in tables)
    assert len(found.ids) == 91
    assert found.by_id() == expected(whole, metric, dtype)
    types = {name: found.schema.field(name).type for name in ("word", "pos", "rank")}
    assert types == {"word": pa.large_string(), "pos": pa.large_string(), "rank": pa.int16()}
    ids = list(found.shard_of)
    routed = Routing(2).shards_of_ids(pa.array(ids, ID_ARROW_TYPE[id_type])).tolist()
    assert found.shard_of == dict(zip(ids, routed, strict=True))
    assert {0, 1} == set(routed)
    assert found.ids == in_hash_order(ids, id_type)
    assert_left_alone(open_store(data), newest=manifest)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "hnsw"])
def test_imported_collection_can_be_served_and_finds_its_points(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "words.parquet", random_table(300, dimension=8), row_group_size=64)
    data = new_data_url()
    run_import(data, source, columns=ALL, create={"shards": 2, "metric": "l2", "index": {"kind": kind}})
    found = {}
    for number in range(2):
        shard = Shard(open_store(data), "words", number, tmp_path / "cache")
        view = shard.load()
        assert {loaded.spec.kind for loaded in view.segments} == {kind}
        for loaded in view.segments:
            queries = loaded.rows.vectors(0, loaded.rows.count)
            group = SearchGroup(0, len(queries), 1, SearchParams(), ("word",))
            (hits,) = shard.search(ShardSearch(1, queries, (group,)))
            assert isinstance(hits, Hits)
            share = np.mean([a == b for a, b in zip(hits.ids.to_pylist(), loaded.ids.to_pylist(), strict=True)])
            assert share >= (1.0 if kind == "flat" else 0.95)
            words = dict(zip(hits.ids.to_pylist(), hits.columns["word"].to_pylist(), strict=True))
            found |= words
    assert all(word == (f"word {i}" if i % 7 else None) for i, word in found.items())
    assert len(found) >= 285


def test_import_twice_gives_the_same_points_and_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", random_table(60))
    write(tmp_path / "b.parquet", random_table(40, first=100))
    data = new_data_url()
    store = open_store(data)
    first = run_import(data, tmp_path, columns=ALL, create={"shards": 2})
    second = run_import(data, tmp_path, columns=ALL, job_id="import-2")
    assert (second.version, second.generation) == (2, 2)
    assert second.config == first.config
    assert first.segments.keys().isdisjoint(second.segments)
    before, after = stored(store, first), stored(store, second)
    assert after.rows_files == before.rows_files
    assert after.by_id() == before.by_id()


def test_import_replaces_the_points_there_were(tmp_path: Path) -> None:
    data = new_data_url()
    run_import(data, write(tmp_path / "a.parquet", random_table(50)), create={"metric": "l2"})
    table = random_table(20, first=40)
    manifest = run_import(data, write(tmp_path / "b.parquet", table), columns=ALL)
    found = stored(open_store(data), manifest)
    assert found.by_id() == expected(table, "l2", "float32")


def test_import_with_little_memory_makes_several_segments_per_shard(tmp_path: Path) -> None:
    table = random_table(400)
    source = write(tmp_path / "words.parquet", table, row_group_size=100)
    data = new_data_url()
    # A shard of 200 points needs 200 x 4 x 4 = 3,200 bytes, 3,680 with the margin: three segments of 1,500.
    manifest = run_import(data, source, columns=ALL, create={"shards": 2, "metric": "l2"}, memory_bytes=1_500)
    assert [len(entry.segments) for entry in manifest.shards] == [3, 3]
    found = stored(open_store(data), manifest)
    assert len(found.ids) == 400
    assert found.by_id() == expected(table, "l2", "float32")
    assert found.ids == in_hash_order(found.ids, "int64")
    hits = search_first(open_store(data), tmp_path / "cache", np.array(table["vector"][0].as_py(), np.float32))
    assert table["id"][0].as_py() in hits


def search_first(store: ObjectStore, cache_dir: Path, vector: np.ndarray[Any, Any]) -> list[Any]:
    """The best id of each of two shards."""
    found = []
    for number in range(2):
        shard = Shard(store, "words", number, cache_dir)
        shard.load()
        (hits,) = shard.search(ShardSearch(1, vector[None, :], (SearchGroup(0, 1, 1, SearchParams()),)))
        assert isinstance(hits, Hits)
        found += hits.ids.to_pylist()
    return found


def test_import_into_a_file_store_equals_one_into_memory(tmp_path: Path) -> None:
    source = write(tmp_path / "words.parquet", random_table(80))
    memory = new_data_url()
    in_memory = run_import(memory, source, columns=ALL, create={"shards": 2})
    url = f"file://{tmp_path / 'data'}"
    in_files = run_import(url, source, columns=ALL, create={"shards": 2})
    files = FileStore(tmp_path / "data")
    assert stored(files, in_files).rows_files == stored(open_store(memory), in_memory).rows_files
    assert_left_alone(files, newest=in_files)


def test_import_reads_units_and_batches_of_any_size_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "words.parquet", random_table(95), row_group_size=17)
    whole, cut = new_data_url(), new_data_url()
    first = run_import(whole, source, columns=ALL)
    monkeypatch.setattr(import_source, "UNIT_BYTES", 1)  # each row group a unit
    monkeypatch.setattr(row_reader, "READ_BYTES", 5 * 4 * 4)  # five rows at a time
    second = run_import(cut, source, columns=ALL)
    assert stored(open_store(cut), second).rows_files == stored(open_store(whole), first).rows_files


def test_import_takes_only_the_columns_asked_for(tmp_path: Path) -> None:
    table = random_table(12).rename_columns(["key", "embedding", "word", "pos", "rank"])
    source = write(tmp_path / "words.parquet", table)
    data = new_data_url()
    manifest = run_import(data, source, columns=Columns("key", "embedding", ("rank",)))
    found = stored(open_store(data), manifest)
    assert found.attributes == {"rank": [point_id % 100 for point_id in found.ids]}
    assert sorted(found.ids) == list(range(12))


@pytest.mark.parametrize("shape", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 4)])
@pytest.mark.parametrize("dtype", [pa.float16(), pa.float32(), pa.float64()])
def test_import_reads_any_list_of_any_float(shape: Any, dtype: Any, tmp_path: Path) -> None:
    table = random_table(23)
    values = np.array(table["vector"].to_pylist(), np.float16)
    of_type = type(shape)
    lists = {pa.ListType: pa.list_(dtype), pa.LargeListType: pa.large_list(dtype)}.get(of_type, pa.list_(dtype, 4))
    table = table.set_column(1, "vector", pa.array(values.astype(np.float64).tolist(), lists))
    data = new_data_url()
    manifest = run_import(data, write(tmp_path / "words.parquet", table), columns=ALL, create={"metric": "l2"})
    assert stored(open_store(data), manifest).by_id() == expected(table, "l2", "float32")


@pytest.mark.parametrize("ids", [pa.array(["b", "a"]).dictionary_encode(), pa.array(["b", "a"], pa.large_string())])
def test_import_reads_string_ids_of_any_encoding(ids: Any, tmp_path: Path) -> None:
    table = pa.table({"id": ids, "vector": fixed([[1, 0], [0, 1]], 2)})
    data = new_data_url()
    manifest = run_import(data, write(tmp_path / "words.parquet", table))
    assert sorted(stored(open_store(data), manifest).ids) == ["a", "b"]


def test_import_takes_the_smallest_and_largest_ids(tmp_path: Path) -> None:
    table = table_of([2**63 - 1, -(2**63), 0], np.eye(3, dtype=np.float32))
    data = new_data_url()
    manifest = run_import(data, write(tmp_path / "words.parquet", table))
    assert sorted(stored(open_store(data), manifest).ids) == [-(2**63), 0, 2**63 - 1]


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_import_of_one_point_of_one_dimension(metric: Any, tmp_path: Path) -> None:
    table = table_of([7], np.array([[-3.0]], np.float32))
    data = new_data_url()
    manifest = run_import(data, write(tmp_path / "words.parquet", table), create={"metric": metric, "shards": 3})
    assert manifest.config.dimension == 1
    assert sorted(entry.points for entry in manifest.shards) == [0, 0, 1]
    assert stored(open_store(data), manifest).by_id() == {7: ([-1.0 if metric == "cosine" else -3.0], {})}


def test_import_of_an_empty_file_makes_an_empty_collection(tmp_path: Path) -> None:
    source = write(tmp_path / "words.parquet", random_table(0))
    data = new_data_url()
    manifest = run_import(data, source, create={"shards": 2})
    assert (manifest.points, manifest.config.dimension, len(manifest.shards)) == (0, 4, 2)
    shard = Shard(open_store(data), "words", 0, tmp_path / "cache")
    assert shard.load().points == 0


def test_import_of_an_empty_file_empties_a_collection(tmp_path: Path) -> None:
    data = new_data_url()
    run_import(data, write(tmp_path / "a.parquet", random_table(10)))
    manifest = run_import(data, write(tmp_path / "b.parquet", random_table(0)))
    assert (manifest.points, manifest.generation) == (0, 2)


def test_import_of_a_file_without_rows_or_dimension_needs_the_dimension(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([], pa.int64()), "vector": pa.array([], pa.list_(pa.float32()))})
    source = write(tmp_path / "words.parquet", table)
    data = new_data_url()
    with pytest.raises(Invalid, match="dimension: is required"):
        run_import(data, source)
    assert run_import(data, source, create={"dimension": 9}).config.dimension == 9


def test_import_after_a_deletion_starts_a_new_collection(tmp_path: Path) -> None:
    data = new_data_url()
    run_import(data, write(tmp_path / "a.parquet", random_table(10)))
    log_of(open_store(data)).delete()
    manifest = run_import(data, write(tmp_path / "b.parquet", random_table(10, dimension=6)), create={"metric": "ip"})
    assert (manifest.version, manifest.generation) == (3, 2)
    assert (manifest.config.dimension, manifest.config.metric) == (6, "ip")


def test_import_reports_its_phases_and_progress_that_never_goes_back(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", random_table(50))
    write(tmp_path / "b.parquet", random_table(50, first=100))
    seen: list[JobStatus] = []
    run_import(new_data_url(), tmp_path, create={"shards": 2}, listener=seen.append)
    phases = list(dict.fromkeys(status.phase for status in seen))
    assert phases == ["scan", "partition", "build", "commit"]
    shares = [status.progress for status in seen]
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] < 1.0


# --- rows that stop an import -----------------------------------------------------------------------------------

BadTable = Callable[[], pa.Table]


def with_vector(vector: Any, column_type: Any = None, row: int = 23) -> BadTable:
    """40 good rows of dimension 2 but for one vector."""

    def make() -> pa.Table:
        vectors: list[Any] = [[1.0, float(number)] for number in range(40)]
        vectors[row] = vector
        kind = pa.list_(pa.float32(), 2) if column_type is None else column_type
        return pa.table({"id": list(range(40)), "vector": pa.array(vectors, kind)})

    return make


def with_ids(ids: Callable[[list[Any]], Any]) -> BadTable:
    return lambda: pa.table({"id": ids(list(range(40))), "vector": fixed([[1.0, 2.0]] * 40, 2)})


def replaced(values: list[Any], row: int, value: Any) -> list[Any]:
    return [*values[:row], value, *values[row + 1 :]]


LIST, LARGE_LIST, DOUBLES = pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 2)
BAD_ROWS: dict[str, tuple[BadTable, dict[str, Any], str, str]] = {
    "nan": (with_vector([1.0, float("nan")]), {}, "vector", "holds NaN or infinity"),
    "infinity": (with_vector([float("-inf"), 1.0]), {}, "vector", "holds NaN or infinity"),
    "nan under l2": (with_vector([float("nan"), 1.0]), {"metric": "l2"}, "vector", "holds NaN or infinity"),
    "too large for float32": (with_vector([1e300, 1.0], DOUBLES), {}, "vector", "holds NaN or infinity"),
    "too short": (with_vector([1.0], LIST), {}, "vector", "1 numbers, the collection's dimension is 2"),
    "too long": (with_vector([1.0, 2.0, 3.0], LARGE_LIST), {}, "vector", "3 numbers, .* dimension is 2"),
    "no numbers": (with_vector([], LIST), {}, "vector", "0 numbers, the collection's dimension is 2"),
    "null vector": (with_vector(None), {}, "vector", "the vector is null"),
    "null list": (with_vector(None, LIST), {}, "vector", "the vector is null"),
    "null number": (with_vector([1.0, None]), {}, "vector", "the vector holds a null"),
    "null number in a list": (with_vector([None, 1.0], LARGE_LIST), {}, "vector", "the vector holds a null"),
    "zero vector": (with_vector([0.0, -0.0]), {"metric": "cosine"}, "vector", "zero vector"),
    "float16 overflow": (with_vector([1.0, -7e4]), {"metric": "l2", "vector_dtype": "float16"}, "vector", "too large"),
    "null id": (with_ids(lambda ids: pa.array(replaced(ids, 23, None))), {}, "id", "the id is null"),
    "uint64 id": (
        with_ids(lambda ids: pa.array(replaced(ids, 23, 2**63), pa.uint64())),
        {},
        "id",
        "the id is not an int64",
    ),
    "repeated id": (
        with_ids(lambda ids: pa.array(replaced(ids, 23, 4))),
        {},
        "id",
        "the id 4 is repeated; it is also in file .*, row group 0, row 4",
    ),
    "repeated string": (
        with_ids(lambda ids: pa.array([str(value) for value in replaced(ids, 23, 4)])),
        {},
        "id",
        "the id '4' is repeated; it is also in file .*, row group 0, row 4",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_stops_the_import_and_is_named(name: str, tmp_path: Path) -> None:
    make, create, field, message = BAD_ROWS[name]
    source = write(tmp_path / "words.parquet", make(), row_group_size=10)
    data = new_data_url()
    with pytest.raises(Invalid, match=message) as caught:
        run_import(data, source, create={"shards": 2, **create})
    assert str(caught.value).startswith(f"{field}: file {source}, row group 2, row 3: ")
    assert [error.field for error in caught.value.errors] == [field]
    assert_left_alone(open_store(data))


@pytest.mark.parametrize("name", ["nan", "repeated id"])
def test_bad_row_leaves_the_collection_as_it_was(name: str, tmp_path: Path) -> None:
    make, create, _, message = BAD_ROWS[name]
    data = new_data_url()
    good = table_of([1, 2, 3], np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    before = run_import(data, write(tmp_path / "good.parquet", good), create={"metric": "l2"})
    with pytest.raises(Invalid, match=message):
        run_import(data, write(tmp_path / "bad.parquet", make(), row_group_size=10), create=create)
    assert_left_alone(open_store(data), newest=before)
    assert stored(open_store(data), before).by_id() == expected(good, "l2", "float32")


def test_first_bad_row_is_named_though_it_is_the_first_of_a_new_collection(tmp_path: Path) -> None:
    data = new_data_url()
    source = write(tmp_path / "words.parquet", with_vector(None, LIST, row=0)(), row_group_size=10)
    with pytest.raises(Invalid) as caught:
        run_import(data, source)
    assert str(caught.value) == f"vector: file {source}, row group 0, row 0: the vector is null"
    assert_left_alone(open_store(data))


@pytest.mark.parametrize("name", ["nan", "null id", "repeated id"])
def test_bad_row_is_named_where_its_row_group_is_read_in_several_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reader, "READ_BYTES", 3 * 2 * 4)  # three rows at a time
    make, create, field, message = BAD_ROWS[name]
    source = write(tmp_path / "words.parquet", make(), row_group_size=20)
    with pytest.raises(Invalid, match=message) as caught:
        run_import(new_data_url(), source, create=create)
    assert str(caught.value).startswith(f"{field}: file {source}, row group 1, row 3: ")


def coarse_hashes(ids: Any) -> np.ndarray[Any, Any]:
    """Three different hashes only, whatever the ids."""
    return hash_ids(ids) % np.uint64(3) << np.uint64(62)


def test_ids_of_equal_hash_are_ordered_by_id_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (row_reader, segment):
        monkeypatch.setattr(module, "hash_ids", coarse_hashes)
    data, table = new_data_url(), random_table(60, id_type="string")
    manifest = run_import(data, write(tmp_path / "a.parquet", table), columns=ALL, create={"metric": "l2"})
    found = stored(open_store(data), manifest)
    hashes = coarse_hashes(pa.array(found.ids, pa.large_string())).tolist()
    assert set(hashes) == {0, 1 << 62, 2 << 62}
    assert list(zip(hashes, found.ids, strict=True)) == sorted(zip(hashes, found.ids, strict=True))
    assert found.by_id() == expected(table, "l2", "float32")
    shard = Shard(open_store(data), "words", 0, tmp_path / "cache")
    shard.load()
    asked = id_array([*table["id"].to_pylist(), "nobody"], "string")
    held, rows = shard.fetch(1, asked, ("id",))
    assert held.tolist() == [True] * 60 + [False]
    assert rows["id"].to_pylist() == table["id"].to_pylist()


def test_id_repeated_among_others_of_its_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "hash_ids", coarse_hashes)
    source = write(tmp_path / "a.parquet", BAD_ROWS["repeated id"][0](), row_group_size=10)
    with pytest.raises(Invalid, match=r"row group 2, row 3: the id 4 is repeated; .* row group 0, row 4$"):
        run_import(new_data_url(), source)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_id_repeated_in_another_file_names_both_places(id_type: str, tmp_path: Path) -> None:
    first, second = (random_table(30, id_type=id_type, seed=n, first=100 * n) for n in range(2))
    shared = first["id"][17].as_py()
    ids = replaced(second["id"].to_pylist(), 29, shared)
    write(tmp_path / "a.parquet", first)
    write(tmp_path / "b.parquet", second.set_column(0, "id", pa.array(ids)))
    data = new_data_url()
    with pytest.raises(Invalid) as caught:
        run_import(data, tmp_path, create={"shards": 2})
    assert str(caught.value) == (
        f"id: file {tmp_path / 'b.parquet'}, row group 2, row 9: the id {shared!r} is repeated; "
        f"it is also in file {tmp_path / 'a.parquet'}, row group 1, row 7"
    )
    assert_left_alone(open_store(data))


def test_zero_vector_is_a_point_under_l2(tmp_path: Path) -> None:
    data = new_data_url()
    source = write(tmp_path / "words.parquet", table_of([1, 2], np.array([[0, 0], [1, 1]], np.float32)))
    manifest = run_import(data, source, create={"metric": "l2"})
    assert stored(open_store(data), manifest).by_id()[1] == ([0.0, 0.0], {})


def test_largest_float16_is_kept(tmp_path: Path) -> None:
    data = new_data_url()
    source = write(tmp_path / "words.parquet", table_of([1], np.array([[65504, -65504]], np.float32)))
    manifest = run_import(data, source, create={"metric": "l2", "vector_dtype": "float16"})
    assert stored(open_store(data), manifest).by_id() == {1: ([65504.0, -65504.0], {})}


@pytest.mark.parametrize(
    "shape", [pa.list_(pa.float32(), 2), pa.list_(pa.float32()), pa.large_list(pa.float32())], ids=str
)
def test_vectors_of_a_slice_are_those_of_the_slice(shape: Any) -> None:
    config, place = CollectionConfig(2, metric="l2"), RowPlace("words.parquet", 0, 100)
    rows: list[Any] = [[float("nan"), 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, float("inf")], None]
    column = pa.array(rows, shape)
    assert checked_vectors(column.slice(1, 2), config, "vector", place).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(Invalid, match="row group 0, row 102: the vector holds NaN or infinity"):
        checked_vectors(column.slice(1, 3), config, "vector", place)
    with pytest.raises(Invalid, match="row group 0, row 103: the vector is null"):
        checked_vectors(column.slice(1, 4), config, "vector", place)


def test_checking_vectors_leaves_the_column_alone() -> None:
    config = CollectionConfig(2)
    column = fixed([[3.0, 4.0], [0.0, 2.0]], 2)
    checked = checked_vectors(column, config, "vector", RowPlace("words.parquet", 0, 0))
    np.testing.assert_array_equal(checked, np.array([[0.6, 0.8], [0.0, 1.0]], np.float32))
    assert column.to_pylist() == [[3.0, 4.0], [0.0, 2.0]]


def not_utf8(values: list[bytes]) -> Any:
    """A string column of any bytes, as a careless writer leaves it."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


@pytest.mark.parametrize("column", ["id", "word", "words", "encoded"])
def test_string_that_is_not_utf8_stops_the_import_and_is_named(column: str, tmp_path: Path) -> None:
    good = [f"word {number}".encode() for number in range(40)]
    bad = replaced(good, 23, b"caf\xe9")
    one_each = pa.array(range(41), pa.int32())
    columns = {
        "id": not_utf8(bad if column == "id" else good),
        "vector": fixed([[1.0, 2.0]] * 40, 2),
        "word": not_utf8(bad if column == "word" else good),
        "words": pa.ListArray.from_arrays(one_each, not_utf8(bad if column == "words" else good)),
        "encoded": pa.DictionaryArray.from_arrays(
            pa.array(range(40), pa.int32()), not_utf8(bad if column == "encoded" else good)
        ),
    }
    source = write(tmp_path / "words.parquet", pa.table(columns), row_group_size=10)
    data = new_data_url()
    with pytest.raises(Invalid, match="Invalid UTF8") as caught:
        run_import(data, source, columns=ALL)
    assert str(caught.value).startswith(f"{column}: file {source}, row group 2, row 3: not a valid ")
    assert_left_alone(open_store(data))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damaged_page_stops_the_import_and_its_row_group_is_named(compression: str, tmp_path: Path) -> None:
    source = tmp_path / "words.parquet"
    pq.write_table(random_table(3_000), source, row_group_size=1_000, compression=compression)
    column = pq.read_metadata(source).row_group(2).column(1)
    content = bytearray(source.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + 40] = b"\xff" * 40  # the header of the page
    source.write_bytes(content)
    data = new_data_url()
    with pytest.raises(Invalid, match=f"^source: file {source}, row group 2 cannot be read: "):
        run_import(data, source)
    assert_left_alone(open_store(data))


def test_damaged_page_of_the_first_vector_is_named(tmp_path: Path) -> None:
    lists = pa.array(random_table(50)["vector"].to_pylist(), LIST)
    source = write(tmp_path / "words.parquet", pa.table({"id": range(50), "vector": lists}), 50)
    column = pq.read_metadata(source).row_group(0).column(1)
    content = bytearray(source.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + 40] = b"\xff" * 40
    source.write_bytes(content)
    with pytest.raises(Invalid, match=r"row group 0 cannot be read: "):
        run_import(new_data_url(), source)


# --- one index kind ---------------------------------------------------------------------------------------------


def test_segments_of_one_import_are_of_one_kind_though_their_counts_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1,000 rows over two shards: 500 each, or so
    for floats_max, kind in ((4 * 500, "flat"), (4 * 500 - 1, "hnsw")):
        monkeypatch.setattr(index_policy, "FLAT_FLOATS_MAX", floats_max)
        data = new_data_url()
        source = write(tmp_path / "words.parquet", random_table(1_000), row_group_size=1_000)
        manifest = run_import(data, source, create={"shards": 2})
        specs = [described(open_store(data), ref.segment_id).spec for ref in manifest.segments.values()]
        counts = [ref.count for ref in manifest.segments.values()]
        assert counts[0] != counts[1]
        assert [spec["kind"] for spec in specs] == [kind, kind]
        assert all(spec["reason"].startswith("for the mean shard: ") for spec in specs)


def test_lists_of_a_segment_follow_its_own_count(tmp_path: Path) -> None:
    data = new_data_url()
    source = write(tmp_path / "words.parquet", random_table(2_000), row_group_size=2_000)
    manifest = run_import(data, source, create={"shards": 3, "index": {"kind": "ivf_flat"}})
    for ref in manifest.segments.values():
        assert described(open_store(data), ref.segment_id).spec["params"] == {"nlist": index_spec.nlist(ref.count)}


@pytest.mark.parametrize("kind", ["auto", "ivf_flat", "hnsw"])
def test_segments_of_one_row_are_built(kind: str, tmp_path: Path) -> None:
    data, table = new_data_url(), random_table(4)
    source = write(tmp_path / "words.parquet", table)
    manifest = run_import(data, source, create={"shards": 64, "metric": "l2", "index": {"kind": kind}})
    assert {ref.count for ref in manifest.segments.values()} == {1}
    assert stored(open_store(data), manifest).by_id().keys() == set(table["id"].to_pylist())


# --- tuning on real queries -------------------------------------------------------------------------------------


def tuned_on(data: str, manifest: Manifest) -> list[str]:
    return [described(open_store(data), ref.segment_id).built["tuned_on"] for ref in manifest.segments.values()]


def leave_queries(data: str, coordinator: str, count: int, dimension: int = 4) -> None:
    vectors = np.random.default_rng(count).normal(size=(count, dimension)).astype(np.float32)
    store_queries(open_store(data), "words", coordinator, QuerySample(vectors, "l2"))


IVF = {"shards": 2, "metric": "l2", "index": {"kind": "ivf_flat"}}


def test_import_into_a_collection_is_tuned_on_the_queries_that_coordinators_left(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(1_000), row_group_size=1_000)
    leave_queries(data, "of a collection that was deleted", 900)
    first = run_import(data, source, create=IVF)
    assert all(told.endswith("rows with noise") for told in tuned_on(data, first))
    delete_queries(open_store(data), "words")
    leave_queries(data, "a", 300)
    leave_queries(data, "b", 250)
    second = run_import(data, source)
    assert tuned_on(data, second) == ["550 recent queries"] * 2
    leave_queries(data, "c", 1_000)
    assert tuned_on(data, run_import(data, source)) == ["1000 recent queries"] * 2


def test_import_into_a_collection_of_few_queries_is_tuned_on_its_rows(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(1_000), row_group_size=1_000)
    run_import(data, source, create=IVF)
    leave_queries(data, "a", 499)
    assert all(told.endswith("rows with noise") for told in tuned_on(data, run_import(data, source)))


def test_import_after_the_collection_was_deleted_asks_for_no_queries(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(1_000), row_group_size=1_000)
    run_import(data, source, create=IVF)
    leave_queries(data, "a", 900)
    log_of(open_store(data)).delete()
    assert all(told.endswith("rows with noise") for told in tuned_on(data, run_import(data, source, create=IVF)))


def test_queries_that_cannot_be_read_never_stop_an_import(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(1_000), row_group_size=1_000)
    run_import(data, source, create=IVF)
    leave_queries(data, "wide", 600, dimension=5)
    open_store(data).put(paths.recent_queries("words", "garbage"), b"garbage")
    assert all(told.endswith("rows with noise") for told in tuned_on(data, run_import(data, source)))
    for name in ("wide", "garbage"):
        assert paths.recent_queries("words", name) in caplog.text


# --- measuring, and what is told before the build ----------------------------------------------------------------


def phases_and_plans(data: str, source: Path, **options: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The phases of an import in order, and every plan it told."""
    phases: list[str] = []
    plans: list[dict[str, Any]] = []

    def listener(status: JobStatus) -> None:
        if status.phase not in phases:
            phases.append(status.phase)
        if status.plan and status.plan not in plans:
            plans.append(status.plan)

    run_import(data, source, listener=listener, **options)
    return phases, plans


@pytest.mark.parametrize(("kind", "measured"), [("hnsw", True), ("flat", False)])
def test_import_of_large_segments_measures_how_fast_they_are_built(
    kind: str, measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "MEASURED_MIN", 400)
    monkeypatch.setattr(build_rates, "SAMPLE_MIN", 100)
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(800), row_group_size=800)
    phases, (plan,) = phases_and_plans(data, source, create={"shards": 2, "index": {"kind": kind}})
    assert phases == ["scan", "partition", *(["measure"] if measured else []), "build", "commit"]
    assert plan["rates_measured"] is measured


def test_import_of_small_segments_does_not_measure(tmp_path: Path) -> None:
    source = write(tmp_path / "words.parquet", random_table(40))
    phases, (plan,) = phases_and_plans(new_data_url(), source, create={"index": {"kind": "hnsw"}})
    assert phases == ["scan", "partition", "build", "commit"]
    assert plan["rates_measured"] is False


def test_status_tells_the_plan_before_the_build_and_keeps_it(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "words.parquet", random_table(90))
    create = {"shards": 3, "metric": "l2", "index": {"kind": "hnsw"}}
    _, (plan,) = phases_and_plans(data, source, create=create)
    assert (plan["index"]["kind"], plan["segments"], plan["points_per_segment"]) == ("hnsw", 3, 30)
    assert plan["index"]["reason"] == "hnsw was asked for"
    config = CollectionConfig(4, metric="l2", shards=3, index=IndexConfig(kind="hnsw"))
    assert plan["predicted_bytes"] == 3 * index_policy.choose(30, config).predicted_bytes
    assert plan["predicted_build_seconds"] >= 0.0
    assert [candidate["kind"] for candidate in plan["considered"]] == ["hnsw"]
    assert read_status(open_store(data), JOB).plan == plan


def described(store: ObjectStore, segment_id: str) -> SegmentDescription:
    key = paths.segment_file("words", segment_id, paths.DESCRIPTION)
    return SegmentDescription.decode(store.get(key), key)


# --- what a failed import leaves --------------------------------------------------------------------------------


def segment_ids(store: ObjectStore) -> set[str]:
    return set(store.folders("collections/words/segments/"))


def fail_after(segments: int, error: BaseException) -> Any:
    """A task runner that raises once so many segments are published."""

    def run(
        function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        published = 0
        for number, event in run_tasks_here(function, items, num_cpus, in_flight):
            yield number, event
            published += "segment" in event
            if published == segments:
                raise error

    return run


@pytest.mark.parametrize("error", [Unavailable("a node is gone"), SystemExit(15), KeyboardInterrupt()])
def test_failed_or_cancelled_import_deletes_the_segments_it_published(error: BaseException, tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(50))
    store = open_store(data)
    before = run_import(data, source, create={"shards": 4})  # of the same job name: a manifest names its segments
    store.put(paths.segment_file("words", f"{JOB}-000000-12345678", paths.ROWS), b"half a segment")
    others = {f"{JOB}0-000000-12345678", f"{JOB}-000000-12345678-000000-12345678", f"x{JOB}-000000-12345678"}
    for name in others:
        store.put(paths.segment_file("words", name, paths.DESCRIPTION), b"of another job")
    with pytest.raises(type(error)):
        run_import(data, source, run_tasks=fail_after(2, error))
    assert segment_ids(store) == {*before.segments, *others}
    assert_left_alone(store, newest=before)


def test_failed_import_leaves_what_a_branch_has_of_an_earlier_job_of_its_name(tmp_path: Path) -> None:
    """Of the collection itself no version that names it is kept any more."""
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(50))
    store = open_store(data)
    first = run_import(data, source, create={"shards": 4})
    branched = branch(store, log_of(store), log_of(store, "twin"), first, BranchOptions("words", "twin"))
    second = run_import(data, source, job_id="import-2")
    store.delete(paths.manifest("words", first.version))
    with pytest.raises(Unavailable, match="a node is gone"):
        run_import(data, source, run_tasks=fail_after(2, Unavailable("a node is gone")))
    assert segment_ids(store) == {*branched.segments, *second.segments}


def test_import_that_lost_to_another_writer_deletes_its_segments(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = OvertakenStore(open_store(data))
    with pytest.raises(Conflict):
        run_import(data, source, store=store)  # type: ignore[arg-type]
    assert segment_ids(open_store(data)) == set()


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_import_that_does_not_know_whether_it_committed_keeps_its_segments(fault: Fault, tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = UnknownCommitStore(open_store(data), fault)
    with pytest.raises(Unavailable):
        run_import(data, source, store=store)  # type: ignore[arg-type]
    assert len(segment_ids(open_store(data))) == 1
    newest = log_of(open_store(data)).newest()
    assert (newest is not None) == (fault == "lose_answer")


def test_segments_stay_where_a_manifest_that_cannot_be_read_may_name_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    run_import(data, source)
    run_import(data, source, job_id="import-2")
    store.put(paths.manifest("words", 1), b"{}")
    with pytest.raises(Unavailable, match="a node is gone"):
        run_import(data, source, run_tasks=fail_after(1, Unavailable("a node is gone")))
    assert len(segment_ids(store)) == 3
    assert f"the segments of job {JOB} are left behind" in caplog.text


class OvertakenStore:
    """Another writer commits just before the manifest is put."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        log_of(self._inner).create(CollectionConfig(4))
        return self._inner.put_if_absent(key, data)


class UnknownCommitStore(OvertakenStore):
    """The put of the manifest goes wrong, and so does reading it back."""

    def __init__(self, inner: ObjectStore, fault: Fault) -> None:
        super().__init__(inner)
        self._fault = fault
        self._asked = False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._asked = True
        if self._fault == "lose_answer":
            self._inner.put_if_absent(key, data)
        raise Unavailable("no answer")

    def get(self, key: str) -> bytes:
        if self._asked and "/manifest/" in key:
            raise Unavailable("no answer")
        return self._inner.get(key)


# --- collections that differ, and others who commit -------------------------------------------------------------


def test_import_of_another_dimension_is_invalid(tmp_path: Path) -> None:
    data = new_data_url()
    before = run_import(data, write(tmp_path / "a.parquet", random_table(10)))
    with pytest.raises(Invalid, match="'vector' has dimension 5, the collection 4") as caught:
        run_import(data, write(tmp_path / "b.parquet", random_table(10, dimension=5)))
    assert [error.field for error in caught.value.errors] == ["vector_column"]
    assert_left_alone(open_store(data), newest=before)


def test_import_of_another_id_type_is_invalid(tmp_path: Path) -> None:
    data = new_data_url()
    before = run_import(data, write(tmp_path / "a.parquet", random_table(10)))
    with pytest.raises(Invalid, match="'id' has string ids, the collection int64") as caught:
        run_import(data, write(tmp_path / "b.parquet", random_table(10, id_type="string")))
    assert [error.field for error in caught.value.errors] == ["id_column"]
    assert_left_alone(open_store(data), newest=before)


@pytest.mark.parametrize(
    ("create", "different"),
    [
        ({"metric": "l2"}, "metric"),
        ({"shards": 3, "metric": "ip"}, "shards, metric"),
        ({"index": {"kind": "hnsw"}}, "index.kind"),
        ({"index": {"target_recall": 0.99}, "replicas": 2}, "replicas, index.target_recall"),
    ],
)
def test_import_with_other_create_options_is_a_conflict(create: dict[str, Any], different: str, tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    before = run_import(data, source, create={"shards": 2})
    with pytest.raises(Conflict, match=f"collection 'words' exists with another {different}$"):
        run_import(data, source, create=create)
    assert_left_alone(open_store(data), newest=before)


def test_import_with_the_same_create_options_goes_on(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    create = {"shards": 2, "metric": "l2", "index": {"kind": "hnsw"}}
    run_import(data, source, create=create)
    assert run_import(data, source, create=create).generation == 2


@pytest.mark.parametrize(
    ("create", "field"),
    [
        ({"shrads": 4}, "create.shrads"),
        ({"metric": "dot"}, "create.metric"),
        ({"index": {"king": "hnsw"}}, "create.index.king"),
        ({"index": 3}, "create.index"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_import_with_create_options_that_make_no_sense_is_invalid(
    exists: bool, create: dict[str, Any], field: str, tmp_path: Path
) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    before = run_import(data, source) if exists else None
    with pytest.raises(Invalid, match=rf"^{field}: ") as caught:
        run_import(data, source, create=create)
    assert [error.field for error in caught.value.errors] == [field]
    assert_left_alone(open_store(data), newest=before)


def test_import_that_no_shard_could_hold_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(100))
    with pytest.raises(Invalid, match="memory_bytes"):
        run_import(data, source, create={"index": {"memory_bytes": 100}}, run_tasks=refuse_tasks)
    assert_left_alone(open_store(data))


def refuse_tasks(
    function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0
) -> Iterator[tuple[int, Any]]:
    raise AssertionError("a task was run")


def test_builds_ask_for_what_one_node_has_free_though_faiss_uses_all_of_it(tmp_path: Path) -> None:
    asked: list[tuple[str, float, int]] = []
    threads: set[int] = set()

    def run_tasks(
        function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        asked.append((function.__name__, num_cpus, in_flight))
        threads.update(getattr(item, "threads", 0) for item in items)
        return run_tasks_here(function, [replace(i, threads=1) if hasattr(i, "threads") else i for i in items], 1, 1)

    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    options = ImportOptions("words", str(source))
    reporter = JobReporter(open_store(data), JobStatus(JOB, "import", "words"))
    workers = Workers(run_tasks, cpus=64, cpus_per_node=16, free_cpus=15)
    Importer(data, open_store(data), log_of(open_store(data)), options, workers).run(JOB, reporter)
    assert asked == [("partition_unit", 1, 64), ("build_partition", 15, 1)]
    assert threads == {0, 16}


def test_import_with_a_wrong_collection_name_is_invalid(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", random_table(3))
    with pytest.raises(Invalid, match=r"collection: '\.\./words' does not match"):
        run_import(new_data_url(), source, collection="../words")


def test_import_of_nothing_is_not_found_and_leaves_nothing(tmp_path: Path) -> None:
    data = new_data_url()
    with pytest.raises(NotFound, match="nothing at"):
        run_import(data, tmp_path / "nowhere.parquet")
    assert_left_alone(open_store(data))


@pytest.mark.parametrize("exists", [False, True])
def test_commit_of_another_writer_in_between_is_a_conflict(exists: bool, tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    if exists:
        run_import(data, source, create={"metric": "l2"})
    theirs: list[Manifest] = []

    def tasks_beside_another(
        function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        if not theirs:
            log = log_of(store)
            config = CollectionConfig(4, metric="l2", index=IndexConfig())
            newest = log.newest()
            entries = newest.shards if newest else ()
            theirs.append(log.commit_generation(newest, config, entries) if newest else log.create(config)[0])
        return run_tasks_here(function, items, num_cpus, in_flight)

    with pytest.raises(Conflict, match="was committed by another writer"):
        run_import(data, source, run_tasks=tasks_beside_another)
    assert_left_alone(store, newest=theirs[0])


# --- writes to points, before and beside ------------------------------------------------------------------------


def write_records(store: ObjectStore, shard: int, first: int, last: int, epoch: int = 1) -> None:
    wal = Wal(store, "words", shard, 0)
    for lsn in range(first, last + 1):
        wal.append(WalRecord(lsn, epoch, "write", f"{shard:016x}{lsn:016x}", None, pa.array([lsn])))


def once_before_rows_are_read(action: Callable[[], object]) -> Any:
    """A task runner that runs `action` ahead of the first task of an import."""
    actions = [action]

    def run_tasks(
        function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        if actions:
            actions.pop()()
        return run_tasks_here(function, items, num_cpus, in_flight)

    return run_tasks


def test_import_replaces_the_writes_before_it_and_none_of_those_since(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    first = run_import(data, source, create={"shards": 2})
    assert [(entry.applied_lsn, entry.epoch) for entry in first.shards] == [(0, 0), (0, 0)]
    write_records(store, 0, 1, 7, epoch=3)
    beside = once_before_rows_are_read(lambda: (write_records(store, 0, 8, 9, 3), write_records(store, 1, 1, 2, 4)))
    second = run_import(data, source, job_id="import-2", run_tasks=beside)
    assert [(entry.applied_lsn, entry.epoch) for entry in second.shards] == [(7, 3), (0, 0)]
    assert (second.generation, second.points) == (2, 10)
    third = run_import(data, source, job_id="import-3")
    assert [(entry.applied_lsn, entry.epoch) for entry in third.shards] == [(9, 3), (2, 4)]


def test_seal_and_declaration_beside_an_import_do_not_stop_it(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    run_import(data, source, create={"shards": 2})
    write_records(store, 1, 1, 4)

    def seal_and_declare() -> None:
        write_records(store, 1, 5, 6)
        parent = log_of(store).newest_live()
        log_of(store).commit_shards(parent, {1: replace(parent.shards[1], applied_lsn=6, epoch=1)})
        log_of(store).declare_attributes({"mood": "string"})

    manifest = run_import(data, source, job_id="import-2", run_tasks=once_before_rows_are_read(seal_and_declare))
    assert (manifest.version, manifest.generation, manifest.points) == (4, 2, 10)
    assert [entry.applied_lsn for entry in manifest.shards] == [0, 4]  # 5 and 6 go on top again
    assert manifest.attributes == {"mood": "string"}


@pytest.mark.parametrize("again", [False, True])
def test_deletion_beside_an_import_is_a_conflict(again: bool, tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    config = run_import(data, source).config
    newest: list[Manifest | None] = []

    def delete() -> None:
        log_of(store).delete()
        if again:
            log_of(store).create(config)
        newest.append(log_of(store).newest())

    with pytest.raises(Conflict, match="was committed by another writer"):
        run_import(data, source, job_id="import-2", run_tasks=once_before_rows_are_read(delete))
    assert_left_alone(store, newest=newest[0])


def test_import_over_a_deleted_collection_fences_the_writers_of_that(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    run_import(data, source, create={"shards": 2})
    write_records(store, 0, 1, 3, epoch=2)
    log_of(store).delete()

    def write_on() -> None:
        with pytest.raises(Fenced):
            write_records(store, 0, 5, 5, epoch=3)

    manifest = run_import(
        data, source, job_id="import-2", create={"shards": 2}, run_tasks=once_before_rows_are_read(write_on)
    )
    assert [(entry.applied_lsn, entry.epoch) for entry in manifest.shards] == [(5, 4), (0, 0)]
    assert list(Wal(store, "words", 0, 0).read_after(manifest.shards[0].applied_lsn)) == []


def test_import_of_a_file_that_does_not_fit_claims_nothing(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    run_import(data, source)
    write_records(store, 0, 1, 3)
    log_of(store).delete()
    with pytest.raises(Invalid, match="has dimension 4, the collection 5"):
        run_import(data, source, job_id="import-2", create={"dimension": 5})
    assert Wal(store, "words", 0, 0).end(0, 0) == (4, 2)  # the claim of the deletion


# --- staging and stores that fail -------------------------------------------------------------------------------


def test_import_deletes_the_staging_of_a_long_dead_one_but_not_of_one_that_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    other = paths.staging_piece("words", "another", 0, 0)
    birds = paths.staging_piece("birds", "another", 0, 0)
    store.put(other, b"piece")
    store.put(birds, b"piece")
    run_import(data, source)
    assert store.get(other) == b"piece"
    (info,) = store.objects(paths.staging_prefix("words"))
    monkeypatch.setattr(importer.time, "time", lambda: info.modified_s + STALE_STAGING_S + 1.0)
    run_import(data, source)
    with pytest.raises(NotFound):
        store.get(other)
    assert store.get(birds) == b"piece"


def copy_of(store: ObjectStore) -> MemoryStore:
    copy = MemoryStore()
    for info in store.objects("collections/"):
        copy.put(info.key, store.get(info.key))
    return copy


class FaultyImport:
    """One small import over an existing collection, through a store whose `at`-th call goes wrong."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.data = new_data_url()
        self.old_table, self.new_table = random_table(3, seed=1), random_table(5, seed=2, first=10)
        self._source = write(tmp_path / "new.parquet", self.new_table, row_group_size=3)
        self.old = run_import(self.data, write(tmp_path / "old.parquet", self.old_table), columns=ALL, create=CREATE)
        self.base = open_store(self.data)

    def run(self, inner: MemoryStore, at: int, fault: Fault) -> tuple[FaultyStore, Manifest | None]:
        """The store, and the manifest that the import returned (None: it raised Unavailable)."""
        store = FaultyStore(inner, at, fault)
        for module in (row_reader, segment_task):
            self._monkeypatch.setattr(module, "open_store", lambda url: store)
        try:
            return store, run_import(self.data, self._source, store=store, columns=ALL)
        except Unavailable:
            return store, None


CREATE = {"shards": 2, "metric": "l2"}


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_store_that_fails_at_any_call_leaves_the_old_collection_or_the_whole_new_one(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FaultyImport(tmp_path, monkeypatch)
    counted, clean = small.run(copy_of(small.base), 0, fault)
    assert clean is not None
    assert counted.calls > 20
    for at in range(1, counted.calls + 1):
        inner = copy_of(small.base)
        store, returned = small.run(inner, at, fault)
        assert store.calls >= at
        newest = log_of(inner).newest()
        assert newest is not None
        if newest.version == small.old.version:
            assert returned is None, f"call {at}: it reported a success that is not there"
            assert newest == small.old
            assert stored(inner, newest).by_id() == expected(small.old_table, "l2", "float32")
        else:
            assert newest.version == small.old.version + 1
            assert returned == newest, f"call {at}: it committed and reported a failure"
            assert stored(inner, newest).by_id() == expected(small.new_table, "l2", "float32")
        _, again = small.run(inner, 0, fault)  # no repair by hand is needed
        assert again is not None
        assert stored(inner, again).by_id() == expected(small.new_table, "l2", "float32")


def test_nothing_is_left_to_do_after_the_commit_for_who_is_stopped_then_has_committed(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = open_store(data)
    staged: dict[str, int] = {}

    def listener(status: JobStatus) -> None:
        staged[status.phase] = len(list(store.objects(paths.staging_prefix("words"))))

    run_import(data, source, listener=listener)
    assert staged["build"] > 0
    assert staged["commit"] == 0


def test_import_that_committed_succeeds_though_its_staging_cannot_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    store = FaultyStore(open_store(data), at=1, counted=frozenset({"delete"}))
    manifest = run_import(data, source, store=store)
    assert log_of(open_store(data)).newest() == manifest
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "staging" in caplog.text


def test_error_of_an_import_is_not_hidden_by_that_of_its_cleaning_up(tmp_path: Path) -> None:
    data = new_data_url()
    source = write(tmp_path / "bad.parquet", BAD_ROWS["repeated id"][0](), row_group_size=10)
    store = FaultyStore(open_store(data), at=1, counted=frozenset({"delete"}))
    with pytest.raises(Invalid, match="the id 4 is repeated"):
        run_import(data, source, store=store)


def test_import_of_a_job_leaves_its_status_where_it_is_read(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    run_import(data, source)
    assert open_store(data).get(paths.job_status(JOB))


def test_ids_of_the_file_find_their_points(tmp_path: Path) -> None:
    data, table = new_data_url(), random_table(40, id_type="string")
    run_import(data, write(tmp_path / "a.parquet", table), columns=ALL, create={"metric": "l2"})
    shard = Shard(open_store(data), "words", 0, tmp_path / "cache")
    shard.load()
    found, rows = shard.fetch(1, id_array(table["id"].to_pylist(), "string"), ("id", "word", "vector"))
    assert found.all()
    assert rows["id"].to_pylist() == table["id"].to_pylist()
    assert rows["word"].to_pylist() == table["word"].to_pylist()
    assert rows["vector"].to_pylist() == table["vector"].to_pylist()


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IMI2x20,Flat", "nonsense"])
def test_import_refuses_a_factory_that_cannot_be_served_before_any_row_is_read(factory: str, tmp_path: Path) -> None:
    source = write(tmp_path / "points.parquet", random_table(30))
    phases: list[str] = []
    with pytest.raises(Invalid, match=r"index\.factory"):
        run_import(
            new_data_url(),
            source,
            create={"index": {"kind": "factory", "factory": factory}},
            listener=lambda status: phases.append(status.phase),
        )
    assert "partition" not in phases
