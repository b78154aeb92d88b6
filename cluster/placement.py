"""Wanted replicas against observed ones -> what to do next. Pure: the supervisor performs the actions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.config import NUM_GPUS_MIN, CollectionConfig, ServedOn, Settings
from cluster.errors import Invalid
from cluster.manifest_format import Switch

NEAR_RECORDS = 64  # of earlier logs that a generation lacks when these may end; writes wait while they are applied
ReplicaState = Literal["starting", "ready", "failed", "unreachable"]


@dataclass(frozen=True, order=True)
class ReplicaKey:
    """One replica of one shard of one collection, with its share of a GPU (0: it is on CPUs).

    Ray gives a process a share of a GPU when it starts, or never: with another share it is another replica.
    """

    collection: str
    shard: int
    replica: int
    num_gpus: float = 0.0

    @property
    def device(self) -> ServedOn:
        return "gpu" if self.num_gpus else "cpu"

    def __str__(self) -> str:
        name = f"{self.collection}/{self.shard}/{self.replica}"
        return f"{name}/gpu:{share_in_full(self.num_gpus)}" if self.num_gpus else name

    @classmethod
    def parse(cls, text: str) -> ReplicaKey:
        """What `str` wrote; ValueError where it did not."""
        collection, shard, replica, *rest = text.split("/")
        share = rest[0].removeprefix("gpu:") if rest else "0"
        key = cls(collection, int(shard), int(replica), float(share))
        if str(key) != text or (rest and not NUM_GPUS_MIN <= key.num_gpus <= 1):
            raise ValueError(f"{text!r} names no replica")
        return key


def share_in_full(num_gpus: float) -> str:
    """A share of a GPU as text that no other one has."""
    return repr(float(num_gpus)).removesuffix(".0")


@dataclass(frozen=True)
class WantedReplica:
    """The manifest version a replica should hold, its generation, how many shards there are, and its resources.

    `served` is the version, and `served_generation` its generation, that is served until `version` can be: the replica
    should hold that generation too. None where that has no such shard. `switch` says whether it has room for both.
    """

    version: int
    generation: int
    shards: int
    num_cpus: float
    num_gpus: float = 0.0
    served: int | None = None
    served_generation: int | None = None
    switch: Switch = "beside"


@dataclass(frozen=True)
class ObservedReplica:
    """What a replica last said of itself: the newest manifest version it holds, and the generations, newest last.

    That version is of the newest of its generations. All versions of one generation answer alike, for a replica
    follows the WAL; what a newer one brings is that less of it is in the tail. `crossing` are generations that are held
    once the logs of earlier sets have ended, and how many of their records each lacks. `epoch` is that of the replica
    as primary, 0 where it is none. `gpu_lost`: its process had a GPU, which will not work any more for it, or it found
    none and could load nothing without. `on_gpu`: it has one that works. `has_twin`: without one it answers all the
    same, on the CPU.
    """

    state: ReplicaState
    version: int = 0
    generations: tuple[int, ...] = ()
    crossing: Mapping[int, int] = field(default_factory=dict)
    epoch: int = 0
    gpu_lost: bool = False
    on_gpu: bool = False
    has_twin: bool = True

    @property
    def mute(self) -> bool:
        """Whether it answers nothing before it is started again."""
        return self.gpu_lost and (self.state == "failed" or not self.has_twin)


ABSENT = ObservedReplica("starting")  # of which nothing is known yet


@dataclass(frozen=True)
class Candidate:
    """What matters of a replica for who leads its shard.

    `epoch` is that of the replica as primary, 0 where it is none; `silent_s` for how long it has not answered, None
    where it does. `asked`: it is being told to lead. `refused`: that failed a moment ago. `log_set` is that of the log
    that it follows; None where there is none that can be led, because it has ended or nothing is held.
    """

    state: ReplicaState
    lsn: int = 0
    epoch: int = 0
    silent_s: float | None = None
    asked: bool = False
    refused: bool = False
    log_set: int | None = 0


@dataclass(frozen=True)
class Start:
    key: ReplicaKey
    wanted: WantedReplica


@dataclass(frozen=True)
class Stop:
    key: ReplicaKey


@dataclass(frozen=True)
class Load:
    """Load a manifest version beside what the replica serves now."""

    key: ReplicaKey
    version: int


Action = Start | Stop | Load


def plan(wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica]) -> list[Action]:
    """Actions that bring `observed` to `wanted`: retire what is not wanted, start what is missing, load what is old.

    A replica that is starting or unreachable is left alone: Ray restarts it, and it loads the newest version. One that
    lacks more than one generation has a `Load` for each, the one that is served first. One whose GPU was lost is ended,
    to be started again, while another of its shard answers, or at once where it cannot. `wanted` has `stand_ins`, too.
    """
    replaced = _to_replace(wanted, observed)
    actions: list[Action] = [Stop(key) for key in sorted({*(observed.keys() - wanted.keys()), *replaced})]
    for key in sorted(wanted.keys() - replaced):
        replica = observed.get(key)
        if replica is None:
            actions.append(Start(key, wanted[key]))
        elif replica.state in ("ready", "failed"):
            actions += [Load(key, version) for version in _lacking(wanted[key], replica)]
    return actions


def _to_replace(
    wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica]
) -> set[ReplicaKey]:
    """Replicas whose GPU was lost, where another one has what is served, or they have no twin that answers."""
    lost, answering = set(), set()
    for key, one in wanted.items():
        replica = observed.get(key, ABSENT)
        if replica.state in ("ready", "failed") and replica.gpu_lost:
            lost.add(key)
        elif _answers(one, replica):
            answering.add((key.collection, key.shard, key.num_gpus))
    return {key for key in lost if observed[key].mute or (key.collection, key.shard, key.num_gpus) in answering}


def _answers(wanted: WantedReplica, replica: ObservedReplica) -> bool:
    """Whether it has what is served, and no GPU that it lost."""
    return _holds(wanted, replica) and not replica.gpu_lost


def _holds(wanted: WantedReplica, replica: ObservedReplica) -> bool:
    """Whether it answers for what is served, be it by its twin."""
    served = wanted.generation if wanted.served_generation is None else wanted.served_generation
    return replica.state == "ready" and not replica.mute and served in replica.generations


def stand_ins(
    wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica]
) -> dict[ReplicaKey, WantedReplica]:
    """One more replica of each shard whose replicas all lost their GPUs, beside `wanted`.

    It waits for a GPU, and answers while the others are ended and started again; it goes once one of them answers, with
    a GPU if it has one itself. While a newer generation waits to be switched to none is started, for it would take a
    GPU that may be waited for; one that is there stays only where it alone answers, and goes over as they do.
    """
    newest: dict[str, int] = {}
    shards: dict[ReplicaKey, list[ReplicaKey]] = {}
    for key in sorted(wanted):
        newest[key.collection] = max(newest.get(key.collection, 0), wanted[key].generation)
        shards.setdefault(replace(key, replica=0), []).append(key)
    found = {}
    for first, own in shards.items():
        one, key = wanted[own[0]], replace(first, replica=len(own))
        each = [observed.get(k, ABSENT) for k in own]
        if one.served_generation == newest[first.collection]:
            stands_in = _stands_in(one, observed.get(key), each)
        else:
            stands_in = _holds(one, observed.get(key, ABSENT)) and not any(_holds(one, replica) for replica in each)
        if first.device == "gpu" and stands_in:
            found[key] = one
    return found


def _stands_in(wanted: WantedReplica, there: ObservedReplica | None, own: Sequence[ObservedReplica]) -> bool:
    """Whether one more is to run beside a shard's `own` replicas; `there` is that one, where it runs."""
    if there is not None:
        enough = any(_answers(wanted, replica) and (replica.on_gpu or not there.on_gpu) for replica in own)
        return not enough and not there.gpu_lost
    lost = [replica.state == "ready" and replica.gpu_lost and replica.has_twin for replica in own]
    return any(lost) and all(is_lost or replica.state == "failed" for is_lost, replica in zip(lost, own, strict=True))


