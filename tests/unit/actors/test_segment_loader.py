from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.faiss_index import load_index
from actors.segment_loader import LoadedSegment, cached_path, load_segment, sweep_cache, widened
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Corrupt, NotFound, Unavailable
from cluster.file_store import FileStore
from cluster.index_spec import IndexSpec
from cluster.manifest import SegmentRef
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.query import SearchParams
from cluster.segment import FileEntry, SegmentDescription, checksum_bytes
from tests.fakes import FaultyStore
from tests.unit.actors.points import Points, build, flipped, in_row_order, publish, random_points, random_vectors

KINDS = ["flat", "ivf_flat", "hnsw"]
COUNT = 400


def config_of(kind: str, **options: object) -> CollectionConfig:
    return CollectionConfig(8, index=IndexConfig(kind=kind), **options)  # type: ignore[arg-type]


def points_of(config: CollectionConfig, seed: int = 0) -> Points:
    return in_row_order(random_points(config, COUNT, seed))


def load(store: ObjectStore, ref: SegmentRef, config: CollectionConfig, cache_dir: Path) -> LoadedSegment:
    return load_segment(store, "words", ref, config.metric, cache_dir)


def key_of(ref: SegmentRef, name: str) -> str:
    return paths.segment_file("words", ref.segment_id, name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("kind", KINDS)
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
    for ours, theirs in zip(segment.search(queries, 10, SearchParams()), built.search(queries, 10, knobs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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


@pytest.mark.parametrize("kind", KINDS)
def test_self_test_catches_an_index_built_over_other_vectors(kind: str, tmp_path: Path) -> None:
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
