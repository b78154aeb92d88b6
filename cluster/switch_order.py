"""In which order the replicas of a shard go to another generation, so that its memory is needed by one at a time. Pure.

Where there is room they load it beside what they hold, one after the other. Where there is not
(`cluster.switch_memory`), one replica of each shard drops what it holds and loads the new generation; the table
switches once each shard has one that holds it, and the others follow. So some replica answers for each shard at any
time, and who leads a shard holds what its writes are applied to: it goes last, after another one leads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.placement import Action, Load, ObservedReplica, ReplicaKey, WantedReplica

Mates = tuple[str, int, float]  # collection, shard, share of a GPU


@dataclass(frozen=True)
class Drop:
    """Drop every generation before this one, though the replica may be left with none."""

    key: ReplicaKey
    generation: int


@dataclass(frozen=True)
class Lead:
    """Lead the shard in another replica's place."""

    key: ReplicaKey


@dataclass(frozen=True)
class _Mate:
    """A replica of a shard, and what it should hold."""

    key: ReplicaKey
    wanted: WantedReplica
    observed: ObservedReplica
    leads: bool

    @property
    def has_new(self) -> bool:
        """Whether the newest generation is in its memory."""
        return self.wanted.generation in self.observed.generations or self.wanted.generation in self.observed.crossing

    @property
    def empty(self) -> bool:
        return not self.observed.generations and not self.observed.crossing

    @property
    def answers(self) -> bool:
        """Whether it can be asked for what is served."""
        return self.observed.state == "ready" and self.wanted.served_generation in self.observed.generations

    @property
    def listens(self) -> bool:
        """Whether there is any use in telling it something."""
        return self.observed.state in ("ready", "failed")


def in_switch_order(
    actions: Sequence[Action],
    wanted: Mapping[ReplicaKey, WantedReplica],
    observed: Mapping[ReplicaKey, ObservedReplica],
) -> list[Action | Drop | Lead]:
    """The actions of `placement.plan`, without loads whose turn has not come, and with what has to be done first."""
    ordered: list[Action | Drop | Lead] = [action for action in actions if not isinstance(action, Load)]
    loads: dict[Mates, list[Load]] = {}
    for action in actions:
        if isinstance(action, Load):
            loads.setdefault(_mates_of(action.key), []).append(action)
    for which, keys in _keys_of_mates(wanted).items():
        if len(keys) == 1 or (which not in loads and wanted[keys[0]].switch == "beside"):
            ordered += loads.get(which, ())
            continue
        mates = _mates({key: (wanted[key], observed[key]) for key in keys if key in observed})
        if wanted[keys[0]].switch == "one_at_a_time":
            ordered += _making_room(mates, loads.get(which, ()))
        else:
            ordered += _one_after_the_other(mates, loads[which])
    return ordered


def _mates_of(key: ReplicaKey) -> Mates:
    """Replicas of a shard with one share of a GPU: those with another hold another generation, and make no room for
    these."""
    return key.collection, key.shard, key.num_gpus


def _keys_of_mates(wanted: Mapping[ReplicaKey, WantedReplica]) -> dict[Mates, list[ReplicaKey]]:
    keys: dict[Mates, list[ReplicaKey]] = {}
    for key in sorted(wanted):
        keys.setdefault(_mates_of(key), []).append(key)
    return keys


def _mates(replicas: Mapping[ReplicaKey, tuple[WantedReplica, ObservedReplica]]) -> list[_Mate]:
    """In the order in which they load: who leads is last. That is the replica of the highest epoch."""
    epochs = {key: each.epoch for key, (_, each) in replicas.items() if each.state == "ready" and each.epoch}
    leader = max(epochs, key=lambda key: epochs[key], default=None)
    mates = [_Mate(key, *both, key == leader) for key, both in replicas.items()]
    return sorted(mates, key=lambda mate: (mate.leads, mate.key))


def _one_after_the_other(mates: Sequence[_Mate], loads: Sequence[Load]) -> list[Load]:
    """Of those that would hold two generations the first loads the new one. Others have nothing beside it, or load what
    is served, or a later version of what they hold."""
    waiting = [mate for mate in mates if mate.listens and not mate.has_new and not mate.empty]
    later = {mate.key: mate.wanted.version for mate in waiting[1:]}
    return [load for load in loads if later.get(load.key) != load.version]


def _making_room(mates: Sequence[_Mate], loads: Sequence[Load]) -> list[Load | Drop | Lead]:
    """Nobody holds two generations. Until the new one is served, one replica goes over to it; then all do, of which the
    supervisor retires the old one, once that is not asked for any more."""
    actions: list[Load | Drop | Lead] = []
    newest = next((mate for mate in mates if mate.observed.state == "ready" and _holds_new(mate)), None)
    for mate in mates:
        wanted, mine = mate.wanted, [load for load in loads if load.key == mate.key]
        if wanted.served_generation is None:  # nothing else is served, or no such shard
            actions += mine
        elif mate.has_new:
            actions += [load for load in mine if load.version == wanted.version]
        elif mate.empty:
            serves_again = wanted.served != wanted.version and not any(other.answers for other in mates)
            actions += [load for load in mine if (load.version == wanted.version) != serves_again]
        elif wanted.served_generation == wanted.generation and mate.leads and newest is not None:
            actions.append(Lead(newest.key))
    if (first := _goes_first(mates)) is not None:
        actions.append(Drop(first.key, first.wanted.generation))
    return actions


def _holds_new(mate: _Mate) -> bool:
    return mate.wanted.generation in mate.observed.generations


def _goes_first(mates: Sequence[_Mate]) -> _Mate | None:
    """Who drops what is served for the new generation: not who leads, and only where others answer. None where one has
    done so, or nobody can."""
    if not mates or mates[0].wanted.served_generation in (None, mates[0].wanted.generation):
        return None
    if any(mate.has_new or mate.empty for mate in mates):
        return None
    answering = [mate for mate in mates if mate.answers]
    able = [mate for mate in answering if not mate.leads]
    return able[0] if able and len(answering) > 1 else None
