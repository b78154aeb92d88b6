"""One replica: a `Shard` that follows its WAL or leads it, with a thread for each thing that may take long. No Ray.

Searches run one at a time in a thread, for FAISS uses several by itself; only what is known to take no more than a
moment is done at once. Loads and claims have another thread, records of other writers a third. Calls only wait for
these, so that the event loop is free to tell the status at any time. A search of a GPU waits for the thread of that,
which a load or another search may have: meanwhile none is done at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from actors.crossing import CrossingThread
from actors.faiss_index import use_threads
from actors.gpu_device import GpuDevice
from actors.node_memory import WatchedMemory
from actors.primary import Primary
from actors.recall_observer import RecallObserver
from actors.replica_gpu import ReplicaGpu
from actors.search_thread import SearchThread
from actors.search_times import SearchTimes
from actors.shard import ReplicaStatus, Shard
from actors.shard_client import CALL_TIMEOUT_S
from actors.waiter import Waiter, done_until
from cluster.config import Settings
from cluster.errors import EaglerayError, Fenced, Unavailable
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, ShardSearch
from cluster.write import PointWrite, WriteOutcome

TICK_S = 1.0  # how often a follower reads the WAL without being told, and a primary looks at its shard's upkeep
AT_ONCE_S = 0.002  # what takes no longer is searched where it was asked for: to a thread and back takes 0.15 ms
PUSHED_MAX = 8  # records of the primary that wait to be applied; others are found in the WAL
WAIT_FIRST_S, WAIT_MAX_S = 0.01, 0.25  # between looks at the WAL for an LSN that a search waits for
Outcomes = tuple[Hits | EaglerayError, ...]
logger = logging.getLogger(__name__)


class ShardUpkeep(Protocol):
    """Seals and merges, done elsewhere."""

    def look(self, shard: Shard) -> None:
        """Begin what the shard needs, unless it is under way; called every `TICK_S` while the replica leads."""
        ...

    def told(self) -> str:
        """What is being done, or why the last of it failed."""
        ...

    def close(self) -> None: ...


class Replica:
    """The constructor loads the newest version and replays the WAL; it leads only once it is told to.

    `open_shard` may fail, and is called again by the next `load`. `push` is given what the primary has written, for
    the other replicas; it must not block. `device` is the GPU that the shard's indexes are on.
    """

    def __init__(
        self,
        key: ReplicaKey,
        open_shard: Callable[[], Shard],
        settings: Settings,
        threads: int,
        push: Callable[[bytes], None] = lambda data: None,
        upkeep: ShardUpkeep | None = None,
        device: GpuDevice | None = None,
    ) -> None:
        self._key = key
        self._open_shard = open_shard
        self._settings = settings
        self._threads = threads
        self._push = push
        self._upkeep = upkeep
        self._shard: Shard | None = None
        self._primary: Primary | None = None
        self._searcher = SearchThread(lambda: use_threads(threads), f"replica {key} ends")
        self._loader = ThreadPoolExecutor(1, "load", initializer=use_threads, initargs=(threads,))
        self._gpu = ReplicaGpu(str(key), device, self._loader, self._promote)
        self._follower = ThreadPoolExecutor(1, "follow", initializer=use_threads, initargs=(1,))
        self._times = SearchTimes()
        self._observer = RecallObserver(settings.observed_share, settings.observed_duty)
        self._observing = threading.Lock()  # what is searched at once, and in the thread, is sampled by one at a time
        self._waiters: set[Waiter] = set()
        self._pushed = threading.Semaphore(PUSHED_MAX)
        self._catching_up: Future[None] | None = None
        self._closed = threading.Event()
        self._crosser = CrossingThread(str(key), self._closed)
        self._memory = WatchedMemory()
        self._error = ""  # of the last load
        self._behind = ""  # why the WAL could not be followed
        try:
            self._loader.submit(self._load, None).result()
        except Exception as error:  # noqa: BLE001  # the process stays and says why; it will be asked to load again
            logger.error("%s: %s", key, error)
        self._observer.start()

    # --- reads --------------------------------------------------------------------------------------------------

    async def search(self, request: ShardSearch) -> Outcomes:
        """One outcome per group. Unavailable where the generation is not held, or `min_lsn` not reached in time."""
        await self._reach(request.generation, request.min_lsn, request.timeout_s)
        if self._closed.is_set() or self._gpu.busy or self._times.predicted_s(request) > AT_ONCE_S:
            return await self._searcher.run(self._search, request)
        use_threads(self._threads)  # of whichever thread this is: 0.2 us
        return self._search(request)

    def _search(self, request: ShardSearch) -> Outcomes:
        view = self._opened().view(request.generation)
        started = time.perf_counter()
        outcomes = view.search(request)
        self._times.took(request, time.perf_counter() - started)
        with self._observing:
            self._observer.offer(request, outcomes, view.search)
        return outcomes

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        """Points by an Arrow array of ids (`Shard.fetch`). Unavailable where `min_lsn` is not reached in time."""
        await self._reach(generation, min_lsn, timeout_s)
        view = self._opened().view(generation)
        return Fetched(*await asyncio.to_thread(view.fetch, ids, columns), view.lsn)

    async def _reach(self, generation: int, min_lsn: int, timeout_s: float) -> None:
        """Wait until this LSN is in the generation, reading the WAL; Unavailable where it is not in time.

        A generation of an earlier log set gets no LSN of a later one.
        """
        shard = self._opened()
        if min_lsn == 0 or shard.view(generation).lsn >= min_lsn:
            return
        deadline, pause_s = time.monotonic() + timeout_s, WAIT_FIRST_S
        waiter = Waiter()
        self._waiters.add(waiter)
        try:
            while (applied := shard.view(generation).lsn) < min_lsn:
                left_s = deadline - time.monotonic()
                if left_s <= 0.0:
                    why = f" ({self._behind})" if self._behind else ""
                    raise Unavailable(f"replica {self._key} has applied LSN {applied}, not yet LSN {min_lsn}{why}", 0.1)
                self.catch_up()
                await waiter.wait(min(left_s, pause_s))
                pause_s = min(2.0 * pause_s, WAIT_MAX_S)
        finally:
            self._waiters.discard(waiter)

    # --- writes -------------------------------------------------------------------------------------------------

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        """One outcome per write, each acknowledged by itself; Fenced where this is not the primary.

        After `timeout_s` what is still queued is not written any more, and of what is being put nobody knows.
        """
        primary, deadline = self._primary, time.monotonic() + timeout_s
        queued = [self._queue(primary, write, deadline) for write in writes]
        waiting = [one for one in queued if isinstance(one, Future)]
        await done_until(deadline, waiting)
        if primary is not None and not all(one.done() for one in waiting):
            primary.drop_expired()
        return tuple(_outcome(one, timeout_s) if isinstance(one, Future) else one for one in queued)

    def _queue(
        self, primary: Primary | None, write: PointWrite, deadline: float
    ) -> Future[WriteOutcome] | EaglerayError:
        if primary is None or primary.lost:
            why = f": {primary.lost}" if primary is not None else ""
            return Fenced(f"replica {self._key} is not the primary of shard {self._key.shard}{why}")
        try:
            return primary.write(write, deadline)
        except EaglerayError as error:
            return error

    async def lead(self) -> None:
        """Become the primary; nothing where it is."""
        await asyncio.get_running_loop().run_in_executor(self._loader, self._lead)

    def _lead(self) -> None:
        if self._leads:
            return
        shard = self._opened()
        if shard.newest() is None:
            raise Unavailable(f"replica {self._key} has loaded nothing: {self.status().error}")
        self._primary = None
        try:
            with self._gpu.used():  # it may load what was sealed since
                primary = Primary.claim(shard, self._settings.limits, self._settings.upkeep, self._push)
        except Fenced:
            shard.catch_up()
            if shard.log_ended:  # its status says so: it is asked to lead again once it follows the next one
                return
            raise
        if self._closed.is_set():
            primary.stop()
        else:
            self._primary = primary

    @property
    def _leads(self) -> bool:
        return self._primary is not None and not self._primary.lost

    # --- following ----------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Future[None] | None:
        """Apply a record that the primary pushed; None where too many wait: the WAL has it."""
        if self._shard is None or self._closed.is_set() or not self._pushed.acquire(blocking=False):
            return None
        return self._follower.submit(self._receive, self._shard, data)

    def _receive(self, shard: Shard, data: bytes) -> None:
        self._pushed.release()
        self._follow(lambda: shard.receive(data))

    def catch_up(self) -> Future[None]:
        """Read the WAL to its end, in the thread for that; the one that waits for its turn is enough for all."""
        if self._closed.is_set():
            raise Unavailable(f"replica {self._key} ends")
        if self._catching_up is None or self._catching_up.running() or self._catching_up.done():
            self._catching_up = self._follower.submit(self._catch_up)
        return self._catching_up

    def _catch_up(self) -> None:
        shard = self._shard
        if shard is not None and not self._closed.is_set():
            self._follow(shard.catch_up)

    def _follow(self, move: Callable[[], object]) -> None:
        try:
            move()
        except Exception as error:  # noqa: BLE001  # told, and done again by the next tick
            self._behind = f"{type(error).__name__}: {error}"
            logger.warning("%s: following the WAL: %s", self._key, error)
        else:
            self._behind = ""
        for waiter in tuple(self._waiters):
            waiter.wake()

    def keep_ticking(self, period_s: float = TICK_S) -> None:
        """Follow the WAL and do the upkeep from now on, in a thread of its own."""
        threading.Thread(target=self._tick_for_ever, args=(period_s,), name="tick", daemon=True).start()

    def _tick_for_ever(self, period_s: float) -> None:
        while not self._closed.wait(period_s):
            try:
                self.tick()
            except EaglerayError as error:  # such as a store that is away: the next tick finds it back
                logger.warning("%s: upkeep: %s", self._key, error)
            except Exception:
                logger.exception("%s: upkeep", self._key)

    def tick(self) -> None:
        """Once a period: a follower reads the WAL, a primary sees to what its shard needs."""
        if not self._leads:
            self.catch_up()
        elif self._upkeep is not None:
            self._upkeep.look(self._opened())
        self._gpu.look()

    # --- control ------------------------------------------------------------------------------------------------

    def _load(self, version: int | None) -> None:
        try:
            with self._gpu.used():
                if self._shard is None:
                    shard = self._open_shard()
                    shard.before_arrival = self._give_up_lead
                    self._shard = shard
                self._shard.load(version)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._see_to_crossing()
        self._error = ""

    def _promote(self) -> list[str]:
        return self._shard.promote() if self._shard is not None else []

    def _see_to_crossing(self) -> None:
        """While a generation of another log set is on its way, a thread has it read on."""
        shard = self._shard
        if shard is None:
            return

        def read() -> int | None:
            crossing = shard.crossing
            return crossing.read if crossing is not None else None

        self._crosser.see_to(read, shard.advance, lambda: self._loader.submit(shard.arrive).result())

    def _give_up_lead(self) -> None:
        """The log that this one may lead has ended; what waits is answered before the shard goes on with another."""
        if self._primary is not None:
            self._primary.stop()
            self._primary = None

    async def load(self, version: int | None) -> None:
        await asyncio.wrap_future(self.begin_load(version))

    def begin_load(self, version: int | None) -> Future[None]:
        """Load a version (None: the newest) after what the loading thread is at."""
        return self._loader.submit(self._load, version)

    async def retire(self, generation: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._loader, self._retire, generation)

    def _retire(self, generation: int) -> None:
        """Who is left with nothing leads no more: it could apply no write."""
        shard = self._opened()
        newest = shard.newest()
        if newest is not None and newest.view.generation < generation:
            self._give_up_lead()
        shard.retire(generation)
        self._observer.retire(generation)
        self._gpu.soon()

    def status(self) -> ReplicaStatus:
        status = self._shard.status() if self._shard is not None else ReplicaStatus("failed")
        primary = self._primary
        return replace(
            status,
            gpu=self._gpu.facts,
            degraded=self._gpu.lost or status.degraded,
            threads=self._threads,
            pid=os.getpid(),
            node=socket.gethostname(),
            node_memory=self._memory.told(),
            error=self._error or self._crosser.failure or status.error or self._behind,
            observed=tuple(told for one in status.generations if (told := self._observer.observed(one))),
            epoch=primary.epoch if primary is not None and not primary.lost else 0,
            upkeep=self._upkeep.told() if self._upkeep is not None else "",
        )

    @property
    def replicas(self) -> int:
        """How many replicas its shard shall have."""
        newest = self._shard.newest() if self._shard is not None else None
        return newest.view.config.replicas if newest is not None else 1

    def _opened(self) -> Shard:
        if self._shard is None:
            raise Unavailable(f"replica {self._key} has loaded nothing: {self._error}")
        return self._shard

    def close(self) -> None:
        """End its threads, after what they are at; blocks while a primary gives up."""
        self._closed.set()
        self._observer.stop()
        if self._upkeep is not None:
            self._upkeep.close()
        if self._primary is not None:
            self._primary.stop()
        self._searcher.close()
        for executor in (self._loader, self._follower):
            executor.shutdown(wait=False, cancel_futures=True)


def _outcome(answer: Future[WriteOutcome], timeout_s: float) -> WriteOutcome | EaglerayError:
    if not answer.done():
        return Unavailable(f"the write may have been applied or not: it was not done within {timeout_s:g} s")
    error = answer.exception()
    if error is None:
        return answer.result()
    if isinstance(error, EaglerayError):
        return error
    logger.error("a write", exc_info=error)
    return Unavailable(f"the write may have been applied or not: {type(error).__name__}: {error}")