def _lacking(wanted: WantedReplica, replica: ObservedReplica) -> list[int]:
    """Versions to load: any of the generation that is served, and the newest one unless it has a later one already."""
    lacking = []
    if wanted.served is not None and wanted.served_generation not in replica.generations:
        lacking.append(wanted.version if wanted.served_generation == wanted.generation else wanted.served)
    if replica.version < wanted.version and wanted.version not in lacking:
        lacking.append(wanted.version)
    return lacking


def replicas_of(collection: str, config: CollectionConfig, shards: int, num_gpus: float = 0.0) -> list[ReplicaKey]:
    return [ReplicaKey(collection, s, r, num_gpus) for s in range(shards) for r in range(config.replicas)]


def search_threads(shards: int, settings: Settings, node_cores: int) -> int:
    """FAISS threads of one replica: as set, else its CPUs, else its share of the node's cores."""
    if settings.shard_threads is not None:
        if settings.shard_threads < 1:
            raise Invalid.at("shard_threads", f"must be at least 1, not {settings.shard_threads}")
        return settings.shard_threads
    if settings.shard_cpus >= 1:
        return int(settings.shard_cpus)
    return max(1, node_cores // shards)


def _ready_of(
    wanted: Collection[ReplicaKey], observed: Mapping[ReplicaKey, ObservedReplica]
) -> Iterator[tuple[ReplicaKey, ObservedReplica]]:
    """The ready ones of these replicas, and of those that stand in for them."""
    first = {replace(key, replica=0) for key in wanted}
    for key, replica in observed.items():
        if replica.state == "ready" and replace(key, replica=0) in first:
            yield key, replica


def publishable(
    wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica], generation: int
) -> bool:
    """True when a collection may switch to `generation`: every replica that can answer holds it, each shard has one.

    Of those that go over to it one at a time, one of each shard is enough, and so is one that stands in for them.
    `wanted` are the replicas of one collection.
    """
    holding: dict[int, bool] = {key.shard: False for key in wanted}
    for key, replica in _ready_of(wanted, observed):
        if generation in replica.generations:
            holding[key.shard] = True
        elif key in wanted and wanted[key].switch == "beside":
            return False
    return all(holding.values())


