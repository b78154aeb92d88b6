"""Going back to an earlier generation, with every write that was acknowledged since: it replays the logs.

The next generation has the entries that the earlier one had last. Where that wrote to another log set they are behind
its logs, and behind those of every set since (docs/decisions/0007-jobs.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

from cluster import paths
from cluster.attributes import arrow_type
from cluster.entry_log import start_after
from cluster.errors import Conflict, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.manifest_format import Switch
from cluster.object_store import ObjectStore
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from cluster.snapshots import missing_objects
from cluster.wal import Wal

ROLLBACK_REPLAY_MAX = 20_000  # records that a replica reads: it applied 1,200 a second, of 10 points, on a busy machine
ROLLBACK_REPLAY_BYTES_MAX = 256 * 1024**2  # of them: half of `tail_bytes_max`, at which writes are refused
KEPT_TOLD = 5  # generations that can be gone back to
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """From `base`, the newest version, to what `old` says, as `entries` that write to `log_set`."""

    base: Manifest
    old: Manifest
    entries: tuple[ShardEntry, ...]
    log_set: int

    @property
    def attributes(self) -> dict[str, Any]:
        """Arrow types of the old attributes."""
        return {name: arrow_type(text) for name, text in self.old.attributes.items()}


@dataclass(frozen=True)
class Replay:
    """What the replica of one shard has to read of the logs, at most."""

    records: int = 0
    size_bytes: int = 0

    def __add__(self, other: Replay) -> Replay:
        return Replay(self.records + other.records, self.size_bytes + other.size_bytes)

    @property
    def is_long(self) -> bool:
        """Whether it is to be sealed first: it would take long, and until it is sealed be in every replica's memory."""
        return self.records > ROLLBACK_REPLAY_MAX or self.size_bytes > ROLLBACK_REPLAY_BYTES_MAX


def roll_back(store: ObjectStore, log: ManifestLog, generation: int | None = None) -> Manifest:
    """Commit the next generation with the points of an earlier one and all writes since; returns its manifest.

    None is the one that was current before the newest: so that a rollback of a rollback goes forward again. Conflict
    where that takes a long replay (`Replay.is_long`), or something else is committed first; NotFound where nothing is
    kept of the generation, or not all of it.
    """
    rollback = checked_plan(store, log, log.newest_live(), generation)
    replay = replay_of(store, rollback)
    if replay.is_long:
        raise Conflict(
            f"a replica would replay {replay.records} records of {replay.size_bytes} bytes to go back to generation "
            f"{rollback.old.generation}, {ROLLBACK_REPLAY_MAX} of {ROLLBACK_REPLAY_BYTES_MAX} are the bounds: run the "
            "rollback as a job, which seals them first"
        )
    return commit_rollback(store, log, rollback)


def checked_plan(store: ObjectStore, log: ManifestLog, newest: Manifest, generation: int | None) -> Rollback:
    """`plan_rollback`; NotFound, with the generations that are whole, also where files of the old one are gone.

    No other one is taken in its place: what comes back must be what was asked for.
    """
    try:
        rollback = plan_rollback(store, log, newest, generation)
        check_kept(store, rollback.old, f"generation {rollback.old.generation} of {newest.collection!r}")
        return rollback
    except NotFound as error:
        live = takewhile(lambda manifest: manifest.state == "live", log.generations(newest))
        whole = (manifest.generation for manifest in live if not missing_objects(store, manifest))
        kept = ", ".join(map(str, islice(whole, KEPT_TOLD)))
        raise NotFound(f"{error}; {f'kept are generations {kept}' if kept else 'no earlier one is kept'}") from error


