"""The control plane: compares wanted with observed, starts, loads and retires replicas, publishes who serves what.

A plain class; Ray is behind the `Runtime` protocol. It keeps no state that it could not find again: wanted comes
from the manifests in object storage, observed from the replicas. Rounds decide and wait for nothing; whatever may
take long (a call to a replica, a read of the storage) has a task of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

from actors.known_manifests import KnownManifests
from actors.log_ends import LogEnds
from actors.named_replicas import NamedReplicas
from actors.served_before import served_before
from actors.serving_table import known_endpoints, served_collection, why_not_switched, why_unready, without_points
from actors.shard import ReplicaStatus
from actors.shard_client import ServedCollection, ServingTable, ShardEndpoint
from actors.upkeep_facts import upkeep_facts
from actors.wanted_replicas import own_replicas, serving_replicas, wanted_replicas
from actors.watched_replicas import Runtime, WatchedReplicas, log_failure
from cluster.config import Settings
from cluster.errors import Corrupt, EaglerayError, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore
from cluster.placement import (
    Candidate,
    Load,
    ObservedReplica,
    ReplicaKey,
    Start,
    Stop,
    WantedReplica,
    choose_lead,
    leader,
    may_end_logs,
    plan,
    publishable,
    stand_ins,
)
from cluster.switch_order import Drop, Lead, in_switch_order

TABLE_WAIT_S = 10.0  # how long `next_table` waits for a change
STORE_POLL_S = 5.0  # how often manifests are looked for without being told
POINTS_PERIOD_S = 5.0  # how often a table is published of which only the points differ
TABLE_REACHES_S = 1.0  # after which every coordinator has a table that was published
RETIRE_AFTER_S = 10.0  # an old generation stays loaded for queries that began under it
logger = logging.getLogger(__name__)


class Supervisor:
    """One per Eagleray. `run` takes over and then does rounds for ever; `reconcile` is one round."""

    def __init__(
        self,
        store: ObjectStore,
        runtime: Runtime,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        new_nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._new_nonce = new_nonce
        self._wake = asyncio.Event()
        self._known = KnownManifests(store, new_nonce)
        self._replicas = WatchedReplicas(runtime, settings, clock, self._wake)
        self._log_ends = LogEnds(store, self._known, new_nonce, self._wake)
        self._served: dict[str, Manifest] = {}  # the version in the table; the newest one once that can be switched to
        self._served_since: dict[str, float] = {}  # of the generation in the table
        self._led_last: dict[tuple[str, int], ReplicaKey] = {}  # by collection and shard
        self._reading: dict[str, asyncio.Task[None]] = {}  # of collections of which a replica holds an unknown version
        self._looked_for: dict[str, int] = {}  # the last such version
        self._named = NamedReplicas(clock)
        self._published_at = clock()
        self._polled_at = clock() - STORE_POLL_S
        self._changed = asyncio.Event()
        self._waits_for = "the manifests have not been read yet"  # why there is no table
        self._taken_over = False
        self._table: ServingTable | None = None

    async def run(self) -> None:
        """Until it is cancelled. Ends with an error only where that is a bug of its own."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._poll_for_ever())
            group.create_task(self._rounds())

    async def _poll_for_ever(self) -> None:
        while True:
            if self._clock() - self._polled_at >= STORE_POLL_S:
                try:
                    await self.poll()
                except EaglerayError as error:  # the rounds go on with what is known
                    logger.warning("reading manifests: %s", error)
            await asyncio.sleep(self._settings.reconcile_period_s)

    async def poll(self) -> None:
        """Read all manifests."""
        try:
            await self._known.read_all()
            if self._taken_over:
                await self._find_served()
        except EaglerayError as error:
            self._waits_for = str(error)
            raise
        self._polled_at = self._clock()
        self._wake.set()

    async def _rounds(self) -> None:
        """One per period, and at once when something changed."""
        await self.take_over()
        while True:
            self.reconcile()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.reconcile_period_s):  # wait_for may lose a cancellation
                    await self._wake.wait()

    async def take_over(self) -> None:
        """Learn what there is before anything is decided: an early table would take away what is being served."""
        self._replicas.watch()
        await self._known.complete.wait()
        self._waits_for = "the replicas that run have not answered yet"
        await self._replicas.first_answers()
        while not self._taken_over:
            try:
                await self._find_served()
                self._taken_over = True
            except EaglerayError as error:
                self._waits_for = str(error)
                logger.warning("reading manifests: %s", error)
                await asyncio.sleep(self._settings.reconcile_period_s)

    async def _find_served(self) -> None:
        """For collections whose newest version cannot be switched to yet: what an earlier supervisor served."""
        for name, newest in list(self._known.newest.items()):
            if name in self._served or self._publishable(newest):
                continue
            found = await served_before(newest, self._known, self._replicas)
            if found is not None and self._known.newest.get(name) == newest:
                self._served.setdefault(name, found)

    def reconcile(self) -> None:
        """One round on what is known: choose what is served, act, publish. Nothing before `take_over`."""
        self._wake.clear()
        if not self._taken_over:
            return
        self._look_for_newer()
        self._choose_served()
        self._retire()
        self._end_logs()
        self._choose_leads()
        wanted, observed = self._wanted(), self._observed()
        wanted |= stand_ins(wanted, observed)
        actions = in_switch_order(plan(wanted, observed), wanted, observed)
        ended = {action.key for action in actions if isinstance(action, Stop)}
        for action in actions:
            if not (isinstance(action, Stop) and self._may_be_asked(action.key, ended)):
                self._perform(action)
        self._publish()

    async def refresh(self, collection: str) -> None:
        """Look at one collection now, because something was committed to it."""
        await self._known.read(collection)
        self.reconcile()

    def close(self) -> None:
        """Stop watching; the replicas go on."""
        self._replicas.close()
        self._log_ends.close()
        for reading in self._reading.values():
            reading.cancel()

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        """The table once its stamp is not `known_stamp`, or unchanged after `TABLE_WAIT_S`.

        Unavailable where there is none by then: storage or replicas have not answered since this supervisor started.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TABLE_WAIT_S):
                while self._table is None or self._table.stamp == known_stamp:
                    await self._changed.wait()
        if self._table is None:
            raise Unavailable(f"the supervisor has no serving table yet: {self._waits_for}")
        return self._table

    def describe(self, collection: str) -> dict[str, Any]:
        """A collection's manifest facts and its replicas' statuses, as plain data; without the replicas' secrets.

        NotFound; Corrupt where its manifest cannot be read and no earlier one is known; Unavailable at the start.
        """
        manifest = self._known.newest.get(collection)
        if manifest is None:
            if collection in self._known.unreadable:
                raise Corrupt(self._known.unreadable[collection])
            if not self._known.complete.is_set():
                raise Unavailable(f"the supervisor does not know the collections yet: {self._waits_for}")
            raise NotFound(f"no collection {collection!r}")
        served = self._table.collections.get(collection) if self._table else None
        told = self._told_of(manifest)
        return {
            "manifest": manifest,
            "serving_generation": served.generation if served else None,
            "statuses": {key: replace(one, endpoint=None) for key, one in told.items()},
            **upkeep_facts(manifest, told, self._settings.upkeep),
        }

    def _wanted(self) -> dict[ReplicaKey, WantedReplica]:
        return {
            key: wanted for newest in self._known.newest.values() for key, wanted in self._wanted_of(newest).items()
        }

    def _wanted_of(self, newest: Manifest) -> dict[ReplicaKey, WantedReplica]:
        return wanted_replicas(newest, self._served.get(newest.collection), self._settings)

    def _wanted_by(self, newest: Manifest) -> dict[ReplicaKey, WantedReplica]:
        """Those of the newest version's own shards, with its share of a GPU."""
        own = set(own_replicas(newest))
        return {key: one for key, one in self._wanted_of(newest).items() if key in own}

    def _publishable(self, newest: Manifest) -> bool:
        return publishable(self._wanted_by(newest), self._observed(), newest.generation)

    def _observed(self) -> dict[ReplicaKey, ObservedReplica]:
        """Without replicas of which nobody knows whether they are wanted, because no manifest could be read."""
        lost = self._known.unreadable.keys() - self._known.newest.keys()
        return {key: replica for key, replica in self._replicas.observed().items() if key.collection not in lost}

    def _statuses_of(self, newest: Manifest) -> dict[ReplicaKey, ReplicaStatus]:
        return {key: self._replicas.status(key) for key in self._wanted_of(newest)}

    def _told_of(self, newest: Manifest) -> dict[ReplicaKey, ReplicaStatus]:
        """With those that stand in."""
        running = self._replicas.statuses(newest.collection).items()
        return self._statuses_of(newest) | {k: s for k, s in running if k.replica >= newest.config.replicas}

    def _perform(self, action: Start | Stop | Load | Drop | Lead) -> None:
        """What fails is logged and planned again by the next round; it does not keep the round from publishing."""
        try:
            if isinstance(action, Start):
                self._replicas.start(action.key, action.wanted)
            elif isinstance(action, Stop):
                self._replicas.stop(action.key)
            elif isinstance(action, Load):
                self._replicas.load(action.key, action.version)
            elif isinstance(action, Drop):
                self._replicas.retire(action.key, action.generation)
            else:
                self._replicas.lead(action.key)
        except Exception as error:  # noqa: BLE001  # a start or stop that failed, of whatever kind
            log_failure(f"{action.key}: {type(action).__name__.lower()}", error)

    def _retire(self) -> None:
        """Have replicas drop generations that were replaced long enough ago for the queries that began under them.

        One that lacks what is served, for it was away, loads that first: it may share segments with what it holds.
        Where it has no room for both it drops the old one first, unless it leads: it could apply no write then.
        """
        for name, served in (self._table.collections if self._table else {}).items():
            if self._clock() - self._served_since[name] >= RETIRE_AFTER_S:
                by_turns = name in self._served and self._served[name].switch == "one_at_a_time"
                for key in self._replicas.holding_before(name, served.generation):
                    holds = served.generation in self._replicas.status(key).generations
                    if holds or (by_turns and key != served.primaries.get(key.shard)):
                        self._replicas.retire(key, served.generation)

    def _may_be_asked(self, key: ReplicaKey, ended: Set[ReplicaKey]) -> bool:
        """Whether queries may go on at a replica of a shard, or with a share of a GPU, that only an earlier generation
        has; or writes: one that leads its shard stays until another one does.

        Of the newest generation's own shards, and of replicas that no generation is to have, one stays until
        coordinators know of another that is not to be `ended` as well. The latter also while nothing is served.
        """
        newest = self._known.newest.get(key.collection)
        if newest is None:
            return False
        served = self._table.collections.get(key.collection) if self._table else None
        leads = self._led_last.get((key.collection, key.shard)) == key
        own = key.shard < len(newest.shards) and key.num_gpus == newest.num_gpus
        more = key.replica >= newest.config.replicas
        if served is None:
            return not own or (more and self._replicas.status(key).state != "failed")
        if own or (more and served.generation != newest.generation):
            named = set(served.replicas.get(key.shard, ()))
            others = [other for other in named - ended if self._replicas.status(other).state == "ready"]
            told = self._named.longest_s(others) >= TABLE_REACHES_S
            alone = key in named and not told and not self._replicas.observed()[key].mute
            return alone or (leads and more)
        asked = {each.num_gpus for replicas in served.replicas.values() for each in replicas}
        if served.generation != newest.generation and key.num_gpus in (newest.num_gpus, *asked):
            return True  # with a third share it is of a generation between, which was never served
        return leads or self._clock() - self._served_since[key.collection] < RETIRE_AFTER_S

    def _end_logs(self) -> None:
        """Have the logs end that the newest generation leaves behind, as soon as it is near everywhere.

        Writes wait from then on, so all replicas are told at once to go on to their own logs.
        """
        for newest in self._known.newest.values():
            if not newest.behind:
                continue
            wanted = self._wanted_by(newest)
            if not self._log_ends.ended(newest):
                if may_end_logs(wanted, self._observed(), newest.generation):
                    self._log_ends.begin(newest)
                continue
            for key in wanted:
                if newest.generation in self._replicas.status(key).crossing:
                    self._replicas.load(key, newest.version)

    def _choose_served(self) -> None:
        """The newest version as soon as all can switch to its generation; until then what was served goes on."""
        known, begun = self._known.newest, self._known.begun
        self._served = {n: one for n, one in self._served.items() if n in known and one.version >= begun.get(n, 0)}
        for name, newest in self._known.newest.items():
            served = self._served.get(name)
            if (served is not None and served.generation == newest.generation) or self._publishable(newest):
                self._served[name] = newest

    def _choose_leads(self) -> None:
        """Have one ready replica lead each shard that no one leads, or one that is to go (`placement.choose_lead`)."""
        staying = self._wanted().keys()
        shards = {(key.collection, key.shard) for key in staying}
        self._led_last = {shard: key for shard, key in self._led_last.items() if shard in shards}
        for shard in sorted(shards):
            replicas = self._able_to_lead(*shard)
            if (primary := leader(replicas)) is not None:
                self._led_last[shard] = primary
            chosen = choose_lead(replicas, self._led_last.get(shard), self._settings.replica_timeout_s, staying)
            if chosen is not None:
                self._replicas.lead(chosen)

    def _able_to_lead(self, collection: str, shard: int) -> dict[ReplicaKey, Candidate]:
        """The replicas of a shard. Nobody leads a log that was ended here, whether its replica has seen that or not."""
        replicas, newest = self._replicas.candidates(collection, shard), self._known.newest[collection]
        if not self._log_ends.ended(newest):
            return replicas
        return {
            key: replica if replica.log_set == newest.log_set else replace(replica, log_set=None)
            for key, replica in replicas.items()
        }

    def _look_for_newer(self) -> None:
        """Read the collections of which a replica holds a version that is not known: others should load it soon."""
        self._looked_for = {name: version for name, version in self._looked_for.items() if name in self._known.newest}
        for name, newest in self._known.newest.items():
            told = max(self._replicas.versions(name), default=0)
            if told > max(newest.version, self._looked_for.get(name, 0)) and name not in self._reading:
                self._looked_for[name] = told  # once: where that cannot be read the next poll tells why
                self._reading[name] = asyncio.ensure_future(self._read(name))

    async def _read(self, name: str) -> None:
        try:
            await self._known.read(name)
        except EaglerayError as error:
            logger.warning("reading the manifest of %s: %s", name, error)
        finally:
            self._reading.pop(name, None)
            self._wake.set()

    def _publish(self) -> None:
        before = self._table.collections if self._table else {}
        collections: dict[str, ServedCollection] = {}
        endpoints: dict[ReplicaKey, ShardEndpoint] = {}
        unready, waiting = dict(self._known.unreadable), dict[str, str]()
        for name, newest in self._known.newest.items():
            serving, statuses = serving_replicas(newest, self._served.get(name)), self._statuses_of(newest)
            running = statuses | self._replicas.statuses(name)  # those that are to go may lead until others do
            endpoints |= known_endpoints(running, self._table.endpoints if self._table else {})
            if name in self._served:
                collections[name] = served_collection(self._served[name], running, before.get(name))
            if why := why_unready(collections.get(name), {key: statuses[key] for key in serving}):
                unready[name] = why
            own = {key: statuses[key] for key in own_replicas(newest)}
            if why := why_not_switched(newest, self._served.get(name), own):
                waiting[name] = why
        table = ServingTable(self._new_nonce(), collections, unready, endpoints, waiting)
        if self._table is None or self._worth_publishing(self._table, table):
            for name, served in collections.items():
                if name not in before or before[name].generation != served.generation:
                    self._served_since[name] = self._clock()
            self._table = table
            self._named.publish(table)
            self._published_at = self._clock()
            self._changed.set()
            self._changed = asyncio.Event()

    def _worth_publishing(self, table: ServingTable, fresh: ServingTable) -> bool:
        """Whether anything changed. Points alone, which do so with every write, are published now and then."""
        if replace(fresh, stamp=table.stamp) == table:
            return False
        if self._clock() - self._published_at >= POINTS_PERIOD_S:
            return True
        return without_points(fresh) != without_points(table)
