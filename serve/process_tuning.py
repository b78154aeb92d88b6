"""Settings of the Python process that answers requests, all in one place."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

# Objects made and not freed between two collections; Python's default is 700. A request frees what it made by itself,
# so that what collections cost is nearly all in vain: 4 us a request with 64 connections. And a JSON body of a thousand
# vectors makes as many lists: with the default, one is gone through again and again while it is decoded.
COLLECT_AFTER_OBJECTS = 20_000
# libuv accepts one connection per listening socket in a turn of the event loop, and a busy turn takes 50 ms: of 1,000
# connections that HAProxy opens when load rises, most waited for seconds, each with a request that nobody had seen, let
# alone refused. Each copy of the socket is one more connection per turn.
LISTENERS = 64
Startup = Callable[..., Coroutine[Any, Any, None]]


def tune_process() -> None:
    """Collect garbage rarely, and accept connections quickly, by every uvicorn server that starts from now on.

    What is there once the endpoint has started, Serve takes out of all collections (`gc.freeze`:
    RAY_SERVE_FREEZE_GC_ON_STARTUP, on by default).

    Not changed: `sys.setswitchinterval`. Shorter ones measured no better, beside Python threads and beside ones that
    decode large bodies, which keep the interpreter's lock for longer than any interval.
    """
    _, *older = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, *older)
    uvicorn.Server.startup = accept_many(uvicorn.Server.startup)  # type: ignore[method-assign]


def accept_many(startup: Startup) -> Startup:
    """uvicorn's `Server.startup`, to listen on `LISTENERS` copies of each socket that it is given.

    Serve makes its server once the endpoint is there, and gives it one socket; it has no setting for this.
    """

    async def start(server: Any, sockets: list[socket.socket] | None = None) -> None:
        if sockets is None:
            await startup(server)
            return
        copies = [copy for each in sockets for copy in (each, *(each.dup() for _ in range(LISTENERS - 1)))]
        await startup(server, copies)

    return start
