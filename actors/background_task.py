"""What every task of a job runs in its Ray worker. Little is imported here: all else comes at a low priority."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from actors.niceness import work_in_background


def run_in_background(work: bytes) -> Iterator[Any]:
    """What a function yields for an item, after a word that it runs at all. `work` is both, pickled.

    FAISS and PyArrow come with them, which takes a second or two of a core: searches come first. The process stays of
    that priority: Ray gives it to other tasks of the same job only.
    """
    work_in_background()
    yield "started"
    function, item = pickle.loads(work)
    yield from function(item)
