from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.shard import Shard
from cluster import paths, segment
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Conflict, Invalid, NotFound, Unavailable
from cluster.file_store import FileStore
from cluster.ids import ID_ARROW_TYPE, hash_ids, id_array
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore, open_store
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.routing import Routing
from jobs import import_source, importer, row_reader, segment_task
from jobs.import_source import Columns
from jobs.importer import STALE_STAGING_S
from jobs.report import JobStatus
from jobs.row_reader import RowPlace, checked_vectors
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
    [({"dimenson": 4}, "dimenson"), ({"metric": "dot"}, "metric"), ({"index": {"king": "hnsw"}}, "index.king")],
)
def test_import_with_create_options_that_make_no_sense_is_invalid(
    create: dict[str, Any], field: str, tmp_path: Path
) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(10))
    with pytest.raises(Invalid) as caught:
        run_import(data, source, create=create)
    assert [error.field for error in caught.value.errors] == [field]
    assert_left_alone(open_store(data))


def test_import_that_no_shard_could_hold_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    data, source = new_data_url(), write(tmp_path / "a.parquet", random_table(100))
    with pytest.raises(Invalid, match="memory_bytes"):
        run_import(data, source, create={"index": {"memory_bytes": 100}}, run_tasks=refuse_tasks)
    assert_left_alone(open_store(data))


def refuse_tasks(function: Any, items: Any, num_cpus: float, in_flight: int) -> Iterator[tuple[int, Any]]:
    raise AssertionError("a task was run")


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

    def tasks_beside_another(function: Any, items: Any, num_cpus: float, in_flight: int) -> Iterator[tuple[int, Any]]:
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
