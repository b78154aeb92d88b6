from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from actors import gpu_probe
from actors.faiss_library import let_gpus_be_numbered_by_bus
from actors.gpu_probe import SeenGpu, own_gpu, own_memory, seen_gpus

GIB = 1 << 30
MIG = "MIG-9a0a0a0a-1111-2222-3333-444444444444"


class NVMLError(Exception):
    pass


@dataclass
class Driver:
    """NVML of a node with these GPUs: (UUID, total bytes, free bytes)."""

    gpus: list[tuple[str, int, int]]
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: bool = False
    fallen: set[str] = field(default_factory=set)  # off the bus
    NVMLError = NVMLError

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:
        if number >= len(self.gpus):
            raise NVMLError("Invalid Argument")
        return self.gpus[number][0]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self._memory():
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if handle in self.fallen:
            raise NVMLError("GPU is lost")
        total, free = self._memory()[handle]
        return SimpleNamespace(total=total, free=free, used=total - free)

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA H100 80GB HBM3"  # older versions of the library give bytes

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def _memory(self) -> dict[str, tuple[int, int]]:
        return self.parts | {uuid: (total, free) for uuid, total, free in self.gpus}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Driver | None, str | None], None]]:
    """Makes this process one on a node with such a driver, or with none, and with so much of it visible."""

    def installed(driver: Driver | None, visible: str | None = None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", driver)  # None: an import of it fails
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpu_probe._nvml.cache_clear()

    yield installed
    gpu_probe._nvml.cache_clear()


def two() -> Driver:
    return Driver(
        [("GPU-aaaa1111", 80 * GIB, 79 * GIB), ("GPU-bbbb2222", 24 * GIB, 3 * GIB)], {MIG: (10 * GIB, 9 * GIB)}
    )


def test_all_gpus_of_the_node_are_seen_whatever_this_process_may_use(install: Any) -> None:
    install(two(), "1")
    assert seen_gpus() == (
        SeenGpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "GPU-aaaa1111", "580.65.06"),
        SeenGpu("NVIDIA H100 80GB HBM3", 24 * GIB, 3 * GIB, "GPU-bbbb2222", "580.65.06"),
    )


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        (None, "GPU-aaaa1111"),
        ("0", "GPU-aaaa1111"),
        ("1", "GPU-bbbb2222"),
        ("1,0", "GPU-bbbb2222"),
        (" 1 , 0", "GPU-bbbb2222"),
        ("GPU-bbbb2222", "GPU-bbbb2222"),
        ("GPU-bbbb", "GPU-bbbb2222"),  # CUDA takes the beginning of a name
        (MIG, MIG),
        ("2", None),
        ("", None),
        ("-1", None),
        ("-1,0", None),  # CUDA stops at the first that it does not know
        ("GPU-cccc", None),
        ("NoDevFiles", None),
    ],
)
def test_device_0_of_this_process_is_the_first_visible_one(install: Any, visible: str | None, uuid: str | None) -> None:
    install(two(), visible)
    own = own_gpu()
    assert (own.uuid if own else None) == uuid


def test_memory_is_that_of_the_own_gpu(install: Any) -> None:
    for visible in ("1", "GPU-bbbb"):
        install(two(), visible)
        assert own_memory() == (3 * GIB, 24 * GIB)


def test_memory_is_asked_for_and_nothing_that_never_changes(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(two(), "1")
    for name in ("nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlSystemGetDriverVersion"):
        monkeypatch.delattr(Driver, name)
    assert own_memory() == (3 * GIB, 24 * GIB)


@pytest.mark.parametrize("driver", [None, Driver([], broken=True), Driver([])], ids=["no library", "no driver", "none"])
def test_node_without_driver_library_or_gpus_has_none(install: Any, driver: Driver | None) -> None:
    install(driver)
    assert seen_gpus() == ()
    assert own_gpu() is None
    assert own_memory() is None


def test_gpu_that_fell_off_the_bus_is_not_seen_and_the_other_is(install: Any) -> None:
    driver = two()
    driver.fallen.add("GPU-aaaa1111")
    install(driver)
    assert [gpu.uuid for gpu in seen_gpus()] == ["GPU-bbbb2222"]
    assert own_gpu() is None


@pytest.mark.parametrize(("given", "expected"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_cuda_numbers_gpus_as_the_driver_does_unless_the_environment_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_ORDER")
    let_gpus_be_numbered_by_bus()
    assert os.environ["CUDA_DEVICE_ORDER"] == expected
