"""Memory that was freed and that allocators keep for later: given back to the system between phases of large jobs."""

from __future__ import annotations

import ctypes
import platform

import pyarrow as pa

M_MMAP_THRESHOLD = -3  # of mallopt(3)
LARGE_BYTES = 4 * 1024 * 1024


def give_back_memory() -> None:
    """Give back what Arrow's and the C library's allocators keep. Takes milliseconds: not for every request.

    From then on large blocks are given back when they are freed. By itself the C library raises its bound for that up
    to 32 MiB, and a thread's memory below it can't be given back at all.
    """
    pa.default_memory_pool().release_unused()
    if platform.libc_ver()[0] == "glibc":  # others have no such calls
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        library.malloc_trim(0)
