"""How many answers of the calling thread came from the CPU where a GPU should have given them.

A search runs in one thread from its queries to its hits: what it counts before and after tells whether it was degraded.
"""

from __future__ import annotations

import threading


class _Counted(threading.local):
    answers = 0


_counted = _Counted()


def note_cpu_answer() -> None:
    """An index answered on the CPU because its GPU could not."""
    _counted.answers += 1


def cpu_answers() -> int:
    """How often that was, in this thread."""
    return _counted.answers
