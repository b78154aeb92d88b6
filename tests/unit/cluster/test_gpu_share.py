"""The share of a GPU that is chosen for an index, and when a collection keeps the one that it has."""

from __future__ import annotations

from dataclasses import replace
from math import floor
from typing import Any

import pytest

from cluster.config import CollectionConfig
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need
from cluster.gpu_policy import pq_sizes
from cluster.gpu_share import (
    GROWTH,
    SHARES,
    SHRINK_FROM,
    GpuShare,
    choose_share,
    in_words,
    least_share,
    share_without_points,
)
from cluster.index_policy import plan_index
from tests.unit.cluster.gpu_plans import config_of

GB = 10**9


def share_of(count: int, memory_bytes: int | None, had: float = 0.0, builds: bool = True, **config: Any) -> GpuShare:
    return choose_share(count, config_of(**config), memory_bytes, lambda share: builds, had)


# --- a new share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "memory_gb", "share"),
    [
        (1_000, 24, 0.125),
        (100_000, 24, 0.125),
        (300_000, 24, 0.25),
        (1_000_000, 24, 0.5),
        (3_000_000, 24, 1.0),
        (1_000_000, 80, 0.125),
        (3_000_000, 80, 0.5),
        (10_000_000, 80, 1.0),
        (1_000, 4, 0.25),  # an eighth is less than a process takes
        (10_000_000, 24, 1.0),  # lists, which a smaller share would hold with smaller codes only
    ],
)
def test_share_is_the_smallest_that_holds_the_index_of_a_whole_gpu(count: int, memory_gb: int, share: float) -> None:
    assert share_of(count, memory_gb * GB).num_gpus == share


@pytest.mark.parametrize("memory_gb", [12, 16, 24, 48, 80, 141])
@pytest.mark.parametrize("count", [0, 1_000, 50_000, 400_000, 2_000_000, 9_000_000])
def test_no_smaller_share_would_do(count: int, memory_gb: int) -> None:
    """Of the index that is built with it, too, nothing changes against a whole GPU."""
    memory, config = memory_gb * GB, config_of()
    chosen = choose_share(count, config, memory).num_gpus
    best = plan_index(count, config, gpu=GpuFacts(memory)).spec
    assert plan_index(count, config, gpu=GpuFacts(floor(memory * chosen))).spec == best

    def would_do(share: float) -> bool:
        need = gpu_need(best, count, config.dimension)
        grown = replace(need, index=GROWTH * need.index, moved=GROWTH * need.moved)
        same = plan_index(count, config, gpu=GpuFacts(floor(memory * share))).spec == best
        return same and PROCESS_BYTES + grown.load <= memory * share

    assert not any(would_do(share) for share in SHARES if share < chosen)
    assert chosen == 1.0 or would_do(chosen)


def test_room_to_grow_is_for_twice_the_bytes_of_the_index() -> None:
    """At the bound, where the index itself would fit with half as much."""
    config = config_of(kind="flat", num_gpus=None)
    need = gpu_need(plan_index(200_000, config, gpu=GpuFacts()).spec, 200_000, 768)
    bound = 8 * (PROCESS_BYTES + replace(need, index=2 * need.index).load)
    assert choose_share(200_000, config, bound).num_gpus == 0.125
    assert choose_share(200_000, config, bound - 8).num_gpus == 0.25


def test_index_is_built_within_the_share_as_well() -> None:
    """Without a GPU for the build, lists, the same bytes of which take less than their build would."""
    counts = range(100_000, 3_000_000, 50_000)
    shares = [(share_of(n, 24 * GB, kind="ivf_pq").num_gpus, share_of(n, 24 * GB, builds=False, kind="ivf_pq").num_gpus)
              for n in counts]  # fmt: skip
    assert all(elsewhere <= here for here, elsewhere in shares)
    assert any(elsewhere < here for here, elsewhere in shares)


def test_share_depends_on_whether_builds_get_such_a_share() -> None:
    """Where they do not there is no graph, but lists."""
    asked: list[float] = []

    def builds(share: float) -> bool:
        asked.append(share)
        return share < 0.25

    share = choose_share(300_000, config_of(), 24 * GB, builds)
    best = plan_index(300_000, config_of(), gpu=GpuFacts(24 * GB, builds=False)).spec
    assert best.kind == "ivf_flat"
    assert set(asked) <= set(SHARES)
    assert share.reason.endswith(f"holds twice its {best.gpu_bytes} bytes")


@pytest.mark.parametrize("asked", [0.001, 0.3, 1.0])
def test_share_that_a_config_names_is_taken_as_it_is(asked: float) -> None:
    for memory in (None, 24 * GB):
        told = share_of(10_000_000, memory, had=0.25, num_gpus=asked)
        assert told == GpuShare(asked, f"{in_words(asked)} was asked for")


def test_gpus_of_unknown_memory_are_taken_whole() -> None:
    for had in (0.0, 0.25):
        assert share_of(1_000, None, had).num_gpus == 1.0
    assert "nobody tells how much memory" in share_of(1_000, None).reason


def test_index_that_is_for_cpus_asks_for_no_more_than_the_least() -> None:
    assert share_of(1_000, 24 * GB, device="auto") == GpuShare(SHARES[0], "it takes no GPU")


