"""`eagleray plan`: the policy's choice for vectors that are not imported yet, without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from actors.build_rates import SAMPLE_POINTS, measure_rates
from actors.code_check import codes_fit
from actors.faiss_index import use_threads
from cluster.config import CollectionConfig
from cluster.errors import Invalid
from cluster.gpu_memory import PROCESS_BYTES, GpuFacts, gpu_need
from cluster.gpu_policy import check_asked
from cluster.gpu_share import GpuShare, choose_share
from cluster.index_costs import REFERENCE, Rates, ReplicaMemory, replica_memory
from cluster.index_policy import IndexPlan, plan_index, rounded
from jobs.import_source import Columns, Source, Unit, find_source, read_batches
from jobs.row_reader import READ_BYTES, RowPlace, checked_vectors
from serve.explain import bytes_text, config_line, considered_table, index_name, print_line, seconds_text, threads_text
from serve.schemas import check_config

SAMPLED_UNITS = 8  # parts of the source that the sample is taken from
REFERENCE_MACHINE = (
    "times are those of the reference machine: 2 threads of an AMD EPYC with AVX-512, vectors like WordNet's"
)


@dataclass(frozen=True)
class CollectionPlan:
    """The index of each shard of a collection; `note` is what the sample says beyond the build times. `share` is what
    each replica gets of a GPU, where one is thought of.

    Seconds and queries a second of an index on GPUs are None: nothing was measured to predict them by.
    """

    count: int
    config: CollectionConfig
    index: IndexPlan
    rates: Rates = REFERENCE
    note: str = ""
    share: GpuShare | None = None

    @property
    def gpu_share(self) -> GpuShare | None:
        """None where it is served on CPUs."""
        return self.share if self.index.spec.device == "gpu" else None

    @property
    def shard_points(self) -> int:
        return ceil(self.count / self.config.shards)

    @property
    def replica(self) -> ReplicaMemory:
        """The memory of each replica of a shard."""
        return replica_memory(self.index.spec.predicted_bytes, self.shard_points, self.config)

    def to_dict(self) -> dict[str, Any]:
        chosen = self.index.chosen
        return {
            "count": self.count,
            "points_per_shard": self.shard_points,
            "config": self.config.to_dict(),
            "index": chosen.spec.to_dict(),
            "num_gpus": self.gpu_share.num_gpus if self.gpu_share else 0.0,
            "num_gpus_reason": self.gpu_share.reason if self.gpu_share else "",
            "predicted_bytes_per_shard": chosen.spec.predicted_bytes,
            "predicted_bytes": chosen.spec.predicted_bytes * self.config.shards,
            "predicted_replica_bytes": asdict(self.replica),
            "predicted_build_seconds_per_shard": rounded(chosen.build_seconds, 3),
            "predicted_queries_per_s": rounded(chosen.queries_per_s, 1),
            "rates": asdict(self.rates),
            "times": self.times,
            "note": self.note,
            "considered": [candidate.to_dict() for candidate in self.index.considered],
        }

    @property
    def times(self) -> str:
        """What machine and vectors the times are for."""
        if not self.rates.measured:
            return REFERENCE_MACHINE
        return f"times are for this machine and these vectors, measured with {threads_text(self.rates.threads)}"


def plan_for(
    fields: dict[str, Any],
    count: int | None,
    source: str | None,
    id_column: str = "id",
    vector_column: str = "vector",
    threads: int | None = None,
    gpu: GpuFacts | None = None,
) -> CollectionPlan:
    """The plan for a count or for a source, whichever is given; `gpu`: what there would be of GPUs."""
    if source is not None:
        if count is not None or "dimension" in fields:
            raise Invalid.at("source", "gives count and dimension itself: leave --count and --dimension out")
        cores = len(os.sched_getaffinity(0))
        return plan_source(source, Columns(id_column, vector_column), fields, threads or cores, gpu)
    if count is None or "dimension" not in fields:
        raise Invalid("give --count and --dimension, or --source")
    if threads is not None:
        raise Invalid.at("threads", f"goes with --source: {REFERENCE_MACHINE}")
    return plan_count(count, fields, gpu)


def plan_count(count: int, fields: dict[str, Any], gpu: GpuFacts | None = None) -> CollectionPlan:
    """The plan for so many points; `fields` as a PUT has them. Invalid, with the numbers, where nothing fits."""
    config = check_config(fields)
    check_asked(config, gpu)
    share, facts = _share(gpu, config, ceil(count / config.shards))
    return CollectionPlan(count, config, plan_index(ceil(count / config.shards), config, gpu=facts), share=share)


def plan_source(
    url: str, columns: Columns, fields: dict[str, Any], threads: int, gpu: GpuFacts | None = None
) -> CollectionPlan:
    """The plan for the rows of a Parquet source, with times measured here on a sample of them."""
    source = find_source(url, columns)
    if source.dimension is None:
        raise Invalid.at("source", f"{url!r} holds no vector")
    config = check_config({"dimension": source.dimension, **fields})
    check_asked(config, gpu)
    sample = _sample(url, source, columns, config)
    use_threads(threads)
    rates = measure_rates(sample, config.metric, threads)
    share, facts = _share(gpu, config, ceil(source.rows / config.shards))
    index = plan_index(ceil(source.rows / config.shards), config, rates, facts)
    return CollectionPlan(source.rows, config, index, rates, _code_note(sample, index, config), share)


def _share(gpu: GpuFacts | None, config: CollectionConfig, per_shard: int) -> tuple[GpuShare | None, GpuFacts | None]:
    """The share of a GPU of which `gpu` tells the whole memory, and what a replica may use of it."""
    if gpu is None:
        return None, None
    share = choose_share(per_shard, config, gpu.memory_bytes)
    if gpu.memory_bytes is None:
        return share, gpu
    return share, replace(gpu, memory_bytes=int(gpu.memory_bytes * share.num_gpus))


def print_plan(out: Console, plan: CollectionPlan) -> None:
    """The choice for one shard, why, all that was considered, and what the whole collection takes."""
    chosen, shards = plan.index.chosen, plan.config.shards
    spec = chosen.spec
    name = index_name(spec.kind, spec.codes, spec.rerank_store, spec.params, spec.device)
    each = f"each of {shards} shards, {plan.shard_points:,} points: " if shards > 1 else ""
    print_line(out, f"{plan.count:,} points, {config_line(plan.config.to_dict())}")
    print_line(out, f"{each}{name}")
    print_line(out, f"  why: {spec.reason}")
    out.print(considered_table(candidate.to_dict() for candidate in plan.index.considered))
    print_line(out, f"each replica: {_memory_text(plan.replica, spec.rerank_store)}")
    if plan.gpu_share is not None:
        print_line(out, f"  on {plan.gpu_share.num_gpus:g} GPU, since {plan.gpu_share.reason}: {_gpu_text(plan)}")
    seconds = chosen.build_seconds
    took = "" if seconds is None else f", about {seconds_text(seconds)} s to build{' each shard' if shards > 1 else ''}"
    print_line(out, f"total: {bytes_text(spec.predicted_bytes * shards)}{took}; {plan.times}")
    if plan.note:
        print_line(out, plan.note)


def _memory_text(memory: ReplicaMemory, rerank_store: str) -> str:
    index, ids, rows, process = map(bytes_text, (memory.index, memory.ids, memory.rows, memory.process))
    use = (
        "to rank candidates by exact distances" if rerank_store == "rows" else "for answers with vectors or attributes"
    )
    return f"{index} of index, {ids} of ids, {process} of process; {rows} of rows in the page cache where read, {use}"


def _gpu_text(plan: CollectionPlan) -> str:
    need = gpu_need(plan.index.spec, plan.shard_points, plan.config.dimension)
    index, search, process, build = map(bytes_text, (need.index, need.search, PROCESS_BYTES, need.build))
    told = f"{index} of index, {search} for a search of the largest batch, {process} of process"
    return f"{told}; {build} to build there; predicted by formulas, not measured"


def _code_note(sample: NDArray[np.float32], index: IndexPlan, config: CollectionConfig) -> str:
    """What a build would find out about the chosen codes."""
    spec = index.spec
    if config.index.kind != "auto" or spec.kind != "hnsw" or codes_fit(sample, spec.codes, config.metric):
        return ""
    return f"{spec.codes} codes lose neighbours of these vectors: the build takes others"


def _sample(url: str, source: Source, columns: Columns, config: CollectionConfig) -> NDArray[np.float32]:
    """Up to `SAMPLE_POINTS` vectors as the index sees them, from units all over the source."""
    filled = [unit for unit in source.units if unit.rows]
    units = filled[:: ceil(len(filled) / SAMPLED_UNITS)]
    each = ceil(SAMPLE_POINTS / len(units))
    parts = [part for unit in units for part in _first_vectors(url, unit, each, columns, config)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _first_vectors(
    url: str, unit: Unit, count: int, columns: Columns, config: CollectionConfig
) -> Iterator[NDArray[Any]]:
    """The unit's first vectors in batches, `count` of them; Invalid names a bad one."""
    size = max(1, min(count, READ_BYTES // (4 * config.dimension)))
    rows_of = dict.fromkeys(unit.row_groups, 0)
    for group, batch in read_batches(url, unit, size, [columns.vector]):
        place = RowPlace(unit.file, group, rows_of[group])
        yield checked_vectors(batch.column(0).slice(0, count), config, columns.vector, place)
        rows_of[group] += batch.num_rows
        count -= batch.num_rows
        if count <= 0:
            return
