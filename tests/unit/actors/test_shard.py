from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.segment_loader import cached_path
from actors.shard import Shard
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Corrupt, Invalid, NotFound, Unavailable
from cluster.file_store import FileStore
from cluster.ids import ID_ARROW_TYPE
from cluster.manifest import Manifest, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.paths import segment_file
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.segment import SegmentDescription
from tests.fakes import FaultyStore
from tests.unit.actors.points import (
    Points,
    Vectors,
    assert_scores_are_true,
    brute_force,
    commit,
    flatten,
    flipped,
    ids_per_query,
    manifest_log,
    name_of,
    points_of_shard,
    publish,
    random_points,
    random_vectors,
)

TOLERANCE = {"float32": 1e-4, "float16": 5e-3}


def config_of(kind: str = "flat", **options: object) -> CollectionConfig:
    return CollectionConfig(8, index=IndexConfig(kind=kind), **options)  # type: ignore[arg-type]


def loaded(store: ObjectStore, cache_dir: Path, shard: int = 0) -> Shard:
    replica = Shard(store, "words", shard, cache_dir)
    replica.load()
    return replica


def search_all(shard: Shard, queries: Vectors, k: int = 10, columns: tuple[str, ...] = (), generation: int = 1) -> Hits:
    group = SearchGroup(0, len(queries), k, SearchParams(), columns)
    (outcome,) = shard.search(ShardSearch(generation, queries, (group,)))
    assert isinstance(outcome, Hits), outcome
    return outcome


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_search_over_several_segments_equals_brute_force(metric: str, id_type: str, dtype: str, tmp_path: Path) -> None:
    config = config_of(metric=metric, id_type=id_type, vector_dtype=dtype)
    store, points, queries = MemoryStore(), random_points(config, 300), random_vectors(config, 8, seed=5)
    commit(store, "words", config, points, segments=3)
    hits = search_all(loaded(store, tmp_path), queries)
    assert hits.counts.tolist() == [10] * 8
    assert hits.ids.type == ID_ARROW_TYPE[id_type]
    assert ids_per_query(hits) == brute_force(points, queries, 10, config.metric)
    assert_scores_are_true(hits, points, queries, config.metric, TOLERANCE[dtype])


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_search_finds_only_points_of_its_own_shard(shard: int, tmp_path: Path) -> None:
    config = config_of(metric="l2", shards=3)
    store, points, queries = MemoryStore(), random_points(config, 200), random_vectors(config, 4, seed=6)
    commit(store, "words", config, points)
    mine = points_of_shard(points, 3, shard)
    hits = search_all(loaded(store, tmp_path, shard), queries, k=500)
    assert hits.counts.tolist() == [len(mine)] * 4
    assert ids_per_query(hits) == brute_force(mine, queries, 500, "l2")


def test_search_returns_equal_points_by_id_within_and_across_segments(tmp_path: Path) -> None:
    config = config_of(metric="l2")
    points = Points(random_points(config, 60).ids, np.ones((60, 8), np.float32))
    store = MemoryStore()
    commit(store, "words", config, points, segments=4)
    hits = search_all(loaded(store, tmp_path), np.zeros((2, 8), np.float32), k=100)
    assert ids_per_query(hits) == [sorted(points.ids.to_pylist())] * 2


def test_search_returns_the_columns_of_its_hits(tmp_path: Path) -> None:
    config = config_of(id_type="string", metric="cosine")
    store, points, queries = MemoryStore(), random_points(config, 120), random_vectors(config, 3, seed=7)
    commit(store, "words", config, points, segments=2)
    hits = search_all(loaded(store, tmp_path), queries, 5, ("name", "vector"))
    assert hits.columns.column_names == ["name", "vector"]
    ids = hits.ids.to_pylist()
    assert hits.columns["name"].to_pylist() == [name_of(value) for value in ids]
    stored = dict(zip(points.ids.to_pylist(), points.vectors.tolist(), strict=True))
    assert hits.columns["vector"].to_pylist() == [stored[value] for value in ids]


