from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from actors import coordinator as coordinator_module
from actors.coordinator import Coordinator, FetchResult
from actors.shard_client import ServingTable
from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.errors import EaglerayError, Exhausted, Invalid, NotFound, Unavailable
from cluster.ids import ID_ARROW_TYPE
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey
from cluster.query import SearchParams
from tests.fakes import LocalDirectory, LocalShardClient, Serving, serving, table_when
from tests.unit.actors.points import (
    Points,
    assert_scores_are_true,
    brute_force,
    commit,
    ids_per_query,
    manifest_log,
    name_of,
    points_of_shard,
    query,
    random_points,
    random_vectors,
)


@dataclass
class Batches:
    """A `CoordinatorObserver` that remembers."""

    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def batch(self, collection: str, shard: int, vectors: int) -> None:
        self.seen.append((collection, shard, vectors))


@dataclass(frozen=True)
class System:
    """A coordinator that serves `points` as the table was when all replicas were ready."""

    coordinator: Coordinator
    eagleray: Serving
    points: Points
    batches: Batches


def config_of(shards: int = 2, kind: str = "flat", **options: object) -> CollectionConfig:
    return CollectionConfig(8, shards=shards, index=IndexConfig(kind=kind), **options)  # type: ignore[arg-type]


def found_in(result: FetchResult) -> tuple[NDArray[np.bool_], Any]:
    return result.found, result.table


def fully_served(collection: str) -> Callable[[ServingTable], bool]:
    return lambda table: collection in table.collections and collection not in table.unready


def with_system(
    scenario: Callable[[System], Awaitable[None]],
    config: CollectionConfig,
    tmp_path: Path,
    *,
    count: int = 200,
    limits: Limits | None = None,
) -> None:
    """Serve a collection `words` of random points in this process and run the scenario on it."""

    async def run() -> None:
        store, points = MemoryStore(), random_points(config, count)
        commit(store, "words", config, points)
        batches = Batches()
        async with asyncio.timeout(60), serving(store, tmp_path) as eagleray:
            coordinator = Coordinator(eagleray.directory, limits or Limits(), batches)
            coordinator.apply(await table_when(eagleray.directory, fully_served("words")))
            await scenario(System(coordinator, eagleray, points, batches))

    asyncio.run(run())


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("shards", [1, 3])
def test_search_over_shards_equals_brute_force_over_all_points(
    shards: int, metric: str, id_type: str, tmp_path: Path
) -> None:
    config = config_of(shards, metric=metric, id_type=id_type)

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 7, seed=5)
        result = await system.coordinator.search("words", query(queries, k=12, with_attributes=("name",)))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 12, config.metric)
        assert_scores_are_true(result.hits, system.points, queries, config.metric, 1e-4)
        assert result.hits.columns["name"].to_pylist() == [name_of(value) for value in result.hits.ids.to_pylist()]
        assert result.coverage.to_dict() == {"shards": 1.0, "points": 1.0, "missing": []}
        assert result.generation == 1
        assert system.batches.seen == [("words", shard, 7) for shard in range(shards)]

    with_system(scenario, config, tmp_path)


def test_search_for_more_than_there_is_returns_every_point_once(tmp_path: Path) -> None:
    config = config_of(3, metric="l2")

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 2, seed=6)
        result = await system.coordinator.search("words", query(queries, k=2_048, with_vectors=True))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 200, "l2")
        stored = dict(zip(system.points.ids.to_pylist(), system.points.vectors.tolist(), strict=True))
        assert result.hits.columns["vector"].to_pylist() == [stored[i] for i in result.hits.ids.to_pylist()]

    with_system(scenario, config, tmp_path)


def test_search_of_fewer_points_than_shards_covers_the_empty_ones(tmp_path: Path) -> None:
    config = config_of(4, metric="l2")

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 3, seed=7)
        result = await system.coordinator.search("words", query(queries, with_attributes=("name",)))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 10, "l2")
        assert result.coverage.shards == 1.0

    with_system(scenario, config, tmp_path, count=2)


