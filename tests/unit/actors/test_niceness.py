"""What builds in the background leaves the processor to searches, with all of its threads."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, threading
from actors.niceness import BACKGROUND, work_in_background

def priorities():
    return [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")]

go_on = threading.Event()
threading.Thread(target=go_on.wait).start()  # as BLAS starts some when it is loaded
before = priorities()
work_in_background()
threading.Thread(target=go_on.wait).start()
after = priorities()
go_on.set()
assert (len(before), len(after)) == (2, 3), (before, after)
assert min(after) >= BACKGROUND, (before, after)
"""


def test_every_thread_of_the_process_is_of_a_low_priority() -> None:
    """In a process of its own: it cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