def test_index_that_no_gpu_holds_is_left_to_its_plan() -> None:
    """That refuses it with the numbers."""
    assert share_of(50_000_000, 8 * GB, gpu_full="refuse").num_gpus == 1.0
    assert choose_share(1_000_000, config_of(memory_bytes=1), 24 * GB).num_gpus == 1.0


@pytest.mark.parametrize(
    ("count", "memory_gb", "reason"),
    [
        (1_000, 24, "an eighth of a GPU holds twice its 3076000 bytes"),
        (1_000_000, 24, "half a GPU holds twice its 3328000000 bytes"),
        (3_000_000, 24, "a whole GPU: not even that holds twice its 9984000000 bytes"),
    ],
)
def test_reason_says_what_the_share_holds(count: int, memory_gb: int, reason: str) -> None:
    assert share_of(count, memory_gb * GB).reason == reason


def test_shares_in_words() -> None:
    assert [in_words(share) for share in (*SHARES, 0.3)] == [
        "an eighth of a GPU", "a quarter of a GPU", "half a GPU", "a whole GPU", "0.3 of a GPU"
    ]  # fmt: skip


# --- the share that a collection has ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "had", "share"),
    [
        (100_000, 0.125, 0.125),
        (100_000, 0.25, 0.25),  # twice what would be chosen
        (100_000, 0.3, 0.3),  # as an earlier config said
        (100_000, 0.5, 0.125),  # four times
        (100_000, 1.0, 0.125),
        (300_000, 0.125, 0.125),  # a quarter would be chosen for its growth, but it fits still
        (300_000, 1.0, 0.25),
        (1_000_000, 0.125, 0.5),  # it does not fit any more
        (1_000_000, 0.25, 0.25),
        (1_000_000, 1.0, 1.0),
        (3_000_000, 0.5, 0.5),
    ],
)
def test_share_is_kept_until_the_index_does_not_fit_or_it_is_far_too_large(
    count: int, had: float, share: float
) -> None:
    memory = 24 * GB if count < 3_000_000 else 40 * GB
    assert share_of(count, memory, had).num_gpus == share


def test_collection_that_grows_and_shrinks_around_a_bound_keeps_its_share() -> None:
    bound = next(n for n in range(100_000, 2_000_000, 1_000) if share_of(n, 24 * GB).num_gpus > 0.125)
    had = 0.0
    for count in (bound - 1_000, bound, bound - 1_000, bound + 1_000):
        had = share_of(count, 24 * GB, had).num_gpus
        assert had == 0.125


@pytest.mark.parametrize("index", [{"cpu_twin": False}, {"gpu_full": "refuse"}])
def test_share_without_room_for_two_generations_is_not_kept_where_no_twin_may_answer(index: dict[str, Any]) -> None:
    """A rebuild in it would be refused."""
    assert share_of(300_000, 24 * GB, 0.125).num_gpus == 0.125
    assert share_of(300_000, 24 * GB, 0.125, **index).num_gpus == 0.25
    assert share_of(300_000, 24 * GB, 0.5, **index).num_gpus == 0.5, "it has room"


def test_share_that_is_kept_says_so() -> None:
    assert share_of(1_000_000, 24 * GB, 1.0).reason == (
        "it keeps a whole GPU, which holds its 3328000000 bytes: its replicas go on"
    )


def test_kept_share_builds_the_index_of_a_whole_gpu() -> None:
    for had in SHARES:
        kept = share_of(1_000_000, 24 * GB, had).num_gpus
        spec = plan_index(1_000_000, config_of(), gpu=GpuFacts(floor(24 * GB * kept))).spec
        assert spec == plan_index(1_000_000, config_of(), gpu=GpuFacts(24 * GB)).spec


# --- without points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "share"),
    [
        ({"device": "cpu"}, 0.0),
        ({"device": "auto"}, 0.0),
        ({"device": "auto", "num_gpus": 0.5}, 0.0),
        ({"device": "gpu"}, 0.125),
        ({"device": "gpu", "num_gpus": 0.5}, 0.5),
    ],
)
def test_new_collection_gets_the_least_where_it_asks_for_a_gpu(index: dict[str, Any], share: float) -> None:
    assert share_without_points(config_of(**index)) == share


def test_least_share_is_that_of_a_small_index_or_the_one_that_is_there() -> None:
    config = CollectionConfig(8)
    assert least_share(config) == GpuShare(0.125, "an eighth of a GPU, the least")
    assert least_share(config, SHRINK_FROM * SHARES[0]) == least_share(config)
    assert least_share(replace(config, index=replace(config.index, num_gpus=0.5)), 0.25).num_gpus == 0.5
    assert least_share(config, 0.25) == GpuShare(0.25, "it keeps a quarter of a GPU: its replicas go on")


def test_larger_share_is_taken_where_a_smaller_one_would_have_smaller_codes() -> None:
    count, config = 10_000_000, config_of()
    spec = plan_index(count, config, gpu=GpuFacts(24 * GB)).spec
    assert (spec.kind, spec.params["pq_m"]) == ("ivf_pq", pq_sizes(768)[0])
    in_half = plan_index(count, config, gpu=GpuFacts(12 * GB)).spec
    assert in_half.params["pq_m"] < spec.params["pq_m"]
    assert choose_share(count, config, 24 * GB).num_gpus == 1.0
