"""The GPU of a replica: what it had no room for is placed on it once there is some, and what a status tells of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from actors.gpu_device import GpuDevice

PROMOTE_PERIOD_S = 10.0  # between tries: another process may have given its memory back
ASK_AGAIN_S = 1.0  # how old what the driver told of the memory may be until it is asked again
TOLD_MAX_S = 10.0  # and until it is told no more
FIRST_WAIT_S = 2.0  # for the first answer; what is told before it is that nobody knows
Memory = tuple[int, int]
logger = logging.getLogger(__name__)


class ToldMemory:
    """(free, total) bytes of a GPU as its driver last told, which is asked in a thread of its own.

    The driver of a GPU that fell off the bus answers nothing for seconds, and nobody who is told may wait for it. While
    it owes an answer it is not asked again. The constructor waits a little for the first one.
    """

    def __init__(self, ask: Callable[[], Memory | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._told: tuple[Memory | None, float] = None, clock()  # and when that was asked for
        self._asking = self._begin()
        self._asking.join(FIRST_WAIT_S)

    def told(self) -> Memory | None:
        """None where nobody knows, or has known for `TOLD_MAX_S`."""
        memory, asked_at = self._told
        age_s = self._clock() - asked_at
        if age_s >= ASK_AGAIN_S and not self._asking.is_alive():
            self._asking = self._begin()
        return memory if age_s < TOLD_MAX_S else None

    def _begin(self) -> threading.Thread:
        thread = threading.Thread(target=self._answer, args=(self._clock(),), name="gpu-memory", daemon=True)
        thread.start()
        return thread

    def _answer(self, asked_at: float) -> None:
        try:
            memory = self._ask()
        except Exception:  # told as unknown, and asked again
            logger.exception("the memory of the GPU")
            memory = None
        self._told = memory, asked_at


class ReplicaGpu:
    """`loader` is the replica's loading thread, `promote` what it does there (`Shard.promote`).

    `device` None: no GPU.
    """

    def __init__(self, name: str, device: GpuDevice | None, loader: Executor, promote: Callable[[], list[str]]) -> None:
        self._loading = False
        self._name = name
        self._device = device
        self._loader = loader
        self._promote = promote
        self._memory = None if device is None else ToldMemory(device.memory)
        self._promoting: Future[None] | None = None
        self._due_s = 0.0

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the loading thread does what may use the GPU."""
        self._loading = self._device is not None
        try:
            yield
        finally:
            self._loading = False

    @property
    def busy(self) -> bool:
        """Whether a search may have to wait for the GPU: for the loading thread, or for another search."""
        return self._loading or (self._device is not None and self._device.busy)

    def look(self) -> None:
        """Called every tick; tries at most each `PROMOTE_PERIOD_S`, and one try at a time."""
        waits = self._promoting is not None and not self._promoting.done()
        if self._device is None or self._device.lost or waits or time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + PROMOTE_PERIOD_S
        self._promoting = self._loader.submit(self._place)

    def soon(self) -> None:
        """Memory was given back: the next tick tries."""
        self._due_s = 0.0

    def _place(self) -> None:
        try:
            with self.used():
                placed = self._promote()
        except Exception:  # told, and tried again
            logger.exception("%s: placing segments on the GPU", self._name)
            return
        if placed:
            logger.info("%s: the GPU answers for %s now", self._name, ", ".join(placed))

    @property
    def facts(self) -> dict[str, Any] | None:
        """For status (`GpuDevice.facts_with`); waits for nothing."""
        if self._device is None or self._memory is None:
            return None
        return self._device.facts_with(self._memory.told())

    @property
    def lost(self) -> str:
        """That it is lost, and why; "" while it works, and where there is none."""
        return f"the GPU is lost: {self._device.lost}" if self._device is not None and self._device.lost else ""