def test_search_of_starved_lists_returns_what_was_found_without_padding(tmp_path: Path) -> None:
    config = config_of("ivf_flat", metric="l2")
    store, points, queries = MemoryStore(), random_points(config, 400), random_vectors(config, 6, seed=8)
    commit(store, "words", config, points, segments=2)
    group = SearchGroup(0, 6, 400, SearchParams(nprobe=1), ("name",))
    (hits,) = loaded(store, tmp_path).search(ShardSearch(1, queries, (group,)))
    assert isinstance(hits, Hits)
    assert len(hits.ids) == len(hits.scores) == hits.columns.num_rows == hits.counts.sum()
    for found in ids_per_query(hits):
        assert 0 < len(found) < 400
        assert len(set(found)) == len(found)
    assert hits.columns["name"].to_pylist() == [name_of(value) for value in hits.ids.to_pylist()]
    assert_scores_are_true(hits, points, queries, "l2", 1e-4)


def test_groups_of_one_call_are_answered_each_by_its_own_options(tmp_path: Path) -> None:
    config = config_of(metric="l2")
    store, points, queries = MemoryStore(), random_points(config, 100), random_vectors(config, 6, seed=9)
    commit(store, "words", config, points, segments=2)
    groups = (
        SearchGroup(0, 3, 2, SearchParams()),
        SearchGroup(3, 5, 7, SearchParams(), ("name",)),
        SearchGroup(5, 6, 1, SearchParams()),
    )
    first, second, third = loaded(store, tmp_path).search(ShardSearch(1, queries, groups))
    assert isinstance(first, Hits)
    assert isinstance(second, Hits)
    assert isinstance(third, Hits)
    assert ids_per_query(first) == brute_force(points, queries[:3], 2, "l2")
    assert ids_per_query(second) == brute_force(points, queries[3:5], 7, "l2")
    assert ids_per_query(third) == brute_force(points, queries[5:], 1, "l2")
    assert first.columns is None
    assert second.columns.num_rows == 14


def test_error_of_one_group_does_not_fail_the_others(tmp_path: Path) -> None:
    config = config_of("ivf_flat", metric="l2")
    store, points, queries = MemoryStore(), random_points(config, 200), random_vectors(config, 3, seed=10)
    commit(store, "words", config, points)
    groups = (
        SearchGroup(0, 1, 5, SearchParams(), ("nome",)),
        SearchGroup(1, 2, 5, SearchParams(nprobe=1_000)),
        SearchGroup(2, 3, 5, SearchParams(ef_search=9)),
    )
    unknown, good, foreign = loaded(store, tmp_path).search(ShardSearch(1, queries, groups))
    assert isinstance(unknown, Hits)  # it may have been declared a moment ago
    assert unknown.columns["nome"].to_pylist() == [None] * 5
    assert isinstance(good, Hits)
    assert ids_per_query(good) == brute_force(points, queries[1:2], 5, "l2")
    assert isinstance(foreign, Invalid)
    assert [error.field for error in foreign.errors] == ["params.ef_search"]


