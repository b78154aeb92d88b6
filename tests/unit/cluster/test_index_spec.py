"""The adaptive policy as a pinned table, and what holds for every input."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.config import CollectionConfig, IndexConfig, IndexKindChoice, Metric, VectorDtype
from cluster.errors import Invalid
from cluster.index_spec import MEMORY_MARGIN, POINTS_PER_CENTROID_MIN, IndexSpec, choose, nlist

GB = 10**9
HNSW_16, HNSW_32 = {"m": 16, "ef_construction": 100}, {"m": 32, "ef_construction": 100}


# fmt: off
TABLE = [
    # count, dimension, dtype, target recall, memory -> kind, params, codes, predicted bytes
    (0,          384,  "float32", 0.95, None,        "flat",     {},                "float32", 0),
    (1,          384,  "float32", 0.95, None,        "flat",     {},                "float32", 1_536),
    (1_000,      384,  "float32", 0.95, None,        "flat",     {},                "float32", 1_536_000),
    (1_000,      384,  "float16", 0.95, None,        "flat",     {},                "float32", 1_536_000),
    (15_625,     384,  "float32", 0.95, None,        "flat",     {},                "float32", 24_000_000),
    (15_626,     384,  "float32", 0.95, None,        "hnsw",     HNSW_16,           "float32", 26_251_680),
    (15_626,     384,  "float32", 1.0,  None,        "flat",     {},                "float32", 24_001_536),
    (3_000_000,  2,    "float32", 0.95, None,        "flat",     {},                "float32", 24_000_000),
    (92,         65_536, "float32", 0.95, None,      "hnsw",     HNSW_16,           "float32", 24_130_496),
    (200_000,    384,  "float32", 0.95, None,        "hnsw",     HNSW_16,           "float32", 336_000_000),
    (200_000,    384,  "float16", 0.95, None,        "hnsw",     HNSW_16,           "float16", 182_400_000),
    (200_000,    384,  "float32", 0.5,  None,        "hnsw",     HNSW_16,           "float32", 336_000_000),
    (200_000,    384,  "float32", 0.95, 386_400_000, "hnsw",     HNSW_16,           "float32", 336_000_000),
    (200_000,    384,  "float32", 0.95, 386_399_999, "ivf_flat", {"nlist": 2_048},  "float32", 311_945_728),
    (999_999,    384,  "float32", 0.95, None,        "hnsw",     HNSW_16,           "float32", 1_679_998_320),
    (1_000_000,  384,  "float32", 0.95, None,        "hnsw",     HNSW_32,           "float32", 1_808_000_000),
    (1_000_000,  384,  "float32", 0.95, 2 * GB,      "ivf_flat", {"nlist": 16_384}, "float32", 1_569_165_824),
    (1_000_000,  384,  "float16", 0.95, 2 * GB,      "hnsw",     HNSW_32,           "float16", 1_040_000_000),
    (10_000_000, 128,  "float32", 0.95, None,        "hnsw",     HNSW_32,           "float32", 7_840_000_000),
    (10_000_000, 128,  "float32", 0.95, 7 * GB,      "ivf_flat", {"nlist": 65_536}, "float32", 5_233_554_432),
    (10_000_000, 128,  "float32", 1.0,  7 * GB,      "flat",     {},                "float32", 5_120_000_000),
]
# fmt: on


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("count", "dimension", "dtype", "recall", "memory", "kind", "params", "codes", "size"), TABLE)
def test_auto_choice_is_pinned(
    count: int,
    dimension: int,
    dtype: VectorDtype,
    recall: float,
    memory: int | None,
    metric: Metric,
    kind: str,
    params: dict[str, int],
    codes: str,
    size: int,
) -> None:
    index = IndexConfig(target_recall=recall, memory_bytes=memory)
    spec = choose(count, CollectionConfig(dimension=dimension, metric=metric, vector_dtype=dtype, index=index))
    assert (spec.kind, spec.params, spec.codes, spec.predicted_bytes) == (kind, params, codes, size)
    assert spec.policy_version == 1


@pytest.mark.parametrize(
    ("count", "lists"),
    [
        (0, 1),
        (1, 1),
        (38, 1),
        (77, 1),
        (78, 2),
        (1_000, 25),
        (10_000, 256),
        (50_000, 1_024),
        (100_000, 1_024),
        (200_000, 2_048),
        (999_999, 4_096),
        (1_000_000, 16_384),
        (9_999_999, 16_384),
        (10_000_000, 65_536),
        (10**9, 65_536),
    ],
)
def test_nlist_is_pinned(count: int, lists: int) -> None:
    assert nlist(count) == lists


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "hnsw"])
@pytest.mark.parametrize("count", [1, 1_000, 2_000_000])
def test_kind_asked_for_is_taken_at_any_count(kind: IndexKindChoice, count: int) -> None:
    spec = choose(count, CollectionConfig(dimension=16, index=IndexConfig(kind=kind)))
    assert spec.kind == kind
    assert spec.reason == f"{kind} was asked for"


@pytest.mark.parametrize("kind", ["auto", "flat", "ivf_flat", "hnsw"])
def test_gpu_is_refused(kind: IndexKindChoice) -> None:
    with pytest.raises(Invalid) as caught:
        choose(10, CollectionConfig(dimension=4, index=IndexConfig(kind=kind, device="gpu")))
    assert [error.field for error in caught.value.errors] == ["index.device"]


def test_over_memory_is_refused_with_the_numbers() -> None:
    config = CollectionConfig(dimension=384, index=IndexConfig(memory_bytes=100_000_000))
    expected = (
        "index.memory_bytes: 100000000 bytes for one shard's index are too few; "
        "needed are: hnsw 386400000, ivf_flat 358737588. Raise it, use more shards, or store float16"
    )
    with pytest.raises(Invalid, match=f"^{re.escape(expected)}$"):
        choose(200_000, config)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "hnsw"])
def test_kind_asked_for_over_memory_is_refused_with_its_own_number(kind: IndexKindChoice) -> None:
    config = CollectionConfig(dimension=384, index=IndexConfig(kind=kind, memory_bytes=1_000))
    with pytest.raises(Invalid, match=rf"needed are: {kind} \d+\. "):
        choose(200_000, config)


# ---- what holds for every input

counts = st.one_of(st.integers(0, 2_000), st.integers(0, 20_000_000))
few = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def configs(draw: st.DrawFn) -> CollectionConfig:
    return CollectionConfig(
        dimension=draw(st.sampled_from([1, 2, 3, 100, 384, 1_536, 65_536])),
        metric=draw(st.sampled_from(["l2", "ip", "cosine"])),
        vector_dtype=draw(st.sampled_from(["float32", "float16"])),
        index=IndexConfig(
            kind=draw(st.sampled_from(["auto", "auto", "flat", "ivf_flat", "hnsw"])),
            target_recall=draw(st.sampled_from([0.5, 0.9, 0.99, 1.0])),
            memory_bytes=draw(st.one_of(st.none(), st.integers(1, 10**6), st.integers(1, 10**11))),
        ),
    )


def with_index(config: CollectionConfig, index: IndexConfig) -> CollectionConfig:
    return CollectionConfig.from_dict(config.to_dict() | {"index": vars(index)})


@few
@given(counts, configs())
def test_choice_is_never_over_the_memory_budget(count: int, config: CollectionConfig) -> None:
    memory = config.index.memory_bytes
    assume(memory is not None)
    assert memory is not None
    try:
        spec = choose(count, config)
    except Invalid as error:
        needed = [int(number) for number in re.findall(r"(?:flat|hnsw) (\d+)", str(error))]
        assert needed
        assert min(needed) > memory
        enough = IndexConfig(config.index.kind, config.index.target_recall, "cpu", min(needed))
        assert choose(count, with_index(config, enough)).predicted_bytes <= min(needed)
    else:
        assert spec.predicted_bytes * MEMORY_MARGIN <= memory


@few
@given(counts, configs())
def test_choice_is_a_kind_that_can_be_built_from_the_points(count: int, config: CollectionConfig) -> None:
    spec = choose(count, with_index(config, IndexConfig(config.index.kind, config.index.target_recall)))
    assert spec.predicted_bytes >= 0
    if spec.kind == "ivf_flat":
        lists = spec.params["nlist"]
        assert lists == 1 or lists * POINTS_PER_CENTROID_MIN <= count
    if config.index.kind == "auto" and config.index.target_recall == 1.0:
        assert spec.kind == "flat"


@few
@given(counts, configs())
def test_search_grid_ascends_and_belongs_to_the_kind(count: int, config: CollectionConfig) -> None:
    spec = choose(count, with_index(config, IndexConfig(config.index.kind, config.index.target_recall)))
    grid = spec.search_grid()
    assert list(grid) == sorted(set(grid))
    assert (spec.search_param is None) == (grid == ()) == (spec.kind == "flat")
    if spec.kind == "ivf_flat":
        assert spec.search_param == "nprobe"
        assert grid[0] == 1
        assert grid[-1] == spec.params["nlist"]  # the last one is exact
    if spec.kind == "hnsw":
        assert spec.search_param == "ef_search"


@few
@given(counts, configs())
def test_spec_survives_json(count: int, config: CollectionConfig) -> None:
    spec = choose(count, with_index(config, IndexConfig(config.index.kind, config.index.target_recall)))
    assert IndexSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@few
@given(st.integers(0, 10**9))
def test_nlist_never_starves_a_centroid(count: int) -> None:
    lists = nlist(count)
    assert lists >= 1
    assert lists == 1 or lists * POINTS_PER_CENTROID_MIN <= count