def test_search_of_an_empty_collection_has_no_hits(tmp_path: Path) -> None:
    async def run() -> None:
        store, config = MemoryStore(), config_of(2)
        manifest_log(store, "words").create(config)
        async with asyncio.timeout(60), serving(store, tmp_path) as eagleray:
            coordinator = Coordinator(eagleray.directory, Limits(), Batches())
            coordinator.apply(await table_when(eagleray.directory, fully_served("words")))
            result = await coordinator.search("words", query(random_vectors(config, 2, seed=1)))
            assert result.hits.counts.tolist() == [0, 0]
            assert result.coverage.to_dict() == {"shards": 1.0, "points": 1.0, "missing": []}

    asyncio.run(run())


def test_large_request_cut_into_batches_gives_the_same_answer(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 50, seed=8)
        options = {"k": 5, "with_attributes": ("name",)}
        result = await system.coordinator.search("words", query(queries, **options))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 5, "l2")
        assert result.hits.columns["name"].to_pylist() == [name_of(i) for i in result.hits.ids.to_pylist()]
        sizes = [vectors for _, shard, vectors in system.batches.seen if shard == 0]
        assert sizes == [8, 8, 8, 8, 8, 8, 2]

    with_system(scenario, config, tmp_path, limits=Limits(batch_vectors=8))


def test_concurrent_searches_each_get_their_own_answer(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        queries = [random_vectors(config, 1 + number % 3, seed=number) for number in range(60)]
        ks = [1 + number % 7 for number in range(60)]
        asked = [system.coordinator.search("words", query(q, k=k)) for q, k in zip(queries, ks, strict=True)]
        for q, k, result in zip(queries, ks, await asyncio.gather(*asked), strict=True):
            assert ids_per_query(result.hits) == brute_force(system.points, q, k, "l2")
        assert len(system.batches.seen) < 120, "nothing was batched"

    with_system(scenario, config, tmp_path)


def test_dead_shard_is_left_out_where_partial_coverage_was_asked_for(tmp_path: Path) -> None:
    config = config_of(3, metric="l2")

    async def scenario(system: System) -> None:
        system.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        queries = random_vectors(config, 4, seed=9)
        result = await system.coordinator.search("words", query(queries, min_coverage=0.6))
        parts = [points_of_shard(system.points, 3, shard) for shard in range(3)]
        left = system.points.take(
            np.flatnonzero(~np.isin(system.points.ids.to_numpy(), parts[1].ids.to_numpy())).astype(np.int64)
        )
        assert ids_per_query(result.hits) == brute_force(left, queries, 10, "l2")
        assert result.coverage.missing == (1,)
        assert result.coverage.shards == pytest.approx(2 / 3)
        assert result.coverage.points == pytest.approx(1 - len(parts[1]) / 200)

    with_system(scenario, config, tmp_path)


def test_coverage_under_the_minimum_is_unavailable_and_says_which_shards_and_why(tmp_path: Path) -> None:
    config = config_of(3, metric="l2")

    async def scenario(system: System) -> None:
        system.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        reason = r"^coverage 0\.667: shard 1: replica words/1/0 is dead$"
        with pytest.raises(Unavailable, match=reason) as caught:
            await system.coordinator.search("words", query(random_vectors(config, 1, seed=1), min_coverage=0.7))
        assert isinstance(caught.value.coverage, dict)
        assert caught.value.coverage["missing"] == [1]

    with_system(scenario, config, tmp_path)


def test_search_without_any_answer_is_unavailable_even_where_none_is_needed(tmp_path: Path) -> None:
    config = config_of(2)

    async def scenario(system: System) -> None:
        for shard in range(2):
            system.eagleray.runtime.kill(ReplicaKey("words", shard, 0))
        with pytest.raises(Unavailable, match=r"^coverage 0\.000: shard 0: .* is dead; shard 1: .* is dead$"):
            await system.coordinator.search("words", query(random_vectors(config, 1, seed=1), min_coverage=0.0))

    with_system(scenario, config, tmp_path)


def test_hanging_shard_is_left_out_at_the_deadline(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        system.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        queries = random_vectors(config, 2, seed=10)
        result = await system.coordinator.search("words", query(queries, min_coverage=0.5, timeout_ms=100.0))
        assert ids_per_query(result.hits) == brute_force(points_of_shard(system.points, 2, 1), queries, 10, "l2")
        assert result.coverage.missing == (0,)
        with pytest.raises(Unavailable, match=r"^coverage 0\.500: shard 0: no answer within 50 ms$"):
            await system.coordinator.search("words", query(queries, timeout_ms=50.0))
        system.eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        result = await system.coordinator.search("words", query(queries))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 10, "l2")

    with_system(scenario, config, tmp_path)


def test_search_fails_over_to_the_second_replica(tmp_path: Path) -> None:
    config = config_of(2, metric="l2", replicas=2)

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 3, seed=11)
        truth = brute_force(system.points, queries, 10, "l2")
        for dead in (0, 1):
            system.eagleray.runtime.kill(ReplicaKey("words", 0, dead))
            system.eagleray.runtime.kill(ReplicaKey("words", 1, dead))
            result = await system.coordinator.search("words", query(queries))
            assert ids_per_query(result.hits) == truth
            assert result.coverage.shards == 1.0
            system.eagleray.runtime.revive(ReplicaKey("words", 0, dead))
            system.eagleray.runtime.revive(ReplicaKey("words", 1, dead))

    with_system(scenario, config, tmp_path)


