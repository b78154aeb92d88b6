"""CUDA by hand, to fill a GPU's memory and to lose a device. Only for processes that may die of it.

The functions are those of CUDA's driver API (`libcuda.so.1`), by `ctypes`: the driver is there wherever a GPU is, and
one for all, while the runtime that FAISS uses may be any copy, or linked into it. Filled and lost is the primary
context of device 0, the one that every runtime in the process works in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

FIRST_BYTES, LAST_BYTES = 1 << 30, 1 << 20  # of one allocation: half of the last one once that is refused

# Arguments as in cuda.h; names as the library exports them: what changed since CUDA 2 ends in `_v2`, and a name without
# an ending keeps its first meaning for ever. A CUdeviceptr is an integer of 64 bits, a context or a module a pointer.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuModuleLoadDataEx": (POINTER(c_void_p), c_char_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES = 5, 6  # of CUjit_option: where the compiler writes, and how much it may
LOG_BYTES = 4_096

# A kernel that ends with a trap, which every later call in the process then tells of. The driver compiles it for the
# GPU that there is: PTX for 7.5 runs on that and every newer one.
TRAP = b""".version 7.0
.target sm_75
.address_size 64
.visible .entry trap_now()
{
    trap;
    ret;
}
\0"""


class Driver:
    """CUDA's driver; `library` is it, or what takes its place. Functions raise OSError with CUDA's name of an error."""

    def __init__(self, library: Any = None) -> None:
        library = ctypes.CDLL("libcuda.so.1") if library is None else library
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self.call("cuInit", 0)

    def error(self, name: str, *arguments: Any) -> int:
        """What the function returns: 0, or an error."""
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        if error := self.error(name, *arguments):
            raise OSError(f"{name} failed: {self.name_of(error)}")

    def name_of(self, error: int) -> str:
        found = c_char_p()
        known = self._functions["cuGetErrorName"](error, byref(found)) == 0 and found.value
        return f"{found.value.decode() if known and found.value else 'CUDA error'} ({error})"

    @contextmanager
    def context(self) -> Iterator[None]:
        """The primary context of device 0 is this thread's meanwhile."""
        device, context, before = c_int(), c_void_p(), c_void_p()
        self.call("cuDeviceGet", byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            self.call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self.error("cuCtxPopCurrent_v2", byref(before))  # of a lost device nothing works
        finally:
            self.error("cuDevicePrimaryCtxRelease_v2", device)

    def free_bytes(self) -> int:
        """Of the device whose context is this thread's."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value


@contextmanager
def filled(left_bytes: int, driver: Driver | None = None) -> Iterator[dict[str, int]]:
    """Take device memory until about `left_bytes` are free, for the time of the context; gives what was taken and left.

    With nothing left over, a little is: of less than `LAST_BYTES` in one piece nobody asks.
    """
    driver, taken, total = driver or Driver(), [], 0
    try:
        with driver.context():
            size = FIRST_BYTES
            while size >= LAST_BYTES:
                size = min(size, max(0, driver.free_bytes() - left_bytes))
                pointer = c_uint64()
                if size >= LAST_BYTES and driver.error("cuMemAlloc_v2", byref(pointer), size) == 0:
                    taken.append(pointer.value)
                    total += size
                else:
                    size //= 2
            left = driver.free_bytes()
        yield {"taken": total, "left": left}
    finally:
        with driver.context():
            for address in taken:
                driver.call("cuMemFree_v2", address)


def lose_device(driver: Driver | None = None) -> str:
    """End the primary context of device 0 by a kernel that traps; gives the driver's name of the error."""
    driver = driver or Driver()
    module, function = c_void_p(), c_void_p()
    with driver.context():
        _load(driver, module)
        driver.call("cuModuleGetFunction", byref(function), module, b"trap_now")
        launched = driver.error("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
        error = launched or driver.error("cuCtxSynchronize")
        return driver.name_of(error) if error else ""


def _load(driver: Driver, module: c_void_p) -> None:
    """OSError with what the compiler says."""
    log = ctypes.create_string_buffer(LOG_BYTES)
    options = (c_int * 2)(JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES)
    values = (c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)  # a number goes in the place of a pointer
    error = driver.error("cuModuleLoadDataEx", byref(module), TRAP, 2, options, values)
    if error:
        raise OSError(f"cuModuleLoadDataEx failed: {driver.name_of(error)}: {log.value.decode(errors='replace')}")
