from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.errors import Invalid
from cluster.query import SearchParams
from serve.job_service import import_command
from serve.schemas import (
    CollectionBody,
    FetchBody,
    ImportBody,
    SearchBody,
    SearchOptions,
    arrow_query,
    check_create,
    decode,
    decode_options,
    json_query,
)

CONFIG = CollectionConfig(2, metric="l2")


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def fields_of(error: Invalid) -> list[str]:
    return [field.field for field in error.errors]


def test_collection_body_has_the_defaults_of_the_config() -> None:
    assert decode(encoded(dimension=5), CollectionBody).to_config() == CollectionConfig(5)


def test_collection_body_takes_every_field_of_the_config() -> None:
    index = IndexConfig("ivf_flat", 0.5, "cpu", 7)
    config = CollectionConfig(5, "ip", "string", 3, 2, "float16", index)
    assert decode(encoded(**config.to_dict()), CollectionBody).to_config() == config


def test_search_body_and_url_options_have_the_same_defaults() -> None:
    body, options = decode(encoded(vector=[1.0, 2.0]), SearchBody), decode_options([])
    for name in ("k", "timeout_ms", "min_coverage", "with_vectors"):
        assert getattr(body, name) == getattr(options, name)
    assert (body.params.nprobe, body.params.ef_search) == (options.nprobe, options.ef_search) == (None, None)


def test_json_query_carries_every_option() -> None:
    body = decode(
        encoded(
            vectors=[[1, 2], [3, 4]],
            k=7,
            timeout_ms=50,
            min_coverage=0.25,
            params={"nprobe": 3, "ef_search": 4},
            with_attributes=["b", "a", "b"],
            with_vectors=True,
        ),
        SearchBody,
    )
    query = json_query(body, CONFIG, Limits())
    assert query.vectors.dtype == np.float32
    assert query.vectors.tolist() == [[1, 2], [3, 4]]
    assert (query.k, query.timeout_ms, query.min_coverage, query.with_vectors) == (7, 50.0, 0.25, True)
    assert query.params == SearchParams(3, 4)
    assert query.with_attributes == ("b", "a")


def test_arrow_query_carries_every_option() -> None:
    options = decode_options(
        [
            ("k", "7"),
            ("timeout_ms", "50.5"),
            ("min_coverage", "0.25"),
            ("nprobe", "3"),
            ("ef_search", "4"),
            ("with_attributes", "b,a,,b"),
            ("with_vectors", "true"),
        ]
    )
    query = arrow_query(np.array([[1, 2]], np.float16), options, CONFIG, Limits())
    assert query.vectors.dtype == np.float32
    assert query.vectors.tolist() == [[1, 2]]
    assert (query.k, query.timeout_ms, query.min_coverage, query.with_vectors) == (7, 50.5, 0.25, True)
    assert query.params == SearchParams(3, 4)
    assert query.with_attributes == ("b", "a")


def test_arrow_query_leaves_the_callers_vectors_alone_under_cosine() -> None:
    vectors = np.array([[3.0, 4.0]], np.float32)
    vectors.flags.writeable = False
    query = arrow_query(vectors, SearchOptions(), CollectionConfig(2), Limits())
    assert query.vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert vectors.tolist() == [[3.0, 4.0]]


def test_integers_are_taken_as_numbers_of_a_vector() -> None:
    body = decode(b'{"vector": [1, 16777217]}', SearchBody)
    assert json_query(body, CONFIG, Limits()).vectors.tolist() == [[1.0, 16777216.0]]


def test_largest_float32_is_taken_and_the_next_refused() -> None:
    largest = float(np.finfo(np.float32).max)
    cosine = CollectionConfig(2)
    assert json_query(SearchBody(vector=[largest, 0.0]), cosine, Limits()).vectors.tolist() == [[1.0, 0.0]]
    with pytest.raises(Invalid) as error:
        json_query(SearchBody(vector=[0.0, largest * 1.001]), cosine, Limits())
    assert fields_of(error.value) == ["vector"]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b'{"vectors": [[1, 2], [3, "x"]]}', "vectors[...][...]"),
        (b'{"params": {"nprobe": 0}}', "params.nprobe"),
        (b'{"params": {"n`probe": 0}}', "params.n"),
        (b'{"k": null}', "k"),
        (b"3", "body"),
    ],
)
def test_decode_names_the_place(data: bytes, field: str) -> None:
    with pytest.raises(Invalid) as error:
        decode(data, SearchBody)
    expected = field.replace("vectors[...][...]", "vectors[1][1]")
    assert fields_of(error.value) in ([field], [expected])
    assert "$" not in str(error.value)


def test_repeated_url_parameter_is_refused_by_name() -> None:
    with pytest.raises(Invalid) as error:
        decode_options([("nprobe", "3"), ("k", "1"), ("k", "2")])
    assert fields_of(error.value) == ["k"]


def test_fetch_body_keeps_integers_and_strings_apart() -> None:
    assert decode(b'{"ids": [1, "1", -5]}', FetchBody).ids == [1, "1", -5]


@pytest.mark.parametrize(
    "create",
    [{}, {"metric": "ip"}, {"dimension": 7, "index": {}}, {"index": {"kind": "hnsw", "target_recall": 1}}],
)
def test_create_of_an_import_may_give_any_part_of_a_config(create: dict[str, Any]) -> None:
    check_create(create)


@pytest.mark.parametrize(
    ("create", "field"),
    [
        ({"dimension": None}, "create.dimension"),
        ({"shards": "2"}, "create.shards"),
        ({"index": None}, "create.index"),
        ({"index": {"kind": 1}}, "create.index.kind"),
        ({"name": "words"}, "create.name"),
    ],
)
def test_create_of_an_import_names_its_wrong_field(create: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as error:
        check_create(create)
    assert fields_of(error.value) == [field]
    assert field in str(error.value)


def test_import_command_leaves_out_what_was_not_given() -> None:
    command = import_command("import-1", "words", ImportBody("import", "x.parquet"), "eagleray")
    names = [argument.split("=", 1)[0] for argument in command[4:]]
    assert names == [
        "--job-id",
        "--collection",
        "--source",
        "--id-column",
        "--vector-column",
        "--seed",
        "--namespace",
    ]