def test_error_of_the_request_is_raised_even_where_another_shard_is_dead(tmp_path: Path) -> None:
    config = config_of(2, kind="ivf_flat")

    async def scenario(system: System) -> None:
        system.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        vectors = random_vectors(config, 1, seed=1)
        with pytest.raises(Invalid, match=r"params\.ef_search"):
            await system.coordinator.search("words", query(vectors, params=SearchParams(ef_search=9), min_coverage=0.5))

    with_system(scenario, config, tmp_path)


def test_error_inside_a_cut_request_is_raised_as_itself(tmp_path: Path) -> None:
    config = config_of(1, kind="ivf_flat")

    async def scenario(system: System) -> None:
        vectors = random_vectors(config, 9, seed=1)
        with pytest.raises(Invalid, match=r"params\.ef_search"):
            await system.coordinator.search("words", query(vectors, params=SearchParams(ef_search=9)))

    with_system(scenario, config, tmp_path, limits=Limits(batch_vectors=2))


def test_attribute_that_no_replica_knows_yet_is_null_and_of_its_declared_type(tmp_path: Path) -> None:
    config = config_of(2)

    async def scenario(system: System) -> None:
        table = system.coordinator.table
        assert table is not None
        declared = replace(table.collections["words"], attributes={"name": "large_string", "gloss": "int64"})
        system.coordinator.apply(replace(table, collections={"words": declared}))
        queries = random_vectors(config, 3, seed=1)
        for vectors in (queries[:1], queries):  # one answer, and one that was cut
            hits = (await system.coordinator.search("words", query(vectors, with_attributes=("gloss", "name")))).hits
            assert hits.columns.column_names == ["gloss", "name"]
            assert hits.columns["gloss"].type == pa.int64()
            assert hits.columns["gloss"].null_count == len(hits.ids)
            assert hits.columns["name"].null_count == 0
        fetched = await system.coordinator.fetch("words", system.points.ids[:3], ("id", "gloss", "other"), 20.0)
        assert fetched.table["gloss"].type == pa.int64()
        assert fetched.table["gloss"].null_count == fetched.table["other"].null_count == 3
        assert fetched.table["id"].to_pylist() == system.points.ids[:3].to_pylist()

    with_system(scenario, config, tmp_path, limits=Limits(batch_vectors=2))


