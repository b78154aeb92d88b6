"""Coroutines that wait for what other threads do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)


class Waiter:
    """What a coroutine waits for; any thread may wake it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._moved = asyncio.Event()

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._moved.set)
        except RuntimeError as error:  # its event loop has ended meanwhile
            logger.debug("nobody waits any more: %s", error)

    async def wait(self, most_s: float) -> None:
        try:
            async with asyncio.timeout(most_s):
                await self._moved.wait()
        except TimeoutError:
            return
        self._moved.clear()


async def done_until(deadline: float, outcomes: Sequence[Future[Any]]) -> None:
    """Wait for all, at most until the deadline. They are only looked at: none is cancelled with who waits here."""
    waiter = Waiter()
    for outcome in outcomes:
        outcome.add_done_callback(lambda _: waiter.wake())
    for outcome in outcomes:
        while not outcome.done() and (left_s := deadline - time.monotonic()) > 0.0:
            await waiter.wait(left_s)
