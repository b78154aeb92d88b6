from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.faiss_index import exact_search, load_index
from actors.segment_builder import BuildOptions, build_segment, publish_segment
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.index_spec import IndexSpec
from cluster.memory_store import MemoryStore
from cluster.segment import Rows, SegmentDescription, checksum_bytes, checksum_file
from tests.unit.actors.points import build, in_row_order, keys, random_points, random_vectors

KINDS = ["flat", "ivf_flat", "hnsw"]


def config_of(kind: str = "flat", dimension: int = 8, **options: object) -> CollectionConfig:
    return CollectionConfig(dimension, index=IndexConfig(kind=kind), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_build_describes_what_it_wrote(kind: str, dtype: str, tmp_path: Path) -> None:
    config = config_of(kind, metric="l2", vector_dtype=dtype, id_type="string")
    description = build(tmp_path, "s1", config, in_row_order(random_points(config, 700)))
    assert (description.segment_id, description.count, description.dimension) == ("s1", 700, 8)
    assert (description.metric, description.id_type, description.vector_dtype) == ("l2", "string", dtype)
    assert description.rows_per_batch == 64
    assert description.attributes == {"name": "large_string"}
    assert description.spec["kind"] == kind
    assert description.spec["codes"] == ("float32" if kind == "flat" else dtype)
    assert [point.target_recall for point in description.operating_points] == [0.95, 0.90, 0.99]
    assert description.files == {name: checksum_file(tmp_path / name) for name in (paths.ROWS, paths.INDEX)}
    assert (description.built["threads"], description.built["seed"]) == (1, 7)
    assert {"faiss", "simd", "seconds"} <= description.built.keys()
    data = (tmp_path / paths.DESCRIPTION).read_bytes()
    assert SegmentDescription.decode(data, "segment.json") == description


@pytest.mark.parametrize("kind", KINDS)
def test_built_index_holds_every_row_under_its_row_number(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, metric="l2")
    points = in_row_order(random_points(config, 500))
    description = build(tmp_path, "s1", config, points)
    spec = IndexSpec.from_dict(description.spec)
    index = load_index(tmp_path / paths.INDEX, spec, 8, "l2", 500, "index")
    wide = {"ivf_flat": {"nprobe": 1_000}, "hnsw": {"ef_search": 500}}.get(kind, {})
    found, scores = index.search(points.vectors, 1, wide)
    np.testing.assert_array_equal(found[:, 0], np.arange(500))
    np.testing.assert_allclose(scores, 0.0, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_self_test_records_the_exact_neighbours_of_the_last_rows(metric: str, tmp_path: Path) -> None:
    config = config_of("hnsw", metric=metric)
    points = in_row_order(random_points(config, 400))
    test = build(tmp_path, "s1", config, points).self_test
    assert test.rows == tuple(range(368, 400))
    truth, _ = exact_search(points.vectors[368:], [(0, points.vectors)], 10, config.metric)
    assert [list(line) for line in test.truth] == truth.tolist()
    assert 0.9 <= test.recall <= 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11])
def test_build_of_few_points_is_complete(count: int, kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    points = in_row_order(random_points(config, count))
    description = build(tmp_path, "s1", config, points, per_batch=4)
    assert description.count == count
    assert description.self_test.rows == tuple(range(count))
    assert all(len(line) == min(10, count) for line in description.self_test.truth)
    assert description.self_test.recall == 1.0
    rows = Rows(tmp_path / paths.ROWS, count, 8, 4)
    np.testing.assert_array_equal(rows.vectors(0, count), points.vectors)


def test_build_reports_progress_that_never_goes_back(tmp_path: Path) -> None:
    config = config_of("hnsw")
    build(tmp_path, "s1", config, in_row_order(random_points(config, 500)))
    shares: list[float] = []
    build_segment(tmp_path, "s2", config, 500, 64, BuildOptions(progress=shares.append))
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[0] > 0.0
    assert shares[-1] <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_build_twice_with_one_seed_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    points = in_row_order(random_points(config, 600))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        build(folder, "s1", config, points)
    for name in (paths.ROWS, paths.INDEX):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_build_over_the_memory_bound_is_refused_with_the_numbers(tmp_path: Path) -> None:
    config = config_of("flat")
    build(tmp_path, "s1", config, in_row_order(random_points(config, 100)))
    tight = CollectionConfig(8, index=IndexConfig(kind="flat", memory_bytes=1_000))
    with pytest.raises(Invalid, match=r"index\.memory_bytes: 1000 bytes .* flat 3680"):
        build_segment(tmp_path, "s2", tight, 100, 64, BuildOptions())


def test_operating_point_meets_its_target_on_queries_it_was_not_tuned_on(tmp_path: Path) -> None:
    config = config_of("ivf_flat", metric="l2")
    points = in_row_order(random_points(config, 3_000))
    description = build(tmp_path, "s1", config, points)
    point = description.operating_points[0]
    assert point.met
    assert point.recall_low >= 0.95
    spec = IndexSpec.from_dict(description.spec)
    index = load_index(tmp_path / paths.INDEX, spec, 8, "l2", 3_000, "index")
    queries = random_vectors(config, 300, seed=99)
    found, _ = index.search(queries, 10, point.params)
    truth, _ = exact_search(queries, [(0, points.vectors)], 10, "l2")
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)])
    assert share >= 0.93


def test_publish_uploads_the_three_files_and_names_the_description_by_checksum(tmp_path: Path) -> None:
    config, store = config_of("flat"), MemoryStore()
    build(tmp_path, "s1", config, in_row_order(random_points(config, 50)))
    ref = publish_segment(store, "words", tmp_path, "s1")
    prefix = "collections/words/segments/s1/"
    assert keys(store, "collections/") == [f"{prefix}{name}" for name in sorted(paths.SEGMENT_FILES)]
    for name in paths.SEGMENT_FILES:
        assert store.get(prefix + name) == (tmp_path / name).read_bytes()
    assert (ref.segment_id, ref.count) == ("s1", 50)
    assert ref.checksum == checksum_bytes(store.get(f"{prefix}segment.json"))