def plan_rollback(store: ObjectStore, log: ManifestLog, newest: Manifest, generation: int | None) -> Rollback:
    """What to commit after `newest`. NotFound where the generation, or a log set since, is not kept."""
    if generation is not None and generation >= newest.generation:
        raise Invalid.at("generation", f"{generation} is not before {newest.generation}, the newest generation")
    old = log.last_of_generation(generation, newest)
    if old.log_set == newest.log_set:
        return Rollback(newest, old, old.shards, newest.log_set)
    start = start_after(store, old.collection, old.behind) if old.crossing else None
    if start is None and len({bool(entry.behind) for entry in old.shards}) > 1:  # who is not has read them to their end
        raise NotFound(
            f"generation {old.generation} of {old.collection!r} needs the ends of logs of set {old.behind[0].number}, "
            "which are not kept: go back to a later one, or restore a snapshot"
        )
    entries = entries_behind(old, sets_since(log, old, newest), start)
    return Rollback(newest, old, entries, newest.log_set + 1)


def sets_since(log: ManifestLog, old: Manifest, newest: Manifest) -> dict[int, int]:
    """Number of shards of every log set after that of `old`, up to that of `newest`; NotFound where one is unknown."""
    shards = {logs.number: logs.shards for entry in newest.shards for logs in entry.behind}
    shards[newest.log_set] = newest.routing.shards
    wanted = set(range(old.log_set + 1, newest.log_set + 1))
    for manifest in log.generations(newest, after=old.version):
        if wanted <= shards.keys():
            break
        shards.setdefault(manifest.log_set, manifest.routing.shards)
    if unknown := wanted - shards.keys():
        raise NotFound(
            f"collection {old.collection!r}: no version is kept that wrote to log set {min(unknown)}, which generation "
            f"{old.generation} needs: go back to a later one, or restore a snapshot"
        )
    return {number: shards[number] for number in sorted(wanted)}


def entries_behind(
    old: Manifest, since: Mapping[int, int], start: tuple[int, int] | None = None
) -> tuple[ShardEntry, ...]:
    """The entries of `old` behind its own log set and the sets `since` (number -> shards).

    `start` is the (LSN, epoch) at which the old set begins, where some of its shards are behind earlier ones still.
    """
    later = tuple(LogSet(number, shards) for number, shards in since.items())
    own = LogSet(old.log_set, old.routing.shards)
    behind_still = [entry.shard for entry in old.shards if entry.behind]
    if behind_still and start is None and len(behind_still) < len(old.shards):
        raise ValueError(f"shards {behind_still} are behind earlier sets than the others: where does their log begin?")
    positions = tuple(
        LogPosition(entry.shard, *(start if entry.behind and start else (entry.applied_lsn, entry.epoch)))
        for entry in old.shards
    )
    at_own = LogSet(own.number, own.shards, positions)
    return tuple(
        behind_logs(entry, entry.behind[0], *entry.behind[1:], own, *later)
        if entry.behind
        else behind_logs(entry, at_own, *later)
        for entry in old.shards
    )


def replay_of(store: ObjectStore, rollback: Rollback) -> Replay:
    """Of the shard that has to read most. NotFound where some of the records are not kept."""
    collection = rollback.old.collection
    chains: dict[tuple[LogSet, ...], tuple[Replay, tuple[int, int] | None]] = {}
    most = Replay()
    for entry in rollback.entries:
        found, start = Replay(), (entry.applied_lsn, entry.epoch)
        if entry.behind:
            if entry.behind not in chains:
                chains[entry.behind] = _replay_of_sets(store, collection, entry.behind)
            found, begins = chains[entry.behind]
            if begins is None:
                most = max(most, found, key=_size)
                continue
            start = begins
        found += _kept_after(store, collection, rollback.log_set, entry.shard, start[0])
        most = max(most, found, key=_size)
    return most


def _size(replay: Replay) -> tuple[int, int]:
    return replay.size_bytes, replay.records