def test_groups_ask_exactly_or_for_a_target_beside_those_as_tuned(tmp_path: Path) -> None:
    config = config_of("hnsw", metric="l2")
    store, points, queries = MemoryStore(), random_points(config, 400), random_vectors(config, 5, seed=13)
    commit(store, "words", config, points, segments=2)
    shard = loaded(store, tmp_path)
    target = shard.load().segments[0].description.operating_points[0].target_recall
    groups = (
        SearchGroup(0, 2, 7, SearchParams(exact=True), ("name",)),
        SearchGroup(2, 3, 7, SearchParams(target_recall=target)),
        SearchGroup(3, 4, 7, SearchParams(target_recall=1.0)),
        SearchGroup(4, 5, 7, SearchParams()),
    )
    exact, at_target, too_high, tuned = shard.search(ShardSearch(1, queries, groups))
    assert isinstance(exact, Hits)
    assert ids_per_query(exact) == brute_force(points, queries[:2], 7, "l2")
    assert exact.columns["name"].to_pylist() == [name_of(value) for value in exact.ids.to_pylist()]
    assert isinstance(too_high, Invalid)
    assert [error.field for error in too_high.errors] == ["params.target_recall"]
    for answered, query in ((at_target, queries[2:3]), (tuned, queries[4:5])):
        assert isinstance(answered, Hits)
        alone = shard.search(ShardSearch(1, query, (SearchGroup(0, 1, 7, SearchParams()),)))[0]
        assert isinstance(alone, Hits)
        assert ids_per_query(answered) == ids_per_query(alone)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_exact_search_orders_equal_points_by_id_across_segments(id_type: str, tmp_path: Path) -> None:
    config = config_of("hnsw", metric="l2", id_type=id_type)
    points = Points(random_points(config, 60).ids, np.ones((60, 8), np.float32))
    store = MemoryStore()
    commit(store, "words", config, points, segments=3)
    group = SearchGroup(0, 1, 10, SearchParams(exact=True))
    (hits,) = loaded(store, tmp_path).search(ShardSearch(1, np.zeros((1, 8), np.float32), (group,)))
    assert isinstance(hits, Hits)
    assert ids_per_query(hits) == [sorted(points.ids.to_pylist())[:10]]


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_empty_shard_answers_without_hits(id_type: str, tmp_path: Path) -> None:
    config, store = config_of(id_type=id_type), MemoryStore()
    manifest_log(store, "words").create(config)
    shard = loaded(store, tmp_path)
    hits = search_all(shard, random_vectors(config, 3, seed=11))
    assert hits.counts.tolist() == [0, 0, 0]
    assert (hits.ids.type, len(hits.ids), hits.scores.dtype) == (ID_ARROW_TYPE[id_type], 0, np.float32)
    ids = pa.array([1] if id_type == "int64" else ["1"], ID_ARROW_TYPE[id_type])
    found, table = shard.fetch(1, ids, ["id"])
    assert (found.tolist(), table) == ([False], None)
    assert (shard.status().state, shard.status().points) == ("ready", 0)


@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_fetch_returns_found_points_in_the_order_asked(id_type: str, tmp_path: Path) -> None:
    config, store = config_of(id_type=id_type), MemoryStore()
    points = random_points(config, 150)
    commit(store, "words", config, points, segments=3)
    missing = -1_000 if id_type == "int64" else "nobody"
    known = points.take(np.random.default_rng(1).permutation(150)[:20])
    asked = [missing, *known.ids.to_pylist(), missing, known.ids[3].as_py()]
    found, table = loaded(store, tmp_path).fetch(1, pa.array(asked, ID_ARROW_TYPE[id_type]), ["id", "name", "vector"])
    assert found.tolist() == [False, *[True] * 20, False, True]
    expected = [*known.ids.to_pylist(), known.ids[3].as_py()]
    assert table["id"].to_pylist() == expected
    assert table["name"].to_pylist() == [name_of(value) for value in expected]
    vectors = [*known.vectors.tolist(), known.vectors[3].tolist()]
    assert table["vector"].to_pylist() == vectors


def test_fetch_of_an_attribute_that_is_not_known_here_yet_is_null(tmp_path: Path) -> None:
    config, store = config_of(), MemoryStore()
    points = random_points(config, 10)
    commit(store, "words", config, points)
    found, table = loaded(store, tmp_path).fetch(1, points.ids, ["id", "gloss"])
    assert found.all()
    assert table["id"].to_pylist() == points.ids.to_pylist()
    assert table["gloss"].to_pylist() == [None] * 10


def test_unknown_generation_is_unavailable(tmp_path: Path) -> None:
    config, store = config_of(), MemoryStore()
    points = random_points(config, 10)
    commit(store, "words", config, points)
    shard = loaded(store, tmp_path)
    with pytest.raises(Unavailable, match="generation 2 of 'words' is not loaded here"):
        search_all(shard, random_vectors(config, 1, seed=0), generation=2)
    with pytest.raises(Unavailable, match="generation 0 of 'words' is not loaded here"):
        shard.fetch(0, points.ids, ["id"])


