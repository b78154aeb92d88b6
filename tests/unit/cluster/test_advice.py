from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.advice import (
    KIND_SHARE,
    REASON_KINDS,
    AdviceFacts,
    IndexFacts,
    ObservedRecall,
    ShardFacts,
    kind_for,
    rebuild_advice,
)
from cluster.config import CollectionConfig, IndexConfig, Upkeep
from cluster.errors import Invalid
from cluster.index_policy import FLAT_FLOATS_MAX

BOUNDS = Upkeep(seal_points=1_000, rebuild_growth=4.0, rebuild_loose_share=0.3, rebuild_recall_margin=0.02)
HNSW = CollectionConfig(64, index=IndexConfig(kind="hnsw", target_recall=0.9))
AUTO = CollectionConfig(100)
FLAT_MAX = FLAT_FLOATS_MAX // AUTO.dimension


def segment(count: int, live: int | None = None, kind: str = "hnsw", planned: str = "") -> IndexFacts:
    return IndexFacts(count, count if live is None else live, planned or kind, kind)


def advised(*shards: ShardFacts, config: CollectionConfig = HNSW, **bounds: Any) -> dict[str, str]:
    """Reason by kind."""
    told = rebuild_advice(AdviceFacts(config, shards), replace(BOUNDS, **bounds))
    assert [each.kind for each in told] == [kind for kind in REASON_KINDS if kind in {each.kind for each in told}]
    return {each.kind: each.reason for each in told}


def one(*segments: IndexFacts, **more: Any) -> ShardFacts:
    return ShardFacts(0, segments, **more)


def test_a_shard_of_one_trained_segment_needs_no_rebuild_nor_does_an_empty_one() -> None:
    assert advised(one(segment(100_000)), ShardFacts(1)) == {}
    assert advised(ShardFacts(0, tail_points=900)) == {}


def test_growth_is_told_beyond_the_factor_and_not_at_it() -> None:
    equal = [segment(1_000)] * 4
    assert "growth" not in advised(one(*equal))
    told = advised(one(*equal, tail_points=1))
    assert told["growth"] == (
        "shard 0: its largest index was trained on 1,000 points, of 4,001 that there are now; rebuild_growth is 4"
    )
    assert "growth" not in advised(one(*equal, tail_points=1), rebuild_growth=5.0)


def test_growth_beyond_what_one_index_can_hold_is_no_reason() -> None:
    full = one(*[segment(1_000)] * 50, points_max=2_000)
    assert "growth" not in advised(full)
    assert "growth" in advised(replace(full, points_max=5_000))


def test_scattered_rows_are_told_beyond_the_share_where_upkeep_leaves_them() -> None:
    shard = one(segment(10_000, live=8_000), segment(900), segment(800), tail_points=500)
    told = advised(shard)
    assert told["scattered"] == (
        "shard 0: of 12,200 rows 2,000 are deleted, 500 in no segment and 1,700 in small ones; rebuild_loose_share "
        "is 0.3"
    )
    assert "scattered" not in advised(shard, rebuild_loose_share=0.35)
    assert "scattered" not in advised(replace(shard, upkeep_due=True))


def test_few_rows_outside_a_large_segment_are_no_reason_whatever_their_share() -> None:
    assert "scattered" not in advised(one(segment(1_000, live=500), tail_points=500))
    assert "scattered" in advised(one(segment(1_000, live=500), tail_points=501))


def test_recall_is_told_only_where_its_interval_lies_below_the_target_and_the_margin() -> None:
    def seen(high: float) -> ShardFacts:
        return one(segment(1_000), observed=ObservedRecall(0.85, 0.8, high, 321))

    assert "recall" not in advised(seen(0.88))
    assert advised(seen(0.879))["recall"] == (
        "shard 0: live queries have recall 0.850 (0.800 to 0.879 with 95% confidence, 321 queries), the target is 0.9"
    )
    assert "recall" in advised(seen(0.88), rebuild_recall_margin=0.0)


