"""The observed recall: who is sampled, what it costs, what is told. Truth comes from a shard of points on a line."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import recall_observer
from actors.ray_replica import ShardActor
from actors.recall_observer import (
    BATCH_QUERIES,
    QUEUE_QUERIES,
    REST_MIN_S,
    VIEWS_WAITING,
    WINDOW_QUERIES,
    RecallObserver,
)
from cluster.config import CollectionConfig, IndexConfig, Settings
from cluster.errors import EaglerayError, Invalid, Unavailable
from cluster.object_store import open_store
from cluster.placement import ReplicaKey
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.fakes import ManualClock
from tests.unit.actors.points import Vectors, commit, random_points, random_vectors

SEED = 20261122
TUNED = SearchParams()


class LineShard:
    """Point i lies at i; `search` answers exactly, after `work_s` on the clock. Records what it was asked."""

    def __init__(self, points: int = 100, generations: Sequence[int] = (1,), clock: ManualClock | None = None) -> None:
        self.points = points
        self.generations = set(generations)
        self.clock = clock or ManualClock()
        self.work_s = 0.0
        self.error: Exception | None = None
        self.outcome: EaglerayError | None = None
        self.asked: list[ShardSearch] = []

    def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        self.asked.append(request)
        self.clock.advance(self.work_s)
        if self.error:
            raise self.error
        if request.generation not in self.generations:
            raise Unavailable(f"generation {request.generation} of 'line' is not loaded here", 0.1)
        (group,) = request.groups
        return (self.outcome or answered([self.nearest(float(x), group.k) for x in request.vectors[:, 0]]),)

    def nearest(self, x: float, k: int) -> list[int]:
        return sorted(range(self.points), key=lambda i: (abs(i - x), i))[:k]


def answered(ids: list[list[int]]) -> Hits:
    flat = [value for line in ids for value in line]
    return Hits(np.array([len(line) for line in ids]), pa.array(flat, pa.int64()), np.zeros(len(flat), np.float32))


def at(*places: float) -> Vectors:
    return np.array(places, np.float32)[:, None]


def offer(
    observer: RecallObserver,
    shard: LineShard,
    vectors: Vectors,
    ids: list[list[int]],
    k: int = 10,
    generation: int = 1,
    params: SearchParams = TUNED,
) -> None:
    group = SearchGroup(0, len(vectors), k, params)
    observer.offer(ShardSearch(generation, vectors, (group,)), (answered(ids),), shard.search)


def offer_right(observer: RecallObserver, shard: LineShard, count: int, k: int = 10, generation: int = 1) -> None:
    """Queries at 0, 1, ... that were answered as they should be."""
    vectors = at(*range(count))
    offer(observer, shard, vectors, [shard.nearest(float(x), k) for x in range(count)], k, generation)


def told(observer: RecallObserver, generation: int = 1) -> dict[str, Any]:
    facts = observer.observed(generation)
    assert facts is not None
    return facts


def observer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "recall-observer"}


def places_asked(shard: LineShard) -> list[float]:
    return [float(x) for request in shard.asked for x in request.vectors[:, 0]]


# --- who is sampled ---------------------------------------------------------------------------------------------


def test_nothing_is_sampled_with_share_zero() -> None:
    shard = LineShard()
    observer = RecallObserver(share=0.0, duty=1.0)
    for _ in range(100):
        offer_right(observer, shard, 50, k=1)
    observer.drain()
    assert (shard.asked, observer.observed(1)) == ([], None)
    before = observer_threads()
    observer.start()
    assert observer_threads() - before == set()


def test_share_of_queries_is_sampled_whatever_the_size_of_the_groups() -> None:
    places = {}
    for size in (1, 7, 400):
        shard = LineShard(points=1)
        observer = RecallObserver(share=0.02, duty=1.0, uniform=Random(SEED).random)
        for start in range(0, 11_200, size):
            offer(observer, shard, at(*range(start, start + size)), [[0]] * size, k=1)
            observer.drain()
        places[size] = places_asked(shard)
    assert places[1] == places[7] == places[400]
    assert 224 - 4 * 15 < len(places[1]) < 224 + 4 * 15  # of a binomial with deviation 15, seed above
    thirds = np.histogram(places[1], bins=3, range=(0, 11_200))[0]
    assert thirds.min() > 224 / 3 - 4 * 9, thirds


@pytest.mark.parametrize(
    "params",
    [
        SearchParams(nprobe=3),
        SearchParams(ef_search=30),
        SearchParams(rerank=2.0),
        SearchParams(target_recall=0.9),
        SearchParams(exact=True),
    ],
)
def test_queries_with_options_of_their_own_are_not_sampled(params: SearchParams) -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(3), [[3]], k=1, params=params)
    observer.drain()
    assert observer.observed(1) is None
    offer(observer, shard, at(3), [[3]], k=1)
    observer.drain()
    assert told(observer)["queries"] == 1


def test_answers_of_a_twin_are_not_sampled() -> None:
    """What a GPU should have answered says nothing about the index when its twin did."""
    shard, observer = LineShard(), RecallObserver(share=1.0, duty=1.0)
    request = ShardSearch(1, at(3), (SearchGroup(0, 1, 1, TUNED),))
    (hits,) = shard.search(request)
    assert isinstance(hits, Hits)
    observer.offer(request, (replace(hits, degraded="cpu"),), shard.search)
    observer.drain()
    assert observer.observed(1) is None
    observer.offer(request, (hits,), shard.search)
    observer.drain()
    assert told(observer)["queries"] == 1


def test_groups_are_sampled_each_by_its_own_answer() -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    groups = (
        SearchGroup(0, 1, 1, TUNED),
        SearchGroup(1, 2, 1, TUNED),  # went wrong
        SearchGroup(2, 4, 2, TUNED),
    )
    outcomes = (answered([[7]]), Invalid.at("k", "is wrong"), answered([[], [30, 99]]))
    observer.offer(ShardSearch(1, at(7, 8, 20, 30), groups), outcomes, shard.search)
    observer.drain()
    assert places_asked(shard) == [7, 20, 30]
    assert told(observer)["recall"] == round((1.0 + 0.0 + 0.5) / 3, 4)


def test_sample_outlives_the_batch_it_came_with() -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    vectors = at(7)
    offer(observer, shard, vectors, [[7]], k=1)
    vectors[:] = 50
    observer.drain()
    assert told(observer)["recall"] == 1.0


def test_full_queue_drops_the_newest_and_counts_them() -> None:
    shard = LineShard(points=1)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(*range(QUEUE_QUERIES + 50)), [[0]] * (QUEUE_QUERIES + 50), k=1)
    assert observer.dropped == 50
    observer.drain()
    assert places_asked(shard) == list(range(QUEUE_QUERIES))
    assert (told(observer)["queries"], told(observer)["dropped"]) == (QUEUE_QUERIES, 50)
    offer(observer, shard, at(5), [[0]], k=1)
    assert observer.dropped == 50, "there is room again"


def test_error_while_sampling_is_logged_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    observer = RecallObserver(share=1.0, duty=1.0)
    observer.offer(
        ShardSearch(1, at(1), (SearchGroup(0, 1, 1, TUNED),)), (), LineShard().search
    )  # fewer answers than groups
    assert "sampling queries" in caplog.text


# --- what it finds ----------------------------------------------------------------------------------------------


def test_recall_is_the_share_of_the_best_that_was_answered() -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    right = shard.nearest(50.0, 10)
    for wrong in (0, 3, 10):
        offer(observer, shard, at(50), [right[wrong:] + [90, 91, 92, 93, 94, 95, 96, 97, 98, 99][:wrong]])
    observer.drain()
    facts = told(observer)
    assert (facts["generation"], facts["recall"], facts["queries"], facts["k"]) == (1, round(1.7 / 3, 4), 3, 10)
    assert facts["low"] < facts["recall"] < facts["high"]


def test_only_the_first_ten_hits_of_a_query_count() -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    right = shard.nearest(50.0, 20)
    offer(observer, shard, at(50), [right[:10] + [90] * 10], k=20)
    offer(observer, shard, at(50), [[90] * 10 + right[:10]], k=20)
    observer.drain()
    assert (told(observer)["recall"], told(observer)["k"]) == (0.5, 10)
    assert shard.asked[0].groups[0].k == 10


def test_query_for_fewer_hits_counts_at_its_own_k() -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(50), [[50, 49]], k=2)
    observer.drain()
    assert (told(observer)["recall"], told(observer)["k"]) == (1.0, 2)
    offer(observer, shard, at(50), [shard.nearest(50.0, 5)], k=5)
    offer(
        observer, shard, at(50), [[51, 52]], k=2
    )  # 50 and 49 would be right: 51 is as far as 49, and has the larger id
    observer.drain()
    assert (told(observer)["recall"], told(observer)["k"]) == (round(2 / 3, 4), 5)


def test_shard_with_fewer_points_than_asked_for_is_measured_on_those() -> None:
    shard = LineShard(points=4)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(0), [[0, 1, 2]])
    observer.drain()
    assert told(observer)["recall"] == 0.75


def test_shard_without_points_has_no_recall() -> None:
    shard = LineShard(points=0)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(0), [[]])
    observer.drain()
    assert observer.observed(1) is None


def test_truth_of_many_queries_is_asked_for_at_once_and_exactly() -> None:
    shard = LineShard(points=100)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer_right(observer, shard, BATCH_QUERIES + 6, k=3)
    observer.drain()
    assert [len(request.vectors) for request in shard.asked] == [BATCH_QUERIES, 6]
    assert [request.groups for request in shard.asked] == [
        (SearchGroup(0, BATCH_QUERIES, 3, SearchParams(exact=True)),),
        (SearchGroup(0, 6, 3, SearchParams(exact=True)),),
    ]
    assert told(observer)["recall"] == 1.0


def test_window_forgets_queries_of_long_ago() -> None:
    shard = LineShard(points=1)
    observer = RecallObserver(share=1.0, duty=1.0)
    for ids in ([[]] * 200, *[[[0]] * 100] * (WINDOW_QUERIES // 100)):
        offer(observer, shard, at(*range(len(ids))), ids, k=1)
        observer.drain()
    assert (told(observer)["queries"], told(observer)["recall"]) == (WINDOW_QUERIES, 1.0)


def test_generations_are_told_apart_and_old_ones_forgotten() -> None:
    shard = LineShard(generations=range(1, 20))
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(3, 3), [[3], [4]], k=1, generation=1)
    offer(observer, shard, at(3), [[3]], k=1, generation=2)
    observer.drain()
    assert (told(observer, 1)["recall"], told(observer, 2)["recall"]) == (0.5, 1.0)
    assert [told(observer, generation)["queries"] for generation in (1, 2)] == [2, 1]
    for generation in range(3, 20):
        offer(observer, shard, at(3), [[3]], k=1, generation=generation)
    observer.drain()
    assert observer.observed(1) is None
    assert told(observer, 19)["generation"] == 19


def test_what_is_told_changes_only_when_a_batch_was_evaluated() -> None:
    shard = LineShard(points=1)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(0), [[0]], k=1)
    observer.drain()
    before = told(observer)
    offer(observer, shard, at(*range(2 * QUEUE_QUERIES)), [[]] * (2 * QUEUE_QUERIES), k=1)
    assert told(observer) == before
    observer.drain()
    assert told(observer) != before


# --- of which view ----------------------------------------------------------------------------------------------


def test_truth_is_asked_of_the_view_that_answered() -> None:
    """What is written after an answer must not count against it: here 20 points were deleted meanwhile, or added."""
    before, after = LineShard(points=30), LineShard(points=10)
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, before, at(25), [[25]], k=1)
    offer(observer, after, at(25), [[9]], k=1)
    offer(observer, before, at(24), [[24]], k=1)
    observer.drain()
    assert told(observer)["recall"] == 1.0
    assert (places_asked(before), places_asked(after)) == ([25, 24], [25])
    assert len(before.asked) == 1, "queries of one view are answered at once"


def test_views_that_wait_are_bounded_and_the_rest_counted() -> None:
    observer = RecallObserver(share=1.0, duty=1.0)
    shards = [LineShard() for _ in range(VIEWS_WAITING + 3)]
    for shard in shards:
        offer(observer, shard, at(3), [[3]], k=1)
    offer(observer, shards[0], at(4), [[4]], k=1)
    assert observer.dropped == 3
    observer.drain()
    assert (told(observer)["queries"], told(observer)["dropped"]) == (VIEWS_WAITING + 1, 3)


def test_view_is_let_go_once_it_was_asked_or_its_generation_retired() -> None:
    observer = RecallObserver(share=1.0, duty=1.0, pause=Pauses(most=1))
    asked, retired, kept = LineShard(), LineShard(), LineShard(generations=(2,))
    views = [weakref.ref(shard) for shard in (asked, retired, kept)]
    offer(observer, asked, at(3), [[3]], k=1)
    observer.run()
    offer(observer, retired, at(3, 4), [[3], [4]], k=1)
    offer(observer, kept, at(3), [[3]], k=1, generation=2)
    observer.retire(2)
    del asked, retired, kept
    assert [view() is None for view in views] == [True, True, False]
    observer.drain()
    assert (told(observer, 2)["queries"], told(observer, 2)["dropped"], observer.retired) == (1, 2, 2)


# --- its interval -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "queries", "low", "high"),
    [
        (1.0, 1, 0.207, 1.0),
        (0.0, 1, 0.0, 0.793),
        (0.5, 10, 0.237, 0.763),  # 5 of 10 in tables of Wilson's interval
        (0.95, 100, 0.888, 0.978),
        (0.95, 1_000, 0.935, 0.962),
    ],
)
def test_interval_is_wilsons(mean: float, queries: int, low: float, high: float) -> None:
    assert recall_observer.recall_interval(mean, queries) == pytest.approx((low, high), abs=6e-4)


def test_interval_holds_the_true_mean_19_times_of_20() -> None:
    random = np.random.default_rng(SEED)
    for recalls in (
        random.binomial(1, 0.95, (4_000, 200)) / 1.0,  # at the bound of what varies: all of a query or nothing
        random.binomial(10, 0.95, (4_000, 200)) / 10.0,
    ):
        intervals = [recall_observer.recall_interval(mean, 200) for mean in recalls.mean(axis=1).tolist()]
        held = np.mean([low <= 0.95 <= high for low, high in intervals])
        print(f"{held:.3f} of the intervals hold the mean, seed {SEED}")
        assert held >= 0.94


# --- what may go wrong ------------------------------------------------------------------------------------------


def test_queries_of_a_retired_generation_are_dropped_quietly(caplog: pytest.LogCaptureFixture) -> None:
    shard = LineShard(generations=(2,))
    observer = RecallObserver(share=1.0, duty=1.0)
    offer(observer, shard, at(3, 4), [[3], [4]], k=1, generation=1)
    offer(observer, shard, at(3), [[3]], k=1, generation=2)
    observer.drain()
    assert (observer.observed(1), observer.retired, observer.failed) == (None, 2, 0)
    assert (told(observer, 2)["queries"], told(observer, 2)["dropped"]) == (1, 2)
    assert caplog.text == ""


@pytest.mark.parametrize("raised", [True, False])
def test_error_of_the_exact_search_is_logged_and_the_next_batch_evaluated(
    raised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shard = LineShard()
    observer = RecallObserver(share=1.0, duty=1.0)
    if raised:
        shard.error = RuntimeError("out of order")
    else:
        shard.outcome = EaglerayError("out of order")
    offer(observer, shard, at(3), [[3]], k=1)
    observer.drain()
    assert (observer.observed(1), observer.failed) == (None, 1)
    assert "out of order" in caplog.text
    shard.error = shard.outcome = None
    offer(observer, shard, at(3), [[3]], k=1)
    observer.drain()
    assert (told(observer)["queries"], told(observer)["dropped"]) == (1, 1)


# --- its thread -------------------------------------------------------------------------------------------------


class Pauses:
    """Records how long the observer rests, lets queries arrive meanwhile, and stops it after the last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return len(self.seconds) == self.most


