from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from actors.shard import ReplicaStatus
from cluster.advice import Advice
from cluster.config import CollectionConfig, IndexConfig
from cluster.manifest import Manifest, SegmentRef, ShardEntry, TombstonesRef
from cluster.placement import ReplicaKey
from cluster.routing import Routing
from serve.descriptions import describe_collection, describe_unreadable
from serve.metrics import EndpointMetrics, render
from tests.unit.actors.points import random_points
from tests.unit.serve.endpoint import (
    Endpoint,
    EndpointOptions,
    another_endpoint,
    arrow_stream,
    problem,
    run_with_endpoint,
    until,
)

CONFIG = CollectionConfig(3, shards=2, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 40)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Every sample by name and labels; no two may be the same."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def collections_in(samples: Samples) -> set[str]:
    return {dict(labels)["collection"] for _, labels in samples if "collection" in dict(labels)}


async def scraped(endpoint: Endpoint) -> Samples:
    response = await endpoint.http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(response.text)


def facts_of(
    manifest: Manifest, serving: int, statuses: dict[ReplicaKey, ReplicaStatus], **more: Any
) -> dict[str, Any]:
    """As a directory describes a collection."""
    facts = {"manifest": manifest, "serving_generation": serving, "statuses": statuses}
    return {**facts, "advice": (), "idle_upkeep": {}, **more}


