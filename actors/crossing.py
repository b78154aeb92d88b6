"""A generation of another log set on its way: it reads the logs of the earlier sets until they have ended.

It stands beside what is served and is no part of that: whatever fails here, the rest goes on. Reading on has a thread
of its own (`CrossingThread`), for it may take long, and neither claims nor records of the served log may wait for it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from actors.live_generation import VERSIONS_KEPT, LiveGeneration
from cluster.entry_log import EntryLog
from cluster.errors import EaglerayError
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import NEAR_RECORDS

PERIOD_S = 0.1  # how often the earlier logs are read on while that finds anything
PERIODS_MAX = 20  # it waits so much longer at last where it finds nothing: each look at a log is a request that costs
NEAR_S = 1.0  # what is left is near as well where it is read within this, and more writes come than let it get less
RecordsRead = Callable[[], int | None]  # by the crossing; None where there is none
logger = logging.getLogger(__name__)


class Crossing:
    """`lag` is how many records were not read yet when that was last known, None where reading on failed.

    It is at most `NEAR_RECORDS` where the earlier logs may end, and only there: what is left is read in a moment.
    `versions` are the manifests that it stands for. `broken`: a record was applied by half, and nothing can be done.
    """

    def __init__(
        self,
        generation: LiveGeneration,
        entry: ShardEntry,
        log: EntryLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.generation = generation
        self.versions = generation.versions
        self.broken = False
        self.lag: int | None = 0 if log.crossed else log.lag() + NEAR_RECORDS
        self._entry = entry
        self._log = log
        self._clock = clock
        self._near = False
        self._newest: Manifest | None = None
        self._arrived = False
        self._reading = threading.Lock()

    @property
    def number(self) -> int:
        """Of its generation."""
        return self.generation.view.generation

    @property
    def read(self) -> int:
        """How many records of the earlier sets it has read."""
        return self._log.read

    @property
    def crossed(self) -> bool:
        """Whether all records of the earlier sets were applied, and none can come any more."""
        return self._log.crossed

    def stands_for(self, manifest: Manifest) -> bool:
        """Whether this is that version as well, because its entry of this shard is the same."""
        view, entry = self.generation.view, manifest.shards[self._entry.shard]
        if self.broken or (manifest.generation, manifest.config, entry) != (self.number, view.config, self._entry):
            return False
        self.versions = tuple(sorted({*self.versions, manifest.version})[-VERSIONS_KEPT:])
        if manifest.version > max(view.version, self._newest.version if self._newest else 0):
            self._newest = manifest
        return True

    def arrived(self) -> LiveGeneration:
        """The generation, at the start of its own log; once this has crossed."""
        if not self._arrived:
            self._arrived = True
            if self._log.start is not None:
                self.generation.arrive(self._log.start, self._log.epoch)
            if self._newest is not None:
                self.generation.declare(self._newest.version, self._newest.attributes)
            self.generation.stand_for(self.versions)
        return self.generation

    def advance(self) -> bool:
        """Read on until little is left, or it does not get less; returns `crossed`. Nothing while another does it.

        Raises Unavailable or Corrupt where the logs cannot be read; what was applied stays so.
        """
        if not self._reading.acquire(blocking=False):
            return self.crossed
        try:
            before = sys.maxsize
            while not self.crossed:
                began = self._clock()
                count = self._read_on()
                gets_less = count <= before // 2
                moment = self._clock() - began <= NEAR_S
                self._near = count <= NEAR_RECORDS or (moment and not gets_less)
                self.lag = min(count, NEAR_RECORDS) if self._near else count
                if self._near or not gets_less:
                    break
                before = count
        except BaseException:
            self.lag = None
            raise
        finally:
            self._reading.release()
        return self.crossed

    def _read_on(self) -> int:
        """To the ends of the logs as they are met; returns how many records there were."""
        before, known = self._log.read, self.lag or 0
        for record in self._log.records():
            if self.crossed:  # of the own log, which is read elsewhere
                break
            try:
                self.generation.cross(record)
            except BaseException:
                self.broken = True
                raise
            if not self._near:
                self.lag = max(known - (self._log.read - before), NEAR_RECORDS + 1)
        return self._log.read - before


class CrossingThread:
    """Has a crossing read on until there is none. `failure` is why the last time did not succeed.

    Each `PERIOD_S` while there is something to read, then after twice the pause before, up to `PERIODS_MAX` of these:
    a generation may wait long for its other shards. When the logs have ended, and writes wait, the supervisor has every
    replica load it once more: that reads on by itself, and the thread begins anew with short pauses.
    """

    def __init__(self, name: str, closed: threading.Event) -> None:
        self.failure = ""
        self._name = name
        self._closed = closed
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._called = threading.Event()

    def see_to(self, read: RecordsRead, advance: Callable[[], bool], arrive: Callable[[], None]) -> None:
        """Run while `read()` is not None; at once, where this does so already. `arrive` where `advance` says so."""
        self._called.set()
        with self._lock:
            if self._thread is None and read() is not None and not self._closed.is_set():
                args = (read, advance, arrive)
                self._thread = threading.Thread(target=self._run, args=args, name="cross", daemon=True)
                self._thread.start()

    def _run(self, read: RecordsRead, advance: Callable[[], bool], arrive: Callable[[], None]) -> None:
        periods, before = 1, None
        while True:
            self._called.clear()  # what is called for from now on is seen the next time
            with self._lock:
                if self._closed.is_set() or read() is None:
                    self._thread, self.failure = None, ""
                    return
            self.failure = self._advanced(advance, arrive)
            now = read()
            periods = 1 if now != before else min(PERIODS_MAX, 2 * periods)
            before = None if self._called_within(periods) else now

    def _advanced(self, advance: Callable[[], bool], arrive: Callable[[], None]) -> str:
        """Why it failed; empty where it did not."""
        try:
            if advance():
                arrive()
        except Exception as error:  # told, and done again: what is served goes on
            failure = f"crossing to another log set: {error}"
            if failure != self.failure and not self._closed.is_set():
                ours = isinstance(error, EaglerayError)
                logger.warning("%s: %s", self._name, failure, exc_info=None if ours else error)
            return failure
        return ""

    def _called_within(self, periods: int) -> bool:
        """Wait so long, or until it is called, or closed."""
        return any(self._called.wait(PERIOD_S) or self._closed.is_set() for _ in range(periods))
