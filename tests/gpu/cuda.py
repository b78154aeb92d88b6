"""CUDA by hand, to fill a GPU's memory and to lose a device. Only for processes that may die of it.

The functions are those of CUDA's runtime and driver libraries, by `ctypes`. Filled and lost is the context that FAISS
has in the same process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

FIRST_BYTES, LAST_BYTES = 1 << 30, 1 << 20  # of one allocation: half of the last one once that is refused

# A kernel that ends with a trap, which every call in the process then tells of.
TRAP = b""".version 7.0
.target sm_75
.address_size 64
.visible .entry trap_now()
{
    trap;
    ret;
}
\0"""


def runtime() -> Any:
    """The CUDA runtime that FAISS has loaded into this process, not another one of the system."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
    if not mapped:
        raise OSError("no CUDA runtime is loaded: FAISS must be imported, and built for GPUs")
    return ctypes.CDLL(sorted(mapped)[0])


@contextmanager
def filled(left_bytes: int) -> Iterator[int]:
    """Take device memory until about `left_bytes` are free, for the time of the context; gives what was taken."""
    cuda, taken, total, size = runtime(), [], 0, FIRST_BYTES
    try:
        while size >= LAST_BYTES:
            free, whole, pointer = c_size_t(), c_size_t(), c_void_p()
            _ok(cuda.cudaMemGetInfo(byref(free), byref(whole)), "cudaMemGetInfo")
            size = min(size, max(0, free.value - left_bytes))
            if size >= LAST_BYTES and cuda.cudaMalloc(byref(pointer), c_size_t(size)) == 0:
                taken.append(pointer)
                total += size
            else:
                cuda.cudaGetLastError()  # the refusal must not be taken for an error of who comes next
                size //= 2
        yield total
    finally:
        for pointer in taken:
            _ok(cuda.cudaFree(pointer), "cudaFree")


def lose_device() -> int:
    """End the context of device 0 by a kernel that traps; returns the driver's error for it."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, module, function = c_void_p(), c_void_p(), c_void_p()
    device = c_int()
    _ok(driver.cuInit(0), "cuInit")
    _ok(driver.cuDeviceGet(byref(device), 0), "cuDeviceGet")
    _ok(driver.cuDevicePrimaryCtxRetain(byref(context), device), "cuDevicePrimaryCtxRetain")
    _ok(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _ok(driver.cuModuleLoadData(byref(module), TRAP), "cuModuleLoadData")
    _ok(driver.cuModuleGetFunction(byref(function), module, b"trap_now"), "cuModuleGetFunction")
    one, none = c_uint(1), c_uint(0)
    launched = driver.cuLaunchKernel(function, one, one, one, one, one, one, none, c_void_p(), c_void_p(), c_void_p())
    return int(launched or driver.cuCtxSynchronize())


def _ok(error: int, call: str) -> None:
    if error:
        raise OSError(f"{call} failed with CUDA's error {error}")