def test_metrics_of_an_idle_endpoint_parse(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await scraped(endpoint) == {}

    run_with_endpoint(scenario, tmp_path)


def test_counts_are_those_of_the_searches_that_were_made(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        for _ in range(3):
            assert (await endpoint.search("words", vectors=[[1, 2, 3]] * 4)).status_code == 200
        assert (await endpoint.search_arrow("words", arrow_stream(np.ones((5, 3), np.float32)))).status_code == 200
        problem(await endpoint.search("words", vector=[1]), 400, "vector")
        problem(await endpoint.search("words", vector=[1, 2, 3], k=0), 400, "k")
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        problem(await endpoint.search("words", vector=[1, 2, 3]), 503)
        assert (await endpoint.search("words", vector=[1, 2, 3], min_coverage=0.5)).status_code == 200

        samples = await scraped(endpoint)
        here = {"collection": "words", "coordinator": "endpoint-1"}
        outcomes = {"ok": 4, "error": 2, "unavailable": 1, "partial": 1}
        for outcome, count in outcomes.items():
            assert value(samples, "eagleray_queries_total", outcome=outcome, **here) == count
        assert value(samples, "eagleray_query_vectors_total", **here) == 3 * 4 + 5 + 1 + 1
        assert value(samples, "eagleray_search_latency_seconds_count", **here) == sum(outcomes.values())
        assert value(samples, "eagleray_search_latency_seconds_bucket", le="+Inf", **here) == sum(outcomes.values())
        assert value(samples, "eagleray_search_latency_seconds_sum", **here) > 0.0
        for shard, vectors in (("0", None), ("1", 3 * 4 + 5 + 1 + 1)):
            place = here | {"shard": shard}
            if vectors is not None:
                assert value(samples, "eagleray_batch_vectors_sum", **place) == vectors
                assert value(samples, "eagleray_batch_vectors_count", **place) == 6
            assert value(samples, "eagleray_batch_vectors_bucket", le="1.0", **place) <= 2

    run_with_endpoint(scenario, tmp_path)


def test_gauges_tell_points_bytes_and_ready_replicas_of_every_shard(tmp_path: Path) -> None:
    config = CollectionConfig(3, shards=2, replicas=2, index=IndexConfig(kind="flat"))

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, POINTS)
        await endpoint.create("empty", dimension=2)
        samples = await scraped(endpoint)
        points = [value(samples, "eagleray_points", collection="words", shard=shard) for shard in "01"]
        assert sum(points) == 40
        assert min(points) > 0
        for shard, count in zip("01", points, strict=True):
            size = value(samples, "eagleray_index_bytes", collection="words", shard=shard, kind="flat")
            assert count * 12 < size < count * 12 + 1_000
            assert value(samples, "eagleray_replicas_ready", collection="words", shard=shard) == 2
        assert value(samples, "eagleray_points", collection="empty", shard="0") == 0
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        await until(lambda: bool(endpoint.coordinator.table and endpoint.coordinator.table.unready))
        assert value(await scraped(endpoint), "eagleray_replicas_ready", collection="words", shard="1") == 1

    run_with_endpoint(scenario, tmp_path)


def test_gauges_tell_the_observed_recall_of_every_replica_and_generation() -> None:
    def facts(generation: int, recall: float) -> dict[str, Any]:
        interval = {"low": recall - 0.01, "high": recall + 0.01}
        return {"generation": generation, "recall": recall, **interval, "queries": 100 * generation, "k": 10}

    two, one = facts(2, 0.95), facts(1, 0.75)
    statuses = {
        ReplicaKey("words", 0, 0): ReplicaStatus("ready", observed=(one, two)),
        ReplicaKey("words", 0, 1): ReplicaStatus("ready", observed=(two,)),
        ReplicaKey("words", 1, 0): ReplicaStatus("ready"),
        ReplicaKey("words", 1, 1): ReplicaStatus("unreachable"),
    }
    shards = (ShardEntry(0, ()), ShardEntry(1, ()))
    manifest = Manifest("words", 3, CONFIG, Routing(2), 2, shards, created_at="", writer="")
    described = describe_collection(facts_of(manifest, 2, statuses), None)
    assert [shard["observed"] for shard in described["shards"]] == [
        [
            {"replica": 0, "device": "cpu", "num_gpus": 0.0} | one,
            {"replica": 0, "device": "cpu", "num_gpus": 0.0} | two,
            {"replica": 1, "device": "cpu", "num_gpus": 0.0} | two,
        ],
        [],
    ]
    samples = parsed(render({}, [described, describe_unreadable("broken", "why")]).decode())
    for replica, told in (("0", one), ("0", two), ("1", two)):
        place = {"collection": "words", "shard": "0", "replica": replica, "device": "cpu", "num_gpus": "0"}
        place["generation"] = str(told["generation"])
        for name, key in (("recall", "recall"), ("recall_low", "low"), ("recall_high", "high"), ("queries", "queries")):
            assert value(samples, f"eagleray_observed_{name}", **place) == told[key]
    assert sum(name.startswith("eagleray_observed") for name, _ in samples) == 3 * 4


def test_description_tells_what_the_most_advanced_replica_of_the_generation_has() -> None:
    segments = (SegmentRef("s", 50, "xxh3_128:0"),)
    entries = tuple(ShardEntry(shard, segments, 4, 1, (TombstonesRef("s", 4, 3, "xxh3_128:0"),)) for shard in range(3))
    manifest = Manifest("words", 3, replace(CONFIG, shards=3), Routing(3), 2, entries, created_at="", writer="")

    def status(lsn: int, points: int, generation: int = 2, **more: Any) -> ReplicaStatus:
        return ReplicaStatus("ready", (3,), (1, generation), points, lsn=lsn, **more)

    statuses = {
        ReplicaKey("words", 0, 0): status(7, 60, epoch=2, tail_points=10, tombstones=3, upkeep="merging"),
        ReplicaKey("words", 0, 1): status(9, 61, tail_points=11, tombstones=5),
        ReplicaKey("words", 1, 0): status(8, 70, generation=1, epoch=1),  # the new generation is being loaded
        ReplicaKey("words", 2, 0): ReplicaStatus("unreachable", epoch=5),
    }
    described = describe_collection(facts_of(manifest, 1, statuses), None)
    told = ("points", "lsn", "primary", "tail_points", "tombstones", "upkeep")
    assert [tuple(shard[name] for name in told) for shard in described["shards"]] == [
        (61, 9, 0, 11, 5, "merging"),
        (47, 8, 0, 0, 3, ""),
        (47, 4, None, 0, 3, ""),
    ]
    assert described["points"] == 61 + 47 + 47
    assert [(each["lsn"], each["epoch"]) for each in described["shards"][0]["replicas"]] == [(7, 2), (9, 0)]
    samples = parsed(render({}, [described]).decode())
    assert value(samples, "eagleray_tail_points", collection="words", shard="0") == 11
    assert value(samples, "eagleray_tombstones", collection="words", shard="1") == 3
    assert value(samples, "eagleray_lsn", collection="words", shard="0", replica="1", device="cpu", num_gpus="0") == 9


def test_rebuild_that_is_advised_is_told_with_its_reasons_and_as_a_gauge() -> None:
    manifest = Manifest("words", 3, CONFIG, Routing(1), 2, (ShardEntry(0),), created_at="", writer="")
    advice = (Advice("growth", "it has grown"), Advice("recall", "queries find less"))
    bad = describe_collection(facts_of(manifest, 2, {}, advice=advice), None)
    good = describe_collection(facts_of(replace(manifest, collection="birds"), 2, {}), None)
    assert (bad["rebuild_advised"], bad["rebuild_reasons"]) == ("it has grown; queries find less", ["growth", "recall"])
    assert (good["rebuild_advised"], good["rebuild_reasons"]) == (None, [])
    samples = parsed(render({}, [bad, good, describe_unreadable("broken", "why")]).decode())
    for kind in ("growth", "scattered", "recall", "index_kind", "gpu_share"):
        told = [
            value(samples, "eagleray_rebuild_advised", collection=name, reason_kind=kind) for name in ("words", "birds")
        ]
        assert told == [float(kind in ("growth", "recall")), 0.0]
    assert sum(name == "eagleray_rebuild_advised" for name, _ in samples) == 10


def test_shard_tells_what_its_primary_says_of_upkeep_and_else_why_nothing_is_done() -> None:
    manifest = Manifest("words", 3, CONFIG, Routing(2), 2, (ShardEntry(0), ShardEntry(1)), created_at="", writer="")
    statuses = {
        ReplicaKey("words", 0, 0): ReplicaStatus("ready", epoch=1, upkeep="sealing the tail failed: the disk is full"),
        ReplicaKey("words", 1, 0): ReplicaStatus("ready"),
    }
    idle = {0: "not said", 1: "not begun, no replica leads the shard: the tail is long"}
    described = describe_collection(facts_of(manifest, 2, statuses, idle_upkeep=idle), None)
    assert [shard["upkeep"] for shard in described["shards"]] == [statuses[ReplicaKey("words", 0, 0)].upkeep, idle[1]]


def test_either_endpoint_tells_the_counts_of_both(tmp_path: Path) -> None:
    async def scenario(first: Endpoint) -> None:
        await first.publish("words", CONFIG, POINTS)
        async with another_endpoint(first.eagleray, first.data, EndpointOptions(name="endpoint-2")) as second:
            await second.served("words")
            for endpoint, searches in ((first, 2), (second, 3)):
                for _ in range(searches):
                    assert (await endpoint.search("words", vector=[1, 2, 3])).status_code == 200
            # Each tells its own counts at once, and the other's as they were left last.
            await scraped(first)
            told = await scraped(second)
            for samples in (told, await scraped(first)):
                for name, searches in (("endpoint-1", 2), ("endpoint-2", 3)):
                    labels = {"collection": "words", "coordinator": name}
                    assert value(samples, "eagleray_queries_total", outcome="ok", **labels) == searches
                    assert value(samples, "eagleray_query_vectors_total", **labels) == searches
                assert value(samples, "eagleray_replicas_ready", collection="words", shard="0") == 1

    run_with_endpoint(scenario, tmp_path)


def test_counts_are_left_with_the_supervisor_without_a_scrape(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await until(lambda: "endpoint-1" in endpoint.eagleray.directory._metrics)

    run_with_endpoint(scenario, tmp_path)


def test_searches_of_unknown_collections_make_no_series_of_their_own(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("nothing", "nowhere", "NOT-A-NAME", "ä"):
            problem(await endpoint.http.post(f"/v1/collections/{name}/points:search", json={"vector": [1]}), 404)
        samples = await scraped(endpoint)
        assert collections_in(samples) == {""}
        labels = {"collection": "", "outcome": "error", "coordinator": "endpoint-1"}
        assert value(samples, "eagleray_queries_total", **labels) == 4

    run_with_endpoint(scenario, tmp_path)


def test_every_family_is_told_once_with_help_and_type(tmp_path: Path) -> None:
    first, second = EndpointMetrics(), EndpointMetrics()
    for metrics in (first, second):
        metrics.search("words", "ok", 3, 0.01)
        metrics.batch("words", 0, 3)
    text = render({"b": second.snapshot(), "a": first.snapshot()}, []).decode()
    lines = Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(lines.values()) == {1}
    assert {"eagleray_queries_total", "eagleray_query_vectors_total", "eagleray_batch_vectors"} <= set(lines)
    assert len(parsed(text)) > 0


def test_labels_with_quotes_and_line_ends_are_escaped() -> None:
    metrics = EndpointMetrics()
    metrics.search("words", "ok", 1, 0.0)
    coordinator = 'a"b\\c\nd'
    samples = parsed(render({coordinator: metrics.snapshot()}, []).decode())
    assert value(samples, "eagleray_query_vectors_total", collection="words", coordinator=coordinator) == 1


def test_snapshot_does_not_change_afterwards() -> None:
    metrics = EndpointMetrics()
    metrics.search("words", "ok", 1, 0.0)
    before: Any = metrics.snapshot()
    metrics.search("words", "ok", 1, 0.0)
    for _ in range(2):  # rendering does not change it either
        samples = parsed(render({"a": before}, []).decode())
        assert value(samples, "eagleray_query_vectors_total", collection="words", coordinator="a") == 1
