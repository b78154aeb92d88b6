"""The GPU of a replica: what it had no room for is placed on it once there is some."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from actors.gpu_device import GpuDevice

PROMOTE_PERIOD_S = 10.0  # between tries: another process may have given its memory back
logger = logging.getLogger(__name__)


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
        """For status (`GpuDevice.facts`)."""
        return self._device.facts() if self._device is not None else None

    @property
    def lost(self) -> str:
        """That it is lost, and why; "" while it works, and where there is none."""
        return f"the GPU is lost: {self._device.lost}" if self._device is not None and self._device.lost else ""
