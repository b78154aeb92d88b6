"""Settings of the Python process that answers requests, all in one place."""

from __future__ import annotations

import gc

# Objects made and not freed between two collections; Python's default is 700. A request frees what it made by itself,
# so that what collections cost is nearly all in vain: 4 us a request with 64 connections. And a JSON body of a thousand
# vectors makes as many lists: with the default, one is gone through again and again while it is decoded.
COLLECT_AFTER_OBJECTS = 20_000


def tune_process() -> None:
    """Collect garbage rarely. What is there once the endpoint has started, Serve takes out of all collections
    (`gc.freeze`: RAY_SERVE_FREEZE_GC_ON_STARTUP, on by default).

    Not changed: `sys.setswitchinterval`. Shorter ones measured no better, beside Python threads and beside ones that
    decode large bodies, which keep the interpreter's lock for longer than any interval.
    """
    _, *older = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, *older)
