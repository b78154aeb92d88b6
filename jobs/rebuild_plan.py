"""What a rebuild makes of what there is, decided before it builds: the index, the device, the memory of the switch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from actors.entry_seal import DraftEntry
from cluster.config import CollectionConfig, ServedOn
from cluster.gate import PointSum
from cluster.gpu_memory import host_load_bytes
from cluster.manifest import Manifest, ShardEntry
from cluster.manifest_format import config_built_for
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from cluster.switch_memory import SwitchMemory
from jobs.build_plan import BuildGpus, BuildPlan
from jobs.rebuild_task import BuiltRange


@dataclass(frozen=True)
class RebuildPlan:
    """`base` is the version that is rebuilt: everything in it is in segments. `build` is None without any points."""

    base: Manifest
    config: CollectionConfig
    old: PointSum
    attributes: dict[str, Any]
    old_index_bytes: tuple[int, ...]  # of each shard
    old_largest_bytes: int  # of a segment's index
    build: BuildPlan | None
    switch: SwitchMemory = field(default_factory=lambda: SwitchMemory("beside"))
    gpus: BuildGpus | None = None  # that there are for it

    @property
    def num_gpus(self) -> float:
        """The share of a GPU that each replica of the new generation gets; 0 on CPUs."""
        if self.build is None:
            return self.gpus.each if self.gpus and self.config.index.device == "gpu" else 0.0
        return self.build.num_gpus

    @property
    def device(self) -> ServedOn:
        """What the new generation is served on."""
        return "gpu" if self.num_gpus else "cpu"

    @property
    def built_for(self) -> CollectionConfig:
        """The config by which segments are added to it, as `Manifest.built_for`."""
        return config_built_for(self.config, self.device)

    @property
    def same(self) -> bool:
        """Whether what is built is as what there is."""
        return self.config == self.base.config and self.device == self.base.device

    @property
    def comparable(self) -> bool:
        """Whether a task can search both generations as they are served: on GPUs only with one."""
        on_cpus = self.device == self.base.device == "cpu"
        return on_cpus or bool(self.build and self.build.builds.num_gpus)

    @property
    def partitions_per_shard(self) -> int:
        return self.build.partitions // self.config.shards if self.build else 0

    @property
    def coming(self) -> list[tuple[int, int]]:
        """(predicted bytes of its indexes, points) of each new shard."""
        each = self.build.spec.predicted_bytes * self.partitions_per_shard if self.build else 0
        return [(each, ceil(self.old.count / self.config.shards))] * self.config.shards

    @property
    def coming_on_gpus(self) -> list[int] | None:
        """Predicted bytes of each new shard's indexes on a GPU; None where it is served on CPUs."""
        if self.device == "cpu":
            return None
        each = self.build.spec.gpu_bytes * self.partitions_per_shard if self.build else 0
        return [each] * self.config.shards

    @property
    def loading(self) -> int:
        """Bytes of the host that a replica takes for a while when it loads a segment's index onto its GPU."""
        if self.build is None or self.device == "cpu":
            return 0
        return host_load_bytes(self.build.spec, self.build.count)

    @property
    def memory(self) -> dict[str, Any]:
        """Predicted bytes of the indexes: of one new replica, of all new ones, and what is loaded beside these.

        Where they are for GPUs, those of their twins on the host, which are only mapped, and those on the GPU.
        """
        (each, _), *_ = self.coming
        gpu = {"gpu_bytes_per_replica": self.coming_on_gpus[0]} if self.coming_on_gpus else {}
        return gpu | {
            "bytes_per_replica": each,
            "bytes": each * self.config.shards * self.config.replicas,
            "beside_bytes_per_replica": max(self.old_index_bytes, default=0),
            "beside_bytes": sum(self.old_index_bytes) * self.base.config.replicas,
            "switch": self.switch.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """For the job's status."""
        built = self.build.to_dict() if self.build else {"segments": 0}
        return built | {
            "points": self.old.count,
            "shards": self.config.shards,
            "base_version": self.base.version,
            "memory": self.memory,
        }


def drafts_of(plan: RebuildPlan, built: Mapping[int, BuiltRange]) -> list[DraftEntry]:
    """The new shards as of the base: behind its logs where their number is another."""
    old, each = plan.base.shards, plan.partitions_per_shard
    positions = tuple(LogPosition(entry.shard, entry.applied_lsn, entry.epoch) for entry in old)
    drafts = []
    for shard in range(plan.config.shards):
        mine = [built[number].segment for number in range(shard * each, (shard + 1) * each)]
        entry = ShardEntry(shard, tuple(ref for ref in mine if ref is not None))
        if plan.config.shards == len(old):
            entry = replace(entry, applied_lsn=old[shard].applied_lsn, epoch=old[shard].epoch)
        else:
            entry = behind_logs(entry, LogSet(plan.base.log_set, len(old), positions))
        drafts.append(DraftEntry(entry))
    return drafts
