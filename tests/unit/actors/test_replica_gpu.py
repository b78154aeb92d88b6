"""What a status tells of a GPU while its driver answers, answers late, or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from actors import replica_gpu
from actors.gpu_device import GpuDevice
from actors.replica_gpu import ASK_AGAIN_S, TOLD_MAX_S, ReplicaGpu, ToldMemory
from cluster.gpu_memory import PROCESS_BYTES
from tests.fakes import ManualClock
from tests.gpu_double import GpuDouble

WAIT_S = 10.0
TOTAL = 8 << 30


class Driver:
    """Tells one byte less each time it is asked; holds its answers back while it hangs."""

    def __init__(self) -> None:
        self.asked = 0
        self.fails = False
        self._answers = threading.Event()
        self._answers.set()

    def memory(self) -> tuple[int, int] | None:
        self.asked += 1
        number = self.asked
        assert self._answers.wait(WAIT_S)
        if self.fails:
            raise OSError("no such device")
        return TOTAL - number, TOTAL

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self._answers.clear()
        try:
            yield
        finally:
            self._answers.set()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_memory_is_asked_for_again_once_it_is_old() -> None:
    driver, clock = Driver(), ManualClock()
    told = ToldMemory(driver.memory, clock)
    assert told.told() == (TOTAL - 1, TOTAL), "the first answer is waited for"
    clock.advance(ASK_AGAIN_S / 2)
    assert told.told() == (TOTAL - 1, TOTAL)
    clock.advance(ASK_AGAIN_S / 2)
    told.told()
    until(lambda: told.told() == (TOTAL - 2, TOTAL))
    assert driver.asked == 2


def test_driver_that_hangs_is_asked_once_and_its_last_answer_told_for_a_while() -> None:
    driver, clock = Driver(), ManualClock()
    told = ToldMemory(driver.memory, clock)
    with driver.hanging():
        for seconds, memory in ((ASK_AGAIN_S, (TOTAL - 1, TOTAL)), (TOLD_MAX_S - ASK_AGAIN_S, None), (60.0, None)):
            clock.advance(seconds)
            assert told.told() == memory
        until(lambda: driver.asked == 2)
    until(lambda: told.told() == (TOTAL - 3, TOTAL))  # the second is a minute old when it comes


def test_driver_that_hangs_from_the_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_gpu, "FIRST_WAIT_S", 0.01)
    driver = Driver()
    with driver.hanging():
        told = ToldMemory(driver.memory)
        assert told.told() is None
    until(lambda: told.told() == (TOTAL - 1, TOTAL))


def test_driver_that_fails_tells_nothing_and_is_asked_again() -> None:
    driver, clock = Driver(), ManualClock()
    driver.fails = True
    told = ToldMemory(driver.memory, clock)
    assert told.told() is None
    driver.fails = False
    clock.advance(ASK_AGAIN_S)
    until(lambda: told.told() == (TOTAL - 2, TOTAL))


def test_status_of_a_gpu_whose_driver_hangs_comes_at_once_and_tells_that_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_gpu, "ASK_AGAIN_S", 0.0)
    driver, library = Driver(), GpuDouble(TOTAL)
    device = GpuDevice(library, driver.memory, name="double")
    with ThreadPoolExecutor(1) as loader, driver.hanging():
        monkeypatch.setattr(replica_gpu, "FIRST_WAIT_S", 0.01)
        gpu = ReplicaGpu("words/0/0/gpu", device, loader, list)
        library.lose()
        with pytest.raises(Exception, match="illegal memory access"):
            device.run(lambda resources: resources.syncDefaultStreamCurrentDevice())
        facts = gpu.facts
        assert facts is not None
        assert (facts["total_bytes"], facts["used_bytes"], facts["name"]) == (None, PROCESS_BYTES, "double")
        assert "illegal memory access" in facts["lost"]
    device.close()


def test_replica_without_a_gpu_tells_nothing_of_one() -> None:
    with ThreadPoolExecutor(1) as loader:
        assert ReplicaGpu("words/0/0", None, loader, list).facts is None