def test_shard_before_its_first_load_has_failed_and_says_so(tmp_path: Path) -> None:
    shard = Shard(MemoryStore(), "words", 0, tmp_path)
    status = shard.status()
    assert (status.state, status.versions, status.error) == ("failed", (), "nothing is loaded")


def test_load_of_a_missing_or_deleted_collection_is_not_found(tmp_path: Path) -> None:
    config, store = config_of(), MemoryStore()
    shard = Shard(store, "words", 0, tmp_path)
    with pytest.raises(NotFound, match="no collection 'words'"):
        shard.load()
    manifest_log(store, "words").create(config)
    manifest_log(store, "words").delete()
    with pytest.raises(NotFound, match="no collection 'words'"):
        shard.load()


def test_second_generation_is_loaded_beside_the_first_until_that_is_retired(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), MemoryStore()
    first, second = random_points(config, 100, seed=1), random_points(config, 120, seed=2)
    queries = random_vectors(config, 3, seed=12)
    commit(store, "words", config, first)
    shard = loaded(store, tmp_path)
    commit(store, "words", config, second)
    shard.load(2)
    status = shard.status()
    assert (status.versions, status.generations, status.points) == ((1, 2), (1, 2), 120)
    assert status.attributes == {1: {"name": "large_string"}, 2: {"name": "large_string"}}
    for generation, points in ((1, first), (2, second)):
        hits = search_all(shard, queries, generation=generation)
        assert ids_per_query(hits) == brute_force(points, queries, 10, "l2")
    shard.retire(2)
    assert shard.status().generations == (2,)
    with pytest.raises(Unavailable, match="generation 1"):
        search_all(shard, queries, generation=1)
    assert ids_per_query(search_all(shard, queries, generation=2)) == brute_force(second, queries, 10, "l2")


def cached_files(cache_dir: Path, store: ObjectStore, manifest: Manifest) -> set[Path]:
    names = (segment_file("words", segment_id, "segment.json") for segment_id in manifest.segments)
    descriptions = (SegmentDescription.decode(store.get(name), name) for name in names)
    return {cached_path(cache_dir, entry) for d in descriptions for entry in d.files.values()}


def test_retire_removes_the_cached_files_of_the_old_generation_only(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), MemoryStore()
    old = commit(store, "words", config, random_points(config, 100, seed=1), segments=2)
    shard = loaded(store, tmp_path)
    new = commit(store, "words", config, random_points(config, 100, seed=2), segments=2)
    shard.load()
    assert set(tmp_path.iterdir()) == cached_files(tmp_path, store, old) | cached_files(tmp_path, store, new)
    shard.retire(2)
    assert set(tmp_path.iterdir()) == cached_files(tmp_path, store, new)
    shard.retire(2)  # nothing is left to retire
    assert set(tmp_path.iterdir()) == cached_files(tmp_path, store, new)


def test_retire_keeps_a_segment_that_the_new_generation_shares(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), FaultyStore(MemoryStore(), counted=frozenset({"download"}))
    points = random_points(config, 100, seed=1)
    manifest = commit(store, "words", config, points)
    shard = loaded(store, tmp_path)
    manifest_log(store, "words").commit_generation(manifest, config, manifest.shards)
    shard.load()
    assert store.calls == 2, "the shared segment was fetched again"
    shard.retire(2)
    assert set(tmp_path.iterdir()) == cached_files(tmp_path, store, manifest)
    queries = random_vectors(config, 2, seed=3)
    assert ids_per_query(search_all(shard, queries, generation=2)) == brute_force(points, queries, 10, "l2")


