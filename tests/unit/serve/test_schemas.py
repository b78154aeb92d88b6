from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cluster.config import ALL_OPTIONS, CollectionConfig, IndexConfig, Limits
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts
from cluster.query import RAW_KNOBS, SearchParams
from serve.decoding import decode, decode_parameters
from serve.job_bodies import ImportBody, check_create
from serve.job_service import command_line
from serve.schemas import CollectionBody
from serve.search_bodies import (
    CANDIDATES_MAX,
    FetchBody,
    SearchBody,
    SearchOptions,
    arrow_query,
    json_query,
)

CONFIG = CollectionConfig(2, metric="l2")


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def no_gpus(config: CollectionConfig) -> GpuFacts | None:
    return None


def fields_of(error: Invalid) -> list[str]:
    return [field.field for field in error.errors]


def test_collection_body_has_the_defaults_of_the_config() -> None:
    assert decode(encoded(dimension=5), CollectionBody).to_config() == CollectionConfig(5)


INDEXES = (
    IndexConfig("ivf_flat", 0.5, "cpu", 7, 30.5, 0.25, codes="float16", nlist=3),
    IndexConfig("auto", 1.0, build_seconds=1e9, churn=1.0),
    IndexConfig("hnsw", codes="sq8", m=128, ef_construction=4, rerank_store="none"),
    IndexConfig("ivf_sq8", nlist=1_048_576, rerank_store="rows"),
    IndexConfig("ivf_pq", pq_m=5, pq_bits=8, rerank_store="float32"),
    IndexConfig("ivf_rabitq", rerank_store="sq8"),
    IndexConfig("factory", factory="HNSW8,SQ8", rerank_store="float16"),
    IndexConfig("cagra", graph_degree=64, num_gpus=0.25, cpu_twin=False, gpu_full="refuse", wait_for_gpu=True),
)


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.kind)
def test_collection_body_takes_every_field_of_the_config(index: IndexConfig) -> None:
    config = CollectionConfig(5, "ip", "string", 3, 2, "float16", index)
    assert decode(encoded(**config.to_dict()), CollectionBody).to_config() == config


def test_index_options_of_all_kinds_are_tried() -> None:
    tried = {name for index in INDEXES for name in index.options}
    assert tried == set(ALL_OPTIONS)


def test_null_option_is_one_that_was_not_given() -> None:
    given = {"kind": "hnsw", "m": 16}
    nulls = dict.fromkeys(("memory_bytes", "build_seconds", *ALL_OPTIONS))
    short, long = (decode(encoded(dimension=5, index=i), CollectionBody).to_config() for i in (given, nulls | given))
    assert short == long == CollectionConfig(5, index=IndexConfig("hnsw", m=16))
    assert short.to_dict() == long.to_dict()


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("build_seconds", 0.001, 0),
        ("churn", 1, 1.01),
        ("churn", 0, -0.01),
        ("m", 128, 129),
        ("m", 2, 1),
        ("ef_construction", 2_000, 2_001),
        ("nlist", 1_048_576, 1_048_577),
        ("pq_m", 65_536, 65_537),
        ("pq_bits", 8, 5),
        ("num_gpus", 0.001, 0.0009),
        ("num_gpus", 1.0, 1.01),
        ("gpu_full", "refuse", "drop"),
        ("device", "gpu", "tpu"),
        ("graph_degree", 8, 7),
        ("graph_degree", 128, 129),
        ("codes", "sq8", "int8"),
        ("rerank_store", "none", "disk"),
        ("factory", "x" * 200, "x" * 201),
        ("factory", "x", ""),
        ("kind", "ivf_rabitq", "ivf_rabit"),
    ],
)
def test_index_option_at_its_bound_is_decoded_and_beyond_is_refused_by_name(
    name: str, taken: Any, refused: Any
) -> None:
    assert getattr(decode(encoded(dimension=5, index={name: taken}), CollectionBody).index, name) == taken
    with pytest.raises(Invalid) as error:
        decode(encoded(dimension=5, index={name: refused}), CollectionBody)
    assert fields_of(error.value) == [f"index.{name}"]


def test_option_of_another_kind_is_refused_with_the_kinds_it_goes_with() -> None:
    with pytest.raises(Invalid, match="ivf_flat, ivf_sq8, ivf_pq, ivf_rabitq") as error:
        decode(encoded(dimension=5, index={"kind": "hnsw", "nlist": 4}), CollectionBody).to_config()
    assert fields_of(error.value) == ["index.nlist"]


