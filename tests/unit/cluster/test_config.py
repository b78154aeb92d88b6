"""Collection config, settings and names: what parses, what is refused, and that the field is named."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from cluster.config import (
    CollectionConfig,
    IndexConfig,
    Limits,
    Settings,
    Upkeep,
    check_collection_name,
    parse_ports,
)
from cluster.errors import Invalid


def fields_refused(data: dict[str, Any]) -> list[str]:
    with pytest.raises(Invalid) as caught:
        CollectionConfig.from_dict(data)
    for error in caught.value.errors:
        assert error.field in str(caught.value)
    return [error.field for error in caught.value.errors]


def test_config_of_a_dimension_alone_has_the_defaults() -> None:
    config = CollectionConfig.from_dict({"dimension": 8})
    assert config == CollectionConfig(
        dimension=8,
        metric="cosine",
        id_type="int64",
        shards=1,
        replicas=1,
        vector_dtype="float32",
        index=IndexConfig(kind="auto", target_recall=0.95, device="auto", memory_bytes=None),
    )


def test_config_survives_json_with_every_field_set() -> None:
    config = CollectionConfig(
        dimension=65_536,
        metric="ip",
        id_type="string",
        shards=1_024,
        replicas=16,
        vector_dtype="float16",
        index=IndexConfig(
            kind="cagra",
            target_recall=0.5,
            device="gpu",
            memory_bytes=2**63 - 1,
            num_gpus=0.25,
            cpu_twin=False,
            gpu_full="refuse",
            wait_for_gpu=True,
            codes="float16",
            graph_degree=64,
        ),
    )
    assert CollectionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_to_dict_is_plain_json_data() -> None:
    assert CollectionConfig(dimension=3).to_dict() == {
        "dimension": 3,
        "metric": "cosine",
        "id_type": "int64",
        "shards": 1,
        "replicas": 1,
        "vector_dtype": "float32",
        "index": {"kind": "auto", "target_recall": 0.95, "device": "auto", "memory_bytes": None},
    }


def test_config_without_dimension_is_refused() -> None:
    assert fields_refused({"metric": "l2"}) == ["dimension"]


def test_config_names_every_unknown_field() -> None:
    assert fields_refused({"dimension": 3, "colour": 1, "Metric": "l2"}) == ["colour", "Metric"]


def test_config_names_unknown_fields_of_the_index() -> None:
    assert fields_refused({"dimension": 3, "index": {"lists": 4, "M": 8}}) == ["index.lists", "index.M"]


@pytest.mark.parametrize("index", [None, [], "hnsw", 3])
def test_config_refuses_an_index_that_is_no_object(index: object) -> None:
    assert fields_refused({"dimension": 3, "index": index}) == ["index"]


@pytest.mark.parametrize("name", ["dimension", "shards", "replicas"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, [1]])
def test_config_refuses_numbers_that_are_not_positive_integers(name: str, value: object) -> None:
    assert fields_refused({"dimension": 3} | {name: value}) == [name]


@pytest.mark.parametrize(("name", "most"), [("dimension", 65_536), ("shards", 1_024), ("replicas", 16)])
def test_config_bounds_every_number_from_above(name: str, most: int) -> None:
    assert getattr(CollectionConfig.from_dict({"dimension": 3} | {name: most}), name) == most
    assert fields_refused({"dimension": 3} | {name: most + 1}) == [name]


@pytest.mark.parametrize(
    ("name", "choices"),
    [("metric", ["cosine", "l2", "ip"]), ("id_type", ["int64", "string"]), ("vector_dtype", ["float32", "float16"])],
)
def test_config_takes_exactly_the_named_choices(name: str, choices: list[str]) -> None:
    for choice in choices:
        assert getattr(CollectionConfig.from_dict({"dimension": 3, name: choice}), name) == choice
    for wrong in ("", "COSINE", "uuid", None, 1, ["l2"]):
        assert fields_refused({"dimension": 3, name: wrong}) == [name]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("kind", ["auto", "flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq", "cagra"]),
        ("device", ["auto", "cpu", "gpu"]),
        ("gpu_full", ["step_down", "refuse"]),
    ],
)
def test_config_takes_exactly_the_named_choices_of_the_index(name: str, choices: list[str]) -> None:
    for choice in choices:
        assert getattr(CollectionConfig.from_dict({"dimension": 3, "index": {name: choice}}).index, name) == choice
    for wrong in ("", "pq", None, 1):
        assert fields_refused({"dimension": 3, "index": {name: wrong}}) == [f"index.{name}"]


@pytest.mark.parametrize("recall", [1e-9, 0.5, 1, 1.0])
def test_config_takes_target_recall_up_to_one(recall: float) -> None:
    assert (
        CollectionConfig.from_dict({"dimension": 3, "index": {"target_recall": recall}}).index.target_recall == recall
    )


@pytest.mark.parametrize("recall", [0, 0.0, -0.1, 1.0000001, float("nan"), float("inf"), "0.9", True, None])
def test_config_refuses_target_recall_out_of_bounds(recall: object) -> None:
    assert fields_refused({"dimension": 3, "index": {"target_recall": recall}}) == ["index.target_recall"]


@pytest.mark.parametrize("memory", [0, -1, 2**63, 1.5, "1", True])
def test_config_refuses_memory_out_of_bounds(memory: object) -> None:
    assert fields_refused({"dimension": 3, "index": {"memory_bytes": memory}}) == ["index.memory_bytes"]


# ---- options of a named kind

OPTIONS: dict[str, Any] = {
    "m": 8,
    "ef_construction": 40,
    "codes": "float16",
    "nlist": 16,
    "pq_m": 4,
    "pq_bits": 8,
    "rerank_store": "sq8",
    "graph_degree": 32,
    "factory": "IVF16,SQ8",
}
TAKEN = {
    "auto": set(),
    "flat": {"codes"},
    "hnsw": {"m", "ef_construction", "codes", "rerank_store"},
    "ivf_flat": {"nlist", "codes", "rerank_store"},
    "ivf_sq8": {"nlist", "rerank_store"},
    "ivf_pq": {"nlist", "pq_m", "pq_bits", "rerank_store"},
    "ivf_rabitq": {"nlist", "rerank_store"},
    "cagra": {"graph_degree", "codes"},
    "factory": {"factory", "rerank_store"},
}


def with_option(kind: str, name: str, value: object) -> dict[str, Any]:
    needed = {"factory": "IVF16,SQ8"} if kind == "factory" else {}
    return {"dimension": 8, "index": {"kind": kind} | needed | {name: value}}


def message_of(data: dict[str, Any]) -> str:
    with pytest.raises(Invalid) as caught:
        CollectionConfig.from_dict(data)
    (error,) = caught.value.errors
    return error.message


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_taken_by_its_kinds_and_refused_by_others_with_those(kind: str, name: str) -> None:
    data = with_option(kind, name, OPTIONS[name])
    if name in TAKEN[kind]:
        index = CollectionConfig.from_dict(data).index
        assert getattr(index, name) == OPTIONS[name]
        assert index.options[name] == OPTIONS[name]
    else:
        assert fields_refused(data) == [f"index.{name}"]
        kinds = ", ".join(other for other, names in TAKEN.items() if name in names)
        assert message_of(data) == f"does not go with kind {kind}; it goes with: {kinds}"


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [
        ("hnsw", "m", 2, 128),
        ("hnsw", "ef_construction", 4, 2_000),
        ("ivf_flat", "nlist", 1, 1_048_576),
        ("ivf_pq", "pq_m", 1, 65_536),
        ("cagra", "graph_degree", 8, 128),
    ],
)
def test_number_of_an_option_is_bounded_and_the_bounds_are_told(kind: str, name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(CollectionConfig.from_dict(with_option(kind, name, value)).index, name) == value
    for wrong in (low - 1, high + 1, 8.0, "8", True, [8]):
        assert fields_refused(with_option(kind, name, wrong)) == [f"index.{name}"]
        assert message_of(with_option(kind, name, wrong)) == f"must be an integer from {low} to {high}, not {wrong!r}"


@pytest.mark.parametrize(
    ("kind", "name", "choices"),
    [
        ("hnsw", "codes", ["float32", "float16", "sq8"]),
        ("ivf_pq", "pq_bits", [4, 8]),
        ("ivf_rabitq", "rerank_store", ["none", "rows", "sq8", "float16", "float32"]),
    ],
)
def test_choice_of_an_option_is_one_of_those_told(kind: str, name: str, choices: list[Any]) -> None:
    for value in choices:
        assert getattr(CollectionConfig.from_dict(with_option(kind, name, value)).index, name) == value
    for wrong in ("", "int8", 6, ["sq8"]):
        listed = ", ".join(map(str, choices))
        assert message_of(with_option(kind, name, wrong)) == f"must be one of {listed}, not {wrong!r}"


@pytest.mark.parametrize("kind", ["flat", "cagra"])
def test_codes_of_vectors_as_they_come_are_floats(kind: str) -> None:
    for codes in ("float32", "float16"):
        assert CollectionConfig.from_dict(with_option(kind, "codes", codes)).index.codes == codes
    assert fields_refused(with_option(kind, "codes", "sq8")) == ["index.codes"]
    assert message_of(with_option(kind, "codes", "sq8")) == (f"must be float32 or float16 with kind {kind}, not 'sq8'")
    assert fields_refused(with_option(kind, "codes", "int8")) == ["index.codes"]


@pytest.mark.parametrize("share", [1e-3, 0.25, 1, 1.0])
def test_replica_asks_for_a_gpu_or_a_part_of_one(share: float) -> None:
    assert CollectionConfig.from_dict({"dimension": 3, "index": {"num_gpus": share}}).index.num_gpus == share


@pytest.mark.parametrize("share", [0, 9e-4, 5e-324, -0.5, 1.01, 2, float("nan"), "1", True])
def test_replica_cannot_ask_for_no_gpu_nor_for_several(share: object) -> None:
    assert fields_refused({"dimension": 3, "index": {"num_gpus": share}}) == ["index.num_gpus"]


@pytest.mark.parametrize("name", ["cpu_twin", "wait_for_gpu"])
def test_switches_of_the_index_are_true_or_false(name: str) -> None:
    for value in (True, False):
        assert getattr(CollectionConfig.from_dict({"dimension": 3, "index": {name: value}}).index, name) is value
    for wrong in (0, 1, "true", None):
        assert fields_refused({"dimension": 3, "index": {name: wrong}}) == [f"index.{name}"]


@pytest.mark.parametrize("factory", ["", "x" * 201, 3, ["Flat"]])
def test_factory_is_a_short_text(factory: object) -> None:
    assert fields_refused({"dimension": 8, "index": {"kind": "factory", "factory": factory}}) == ["index.factory"]


def test_kind_factory_needs_its_string() -> None:
    assert message_of({"dimension": 8, "index": {"kind": "factory"}}) == (
        "is required with kind factory, such as IVF1024,SQ8"
    )


def test_every_wrong_option_is_named() -> None:
    index = {"kind": "flat", "m": 8, "nlist": 4, "factory": "Flat"}
    assert fields_refused({"dimension": 8, "index": index}) == ["index.m", "index.nlist", "index.factory"]


@pytest.mark.parametrize("seconds", [1e-3, 1, 600.0])
def test_config_takes_build_seconds_over_zero(seconds: float) -> None:
    config = CollectionConfig.from_dict({"dimension": 3, "index": {"build_seconds": seconds}})
    assert config.index.build_seconds == seconds


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "60", True])
def test_config_refuses_build_seconds_out_of_bounds(seconds: object) -> None:
    assert fields_refused({"dimension": 3, "index": {"build_seconds": seconds}}) == ["index.build_seconds"]


@pytest.mark.parametrize("churn", [0, 0.25, 1, 1.0])
def test_config_takes_churn_from_zero_to_one(churn: float) -> None:
    assert CollectionConfig.from_dict({"dimension": 3, "index": {"churn": churn}}).index.churn == churn


@pytest.mark.parametrize("churn", [-0.01, 1.01, float("nan"), "0.5", True, None])
def test_config_refuses_churn_out_of_bounds(churn: object) -> None:
    assert fields_refused({"dimension": 3, "index": {"churn": churn}}) == ["index.churn"]


def test_config_to_dict_has_only_the_index_options_that_were_given() -> None:
    always = {"kind": "hnsw", "target_recall": 0.95, "device": "auto", "memory_bytes": None}
    assert CollectionConfig(dimension=3, index=IndexConfig("hnsw")).to_dict()["index"] == always
    given = IndexConfig("hnsw", m=8, codes="sq8", build_seconds=60.0, churn=0.5)
    expected = always | {"m": 8, "codes": "sq8", "build_seconds": 60.0, "churn": 0.5}
    assert CollectionConfig(dimension=3, index=given).to_dict()["index"] == expected


@pytest.mark.parametrize("kind", TAKEN)
def test_config_with_every_option_of_a_kind_survives_json(kind: Any) -> None:
    options = {name: OPTIONS[name] for name in TAKEN[kind]}
    config = CollectionConfig(dimension=8, index=IndexConfig(kind, build_seconds=1.5, churn=0.1, **options))
    assert CollectionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_names_all_wrong_fields_at_once() -> None:
    data = {"dimension": 0, "metric": "hamming", "shards": 9_999, "index": {"kind": "pq", "target_recall": 2}}
    assert fields_refused(data) == ["dimension", "shards", "metric", "index.kind", "index.target_recall"]


def test_config_message_gives_the_value_and_the_bound() -> None:
    with pytest.raises(Invalid, match=r"^shards: must be an integer from 1 to 1024, not 2000$"):
        CollectionConfig(dimension=3, shards=2_000)


@pytest.mark.parametrize("name", ["a", "0", "word-net_2", "a" * 63])
def test_collection_name_of_allowed_characters_is_returned(name: str) -> None:
    assert check_collection_name(name) == name


@pytest.mark.parametrize("name", ["", "a" * 64, "A", "-a", "_a", "a b", "a/b", "..", "ä", "a\n", "a."])
def test_collection_name_of_other_characters_is_refused(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        check_collection_name(name)
    assert [error.field for error in caught.value.errors] == ["collection"]


def test_settings_of_data_alone_have_the_defaults() -> None:
    assert Settings.from_dict({"data": "file:///d"}) == Settings(data="file:///d", limits=Limits())


def test_settings_take_every_field() -> None:
    data = {
        "data": "memory://x",
        "namespace": "n",
        "shard_cpus": 0,
        "shard_threads": 3,
        "cache_dir": "c",
        "reconcile_period_s": 0.5,
        "replica_timeout_s": 2.0,
        "observed_share": 0.5,
        "observed_duty": 0.25,
        "shard_transport": "actor",
        "shard_ports": "20000-20999",
        "limits": {"k": 5},
        "upkeep": {"seal_points": 7},
    }
    assert set(data) == {field.name for field in fields(Settings)}
    settings = Settings.from_dict(data)
    assert vars(settings) == data | {"limits": Limits(k=5), "upkeep": Upkeep(seal_points=7)}


def test_upkeep_that_would_refuse_writes_before_it_seals_is_refused() -> None:
    Upkeep(seal_bytes=1_000, tail_bytes_max=1_000)
    for data in ({"tail_bytes_max": 1_000}, {"seal_bytes": 1_001, "tail_bytes_max": 1_000}, {"seal_bytes": 1 << 40}):
        with pytest.raises(Invalid, match=r"less than seal_bytes .*: writes would be refused before") as caught:
            Settings.from_dict({"data": "x", "upkeep": data})
        assert [error.field for error in caught.value.errors] == ["upkeep.tail_bytes_max"]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "data"),
        ({"data": "x", "shard_cpu": 1}, "shard_cpu"),
        ({"data": "x", "limits": {"K": 1}}, "limits.K"),
        ({"data": "x", "limits": 3}, "limits"),
        ({"data": "x", "limits": None}, "limits"),
    ],
)
def test_settings_refuse_and_name_the_wrong_field(data: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        Settings.from_dict(data)
    assert [error.field for error in caught.value.errors] == [field]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"shard_cpus": -1}, "shard_cpus"),
        ({"shard_cpus": "many"}, "shard_cpus"),
        ({"reconcile_period_s": 0}, "reconcile_period_s"),
        ({"replica_timeout_s": float("inf")}, "replica_timeout_s"),
        ({"observed_share": -0.1}, "observed_share"),
        ({"observed_share": 1.1}, "observed_share"),
        ({"observed_share": True}, "observed_share"),
        ({"observed_duty": 0}, "observed_duty"),
        ({"observed_duty": 1.1}, "observed_duty"),
        ({"shard_transport": "tcp"}, "shard_transport"),
        ({"shard_ports": "20000-19999"}, "shard_ports"),
        ({"shard_ports": "80"}, "shard_ports"),
        ({"shard_ports": "20000-70000"}, "shard_ports"),
        ({"shard_ports": "20000-"}, "shard_ports"),
        ({"shard_ports": 20000}, "shard_ports"),
        ({"limits": {"calls_in_flight_per_replica": 0}}, "limits.calls_in_flight_per_replica"),
        ({"limits": {"batch_vectors": "x"}}, "limits.batch_vectors"),
        ({"limits": {"k": True}}, "limits.k"),
    ],
)
def test_settings_out_of_bounds_name_the_field(settings: dict[str, object], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        Settings.from_dict({"data": "file:///d", **settings})
    assert [error.field for error in caught.value.errors] == [field]


def test_ports_are_a_range_one_or_any() -> None:
    assert [parse_ports(text) for text in ("20000-20002", "1024", "")] == [
        range(20000, 20003),
        range(1024, 1025),
        range(0),
    ]


@pytest.mark.parametrize("data", ["memory://x", "./data", "data"])
def test_data_that_other_processes_cannot_find_is_not_shared(data: str) -> None:
    with pytest.raises(Invalid, match="data"):
        Settings(data=data).check_shared()


@pytest.mark.parametrize("data", ["file:///d", "/d", "s3://bucket/prefix"])
def test_data_that_every_process_finds_is_shared(data: str) -> None:
    Settings(data=data).check_shared()
