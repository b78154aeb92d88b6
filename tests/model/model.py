"""Random steps against a shard with two replicas, each compared with a plain dict: the proof that no write is lost.

    Model(Case.of(0, random, 200), seed, folder).run(1_000)

A step is a write, a read, a seal, a crash, a takeover, ...: `STEPS` has them all with how often they come.
"""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from actors import primary as primary_module
from actors.primary import Primary
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from cluster.config import Limits, Upkeep
from cluster.errors import Conflict, Fenced, Unavailable
from cluster.ids import ID_ARROW_TYPE
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.wal import Wal
from cluster.write import PointWrite, WriteOutcome
from tests.model.cases import ATTRIBUTES, COLLECTION, Case, publish, type_of, upserts
from tests.model.judge import ask, check_columns, check_fetch, check_hits, check_view, contents, differences
from tests.model.process_store import ProcessStore
from tests.model.truth import Change, Id, State, Truth

NAMES = ("a", "b")
STEPS_TOLD = 40
TRIES = 200  # of what fails now and then
ANSWER_S, POLL_S = 30.0, 0.01
Request = tuple[PointWrite, Change]


class ModelError(AssertionError):
    """A step went wrong; the message says how to do it again."""


@dataclass
class Process:
    """One replica: its own view of the store, its shard, and what the primary has pushed to it."""

    name: str
    store: ProcessStore
    shard: Shard
    primary: Primary | None = None
    inbox: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Import:
    """A generation that was built and is not committed yet."""

    base: Manifest
    entry: ShardEntry


