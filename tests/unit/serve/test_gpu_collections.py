"""Collections on GPUs over HTTP: what is refused without any, what answers and status tell."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from actors import ray_jobs
from actors.shard import ReplicaStatus
from cluster.cluster_gpus import NO_GPUS, ClusterGpus
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid, Unavailable
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import ReplicaKey
from cluster.routing import Routing
from serve.arrow_bodies import ARROW
from serve.descriptions import describe_collection
from serve.explain import explanation, print_explanation
from serve.gpu_checks import check_new_collection
from serve.job_bodies import check_create
from serve.job_words import plan_lines
from serve.metrics import render
from serve.openapi import openapi_document
from serve.tables import print_collection
from tests.gpu_double import double_device
from tests.unit.actors.gpu_segments import gpu_config, gpu_points
from tests.unit.actors.points import brute_force, random_vectors
from tests.unit.serve.command_line import told
from tests.unit.serve.endpoint import Endpoint, arrow_stream, hit_ids, problem, run_with_endpoint, until
from tests.unit.serve.gpu_endpoint import Gpus, publish, run_with_gpus
from tests.unit.serve.listening import listening
from tests.unit.serve.test_metrics import facts_of, parsed, value

WORDS, SEARCH = "/v1/collections/words", "/v1/collections/words/points:search"
CONFIG = gpu_config("flat", cpu_twin=True)
POINTS = gpu_points(CONFIG)
QUERIES = random_vectors(CONFIG, 3, seed=5)
ON_GPU = {"dimension": 8, "index": {"device": "gpu", "num_gpus": 1.0}}
TWO_GPUS, BUSY = ClusterGpus(2.0, 2.0), ClusterGpus(2.0, 0.0)


# --- asking for GPUs ------------------------------------------------------------------------------------------------


def test_gpus_that_the_cluster_does_not_have_are_refused_with_the_ways_out(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for place, body, field in (
            ((WORDS, "put"), ON_GPU, "index.device"),
            ((f"{WORDS}/jobs", "post"), import_of(create=ON_GPU), "create.index.device"),
            ((f"{WORDS}/jobs", "post"), import_of(create={"index": ON_GPU["index"]}), "create.index.device"),
        ):
            refused = problem(await endpoint.http.request(place[1], place[0], json=body), 400, field)
            assert "no GPU" in refused["detail"]
            assert "wait_for_gpu" in refused["detail"]
            assert "device cpu" in refused["detail"]
        assert endpoint.jobs.entrypoints == {}
        assert endpoint.coordinator.table is not None
        assert not endpoint.coordinator.table.collections

    run_with_endpoint(scenario, tmp_path)


def import_of(**more: Any) -> dict[str, Any]:
    return {"kind": "import", "source": "rows.parquet"} | more


def test_collection_that_waits_for_gpus_is_taken_and_says_what_it_waits_for(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        index = {"device": "gpu", "wait_for_gpu": True}
        creating = asyncio.create_task(endpoint.http.put(WORDS, json={"dimension": 8, "index": index}))
        await until(lambda: endpoint.services.known("words"))
        described = (await endpoint.http.get(WORDS)).json()
        assert (described["device"], described["num_gpus"]) == ("gpu", 0.125), "the least: there are no points"
        assert (described["ready"], gpus.doubles) == (False, [])
        endpoint.eagleray.runtime.add_gpus(1.0)
        assert (await creating).status_code == 201
        (replica,) = (await endpoint.http.get(WORDS)).json()["shards"][0]["replicas"]
        assert (replica["device"], replica["state"], replica["gpu"]["name"]) == ("gpu", "ready", "double")

    run_with_gpus(scenario, tmp_path, total=0.0)


def test_collection_that_has_its_gpus_is_created_again_without_a_change(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        created = await endpoint.create("words", **ON_GPU)
        assert (created["device"], created["config"]["index"]["device"]) == ("gpu", "gpu")
        assert endpoint.eagleray.runtime.free_gpus == 0.0
        assert "0 of 1 are free" in problem(await endpoint.http.put("/v1/collections/more", json=ON_GPU), 503)["detail"]
        assert (await endpoint.http.put(WORDS, json=ON_GPU)).status_code == 200
        problem(await endpoint.http.put(WORDS, json={"dimension": 8}), 409)

    run_with_gpus(scenario, tmp_path, total=1.0)


def test_collection_that_leaves_its_share_open_is_created_again_without_a_change(tmp_path: Path) -> None:
    """Eight of them share a GPU while they are empty; the config says nothing of that."""
    open_share = {"dimension": 8, "index": {"device": "gpu"}}

    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        created = await endpoint.create("words", **open_share)
        assert (created["num_gpus"], "num_gpus" in created["config"]["index"]) == (0.125, False)
        (replica,) = created["shards"][0]["replicas"]
        assert (replica["device"], replica["num_gpus"]) == ("gpu", 0.125)
        assert (await endpoint.http.put(WORDS, json=open_share)).status_code == 200
        null = {"dimension": 8, "index": {"device": "gpu", "num_gpus": None}}
        assert (await endpoint.http.put(WORDS, json=null)).status_code == 200
        problem(await endpoint.http.put(WORDS, json=ON_GPU), 409)
        described_by("Collection").validate(created)
        for number in range(7):
            await endpoint.create(f"more-{number}", **open_share)
        assert endpoint.eagleray.runtime.free_gpus == 0.0
        full = problem(await endpoint.http.put("/v1/collections/last", json=open_share), 503)
        assert "take 0.125 GPUs more, 0 of 1 are free" in full["detail"]

    run_with_gpus(scenario, tmp_path, total=1.0)


def test_device_auto_does_without_gpus(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert (await endpoint.create("words", dimension=8))["device"] == "cpu"
        response = await endpoint.http.put("/v1/collections/graph", json={"dimension": 8, "index": {"kind": "cagra"}})
        assert "hnsw" in problem(response, 400, "index.kind")["detail"]
        response = await endpoint.http.post(f"{WORDS}/jobs", json={"kind": "rebuild", "index": {"device": "auto"}})
        assert response.status_code == 202

    run_with_endpoint(scenario, tmp_path)


def new(counted: ClusterGpus, exists: bool = False, shards: int = 1, **index: Any) -> None:
    check_new_collection(CollectionConfig(8, shards=shards, index=IndexConfig(**index)), lambda: counted, exists)


@pytest.mark.parametrize(
    ("counted", "index", "field"),
    [
        (NO_GPUS, {"device": "gpu"}, "index.device"),
        (NO_GPUS, {"device": "gpu", "kind": "cagra"}, "index.device"),
        (NO_GPUS, {"kind": "cagra"}, "index.kind"),
        (TWO_GPUS, {"kind": "cagra", "device": "cpu"}, "index.kind"),
        (TWO_GPUS, {"kind": "hnsw", "device": "gpu"}, "index.kind"),
        (TWO_GPUS, {"device": "gpu", "num_gpus": 1.0, "shards": 3}, "index.device"),
        (TWO_GPUS, {"device": "gpu", "shards": 17}, "index.device"),
    ],
)
def test_new_collection_on_gpus_is_refused_by_field(counted: ClusterGpus, index: Any, field: str) -> None:
    with pytest.raises(Invalid) as error:
        new(counted, **index)
    assert [each.field for each in error.value.errors] == [field]


def test_new_collection_on_gpus_is_taken_where_they_are_or_are_waited_for() -> None:
    new(TWO_GPUS, device="gpu", num_gpus=1.0, shards=2)
    new(TWO_GPUS, device="gpu", shards=16)
    new(TWO_GPUS, device="gpu", kind="cagra")
    new(TWO_GPUS, kind="cagra")
    new(BUSY, kind="cagra")  # without points it needs none yet
    new(NO_GPUS, device="gpu", kind="cagra", wait_for_gpu=True)
    new(ClusterGpus(1.0, 0.5), device="gpu", num_gpus=0.25, shards=2)
    new(BUSY, exists=True, device="gpu")


def test_gpus_that_others_hold_are_not_there_now() -> None:
    with pytest.raises(Unavailable, match="0 of 2 are free") as error:
        new(BUSY, device="gpu")
    assert error.value.retry_after_s is not None
    new(BUSY, device="gpu", wait_for_gpu=True)


def test_gpus_are_counted_without_asking_their_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_nodes", lambda: {"a": {"CPU": 4.0}, "b": {"CPU": 4.0, "GPU": 2.0}})
    monkeypatch.setattr(ray_jobs, "_free", lambda resource: [0.5, 1.0] if resource == "GPU" else [])
    monkeypatch.setattr(ray_jobs.ray, "remote", lambda function: pytest.fail("a task was started"))
    assert ray_jobs.counted_gpus() == ClusterGpus(2.0, 1.5, by_node=(0.5, 1.0))


def test_cluster_is_not_asked_for_gpus_that_nobody_wants() -> None:
    def counted() -> ClusterGpus:
        raise AssertionError("nobody asked for GPUs")

    check_new_collection(CollectionConfig(8, index=IndexConfig(device="cpu")), counted, exists=False)
    check_new_collection(CollectionConfig(8, index=IndexConfig(device="gpu")), counted, exists=True)


def test_create_of_an_import_is_checked_with_the_gpus_that_there_are() -> None:
    create = {"index": {"kind": "cagra", "device": "gpu"}}
    asked: list[CollectionConfig] = []
    check_create(create, lambda config: asked.append(config))  # type: ignore[func-returns-value]
    assert [config.index.kind for config in asked] == ["cagra"]


def test_rebuild_on_gpus_counts_those_that_its_collection_has(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        await publish(endpoint, gpu_config("flat", num_gpus=1.0), POINTS)
        url = f"{WORDS}/jobs"
        response = await endpoint.http.post(url, json={"kind": "rebuild", "index": {"kind": "ivf_flat"}})
        assert response.status_code == 202, response.text
        response = await endpoint.http.post(url, json={"kind": "rebuild", "index": {"num_gpus": None}})
        assert response.status_code == 202, "the build chooses, and may keep what is there"
        other = problem(await endpoint.http.post(url, json={"kind": "rebuild", "index": {"num_gpus": 0.5}}), 503)
        assert "its own have 1 with another share" in other["detail"]
        assert (await endpoint.http.post(url, json=import_of())).status_code == 202
        wrong = {"kind": "rebuild", "index": {"kind": "hnsw"}}
        assert "flat" in problem(await endpoint.http.post(url, json=wrong), 400, "index.kind")["detail"]
        more = problem(await endpoint.http.post(url, json={"kind": "rebuild", "shards": 3}), 400, "index.device")
        assert "3 GPUs" in more["detail"]

    run_with_gpus(scenario, tmp_path, total=1.0)


# --- answers --------------------------------------------------------------------------------------------------------


def test_answer_of_a_gpu_says_nothing_and_that_of_its_twin_that_it_is_degraded(tmp_path: Path) -> None:
    truth = brute_force(POINTS, QUERIES, 10, "l2")

    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        await publish(endpoint, CONFIG, POINTS)
        (gpu,) = gpus.doubles
        searched = len(gpu.searches)
        plain = (await endpoint.search("words", vectors=QUERIES.tolist())).json()
        assert (hit_ids(plain), "degraded" in plain) == (truth, False)
        assert len(gpu.searches) > searched
        assert b"degraded" not in (await arrow_answer(endpoint)).schema.metadata
        gpu.run_out_of_memory()
        degraded = (await endpoint.search("words", vectors=QUERIES.tolist())).json()
        assert (hit_ids(degraded), degraded["degraded"]) == (truth, "cpu")
        assert "degraded" not in (await endpoint.search("words", vectors=QUERIES.tolist())).json()
        gpu.lose()
        table = await arrow_answer(endpoint)
        assert table.schema.metadata[b"degraded"] == b"cpu"
        assert table.column("id").to_pylist() == [point for points in truth for point in points]

        for answer in (plain, degraded):
            described_by("SearchAnswer").validate(answer)
        replica = await degraded_replica(endpoint)
        described_by("Collection").validate((await endpoint.http.get(WORDS)).json())
        assert "lost" in replica["degraded"]
        assert replica["gpu"]["lost"]
        samples = parsed((await endpoint.http.get("/metrics")).text)
        place = {"collection": "words", "coordinator": "endpoint-1"}
        assert value(samples, "eagleray_degraded_searches_total", **place) == 2
        assert value(samples, "eagleray_queries_total", outcome="ok", **place) == 5
        of_replica = {"collection": "words", "shard": "0", "replica": "0", "num_gpus": "1"}
        assert value(samples, "eagleray_replica_degraded", **of_replica) == 1
        assert value(samples, "eagleray_gpu_out_of_memory_searches", **of_replica) == 1
        assert (await endpoint.http.get("/readyz")).status_code == 200

    run_with_gpus(scenario, tmp_path, total=1.0)  # none is left for a replica that would stand in


def described_by(name: str) -> Draft202012Validator:
    """As the OpenAPI document has it."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": openapi_document()["components"]}
    return Draft202012Validator(schema)


