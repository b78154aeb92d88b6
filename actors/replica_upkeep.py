"""When a primary's shard is sealed and merged: at most one of each at a time, and later again what failed.

The work is done elsewhere (`run`), from object storage alone. A replica that leads no more begins nothing; what is
under way may end, for the commit of a manifest decides who was first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from actors.live_generation import LiveGeneration
from actors.shard import Shard
from cluster.config import Upkeep
from cluster.errors import EaglerayError
from cluster.manifest import Manifest
from cluster.manifest_format import added_on
from cluster.shard_entry import ShardEntry
from cluster.upkeep import Merge, Seal, ShardFacts, largest_build, segment_facts, wanted_upkeep

RETRY_FIRST_S, RETRY_MAX_S = 2.0, 300.0  # the pause after what did not succeed; it doubles each time
Work = Seal | Merge
logger = logging.getLogger(__name__)


@dataclass
class _Kind:
    """Seals, or merges: the one under way, and how it went before."""

    thread: ThreadPoolExecutor
    doing: str = ""
    failure: str = ""
    pause_s: float = 0.0
    not_before: float = 0.0
    running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self.running is not None and not self.running.done()


class ReplicaUpkeep:
    """`run` does the work, blocks, and returns the manifest version it committed.

    `load` has the replica load that version; until it has, no more of the kind is begun. None: there was nothing to do,
    for another was faster, and the newest version is loaded. `read` reads the manifest of a version.
    """

    def __init__(
        self,
        name: str,
        policy: Upkeep,
        read: Callable[[int], Manifest],
        run: Callable[[Work], int | None],
        load: Callable[[int | None], Future[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._policy = policy
        self._read = read
        self._run = run
        self._load = load
        self._clock = clock
        self._generation = 0  # that was held at the last look
        self._known: tuple[int, ShardEntry, int] | None = None  # the version held, its entry, the largest segment
        self._kinds: dict[type[Work], _Kind] = {
            kind: _Kind(ThreadPoolExecutor(1, kind.__name__.lower())) for kind in (Seal, Merge)
        }

    def look(self, shard: Shard) -> None:
        """Begin what the shard needs, unless that is under way, or failed a moment ago.

        Nothing while a generation of another log set is on its way: it would be done to that one, which is the newest.
        """
        held = shard.newest() if shard.crossing is None else None
        if held is None:
            return
        facts = self._facts(shard.number, held)
        now = self._clock()
        if held.view.generation != self._generation:
            self._generation = held.view.generation
            for kind in self._kinds.values():  # what failed may have done so because this one was on its way
                kind.pause_s = kind.not_before = 0.0
        waiting = {each for each, kind in self._kinds.items() if kind.busy or now < kind.not_before}
        for each in self._kinds.keys() - waiting:
            self._kinds[each].failure = ""
        while (work := wanted_upkeep(facts, self._policy, waiting)) is not None:
            kind = self._kinds[type(work)]
            kind.doing = _described(work)
            kind.running = kind.thread.submit(self._do, kind, work)
            waiting.add(type(work))

    def _facts(self, shard: int, held: LiveGeneration) -> ShardFacts:
        view = held.view
        if self._known is None or self._known[0] != view.version:
            manifest = self._read(view.version)
            most = largest_build(manifest.built_for, gpu=added_on(manifest.device))
            self._known = view.version, manifest.shards[shard], most
        _, entry, points_max = self._known
        tombstones = {name: rows.count - rows.kept for name, rows in view.selections.items()}
        tail_bytes = view.tail.size_bytes if view.tail is not None else 0
        return ShardFacts(segment_facts(entry, tombstones), view.tail_points, tail_bytes, held.records, points_max)

    def _do(self, kind: _Kind, work: Work) -> None:
        version, failure = None, ""
        try:
            version = self._run(work)
            self._load(version).result()
        except Exception as error:  # told, and done again after a pause
            ours = isinstance(error, EaglerayError)
            failure = f"{kind.doing} failed: {error if ours else repr(error)}"
            logger.warning("%s: %s", self._name, failure, exc_info=None if ours else error)
        done = version is not None and not failure
        kind.pause_s = 0.0 if done else min(2.0 * kind.pause_s, RETRY_MAX_S) or RETRY_FIRST_S
        kind.not_before = self._clock() + kind.pause_s
        kind.doing, kind.failure = "", failure

    def told(self) -> str:
        """What is being done, and why what was done last failed."""
        return "; ".join(text for kind in self._kinds.values() for text in (kind.doing, kind.failure) if text)

    def close(self) -> None:
        for kind in self._kinds.values():
            kind.thread.shutdown(wait=False, cancel_futures=True)


def _described(work: Work) -> str:
    what = f"merging {len(work.segment_ids)} segments" if isinstance(work, Merge) else "sealing the tail"
    return f"{what} ({work.reason})"