def _replay_of_sets(
    store: ObjectStore, collection: str, behind: tuple[LogSet, ...]
) -> tuple[Replay, tuple[int, int] | None]:
    """(what there is in these log sets, (LSN, epoch) at which the next one begins); None: a log has not ended."""
    found, first = Replay(), behind[0]
    for place, logs in enumerate(behind):
        for at in first.positions:
            found += _kept_after(store, collection, logs.number, at.shard, at.lsn)
        start = start_after(store, collection, (first,))
        if start is None:  # nobody writes to the next set
            return found, None
        if place + 1 < len(behind):
            later = behind[place + 1]
            first = replace(later, positions=tuple(LogPosition(shard, *start) for shard in range(later.shards)))
    return found, start


def _kept_after(store: ObjectStore, collection: str, log_set: int, shard: int, after: int) -> Replay:
    """The records of a log after an LSN; NotFound unless each of them is there."""
    listed = ((paths.wal_lsn(info.key), info) for info in store.objects(paths.wal_prefix(collection, shard, log_set)))
    later = {lsn: info.size_bytes for lsn, info in listed if lsn is not None and lsn > after}
    last = max(later, default=after)
    for lsn in range(after + 1, last):
        if lsn not in later and Wal(store, collection, shard, log_set).read(lsn) is None:  # not just listed too early
            raise NotFound(
                f"{paths.wal_record(collection, shard, lsn, log_set)}: this record is not kept, and the generation to "
                "go back to needs it: go back to a later one, or restore a snapshot"
            )
    return Replay(last - after, sum(later.values()))


def commit_rollback(
    store: ObjectStore, log: ManifestLog, rollback: Rollback, entries: Sequence[ShardEntry] | None = None
) -> Manifest:
    """Commit it, once `replay_of` has found all records; with other `entries` that hold more (sealed further on).

    It is switched to as the newest version was (`switch_back`): where there was no memory for two, there is none now.
    NotFound where something that they need is not kept. Conflict where another generation was committed first.
    """
    chosen = rollback.entries if entries is None else tuple(entries)
    what = f"generation {rollback.old.generation} of {rollback.old.collection!r}"

    def check(manifest: Manifest) -> None:
        check_kept(store, manifest, what)
        replay_of(store, replace(rollback, entries=chosen))

    check_kept(store, replace(rollback.old, shards=chosen), what)
    committed = _commit(log, rollback, chosen)
    put_back_unless_kept(store, log, rollback.base, committed, check)
    return committed


def _commit(log: ManifestLog, rollback: Rollback, entries: tuple[ShardEntry, ...]) -> Manifest:
    base, old = rollback.base, rollback.old
    how = (rollback.attributes, switch_back(base, old), rollback.log_set, old.num_gpus)
    return log.commit_generation(base, old.config, entries, *how)


def switch_back(base: Manifest, old: Manifest) -> Switch:
    """As the newest version was switched to, unless other replicas load this one: they have nothing to drop first."""
    return base.switch if base.num_gpus == old.num_gpus else "beside"


def check_kept(store: ObjectStore, manifest: Manifest, what: str) -> None:
    """NotFound where the store lacks a file that a manifest names."""
    if missing := missing_objects(store, manifest):
        raise NotFound(f"{what} is not kept: {len(missing)} of its files are gone, {missing[0]} among them")


def put_back_unless_kept(
    store: ObjectStore, log: ManifestLog, base: Manifest, committed: Manifest, check: Callable[[Manifest], None]
) -> None:
    """Look once more, now that what was committed is safe from garbage collection, whether all of it is there.

    Where it is not, `base` is committed again, and NotFound says so; no replica can have loaded what was between.
    """
    try:
        check(committed)
    except Unavailable as error:
        logger.warning("version %d could not be looked at again: %s", committed.version, error)
    except NotFound as error:
        back = plan_rollback(store, log, committed, base.generation)
        again = _commit(log, back, back.entries)
        raise NotFound(
            f"{error}. It was collected meanwhile: generation {base.generation} goes on as {again.generation}, and "
            f"{committed.generation} is none to go back to"
        ) from error
