from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from actors.exact_search import exact_search, faiss
from actors.faiss_index import load_index
from actors.segment_builder import BuildOptions, build_segment, publish_segment
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.index_policy import IndexPlan, choose, plan_index
from cluster.index_spec import IndexSpec
from cluster.memory_store import MemoryStore
from cluster.query import SearchParams
from cluster.segment import Rows, SegmentDescription, checksum_bytes, checksum_file
from cluster.topk import recall_at_k
from tests.unit.actors.points import (
    INDEXES,
    ONE_THREAD,
    Points,
    build,
    in_row_order,
    keys,
    load,
    random_points,
    random_vectors,
    wide_open,
)

KINDS = ["flat", "ivf_flat", "hnsw", "ivf_sq8", "ivf_pq", "ivf_rabitq"]


@pytest.fixture(autouse=True)
def threshold_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are built in processes that have loaded none: loading sets when FAISS multiplies matrices."""
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 128_000)


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
    assert description.spec == choose(700, config).to_dict()
    assert description.spec["kind"] == kind
    assert [candidate["kind"] for candidate in description.considered] == [kind]
    assert [point.target_recall for point in description.operating_points] == [0.95, 0.90, 0.99]
    assert description.files == {name: checksum_file(tmp_path / name) for name in (paths.ROWS, paths.INDEX)}
    assert (description.built["threads"], description.built["seed"]) == (1, 7)
    assert {"faiss", "simd", "seconds", "predicted_seconds", "tuning_seconds"} <= description.built.keys()
    asked = {"flat": "10 rows with noise", "hnsw": "70 rows and 35 rows with noise"}
    assert description.built["tuned_on"] == asked.get(kind, "70 rows with noise")
    data = (tmp_path / paths.DESCRIPTION).read_bytes()
    assert SegmentDescription.decode(data, "segment.json") == description


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize("name", INDEXES)
def test_built_index_holds_every_row_under_its_row_number(name: str, tmp_path: Path) -> None:
    config = CollectionConfig(16, "l2", index=INDEXES[name])
    points = in_row_order(random_points(config, 500))
    description = build(tmp_path, "s1", config, points)
    spec = IndexSpec.from_dict(description.spec)
    index = load_index(tmp_path / paths.INDEX, spec, 16, "l2", 500, "index")
    found, _ = index.search(points.vectors, 500, wide_open(index))
    assert (np.sort(found, axis=1) == np.arange(500)).all()
    # With exact scores of all of them each row is nearest to itself.
    rows, scores = load(tmp_path, config, description).search(points.vectors, 1, SearchParams(**exhaustive(index)))
    np.testing.assert_array_equal(rows[:, 0], np.arange(500))
    np.testing.assert_allclose(scores[:, 0], 0.0, atol=1e-5)


def exhaustive(index: Any) -> dict[str, Any]:
    """Raw knobs with which every row is a candidate for its exact score."""
    return wide_open(index) | ({"rerank": 500.0} if "rerank" in index.knobs else {})


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
    with pytest.raises(Invalid, match=r"index\.memory_bytes: 1000 bytes .* flat \(float32 codes\) 3680"):
        build_segment(tmp_path, "s2", tight, 100, 64, BuildOptions())


def recall_of(folder: Path, config: CollectionConfig, description: SegmentDescription, queries: Any) -> float:
    """Of the loaded segment at its own operating point, against brute force."""
    segment = load(folder, config, description)
    truth, _ = exact_search(queries, segment.rows.blocks(), 10, config.metric)
    return float(recall_at_k(segment.search(queries, 10, SearchParams())[0][:, :10], truth).mean())


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq"])
def test_operating_point_meets_its_target_on_queries_it_was_not_tuned_on(
    kind: str, metric: str, tmp_path: Path
) -> None:
    config = config_of(kind, metric=metric)
    description = build(tmp_path, "s1", config, in_row_order(random_points(config, 3_000)))
    point = description.operating_points[0]
    assert point.met
    assert point.recall_low >= 0.94  # of all queries; .95 is proven on those to tune with, and not refuted by the rest
    assert recall_of(tmp_path, config, description, random_vectors(config, 300, seed=99)) >= 0.93


def test_build_tunes_on_real_queries_where_there_are_enough(tmp_path: Path) -> None:
    config = config_of("hnsw", metric="l2")
    points = in_row_order(random_points(config, 2_000))
    queries = random_vectors(config, 600, seed=5)
    enough = build(tmp_path, "s1", config, points, options=replace(ONE_THREAD, queries=queries))
    few = build(tmp_path, "s2", config, points, options=replace(ONE_THREAD, queries=queries[:499]))
    assert enough.built["tuned_on"] == "600 recent queries"
    assert few.built["tuned_on"] == "200 rows and 100 rows with noise"


def test_build_of_a_planned_kind_has_parameters_for_its_own_count(tmp_path: Path) -> None:
    config = config_of("ivf_flat", metric="l2")
    plan = plan_index(100_000, config)
    description = build(
        tmp_path, "s1", config, in_row_order(random_points(config, 1_000)), options=replace(ONE_THREAD, plan=plan)
    )
    assert plan.spec.params == {"nlist": 1_024}
    assert description.spec["params"] == {"nlist": 1_000 // 39}
    assert description.spec["reason"] == f"for the mean shard: {plan.spec.reason}"


# --- auto: codes that the vectors survive, and a stronger graph where the target is missed ------------------------


def auto(dimension: int, **options: Any) -> CollectionConfig:
    return CollectionConfig(dimension, "l2", index=IndexConfig("auto", **options))


def planned(codes: Any, m: int = 32, construction: int = 100, store: Any = "rows", kind: Any = "hnsw") -> BuildOptions:
    """As if auto had chosen a graph, or lists: of so few points it takes flat."""
    params = {"m": m, "ef_construction": construction} if kind == "hnsw" else {"nlist": 50, "pq_m": 4, "pq_bits": 4}
    spec = IndexSpec(kind, params, codes, 0, "planned", rerank_store=store)
    return replace(ONE_THREAD, plan=IndexPlan(spec, ()))


def points_with(vectors: NDArray[Any]) -> Points:
    return in_row_order(Points(pa.array(np.arange(len(vectors))), vectors.astype(np.float32)))


def vectors_that(what: str, count: int, seed: int) -> NDArray[np.float64]:
    normal = np.random.default_rng(seed).normal(size=(count, 16))
    if what == "have outliers":  # too great for float16, and 8 bits from the least to the greatest tell no others apart
        return np.where(np.arange(count)[:, None] == np.arange(16), 1e6, normal)
    return {"are usual": normal, "are far": 1_000.0 + 0.1 * normal, "are huge": 1e6 * normal}.get(what, 1e-9 * normal)


@pytest.mark.parametrize(
    ("what", "codes"),
    [
        ("are usual", "float16"),
        ("are far", "sq8"),
        ("are huge", "sq8"),
        ("are tiny", "sq8"),
        ("have outliers", "float32"),
    ],
)
def test_build_takes_codes_that_the_vectors_survive_and_keeps_its_recall(what: str, codes: str, tmp_path: Path) -> None:
    config, vectors = auto(16), vectors_that(what, 2_000, seed=1)
    description = build(tmp_path, "s1", config, points_with(vectors), options=planned("float16"))
    assert (description.spec["kind"], description.spec["codes"]) == ("hnsw", codes)
    assert ("float16 would lose neighbours" in description.spec["reason"]) == (codes != "float16")
    assert description.operating_points[0].met
    queries = vectors_that(what, 200, seed=2)[20:].astype(np.float32)
    assert recall_of(tmp_path, config, description, queries) >= 0.94


@pytest.mark.parametrize(("what", "store"), [("are usual", "float16"), ("are far", "rows"), ("have outliers", "rows")])
def test_build_reranks_from_the_rows_where_its_store_would_lose_neighbours(
    what: str, store: str, tmp_path: Path
) -> None:
    config, vectors = auto(16), vectors_that(what, 2_000, seed=1)
    options = planned("float32", store="float16", kind="ivf_pq")
    description = build(tmp_path, "s1", config, points_with(vectors), options=options)
    assert (description.spec["kind"], description.spec["rerank_store"]) == ("ivf_pq", store)
    queries = vectors_that(what, 200, seed=2)[20:].astype(np.float32)
    assert recall_of(tmp_path, config, description, queries) >= 0.93


def test_build_of_a_named_kind_keeps_the_codes_that_were_asked_for(tmp_path: Path) -> None:
    config = CollectionConfig(16, "l2", index=IndexConfig("hnsw", codes="float16"))
    description = build(tmp_path, "s1", config, points_with(vectors_that("are far", 1_000, seed=1)))
    assert description.spec["codes"] == "float16"


def weak(tmp_path: Path, **options: Any) -> SegmentDescription:
    """Built by auto from a plan of a graph with two links a point, which leaves parts of it unreachable."""
    config = auto(32, target_recall=0.995, **options)
    vectors = np.random.default_rng(3).normal(size=(2_500, 32))
    return build(tmp_path, "s1", config, points_with(vectors), options=planned("float16", m=2, construction=4))


@pytest.mark.usefixtures("one_target")
def test_build_makes_a_stronger_graph_where_the_target_is_missed(tmp_path: Path) -> None:
    description = weak(tmp_path)
    assert description.spec["params"]["m"] > 2
    assert "built again, since hnsw M 2 (float16 codes) missed the target" in description.spec["reason"]
    assert description.operating_points[0].met
    assert (
        recall_of(tmp_path, auto(32), description, np.random.default_rng(4).normal(size=(200, 32)).astype("f4")) > 0.98
    )


@pytest.mark.usefixtures("one_target")
def test_build_makes_no_stronger_graph_than_the_memory_allows(tmp_path: Path) -> None:
    description = weak(tmp_path, memory_bytes=2_500 * (64 + 16 + 16 + 8) * 115 // 100)
    assert description.spec["params"]["m"] == 2
    assert not description.operating_points[0].met


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
