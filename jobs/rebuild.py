"""Rebuild: a collection's points become its next generation, with another index or number of shards if that is asked.

Phases: seal (what was written goes into segments), plan, measure, build (one segment per range of hashes), catch up
(what was written since goes into segments of the new generation), gate, commit (one manifest). Until the commit nothing
has changed but garbage: what a failed or stopped job built is deleted, and running it again begins anew. What is served
meanwhile is written to, sealed and merged as ever. Memory is bounded as an import's is: nothing is staged, a task holds
the order of one range's rows, then one index (docs/decisions/0007-jobs.md).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from actors.entry_seal import DraftEntry, finished_entry
from actors.faiss_index import check_factory
from actors.replica_status import Statuses
from actors.segment_rows import HashRange
from actors.shard_place import ShardPlace, newest_of_generation
from actors.switch_facts import ComingOnGpus, memory_of_switch
from cluster.config import ALL_OPTIONS, CollectionConfig, check_collection_name
from cluster.errors import Conflict
from cluster.gate import GateFacts, GateFailed, PointSum, gate_report, refusals
from cluster.index_policy import MEMORY_MARGIN
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.manifest_format import added_on
from cluster.object_store import ObjectStore
from cluster.recent_queries import read_queries
from cluster.upkeep import build_bytes, largest_build
from jobs.build_device import TaskGpus
from jobs.build_plan import (
    BuildGpus,
    Workers,
    build_gpus,
    held_gpus,
    plan_build,
    plan_builds,
    with_rates,
)
from jobs.gate import Candidate, ShardSegments, gate_queries, measure_gate
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.rebuild_plan import RebuildPlan, drafts_of
from jobs.rebuild_task import (
    BuiltRange,
    CatchUpTask,
    Place,
    RangeTask,
    Survey,
    SurveyTask,
    Vectors,
    build_range,
    catch_up,
    measure_range,
    survey_segment,
    to_survey_again,
)
from jobs.report import JobReporter
from jobs.sealing import Sealer, seal_points
from jobs.segment_task import delete_segments_of

SEALED, PLANNED, BUILT, CAUGHT_UP, GATED = 0.05, 0.1, 0.8, 0.85, 0.99  # shares of the whole, for the progress bar
CATCH_UP_ROUNDS = 5  # over all shards: then the replicas replay the rest


@dataclass(frozen=True)
class RebuildOptions:
    """What to rebuild, and what is to be different: `index` holds fields of `IndexConfig`, with another kind all of
    that kind's options; `shards` is their number. None: as it is.

    `memory_bytes` bounds the indexes being built at one time on one node, as an import's does. `metric_report` is a
    local file that gets what the gate measured.
    """

    collection: str
    index: dict[str, Any] | None = None
    shards: int | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    seed: int = 0
    metric_report: str | None = None


class Rebuilder:
    """One run of one rebuild."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        log: ManifestLog,
        options: RebuildOptions,
        workers: Workers,
        cache_dir: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        statuses: Callable[[], Statuses] = dict,
    ) -> None:
        """`statuses` are those of the collection's replicas, as far as any are known: for the memory of the switch."""
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers
        self._cache_dir = cache_dir
        self._clock = clock
        self._statuses = statuses

    def run(self, job_id: str, reporter: JobReporter) -> tuple[Manifest, dict[str, Any]]:
        """Rebuild and commit; returns the committed manifest, and the report.

        When this raises nothing is committed, unless it is Unavailable from the commit: then nobody knows. GateFailed
        has the report of the gate.
        """
        started = self._clock()
        place = Place(self._data, self._options.collection, job_id, self._cache_dir)
        try:
            plan, entries, gate = self._prepared(place, reporter)
        except BaseException:  # stopped, too: SystemExit
            self._delete_segments(job_id)
            raise
        try:
            how = plan.switch.mode
            manifest = self._log.commit_generation(plan.base, plan.config, entries, switch=how, num_gpus=plan.num_gpus)
        except Conflict:  # only this says for sure that the manifest was not written
            self._delete_segments(job_id)
            raise
        return manifest, {
            "points": manifest.points,
            "version": manifest.version,
            "generation": manifest.generation,
            "shards": len(manifest.shards),
            "segments": len(manifest.segments),
            "seconds": round(self._clock() - started, 3),
            "memory": plan.memory,
            "gate": gate,
        }

    def _prepared(
        self, place: Place, reporter: JobReporter
    ) -> tuple[RebuildPlan, tuple[ShardEntry, ...], dict[str, Any]]:
        """All before the commit: the plan, the entries, and the gate's report."""
        options = self._options
        changed_config(self._log.newest_live().config, options)  # refuses now what cannot be
        sealer = Sealer(self._data, self._log, self._workers, self._cache_dir, options.memory_bytes)
        base = sealer.sealed(options.collection, reporter, SEALED)
        plan = self._plan(place, base, changed_config(base.config, options), reporter)
        plan = self._measured(place, plan, reporter)
        real = read_queries(self._store, options.collection, plan.config, options.seed)
        built = self._build(place, plan, real, reporter)
        drafts = self._caught_up(place, plan, drafts_of(plan, built), reporter)
        gate = self._gated(place, plan, built, drafts, real, reporter)
        gated, drafts = drafts, self._caught_up(place, plan, drafts, reporter)  # with what came during the gate
        made = {each.segment for each in built.values() if each.segment} | _segments(gated)
        for ref in made - _segments(drafts):  # their points were all written again; no stop comes after the commit
            self._shard(place, 0).discard(ref.segment_id)
        reporter.phase("commit")
        return plan, tuple(self._finished(place, draft) for draft in drafts), gate

    def _finished(self, place: Place, draft: DraftEntry) -> ShardEntry:
        return finished_entry(self._shard(place, draft.entry.shard), draft)

    def _shard(self, place: Place, shard: int) -> ShardPlace:
        return ShardPlace(self._store, place.collection, shard, place.cache, _new_nonce)

    # --- plan and build ---------------------------------------------------------------------------------------

    def _plan(self, place: Place, base: Manifest, config: CollectionConfig, reporter: JobReporter) -> RebuildPlan:
        """Read all that is to be rebuilt once: how many points, of which types, with which checksum."""
        reporter.phase("plan")
        gpus = self._gpus(base, config)
        if base.points:
            plan_build(base.points, config, self._options.memory_bytes, self._workers, gpus)  # refuses before it reads
        tasks = [SurveyTask(place, entry, ref) for entry in base.shards for ref in entry.segments]
        surveys: dict[int, Survey] = {}
        rows = 0
        for number, event in self._workers.run_tasks(survey_segment, tasks, 1, self._workers.cpus):
            surveys[number] = event["survey"]
            rows += tasks[number].ref.count
            done = rows / max(1, sum(task.ref.count for task in tasks))
            reporter.progress(SEALED + (PLANNED - SEALED) * done, rows)
        attributes: dict[str, Any] = {}
        index_bytes = [0] * len(base.shards)
        for number, task in enumerate(tasks):
            attributes = surveys[number].attributes | attributes
            index_bytes[task.entry.shard] += surveys[number].index_bytes
        if again := to_survey_again(tasks, surveys, attributes):
            numbers = list(again)
            for at, event in self._workers.run_tasks(survey_segment, list(again.values()), 1, self._workers.cpus):
                surveys[numbers[at]] = event["survey"]
        points = sum((survey.points for survey in surveys.values()), PointSum())
        bounds = (self._options.memory_bytes, self._workers, gpus)
        build = plan_build(points.count, config, *bounds) if points.count else None
        largest = max((survey.index_bytes for survey in surveys.values()), default=0)
        return RebuildPlan(base, config, points, attributes, tuple(index_bytes), largest, build, gpus=gpus)

    def _gpus(self, base: Manifest, config: CollectionConfig) -> BuildGpus | None:
        """GPUs as they are now. The collection's own replicas keep theirs where they have the same share of one; with
        another share others are started beside them."""
        return build_gpus(config, self._workers.gpus, base.points, held_gpus(self._statuses()), base.num_gpus)

    def _measured(self, place: Place, plan: RebuildPlan, reporter: JobReporter) -> RebuildPlan:
        """The plan with rates measured on a sample of the rows, where the build is long enough to be worth it.

        And with the memory of the switch; Exhausted, with the numbers, where there is not enough of it.
        """
        if plan.build is not None and plan.build.worth_measuring:
            reporter.phase("measure")
            task = self._range_task(place, plan, 0, None)
            for _, event in self._workers.run_tasks(measure_range, [task], plan.build.builds.num_cpus, 1):
                build = with_rates(plan.build, event["rates"], self._options.memory_bytes, self._workers)
                plan = replace(plan, build=build)
        statuses = self._statuses()
        on_gpus = None
        if plan.coming_on_gpus is not None:
            on_gpus = ComingOnGpus(plan.num_gpus, plan.coming_on_gpus, plan.loading)
        switch = memory_of_switch(plan.base.collection, plan.config, statuses, plan.coming, on_gpus)
        plan = replace(plan, switch=switch)
        reporter.plan(plan.to_dict())
        return plan

    def _build(
        self, place: Place, plan: RebuildPlan, real: Vectors | None, reporter: JobReporter
    ) -> dict[int, BuiltRange]:
        """By partition; one without points has no segment."""
        reporter.phase("build")
        if plan.build is None:
            return {}
        tasks = [self._range_task(place, plan, partition, real) for partition in range(plan.build.partitions)]
        shares = [0.0] * len(tasks)
        built: dict[int, BuiltRange] = {}
        for number, event in self._workers.build(build_range, tasks, plan.build.builds):
            shares[number] = event.get("share", 1.0)
            if "built" in event:
                built[number] = event["built"]
            done = sum(shares) / len(shares)
            reporter.progress(PLANNED + (BUILT - PLANNED) * done, int(done * plan.old.count))
        return built

    def _range_task(self, place: Place, plan: RebuildPlan, partition: int, queries: Vectors | None) -> RangeTask:
        assert plan.build is not None
        partitions, old = plan.build.partitions, plan.base.shards
        hashes = HashRange.of_slot(partition, partitions)
        return RangeTask(
            place=replace(place, threads=plan.build.builds.threads, gpus=TaskGpus.of(plan.build)),
            partition=partition,
            partitions=partitions,
            entries=tuple(entry for entry in old if hashes.meets(HashRange.of_slot(entry.shard, len(old)))),
            config=plan.config,
            attributes=plan.attributes,
            plan=plan.build.index,
            rates=plan.build.rates,
            seed=self._options.seed,
            queries=queries,
            asked=ceil(gate_queries(plan.build) / partitions),
        )

    # --- catch up and gate ------------------------------------------------------------------------------------

    def _caught_up(
        self, place: Place, plan: RebuildPlan, drafts: list[DraftEntry], reporter: JobReporter
    ) -> list[DraftEntry]:
        """The drafts with what was written since, but for the little that replicas replay."""
        reporter.phase("catch up")
        config, gpu = plan.built_for, added_on(plan.device)
        points_max = seal_points(largest_build(config, self._options.memory_bytes, gpu))
        needed = ceil(min(self._options.memory_bytes, build_bytes(config, points_max, gpu)))
        builds = plan_builds(len(drafts), needed, self._options.memory_bytes, self._workers)
        at = replace(place, threads=builds.threads)
        sealed = 0
        for _ in range(CATCH_UP_ROUNDS):
            base = newest_of_generation(self._log, plan.base)
            tasks = [CatchUpTask(at, draft, base, config, points_max) for draft in drafts]
            before = sealed
            for number, event in self._workers.build(catch_up, tasks, builds):
                if "draft" in event:
                    drafts = [*drafts[:number], event["draft"], *drafts[number + 1 :]]
                    sealed += event["ids"]
                    reporter.progress(max(BUILT, reporter.status.progress), sealed)
            if sealed == before:
                break
        return drafts

    def _gated(
        self,
        place: Place,
        plan: RebuildPlan,
        built: dict[int, BuiltRange],
        drafts: list[DraftEntry],
        real: Vectors | None,
        reporter: JobReporter,
    ) -> dict[str, Any]:
        """The gate's report; GateFailed, with it, where the generation may not be served."""
        reporter.phase("gate")
        builds = plan.build.builds if plan.build else plan_builds(1, 1, self._options.memory_bytes, self._workers)
        made = [each.queries for each in built.values() if len(each.queries)]
        candidate = Candidate(
            plan.config,
            tuple(ShardSegments(plan.config, draft.entry.segments, dict(draft.deleted)) for draft in drafts),
            tuple(each.segment for each in built.values() if each.segment),
            plan.old,
            plan.same,
            np.concatenate(made) if made else np.empty((0, plan.config.dimension), np.float32),
            real,
            gate_queries(plan.build) if plan.build else 0,
        )
        at = replace(place, threads=builds.threads, gpus=TaskGpus.for_searches(plan.build))
        fits = plan.old_largest_bytes * MEMORY_MARGIN <= self._options.memory_bytes
        # Else loading them for their latency takes more than a build may, or would tell that of their twins.
        old = plan.base.shards if fits and plan.comparable else ()
        for found in measure_gate(at, candidate, old, plan.base.config, self._workers, builds):
            if isinstance(found, GateFacts):
                facts = found
            else:
                reporter.progress(CAUGHT_UP + (GATED - CAUGHT_UP) * found)
        report = gate_report(facts)
        if reasons := refusals(facts):
            raise GateFailed(
                f"the new generation of {plan.base.collection!r} may not be served: {'; '.join(reasons)}. "
                "What is served stays as it is",
                report,
            )
        return report

    def _delete_segments(self, job_id: str) -> None:
        """Delete what the job built and no manifest names."""
        delete_segments_of(job_id, self._store, self._log, self._options.collection)


def changed_config(config: CollectionConfig, options: RebuildOptions) -> CollectionConfig:
    """The config with what is to be different; Invalid names the field that cannot be so."""
    index, given = asdict(config.index), dict(options.index or {})
    if given.get("kind", config.index.kind) != config.index.kind:
        index |= dict.fromkeys(ALL_OPTIONS)  # they go with the old kind
    changed = config.to_dict() | {"index": index | given}
    if options.shards is not None:
        changed["shards"] = options.shards
    wanted = CollectionConfig.from_dict(changed)
    if wanted.index.factory is not None:
        check_factory(wanted.index.factory, wanted.dimension, wanted.metric)
    return wanted


def _segments(drafts: list[DraftEntry]) -> set[SegmentRef]:
    return {ref for draft in drafts for ref in draft.entry.segments}


def _new_nonce() -> str:
    return uuid.uuid4().hex