def test_request_over_the_queue_bound_is_exhausted(tmp_path: Path) -> None:
    config = config_of(1)

    async def scenario(system: System) -> None:
        with pytest.raises(Exhausted, match="queued_vectors_per_shard"):
            await system.coordinator.search("words", query(random_vectors(config, 30, seed=1)))

    with_system(scenario, config, tmp_path, limits=Limits(batch_vectors=2, queued_vectors_per_shard=8))


def test_answered_queries_are_kept_as_they_were_searched(tmp_path: Path) -> None:
    config = config_of(2, metric="cosine")

    async def scenario(system: System) -> None:
        queries = random_vectors(config, 20, seed=12)
        await asyncio.gather(*(system.coordinator.search("words", query(queries[at : at + 4])) for at in (0, 4, 8)))
        await system.coordinator.search("words", query(queries[12:], params=SearchParams(exact=True)))
        sample = system.coordinator.recent.sample("words")
        assert sample is not None
        assert sample.metric == "cosine"
        assert sorted(sample.vectors.tolist()) == sorted(queries[:12].tolist())

    with_system(scenario, config, tmp_path)


def test_no_more_queries_are_kept_than_the_limit(tmp_path: Path) -> None:
    config = config_of(1, metric="l2")

    async def scenario(system: System) -> None:
        for seed in range(4):
            await system.coordinator.search("words", query(random_vectors(config, 9, seed)))
        sample = system.coordinator.recent.sample("words")
        assert sample is not None
        assert len(sample.vectors) == 10

    async def nothing_kept(system: System) -> None:
        await system.coordinator.search("words", query(random_vectors(config, 9, seed=1)))
        assert system.coordinator.recent.changed() == []

    with_system(scenario, config, tmp_path, limits=Limits(recent_queries=10))
    with_system(nothing_kept, config, tmp_path, limits=Limits(recent_queries=0))


