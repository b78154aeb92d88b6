from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.segment_loader
import actors.segment_searcher
import actors.tuner
from actors.faiss_index import load_index, use_threads
from actors.rerank import rerank
from actors.segment_loader import LoadedSegment, cached_path, load_segment, sweep_cache, widened
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Corrupt, Invalid, NotFound, Unavailable
from cluster.file_store import FileStore
from cluster.index_spec import IndexSpec
from cluster.manifest import SegmentRef
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import FileEntry, OperatingPoint, SegmentDescription, checksum_bytes, checksum_file
from tests.fakes import FaultyStore
from tests.unit.actors import points as stored
from tests.unit.actors.points import (
    INDEXES,
    METRICS,
    Points,
    build,
    flipped,
    in_row_order,
    publish,
    random_points,
    random_vectors,
    true_rows_of,
)

KINDS = ["flat", "ivf_flat", "hnsw"]
COUNT = 400


def pairwise_of(names: list[str]) -> list[tuple[str, str, str]]:
    """(name, metric, dtype): every two of them together, of all metrics and both dtypes of vectors."""
    dtypes = ("float32", "float16")
    return [(name, metric, dtypes[(i + j) % 2]) for i, name in enumerate(names) for j, metric in enumerate(METRICS)]


def config_of(kind: str, **options: object) -> CollectionConfig:
    return CollectionConfig(8, index=IndexConfig(kind=kind), **options)  # type: ignore[arg-type]


def points_of(config: CollectionConfig, seed: int = 0) -> Points:
    return in_row_order(random_points(config, COUNT, seed))


def load(store: ObjectStore, ref: SegmentRef, config: CollectionConfig, cache_dir: Path) -> LoadedSegment:
    return load_segment(store, "words", ref, config.metric, cache_dir)


def key_of(ref: SegmentRef, name: str) -> str:
    return paths.segment_file("words", ref.segment_id, name)


@pytest.mark.parametrize(("kind", "metric", "dtype"), pairwise_of([*KINDS, "ivf_sq8", "ivf_pq", "ivf_rabitq"]))
def test_loaded_segment_answers_as_the_built_one(kind: str, metric: str, dtype: str, tmp_path: Path) -> None:
    config, store = config_of(kind, metric=metric, vector_dtype=dtype), MemoryStore()
    points = points_of(config)
    description = build(tmp_path, "s1", config, points)
    spec = IndexSpec.from_dict(description.spec)
    built = load_index(tmp_path / paths.INDEX, spec, 8, config.metric, COUNT, "index")
    for name in paths.SEGMENT_FILES:
        store.upload(tmp_path / name, paths.segment_file("words", "s1", name))
    checksum = checksum_bytes((tmp_path / paths.DESCRIPTION).read_bytes())
    segment = load(store, SegmentRef("s1", COUNT, checksum), config, tmp_path / "cache")
    assert segment.description == description
    assert segment.ids.equals(points.ids)
    np.testing.assert_array_equal(segment.rows.vectors(0, COUNT), points.vectors.astype(np.float32))
    queries = random_vectors(config, 10, seed=5)
    knobs = description.operating_points[0].params
    rows, scores = segment.search(queries, 10, SearchParams())
    candidates = int(knobs.get("rerank", spec.rerank) * 11)  # one more than k, to see ties
    expected, theirs = built.search(queries, candidates, knobs)
    if spec.rerank_store != "none" or (kind == "flat" and spec.codes == "float32"):
        expected, theirs = rerank(segment.rows, queries, expected, config.metric, 1)
    np.testing.assert_array_equal(rows, expected[:, :10])
    np.testing.assert_array_equal(scores, theirs[:, :10])


