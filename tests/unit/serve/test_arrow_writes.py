"""Upserts and deletes over HTTP, as Arrow streams: right ones, wrong ones, and damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Limits
from cluster.errors import Invalid
from cluster.write import PointWrite
from serve.arrow_writes import arrow_delete, arrow_upsert
from serve.write_bodies import WriteOptions
from tests.unit.serve.endpoint import Endpoint, hit_ids, problem, run_with_endpoint, stream_of
from tests.unit.serve.writes import answer, held, send_arrow, stream

L2 = CollectionConfig(2, metric="l2")
THREE = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
VECTORS = vectors_array(THREE)
IDS = pa.array([1, 2, 3])
Upserts = Any  # a record batch


def checked(body: bytes, config: CollectionConfig = L2, known: Any = None, limits: Limits = Limits()) -> Upserts:  # noqa: B008
    return arrow_upsert(body, WriteOptions(), config, known or {}, limits).write.upserts


def refused(body: bytes, config: CollectionConfig = L2, known: Any = None, limits: Limits = Limits()) -> str:  # noqa: B008
    """The one field that is named."""
    with pytest.raises(Invalid) as caught:
        checked(body, config, known, limits)
    (error,) = caught.value.errors
    return error.field


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_upsert_and_delete_by_arrow(id_type: str, tmp_path: Path) -> None:
    ids = pa.array([5, -7, 2**62]) if id_type == "int64" else pa.array(["a", "", "ü"])

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, metric="l2", id_type=id_type, shards=2)
        body = stream(id=ids, vector=vectors_array(THREE.astype(np.float16)), word=pa.array(["x", None, "z"]))
        written = answer(await send_arrow(endpoint, "upsert", body))
        assert written["upserted"] == 3
        found = (await endpoint.search("words", vector=[1, 2], min_lsn=written["lsn"])).json()
        assert hit_ids(found) == [ids.to_pylist()]
        points = await held(endpoint, written, *ids.to_pylist())
        assert [points[value]["attributes"] for value in ids.to_pylist()] == [
            {"word": "x"},
            {"word": None},
            {"word": "z"},
        ]
        assert endpoint.services.log("words").newest_live().attributes == {"word": "large_string"}
        deleted = answer(await send_arrow(endpoint, "delete", stream(id=pa.concat_arrays([ids[:2], ids[:1]]))))
        assert deleted["deleted"] == 2
        assert set(await held(endpoint, deleted, *ids.to_pylist())) == {ids[2].as_py()}
        problem(await send_arrow(endpoint, "upsert", body, k=3), 400, "k")
        problem(await send_arrow(endpoint, "delete", b"nonsense"), 400, "body")

    run_with_endpoint(scenario, tmp_path)


def test_vectors_of_one_batch_are_not_copied_where_they_are_stored_as_they_came() -> None:
    body = stream(id=IDS, vector=VECTORS)
    start = pa.py_buffer(body).address
    for values in (checked(body).column("vector").flatten().buffers()[1], checked(body).column("id").buffers()[1]):
        assert start <= values.address < start + len(body)


def test_batches_of_a_stream_are_one_write() -> None:
    batches = [pa.record_batch([IDS.slice(at, 1), VECTORS.slice(at, 1)], names=["id", "vector"]) for at in range(3)]
    upserts = checked(stream_of(batches, batches[0].schema))
    assert upserts.to_pydict() == {"id": [1, 2, 3], "vector": THREE.tolist()}
    assert upserts.schema.field("vector").type == pa.list_(pa.float32(), 2)


def test_cosine_vectors_get_length_one_and_the_stored_dtype() -> None:
    upserts = checked(stream(id=IDS, vector=VECTORS), CollectionConfig(2, vector_dtype="float16"))
    expected = (THREE / np.linalg.norm(THREE.astype(np.float64), axis=1, keepdims=True)).astype(np.float16)
    assert upserts.column("vector").to_pylist() == expected.tolist()
    assert upserts.column("vector").type == pa.list_(pa.float16(), 2)


@pytest.mark.parametrize("dtype", [pa.int8(), pa.uint8(), pa.int32(), pa.uint32(), pa.uint64(), pa.int64()])
def test_ids_of_any_integer_type_are_taken_as_int64(dtype: pa.DataType) -> None:
    assert checked(stream(id=IDS.cast(dtype), vector=VECTORS)).column("id").equals(IDS)


def vectors(*rows: list[float], dtype: Any = np.float32) -> Any:
    return vectors_array(np.array(rows, dtype))


NAN, INFINITY = float("nan"), float("inf")
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("id[2]", {"id": pa.array([1, 2, 1])}),
    ("id[1]", {"id": pa.array([1, None, 1])}),
    ("id[1]", {"id": pa.array([1, 2**63, 3], pa.uint64())}),
    ("id", {"id": pa.array(["1", "2", "3"])}),
    ("id", {"id": pa.array([1.0, 2.0, 3.0])}),
    ("id", {"id": pa.array([True, False, True])}),
    ("vector", {"vector": vectors([1], [2], [3])}),
    ("vector", {"vector": vectors([1, 2], [3, 4], [5, 6], dtype=np.float64)}),
    ("vector", {"vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32()))}),
    ("vector[1]", {"vector": pa.array([[1, 2], None, [1, 2]], pa.list_(pa.float32(), 2))}),
    ("vector", {"vector": pa.array([[1, 2], [None, 2], [1, 2]], pa.list_(pa.float32(), 2))}),
    ("vector[2]", {"vector": vectors([1, 2], [3, 4], [NAN, 6])}),
    ("vector[1]", {"vector": vectors([1, 2], [3, INFINITY], [NAN, 6])}),
    ("vector[1]", {"vector": vectors([1, 2], [3, 1e20], [5, 6])}),
    ("query", {"query": IDS}),
    ("id_hash", {"id_hash": IDS}),
    ("x" * 257, {"x" * 257: IDS}),
    ("when", {"when": pa.array([0, 1, 2], pa.timestamp("s", "UTC"))}),
    ("tags", {"tags": pa.array([["a"], ["b"], None])}),
    ("body", {"kind": pa.array(["a", "b", "a"]).dictionary_encode()}),
    ("kind", {"kind": pa.array(["a", "b", "a"], pa.string_view())}),
    ("kind", {"kind": pa.array([["a"], ["b"], ["a"]], pa.list_view(pa.string()))}),
    ("kind", {"kind": pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array(["a"]))}),
    ("kind", {"kind": pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [IDS])}),
    ("kind", {"kind": pa.array([b"x" * 16] * 3, pa.uuid())}),
    ("count", {"count": pa.array([1.0, 2.0, 3.0])}),
    ("count[2]", {"count": pa.array([1, 2, 2**63], pa.uint64())}),
    ("count", {"count": pa.array(["1", "2", "3"])}),
    ("a,b", {"a,b": IDS}),
    ("a\0", {"a\0": IDS}),
    ("count", {"count": pa.array([[1], [2], [3]])}),
    ("place", {"place": pa.array([1, 2, 3])}),
    ("attributes[1]", {"word": pa.array(["x", "x" * 97, "x"])}),
    ("attributes[2]", {"a": pa.array([None, None, "x" * 50]), "b": pa.array(["x" * 60, "y", "x" * 60])}),
]
KNOWN = {"count": "int64", "place": "list<item: double>"}


@pytest.mark.parametrize(("field", "columns"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_column_is_refused_with_its_position(field: str, columns: dict[str, Any]) -> None:
    body = stream(**({"id": IDS, "vector": VECTORS} | columns))
    assert refused(body, known=KNOWN, limits=Limits(attribute_bytes=100)) == field


def test_zero_vector_under_cosine_and_large_number_under_float16_are_refused() -> None:
    body = stream(id=IDS, vector=vectors([1, 2], [0, 0], [1, 1]))
    assert refused(body, CollectionConfig(2)) == "vector[1]"
    body = stream(id=IDS, vector=vectors([1, 2], [1, 1], [1, -70_000]))
    assert refused(body, CollectionConfig(2, metric="l2", vector_dtype="float16")) == "vector[2]"


def test_stream_without_the_columns_or_rows_is_refused() -> None:
    empty = pa.record_batch([IDS[:0], VECTORS[:0]], names=["id", "vector"])
    assert refused(stream_of([], empty.schema)) == "body"
    assert refused(stream_of([empty], empty.schema)) == "body"
    assert refused(stream(id=IDS)) == "body"
    assert refused(stream(vector=VECTORS)) == "body"
    twice = pa.record_batch([IDS, VECTORS, IDS, IDS], names=["id", "vector", "n", "n"])
    assert refused(stream_of([twice], twice.schema)) == "body"
    assert refused(stream(id=IDS, vector=VECTORS), limits=Limits(points_per_upsert=2)) == "body"
    compressed = pa.record_batch([IDS, VECTORS], names=["id", "vector"])
    assert refused(stream_of([compressed], compressed.schema, compression="zstd")) == "body"
    assert refused(b"") == "body"
    assert refused(b'{"points": []}') == "body"


def test_strings_that_are_not_utf8_are_refused() -> None:
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).cast(pa.string(), safe=False)
    assert refused(stream(id=IDS, vector=VECTORS, word=text)) == "word"
    with pytest.raises(Invalid, match="id"):
        arrow_delete(stream(id=text), WriteOptions(), CollectionConfig(2, id_type="string"), Limits())


def test_columns_that_share_bytes_are_refused() -> None:
    """A stream may say of 300 columns that their values lie in the bytes of one."""
    rows, size = 200, 200 * 8
    columns = {f"c{number:03d}": pa.array(np.arange(rows)) for number in range(300)}
    whole = {"id": pa.array(np.arange(rows)), "vector": vectors_array(np.ones((rows, 2), np.float32)), **columns}
    body = stream(**whole)
    assert checked(body).num_columns == len(whole)
    for number in range(2, len(whole)):
        body = body.replace(struct.pack("<qq", number * size, size), struct.pack("<qq", 0, size), 1)
    values = body.index(np.arange(rows).tobytes())
    metadata = body[:values].replace(struct.pack("<q", len(whole) * size), struct.pack("<q", 2 * size))
    shared = metadata + body[values : values + 2 * size] + b"\xff\xff\xff\xff\0\0\0\0"
    assert pa.ipc.open_stream(shared).read_all().column("c299").to_pylist() == list(range(rows))
    assert refused(shared) == "body"


def test_attributes_are_cast_to_the_types_of_the_collection() -> None:
    known = {"count": "int64", "rate": "double", "day": "date32[day]", "old": "large_string"}
    body = stream(
        id=IDS,
        vector=VECTORS,
        count=pa.array([1, None, 3], pa.int8()),
        rate=pa.array([1, 2, 3]),
        day=pa.array([0, 1, 2], pa.date32()),
        old=pa.nulls(3),
    )
    upserts = checked(body, known=known)
    assert upserts.schema.names == ["id", "vector", "count", "rate", "day"]  # of all null nothing is stored
    assert [str(upserts.schema.field(name).type) for name in ("count", "rate", "day")] == [
        "int64",
        "double",
        "date32[day]",
    ]
    assert upserts.column("count").to_pylist() == [1, None, 3]


@pytest.mark.parametrize(
    "dtype",
    [
        pa.bool_(),
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.date32(),
        pa.time64("ns"),
        pa.timestamp("us"),
        pa.duration("s"),
    ],
    ids=str,
)
def test_new_attribute_takes_the_type_of_its_column(dtype: pa.DataType) -> None:
    column = pa.array([1, 0, 1], pa.int64()).cast(pa.int32()).cast(dtype) if dtype == pa.date32() else None
    column = column if column is not None else pa.array([0, None, 1]).cast(dtype)
    write = arrow_upsert(stream(id=IDS, vector=VECTORS, it=column), WriteOptions(), L2, {}, Limits())
    assert write.new_attributes == {"it": str(dtype)}
    assert write.write.upserts.column("it").equals(column)


def test_column_of_an_imported_nested_type_is_taken_as_it_is() -> None:
    column = pa.array([[1.0], None, []], pa.list_(pa.float64()))
    upserts = checked(stream(id=IDS, vector=VECTORS, place=column), known={"place": str(column.type)})
    assert upserts.column("place").equals(column)


def test_repeated_ids_of_a_delete_are_taken_once() -> None:
    write = arrow_delete(stream(id=pa.array([3, 1, 3, 1])), WriteOptions(), L2, Limits()).write
    assert write.deletes.to_pylist() == [3, 1]
    for wrong in (stream(id=IDS, vector=VECTORS), stream(ids=IDS), stream(id=pa.array([1, None])), stream(id=IDS[:0])):
        with pytest.raises(Invalid):
            arrow_delete(wrong, WriteOptions(), L2, Limits())
    with pytest.raises(Invalid, match="1 to 2 ids, not 3"):
        arrow_delete(stream(id=IDS), WriteOptions(), L2, Limits(ids_per_delete=2))


def test_damaged_stream_is_taken_or_refused_but_never_fails() -> None:
    seed = 20_260_101
    print(f"seed {seed}")
    chance = random.Random(seed)
    body = stream(
        id=pa.array(["a", "b", "c"]), vector=VECTORS, word=pa.array(["x", None, "z"]), n=pa.array([1, 2, None])
    )
    config = CollectionConfig(2, metric="l2", id_type="string")
    outcomes = {"taken": 0, "refused": 0}
    for _ in range(3_000):
        damaged = bytearray(body)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(len(damaged))
            damaged[at] = chance.choice(
                [0, 1, 0xFF, 0x7F, chance.randrange(256), damaged[at] ^ (1 << chance.randrange(8))]
            )
        if chance.random() < 0.1:
            damaged = damaged[: chance.randrange(len(damaged))]
        try:
            write = arrow_upsert(bytes(damaged), WriteOptions(), config, {"n": "int64"}, Limits()).write
        except Invalid:
            outcomes["refused"] += 1
        else:
            use(write)
            outcomes["taken"] += 1
    assert min(outcomes.values()) > 100, outcomes


def use(write: PointWrite) -> None:
    """Read every byte, as a shard would."""
    write.upserts.validate(full=True)
    assert len(write.upserts.to_pylist()) == write.points
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, write.upserts.schema) as writer:
        writer.write_batch(write.upserts)
