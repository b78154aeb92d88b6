"""What a manifest says, its bytes, and what must be true of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from cluster.config import NUM_GPUS_MIN, CollectionConfig, ServedOn
from cluster.errors import Corrupt, EaglerayError
from cluster.gpu_memory import GpuFacts
from cluster.routing import Routing
from cluster.segment import checksum_bytes
from cluster.shard_entry import (
    LogSet,
    SegmentRef,
    ShardEntry,
    lsns_that_go_back,
    wrong_behind,
    wrong_tombstones,
)

# 1 had no LSNs, epochs, tombstones, attributes; 2 no log sets, origins, ways to switch; 3 no device; 4 not its share
FORMAT = 5
FORMATS = {  # fields, and the formats that have them
    "attributes": range(2, FORMAT + 1),
    "log_set": range(3, FORMAT + 1),
    "switch": range(3, FORMAT + 1),
    "device": range(4, 5),
    "num_gpus": range(5, FORMAT + 1),
}
Switch = Literal["beside", "one_at_a_time"]


@dataclass(frozen=True)
class Manifest:
    """One committed version. `state="deleted"` ends a collection; the same name may be created again after it.

    `attributes` are those that writes declared or an import brought: name -> Arrow type as text, which
    `pa.type_for_alias` reads. `log_set` is the number of the set of logs that its shards write to. `switch` says how
    replicas take it up: "beside" the generation before, or one replica of a shard at a time in the place of it.
    `num_gpus` is the share of a GPU that each replica of the generation has, for which its segments were built; 0: it
    is served on CPUs.
    """

    collection: str
    version: int
    config: CollectionConfig
    routing: Routing
    generation: int
    shards: tuple[ShardEntry, ...]
    created_at: str
    writer: str
    state: Literal["live", "deleted"] = "live"
    format: int = FORMAT
    attributes: dict[str, str] = field(default_factory=dict)
    log_set: int = 0
    switch: Switch = "beside"
    num_gpus: float = 0.0

    @property
    def device(self) -> ServedOn:
        """What the generation is served on."""
        return "gpu" if self.num_gpus else "cpu"

    @property
    def crossing(self) -> bool:
        """Whether a shard has to read logs of earlier sets; they may have ended."""
        return any(entry.behind for entry in self.shards)

    @property
    def behind(self) -> tuple[LogSet, ...]:
        """The earlier sets of a shard that has to read some. Others may have read on further, or have crossed: to end
        these ends the logs of all."""
        return next((entry.behind for entry in self.shards if entry.behind), ())

    @property
    def points(self) -> int:
        return sum(shard.points for shard in self.shards)

    @property
    def built_for(self) -> CollectionConfig:
        """The config by which segments are added to this generation (`config_built_for`)."""
        return config_built_for(self.config, self.device)

    @property
    def segments(self) -> dict[str, SegmentRef]:
        return {ref.segment_id: ref for shard in self.shards for ref in shard.segments}

    def encode(self) -> bytes:
        """JSON of the newest format, with a checksum over everything else."""
        body = asdict(self) | {"config": self.config.to_dict(), "routing": self.routing.to_dict(), "format": FORMAT}
        return json.dumps(body | {"checksum": checksum_bytes(_canonical(body))}, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """Parse; Corrupt, naming the object, where the bytes are not what was written."""
        try:
            body = json.loads(data)
            if body["format"] not in range(1, FORMAT + 1):
                raise Corrupt(f"format {body['format']}, this version reads 1 to {FORMAT}")
            checksum = body.pop("checksum")
            if checksum != checksum_bytes(_canonical(body)):
                raise Corrupt("the checksum does not match the content")
            body["config"] = CollectionConfig.from_dict(body["config"])
            body["routing"] = Routing.from_dict(body["routing"])
            body["shards"] = tuple(ShardEntry.from_dict(entry, body["format"]) for entry in body["shards"])
            if wrong := [name for name, having in FORMATS.items() if (name in body) != (body["format"] in having)]:
                raise Corrupt(f"a manifest of format {body['format']} with or without {', '.join(wrong)}")
            if "device" in body:
                body["num_gpus"] = _share_of(body.pop("device"), body["config"])
            if body["format"] > 1 and not all(isinstance(text, str) for text in body["attributes"].values()):
                raise Corrupt("the type of an attribute is not text")
            if not isinstance(body.get("log_set", 0), int) or body.get("log_set", 0) < 0:
                raise Corrupt("the number of the log set is none")
            manifest = cls(**body)
            if broken := broken_invariants(manifest):
                raise Corrupt("; ".join(broken))
        except Corrupt as error:
            raise Corrupt(f"{key}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EaglerayError) as error:
            raise Corrupt(f"{key}: not a manifest: {error!r}") from error
        return manifest


def _share_of(device: object, config: CollectionConfig) -> float:
    """What replicas had of a GPU when manifests told only the device."""
    if device not in get_args(ServedOn):
        raise Corrupt(f"{device!r} is nothing to serve on")
    return (config.index.num_gpus or 1.0) if device == "gpu" else 0.0


def config_built_for(config: CollectionConfig, device: ServedOn) -> CollectionConfig:
    """The config by which segments are added to a generation that is served on `device`: for the same one, but built on
    CPUs. What only a GPU builds is left to the policy."""
    index = replace(config.index, device=device)
    if index.kind == "cagra":
        index = replace(index, kind="auto", codes=None, graph_degree=None)
    return replace(config, index=index)


def added_on(device: ServedOn) -> GpuFacts | None:
    """What a plan of such segments is told of GPUs: they are built on CPUs, and nothing is known of a GPU's memory."""
    return GpuFacts(builds=False) if device == "gpu" else None


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def broken_invariants(manifest: Manifest, parent: Manifest | None = None) -> list[str]:
    """What is wrong with a manifest, on its own and after its parent; empty when nothing is."""
    broken = []
    names = [ref.segment_id for shard in manifest.shards for ref in shard.segments]
    if len(names) != len(set(names)):
        broken.append("a segment belongs to more than one shard")
    if [entry.shard for entry in manifest.shards] != list(range(manifest.routing.shards)):
        broken.append(f"shards are not 0 to {manifest.routing.shards - 1}")
    if any(ref.count < 1 for ref in manifest.segments.values()):
        broken.append("a segment holds no rows")
    if manifest.version != (parent.version + 1 if parent else max(1, manifest.version)):
        broken.append(f"version {manifest.version} does not follow {parent.version if parent else 0}")
    if parent and parent.state == "live" and manifest.generation < parent.generation:
        broken.append(f"generation {manifest.generation} goes back from {parent.generation}")
    if manifest.switch not in get_args(Switch):
        broken.append(f"{manifest.switch!r} is no way to switch")
    if not _is_share(manifest.num_gpus):
        broken.append(f"{manifest.num_gpus!r} is no share of a GPU")
    if parent and parent.generation == manifest.generation and parent.num_gpus != manifest.num_gpus:
        broken.append(f"generation {manifest.generation} goes from {parent.num_gpus} to {manifest.num_gpus} GPUs")
    if parent and manifest.log_set < parent.log_set:
        broken.append(f"log set {manifest.log_set} goes back from {parent.log_set}")
    if any(logs.number >= manifest.log_set for entry in manifest.shards for logs in entry.behind):
        broken.append(f"a shard is behind log set {manifest.log_set} or a later one")
    for entry in manifest.shards:
        broken += [f"shard {entry.shard}: {wrong}" for wrong in (*wrong_tombstones(entry), *wrong_behind(entry))]
    if parent and parent.generation == manifest.generation and len(parent.shards) == len(manifest.shards):
        broken += lsns_that_go_back(parent.shards, manifest.shards)
    return broken


def _is_share(value: object) -> bool:
    """None of a GPU, or what a replica can ask for."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or NUM_GPUS_MIN <= value <= 1