def test_segment_of_another_collection_is_loaded_from_there(tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    points = points_of(config)
    ref = publish(store, "origin", config, points)
    with pytest.raises(NotFound):
        load(store, ref, config, tmp_path)
    segment = load(store, replace(ref, origin="origin"), config, tmp_path)
    assert segment.ids.equals(points.ids)
    key = paths.segment_file("origin", ref.segment_id, paths.ROWS)
    store.put(key, store.get(key)[:-1])
    with pytest.raises(Corrupt, match=f"^{key}: "):
        load(store, replace(ref, origin="origin"), config, tmp_path / "fresh")


def test_load_from_memory_goes_through_the_cache_and_downloads_once(tmp_path: Path) -> None:
    config, inner = config_of("flat"), MemoryStore()
    ref = publish(inner, "words", config, points_of(config))
    store = FaultyStore(inner, counted=frozenset({"download"}))
    segment = load(store, ref, config, tmp_path)
    assert store.calls == 2
    entries = segment.description.files.values()
    assert sorted(tmp_path.iterdir()) == sorted(cached_path(tmp_path, entry) for entry in entries)
    load(store, ref, config, tmp_path)
    assert store.calls == 2


def test_load_through_the_cache_does_not_read_again_what_it_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> FileEntry:
        if path.exists():
            raise AssertionError(f"{path} is read again")
        return checksum_file(path)

    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    with monkeypatch.context() as patch:
        patch.setattr(actors.segment_loader, "checksum_file", refuse)
        patch.setattr(actors.segment_loader, "verify_file", refuse)
        load(store, ref, config, tmp_path)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scanned_floats", [0, 1_000])
def test_an_exact_index_is_tested_with_a_part_of_its_rows(
    metric: str, scanned_floats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.segment_loader, "SELF_TEST_FLOATS", scanned_floats)
    config, store = config_of("flat", metric=metric), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    assert load(store, ref, config, tmp_path).rows.count == COUNT


def test_load_from_a_file_store_maps_its_files_in_place(tmp_path: Path) -> None:
    config, inner = config_of("hnsw"), FileStore(tmp_path / "data")
    points = points_of(config)
    ref = publish(inner, "words", config, points)
    store = FaultyStore(inner, counted=frozenset({"download"}))
    segment = load(store, ref, config, tmp_path / "cache")
    assert store.calls == 0
    assert not (tmp_path / "cache").exists()
    rows, _ = segment.search(points.vectors[:5], 1, SearchParams(ef_search=COUNT))
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", paths.SEGMENT_FILES)
@pytest.mark.parametrize("position", [0, 500, -1])
@pytest.mark.parametrize("backend", ["memory", "file"])
def test_load_of_a_flipped_byte_names_the_object(backend: str, position: int, name: str, tmp_path: Path) -> None:
    config = config_of("hnsw")
    store = MemoryStore() if backend == "memory" else FileStore(tmp_path / "data")
    ref = publish(store, "words", config, points_of(config))
    key = key_of(ref, name)
    store.put(key, flipped(store.get(key), position))
    with pytest.raises(Corrupt) as caught:
        load(store, ref, config, tmp_path / "cache")
    assert str(caught.value).startswith(f"{key}: ")
    assert "checksum" in str(caught.value)
    cached = list((tmp_path / "cache").glob("*")) if name != paths.DESCRIPTION else []
    assert all("." not in path.name for path in cached), "a refused download stayed in the cache"


@pytest.mark.parametrize("name", [paths.ROWS, paths.INDEX])
def test_load_of_a_cut_object_names_it_and_both_sizes(name: str, tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    data = store.get(key_of(ref, name))
    store.put(key_of(ref, name), data[:-7])
    with pytest.raises(Corrupt, match=f"{len(data) - 7} bytes .* written were {len(data)} bytes") as caught:
        load(store, ref, config, tmp_path)
    assert key_of(ref, name) in str(caught.value)


@pytest.mark.parametrize("name", paths.SEGMENT_FILES)
def test_load_of_a_missing_object_is_not_found_by_name(name: str, tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    store.delete(key_of(ref, name))
    with pytest.raises(NotFound, match=key_of(ref, name)):
        load(store, ref, config, tmp_path)


@pytest.mark.parametrize("name", [paths.ROWS, paths.INDEX])
def test_load_replaces_a_damaged_copy_in_the_cache(name: str, tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    entry = load(store, ref, config, tmp_path).description.files[name]
    path = cached_path(tmp_path, entry)
    good = path.read_bytes()
    path.unlink()  # the old file is still mapped
    path.write_bytes(good[: len(good) // 2])
    load(store, ref, config, tmp_path)
    assert path.read_bytes() == good


def test_load_while_the_store_is_away_is_unavailable_and_leaves_no_half_file(tmp_path: Path) -> None:
    config, inner = config_of("flat"), MemoryStore()
    ref = publish(inner, "words", config, points_of(config))
    store = FaultyStore(inner, at=2, fault="die")  # the description, then the files
    with pytest.raises(Unavailable):
        load(store, ref, config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    load(inner, ref, config, tmp_path)


def test_load_of_another_description_than_the_manifest_names_is_corrupt(tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    other = replace(ref, checksum=checksum_bytes(b"another"))
    with pytest.raises(Corrupt, match=r"segment\.json: the checksum is not the one in the manifest"):
        load(store, other, config, tmp_path)


@pytest.mark.parametrize("scanned_floats", [0, 1_000, actors.segment_loader.SELF_TEST_FLOATS])
@pytest.mark.parametrize("kind", KINDS)
def test_self_test_catches_an_index_built_over_other_vectors(
    kind: str, scanned_floats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.segment_loader, "SELF_TEST_FLOATS", scanned_floats)
    config, store = config_of(kind, metric="l2"), MemoryStore()
    ref = publish(store, "words", config, points_of(config, seed=1))
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), "other", config, points_of(config, seed=2))
        other = (Path(name) / paths.INDEX).read_bytes()
    store.put(key_of(ref, paths.INDEX), other)
    description = SegmentDescription.decode(store.get(key_of(ref, paths.DESCRIPTION)), "segment.json")
    files = description.files | {paths.INDEX: FileEntry(len(other), checksum_bytes(other))}
    data = replace(description, files=files).encode()
    store.put(key_of(ref, paths.DESCRIPTION), data)
    ref = replace(ref, checksum=checksum_bytes(data))
    with pytest.raises(Corrupt, match=r"index\.faiss: the self-test found 0\.\d+ of the neighbours"):
        load(store, ref, config, tmp_path)


@pytest.mark.parametrize(
    ("params", "k", "expected"),
    [
        ({"ef_search": 32}, 10, {"ef_search": 32}),
        ({"ef_search": 32}, 1, {"ef_search": 32}),
        ({"ef_search": 32}, 100, {"ef_search": 132}),
        ({"nprobe": 8}, 100, {"nprobe": 16}),
        ({}, 100, {}),
    ],
)
def test_tuned_parameters_are_widened_for_more_than_ten(
    params: dict[str, int], k: int, expected: dict[str, int]
) -> None:
    assert widened(params, k) == expected


def test_given_parameters_are_used_instead_of_the_tuned_ones(tmp_path: Path) -> None:
    config, store = config_of("ivf_flat", metric="l2"), MemoryStore()
    points = points_of(config)
    segment = load(store, publish(store, "words", config, points), config, tmp_path)
    starved, _ = segment.search(points.vectors[:5], COUNT, SearchParams(nprobe=1))
    whole, _ = segment.search(points.vectors[:5], COUNT, SearchParams(nprobe=1_000))
    assert (starved == -1).any()
    assert (whole >= 0).all()


# --- exact answers, and operating points by target ----------------------------------------------------------------


def tuning() -> tuple[object, ...]:
    """What tests set that a build depends on."""
    return actors.tuner.STANDARD_TARGETS, actors.segment_searcher.SCAN_FLOATS_MAX


class Built:
    """Segments that tests only read, each built once; every caller has one loaded for itself."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._known: dict[Any, tuple[Path, SegmentDescription]] = {}

    def segment(self, config: CollectionConfig, points: Points) -> LoadedSegment:
        key = (config, points.vectors.tobytes(), *tuning())
        if key not in self._known:
            folder = self._folders.mktemp("built")
            self._known[key] = folder, build(folder, "s1", config, points)
        folder, description = self._known[key]
        return stored.load(folder, config, description)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory)


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize(
    ("name", "metric", "dtype"), pairwise_of([name for name in INDEXES if not name.startswith("OPQ")])
)
def test_exact_equals_brute_force_over_the_stored_vectors_whatever_the_index(
    name: str, metric: str, dtype: str, built: Built
) -> None:
    config = CollectionConfig(16, metric, index=INDEXES[name], vector_dtype=dtype)  # type: ignore[arg-type]
    points = in_row_order(random_points(config, 600))
    segment = built.segment(config, points)
    queries = random_vectors(config, 10, seed=6)
    rows, scores = segment.search(queries, 10, SearchParams(exact=True))
    truth, true_scores = true_rows_of(points, queries, 10, config.metric)
    np.testing.assert_array_equal(rows, truth)
    np.testing.assert_allclose(scores, true_scores, rtol=1e-5, atol=1e-5)
    mask = np.random.default_rng(7).random(600) < 0.2
    kept = np.flatnonzero(mask)
    rows, _ = segment.search(queries, 10, SearchParams(exact=True), RowSelection.of(mask))
    np.testing.assert_array_equal(rows, kept[true_rows_of(points.take(kept), queries, 10, config.metric)[0]])


def with_points(segment: LoadedSegment, *points: tuple[float, dict[str, float], bool]) -> LoadedSegment:
    """The same segment with other operating points: (target, parameters, met)."""
    tuned = tuple(OperatingPoint(target, params, target, target, 1.0, met) for target, params, met in points)
    segment.description = replace(segment.description, operating_points=tuned)
    return segment


def tuned_segment(built: Built) -> LoadedSegment:
    config = config_of("ivf_flat", metric="l2")
    tuned = ((0.92, {"nprobe": 3}, True), (0.90, {"nprobe": 2}, True), (0.95, {"nprobe": 5}, True))
    return with_points(built.segment(config, points_of(config)), *tuned, (0.99, {"nprobe": 9}, False))


@pytest.mark.parametrize(
    ("target", "nprobe"), [(None, 3), (0.5, 2), (0.90, 2), (0.91, 3), (0.92, 3), (0.93, 5), (0.95, 5)]
)
def test_target_recall_takes_the_cheapest_tuned_point_that_is_no_lower(
    target: float | None, nprobe: int, built: Built
) -> None:
    segment = tuned_segment(built)
    queries = random_vectors(config_of("ivf_flat", metric="l2"), 20, seed=8)
    found = segment.search(queries, 5, SearchParams(target_recall=target))
    raw = segment.search(queries, 5, SearchParams(nprobe=nprobe))
    for ours, theirs in zip(found, raw, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("target", [0.951, 0.99, 1.0])
def test_target_recall_above_what_was_met_is_refused_with_what_was(target: float, built: Built) -> None:
    segment = tuned_segment(built)
    with pytest.raises(
        Invalid, match=rf"{target:g} is not reached here; tuned are targets up to 0\.95: or ask exact"
    ) as e:
        segment.search(np.zeros((1, 8), np.float32), 5, SearchParams(target_recall=target))
    assert [error.field for error in e.value.errors] == ["params.target_recall"]


def test_target_recall_where_none_was_met_is_refused(built: Built) -> None:
    segment = with_points(tuned_segment(built), (0.95, {"nprobe": 5}, False))
    with pytest.raises(Invalid, match="tuned are targets none"):
        segment.search(np.zeros((1, 8), np.float32), 5, SearchParams(target_recall=0.9))
    segment.search(np.zeros((1, 8), np.float32), 5, SearchParams())  # its own target: the best there is


def test_target_recall_of_one_is_met_by_a_flat_index(built: Built) -> None:
    config = CollectionConfig(8, "l2", index=IndexConfig("flat", target_recall=1.0))
    points = points_of(config)
    queries = random_vectors(config, 5, seed=8)
    rows, _ = built.segment(config, points).search(queries, 5, SearchParams(target_recall=1.0))
    np.testing.assert_array_equal(rows, true_rows_of(points, queries, 5, "l2")[0])


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize("name", [name for name in INDEXES if not name.startswith("OPQ")])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_tuned_search_for_many_rows_has_no_gaps(
    name: str, share: float, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of lists that hold fewer rows than asked for, more are visited."""
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)
    config = CollectionConfig(16, "l2", index=INDEXES[name])
    segment = built.segment(config, in_row_order(random_points(config, 600)))
    mask = np.random.default_rng(9).random(600) < share
    rows, _ = segment.search(random_vectors(config, 5, seed=9), 50, SearchParams(), RowSelection.of(mask))
    assert (rows >= 0).all()
    assert mask[rows].all()
    for line in rows[:, :50].tolist():
        assert len(set(line)) == 50


def test_search_of_a_selection_of_no_rows_finds_nothing(built: Built) -> None:
    config = config_of("hnsw", metric="l2")
    segment = built.segment(config, points_of(config))
    rows, scores = segment.search(
        np.zeros((3, 8), np.float32), 5, SearchParams(), RowSelection.of(np.zeros(COUNT, bool))
    )
    assert rows.shape == scores.shape == (3, 0)


def test_sweep_deletes_only_what_was_not_loaded_for_long(tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    segment = load(store, ref, config, tmp_path)
    (tmp_path / "xxh3_128-old").write_bytes(b"x")
    (tmp_path / "mine").write_bytes(b"not of the cache")
    for path in tmp_path.iterdir():
        os.utime(path, (0.0, 0.0))
    load(store, ref, config, tmp_path)  # from the cache: in use again
    sweep_cache(tmp_path, time.time())
    kept = [cached_path(tmp_path, entry) for entry in segment.description.files.values()]
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "mine"])


@pytest.mark.parametrize("name", [paths.ROWS, paths.INDEX])
def test_load_gets_a_cached_file_again_that_another_replica_deletes_before_it_is_mapped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = config_of("flat"), MemoryStore()
    ref = publish(store, "words", config, points_of(config))
    verified, vanishing = actors.segment_loader.verified_file, [name]

    def vanished(*args: Any) -> Path:
        path = verified(*args)
        if args[3] in vanishing:
            path.unlink()
            vanishing.clear()
        return path

    monkeypatch.setattr(actors.segment_loader, "verified_file", vanished)
    assert load(store, ref, config, tmp_path).description.count == COUNT
    assert vanishing == []

    def vanishes(*args: Any) -> Path:
        verified(*args).unlink()
        return cached_path(tmp_path, args[2].files[args[3]])

    monkeypatch.setattr(actors.segment_loader, "verified_file", vanishes)
    with pytest.raises(Unavailable, match="keeps vanishing"):
        load(store, ref, config, tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_pq"])
def test_threads_that_search_one_segment_at_once_get_the_answers_of_one(kind: str, tmp_path: Path) -> None:
    """They share the objects that hold FAISS's parameters, with and without a selection."""
    config, store = config_of(kind, metric="l2"), MemoryStore()
    segment = load(store, publish(store, "words", config, points_of(config)), config, tmp_path)
    queries = random_vectors(config, 40, seed=1)
    selections = [None, *(RowSelection.everything(COUNT).without(np.arange(first, COUNT, 3)) for first in range(3))]
    work = [(query[None, :], selection) for query in queries for selection in selections]

    def answer(asked: tuple[Any, RowSelection | None]) -> tuple[Any, Any]:
        use_threads(1)
        return segment.search(asked[0], 5, SearchParams(), asked[1])

    alone = [answer(asked) for asked in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, work))
    for (rows, scores), (expected, expected_scores) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(scores, expected_scores)