def test_retire_keeps_files_whose_bytes_the_new_generation_has_too(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), MemoryStore()
    points = random_points(config, 100, seed=1)
    commit(store, "words", config, points)
    shard = loaded(store, tmp_path)
    new = commit(store, "words", config, points)  # the same points again: the same rows.arrow, the same cached file
    shard.load()
    shard.retire(2)
    assert set(tmp_path.iterdir()) == cached_files(tmp_path, store, new)


def test_retire_leaves_a_file_stores_own_files(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), FileStore(tmp_path / "data")
    commit(store, "words", config, random_points(config, 50, seed=1))
    shard = loaded(store, tmp_path / "cache")
    commit(store, "words", config, random_points(config, 50, seed=2))
    shard.load()
    before = [info.key for info in store.objects("collections/")]
    shard.retire(2)
    assert [info.key for info in store.objects("collections/")] == before


def test_failed_load_leaves_what_was_served(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), MemoryStore()
    points = random_points(config, 100, seed=1)
    commit(store, "words", config, points)
    shard = loaded(store, tmp_path)
    second = commit(store, "words", config, random_points(config, 100, seed=2))
    key = segment_file("words", next(iter(second.segments)), "rows.arrow")
    store.put(key, flipped(store.get(key), 700))
    with pytest.raises(Corrupt, match=key):
        shard.load(2)
    status = shard.status()
    assert (status.state, status.versions) == ("ready", (1,))
    queries = random_vectors(config, 2, seed=4)
    assert ids_per_query(search_all(shard, queries)) == brute_force(points, queries, 10, "l2")


def test_version_without_this_shard_is_not_found_and_what_is_held_stays(tmp_path: Path) -> None:
    two, one = config_of(metric="l2", shards=2), config_of(metric="l2")
    store, points = MemoryStore(), random_points(two, 60)
    commit(store, "words", two, points)
    shard = loaded(store, tmp_path, shard=1)
    commit(store, "words", one, points)
    with pytest.raises(NotFound, match="version 2 of 'words' has no shard 1"):
        shard.load()
    shard.renew()
    queries = random_vectors(one, 2, seed=5)
    mine = points_of_shard(points, 2, 1)
    assert ids_per_query(search_all(shard, queries, generation=1)) == brute_force(mine, queries, 10, "l2")


def test_status_describes_the_newest_generations_segments(tmp_path: Path) -> None:
    config, store = config_of("hnsw", metric="l2"), MemoryStore()
    manifest = commit(store, "words", config, random_points(config, 200), segments=2)
    status = loaded(store, tmp_path).status()
    assert (status.state, status.points, status.error) == ("ready", 200, "")
    assert [facts["segment_id"] for facts in status.segments] == list(manifest.segments)
    for facts in status.segments:
        assert (facts["count"], facts["index_kind"], facts["attributes"]) == (100, "hnsw", {"name": "large_string"})
        assert facts["index_params"] == {"m": 32, "ef_construction": 100}
        assert (facts["codes"], facts["rerank_store"]) == ("float16", "rows")
        assert facts["predicted_bytes"] > 100 * 8 * 2
        taken = [candidate for candidate in facts["considered"] if not candidate["rejected"]]
        assert [(candidate["kind"], candidate["predicted_bytes"]) for candidate in taken] == [
            ("hnsw", facts["predicted_bytes"])
        ]
        assert facts["operating_points"][0]["target_recall"] == 0.95
        assert facts["rows_bytes"] > 100 * 8 * 4
        assert facts["index_bytes"] > 100 * 8 * 4


def test_segment_of_one_point_is_found_among_larger_ones(tmp_path: Path) -> None:
    config, store = config_of(metric="l2"), MemoryStore()
    points = random_points(config, 50)
    one, rest = points.take(np.array([0])), points.take(np.arange(1, 50))
    refs = (publish(store, "words", config, one), publish(store, "words", config, rest))
    manifest_log(store, "words").commit_generation(None, config, (ShardEntry(0, refs),))
    hits = search_all(loaded(store, tmp_path), points.vectors, k=1)
    assert flatten(ids_per_query(hits)) == points.ids.to_pylist()