def test_queries_without_an_answer_are_not_kept(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        system.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        with pytest.raises(Unavailable):
            await system.coordinator.search("words", query(random_vectors(config, 3, seed=1)))
        assert system.coordinator.recent.changed() == []

    with_system(scenario, config, tmp_path)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_queries_of_a_collection_that_is_gone_are_forgotten(change: str, tmp_path: Path) -> None:
    config = config_of(1, metric="l2")

    async def scenario(system: System) -> None:
        coordinator, queries = system.coordinator, random_vectors(config, 3, seed=1)
        table = coordinator.table
        assert table is not None
        served = table.collections["words"]
        other = {"words": replace(served, config=replace(config, metric="ip"))} if change == "replaced" else {}
        await coordinator.search("words", query(queries))
        coordinator.apply(replace(table, stamp="next"))
        assert coordinator.recent.changed() == ["words"]
        system.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        late = asyncio.ensure_future(coordinator.search("words", query(queries)))
        while len(system.batches.seen) < 2:  # asked before, answered after the change
            await asyncio.sleep(0.001)
        coordinator.apply(ServingTable("last", other, {}))
        system.eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        await late
        assert coordinator.recent.changed() == []

    with_system(scenario, config, tmp_path)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_fetch_over_shards_keeps_the_order_asked(id_type: str, tmp_path: Path) -> None:
    config = config_of(3, id_type=id_type)

    async def scenario(system: System) -> None:
        missing = -1_000 if id_type == "int64" else "nobody"
        known = system.points.take(np.random.default_rng(2).permutation(200)[:40])
        ids = pa.array([missing, *known.ids.to_pylist(), missing], ID_ARROW_TYPE[id_type])
        found, table = found_in(await system.coordinator.fetch("words", ids, ("id", "name", "vector"), 20.0))
        assert found.tolist() == [False, *[True] * 40, False]
        assert table["id"].to_pylist() == known.ids.to_pylist()
        assert table["name"].to_pylist() == known.names
        assert table["vector"].to_pylist() == known.vectors.tolist()
        found, table = found_in(await system.coordinator.fetch("words", ids[:1], ("id",), 20.0))
        assert (found.tolist(), table) == ([False], None)
        found, table = found_in(await system.coordinator.fetch("words", ids[:0], ("id",), 20.0))
        assert (found.tolist(), table) == ([], None)

    with_system(scenario, config, tmp_path)


def test_fetch_needs_only_the_shards_that_may_hold_the_ids(tmp_path: Path) -> None:
    config = config_of(2)

    async def scenario(system: System) -> None:
        here, there = (points_of_shard(system.points, 2, shard) for shard in range(2))
        system.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        found, table = found_in(await system.coordinator.fetch("words", here.ids, ("id",), 20.0))
        assert found.all()
        assert table["id"].to_pylist() == here.ids.to_pylist()
        with pytest.raises(Unavailable, match=r"shards \[1\] did not answer"):
            await system.coordinator.fetch("words", there.ids, ("id",), 20.0)

    with_system(scenario, config, tmp_path)


def test_fetch_from_a_hanging_shard_ends_at_its_timeout(tmp_path: Path) -> None:
    config = config_of(1)

    async def scenario(system: System) -> None:
        system.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        with pytest.raises(Unavailable, match=r"shards \[0\] did not answer"):
            await system.coordinator.fetch("words", system.points.ids, ("id",), 0.05)

    with_system(scenario, config, tmp_path)


def test_unknown_collection_is_not_found_and_one_not_ready_says_why(tmp_path: Path) -> None:
    config = config_of(1)
    vectors = random_vectors(config, 1, seed=1)

    async def scenario(system: System) -> None:
        with pytest.raises(NotFound, match="no collection 'birds'"):
            await system.coordinator.search("birds", query(vectors))
        table = system.coordinator.table
        assert table is not None
        system.coordinator.apply(replace(table, unready={"birds": "its replicas are loading"}))
        with pytest.raises(Unavailable, match="collection 'birds' is not ready: its replicas are loading"):
            await system.coordinator.search("birds", query(vectors))
        with pytest.raises(Unavailable, match="collection 'birds' is not ready"):
            await system.coordinator.fetch("birds", system.points.ids, ("id",), 1.0)

    with_system(scenario, config, tmp_path)


def test_coordinator_without_a_table_is_unavailable(tmp_path: Path) -> None:
    config = config_of(1)

    async def scenario(system: System) -> None:
        fresh = Coordinator(system.eagleray.directory, Limits(), Batches())
        with pytest.raises(Unavailable, match="has not reached the supervisor yet"):
            await fresh.search("words", query(random_vectors(config, 1, seed=1)))

    with_system(scenario, config, tmp_path)


def test_shard_without_ready_replicas_is_missing_at_once(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        table = system.coordinator.table
        assert table is not None
        served = table.collections["words"]
        without = replace(served, replicas={**served.replicas, 0: ()})
        system.coordinator.apply(replace(table, collections={"words": without}))
        result = await system.coordinator.search("words", query(random_vectors(config, 1, seed=1), min_coverage=0.5))
        assert result.coverage.missing == (0,)
        with pytest.raises(Unavailable, match="shard 0: no replica is ready"):
            await system.coordinator.search("words", query(random_vectors(config, 1, seed=1)))

    with_system(scenario, config, tmp_path)


class PatchyDirectory(LocalDirectory):
    """A directory whose supervisor is away the first times it is asked."""

    away = 2

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        if self.away:
            self.away -= 1
            raise Unavailable("the supervisor is away")
        return await super().next_table(known_stamp)


def test_follow_survives_an_absent_supervisor_and_switches_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coordinator_module, "FOLLOW_RETRY_S", 0.0)
    config = config_of(2, metric="l2")

    async def run() -> None:
        store = MemoryStore()
        commit(store, "words", config, random_points(config, 50, seed=1))
        async with asyncio.timeout(60), serving(store, tmp_path) as eagleray:
            directory = PatchyDirectory(eagleray.supervisor, eagleray.runtime)
            coordinator = Coordinator(directory, Limits(), Batches())
            following = asyncio.ensure_future(coordinator.follow())
            second = random_points(config, 60, seed=2)
            commit(store, "words", config, second)
            await directory.refresh("words")
            table = await table_when(eagleray.directory, lambda t: _generation(t) == 2)
            while coordinator.table is None or coordinator.table.stamp != table.stamp:
                await asyncio.sleep(0)
            queries = random_vectors(config, 2, seed=3)
            result = await coordinator.search("words", query(queries))
            assert result.generation == 2
            assert ids_per_query(result.hits) == brute_force(second, queries, 10, "l2")
            following.cancel()
            await asyncio.wait({following})

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [r.getMessage() for r in caplog.records if r.name == "actors.coordinator"] == [
        "the supervisor does not answer: the supervisor is away"
    ] * 2


class OddDirectory(LocalDirectory):
    """A directory that raises `errors` first, and that knows no client of `unknown` replicas."""

    errors: list[Exception]
    unknown: frozenset[ReplicaKey] = frozenset()

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        if self.errors:
            raise self.errors.pop(0)
        return await super().next_table(known_stamp)

    def client(self, key: ReplicaKey) -> LocalShardClient:
        if key in self.unknown:
            raise Unavailable(f"replica {key} is not known yet")
        return super().client(key)


def test_follow_survives_any_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "FOLLOW_RETRY_S", 0.0)
    config = config_of(1)

    async def scenario(system: System) -> None:
        directory = OddDirectory(system.eagleray.supervisor, system.eagleray.runtime)
        directory.errors = [EaglerayError("a bug there"), NotFound("no supervisor"), RuntimeError("a bug here")]
        coordinator = Coordinator(directory, Limits(), Batches())
        following = asyncio.ensure_future(coordinator.follow())
        async with asyncio.timeout(20):
            while coordinator.table is None:
                assert not following.done(), following
                await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following})

    with_system(scenario, config, tmp_path)