def test_factory_string_that_faiss_does_not_know_is_refused_with_one_that_would_do() -> None:
    body = decode(encoded(dimension=5, index={"kind": "factory", "factory": "HNSWx"}), CollectionBody)
    with pytest.raises(Invalid, match=r"'HNSWx' for 5 dimensions.*HNSW32,SQ8") as error:
        body.to_config()
    assert fields_of(error.value) == ["index.factory"]


def test_search_body_and_url_options_have_the_same_defaults() -> None:
    body, options = decode(encoded(vector=[1.0, 2.0]), SearchBody), decode_parameters([], SearchOptions)
    for name in ("k", "timeout_ms", "min_coverage", "exact", "with_vectors"):
        assert getattr(body, name) == getattr(options, name)
    for name in (*RAW_KNOBS, "target_recall"):
        assert getattr(body.params, name) is getattr(options, name) is None
    assert json_query(body, CONFIG, Limits()).params == SearchParams()


def test_json_query_carries_every_option() -> None:
    body = decode(
        encoded(
            vectors=[[1, 2], [3, 4]],
            k=7,
            timeout_ms=50,
            min_coverage=0.25,
            params={"nprobe": 3, "ef_search": 4, "rerank": 1.5, "itopk_size": 96, "search_width": 2},
            with_attributes=["b", "a", "b"],
            with_vectors=True,
        ),
        SearchBody,
    )
    query = json_query(body, CONFIG, Limits())
    assert query.vectors.dtype == np.float32
    assert query.vectors.tolist() == [[1, 2], [3, 4]]
    assert (query.k, query.timeout_ms, query.min_coverage, query.with_vectors) == (7, 50.0, 0.25, True)
    assert query.params == SearchParams(3, 4, 1.5, itopk_size=96, search_width=2)
    assert query.with_attributes == ("b", "a")


def test_arrow_query_carries_every_option() -> None:
    options = decode_parameters(
        [
            ("k", "7"),
            ("timeout_ms", "50.5"),
            ("min_coverage", "0.25"),
            ("nprobe", "3"),
            ("ef_search", "4"),
            ("rerank", "1.5"),
            ("itopk_size", "96"),
            ("search_width", "2"),
            ("with_attributes", "b,a,,b"),
            ("with_vectors", "true"),
        ],
        SearchOptions,
    )
    query = arrow_query(np.array([[1, 2]], np.float16), options, CONFIG, Limits())
    assert query.vectors.dtype == np.float32
    assert query.vectors.tolist() == [[1, 2]]
    assert (query.k, query.timeout_ms, query.min_coverage, query.with_vectors) == (7, 50.5, 0.25, True)
    assert query.params == SearchParams(3, 4, 1.5, itopk_size=96, search_width=2)
    assert query.with_attributes == ("b", "a")


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"exact": True}, SearchParams(exact=True)),
        ({"target_recall": 0.9}, SearchParams(target_recall=0.9)),
        ({"target_recall": 1}, SearchParams(target_recall=1.0)),
        ({"rerank": 1_000}, SearchParams(rerank=1_000.0)),
        ({"exact": False, "nprobe": 2}, SearchParams(nprobe=2)),
        ({"itopk_size": 32}, SearchParams(itopk_size=32)),
        ({"itopk_size": 512, "search_width": 64}, SearchParams(itopk_size=512, search_width=64)),
        ({"search_width": 1}, SearchParams(search_width=1)),
    ],
)
def test_accuracy_is_asked_for_alike_in_json_and_arrow(options: dict[str, Any], params: SearchParams) -> None:
    assert queries_of(options, k=10) == [params, params]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exact": True, "nprobe": 3}, ["nprobe"]),
        ({"exact": True, "target_recall": 0.9}, ["target_recall"]),
        ({"exact": True, "ef_search": 3, "rerank": 2, "target_recall": 0.9}, ["ef_search", "rerank", "target_recall"]),
        ({"target_recall": 0.9, "nprobe": 3}, ["nprobe"]),
        ({"target_recall": 0.9, "ef_search": 3, "rerank": 2}, ["ef_search", "rerank"]),
        ({"exact": True, "itopk_size": 64}, ["itopk_size"]),
        ({"target_recall": 0.9, "search_width": 4, "itopk_size": 64}, ["itopk_size", "search_width"]),
    ],
)
def test_two_ways_to_ask_for_accuracy_are_refused_by_name(options: dict[str, Any], named: list[str]) -> None:
    for prefix, query in (("params.", query_of_json), ("", query_of_arrow)):
        with pytest.raises(Invalid, match="leave one out") as error:
            query(options, k=10)
        assert fields_of(error.value) == [prefix + name for name in named]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rerank", 0.99),
        ("rerank", 1_000.5),
        ("target_recall", 0),
        ("target_recall", 1.01),
        ("ef_search", 65_537),
        ("nprobe", 1.5),
        ("itopk_size", 31),
        ("search_width", 0),
    ],
)
def test_search_parameter_out_of_bounds_is_refused_by_name(name: str, value: float) -> None:
    for prefix, query in (("params.", query_of_json), ("", query_of_arrow)):
        with pytest.raises(Invalid) as error:
            query({name: value}, k=10)
        assert fields_of(error.value) == [prefix + name]