async def degraded_replica(endpoint: Endpoint) -> dict[str, Any]:
    """The supervisor knows it as soon as it has asked."""
    while True:
        replica, *_ = (await endpoint.http.get(WORDS)).json()["shards"][0]["replicas"]
        if replica["degraded"]:
            return dict(replica)
        await asyncio.sleep(0.01)


async def arrow_answer(endpoint: Endpoint) -> Any:
    body = arrow_stream(QUERIES.astype(np.float32))
    response = await endpoint.search_arrow("words", body, accept=ARROW)
    assert response.status_code == 200, response.text
    return pa.ipc.open_stream(response.content).read_all()


def test_without_a_twin_a_search_that_a_gpu_cannot_answer_fails(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        config = gpu_config("flat", cpu_twin=False)
        await publish(endpoint, config, gpu_points(config))
        gpus.doubles[0].run_out_of_memory(times=100)
        assert "cpu_twin" in problem(await endpoint.search("words", vectors=QUERIES.tolist()), 503)["detail"]

    run_with_gpus(scenario, tmp_path)


def test_knobs_of_a_graph_reach_the_gpu_and_its_limits_are_refused_by_name(tmp_path: Path) -> None:
    config = gpu_config("cagra")
    points = gpu_points(config)

    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        await publish(endpoint, config, points, double_device())
        (gpu,) = gpus.doubles
        knobs = {"itopk_size": 100, "search_width": 4}
        answer = await endpoint.search("words", vectors=QUERIES.tolist(), params=knobs)
        assert (answer.status_code, "degraded" in answer.json()) == (200, False), answer.text
        assert asked_last(gpu) == (128, 4)  # in steps of 32
        options = {"itopk_size": 64, "search_width": 8}
        assert (await endpoint.search_arrow("words", arrow_stream(QUERIES), **options)).status_code == 200
        assert asked_last(gpu) == (64, 8)
        for name, wrong, limit in (("itopk_size", 513, "512"), ("itopk_size", 31, "32"), ("search_width", 65, "64")):
            refused = problem(
                await endpoint.search("words", vectors=QUERIES.tolist(), params={name: wrong}), 400, f"params.{name}"
            )
            assert limit in refused["detail"]
        searches = len(gpu.searches)
        many = (await endpoint.search("words", vectors=QUERIES.tolist(), k=600)).json()
        assert [len(hits) for hits in many["results"]] == [600] * 3  # by the CPU, which is no failure
        assert ("degraded" in many, len(gpu.searches)) == (False, searches)

    run_with_gpus(scenario, tmp_path)


def test_without_a_twin_what_is_over_a_limit_is_refused_by_name(tmp_path: Path) -> None:
    config = gpu_config("cagra", cpu_twin=False)
    points = gpu_points(config)

    async def scenario(endpoint: Endpoint, gpus: Gpus) -> None:
        await publish(endpoint, config, points, double_device())
        refused = problem(await endpoint.search("words", vectors=QUERIES.tolist(), k=600), 400, "k")
        assert "512" in refused["detail"]
        assert "cpu_twin" in refused["detail"]
        assert (await endpoint.search("words", vectors=QUERIES.tolist(), k=100)).status_code == 200
        body = arrow_stream(QUERIES.astype(np.float32))
        assert "512" in problem(await endpoint.search_arrow("words", body, k=600), 400, "k")["detail"]

    run_with_gpus(scenario, tmp_path)


def asked_last(gpu: Any) -> tuple[int, int]:
    last = gpu.searches[-1]
    return last["itopk_size"], last["search_width"]


# --- status ---------------------------------------------------------------------------------------------------------

GPU_FACTS = {"name": "L4", "total_bytes": 24 << 30, "free_bytes": 20 << 30, "used_bytes": 1 << 30, "share": 1.0}
FLAT: dict[str, Any] = {"index_kind": "flat", "index_bytes": 400, "device": "gpu"}
THERE = FLAT | {"gpu_predicted_bytes": 4_000, "gpu_measured_bytes": 4_096, "out_of_memory": 3, "degraded": ""}
NOT_THERE = FLAT | {"gpu_predicted_bytes": None, "gpu_measured_bytes": None, "out_of_memory": 1, "degraded": "no room"}
UNMEASURED = FLAT | {"gpu_predicted_bytes": 500, "gpu_measured_bytes": None, "out_of_memory": 0, "degraded": ""}
POINT = {"target_recall": 0.95, "params": {}, "recall": 1.0, "recall_low": 1.0, "latency_ms": 0.1, "met": True}
SEGMENT: dict[str, Any] = {
    "segment_id": "s", "count": 5, "index_kind": "flat", "index_params": {}, "codes": "float32", "device": "gpu",
    "rerank_store": "rows", "index_bytes": 400, "predicted_bytes": 400, "reason": "why", "considered": [],
    "built": {}, "operating_points": [POINT | {"queries_per_s": 0.0}],
}  # fmt: skip
MANIFEST = Manifest(
    "words", 3, gpu_config("flat"), Routing(1), 2, (ShardEntry(0),), created_at="", writer="", num_gpus=0.5
)


def replica(*twins: dict[str, Any], **more: Any) -> ReplicaStatus:
    gpu = GPU_FACTS | {"lost": ""}
    told = {"generations": (2,), "points": 5, "gpu": gpu, "segments": twins} | more
    return ReplicaStatus("ready", (3,), **told)


def described_as(*statuses: tuple[ReplicaKey, ReplicaStatus], serving: int = 2) -> dict[str, Any]:
    return describe_collection(facts_of(MANIFEST, serving, dict(statuses)), None)


def on(share: float, number: int = 0) -> ReplicaKey:
    return ReplicaKey("words", 0, number, share)


def test_replica_tells_what_its_indexes_take_of_its_gpu_beside_what_was_predicted() -> None:
    described = described_as(
        (on(0.5), replica(THERE, NOT_THERE, degraded="segment s: no room")),
        (on(0.5, 1), replica(THERE, UNMEASURED)),
        (on(0.5, 2), replica(NOT_THERE, gpu=None, degraded="no driver")),
    )
    assert (described["device"], described["num_gpus"]) == ("gpu", 0.5)
    full, unmeasured, without = described["shards"][0]["replicas"]
    sums = ("index_predicted_bytes", "index_measured_bytes", "out_of_memory")
    assert [full["gpu"][name] for name in sums] == [4_000, 4_096, 4]
    assert [unmeasured["gpu"][name] for name in sums] == [4_500, None, 3]
    assert (full["gpu"]["name"], full["degraded"], unmeasured["degraded"]) == ("L4", "segment s: no room", "")
    assert (without["gpu"], without["degraded"]) == (None, "no driver")
    samples = parsed(render({}, [described]).decode())
    told = {
        name: [
            samples.get((f"eagleray_{name}", frozenset((place(number) | {"num_gpus": "0.5"}).items())))
            for number in range(3)
        ]
        for name in (
            "gpu_index_predicted_bytes",
            "gpu_index_measured_bytes",
            "gpu_out_of_memory_searches",
            "replica_degraded",
        )
    }
    assert told == {
        "gpu_index_predicted_bytes": [4_000.0, 4_500.0, None],
        "gpu_index_measured_bytes": [4_096.0, None, None],
        "gpu_out_of_memory_searches": [4.0, 3.0, None],
        "replica_degraded": [1.0, 0.0, 1.0],
    }


def place(number: int) -> dict[str, str]:
    return {"collection": "words", "shard": "0", "replica": str(number)}


@pytest.mark.parametrize(
    ("share", "device", "words"), [(0.0, "cpu", "cpu"), (1.0, "gpu", "1 GPU"), (0.50000001, "gpu", "0.5 GPU")]
)
def test_replicas_with_two_shares_are_told_apart_while_one_takes_over(share: float, device: str, words: str) -> None:
    before = ReplicaStatus("ready", (2, 3), (1, 2), points=9, lsn=8, epoch=1)
    described = described_as((on(share), before), (on(0.5), replica(SEGMENT | THERE, lsn=7)), serving=1)
    (shard,) = described["shards"]
    told = {(each["replica"], each["device"], each["num_gpus"]) for each in shard["replicas"]}
    assert told == {(0, device, share), (0, "gpu", 0.5)}
    assert (shard["points"], shard["segments"]) == (5, [SEGMENT | THERE])  # as those have it that are going to serve
    samples = parsed(render({}, [described]).decode())  # no series twice
    before_told = repr(share).removesuffix(".0")  # two series of one name and labels would have no scrape read
    old, new = {"device": device, "num_gpus": before_told}, {"device": "gpu", "num_gpus": "0.5"}
    assert [value(samples, "eagleray_lsn", **which, **place(0)) for which in (old, new)] == [8.0, 7.0]
    assert ("eagleray_replica_degraded", frozenset((place(0) | {"num_gpus": "0.5"}).items())) in samples
    printed_of = printed(print_collection, described)
    assert f"ready ({words})" in printed_of
    assert "ready (0.5 GPU)" in printed_of


def test_switch_to_gpus_says_what_their_replicas_wait_for() -> None:
    before = ReplicaStatus("ready", (2,), (1,))
    waits = ReplicaStatus("starting", error="Ray has no place for it yet")
    for status, words in (
        (waits, "starts: Ray has no place for it yet"),
        (replace(waits, error=""), "starts"),
        (replica(generations=()), "loads it"),
    ):
        described = described_as((on(0.0), before), (on(0.5), status), serving=1)
        assert described["switching"] == f"switching to generation 2: shard 0 {words}"


def test_status_says_which_replicas_are_degraded_and_why() -> None:
    described = described_as(
        (on(0.5), replica(SEGMENT | THERE)), (on(0.5, 1), replica(SEGMENT | NOT_THERE, degraded="s: no room"))
    )
    text = printed(print_collection, described)
    assert "generation 2 on GPUs, 0.5 a replica, ready" in text
    assert "shard 0, replica 1: degraded, the CPU answers: s: no room\n" in text
    assert "replica 0: degraded" not in text
    assert "GPU bytes" in text
    assert "4.1 kB" in text
    described["shards"][0]["segments"] = [SEGMENT | NOT_THERE]
    why = "on the GPU: not there, out of memory in 1 searches; the CPU answers: no room"
    explained = printed(print_explanation, described)
    assert why in explained
    assert "\neach replica has 0.5 of a GPU\n" in explained
    assert explanation(described)["num_gpus"] == 0.5


def test_status_says_which_replica_stands_in_and_what_it_waits_for() -> None:
    waits = ReplicaStatus("starting", error="it asks for 1 GPU")
    described = described_as((on(0.5), replica()), (on(0.5, 1), waits))
    assert described["ready"]
    text = " ".join(printed(print_collection, described).split())
    assert "shard 0, replica 1: stands in until one that lost its GPU was started again: it asks for 1 GPU" in text
    assert "replica 0: stands in" not in text
    too_many = described_as((on(0.0), ReplicaStatus("ready")), (on(0.0, 1), ReplicaStatus("ready")))
    assert "stands in" not in printed(print_collection, too_many), "it has no GPU to lose"


def printed(printer: Any, described: dict[str, Any]) -> str:
    shown = io.StringIO()
    printer(Console(file=shown, width=200), described)
    return shown.getvalue()


# --- the command line -----------------------------------------------------------------------------------------------


def test_search_on_the_command_line_says_that_its_answer_is_degraded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(tmp_path) as (client, _):
        point = told("search", "words", "--vector-file", vector_file(tmp_path), client=client)
        assert "degraded" not in point
        answers = type(client).search
        monkeypatch.setattr(
            type(client), "search", lambda *given, **options: answers(*given, **options) | {"degraded": "cpu"}
        )
        assert "degraded: a GPU" in told("search", "words", "--vector-file", vector_file(tmp_path), client=client)


def test_commands_ask_for_the_device_that_they_were_given(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        for command in (
            ["create", "others", "--dimension", "3"],
            ["rebuild", "words"],
            ["import", "rows.parquet", "--collection", "others"],
        ):
            with pytest.raises(Invalid, match=r"device.*no GPU.*wait_for_gpu"):
                told(*command, "--device", "gpu", client=client)


def vector_file(folder: Path) -> str:
    np.save(folder / "query.npy", np.ones((1, 3), np.float32))
    return str(folder / "query.npy")


def test_search_on_the_command_line_takes_the_knobs_of_gpus(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        for option, value_given in (("--itopk-size", "600"), ("--search-width", "65")):
            name = option.removeprefix("--").replace("-", "_")
            with pytest.raises(Invalid, match=f"params.{name}|<="):
                told("search", "words", "--vector-file", vector_file(tmp_path), option, value_given, client=client)


def test_plan_takes_the_memory_of_a_gpu_that_there_would_be() -> None:
    fields = ["plan", "--count", "2000000", "--dimension", "768"]
    assert "on a GPU" in told(*fields, "--gpu-memory", str(80 << 30))
    assert "on a GPU" not in told(*fields)
    assert "on a GPU" not in told(*fields, "--gpu-memory", str(80 << 30), "--device", "cpu")


def test_plan_of_a_job_tells_what_it_takes_of_gpus() -> None:
    gpu = {"name": "L4", "memory_bytes": 12_000_000_000, "num_gpus": 0.5, "predicted_bytes": 7_000_000_000}
    gpu |= {"num_gpus_reason": "half a GPU holds twice its 3500000000 bytes"}
    (line,) = plan_lines({"gpu": gpu | {"built_on": "gpu"}})
    assert line == (
        "served on L4: 0.5 GPU (12.0 GB) a replica (half a GPU holds twice its 3500000000 bytes); indexes take 7.0 GB "
        "there as predicted; built on a GPU"
    )
    unknown = {"name": "", "memory_bytes": None, "num_gpus": 1.0, "num_gpus_reason": "", "built_on": "cpu"}
    (line,) = plan_lines({"gpu": gpu | unknown})
    assert line == "served on GPUs: 1 GPU a replica; indexes take 7.0 GB there as predicted; built on a CPU"
