"""Long work in a thread of its own, and its progress as it comes: for the tasks of a job, which are generators."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


def shares_of(work: Callable[[Callable[[float], None]], T]) -> Generator[float, None, T]:
    """Run `work(progress)`; yields the shares, 0 to 1, that it tells, and returns what it returns or raises."""
    progress: queue.Queue[float | None] = queue.Queue()
    results: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(progress.put))
        except BaseException as error:  # noqa: BLE001  # carried to the caller's thread, nothing is lost
            failure.append(error)
        finally:
            progress.put(None)

    thread = threading.Thread(target=run, name="build")
    thread.start()
    while (share := progress.get()) is not None:
        yield share
    thread.join()
    if failure:
        raise failure[0]
    return results[0]