def test_replica_without_a_client_does_not_keep_the_others_from_being_served(tmp_path: Path) -> None:
    config = config_of(2, metric="l2", replicas=2)

    async def scenario(system: System) -> None:
        directory = OddDirectory(system.eagleray.supervisor, system.eagleray.runtime)
        directory.errors = []
        directory.unknown = frozenset({ReplicaKey("words", 0, 0), ReplicaKey("words", 1, 1)})
        coordinator = Coordinator(directory, Limits(), Batches())
        assert system.coordinator.table is not None
        coordinator.apply(system.coordinator.table)
        queries = random_vectors(config, 3, seed=12)
        result = await coordinator.search("words", query(queries))
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 10, "l2")

    with_system(scenario, config, tmp_path)


def test_searches_in_flight_to_a_hanging_replica_fail_over_when_it_leaves_the_table(tmp_path: Path) -> None:
    config = config_of(1, metric="l2", replicas=2)

    async def scenario(system: System) -> None:
        following = asyncio.ensure_future(system.coordinator.follow())
        system.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        queries = random_vectors(config, 3, seed=13)
        patient = query(queries, timeout_ms=1_000_000.0)
        async with asyncio.timeout(10):  # its slice of the deadline is far longer
            result = await system.coordinator.search("words", patient)
        assert ids_per_query(result.hits) == brute_force(system.points, queries, 10, "l2")
        following.cancel()
        await asyncio.wait({following})

    with_system(scenario, config, tmp_path)