def may_end_logs(
    wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica], generation: int
) -> bool:
    """True when the logs that `generation` leaves behind may end: it is held, or near, wherever a replica can answer.

    Each shard has such a replica; one is enough where they go over to it one at a time, and so is one that stands in
    for them. False where all hold it: the logs have ended. `wanted` are those of its shards.
    """
    near: dict[int, bool] = {key.shard: False for key in wanted}
    crossing = False
    for key, replica in _ready_of(wanted, observed):
        held = generation in replica.generations
        if held or replica.crossing.get(generation, NEAR_RECORDS + 1) <= NEAR_RECORDS:
            crossing = crossing or not held
            near[key.shard] = True
        elif key in wanted and wanted[key].switch == "beside":
            return False
    return crossing and all(near.values())


def held_by_every_shard(
    wanted: Collection[ReplicaKey], observed: Mapping[ReplicaKey, ObservedReplica], generation: int
) -> bool:
    """True when of these replicas, or those that stand in for them, a ready one of each shard holds `generation`."""
    holding = {key.shard for key, replica in _ready_of(wanted, observed) if generation in replica.generations}
    return holding >= {key.shard for key in wanted}


# --- who leads ----------------------------------------------------------------------------------------------------


def leader(replicas: Mapping[ReplicaKey, Candidate]) -> ReplicaKey | None:
    """The primary of a shard: of the ready replicas that say they lead the one of the highest epoch.

    Who leads the log of an earlier set, while others follow that of a later one, has not seen yet that it has ended.
    """
    newest = _newest_log_set(replicas)
    leading = [
        key
        for key, replica in replicas.items()
        if replica.state == "ready" and replica.epoch > 0 and newest is not None and replica.log_set == newest
    ]
    return max(leading, key=lambda key: replicas[key].epoch, default=None)


def _newest_log_set(replicas: Mapping[ReplicaKey, Candidate]) -> int | None:
    """Of those that a ready replica can lead."""
    ready = (replica.log_set for replica in replicas.values() if replica.state == "ready")
    return max((log_set for log_set in ready if log_set is not None), default=None)


def choose_lead(
    replicas: Mapping[ReplicaKey, Candidate],
    led_last: ReplicaKey | None,
    patience_s: float,
    staying: Collection[ReplicaKey] | None = None,
) -> ReplicaKey | None:
    """The replica of one shard to tell that it shall lead; None where one does, may do, or none can.

    A replica that is silent may still lead, and may be back in a moment: for `patience_s` it is waited for, if it led
    last or nobody knows who did. Whoever led last is preferred, then who has applied most of the WAL. Replicas that are
    not `staying` (None: all are) lead only until one that stays can.
    """
    newest = _newest_log_set(replicas)
    ready = [key for key, replica in replicas.items() if replica.state == "ready" and newest is not None]
    able = [key for key in ready if replicas[key].log_set == newest]
    stay = {key for key in replicas if staying is None or key in staying}
    if (leading := leader(replicas)) is not None:
        if leading in stay or any(replica.asked for replica in replicas.values()):
            return None
        able = [key for key in able if key in stay]
    else:
        leads_again = led_last in able
        for key, replica in replicas.items():
            silent_s = replica.silent_s or 0.0
            may_lead = replica.silent_s is not None and not leads_again and led_last in (key, None)
            if (replica.asked or may_lead) and silent_s < patience_s:
                return None
    willing = [key for key in able if not replicas[key].refused]
    return min(willing, key=lambda key: (key not in stay, key != led_last, -replicas[key].lsn, key), default=None)
