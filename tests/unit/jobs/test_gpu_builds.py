"""Imports, rebuilds and the way back with GPUs: which device a generation gets, and what its builds ask for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.gpu_device import GpuDevice
from actors.replica_status import ReplicaStatus
from actors.segment_loader import read_description
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Exhausted, Invalid, Unavailable
from cluster.gpu_memory import GpuFacts, host_build_bytes
from cluster.index_policy import MEMORY_MARGIN
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore, open_store
from cluster.placement import ReplicaKey
from cluster.rollback import roll_back
from cluster.segment import SegmentDescription
from cluster.snapshots import create_snapshot
from jobs import build_device
from jobs.build_device import TaskGpus
from jobs.build_plan import BuildGpus, Builds, Workers, build_gpus, held_gpus, plan_build, segment_bytes, with_rates
from jobs.gate import LatencyTask, SegmentTask, ShardSegments, look_at_segment, measure_latency
from jobs.rebuild_task import Place
from jobs.snapshots import BranchOptions, RestoreOptions, branch, restore
from tests.fakes import run_tasks_here
from tests.gpu_double import double_device
from tests.unit.jobs.imports import log_of, new_data_url, random_table, run_import, write
from tests.unit.jobs.rebuilds import Collection, run_rebuild

GB = 10**9
SMALL = CollectionConfig(4, metric="l2", index=IndexConfig(device="gpu", num_gpus=1.0))
NEVER_ASKED: Callable[[], ClusterGpus] = lambda: pytest.fail("GPUs were looked for")  # noqa: E731
FLAT = IndexConfig("flat")
ONE = ClusterGpus(1.0, 1.0, 24 * GB, "small")
TAKEN = replace(ONE, free=0.0)


@dataclass
class Asked:
    """A `TaskRunner` that keeps what was asked for each function."""

    gpus: dict[str, float] = field(default_factory=dict)

    def __call__(
        self,
        function: Callable[[Any], Iterator[Any]],
        items: Sequence[Any],
        num_cpus: float,
        in_flight: int,
        num_gpus: float = 0.0,
    ) -> Iterator[tuple[int, Any]]:
        self.gpus[function.__name__] = num_gpus
        return run_tasks_here(function, items, num_cpus, in_flight)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> list[GpuDevice]:
    """The devices that tasks opened."""
    opened: list[GpuDevice] = []

    def open_double(share: float) -> GpuDevice:
        opened.append(double_device(share=share))
        return opened[-1]

    monkeypatch.setattr(build_device.GpuDevice, "open", open_double)
    return opened


def statuses_on_gpus(
    replicas: int = 1, share: float = 1.0, **more: Any
) -> Callable[[], dict[ReplicaKey, ReplicaStatus]]:
    """Replicas of shard 0 that run with such a share of a GPU."""
    status = ReplicaStatus("ready", node="a", **more)
    return lambda: {ReplicaKey("words", 0, number, share): status for number in range(replicas)}


def descriptions(store: ObjectStore, manifest: Manifest) -> list[SegmentDescription]:
    return [read_description(store, manifest.collection, ref) for ref in manifest.segments.values()]


# --- plans --------------------------------------------------------------------------------------------------------


def test_collection_on_cpus_looks_for_no_gpus() -> None:
    assert build_gpus(CollectionConfig(4, index=IndexConfig(device="cpu")), NEVER_ASKED) is None


@pytest.mark.parametrize(
    ("there", "held", "facts", "at_once"),
    [
        (ClusterGpus(), 0.0, None, 0),
        (ONE, 0.0, None, 0),  # two replicas need two
        (ClusterGpus(2.0, 2.0, 24 * GB, "small"), 0.0, GpuFacts(24 * GB, "small", True), 2),
        (
            ClusterGpus(2.0, 0.0, 24 * GB, "small"),
            2.0,
            GpuFacts(24 * GB, "small", False),
            0,
        ),  # its own replicas have them
        (ClusterGpus(3.0, 1.0, 24 * GB, "small"), 2.0, GpuFacts(24 * GB, "small", True), 1),
        (ClusterGpus(2.0, 0.0, 24 * GB, "small"), 1.0, None, 0),
    ],
)
def test_auto_takes_gpus_where_its_replicas_and_perhaps_a_build_have_some(
    there: ClusterGpus, held: float, facts: GpuFacts | None, at_once: int
) -> None:
    config = CollectionConfig(4, replicas=2, index=IndexConfig(num_gpus=1.0))
    found = build_gpus(config, lambda: there, 60, {1.0: held})
    assert found == (None if facts is None else BuildGpus(facts, 1.0, at_once, "a whole GPU was asked for"))


def test_builds_do_not_wait_for_what_replicas_leave_of_their_gpus() -> None:
    """Of three GPUs each has 0.4 left: together enough for a build, but no task gets one."""
    config = CollectionConfig(4, replicas=3, index=IndexConfig(device="gpu", num_gpus=0.6))
    found = build_gpus(config, lambda: ClusterGpus(3.0, 1.2, 24 * GB, "small"), 60, {0.6: 1.8})
    assert found is not None
    assert (found.facts.builds, found.at_once) == (False, 0)
    with pytest.raises(Unavailable, match="take 2 GPUs more, 1 of 3 are free"):
        build_gpus(config, lambda: ClusterGpus.of([1.0] * 3, [0.4, 0.4, 1.0], []), 60, {0.6: 0.6})


def test_replicas_that_wait_for_a_gpu_have_none() -> None:
    keys = [ReplicaKey("words", 0, number, 0.5) for number in range(3)] + [ReplicaKey("words", 0, 0)]
    waiting, loading = ReplicaStatus("starting", error="it asks for 1 GPU, 0 of 0 are free"), ReplicaStatus("starting")
    statuses = (ReplicaStatus("ready"), waiting, ReplicaStatus("unreachable", error="silent"), ReplicaStatus("ready"))
    assert held_gpus(dict(zip(keys, statuses, strict=True))) == {0.5: 1.0}
    assert held_gpus({keys[0]: loading, keys[1]: waiting}) == {0.5: 0.5}
    assert held_gpus({keys[1]: waiting, keys[3]: loading}) == {}
    several = {keys[0]: loading, keys[2]: loading, ReplicaKey("words", 0, 0, 0.125): loading}
    assert held_gpus(several) == {0.5: 1.0, 0.125: 0.125}


def test_builds_for_gpus_ask_for_as_many_as_are_free() -> None:
    config = replace(SMALL, shards=8, index=replace(SMALL.index, num_gpus=0.5))
    workers = Workers(run_tasks_here, 64)
    free = BuildGpus(GpuFacts(12 * GB), 0.5, 3, "half a GPU was asked for")
    plan = plan_build(100_000, config, 8 * GB, workers, free)
    assert (plan.device, plan.spec.kind, plan.builds) == ("gpu", "flat", Builds(3, 8, 8, 0.5))
    assert (plan.num_gpus, plan.index.spec.reason.endswith("; half a GPU was asked for")) == (0.5, True)
    assert plan.to_dict()["predicted_build_seconds"] is None
    assert plan.to_dict()["gpu"] == {
        "name": "",
        "memory_bytes": 12 * GB,
        "num_gpus": 0.5,
        "num_gpus_reason": "half a GPU was asked for",
        "predicted_bytes": plan.spec.gpu_bytes * 8,
        "built_on": "gpu",
    }
    assert not plan.worth_measuring
    taken = BuildGpus(GpuFacts(12 * GB, builds=False), 0.5, 0)
    plan = plan_build(100_000, config, 8 * GB, workers, taken)
    assert (plan.device, plan.builds) == ("gpu", Builds(8, 8, 8))
    assert plan.to_dict()["gpu"]["built_on"] == "cpu"
    assert plan.to_dict()["predicted_build_seconds"] >= 0.0
    assert with_rates(plan, plan.rates, 8 * GB, workers) == plan


def test_plan_without_gpus_is_for_cpus_and_says_nothing_of_them() -> None:
    plan = plan_build(1_000, replace(SMALL, index=IndexConfig()), GB, Workers(run_tasks_here, 2))
    assert (plan.device, plan.num_gpus, plan.builds.num_gpus) == ("cpu", 0.0, 0.0)
    assert "gpu" not in plan.to_dict()


def test_segment_for_gpus_takes_host_memory_for_what_is_copied_there() -> None:
    config = CollectionConfig(64, metric="l2", index=IndexConfig("cagra", device="gpu"))
    spec = plan_build(100_000, config, 64 * GB, Workers(run_tasks_here, 2), BuildGpus(GpuFacts(), 1.0, 1)).spec
    copied = host_build_bytes(spec, 100_000, 64)
    assert copied >= 100_000 * 64 * 4
    assert segment_bytes(spec, 100_000, 64) == pytest.approx((spec.predicted_bytes + copied) * MEMORY_MARGIN, abs=1)


# --- the GPU of a task --------------------------------------------------------------------------------------------


def test_task_opens_the_share_that_it_was_given_and_closes_it(doubled: list[GpuDevice]) -> None:
    with TaskGpus(GpuFacts(), 0.5).device() as device:
        assert device is doubled[0]
        assert device.facts()["share"] == 0.5
    with pytest.raises(Unavailable, match="closed"):
        device.run(lambda resources: None)


def test_task_that_was_given_no_gpu_opens_none(doubled: list[GpuDevice]) -> None:
    with TaskGpus(GpuFacts(builds=False), 0.0, needed=True).device() as device:
        assert device is None
    assert doubled == []


def test_task_whose_gpu_cannot_be_used_goes_on_where_cpus_can_build_the_kind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(share: float) -> GpuDevice:
        raise Unavailable("its driver is too old")

    monkeypatch.setattr(build_device.GpuDevice, "open", refuse)
    with TaskGpus(GpuFacts(), 1.0).device() as device:
        assert device is None
    assert "goes on without the GPU that it asked for: its driver is too old" in caplog.text
    with (
        pytest.raises(Unavailable, match=r"only a GPU builds a graph for GPUs, .*: its driver is too old"),
        TaskGpus(GpuFacts(), 1.0, needed=True).device(),
    ):
        pytest.fail("it goes on")


# --- imports ------------------------------------------------------------------------------------------------------


def imported(tmp_path: Path, points: int = 50, **options: Any) -> tuple[ObjectStore, Manifest]:
    data = new_data_url()
    source = write(tmp_path / "points.parquet", random_table(points), row_group_size=1_000)
    return open_store(data), run_import(data, source, **options)


def test_import_builds_for_gpus_on_one_that_is_free(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    asked, create = Asked(), {"metric": "l2", "index": {"kind": "cagra", "device": "gpu", "num_gpus": 0.5}}
    store, manifest = imported(tmp_path, 1_200, create=create, gpus=lambda: ONE, run_tasks=asked)
    assert (manifest.num_gpus, manifest.config.index.num_gpus) == (0.5, 0.5)
    assert asked.gpus == {"partition_unit": 0.0, "build_partition": 0.5}
    assert [(each.spec["kind"], each.spec["device"]) for each in descriptions(store, manifest)] == [("cagra", "gpu")]
    assert len(doubled) == 1


def test_import_builds_on_cpus_where_replicas_have_all_gpus(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    data, asked = new_data_url(), Asked()
    store = open_store(data)
    config = replace(SMALL, index=IndexConfig("cagra", device="gpu", num_gpus=1.0))
    assert log_of(store).create(config)[0].device == "gpu"
    source = write(tmp_path / "points.parquet", random_table(1_200), row_group_size=1_000)
    how: dict[str, Any] = {"gpus": lambda: TAKEN, "statuses": statuses_on_gpus(), "run_tasks": asked}
    manifest = run_import(data, source, **how)
    (description,) = descriptions(store, manifest)
    assert (manifest.device, description.spec["device"]) == ("gpu", "gpu")
    assert description.spec["kind"] in ("ivf_flat", "ivf_pq"), "what the graph steps down to"
    assert asked.gpus["build_partition"] == 0.0
    assert doubled == []


def test_import_goes_on_with_the_gpus_of_what_is_still_served(tmp_path: Path) -> None:
    """The newest generation is for CPUs, and not switched to yet."""
    data = new_data_url()
    log = log_of(open_store(data))
    created, _ = log.create(SMALL)
    log.commit_generation(created, SMALL, created.shards)
    source = write(tmp_path / "points.parquet", random_table(60), row_group_size=100)
    assert run_import(data, source, gpus=lambda: TAKEN, statuses=statuses_on_gpus()).device == "gpu"


def test_import_in_auto_stays_on_cpus_where_others_have_the_gpus(tmp_path: Path) -> None:
    store, manifest = imported(tmp_path, gpus=lambda: TAKEN)
    assert manifest.device == "cpu"
    assert ["device" in each.spec for each in descriptions(store, manifest)] == [False]


def test_import_for_gpus_that_are_not_there_is_refused_unless_it_waits(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"no GPU.*wait_for_gpu"):
        imported(tmp_path, create={"index": {"device": "gpu"}})
    store, manifest = imported(tmp_path, create={"index": {"device": "gpu", "wait_for_gpu": True}})
    assert manifest.device == "gpu"
    assert [each.spec["kind"] for each in descriptions(store, manifest)] == ["flat"]


def test_import_for_gpus_that_others_have_now_says_how_many_are_free(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="0 of 1 are free"):
        imported(tmp_path, create={"index": {"device": "gpu"}}, gpus=lambda: TAKEN)


# --- rebuilds -----------------------------------------------------------------------------------------------------


def written(tmp_path: Path, index: IndexConfig = FLAT, shards: int = 1) -> Collection:
    """On CPUs unless the index says else."""
    collection = Collection(CollectionConfig(4, metric="l2", shards=shards, index=index), tmp_path)
    collection.write(range(60))
    return collection


def test_rebuild_changes_the_device_there_and_back(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    collection, asked = written(tmp_path, shards=2), Asked()
    report = run_rebuild(collection, index={"device": "gpu", "num_gpus": 0.5}, gpus=lambda: ONE, run_tasks=asked)
    newest = collection.newest
    assert (newest.device, newest.config.index.device) == ("gpu", "gpu")
    assert {each.spec["device"] for each in descriptions(collection.store, newest)} == {"gpu"}
    assert asked.gpus["build_range"] == asked.gpus["look_at_segment"] == 0.5
    assert asked.gpus["catch_up"] == asked.gpus["seal_shard"] == 0.0
    assert report["memory"]["gpu_bytes_per_replica"] > 0
    assert collection.held() == collection.live

    asked.gpus.clear()
    collection.write(range(50, 70), [1])
    back = {"index": {"device": "cpu"}, "gpus": NEVER_ASKED, "run_tasks": asked, "job_id": "rebuild-2"}
    report = run_rebuild(collection, **back)  # type: ignore[arg-type]
    assert collection.newest.device == "cpu"
    assert not any("device" in each.spec for each in descriptions(collection.store, collection.newest))
    assert set(asked.gpus.values()) == {0.0}
    assert report["gate"]["latency"] is None, "one that is served on GPUs is not compared by its twin"
    assert collection.held() == collection.live


def test_gate_asks_an_exact_index_on_its_gpu(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    """The self-test at its load is not all."""
    collection = written(tmp_path)
    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE)
    manifest = collection.newest
    (entry,) = manifest.shards
    place = Place(collection.data, manifest.collection, "gate", None, gpus=TaskGpus(GpuFacts(), 1.0))
    searches, looks = [], []
    for queries in (np.empty((0, 4), np.float32), np.ones((3, 4), np.float32)):
        task = SegmentTask(place, entry.segments[0], np.empty(0, np.int64), manifest.config, queries, False)
        *_, last = look_at_segment(task)
        looks.append(last["look"])
        searches.append(len(doubled[-1].library.searches))
    assert searches[1] > searches[0]
    assert not any(look.exact or look.damaged for look in looks)


def test_gate_compares_no_times_of_twins_where_its_gpu_cannot_be_used(
    tmp_path: Path, doubled: list[GpuDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = written(tmp_path)
    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE)
    report = run_rebuild(collection, gpus=lambda: ONE, job_id="rebuild-2")
    assert report["gate"]["latency"] is not None

    def gone(share: float) -> GpuDevice:
        raise Unavailable("it fell off the bus")

    monkeypatch.setattr(build_device.GpuDevice, "open", gone)
    report = run_rebuild(collection, gpus=lambda: ONE, job_id="rebuild-3")
    assert report["gate"]["latency"] is None


def test_gate_compares_no_times_of_an_index_that_a_smaller_share_does_not_hold(
    tmp_path: Path, doubled: list[GpuDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = written(tmp_path)
    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE)
    manifest = collection.newest
    (entry,) = manifest.shards
    place = Place(collection.data, manifest.collection, "gate", None, gpus=TaskGpus(GpuFacts(), 0.125))
    new = ShardSegments(manifest.config, entry.segments, {})
    task = LatencyTask(place, entry, manifest.config, new, np.ones((3, 4), np.float32))
    assert [set(told) for told in measure_latency(task)] == [{"old_ms", "new_ms"}]
    monkeypatch.setattr(build_device.GpuDevice, "open", lambda share: double_device(1 << 30, share))
    assert list(measure_latency(task)) == []


def test_what_is_sealed_and_caught_up_is_for_the_device_of_its_generation(
    tmp_path: Path, doubled: list[GpuDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.entry_seal.LITTLE_POINTS", 0)
    collection = written(tmp_path)

    def write_on(function: Any, *given: Any) -> Any:
        if function.__name__ == "build_range":
            collection.write(range(100, 120))
        return run_tasks_here(function, *given)

    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE, run_tasks=write_on)
    assert [each.spec["device"] for each in descriptions(collection.store, collection.newest)] == ["gpu", "gpu"]
    collection.write(range(200, 230))
    collection.seal()
    assert collection.newest.device == "gpu"
    assert [each.spec["device"] for each in descriptions(collection.store, collection.newest)] == ["gpu"] * 3
    assert collection.held() == collection.live


def test_rebuild_without_points_is_served_where_that_is_asked_for(tmp_path: Path) -> None:
    collection = Collection(CollectionConfig(4), tmp_path)
    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE)
    assert collection.newest.device == "gpu"
    run_rebuild(collection, index={"device": "auto"}, gpus=lambda: ONE, job_id="rebuild-2")
    assert collection.newest.device == "cpu"


def test_rebuild_keeps_the_gpus_of_its_own_replicas(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    collection = written(tmp_path, IndexConfig("flat", device="gpu", num_gpus=1.0))
    run_rebuild(collection, gpus=lambda: TAKEN, statuses=statuses_on_gpus())
    assert collection.newest.num_gpus == 1.0
    with pytest.raises(Unavailable, match="0 of 1 are free"):
        run_rebuild(collection, gpus=lambda: TAKEN, job_id="rebuild-2")


def test_rebuild_with_another_share_is_for_other_replicas(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    """Those that serve keep theirs until these take over; so there must be free ones for them."""
    collection, asked = written(tmp_path, IndexConfig("flat", device="gpu", num_gpus=1.0)), Asked()
    run_rebuild(collection, gpus=lambda: ONE)
    half: dict[str, Any] = {"index": {"num_gpus": 0.5}, "statuses": statuses_on_gpus(), "run_tasks": asked}
    with pytest.raises(Unavailable, match=r"take 0\.5 GPUs more, 0 of 1 are free: its own have 1 with another share"):
        run_rebuild(collection, gpus=lambda: TAKEN, job_id="rebuild-2", **half)
    run_rebuild(collection, gpus=lambda: ClusterGpus(2.0, 1.0, 24 * GB, "small"), job_id="rebuild-3", **half)
    newest = collection.newest
    assert (newest.num_gpus, newest.config.index.num_gpus, newest.switch) == (0.5, 0.5, "beside")
    assert asked.gpus["build_range"] == 0.5
    assert collection.held() == collection.live


def test_rebuild_tells_that_the_twin_answers_while_the_gpu_has_no_room_for_both(
    tmp_path: Path, doubled: list[GpuDevice]
) -> None:
    collection = written(tmp_path, IndexConfig("flat", device="gpu", num_gpus=1.0))
    facts = {"total_bytes": 1_000, "free_bytes": 100, "used_bytes": 900, "share": 1.0}
    segment = {"predicted_bytes": 1, "count": 60, "device": "gpu", "gpu_predicted_bytes": 900}
    full = statuses_on_gpus(gpu=facts, segments=(segment,), node_memory=(10**9, 10**9))
    report = run_rebuild(collection, gpus=lambda: TAKEN, statuses=full)
    assert "the twin on the host answers until there is room" in report["memory"]["switch"]["statement"]
    impatient = {"index": {"cpu_twin": False}, "gpus": lambda: TAKEN, "statuses": full, "job_id": "rebuild-2"}
    with pytest.raises(Exhausted, match="GPU memory of the switch: shard 0 needs"):
        run_rebuild(collection, **impatient)  # type: ignore[arg-type]


def test_rebuild_is_refused_where_the_host_has_no_memory_to_load_its_graph(
    tmp_path: Path, doubled: list[GpuDevice]
) -> None:
    """Its copies are gone when it is on the GPU; of an index that is copied piece by piece there are none."""
    collection = written(tmp_path, IndexConfig("flat", device="gpu", num_gpus=1.0))
    collection.write(range(1_200))
    tight: dict[str, Any] = {"gpus": lambda: ONE, "statuses": statuses_on_gpus(node_memory=(100_000, 100_000))}
    run_rebuild(collection, **tight)
    with pytest.raises(Exhausted, match=r"memory of the switch: node a needs .* MiB of it only while it loads"):
        run_rebuild(collection, index={"kind": "cagra"}, job_id="rebuild-2", **tight)


def test_rebuild_by_the_replicas_that_serve_has_them_make_room_while_another_generation_waits(
    tmp_path: Path, doubled: list[GpuDevice]
) -> None:
    """The newest one, with another share, waits for GPUs: it says nothing of the room that those have which serve."""
    collection = Collection(
        CollectionConfig(4, "l2", replicas=2, index=IndexConfig("flat", device="gpu", num_gpus=0.5, cpu_twin=False)),
        tmp_path,
    )
    collection.write(range(60))
    facts = {"total_bytes": 1_000, "free_bytes": 100, "used_bytes": 1_000, "share": 1.0}
    segment = {"predicted_bytes": 1, "count": 60, "device": "gpu", "gpu_predicted_bytes": 10_000}
    full = statuses_on_gpus(2, 0.5, gpu=facts, segments=(segment,), node_memory=(10**9, 10**9))
    held = {"gpus": lambda: ClusterGpus(2.0, 1.0, 24 * GB, "small"), "statuses": full}
    run_rebuild(collection, index={"num_gpus": 0.25}, **held)  # type: ignore[arg-type]
    assert (collection.newest.num_gpus, collection.newest.switch) == (0.25, "beside")
    run_rebuild(collection, index={"num_gpus": 0.5}, job_id="rebuild-2", **held)  # type: ignore[arg-type]
    assert (collection.newest.num_gpus, collection.newest.switch) == (0.5, "one_at_a_time")


# --- the way back -------------------------------------------------------------------------------------------------


def test_versions_that_come_back_are_served_on_the_device_that_they_were_built_for(
    tmp_path: Path, doubled: list[GpuDevice]
) -> None:
    collection = written(tmp_path)
    collection.seal()
    store, log = collection.store, log_of(collection.store)
    on_cpus = collection.newest
    run_rebuild(collection, index={"device": "gpu"}, gpus=lambda: ONE)
    on_gpus = collection.newest
    for name, manifest in (("cpus", on_cpus), ("gpus", on_gpus)):
        create_snapshot(store, name, manifest, log._now())

    back = roll_back(store, log)
    assert (back.device, back.config) == ("cpu", on_cpus.config)
    assert roll_back(store, log).device == "gpu"
    restored = restore(store, log, RestoreOptions("words", "cpus"))
    assert (restored.device, restored.config.index.device) == ("cpu", "auto")
    assert restore(store, log, RestoreOptions("words", "gpus")).device == "gpu"
    for origin in (on_cpus, on_gpus):
        into = f"branch-of-{origin.device}"
        made = branch(store, log, log_of(store, into), origin, BranchOptions("words", into, f"{origin.device}s"))
        assert made.device == origin.device
    assert uuid.UUID(made.writer)


def test_version_that_comes_back_has_the_share_that_it_had(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    collection = written(tmp_path)
    store, log = collection.store, log_of(collection.store)
    shares = ({"device": "gpu", "num_gpus": 0.5}, {"device": "cpu"}, {"device": "gpu", "num_gpus": 1.0})
    made: list[Manifest] = []
    for number, index in enumerate(shares):
        run_rebuild(collection, index=index, gpus=lambda: ONE, job_id=f"rebuild-{number}")
        made.append(collection.newest)
    create_snapshot(store, "half", made[0], log._now())
    for back in (roll_back(store, log, made[0].generation), restore(store, log, RestoreOptions("words", "half"))):
        assert (back.num_gpus, back.config) == (0.5, made[0].config)
    assert roll_back(store, log, made[1].generation).num_gpus == 0.0
    back = roll_back(store, log, made[2].generation)
    assert (back.num_gpus, back.config, back.switch) == (1.0, made[2].config, "beside")


@pytest.mark.parametrize(("share", "switch"), [(0.5, "one_at_a_time"), (0.25, "beside"), (0.0, "beside")])
def test_version_that_comes_back_is_loaded_beside_by_replicas_with_another_share(
    tmp_path: Path, share: float, switch: str
) -> None:
    """They have nothing to drop first."""
    collection = written(tmp_path)
    store, log = collection.store, log_of(collection.store)
    old = log.commit_generation(collection.newest, collection.config, log.wal_ends(collection.newest, 1), num_gpus=0.5)
    create_snapshot(store, "half", old, log._now())
    base, ends = collection.newest, log.wal_ends(collection.newest, 1)
    log.commit_generation(base, collection.config, ends, switch="one_at_a_time", num_gpus=share)
    assert restore(store, log, RestoreOptions("words", "half")).switch == switch
    log.commit_generation(collection.newest, collection.config, ends, switch="one_at_a_time", num_gpus=share)
    assert roll_back(store, log, old.generation).switch == switch


# --- the share that a build chooses -------------------------------------------------------------------------------

CHOSEN = IndexConfig("flat", device="gpu")


def share_of(
    rows: int, there: ClusterGpus, held: dict[float, float] | None = None, had: float = 0.0, **index: Any
) -> tuple[float, str] | None:
    config = CollectionConfig(768, index=IndexConfig(**{"device": "gpu"} | index))
    found = build_gpus(config, lambda: there, rows, held or {}, had)
    return None if found is None else (found.each, found.reason)


def test_small_collections_share_a_gpu() -> None:
    """As many as there are shares of it."""
    free = 1.0
    for _ in range(8):
        found = share_of(1_000, ClusterGpus(1.0, free, 24 * GB, "small"))
        assert found == (0.125, "an eighth of a GPU holds twice its 3076000 bytes")
        free -= 0.125
    with pytest.raises(Unavailable, match=r"take 0\.125 GPUs more, 0 of 1 are free"):
        share_of(1_000, ClusterGpus(1.0, free, 24 * GB, "small"))


def test_share_is_of_the_points_of_a_shard() -> None:
    config = CollectionConfig(768, shards=4, index=IndexConfig(device="gpu"))
    found = build_gpus(config, lambda: ClusterGpus(4.0, 4.0, 24 * GB, "small"), 4_000_000)
    assert found is not None
    assert (found.each, found.facts.memory_bytes, found.at_once) == (0.5, 12 * GB, 8)


def test_share_that_a_build_gets_is_what_its_kind_is_chosen_with() -> None:
    """A graph takes a GPU to be built: where none has half free there are lists."""
    there = ClusterGpus(1.0, 0.25, 24 * GB, "small")
    with pytest.raises(Unavailable, match=r"of 0\.5 GPUs take 0\.5 GPUs more"):
        share_of(1_000_000, there)
    found = build_gpus(
        CollectionConfig(768, index=IndexConfig(device="gpu")), lambda: there, 1_000_000, {0.5: 0.5}, had=0.5
    )
    assert found is not None
    assert (found.each, found.facts.builds, found.at_once) == (0.5, False, 0)


def test_replicas_keep_their_share_where_there_are_no_gpus_for_another() -> None:
    """Else what would give back most of a GPU would go to CPUs, or be refused, in a cluster that is full."""
    full, whole = ClusterGpus(1.0, 0.0, 24 * GB, "small"), {1.0: 1.0}
    kept = (1.0, "it keeps a whole GPU: no GPUs are free for replicas with an eighth of a GPU")
    for options in ({}, {"device": "auto"}, {"wait_for_gpu": True}, {"gpu_full": "refuse"}):
        assert share_of(1_000, full, whole, 1.0, **options) == kept
    assert share_of(1_000, replace(full, free=0.125), whole, 1.0) == (
        0.125,
        "an eighth of a GPU holds twice its 3076000 bytes",
    )


def test_index_that_its_share_does_not_hold_any_more_gets_a_larger_one_or_steps_down() -> None:
    there, quarter = ClusterGpus(2.0, 1.75, 24 * GB, "small"), {0.25: 0.25}
    found = share_of(3_000_000, there, quarter, 0.25)
    assert found is not None
    assert found[0] == 1.0
    full = replace(there, free=0.0)
    found = share_of(3_000_000, full, quarter, 0.25)
    assert found == (0.25, "it keeps a quarter of a GPU: no GPUs are free for replicas with a whole GPU")
    with pytest.raises(Unavailable, match=r"its own have 0\.25 with another share"):
        share_of(3_000_000, full, quarter, 0.25, gpu_full="refuse")
    both = {0.125: 0.125, 0.25: 0.25}
    assert share_of(3_000_000, full, both, 0.25) == found, "the one that is served"


def test_share_that_is_asked_for_is_not_left_for_another() -> None:
    with pytest.raises(Unavailable, match=r"of 0\.5 GPUs"):
        share_of(1_000, TAKEN, {1.0: 1.0}, 1.0, num_gpus=0.5)


def test_import_chooses_a_share_and_says_why(tmp_path: Path, doubled: list[GpuDevice]) -> None:
    create = {"metric": "l2", "index": {"kind": "flat", "device": "gpu"}}
    store, manifest = imported(tmp_path, 60, create=create, gpus=lambda: ONE)
    assert (manifest.num_gpus, manifest.config.index.num_gpus) == (0.125, None)
    (description,) = descriptions(store, manifest)
    why = f"an eighth of a GPU holds twice its {description.spec['gpu_bytes']} bytes"
    assert description.spec["reason"].endswith(f"; {why}")
    assert doubled[0].facts()["share"] == 0.125


def test_import_into_what_is_empty_does_not_keep_its_share(tmp_path: Path) -> None:
    """Nothing was chosen for that, and nothing is lost with its replicas; where it has points its share is kept."""
    data = new_data_url()
    log = log_of(open_store(data))
    assert log.create(replace(SMALL, index=CHOSEN))[0].num_gpus == 0.125
    source = write(tmp_path / "points.parquet", random_table(60), row_group_size=100)
    small = ClusterGpus(2.0, 2.0, 4 * GB, "small")  # an eighth is less than a process takes
    assert run_import(data, source, gpus=lambda: small).num_gpus == 0.25
    large = ClusterGpus(2.0, 2.0, 24 * GB, "large")
    statuses = statuses_on_gpus(share=0.25)
    assert run_import(data, source, gpus=lambda: large, statuses=statuses, job_id="import-2").num_gpus == 0.25


def test_rebuild_chooses_a_share_keeps_it_and_gives_up_one_that_is_far_too_large(
    tmp_path: Path, doubled: list[GpuDevice]
) -> None:
    collection = written(tmp_path)
    run_rebuild(collection, index={"device": "gpu", "num_gpus": 0.25}, gpus=lambda: ONE)
    report = run_rebuild(collection, index={"num_gpus": None}, gpus=lambda: ONE, job_id="rebuild-2")
    newest = collection.newest
    assert (newest.num_gpus, newest.config.index.num_gpus) == (0.25, None), "twice what would be chosen"
    (description,) = descriptions(collection.store, newest)
    assert description.spec["reason"].endswith("bytes: its replicas go on")
    assert report["memory"]["gpu_bytes_per_replica"] > 0
    for number, share in enumerate((1.0, None)):
        run_rebuild(collection, index={"num_gpus": share}, gpus=lambda: ONE, job_id=f"rebuild-{3 + number}")
    assert collection.newest.num_gpus == 0.125


def test_rebuild_without_points_keeps_its_share_or_takes_the_least(tmp_path: Path) -> None:
    collection = Collection(CollectionConfig(4), tmp_path)
    for number, (index, share) in enumerate(
        (
            ({"device": "gpu", "num_gpus": 0.25}, 0.25),
            ({"num_gpus": None}, 0.25),
            ({"num_gpus": 1.0}, 1.0),
            ({"num_gpus": None}, 0.125),
            ({"device": "cpu"}, 0.0),
        )
    ):
        run_rebuild(collection, index=index, gpus=lambda: ONE, job_id=f"rebuild-{number}")
        assert collection.newest.num_gpus == share
    run_rebuild(collection, index={"device": "gpu", "num_gpus": 1.0}, gpus=lambda: ONE, job_id="rebuild-whole")
    full: dict[str, Any] = {"gpus": lambda: TAKEN, "statuses": statuses_on_gpus()}
    run_rebuild(collection, index={"num_gpus": None}, job_id="rebuild-full", **full)
    assert collection.newest.num_gpus == 1.0, "another would wait for its own to go"
