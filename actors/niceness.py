"""The priority of processes that build in the background: searches come first."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

BACKGROUND = 10
THREADS = Path("/proc/self/task")


def work_in_background() -> None:
    """Lower the priority of this process, for good: of every thread, and so of those that they start from now on.

    Linux has one for each thread, and BLAS starts some when it is loaded. Elsewhere it is that of the whole process.
    """
    numbers = [int(each.name) for each in THREADS.iterdir()] if THREADS.is_dir() else [0]
    for number in numbers:
        with suppress(ProcessLookupError):  # it has ended since
            os.setpriority(os.PRIO_PROCESS, number, max(BACKGROUND, os.getpriority(os.PRIO_PROCESS, number)))