@pytest.mark.parametrize(("name", "value", "limit"), [("itopk_size", 513, "<= 512"), ("search_width", 65, "<= 64")])
def test_knob_over_a_limit_of_graphs_on_gpus_is_refused_with_the_limit(name: str, value: int, limit: str) -> None:
    for prefix, query in (("params.", query_of_json), ("", query_of_arrow)):
        with pytest.raises(Invalid, match=limit) as error:
            query({name: value}, k=10)
        assert fields_of(error.value) == [prefix + name]


@pytest.mark.parametrize(("k", "rerank"), [(65, 1_000), (100, 655.36), (2_048, 32)])
def test_candidates_of_a_query_are_bounded(k: int, rerank: float) -> None:
    assert k * rerank <= CANDIDATES_MAX
    assert queries_of({"rerank": rerank}, k) == [SearchParams(rerank=float(rerank))] * 2
    for prefix, query in (("params.", query_of_json), ("", query_of_arrow)):
        with pytest.raises(Invalid, match=r"at most 65536 are taken: rerank up to \d") as error:
            query({"rerank": rerank}, k + 1)
        assert fields_of(error.value) == [f"{prefix}rerank"]


def query_of_json(options: dict[str, Any], k: int) -> SearchParams:
    params = {name: value for name, value in options.items() if name != "exact"}
    body = {"vector": [1, 2], "k": k, "exact": options.get("exact", False), "params": params}
    return json_query(decode(encoded(**body), SearchBody), CONFIG, Limits()).params


def query_of_arrow(options: dict[str, Any], k: int) -> SearchParams:
    parameters = [(name, str(value).lower()) for name, value in ({"k": k} | options).items()]
    return arrow_query(
        np.ones((1, 2), np.float32), decode_parameters(parameters, SearchOptions), CONFIG, Limits()
    ).params


def queries_of(options: dict[str, Any], k: int) -> list[SearchParams]:
    return [query_of_json(options, k), query_of_arrow(options, k)]


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
        decode_parameters([("nprobe", "3"), ("k", "1"), ("k", "2")], SearchOptions)
    assert fields_of(error.value) == ["k"]


def test_fetch_body_keeps_integers_and_strings_apart() -> None:
    assert decode(b'{"ids": [1, "1", -5]}', FetchBody).ids == [1, "1", -5]


@pytest.mark.parametrize(
    "create",
    [
        {},
        {"metric": "ip"},
        {"dimension": 7, "index": {}},
        {"index": {"kind": "hnsw", "target_recall": 0.99}},
        {"index": {"kind": "ivf_pq", "pq_m": 48}},
        {"index": {"kind": "factory", "factory": "PCA64,IVF16,Flat"}},  # the file's dimension tells whether it is one
    ],
)
def test_create_of_an_import_may_give_any_part_of_a_config(create: dict[str, Any]) -> None:
    check_create(create, no_gpus)


@pytest.mark.parametrize(
    ("create", "field"),
    [
        ({"dimension": None}, "create.dimension"),
        ({"shards": "2"}, "create.shards"),
        ({"index": None}, "create.index"),
        ({"index": {"kind": 1}}, "create.index.kind"),
        ({"name": "words"}, "create.name"),
        ({"index": {"m": 16}}, "create.index.m"),
        ({"index": {"kind": "hnsw", "m": 1}}, "create.index.m"),
        ({"index": {"kind": "hnsw", "target_recall": 1}}, "create.index.target_recall"),
        ({"index": {"kind": "ivf_pq", "rerank_store": "none"}}, "create.index.target_recall"),
        ({"dimension": 8, "index": {"kind": "ivf_pq", "pq_m": 16}}, "create.index.pq_m"),
        ({"dimension": 8, "index": {"kind": "factory", "factory": "PQ3"}}, "create.index.factory"),
        ({"index": {"kind": "factory"}}, "create.index.factory"),
    ],
)
def test_create_of_an_import_names_its_wrong_field(create: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as error:
        check_create(create, no_gpus)
    assert fields_of(error.value) == [field]
    assert field in str(error.value)


def test_import_command_leaves_out_what_was_not_given() -> None:
    command = command_line("import-1", "words", ImportBody("import", "x.parquet"), "eagleray")
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