def test_hung_calls_give_their_slots_back_when_the_replica_leaves_the_table(tmp_path: Path) -> None:
    config = config_of(1, metric="l2")

    async def scenario(system: System) -> None:
        key, vectors = ReplicaKey("words", 0, 0), random_vectors(config, 1, seed=14)
        table = system.coordinator.table
        assert table is not None
        system.eagleray.runtime.hang(key)
        patient = query(vectors, timeout_ms=1_000_000.0)
        hung = []
        for _ in range(Limits().calls_in_flight_per_replica):
            hung.append(asyncio.ensure_future(system.coordinator.search("words", patient)))
            while len(system.batches.seen) < len(hung):  # or both would go in one call
                await asyncio.sleep(0)
        without = replace(table.collections["words"], replicas={0: ()})
        system.coordinator.apply(replace(table, collections={"words": without}))
        async with asyncio.timeout(10):
            for call in hung:
                with pytest.raises(Unavailable, match="shard 0: replica words/0/0 is not ready any more"):
                    await call
        system.eagleray.runtime.revive(key)
        system.coordinator.apply(table)
        result = await system.coordinator.search("words", query(vectors))
        assert ids_per_query(result.hits) == brute_force(system.points, vectors, 10, "l2")

    with_system(scenario, config, tmp_path)


def _generation(table: ServingTable) -> int:
    served = table.collections.get("words")
    return served.generation if served else 0


def test_searches_that_differ_in_k_share_a_call_and_are_answered_exactly(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")
    ks = [1, 3, 4, 9, 10, 11, 16, 9, 10, 2]

    async def scenario(system: System) -> None:
        queries = random_vectors(config, len(ks), seed=15)
        options = {"with_attributes": ("name",), "params": SearchParams(exact=True)}
        asked = [query(queries[i : i + 1], k=k, **options) for i, k in enumerate(ks)]
        results = await asyncio.gather(*(system.coordinator.search("words", each) for each in asked))
        for i, (k, result) in enumerate(zip(ks, results, strict=True)):
            assert ids_per_query(result.hits) == brute_force(system.points, queries[i : i + 1], k, "l2")
            assert result.hits.columns["name"].to_pylist() == [name_of(n) for n in result.hits.ids.to_pylist()]
        assert system.batches.seen == [("words", shard, len(ks)) for shard in range(2)]

    with_system(scenario, config, tmp_path)


def test_large_and_small_searches_together_each_get_their_own_answer(tmp_path: Path) -> None:
    config = config_of(2, metric="l2")

    async def scenario(system: System) -> None:
        queries = [random_vectors(config, size, seed=size) for size in (90, 1, 3, 200, 2, 17)]
        asked = [system.coordinator.search("words", query(each, k=5)) for each in queries]
        for each, result in zip(queries, await asyncio.gather(*asked), strict=True):
            assert ids_per_query(result.hits) == brute_force(system.points, each, 5, "l2")

    with_system(scenario, config, tmp_path, limits=Limits(batch_vectors=32))


def test_search_is_admitted_until_it_is_released_and_only_of_what_is_served(tmp_path: Path) -> None:
    config = config_of(1)

    async def scenario(system: System) -> None:
        with system.coordinator.admit("words"), pytest.raises(Exhausted, match="requests_in_flight"):
            system.coordinator.admit("words")
        system.coordinator.admit("words").release()
        with pytest.raises(NotFound, match="no collection 'birds'"):
            system.coordinator.admit("birds")

    with_system(scenario, config, tmp_path, limits=Limits(requests_in_flight=1))


def test_search_is_not_admitted_while_a_shard_of_its_collection_is_predicted_to_be_late(tmp_path: Path) -> None:
    config = config_of(2)

    async def scenario(system: System) -> None:
        vectors = random_vectors(config, 1, seed=1)
        for _ in range(5):
            await system.coordinator.search("words", query(vectors))  # some milliseconds each, once they are measured
        system.eagleray.runtime.hang(ReplicaKey("words", 1, 0))
        waiting = []
        for _ in range(3):
            waiting += [asyncio.ensure_future(system.coordinator.search("words", query(vectors))) for _ in range(100)]
            await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="queue_ms: searches of 'words' wait about"):
            system.coordinator.admit("words")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        system.coordinator.admit("words").release()  # what was given up holds up nobody

    with_system(scenario, config, tmp_path, limits=Limits(queue_ms=1, batch_vectors=64))
