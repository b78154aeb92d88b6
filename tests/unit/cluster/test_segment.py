"""Segments: rows written and read back, ids found by hash, checksums, the description."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from cluster import segment
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IdType, VectorDtype
from cluster.errors import Corrupt
from cluster.ids import hash_ids, id_array
from cluster.segment import (
    Checksum,
    FileEntry,
    OperatingPoint,
    Rows,
    SegmentDescription,
    SelfTest,
    checksum_bytes,
    checksum_file,
    rows_per_batch,
    rows_schema,
    verify_file,
    write_rows,
)

DIMENSION = 3  # unless a test says otherwise
SEED = 20_240_501


def ids_of(count: int, id_type: IdType) -> list[Any]:
    return [i * 7 - 20 for i in range(count)] if id_type == "int64" else [f"point {i}" for i in range(count)]


HashOf = Callable[[Any], NDArray[np.uint64]]


class Written:
    """A `rows.arrow` in hash order with random vectors, and the same as plain data."""

    def __init__(
        self, path: Path, ids: Sequence[Any], config: CollectionConfig, per_batch: int, hash_of: HashOf = hash_ids
    ) -> None:
        hashes = hash_of(id_array(ids, config.id_type))
        order = sorted(range(len(ids)), key=lambda i: (int(hashes[i]), ids[i]))
        self.path, self.config, self.per_batch = path, config, per_batch
        self.ids = [ids[i] for i in order]
        self.hashes = hashes[order]
        rng = np.random.default_rng(SEED)
        self.vectors = rng.standard_normal((len(ids), config.dimension)).astype(config.vector_dtype)
        self.titles = [f"title of {value}" for value in self.ids]
        starts = range(0, len(ids), per_batch)
        write_rows(path, rows_schema(config, {"title": pa.string()}), (self._batch(start) for start in starts))

    def _batch(self, start: int) -> Any:
        rows = slice(start, start + self.per_batch)
        columns = [
            id_array(self.ids[rows], self.config.id_type),
            vectors_array(self.vectors[rows]),
            pa.array(self.hashes[rows]),
            pa.array(self.titles[rows], pa.string()),
        ]
        return pa.record_batch(columns, schema=rows_schema(self.config, {"title": pa.string()}))

    def open(self) -> Rows:
        return Rows(self.path, len(self.ids), self.config.dimension, self.per_batch)


def write(
    tmp_path: Path,
    count: int,
    per_batch: int,
    id_type: IdType = "int64",
    dtype: VectorDtype = "float32",
    hash_of: HashOf = hash_ids,
    dimension: int = DIMENSION,
) -> Written:
    config = CollectionConfig(dimension=dimension, id_type=id_type, vector_dtype=dtype)
    return Written(tmp_path / "rows.arrow", ids_of(count, id_type), config, per_batch, hash_of)


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize(("count", "per_batch"), [(1, 4), (4, 4), (5, 4), (11, 4), (12, 4), (9, 1)])
def test_rows_written_are_read_back(tmp_path: Path, count: int, per_batch: int, id_type: IdType) -> None:
    written = write(tmp_path, count, per_batch, id_type)
    rows = written.open()
    assert rows.count == count
    assert rows.schema.names == ["id", "vector", "id_hash", "title"]
    assert rows.ids().to_pylist() == written.ids
    assert rows.vectors(0, count).tolist() == written.vectors.tolist()
    table = rows.take(np.arange(count), ["title", "id", "id_hash"])
    assert table.column("title").to_pylist() == written.titles
    assert table.column("id").to_pylist() == written.ids
    assert table.column("id_hash").to_pylist() == written.hashes.tolist()


def test_rows_whose_pages_were_given_back_are_read_again(tmp_path: Path) -> None:
    written = write(tmp_path, 11, 4)
    rows = written.open()
    before = rows.vectors(0, 11).copy()
    view = rows.vectors(0, 4)
    rows.forget_pages()
    assert view.tolist() == before[:4].tolist()
    assert rows.vectors(0, 11).tolist() == before.tolist()
    assert rows.gather_vectors(np.arange(11)).tolist() == before.tolist()
    assert rows.ids().to_pylist() == written.ids


def test_an_empty_file_is_no_rows_file(tmp_path: Path) -> None:
    (tmp_path / "rows.arrow").write_bytes(b"")
    with pytest.raises(Corrupt, match=r"rows\.arrow: not an Arrow file"):
        Rows(tmp_path / "rows.arrow", 0, 3, 4)


def test_rows_file_has_the_batches_it_was_given(tmp_path: Path) -> None:
    written = write(tmp_path, 11, 4)
    with pa.ipc.open_file(str(written.path)) as reader:
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [4, 4, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_of_every_range_cross_batch_borders(tmp_path: Path, dtype: VectorDtype) -> None:
    written = write(tmp_path, 11, 4, dtype=dtype)
    rows = written.open()
    for start in range(12):
        for stop in range(start, 12):
            found = rows.vectors(start, stop)
            assert found.dtype == np.float32
            assert found.shape == (stop - start, DIMENSION)
            assert found.tolist() == written.vectors[start:stop].astype(np.float32).tolist()


def test_vectors_within_one_float32_batch_are_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    rows = write(tmp_path, 11, 4).open()
    first, second = rows.vectors(4, 8), rows.vectors(5, 7)
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


@pytest.mark.parametrize("id_type", ["int64", "string"])  # string ids and titles put batches at odd offsets
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 17])
@pytest.mark.parametrize(("count", "per_batch"), [(1, 4), (4, 4), (9, 1), (61, 4), (62, 7), (63, 100)])
def test_gathered_vectors_are_those_of_any_rows(
    tmp_path: Path, count: int, per_batch: int, dimension: int, dtype: VectorDtype, id_type: IdType
) -> None:
    written = write(tmp_path, count, per_batch, id_type, dtype, dimension=dimension)
    rows = written.open()
    asked = np.random.default_rng(SEED).integers(0, count, (7, 13))
    asked[0, :4] = [0, count - 1, count - 1, 0]  # both ends, and rows repeated
    found = rows.gather_vectors(asked)
    assert found.dtype == np.float32
    assert found.shape == (7, 13, dimension)
    assert found.tolist() == written.vectors[asked].astype(np.float32).tolist()
    assert rows.gather_vectors(np.arange(count)).tolist() == written.vectors.astype(np.float32).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gathered_vectors_are_a_copy_that_may_be_written_to(tmp_path: Path, dtype: VectorDtype) -> None:
    written = write(tmp_path, 11, 4, dtype=dtype)
    rows = written.open()
    rows.gather_vectors(np.array([3, 4]))[:] = 7.0
    assert rows.vectors(0, 11).tolist() == written.vectors.astype(np.float32).tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_gathering_no_rows_gives_no_vectors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = write(tmp_path, 11, 4).open()
    assert rows.gather_vectors(np.zeros(shape, dtype=np.int64)).shape == (*shape, DIMENSION)


def test_gathering_rows_beyond_the_last_batch_fails(tmp_path: Path) -> None:
    rows = write(tmp_path, 12, 4).open()
    with pytest.raises(IndexError):
        rows.gather_vectors(np.array([12]))


def test_blocks_are_the_batches_in_order(tmp_path: Path) -> None:
    written = write(tmp_path, 11, 4)
    blocks = list(written.open().blocks())
    assert [first for first, _ in blocks] == [0, 4, 8]
    assert np.concatenate([vectors for _, vectors in blocks]).tolist() == written.vectors.tolist()


def test_take_returns_rows_in_the_order_asked(tmp_path: Path) -> None:
    written = write(tmp_path, 11, 4, "string")
    asked = [10, 0, 5, 5, 3, 4]
    batch = written.open().take(np.array(asked), ["id", "vector"])
    assert batch.column("id").to_pylist() == [written.ids[row] for row in asked]
    assert batch.column("vector").to_pylist() == written.vectors[asked].tolist()


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("per_batch", [1, 4, 100])
def test_rows_of_ids_finds_every_id_and_no_other(tmp_path: Path, id_type: IdType, per_batch: int) -> None:
    written = write(tmp_path, 23, per_batch, id_type)
    rows = written.open()
    assert rows.rows_of_ids(id_array(written.ids, id_type)).tolist() == list(range(23))
    absent: list[Any] = [10**6 + i for i in range(50)] if id_type == "int64" else [f"absent {i}" for i in range(50)]
    mixed = [absent[0], written.ids[7], absent[1], written.ids[7]]
    assert rows.rows_of_ids(id_array(absent, id_type)).tolist() == [-1] * 50
    assert rows.rows_of_ids(id_array(mixed, id_type)).tolist() == [-1, 7, -1, 7]
    assert rows.rows_of_ids(id_array([], id_type)).tolist() == []


def hash_of_few_values(ids: Any) -> NDArray[np.uint64]:
    """A bad hash: four values in all, so that runs of equal hashes fill and cross batches."""
    return (hash_ids(ids) >> np.uint64(62)) * np.uint64(10)


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("per_batch", [1, 2, 3, 7, 100])
def test_rows_of_ids_tells_equal_hashes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_type: IdType, per_batch: int
) -> None:
    monkeypatch.setattr(segment, "hash_ids", hash_of_few_values)
    written = write(tmp_path, 23, per_batch, id_type, hash_of=hash_of_few_values)
    assert len(set(written.hashes.tolist())) == 4
    rows = written.open()
    assert rows.rows_of_ids(id_array(written.ids, id_type)).tolist() == list(range(23))
    absent: list[Any] = [10**6 + i for i in range(20)] if id_type == "int64" else [f"absent {i}" for i in range(20)]
    assert rows.rows_of_ids(id_array(absent, id_type)).tolist() == [-1] * 20


def test_rows_of_ids_with_hashes_beyond_both_ends_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write(tmp_path, 9, 4).open()
    for extreme in (0, 2**64 - 1):
        fixed = np.array([extreme], dtype=np.uint64)
        monkeypatch.setattr(segment, "hash_ids", lambda ids, fixed=fixed: fixed)
        assert rows.rows_of_ids(id_array([123_456], "int64")).tolist() == [-1]


@pytest.mark.parametrize(("count", "per_batch"), [(10, 4), (12, 4), (11, 3), (11, 5)])
def test_rows_of_another_shape_than_described_are_corrupt(tmp_path: Path, count: int, per_batch: int) -> None:
    written = write(tmp_path, 11, 4)
    with pytest.raises(Corrupt, match=r"rows\.arrow"):
        Rows(written.path, count, DIMENSION, per_batch)


@pytest.mark.parametrize("kept_bytes", [0, 7, 100, -1])
def test_rows_of_a_truncated_file_are_corrupt(tmp_path: Path, kept_bytes: int) -> None:
    written = write(tmp_path, 11, 4)
    data = written.path.read_bytes()
    written.path.write_bytes(data[:kept_bytes])
    with pytest.raises(Corrupt, match=r"rows\.arrow"):
        written.open()


@pytest.mark.parametrize(
    ("dimension", "dtype", "expected"),
    [(1, "float32", 4_194_304), (384, "float32", 10_922), (384, "float16", 21_845), (65_536, "float32", 64)],
)
def test_rows_per_batch_fill_16_mib_of_vectors(dimension: int, dtype: VectorDtype, expected: int) -> None:
    assert rows_per_batch(CollectionConfig(dimension=dimension, vector_dtype=dtype)) == expected


def test_rows_schema_has_the_reserved_columns_first_and_not_null() -> None:
    config = CollectionConfig(dimension=2, id_type="string", vector_dtype="float16")
    schema = rows_schema(config, {"year": pa.int32()})
    assert schema == pa.schema(
        [
            pa.field("id", pa.large_string(), nullable=False),
            pa.field("vector", pa.list_(pa.float16(), 2), nullable=False),
            pa.field("id_hash", pa.uint64(), nullable=False),
            pa.field("year", pa.int32()),
        ]
    )


def test_checksum_of_bytes_is_pinned_and_that_of_a_file_agrees(tmp_path: Path) -> None:
    assert checksum_bytes(b"") == "xxh3_128:99aa06d3014798d86001c324468d497f"  # xxHash's own test vector
    path = tmp_path / "file"
    path.write_bytes(b"eagleray")
    assert checksum_file(path) == FileEntry(8, checksum_bytes(b"eagleray"))


def test_checksum_of_a_file_does_not_depend_on_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5)
    expected = checksum_file(path)
    for chunk_bytes in (1, 7, 256, 1_280, 1_281):
        monkeypatch.setattr(segment, "CHECKSUM_CHUNK_BYTES", chunk_bytes)
        assert checksum_file(path) == expected


def test_checksum_of_pieces_is_that_of_the_whole() -> None:
    data = bytes(range(256)) * 5
    for cuts in ([], [0], [1], [100, 100, 900]):
        checksum, edges = Checksum(), [0, *cuts, len(data)]
        for start, stop in pairwise(edges):
            checksum.add(memoryview(data)[start:stop])
        assert checksum.entry == FileEntry(len(data), checksum_bytes(data))


def test_verify_file_takes_the_bytes_written_and_refuses_all_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(np.random.default_rng(SEED).integers(0, 256, 300, dtype=np.uint8))
    path.write_bytes(data)
    entry = checksum_file(path)
    verify_file(path, entry, "segments/s/file")
    flipped = [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in range(len(data))]
    for wrong in (*flipped, data[:-1], b"", data + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(Corrupt, match=f"^segments/s/file: {len(wrong)} bytes"):
            verify_file(path, entry, "segments/s/file")


def test_verify_file_refuses_a_wrong_size_with_the_right_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(Corrupt):
        verify_file(path, replace(checksum_file(path), size_bytes=4), "file")


DESCRIPTION = SegmentDescription(
    segment_id="s1",
    count=11,
    dimension=3,
    metric="l2",
    id_type="string",
    vector_dtype="float16",
    rows_per_batch=4,
    attributes={"title": "string"},
    spec={"kind": "hnsw", "params": {"m": 16}},
    operating_points=(
        OperatingPoint(0.95, {"ef_search": 48}, 0.971, 0.962, 0.25, True, queries_per_s=9_500.5),
        OperatingPoint(0.99, {"ef_search": 1024}, 0.981, 0.97, 4.5, False),
        OperatingPoint(0.9, {"ef_search": 20, "far_ef_search": 60, "far_score": 0.1 + 0.2}, 0.97, 0.96, 0.2, True),
    ),
    self_test=SelfTest((9, 10), ((9, 1), (10,)), 0.5),
    files={"rows.arrow": FileEntry(10, "xxh3_128:00"), "index.faiss": FileEntry(20, "xxh3_128:01")},
    built={"faiss": "1.15.1", "seconds": 0.5},
    considered=({"kind": "flat", "rejected": "too slow"}, {"kind": "hnsw", "params": {"m": 16}, "rejected": ""}),
)


def test_description_survives_encoding() -> None:
    assert SegmentDescription.decode(DESCRIPTION.encode(), "n") == DESCRIPTION
    empty = replace(DESCRIPTION, operating_points=(), self_test=SelfTest(), files={}, built={}, attributes={})
    assert SegmentDescription.decode(empty.encode(), "n") == empty


TWIN = {
    "recall": 0.93,
    "operating_points": [
        {"target_recall": 0.95, "params": {"ef_search": 60}, "recall": 0.96, "recall_low": 0.951, "latency_ms": 0.4}
        | {"met": True, "queries_per_s": 900.0}
    ],
}


def test_description_tells_of_a_twin_only_where_there_is_one() -> None:
    assert b"cpu_twin" not in DESCRIPTION.encode()
    assert DESCRIPTION.twin_points == ()
    twinned = replace(DESCRIPTION, cpu_twin=TWIN)
    again = SegmentDescription.decode(twinned.encode(), "n")
    assert again == twinned
    assert again.twin_points == (OperatingPoint(0.95, {"ef_search": 60}, 0.96, 0.951, 0.4, True, 900.0),)


@pytest.mark.parametrize(
    "twin", [["x"], {"recall": 0.9}, {**TWIN, "recall": "x"}, {**TWIN, "operating_points": [{"met": True}]}, "x"]
)
def test_description_of_a_twin_in_another_form_is_corrupt(twin: Any) -> None:
    data = json.loads(DESCRIPTION.encode()) | {"cpu_twin": twin}
    with pytest.raises(Corrupt, match="segment"):
        SegmentDescription.decode(json.dumps(data).encode(), "segment.json")


def test_description_without_the_newer_fields_is_read() -> None:
    raw = json.loads(DESCRIPTION.encode())
    del raw["considered"]
    for point in raw["operating_points"]:
        del point["queries_per_s"]
    read = SegmentDescription.decode(json.dumps(raw).encode(), "n")
    points = tuple(replace(point, queries_per_s=0.0) for point in DESCRIPTION.operating_points)
    assert read == replace(DESCRIPTION, considered=(), operating_points=points)


def test_description_encodes_to_the_same_bytes_each_time() -> None:
    reordered = replace(DESCRIPTION, files=dict(reversed(DESCRIPTION.files.items())))
    assert reordered.encode() == DESCRIPTION.encode()


def edited(**changes: object) -> bytes:
    """The description's JSON with fields changed; `None` removes one."""
    raw = json.loads(DESCRIPTION.encode()) | changes
    return json.dumps({name: value for name, value in raw.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{}",
        b'{"format":1}',
        b"[" * 100_000,
        DESCRIPTION.encode()[:-1],
        edited(format=2),
        edited(format=None),
        edited(format="1"),
        edited(colour="red"),
        edited(count=None),
        edited(self_test=None),
        edited(self_test={"rows": [1]}),
        edited(self_test=3),
        edited(files=[]),
        edited(files={"rows.arrow": {"size_bytes": 1}}),
        edited(files={"rows.arrow": {"size_bytes": 1, "checksum": "x", "more": 1}}),
        edited(operating_points=[{"recall": 1}]),
        edited(operating_points=3),
        edited(considered=3),
    ],
)
def test_description_of_junk_is_corrupt_and_names_the_object(data: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^collections/c/segments/s1/segment\.json: "):
        SegmentDescription.decode(data, "collections/c/segments/s1/segment.json")


def test_description_cut_anywhere_is_corrupt() -> None:
    data = DESCRIPTION.encode()
    for length in range(len(data)):
        with pytest.raises(Corrupt):
            SegmentDescription.decode(data[:length], "n")