@pytest.mark.parametrize(("duty", "work_s", "rest_s"), [(0.02, 3.0, 147.0), (0.5, 30.0, 30.0), (1.0, 3.0, REST_MIN_S)])
def test_rest_after_a_batch_keeps_the_duty(duty: float, work_s: float, rest_s: float) -> None:
    clock, pauses = ManualClock(), Pauses(most=3)
    shard = LineShard(clock=clock)
    observer = RecallObserver(share=1.0, duty=duty, clock=clock, pause=pauses)
    shard.work_s = work_s
    offer_right(observer, shard, 2 * BATCH_QUERIES + 1, k=1)
    observer.run()
    assert pauses.seconds == pytest.approx([rest_s] * 3)
    assert [len(request.vectors) for request in shard.asked] == [BATCH_QUERIES, BATCH_QUERIES, 1]


def test_batches_that_fail_are_rested_after_too() -> None:
    clock, pauses = ManualClock(), Pauses(most=2)
    shard = LineShard(clock=clock)
    shard.error, shard.work_s = RuntimeError("out of order"), 1.0
    observer = RecallObserver(share=1.0, duty=0.02, clock=clock, pause=pauses)
    offer_right(observer, shard, BATCH_QUERIES + 1, k=1)
    observer.run()
    assert pauses.seconds == pytest.approx([49.0, 49.0])


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="threads have no priority of their own here")
def test_thread_works_with_little_priority_until_it_is_stopped() -> None:
    rested = threading.Event()
    seen: list[tuple[str, int, bool]] = []

    class Watched(LineShard):
        def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
            here = threading.current_thread()
            seen.append((here.name, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), here.daemon))
            return super().search(request)

    def rest(seconds: float) -> bool:
        rested.set()
        return False

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    observer = RecallObserver(share=1.0, duty=1.0, pause=rest)
    others = observer_threads()
    observer.start()
    (thread,) = observer_threads() - others
    offer_right(observer, Watched(), 1)
    assert rested.wait(20.0)
    assert told(observer)["recall"] == 1.0
    assert seen == [("recall-observer", max(before, recall_observer.NICENESS), True)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before, "of that thread alone"
    observer.stop()
    thread.join(20.0)
    assert not thread.is_alive()


def test_thread_goes_on_at_normal_priority_where_it_may_not_be_lowered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    shard, pauses = LineShard(), Pauses(most=1)
    observer = RecallObserver(share=1.0, duty=1.0, pause=pauses)
    offer_right(observer, shard, 1)
    with caplog.at_level(logging.INFO):
        observer._thread()
    assert told(observer)["queries"] == 1
    assert "normal priority: not permitted" in caplog.text


# --- in a replica -----------------------------------------------------------------------------------------------


async def observed_by(actor: ShardActor, request: ShardSearch) -> tuple[dict[str, Any], ...]:
    """What the status tells after a search, once it tells something."""
    (hits,) = await actor.search(request)
    assert isinstance(hits, Hits)
    async with asyncio.timeout(20.0):
        while not (status := await actor.status()).observed:
            await asyncio.sleep(0.01)
    return status.observed


def test_replica_tells_the_observed_recall_of_the_generations_it_holds(tmp_path: Path) -> None:
    config = CollectionConfig(8, metric="l2", index=IndexConfig(kind="flat"))
    settings = Settings(data=str(tmp_path / "data"), cache_dir=str(tmp_path), shard_threads=1, observed_share=1.0)
    commit(open_store(settings.data), "words", config, random_points(config, 50), segments=2)
    actor = ShardActor(settings, ReplicaKey("words", 0, 0), 1)
    request = ShardSearch(1, random_vectors(config, 1, seed=3), (SearchGroup(0, 1, 5, TUNED),))
    try:
        assert asyncio.run(actor.status()).observed == ()
        (facts,) = asyncio.run(observed_by(actor, request))
        expected = {"generation": 1, "recall": 1.0, "high": 1.0, "queries": 1, "k": 5, "dropped": 0}
        assert facts == expected | {"low": 0.2065}
        commit(open_store(settings.data), "words", config, random_points(config, 60))
        asyncio.run(actor.load(2))
        asyncio.run(actor.retire(2))
        status = asyncio.run(actor.status())
        assert (status.generations, status.observed) == ((2,), ())
    finally:
        actor._replica.close()


def test_replica_with_share_zero_has_no_thread_for_it(tmp_path: Path) -> None:
    config = CollectionConfig(8, metric="l2", index=IndexConfig(kind="flat"))
    settings = Settings(data=str(tmp_path / "data"), cache_dir=str(tmp_path), shard_threads=1, observed_share=0.0)
    commit(open_store(settings.data), "words", config, random_points(config, 50))
    before = observer_threads()
    actor = ShardActor(settings, ReplicaKey("words", 0, 0), 1)
    assert observer_threads() - before == set()
    actor._replica.close()


@pytest.mark.parametrize("name", ["observed_share", "observed_duty"])
@pytest.mark.parametrize("value", [-0.1, 1.1, "1", True, None, float("nan")])
def test_settings_of_it_out_of_bounds_name_the_field(name: str, value: object) -> None:
    with pytest.raises(Invalid) as caught:
        Settings(**{"data": "file:///d", name: value})  # type: ignore[arg-type]
    assert [error.field for error in caught.value.errors] == [name]


def test_share_may_be_zero_and_duty_may_not() -> None:
    assert Settings(data="file:///d", observed_share=0, observed_duty=1).observed_share == 0
    with pytest.raises(Invalid, match="observed_duty: must be a number over 0 and at most 1, not 0"):
        Settings(data="file:///d", observed_duty=0)
