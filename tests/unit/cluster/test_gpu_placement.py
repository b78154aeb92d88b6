"""Shares of GPUs in what is wanted and led, GPUs as they are counted, and their memory at a switch of generations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.cluster_gpus import NO_GPUS, ClusterGpus
from cluster.config import CollectionConfig, IndexConfig, ServedOn
from cluster.errors import Exhausted
from cluster.gpu_memory import GPU_MARGIN
from cluster.gpu_policy import share_with_rest
from cluster.manifest_format import added_on, config_built_for
from cluster.placement import (
    Candidate,
    Load,
    ObservedReplica,
    ReplicaKey,
    Start,
    Stop,
    WantedReplica,
    choose_lead,
    held_by_every_shard,
    may_end_logs,
    plan,
    publishable,
    replicas_of,
    stand_ins,
)
from cluster.switch_memory import NodeMemory, ReplicaBytes, switch_memory
from cluster.switch_order import in_switch_order

CPU, GPU = ReplicaKey("words", 0, 1), ReplicaKey("words", 0, 1, 1.0)
SECOND, QUARTER = ReplicaKey("words", 0, 2, 1.0), ReplicaKey("words", 0, 1, 0.25)
PATIENCE_S = 5.0
GIB = 1024**3


# --- keys ---------------------------------------------------------------------------------------------------------


def test_key_of_a_replica_tells_its_share_of_a_gpu() -> None:
    assert [str(key) for key in (CPU, GPU, QUARTER)] == ["words/0/1", "words/0/1/gpu:1", "words/0/1/gpu:0.25"]
    assert str(ReplicaKey("words", 0, 1, 1)) == str(GPU), "as one is written in a config"
    assert [key.device for key in (CPU, GPU, QUARTER)] == ["cpu", "gpu", "gpu"]
    assert sorted([GPU, ReplicaKey("words", 1, 0), QUARTER, CPU]) == [CPU, QUARTER, GPU, ReplicaKey("words", 1, 0)]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.125, 0.25, 1 / 3, 0.3333333, 0.001, 0.1])
def test_key_of_a_replica_survives_its_text(share: float) -> None:
    key = ReplicaKey("words", 0, 1, share)
    assert ReplicaKey.parse(str(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "words/0/1/cpu", "words/0/1/gpu", "words/0/1/gpu:0", "words/0/1/gpu:1/0", "words/0/1/gpu:2",
        "words/0/1/gpu:nan", "words/0/1/gpu:-1", "words/0/1/gpu:1.0", "words/0/1/0.25", "words/0/1/gpu:x", "words/0",
        "words/0/x",
    ],
)  # fmt: skip
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # of int(), of the unpacking, or its own
        ReplicaKey.parse(text)


def test_replicas_of_a_generation_have_its_share() -> None:
    config = CollectionConfig(2, replicas=2)
    assert replicas_of("words", config, 1, 0.25) == [ReplicaKey("words", 0, number, 0.25) for number in range(2)]


def test_generation_is_held_where_its_own_replicas_hold_it() -> None:
    both = {CPU: ObservedReplica("ready", 2, (1, 2)), GPU: ObservedReplica("ready", 2, (2,))}
    assert held_by_every_shard({GPU}, both, 2)
    assert not held_by_every_shard({GPU}, both | {GPU: ObservedReplica("failed", 2, (2,))}, 2)
    assert not held_by_every_shard({GPU}, both, 1)
    assert held_by_every_shard({GPU}, {GPU: ObservedReplica("starting"), SECOND: both[GPU]}, 2), "it stands in"


# --- who leads ----------------------------------------------------------------------------------------------------


def ready(lsn: int = 7, epoch: int = 0, **more: Any) -> Candidate:
    return Candidate("ready", lsn, epoch, **more)


@pytest.mark.parametrize(
    ("replicas", "staying", "chosen"),
    [
        ({CPU: ready(epoch=3), GPU: ready()}, {CPU, GPU}, None),
        ({CPU: ready(epoch=3), GPU: ready()}, None, None),
        ({CPU: ready(epoch=3), GPU: ready()}, {GPU}, GPU),
        ({CPU: ready(epoch=3), GPU: ready(6), SECOND: ready(7)}, {GPU, SECOND}, SECOND),
        ({CPU: ready(epoch=3), GPU: ready(epoch=4)}, {GPU}, None),  # it does, by now
        ({CPU: ready(epoch=3), GPU: ready(asked=True), SECOND: ready()}, {GPU, SECOND}, None),
        ({CPU: ready(epoch=3), GPU: ready(refused=True), SECOND: ready(3)}, {GPU, SECOND}, SECOND),
        ({CPU: ready(epoch=3), GPU: ready(refused=True)}, {GPU}, None),
        ({CPU: ready(epoch=3), GPU: Candidate("starting")}, {GPU}, None),
        ({CPU: ready(epoch=3), GPU: ready(log_set=None)}, {GPU}, None),  # it holds nothing yet
        ({CPU: ready(9), GPU: ready(7)}, {GPU}, GPU),  # nobody leads
        ({CPU: ready(9), GPU: ready(refused=True)}, {GPU}, CPU),
    ],
)
def test_lead_goes_to_a_replica_that_stays(
    replicas: dict[ReplicaKey, Candidate], staying: set[ReplicaKey] | None, chosen: ReplicaKey | None
) -> None:
    assert choose_lead(replicas, CPU, PATIENCE_S, staying) == chosen


# --- in which order they load -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.25)])
def test_replicas_with_two_shares_do_not_wait_for_each_other(before: float, after: float) -> None:
    """The old ones have to load a newer version of what is served, the others the generation that comes."""
    old = WantedReplica(3, 1, 1, 0.0, before, served=3, served_generation=1)
    new = WantedReplica(4, 2, 1, 0.0, after)
    wanted = {ReplicaKey("words", 0, number, before): old for number in range(2)}
    wanted |= {ReplicaKey("words", 0, number, after): new for number in range(2)}
    observed = {
        key: ObservedReplica("ready", 1, (1,)) if key.num_gpus == before else ObservedReplica("failed")
        for key in wanted
    }
    ordered = in_switch_order(plan(wanted, observed), wanted, observed)
    assert set(ordered) == {Load(key, one.version) for key, one in wanted.items()}


# --- what is counted ----------------------------------------------------------------------------------------------


def test_gpus_of_a_cluster_are_those_of_its_nodes_and_the_smallest_memory_counts() -> None:
    assert ClusterGpus.of([2.0, 1.0], [0.5, 0.0, 1.0], [(80, "large"), (24, "small")]) == ClusterGpus(
        3.0, 1.5, 24, "small", (0.5, 0.0, 1.0)
    )
    assert ClusterGpus.of([1.0], [1.0], []) == ClusterGpus(1.0, 1.0, None, "", (1.0,))
    assert ClusterGpus.of([], [], []) == NO_GPUS == ClusterGpus()


@pytest.mark.parametrize(
    ("free", "num_gpus", "held", "usable"),
    [
        ([2.0, 1.0], 1.0, 0.0, 3.0),
        ([0.5, 0.5], 1.0, 0.0, 0.0),  # of two GPUs
        ([0.5, 0.5], 0.5, 1.0, 1.0),
        ([0.4, 0.4, 0.4], 0.6, 1.8, 0.0),
        ([1.2], 0.6, 1.8, 0.0),  # what three replicas leave of three GPUs
        ([2.2], 0.6, 1.8, 1.0),
        ([0.4, 1.0], 0.6, 0.6, 1.0),
        ([1.0], 0.3, 0.0, 1.0),
        ([0.7], 0.3, 0.3, 2 / 3),
    ],
)
def test_of_free_gpus_those_count_that_can_be_had_in_shares_of_one(
    free: list[float], num_gpus: float, held: float, usable: float
) -> None:
    own = {num_gpus: held}
    assert ClusterGpus.of([4.0], free, []).free_in_shares(num_gpus, own) == pytest.approx(usable)


@pytest.mark.parametrize(
    ("free", "num_gpus", "held", "usable"),
    [
        ([0.8], 0.5, {0.6: 1.2}, 0.0),  # 0.4 of each of two GPUs
        ([0.8], 0.25, {0.6: 1.2}, 0.5),
        ([0.8], 0.4, {0.6: 1.2}, 1.0),  # one of each; with what two leave of one GPU
        ([1.0], 0.5, {1.0: 1.0}, 1.0),
        ([0.5], 0.25, {0.25: 0.25, 0.125: 0.25}, 0.5),
        ([0.6], 0.5, {0.7: 1.4}, 0.0),
    ],
)
def test_what_own_replicas_with_another_share_leave_of_their_gpus_counts_where_it_holds_a_share(
    free: list[float], num_gpus: float, held: dict[float, float], usable: float
) -> None:
    assert ClusterGpus.of([4.0], free, []).free_in_shares(num_gpus, held) == pytest.approx(usable)


@pytest.mark.parametrize("gpus", [1, 2, 3])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0])
def test_other_shares_that_are_counted_are_those_that_fit_beside_own_replicas(gpus: int, share: float) -> None:
    """Of one node, each of whose GPUs is filled before the next one."""
    left = [1.0] * gpus
    for held in range(9):
        for asked in (0.125, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0):
            there = ClusterGpus(float(gpus), sum(left))
            found = there.free_in_shares(asked, {share: share * held} if held else {}) / share_with_rest(asked)
            fitting = sum(int(each / asked + 1e-6) for each in left)
            assert round(found) <= fitting, (held, asked)
            assert round(found) == fitting or gpus == 3, (held, asked)
        room = [each for each in left if each > share - 1e-6]
        if not room:
            break
        left[left.index(min(room))] -= share


@pytest.mark.parametrize(
    ("index", "device", "built"),
    [
        (IndexConfig(), "gpu", IndexConfig(device="gpu")),
        (IndexConfig(device="gpu"), "cpu", IndexConfig(device="cpu")),
        (IndexConfig("ivf_pq", nlist=8), "gpu", IndexConfig("ivf_pq", device="gpu", nlist=8)),
        (
            IndexConfig("cagra", 0.9, num_gpus=0.5, codes="float16", graph_degree=32),
            "gpu",
            IndexConfig("auto", 0.9, "gpu", num_gpus=0.5),
        ),
    ],
)
def test_segments_are_added_for_the_device_of_the_generation_by_kinds_that_cpus_build(
    index: IndexConfig, device: ServedOn, built: IndexConfig
) -> None:
    assert config_built_for(CollectionConfig(8, index=index), device) == CollectionConfig(8, index=built)
    facts = added_on(device)
    assert (facts is None) == (device == "cpu")
    assert facts is None or not facts.builds


# --- a lost GPU -------------------------------------------------------------------------------------------------------


def test_replica_that_lost_its_gpu_is_ended_while_another_of_its_shard_has_one() -> None:
    one, two, other = (ReplicaKey("words", *numbers, 1.0) for numbers in ((0, 0), (0, 1), (1, 0)))
    wanted = dict.fromkeys([one, two, other], WantedReplica(7, 3, 2, 1.0, 1.0, served=6, served_generation=2))
    well, lost = ObservedReplica("ready", 7, (2, 3)), ObservedReplica("ready", 7, (2, 3), gpu_lost=True)
    alone = {one: well, two: well, other: lost}
    assert plan(wanted, alone) == []
    assert plan(wanted, {**alone, one: lost}) == [Stop(one)]
    assert plan(wanted, {**alone, one: lost, two: lost}) == [], "somebody has to answer"
    assert plan(wanted, {**alone, one: lost, two: ObservedReplica("starting")}) == []
    assert plan(wanted, {**alone, one: lost, two: ObservedReplica("ready", 7, (3,))}) == [Load(two, 6)]
    assert plan(wanted, {two: well, other: lost}) == [Start(one, wanted[one])]
    mute = replace(lost, has_twin=False)
    assert plan(wanted, {**alone, one: mute, two: mute, other: mute}) == [Stop(one), Stop(two), Stop(other)]


FIRST, NEXT, MORE = (ReplicaKey("words", 0, number, 1.0) for number in range(3))
WELL = ObservedReplica("ready", 7, (3,), on_gpu=True)
LOST = ObservedReplica("ready", 7, (3,), gpu_lost=True)
NO_GPU = ObservedReplica("ready", 7, (3,))  # its process found none: the twin answers
LOADS = ObservedReplica("ready", 6, (2,), on_gpu=True)
STARTS, FAILED = ObservedReplica("starting"), ObservedReplica("failed")
MUTE = replace(LOST, has_twin=False)


@pytest.mark.parametrize(
    ("first", "second", "more", "stands_in", "actions"),
    [
        (LOST, LOST, None, True, [Start]),
        (LOST, FAILED, None, True, [Load, Start]),
        (LOST, WELL, None, False, [Stop]),
        (LOST, NO_GPU, None, False, [Stop]),
        (LOST, STARTS, None, False, []),  # it comes back with a GPU, or waits for one as well
        (LOST, None, None, False, [Start]),
        (LOST, LOADS, None, False, [Load]),
        (NO_GPU, NO_GPU, None, False, []),
        (FAILED, FAILED, None, False, [Load, Load]),
        (WELL, WELL, None, False, []),
        (MUTE, MUTE, None, False, [Stop, Stop]),
        (MUTE, LOST, None, False, [Stop]),
        (replace(FAILED, gpu_lost=True), WELL, None, False, [Stop]),
        (replace(FAILED, gpu_lost=True), STARTS, None, False, [Stop]),
        (LOST, LOST, STARTS, True, []),  # it waits for a GPU
        (LOST, LOST, FAILED, True, [Load]),
        (LOST, LOST, LOADS, True, [Load]),
        (LOST, LOST, WELL, True, [Stop, Stop]),  # of those that are lost
        (LOST, LOST, NO_GPU, True, [Stop, Stop]),
        (LOST, LOST, LOST, False, [Stop]),  # to be started again
        (None, STARTS, WELL, True, [Start]),
        (STARTS, STARTS, WELL, True, []),
        (LOADS, STARTS, WELL, True, [Load]),
        (NO_GPU, STARTS, WELL, True, []),  # what has a GPU stays
        (NO_GPU, STARTS, NO_GPU, False, [Stop]),
        (WELL, STARTS, WELL, False, [Stop]),
        (WELL, LOST, STARTS, False, [Stop, Stop]),  # the first of them came back by itself
    ],
)
def test_one_more_replica_stands_in_where_all_of_a_shard_lost_their_gpus(
    first: ObservedReplica | None,
    second: ObservedReplica | None,
    more: ObservedReplica | None,
    stands_in: bool,
    actions: list[Any],
) -> None:
    wanted = dict.fromkeys([FIRST, NEXT], WantedReplica(7, 3, 1, 1.0, 0.5, served=7, served_generation=3))
    observed = {key: one for key, one in {FIRST: first, NEXT: second, MORE: more}.items() if one is not None}
    found = stand_ins(wanted, observed)
    assert found == ({MORE: wanted[FIRST]} if stands_in else {})
    assert [type(action) for action in plan(wanted | found, observed)] == actions


@pytest.mark.parametrize(
    "change",
    [
        {"served": 6, "served_generation": 2},  # another generation is on its way
        {"served": None, "served_generation": None},  # nothing is served
    ],
)
def test_none_stands_in_unless_what_is_served_is_the_newest(change: dict[str, Any]) -> None:
    wanted = {FIRST: replace(WantedReplica(7, 3, 1, 1.0, 0.5, served=7, served_generation=3), **change)}
    for more in ({}, {NEXT: WELL}):
        assert stand_ins(wanted, {FIRST: LOST, **more}) == {}


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_none_stands_in_while_a_newer_generation_with_another_share_is_on_its_way(share: float) -> None:
    other = ReplicaKey("words", 0, 0, share)
    wanted = {
        FIRST: WantedReplica(7, 3, 1, 1.0, 1.0, served=7, served_generation=3),
        other: WantedReplica(8, 4, 1, 1.0),
    }
    assert stand_ins(wanted, {FIRST: LOST}) == {}
    assert stand_ins(wanted, {FIRST: LOST, NEXT: WELL}) == {}, "the twin answers"
    assert stand_ins(wanted, {FIRST: STARTS, NEXT: WELL}) == {NEXT: wanted[FIRST]}, "nobody else does"


@pytest.mark.parametrize(
    ("first", "more", "stays"),
    [
        (STARTS, LOADS, True),
        (FAILED, LOADS, True),
        (None, LOADS, True),
        (ObservedReplica("ready", 7, (3,)), LOADS, True),  # it holds what is not served yet
        (replace(LOADS, gpu_lost=True, has_twin=False), LOADS, True),  # it answers nothing
        (replace(LOADS, gpu_lost=True), LOADS, False),
        (LOADS, LOADS, False),
        (STARTS, STARTS, False),
        (STARTS, WELL, False),  # it does not hold what is served
    ],
)
def test_replica_that_stands_in_goes_over_to_the_next_generation_where_it_alone_answers(
    first: ObservedReplica | None, more: ObservedReplica, stays: bool
) -> None:
    wanted = {FIRST: WantedReplica(7, 3, 1, 1.0, 0.5, served=6, served_generation=2)}
    observed = {NEXT: more} | ({} if first is None else {FIRST: first})
    found = stand_ins(wanted, observed)
    assert found == ({NEXT: wanted[FIRST]} if stays else {})
    assert (Load(NEXT, 7) in plan(wanted | found, observed)) == stays


def test_all_lost_gpus_of_a_shard_are_had_again_while_one_replica_answers_at_any_time() -> None:
    wanted = dict.fromkeys([FIRST, NEXT], WantedReplica(7, 3, 1, 1.0, 0.5, served=7, served_generation=3))
    observed, done = {FIRST: LOST, NEXT: LOST}, []
    for _ in range(10):
        all_wanted = wanted | stand_ins(wanted, observed)
        for action in plan(all_wanted, observed):
            done.append((type(action), action.key))
            if isinstance(action, Stop):
                del observed[action.key]
            else:
                observed[action.key] = WELL
        assert any(replica.state == "ready" for replica in observed.values())
    assert observed == {FIRST: WELL, NEXT: WELL}
    assert done == [
        (Start, MORE), (Stop, FIRST), (Stop, NEXT), (Start, FIRST), (Start, NEXT), (Stop, MORE),
    ]  # fmt: skip


def test_none_stands_in_on_cpus_and_each_shard_has_its_own() -> None:
    cpu = ReplicaKey("words", 0, 0)
    other = ReplicaKey("words", 1, 0, 1.0)
    wanted = dict.fromkeys([cpu, FIRST, other], WantedReplica(7, 3, 1, 1.0, served=7, served_generation=3))
    assert stand_ins(wanted, {cpu: LOST, FIRST: LOST, other: WELL}).keys() == {NEXT}
    assert stand_ins(wanted, {FIRST: LOST, other: LOST}).keys() == {NEXT, ReplicaKey("words", 1, 1, 1.0)}


def test_replica_that_stands_in_keeps_nothing_back_and_counts_where_its_shard_has_no_other() -> None:
    wanted = {FIRST: WantedReplica(7, 3, 1, 1.0, 0.5, served=7, served_generation=3)}
    assert publishable(wanted, {FIRST: LOST, NEXT: STARTS}, 3)
    assert publishable(wanted, {FIRST: LOST, NEXT: LOADS}, 3)
    assert publishable(wanted, {FIRST: STARTS, NEXT: WELL}, 3), "a new supervisor finds it answering alone"
    assert not publishable(wanted, {FIRST: LOADS, NEXT: WELL}, 3)
    assert not publishable(wanted, {FIRST: STARTS, NEXT: LOADS}, 3)


def test_logs_end_for_a_replica_that_stands_in_where_its_shard_has_no_other() -> None:
    wanted = {FIRST: WantedReplica(8, 4, 1, 1.0, 0.5, served=7, served_generation=3)}
    near, far = (replace(WELL, crossing={4: lacks}) for lacks in (0, 10_000))
    assert may_end_logs(wanted, {FIRST: STARTS, NEXT: near}, 4)
    assert not may_end_logs(wanted, {FIRST: STARTS, NEXT: far}, 4)
    assert not may_end_logs(wanted, {FIRST: far, NEXT: near}, 4)
    assert may_end_logs(wanted, {FIRST: near, NEXT: far}, 4), "it keeps nothing back"


def test_replica_with_another_share_does_not_answer_for_one_that_lost_its_gpu() -> None:
    """It is to take over, and only holds what is served because it seals."""
    old = WantedReplica(2, 2, 1, 1.0, 1.0, served=2, served_generation=2)
    wanted = {GPU: old, QUARTER: WantedReplica(3, 3, 1, 1.0, 0.25)}
    well, lost = ObservedReplica("ready", 3, (2, 3)), ObservedReplica("ready", 2, (2,), gpu_lost=True)
    assert plan(wanted, {GPU: lost, QUARTER: well}) == []
    assert (
        plan(
            wanted, {GPU: ObservedReplica("ready", 2, (2,)), QUARTER: ObservedReplica("ready", 3, (3,), gpu_lost=True)}
        )
        == []
    )


# --- memory of a switch -------------------------------------------------------------------------------------------

ROOMY = {"a": NodeMemory(900 * GIB, 1_000 * GIB)}


def on_gpu(shard: int, loaded: float, coming: float, left: float | None) -> ReplicaBytes:
    """In GiB; what is coming is given with the margin."""
    there = None if left is None else int(left * GIB)
    return ReplicaBytes(shard, "a", 0, 0, int(loaded * GIB), int(coming / GPU_MARGIN * GIB), there)


def test_generation_that_fits_beside_on_every_gpu_is_loaded_so() -> None:
    told = switch_memory([on_gpu(0, 4, 5, 5), on_gpu(1, 4, 5, None)], ROOMY, twin_may_answer=False)
    assert (told.mode, told.short_of_gpu) == ("beside", ())
    assert "short_of_gpu" not in told.to_dict()


def test_twin_answers_where_a_gpu_has_no_room_for_both() -> None:
    replicas = [on_gpu(0, 4, 5, 4), on_gpu(1, 4, 5, 1), on_gpu(2, 4, 5, 5)]
    told = switch_memory(replicas, ROOMY)
    assert (told.mode, told.short_of_gpu) == ("beside", (replicas[1], replicas[0]))
    assert (
        "shard 1 needs 5.00 GiB on its GPU of node a beside the 4.00 GiB that are loaded, 1.00 GiB are there; shard 0 "
        "needs 5.00 GiB on its GPU of node a beside the 4.00 GiB that are loaded, 4.00 GiB are there; of 2 replicas "
        "the twin on the host answers until there is room; the new generation is loaded beside what is served"
    ) in told.statement
    facts = told.to_dict()["short_of_gpu"]
    assert isinstance(facts, list)
    assert [(each["shard"], each["available_bytes"]) for each in facts] == [(1, GIB), (0, 4 * GIB)]


def test_replicas_whose_twin_may_not_answer_go_over_one_at_a_time_or_not_at_all() -> None:
    two = [on_gpu(0, 4, 5, 1), on_gpu(0, 4, 5, 5)]
    assert switch_memory(two, ROOMY, twin_may_answer=False).mode == "one_at_a_time"
    with pytest.raises(Exhausted, match=r"GPU memory of the switch: shard 0 needs 5\.00 GiB .*, 1\.00 GiB are there\."):
        switch_memory(two[:1], ROOMY, twin_may_answer=False)
    with pytest.raises(Exhausted, match=r"0\.50 GiB are there\. .*index\.cpu_twin"):
        switch_memory([on_gpu(0, 4, 5, 0.5), two[1]], ROOMY, twin_may_answer=False)
