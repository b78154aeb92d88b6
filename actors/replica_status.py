"""What a replica says of itself, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from actors.crossing import Crossing
from actors.live_generation import LiveGeneration
from actors.segment_loader import LoadedSegment
from actors.shard_client import ShardEndpoint
from actors.shard_view import ShardView
from cluster.placement import ReplicaKey, ReplicaState


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself. `error` is why it serves nothing, where that is so.

    `points` (live ones), `segments`, `tail_points` and `tombstones` are those of its newest generation; `attributes`
    are Arrow types, as text, by generation and name. `lsn` is the last record applied; `epoch` is that of the replica
    as primary, 0 where it is none. `upkeep` tells what is being sealed or merged, or why that failed. `observed` has
    the recall of live queries (`RecallObserver.observed`), for each generation of which some were evaluated.
    `endpoint` is where it takes direct connections, None where it does not. `log_set` is the set of the log that it
    follows or leads, which begins behind `log_start`; `log_ended`: nothing more can be written to that one, and nothing
    of a later set is here. `crossing` has the generation that still reads the logs of earlier sets, and how many
    records it lacks: it is in `versions`, but not in `generations`. `node_memory` is what of its node's memory can be
    had, and all of it, in bytes; None where nobody knows. `gpu` has the facts of its GPU (`GpuDevice.facts`), None
    without one; `degraded` is why the twin of an index answers that a GPU should, "" where none does; `has_twin` says
    whether of one generation each index has one that may.
    """

    state: ReplicaState
    versions: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    points: int = 0
    threads: int = 0
    pid: int = 0
    node: str = ""
    error: str = ""
    segments: tuple[dict[str, Any], ...] = field(default=())
    attributes: dict[int, dict[str, str]] = field(default_factory=dict)
    observed: tuple[dict[str, Any], ...] = ()
    lsn: int = 0
    epoch: int = 0
    tail_points: int = 0
    tombstones: int = 0
    upkeep: str = ""
    endpoint: ShardEndpoint | None = None
    log_set: int = 0
    log_start: int = 0
    log_ended: bool = False
    crossing: dict[int, int] = field(default_factory=dict)
    node_memory: tuple[int, int] | None = None
    gpu: dict[str, Any] | None = None
    degraded: str = ""
    has_twin: bool = True

    @property
    def waits(self) -> bool:
        """Whether it has no process yet because something lacks for one, which `error` then tells."""
        return self.state == "starting" and bool(self.error)


Statuses = Mapping[ReplicaKey, ReplicaStatus]


class LogFacts(NamedTuple):
    """What a status tells of the log that a replica follows or leads."""

    lsn: int
    epoch: int
    log_set: int
    log_start: int
    log_ended: bool


def status_of(held: Sequence[LiveGeneration], crossing: Crossing | None, failure: str, log: LogFacts) -> ReplicaStatus:
    """Of generations, in order; with `failure` where there is none."""
    lag = {crossing.number: crossing.lag} if crossing is not None and crossing.lag is not None else {}
    versions = {version for one in held for version in one.versions}
    if crossing is not None and lag:
        versions |= set(crossing.versions)
    if not held:
        state: ReplicaState = "ready" if lag else "failed"
        return ReplicaStatus(state, tuple(sorted(versions)), error="" if lag else failure, crossing=lag)
    views = [one.view for one in held]
    newest = views[-1]
    return ReplicaStatus(
        "ready",
        tuple(sorted(versions)),
        tuple(view.generation for view in views),
        newest.points,
        segments=tuple(_segment_status(segment, newest) for segment in newest.segments),
        attributes={v.generation: {name: str(dtype) for name, dtype in v.attributes.items()} for v in views},
        tail_points=newest.tail_points,
        tombstones=newest.tombstones,
        crossing=lag,
        degraded=_degraded(views),
        has_twin=any(all(s.twin is None or s.twin.cpu_twin for s in view.segments) for view in views),
        **log._asdict(),
    )


def _degraded(views: Sequence[ShardView]) -> str:
    """Why the first of the segments that are not on the GPU is not, of the newest view first."""
    twins = [(s.description.segment_id, s.twin) for view in reversed(views) for s in view.segments]
    reasons = (f"segment {name}: {twin.why}" for name, twin in twins if twin is not None and twin.why)
    return next(reasons, "")


def _segment_status(segment: LoadedSegment, view: ShardView) -> dict[str, Any]:
    description, selection, twin = segment.description, view.selection(segment), segment.twin
    return {
        "segment_id": description.segment_id,
        "count": description.count,
        "tombstones": 0 if selection is None else selection.count - selection.kept,
        "index_kind": segment.spec.kind,
        "index_params": segment.spec.params,
        "codes": segment.spec.codes,
        "rerank_store": segment.spec.rerank_store,
        "index_bytes": description.files["index.faiss"].size_bytes,
        "rows_bytes": description.files["rows.arrow"].size_bytes,
        "predicted_bytes": segment.spec.predicted_bytes,
        "reason": segment.spec.reason,
        "considered": list(description.considered),
        "operating_points": [vars(point) for point in description.operating_points],
        "attributes": description.attributes,
        "built": description.built,
        "device": segment.spec.device,
    } | ({} if twin is None else {"cpu_twin": description.cpu_twin} | twin.facts())
