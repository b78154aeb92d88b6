"""When the calls on a connection are late, found by one timer for all: one per call would cost more than the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PERIOD_S = 0.05  # a late call is noticed so much later at most


class CallDeadlines:
    """Tells `expired` of every call that was added, not removed, and is late. Used within one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[int], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._deadlines: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: int, timeout_s: float) -> None:
        self._deadlines[call] = self._loop.time() + timeout_s
        if self._timer is None:
            self._timer = self._loop.call_later(PERIOD_S, self._look)

    def remove(self, call: int) -> None:
        self._deadlines.pop(call, None)

    def clear(self) -> None:
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = self._loop.time()
        late = [call for call, deadline in self._deadlines.items() if deadline <= now]
        for call in late:
            self.remove(call)
            self._expired(call)
        self._timer = self._loop.call_later(PERIOD_S, self._look) if self._deadlines else None
