from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import Invalid, NotFound
from jobs import import_source
from jobs.import_source import Columns, find_source, open_file
from tests.unit.jobs.imports import random_table, table_of, write


def field_of(error: Invalid) -> str:
    (only,) = error.errors
    return only.field


def test_source_of_a_file_knows_its_rows_dimension_ids_and_attributes(tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", random_table(25, dimension=6))
    source = find_source(str(path), Columns(attributes=("word", "pos")))
    assert (source.rows, source.dimension, source.id_type) == (25, 6, "int64")
    assert source.attributes == {"word": pa.large_string(), "pos": pa.large_string()}
    assert [(unit.number, unit.file, unit.row_groups, unit.rows) for unit in source.units] == [
        (0, str(path), (0, 1, 2), 25)
    ]


def test_source_of_a_folder_takes_its_parquet_files_in_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", random_table(5, first=100))
    write(tmp_path / "a.parquet", random_table(7))
    write(tmp_path / "deep" / "er" / "c.parquet", random_table(3, first=200))
    (tmp_path / "README.md").write_text("not a Parquet file")
    source = find_source(str(tmp_path), Columns())
    assert [Path(unit.file).name for unit in source.units] == ["a.parquet", "b.parquet", "c.parquet"]
    assert [unit.number for unit in source.units] == [0, 1, 2]
    assert source.rows == 15


def test_source_is_cut_into_units_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "words.parquet", random_table(35))
    group_bytes = open_file(str(path), str(path)).metadata.row_group(0).total_byte_size
    monkeypatch.setattr(import_source, "UNIT_BYTES", group_bytes + 1)
    units = find_source(str(path), Columns()).units
    assert [(unit.number, unit.row_groups, unit.rows) for unit in units] == [(0, (0, 1), 20), (1, (2, 3), 15)]


def test_source_may_be_a_file_url(tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", random_table(5))
    assert find_source(f"file://{path}", Columns()).rows == 5


def test_source_url_is_unquoted(tmp_path: Path) -> None:
    path = write(tmp_path / "all words %.parquet", random_table(5))
    assert find_source(path.as_uri(), Columns()).rows == 5
    assert find_source(str(path), Columns()).rows == 5


def test_source_url_of_another_host_is_refused() -> None:
    with pytest.raises(Invalid, match="names the host 'far'") as caught:
        find_source("file://far/words.parquet", Columns())
    assert field_of(caught.value) == "source"


def test_source_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"source: nothing at .*nowhere\.parquet"):
        find_source(str(tmp_path / "nowhere.parquet"), Columns())


def test_source_folder_without_parquet_files_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("id,vector")
    with pytest.raises(NotFound, match=r"no \.parquet file under"):
        find_source(str(tmp_path), Columns())


def test_source_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", random_table(5))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(Invalid, match=r"b\.parquet is not a Parquet file") as caught:
        find_source(str(tmp_path), Columns())
    assert field_of(caught.value) == "source"


@pytest.mark.parametrize("url", ["nonsense://host/path", "file+http://host/path"])
def test_source_url_that_cannot_be_opened_is_invalid(url: str) -> None:
    with pytest.raises(Invalid, match="cannot be opened") as caught:
        find_source(url, Columns())
    assert field_of(caught.value) == "source"


@pytest.mark.parametrize(
    ("columns", "field"), [(Columns(id="key"), "id_column"), (Columns(vector="embedding"), "vector_column")]
)
def test_missing_column_is_named_with_those_there_are(columns: Columns, field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", random_table(5))
    with pytest.raises(Invalid, match="it has: id, vector, word, pos, rank") as caught:
        find_source(str(path), columns)
    assert field_of(caught.value) == field


def test_file_with_another_schema_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", random_table(5))
    write(tmp_path / "b.parquet", random_table(5, dimension=5))
    with pytest.raises(Invalid, match=r"b\.parquet has another schema"):
        find_source(str(tmp_path), Columns())


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (pa.array([[1, 2]], pa.list_(pa.int32(), 2)), "not lists of floating-point numbers"),
        (pa.array([1.0]), "holds double, not lists"),
        (pa.array(["1,2"]), "holds string, not lists"),
    ],
)
def test_vector_column_of_another_type_is_invalid(vectors: pa.Array, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", pa.table({"id": [1], "vector": vectors}))
    with pytest.raises(Invalid, match=message) as caught:
        find_source(str(path), Columns())
    assert field_of(caught.value) == "vector_column"


def test_id_column_of_another_type_is_invalid(tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", table_of([1.5], np.ones((1, 2), np.float32)))
    with pytest.raises(Invalid, match="'id' holds double; ids are integers or strings") as caught:
        find_source(str(path), Columns())
    assert field_of(caught.value) == "id_column"


@pytest.mark.parametrize(
    ("ids", "id_type"),
    [
        (pa.array([1], pa.uint8()), "int64"),
        (pa.array([1], pa.uint64()), "int64"),
        (pa.array(["a"]), "string"),
        (pa.array(["a"], pa.large_string()), "string"),
        (pa.array(["a"]).dictionary_encode(), "string"),
    ],
)
def test_id_type_follows_from_the_column(ids: pa.Array, id_type: str, tmp_path: Path) -> None:
    table = pa.table({"id": ids, "vector": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))})
    assert find_source(str(write(tmp_path / "words.parquet", table)), Columns()).id_type == id_type


def test_all_attributes_are_the_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", random_table(5))
    attributes = find_source(str(path), Columns(attributes="all")).attributes
    assert attributes == {"word": pa.large_string(), "pos": pa.large_string(), "rank": pa.int16()}


@pytest.mark.parametrize("name", ["score", "query", "id_hash"])
def test_reserved_attribute_name_is_refused(name: str, tmp_path: Path) -> None:
    table = random_table(5).append_column(name, pa.array(range(5)))
    path = write(tmp_path / "words.parquet", table)
    with pytest.raises(Invalid, match=f"'{name}' is a reserved name") as caught:
        find_source(str(path), Columns(attributes="all"))
    assert field_of(caught.value) == "attribute_columns"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (("wrod",), "no column 'wrod'; there are: id, vector, word, pos, rank"),
        ("word", "must be a list of columns or 'all', not 'word'"),
    ],
)
def test_unknown_attributes_are_refused(attributes: tuple[str, ...] | str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", random_table(5))
    with pytest.raises(Invalid, match=message) as caught:
        find_source(str(path), Columns(attributes=attributes))
    assert field_of(caught.value) == "attribute_columns"


def test_dimension_of_variable_length_lists_is_that_of_the_first_row(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], pa.list_(pa.float32()))
    write(tmp_path / "a.parquet", pa.table({"id": [1, 2], "vector": lists}).slice(0, 0))
    write(tmp_path / "b.parquet", pa.table({"id": [1, 2], "vector": lists}))
    assert find_source(str(tmp_path), Columns()).dimension == 3
    assert find_source(str(tmp_path / "a.parquet"), Columns()).dimension is None