class Model:
    """`failing` of a million store calls go wrong. `counts` says how often each step was taken."""

    def __init__(
        self, case: Case, seed: int, folder: Path, failing: int = 0, points: int = 50, limits: Limits | None = None
    ) -> None:
        self.case = case
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()
        self.truth = Truth()
        self._folder = folder
        self._failing = failing
        self._points = points  # most that one request upserts
        self._limits = limits or Limits()
        self._inner = MemoryStore()
        self._log = ManifestLog(self._inner, COLLECTION, new_nonce)
        self._processes: dict[str, Process] = {}
        self._leader = ""
        self._doubt: list[Change] = []  # requests of which nobody knows whether they were applied, in their order
        self._attributes = ATTRIBUTES[:2]
        self._import: Import | None = None
        self._told: deque[str] = deque(maxlen=STEPS_TOLD)
        self._log.create(case.config)
        self._log.declare_attributes({name: str(type_of(name)) for name in self._attributes})
        self.truth.begin(1, 0, State({}))

    def run(self, steps: int) -> None:
        """Take so many steps, then see that everything is there after a restart. ModelError where anything is wrong."""
        names = list(STEPS)
        weights = np.array([STEPS[name][0] for name in names])
        self._told.append(f"{self.case.config}, exact {self.case.exact}")
        try:
            with mock.patch.object(primary_module, "RETRY_PAUSE_S", 0.002):
                for number, name in enumerate(self.random.choice(names, size=steps, p=weights / weights.sum())):
                    self._told.append(f"{number} {name}")
                    self.counts[str(name)] += 1
                    STEPS[name][1](self)
                    self._settle()
                self._finish()
        except Exception as error:
            told = "\n".join(self._told)
            raise ModelError(f"seed {self.seed}: {type(error).__name__}: {error}\nthe last steps:\n{told}") from error
        finally:
            for name in list(self._processes):
                self._kill(name)

    def _finish(self) -> None:
        for name in list(self._processes):
            self._kill(name)
        self._check(self._leading())

    def _tell(self, what: str) -> None:
        self._told[-1] += f" {what}"

    # --- processes ----------------------------------------------------------------------------------------------

    def _start(self, name: str) -> Process:
        """A process that has loaded the newest version; Unavailable where its store fails."""
        store = ProcessStore(self._inner, self._failing, int(self.random.integers(2**32)))
        shard = Shard(store, COLLECTION, 0, self._folder, new_nonce)
        shard.wal = Wal(store, COLLECTION, 0, 0, pause=lambda seconds: None)
        shard.load()
        assert shard.applied_lsn >= self.truth.lsn, f"restarted at LSN {shard.applied_lsn}, {self.truth.lsn} was told"
        self._processes[name] = Process(name, store, shard)
        return self._processes[name]

    def _kill(self, name: str) -> None:
        """What is in memory is gone, whatever it is at."""
        process = self._processes.pop(name)
        process.store.die()
        if process.primary is not None:
            process.primary.stop()  # its threads would go on; their store is dead
        if self._leader == name:
            self._leader = ""

    def _some(self) -> Process:
        """Any process that lives."""
        if not self._processes:
            return self._leading()
        return self._processes[str(self.random.choice(sorted(self._processes)))]

    def _leading(self) -> Process:
        """The process that leads; where none does, one is made to."""
        for _ in range(TRIES):
            if self._leader:
                return self._processes[self._leader]
            name = str(self.random.choice(NAMES))
            with self._may_fail():
                self._claim(self._processes.get(name) or self._start(name))
        raise AssertionError(f"no primary after {TRIES} tries")

    def _claim(self, process: Process) -> None:
        """Make it the primary. Its claim may be there also where this fails: nobody leads then."""
        self._tell(f"claim by {process.name}")
        self._give_up(process)
        self._leader = ""
        process.primary = Primary.claim(
            process.shard, self._limits, Upkeep(), lambda data: self._pushed(process.name, data)
        )
        self._leader = process.name
        if self._doubt:
            self._resolve(process)
        else:
            self.truth.advance(process.shard.applied_lsn)

    def _give_up(self, process: Process) -> None:
        """A replica that thinks it leads does not claim; it learns that it does not, or is told to stop."""
        if process.primary is None:
            return
        if not self._write_as_stale(process, process.primary):
            process.primary.stop()
        process.primary = None

    def _pushed(self, sender: str, data: bytes) -> None:
        for name, process in list(self._processes.items()):
            if name != sender:
                process.inbox.append(data)

    @contextmanager
    def _may_fail(self, *stores: ProcessStore) -> Iterator[None]:
        """Unavailable is right where the store fails now and then, or the process was killed."""
        try:
            yield
        except Unavailable as error:
            if not self._failing and not any(store.dead for store in stores):
                raise
            self._tell(f"[{error}]")

    # --- writes -------------------------------------------------------------------------------------------------

    def _upsert(self) -> Request:
        count = int(self.random.integers(1, min(self._points, len(self.case.ids)) + 1))
        ids = self._ids(count)
        points = self.case.points(self.random, count, self._attributes)
        return PointWrite(upserts=upserts(self.case, ids, points)), dict(zip(ids, points, strict=True))

    def _delete(self) -> Request:
        ids = self._ids(int(self.random.integers(1, min(2 * self._points, len(self.case.ids)) + 1)))
        return PointWrite(deletes=pa.array(ids, ID_ARROW_TYPE[self.case.config.id_type])), dict.fromkeys(ids)

    def _ids(self, count: int) -> list[Id]:
        return [self.case.ids[n] for n in self.random.choice(len(self.case.ids), size=count, replace=False)]

    def _requests(self) -> list[Request]:
        count = 1 if self.random.random() < 0.7 else int(self.random.integers(2, 8))
        return [self._upsert() if self.random.random() < 0.65 else self._delete() for _ in range(count)]

    def _submit(self, requests: Sequence[Request]) -> list[tuple[Future[WriteOutcome], Change]]:
        """Queued at one primary, one behind the other."""
        primary = self._leading().primary
        assert primary is not None
        return [(primary.write(write), change) for write, change in requests]

    def _await(self, submitted: Sequence[tuple[Future[WriteOutcome], Change]]) -> None:
        process = self._processes[self._leader]
        for future, change in submitted:
            try:
                outcome = self._answer(process, future)
            except Unavailable as error:
                if not self._failing and not process.store.dead:
                    raise
                self._tell(f"in doubt [{error}]")
                self._doubt.append(change)
            except Fenced:  # it waited until its process was dead: it was never put
                if not process.store.dead:
                    raise
            else:
                self._acknowledged(outcome, change)

    def _answer(self, process: Process, future: Future[WriteOutcome]) -> WriteOutcome:
        """A primary whose store is dead tries for ever, until its process ends."""
        for _ in range(int(ANSWER_S / POLL_S)):
            done, _ = wait([future], POLL_S)
            if done:
                break
            if process.store.dead and process.primary is not None:
                process.primary.stop()
        return future.result(0)

    def _acknowledged(self, outcome: WriteOutcome, change: Change) -> None:
        """Whatever was queued before it is in the WAL as well: records are put one after the other."""
        if self._doubt:
            self._skip(outcome.lsn - 1, len(self._doubt))
        state = self.truth.newest(self._served())
        expected = sum(point is not None or point_id in state.points for point_id, point in change.items())
        assert outcome.count == expected, f"told {outcome.count} points, not {expected}, of {len(change)}"
        self.truth.apply(outcome.lsn, change)

    def _served(self) -> int:
        """The newest generation of the primary: the one that counts."""
        held = self._processes[self._leader].shard.newest()
        assert held is not None
        return held.view.generation

    def _settle(self) -> None:
        """Find out what became of the requests in doubt: by a write behind them, or from what a new primary has."""
        for _ in range(TRIES):
            if not self._doubt:
                return
            if self._leader and self.random.random() < 0.7:
                self._await(self._submit([self._delete()]))
            else:
                self._leader = ""
                self._leading()
        raise AssertionError(f"still in doubt after {TRIES} tries")

    def _resolve(self, process: Process) -> None:
        """The new primary's points are those after the first of the requests in doubt, or the first two, ..."""
        held = process.shard.newest()
        assert held is not None
        found = contents(self.case, held.view)
        told = []
        for number, state in enumerate(self.truth.prefixes(held.view.generation, self._doubt)):
            told = differences(found, state)
            if not told:
                self._skip(process.shard.applied_lsn, number)
                return
        raise AssertionError(f"{len(self._doubt)} requests are in doubt, of which only a part was applied: {told[:5]}")

    def _skip(self, lsn: int, applied: int) -> None:
        """So many of the requests in doubt are in the WAL, the last of them at or before `lsn`."""
        states = {g: self.truth.prefixes(g, self._doubt[:applied])[-1] for g in self.truth.generations}
        self.truth.skip(lsn, states)
        self._doubt.clear()

    # --- steps --------------------------------------------------------------------------------------------------

    def write(self) -> None:
        self._await(self._submit(self._requests()))

    def search_while_writing(self) -> None:
        """Answered from one LSN, whichever it is by then."""
        shard = self._leading().shard
        submitted = self._submit(self._requests())
        judge = self._search(shard)
        self._await(submitted)
        judge()

    def search(self) -> None:
        self._search(self._some().shard)()

    def _search(self, shard: Shard) -> Callable[[], None]:
        """Ask now; the function that is returned judges the answer."""
        generation = int(self.random.choice(shard.status().generations))
        queries = self.case.queries(self.random, int(self.random.integers(1, 4)))
        k = int(self.random.choice([1, 2, 5, 10, 11, 40, len(self.case.ids)]))
        exact = bool(self.random.random() < 0.5)
        columns = self._columns()
        hits = ask(shard, generation, queries, k, exact, columns)

        def judge() -> None:
            state = self.truth.at(generation, hits.lsn)
            if state is not None:
                exhaustive = exact or self.case.config.index.kind == "auto"
                check_hits(self.case, state, queries, k, exhaustive, hits)
                check_columns(state, hits, columns)

        return judge

    def _columns(self) -> tuple[str, ...]:
        return tuple(name for name in ("vector", *self._attributes) if self.random.random() < 0.3)

    def fetch(self) -> None:
        shard = self._some().shard
        view = shard.view(int(self.random.choice(shard.status().generations)))
        state = self.truth.at(view.generation, view.lsn)
        if state is not None:
            check_fetch(self.case, view, state, self._ids(int(self.random.integers(1, 30))), self._columns())

    def check(self) -> None:
        self._check(self._some())

    def _check(self, process: Process) -> None:
        for generation in process.shard.status().generations:
            view = process.shard.view(generation)
            state = self.truth.at(generation, view.lsn)
            if state is not None:
                check_view(self.case, view, state)
        if process.name == self._leader:
            assert process.shard.applied_lsn == self.truth.lsn

    def follow(self) -> None:
        """Pushed records come in order, or some are lost, come twice, or late; or the WAL is read."""
        process = self._some()
        arrived, process.inbox = process.inbox, []
        manner = str(self.random.choice(["in order", "some lost", "twice", "shuffled", "wal"]))
        self._tell(f"{process.name} {manner}")
        if manner == "some lost":
            arrived = [data for data in arrived if self.random.random() < 0.5]
        elif manner == "twice":
            arrived = arrived + arrived
        elif manner == "shuffled":
            arrived = [arrived[n] for n in self.random.permutation(len(arrived))]
        with self._may_fail(process.store):
            for data in arrived if manner != "wal" else ():
                process.shard.receive(data)
            if manner == "wal":
                applied = process.shard.catch_up()
                stale = process.primary is not None and not process.primary.lost
                assert stale or applied >= self.truth.lsn, f"caught up to {applied}, not {self.truth.lsn}"
        self._check(process)

    def seal(self) -> None:
        self._upkeep(self._sealed, meanwhile=None)

    def merge(self) -> None:
        self._upkeep(self._merged, meanwhile=None)

    def upkeep_meanwhile(self) -> None:
        """Something else happens between the work and its commit."""
        work = self._sealed if self.random.random() < 0.5 else self._merged
        others = (self.seal, self.merge, self.write, self.declare, self.import_commit, self.takeover)
        self._upkeep(work, meanwhile=others[int(self.random.integers(len(others)))])

    def upkeep_killed(self) -> None:
        work = self._sealed if self.random.random() < 0.5 else self._merged
        self._upkeep(work, meanwhile=None, dies_at=int(self.random.integers(1, 20)))

    def _upkeep(
        self, work: Callable[[ProcessStore], None], meanwhile: Callable[[], None] | None, dies_at: int = 0
    ) -> None:
        store = ProcessStore(self._inner, self._failing, int(self.random.integers(2**32)))
        if dies_at:
            store.die_at(dies_at, bool(self.random.random() < 0.5))
        if meanwhile is not None:
            self._tell(f"and {meanwhile.__name__}")
            store.before_manifest = meanwhile
        with self._may_fail(store):
            try:
                work(store)
            except Conflict as error:
                if meanwhile is None:
                    raise
                self._tell(f"[{error}]")
        if self.random.random() < 0.7:
            self.load()

    def _sealed(self, store: ProcessStore) -> None:
        self._tell("seal")
        manifest = seal_tail(store, COLLECTION, 0, self._folder, new_nonce)
        if manifest is not None:
            self._check_entry(manifest)

    def _merged(self, store: ProcessStore) -> None:
        names = [ref.segment_id for ref in self._log.newest_live().shards[0].segments]
        chosen = [name for name in names if self.random.random() < 0.6]
        self._tell(f"merge {len(chosen)} of {len(names)}")
        manifest = merge_segments(store, COLLECTION, 0, chosen, self._folder, new_nonce)
        if manifest is not None:
            self._check_entry(manifest)

    def _check_entry(self, manifest: Manifest) -> None:
        entry = manifest.shards[0]
        state = self.truth.at(manifest.generation, entry.applied_lsn)
        if state is not None:
            assert entry.points == len(state.points), f"{entry.points} points, not {len(state.points)}: {entry}"

    def load(self) -> None:
        """The newest version."""
        process = self._some()
        self._tell(f"load {process.name}")
        with self._may_fail(process.store):
            view = process.shard.load()
            assert view.version == self._log.newest_live().version
        self._check(process)

    def load_old(self) -> None:
        """A version of what it holds changes nothing."""
        process = self._some()
        held = process.shard.newest()
        assert held is not None
        version = int(self.random.integers(1, held.view.version + 1))
        if self._log.read(version).generation == held.view.generation:
            with self._may_fail(process.store):
                assert process.shard.load(version) is held.view
                assert {version, held.view.version} <= set(process.shard.status().versions)

    def retire(self) -> None:
        process = self._some()
        generations = process.shard.status().generations
        process.shard.retire(generations[-1])
        assert process.shard.status().generations == generations[-1:]

    def takeover(self) -> None:
        others = [name for name in NAMES if name != self._leader]
        name = str(self.random.choice(others))
        with self._may_fail():
            self._claim(self._processes.get(name) or self._start(name))

    def stale_write(self) -> None:
        """Who was taken over writes on: it is fenced, and follows."""
        for process in list(self._processes.values()):
            if self._leader and process.name != self._leader and process.primary is not None:
                self._write_as_stale(process, process.primary)
                process.primary = None

    def _write_as_stale(self, process: Process, primary: Primary) -> bool:
        """False where nobody took over, and a write would be applied."""
        if not self._leader or process.name == self._leader:
            return False
        try:
            primary.write(self._upsert()[0]).result(ANSWER_S)
        except Fenced:
            self._tell(f"{process.name} is fenced")
        except Unavailable as error:
            if not self._failing:
                raise
            self._tell(f"[{error}]")
            primary.stop()
        else:
            raise AssertionError(f"{process.name} was taken over, and has acknowledged a write")
        assert primary.lost, f"{process.name} is fenced, and goes on leading"
        return True

    def restart(self) -> None:
        """Processes that are not there start; sometimes one is killed at rest before."""
        if self._processes and self.random.random() < 0.3:
            self._kill(self._some().name)
        for name in NAMES:
            if name not in self._processes:
                self._tell(f"start {name}")
                with self._may_fail():
                    self._check(self._start(name))

    def crash(self) -> None:
        """A process is killed at some call to its store, while it writes, loads, follows or claims."""
        process = self._some()
        process.store.die_at(int(self.random.integers(1, 12)), bool(self.random.random() < 0.5))
        steps = [self._load_dying, self._follow_dying]
        steps += [self._write_dying] * 3 if process.name == self._leader else [self._claim_dying]
        with self._may_fail(process.store):
            steps[int(self.random.integers(len(steps)))](process)
        self._kill(process.name)

    def _load_dying(self, process: Process) -> None:
        process.shard.load()

    def _follow_dying(self, process: Process) -> None:
        process.shard.catch_up()

    def _claim_dying(self, process: Process) -> None:
        self._claim(process)

    def _write_dying(self, process: Process) -> None:
        for _ in range(int(self.random.integers(1, 4))):
            if not process.store.dead:
                self._await(self._submit(self._requests()))

    def declare(self) -> None:
        """Writes use a name only after it was declared."""
        if len(self._attributes) < len(ATTRIBUTES):
            name = ATTRIBUTES[len(self._attributes)]
            self._log.declare_attributes({name: str(type_of(name))})
            self._attributes = (*self._attributes, name)

    def import_begin(self) -> None:
        """The generation is built from points of its own; writes from now on are kept on top of it."""
        if self._import is not None or self._doubt:
            return
        base = self._log.newest_live()
        (entry,) = self._log.wal_ends(base, 1)
        ids = self._ids(int(self.random.integers(0, min(4 * self._points, len(self.case.ids)) + 1)))
        state = State(dict(zip(ids, self.case.points(self.random, len(ids), self._attributes), strict=True)))
        refs = publish(self._inner, self.case, state, self._attributes)
        self.truth.begin(base.generation + 1, entry.applied_lsn, state)
        self._import = Import(base, ShardEntry(0, refs, entry.applied_lsn, entry.epoch))

    def import_commit(self) -> None:
        if self._import is not None:
            self._log.commit_generation(self._import.base, self.case.config, (self._import.entry,))
            self._import = None


def new_nonce() -> str:
    return uuid.uuid4().hex


STEPS: dict[str, tuple[float, Callable[[Model], None]]] = {
    "write": (45, Model.write),
    "search": (20, Model.search),
    "search_while_writing": (5, Model.search_while_writing),
    "fetch": (8, Model.fetch),
    "check": (2, Model.check),
    "follow": (8, Model.follow),
    "seal": (1.5, Model.seal),
    "merge": (0.8, Model.merge),
    "upkeep_meanwhile": (0.7, Model.upkeep_meanwhile),
    "upkeep_killed": (0.5, Model.upkeep_killed),
    "load": (2, Model.load),
    "load_old": (0.5, Model.load_old),
    "retire": (0.3, Model.retire),
    "takeover": (0.7, Model.takeover),
    "stale_write": (0.7, Model.stale_write),
    "restart": (1, Model.restart),
    "crash": (1, Model.crash),
    "declare": (0.1, Model.declare),
    "import_begin": (0.4, Model.import_begin),
    "import_commit": (0.4, Model.import_commit),
}
