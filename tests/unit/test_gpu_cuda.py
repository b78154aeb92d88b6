"""CUDA by hand (tests.gpu.cuda), on functions of C that stand in for the driver's: what `ctypes` hands them."""

from __future__ import annotations

from ctypes import CFUNCTYPE, c_int
from typing import Any

import pytest

from tests.gpu.cuda import LAST_BYTES, SIGNATURES, TRAP, Driver, filled, lose_device

CONTEXT, MODULE, FUNCTION = 0x7F12_3456_7890, 0x7FFF_0000_1000, 0x7FFF_0000_2000  # pointers of 64 bits
BASE = 0x7_0000_0000_0000  # of device memory
OUT_OF_MEMORY, LAUNCH_FAILED, BAD_PTX = 2, 719, 218
NAMES = {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY", LAUNCH_FAILED: b"CUDA_ERROR_LAUNCH_FAILED"}
PIECE = 1 << 29  # no more is had in one piece


class FakeDriver:
    """A device of so much memory; `calls` is what was asked, `stack` the contexts that are current."""

    def __init__(self, free_bytes: int, ptx_error: int = 0) -> None:
        self.free_bytes = free_bytes
        self.taken: dict[int, int] = {}
        self.stack: list[int] = []
        self.retained = 0
        self.trapped = False
        self._ptx_error = ptx_error
        for name, arguments in SIGNATURES.items():
            work = getattr(self, f"_{name.removesuffix('_v2')}", self._nothing)
            setattr(self, name, CFUNCTYPE(c_int, *arguments)(work))

    def _nothing(self, *given: Any) -> int:
        return 0

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        assert device == 0
        self.retained += 1
        context[0] = CONTEXT
        return 0

    def _cuDevicePrimaryCtxRelease(self, device: int) -> int:
        self.retained -= 1
        return 0

    def _cuCtxPushCurrent(self, context: int) -> int:
        self.stack.append(context)
        return 0

    def _cuCtxPopCurrent(self, context: Any) -> int:
        context[0] = self.stack.pop()
        return 0

    def _cuMemGetInfo(self, free: Any, total: Any) -> int:
        assert self.stack == [CONTEXT]
        free[0], total[0] = self.free_bytes, 1 << 36
        return 0

    def _cuMemAlloc(self, pointer: Any, size: int) -> int:
        assert self.stack == [CONTEXT]
        if size > min(PIECE, self.free_bytes):
            return OUT_OF_MEMORY
        address = BASE + sum(self.taken.values())
        self.taken[address] = size
        self.free_bytes -= size
        pointer[0] = address
        return 0

    def _cuMemFree(self, pointer: int) -> int:
        assert self.stack == [CONTEXT]
        self.free_bytes += self.taken.pop(pointer)
        return 0

    def _cuModuleLoadDataEx(self, module: Any, image: bytes, count: int, options: Any, values: Any) -> int:
        assert image == TRAP.rstrip(b"\0")
        assert [options[at] for at in range(count)] == [5, 6]
        module[0] = MODULE
        return self._ptx_error

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> int:
        assert (module, name) == (MODULE, b"trap_now")
        function[0] = FUNCTION
        return 0

    def _cuLaunchKernel(self, function: int, *given: Any) -> int:
        assert (function, given[:8]) == (FUNCTION, (1, 1, 1, 1, 1, 1, 0, None))
        assert not given[8]
        assert not given[9]
        self.trapped = True
        return 0

    def _cuCtxSynchronize(self) -> int:
        return LAUNCH_FAILED if self.trapped else 0

    def _cuGetErrorName(self, error: int, name: Any) -> int:
        if error not in NAMES:
            return 1
        name[0] = NAMES[error]
        return 0


@pytest.mark.parametrize("left", [24 << 20, 0])
def test_memory_is_taken_until_so_much_is_left_and_given_back(left: int) -> None:
    """In pieces that are had, and by addresses of 64 bits."""
    fake = FakeDriver((5 << 30) + 12_345)
    driver = Driver(fake)
    with filled(left, driver) as how:
        assert left <= fake.free_bytes < left + LAST_BYTES
        assert how == {"taken": (5 << 30) + 12_345 - fake.free_bytes, "left": fake.free_bytes}
        assert min(fake.taken) >= BASE
        assert max(fake.taken.values()) <= PIECE
        assert fake.stack == [], "what searches meanwhile finds the thread as it was"
    assert fake.free_bytes == (5 << 30) + 12_345
    assert (fake.stack, fake.retained) == ([], 0)


def test_memory_is_given_back_where_what_ran_meanwhile_failed() -> None:
    fake = FakeDriver(1 << 30)
    with pytest.raises(ValueError, match="meanwhile"), filled(1 << 20, Driver(fake)):
        raise ValueError("meanwhile")
    assert (fake.free_bytes, fake.taken) == (1 << 30, {})


def test_device_is_lost_by_a_kernel_that_traps() -> None:
    fake = FakeDriver(1 << 30)
    assert lose_device(Driver(fake)) == "CUDA_ERROR_LAUNCH_FAILED (719)"
    assert fake.trapped
    assert (fake.stack, fake.retained) == ([], 0)


def test_errors_have_cudas_name_and_number() -> None:
    assert Driver(FakeDriver(1)).name_of(OUT_OF_MEMORY) == "CUDA_ERROR_OUT_OF_MEMORY (2)"
    with pytest.raises(OSError, match=r"cuModuleLoadDataEx failed: CUDA error \(218\)"):
        lose_device(Driver(FakeDriver(1 << 30, ptx_error=BAD_PTX)))