def test_another_kind_of_index_is_told_once_the_policy_would_choose_it_with_room() -> None:
    flat = segment(FLAT_MAX // 2, kind="flat")
    assert kind_for(AUTO, FLAT_MAX // 2) == "flat"
    beyond = int(FLAT_MAX * 1.1)
    assert kind_for(AUTO, beyond) == "hnsw"
    assert "index_kind" not in advised(one(flat, tail_points=beyond - flat.count), config=AUTO)
    far = int(FLAT_MAX / KIND_SHARE * 1.1)
    told = advised(one(flat, tail_points=far - flat.count), config=AUTO)
    assert told["index_kind"].startswith("shard 0: flat was chosen for 30,000 points, hnsw would be for the 82,500")


def test_kind_that_was_named_or_that_the_vectors_asked_for_is_no_reason() -> None:
    named = replace(AUTO, index=IndexConfig("flat"))
    assert "index_kind" not in advised(one(segment(500_000, kind="flat")), config=named)
    departed = segment(500_000, kind="ivf_pq", planned="hnsw")
    assert kind_for(AUTO, 500_000) == "hnsw"
    assert "index_kind" not in advised(one(departed), config=AUTO)
    assert "index_kind" in advised(one(replace(departed, planned="ivf_pq")), config=AUTO)


def test_what_a_gpu_should_have_is_not_known_and_no_reason() -> None:
    """The supervisor does not know what fits the GPUs: it would advise a rebuild for ever."""
    there = replace(segment(500_000, kind="cagra"), device="gpu")
    assert "index_kind" not in advised(one(there), config=AUTO)
    assert "index_kind" in advised(one(replace(there, device="cpu")), config=AUTO)
    stepped_down = replace(AUTO, index=IndexConfig(device="gpu"))
    assert kind_for(stepped_down, 5_000_000) == "cagra"
    assert "index_kind" not in advised(one(segment(5_000_000, kind="hnsw")), config=stepped_down)
    assert "growth" in advised(one(*[there] * 9), config=AUTO)


def test_kind_is_that_for_the_whole_shard_also_where_it_has_many_segments() -> None:
    """A rebuild gives all of them the kind that is chosen for the shard."""
    bounded = replace(AUTO, index=IndexConfig(memory_bytes=200_000_000))
    assert (kind_for(bounded, 200_000), kind_for(bounded, 1_000_000)) == ("hnsw", "ivf_pq")
    shard = one(*[segment(200_000, kind="ivf_pq")] * 5, points_max=200_000)
    assert "index_kind" not in advised(shard, config=bounded)


def test_kind_that_measured_rates_have_ruled_out_is_no_reason() -> None:
    """The builder knows how fast its node is, the supervisor does not."""
    bounded = replace(AUTO, index=IndexConfig(build_seconds=30.0))
    assert (kind_for(bounded, 200_000), kind_for(bounded, 480_000)) == ("hnsw", "ivf_pq")
    slow = segment(200_000, kind="ivf_pq")
    assert "index_kind" not in advised(one(slow), config=bounded)
    assert "index_kind" in advised(one(segment(200_000), tail_points=400_000), config=bounded)


def test_kind_that_nothing_fits_is_no_reason() -> None:
    tight = replace(AUTO, index=IndexConfig(memory_bytes=1_000))
    assert kind_for(tight, 500_000) == ""
    assert "index_kind" not in advised(one(segment(500_000, kind="flat")), config=tight)


def test_reason_names_the_first_shard_and_counts_the_others() -> None:
    grown = (segment(1_000), *[segment(999)] * 4)
    told = advised(ShardFacts(0, (segment(9_000),)), ShardFacts(2, grown), ShardFacts(1, grown))
    assert told["growth"].startswith("shard 1: its largest index was trained on 1,000 points")
    assert told["growth"].endswith(", and 1 more of 3 shards")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rebuild_growth", 0.5),
        ("rebuild_growth", float("inf")),
        ("rebuild_growth", float("nan")),
        ("rebuild_loose_share", 0.0),
        ("rebuild_loose_share", 1.5),
        ("rebuild_recall_margin", -0.1),
        ("rebuild_recall_margin", 1.0),
        ("rebuild_recall_margin", "0.1"),
    ],
)
def test_bound_that_is_no_bound_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(Invalid) as caught:
        Upkeep(**{name: wrong})
    assert [error.field for error in caught.value.errors] == [f"upkeep.{name}"]
