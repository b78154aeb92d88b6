"""The GPU of this process, and the one thread that makes every call on it.

FAISS's GPU indexes are not safe for threads even when they are only read, and cuVS 26.06 has a race between streams on
the data set of a graph (cuvs issue 2237). So a process has one `GpuDevice`: device 0 of what Ray gave it, one
`StandardGpuResources`, and a thread in which indexes are made, searched and destroyed. They never leave it: callers
hold a number (`OnDevice`). The objects of a lost device are never destroyed, as that would end the process.

Some errors of CUDA end the process at once, where FAISS asserts that there is none; then Ray starts the replica again.
"""

from __future__ import annotations

import ctypes
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

import actors.faiss_index  # noqa: F401 - says how FAISS's threads wait, before it is loaded
from actors.gpu_probe import own_gpu, own_memory
from cluster.errors import Unavailable
from cluster.gpu_memory import PROCESS_BYTES, TEMP_BYTES

# isort: split
import faiss

PINNED_BYTES = 64 << 20  # of host memory that copies of many queries go through; by default FAISS takes 256 MiB
CLOSE_WAIT_S = 10.0
T = TypeVar("T")

# Texts of errors, in lower case. FAISS: gpu/StandardGpuResources.cpp, gpu/utils/DeviceUtils.h. RMM: rmm/error.hpp; its
# `out_of_memory` is a `std::bad_alloc`, which comes to Python as a MemoryError. RAFT: raft/util/cudart_utils.hpp.
FULL_TEXTS = (
    "out of memory",  # cudaGetErrorString, in each of them
    "cudaerrormemoryallocation",
    "bad_alloc",
    "out_of_memory",
    "cublas_status_alloc_failed",
    "maximum pool size exceeded",
    "exceeded memory limit",
    "without a dataset",  # cuVS attaches no data set where there is no room for it, and says so at the first search
)
# Of errors after which every call in the process fails (CUDA runtime API, `cudaError`), and what RAFT, RMM and Thrust
# say of any error of CUDA: whether that one would go away cannot be asked without ending the process.
LOST_TEXTS = (
    "cuda error",
    "cudaerror",
    "cudamalloc error",
    "cudahostalloc",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "device-side assert",
    "launch failure",
    "launch timed out",
    "launch failed",
    "ecc error",
    "nvlink error",
    "device(s) is/are busy or unavailable",
    "no cuda-capable device",
    "invalid device ordinal",
    "invalid gpu device",
    "gpu is lost",
    "fallen off the bus",
    "context is destroyed",
    "driver shutting down",
    "driver version is insufficient",
    "cublas_status",
    "cublas error",
    "cusolver error",
)


class GpuMemoryFull(Exception):
    """The GPU has no room for this now; it goes on working."""


class GpuRefused(GpuMemoryFull):
    """It is predicted not to fit: nothing was tried."""


class GpuLost(Exception):
    """Nothing works on the GPU any more in this process."""


class IndexClosed(Exception):
    """The index was taken from the GPU while a search was on its way to it; the GPU works."""


class OnDevice:
    """An object of FAISS that lives in the thread of a device: made, used and destroyed there.

    `measured_bytes` is how much less of the device was free after it was made, whoever took it; None where nobody can
    tell.
    """

    def __init__(self, owner: _Owner, number: int, measured_bytes: int | None) -> None:
        self.measured_bytes = measured_bytes
        self._owner = owner
        self._number = number
        self._dropped = weakref.finalize(self, owner.tell, lambda _: owner.drop(number))
        self._dropped.atexit = False  # the thread ends then, with all that it keeps

    def use(self, work: Callable[[Any], T]) -> T:
        """`work(object)` in the thread; errors as of `GpuDevice.run`, IndexClosed. `work` must not keep the object."""
        return self._owner.call(lambda _: work(self._owner.kept(self._number)))

    def close(self) -> None:
        """Destroy it: its memory is free afterwards. That of a lost device is not. Again: nothing."""
        if self._dropped.detach() is not None:
            with suppress(GpuLost, Unavailable):  # then nothing can be freed, or all is
                self._owner.call(lambda _: self._owner.drop(self._number))


class GpuDevice:
    """Device 0 of this process.

    `library` is FAISS. `memory` tells (free, total) bytes of the device, None where nobody can; `share` is the part of
    it that this process may take.
    """

    def __init__(
        self, library: Any, memory: Callable[[], tuple[int, int] | None], share: float = 1.0, name: str = ""
    ) -> None:
        self.library = library
        self.name = name
        self._memory = memory
        self._share = share
        self._numbers = count(1)
        self._owner = _Owner(library)
        self._end = weakref.finalize(self, self._owner.close)
        try:
            self.run(lambda resources: resources.syncDefaultStreamCurrentDevice())  # takes all that they take at once
        except (GpuMemoryFull, GpuLost, RuntimeError) as error:
            self._end()
            raise Unavailable(f"{name or 'the GPU'} cannot be used: {error}") from None

    @classmethod
    def open(cls, share: float) -> GpuDevice:
        """The GPU that Ray gave this process; Unavailable, with the reason, where it has none."""
        if "NVIDIA_CUVS" not in faiss.get_compile_options():
            raise Unavailable("this FAISS knows no cuVS: on this node install eagleray[gpu] instead of eagleray[cpu]")
        own = own_gpu()  # before FAISS is asked: with a driver that is too old that ends the process
        if own is None:
            raise Unavailable("this process sees no GPU: its driver tells of none, or Ray gave it none")
        if faiss.get_num_gpus() == 0:
            raise Unavailable(f"CUDA finds no device, though there is {own.name}: is driver {own.driver} too old?")
        return cls(faiss, own_memory, share, own.name)

    @property
    def lost(self) -> str:
        """Why nothing works on it any more; "" while it works."""
        return self._owner.lost

    def run(self, work: Callable[[Any], T]) -> T:
        """`work(resources)` in the device's thread, after what was asked before. What it makes there must stay there.

        GpuMemoryFull and GpuLost by the text of an error of FAISS; other errors as they are. Unavailable once closed.
        """
        return self._owner.call(work)

    def keep(self, make: Callable[[Any], Any], bytes_taken: int, search_bytes: int = 0) -> OnDevice:
        """What `make(resources)` makes. It counts as `bytes_taken` of this process's share until it is closed.

        `search_bytes` are what a search of it takes for as long as it runs.
        """
        number = next(self._numbers)

        def made(resources: Any) -> int | None:
            before = self.free_bytes()
            self._owner.put(number, make(resources), bytes_taken, search_bytes)
            after = self.free_bytes()
            return None if before is None or after is None else max(0, before - after)

        return OnDevice(self._owner, number, self._owner.call(made))

    def free_bytes(self) -> int | None:
        """What no process has taken of the device; None where nobody can tell."""
        told = self._memory()
        return None if told is None else told[0]

    def left_bytes(self) -> int | None:
        """What this process may still take: of its share, and of what is free. None where nobody can tell."""
        told = self._memory()
        if told is None:
            return None
        free, total = told
        return max(0, min(free, int(self._share * total) - self.used_bytes))

    @property
    def used_bytes(self) -> int:
        """What this process is reckoned to have taken: by prediction, as nobody tells it of each process."""
        return PROCESS_BYTES + self._owner.taken_bytes

    @property
    def search_bytes(self) -> int:
        """What the largest search takes of all that is kept, of which one runs at a time."""
        return self._owner.search_bytes

    @property
    def busy(self) -> bool:
        """Whether a call would wait for another one."""
        return self._owner.busy

    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of the device; None where nobody can tell. A driver may take seconds to answer."""
        return self._memory()

    def facts(self) -> dict[str, Any]:
        """Asks the driver, as `memory` does."""
        return self.facts_with(self.memory())

    def facts_with(self, memory: tuple[int, int] | None) -> dict[str, Any]:
        """For status; bytes of the device are None where nobody can tell."""
        free, total = memory or (None, None)
        return {
            "name": self.name,
            "total_bytes": total,
            "free_bytes": free,
            "used_bytes": self.used_bytes,
            "share": self._share,
            "lost": self.lost,
        }

    def close(self) -> None:
        """Destroy what is on the device, and end its thread; calls are then refused."""
        self._end()


class _Owner:
    """The thread, and all that lives in it. Only it touches what it keeps."""

    def __init__(self, library: Any) -> None:
        self.lost = ""
        self._library = library
        self._resources: Any = None
        self._calls: SimpleQueue[tuple[Callable[[Any], Any], Future[Any] | None] | None] = SimpleQueue()
        self._kept: dict[int, tuple[Any, int, int]] = {}
        self._working = False
        self._closed = False
        self._closing = threading.RLock()  # the garbage collector may close, wherever it is called
        self._thread = threading.Thread(target=self._serve, name="gpu", daemon=True)
        self._thread.start()

    @property
    def taken_bytes(self) -> int:
        return sum(taken for _, taken, _ in list(self._kept.values()))

    @property
    def search_bytes(self) -> int:
        return max((searching for _, _, searching in list(self._kept.values())), default=0)

    @property
    def busy(self) -> bool:
        return self._working or not self._calls.empty()

    def put(self, number: int, made: Any, bytes_taken: int, search_bytes: int) -> None:
        self._kept[number] = made, bytes_taken, search_bytes

    def kept(self, number: int) -> Any:
        if number not in self._kept:
            raise IndexClosed("the index was taken from the GPU")
        return self._kept[number][0]

    def drop(self, number: int) -> None:
        gone = self._kept.pop(number, None)
        if self.lost:
            _never_destroyed(gone)

    def call(self, work: Callable[[Any], T]) -> T:
        if threading.current_thread() is self._thread:
            return work(self._resources)
        coming: Future[T] = Future()
        with self._closing:
            if self.lost:
                raise GpuLost(self.lost)
            if not self._closed:
                self._calls.put((work, coming))
            if self._closed:  # before, or by the collector as this was put: then behind the end of the queue
                raise Unavailable("the GPU was closed: this process is ending")
        return coming.result()

    def tell(self, work: Callable[[Any], Any]) -> None:
        """`call` that nobody waits for."""
        self._calls.put((work, None))

    def close(self) -> None:
        with self._closing:
            self._closed = True
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_WAIT_S)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            work, coming = call
            self._working = True
            try:
                answer = self._answer(work, coming)
            except Exception as error:  # noqa: BLE001 - of whatever class: it is the caller's
                self._working = False
                self._failed(error, coming)
            else:
                self._working = False
                if coming is not None:
                    coming.set_result(answer)
                del answer
            del call, work, coming  # what they refer to may be destroyed only here
        if self.lost:
            _never_destroyed(self._kept.copy())
            _never_destroyed(self._resources)
        self._kept.clear()  # before what its memory was taken from
        self._resources = None

    def _answer(self, work: Callable[[Any], T], coming: Future[T] | None) -> T:
        if self.lost and coming is not None:
            raise GpuLost(self.lost)  # while it waited in the queue
        if self._resources is None:
            self._resources = _resources(self._library)
        return work(self._resources)

    def _failed(self, error: Exception, coming: Future[Any] | None) -> None:
        """An error refers to the frames that it came through, and they to indexes: it leaves without them."""
        told = device_error(error)
        if isinstance(told, GpuLost) and not self.lost:
            self.lost = str(told)
        if self.lost:
            _never_destroyed(error)
            told = GpuLost(self.lost)
        passed: BaseException | None = error
        while passed is not None and not self.lost:
            traceback.clear_frames(passed.__traceback__)
            passed = passed.__context__
        if coming is not None:
            coming.set_exception(told)


def _never_destroyed(thing: Any) -> None:
    """One reference more than anybody gives up: to free memory of a lost device ends the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _resources(library: Any) -> Any:
    """What FAISS takes of a device for itself is said before the first use; by default it is 1.5 GiB, and 256 MiB."""
    resources = library.StandardGpuResources()
    resources.setTempMemory(TEMP_BYTES)
    resources.setPinnedMemory(PINNED_BYTES)
    return resources


def device_error(error: Exception) -> Exception:
    """GpuMemoryFull or GpuLost where the text of an error says so, else the error itself."""
    if isinstance(error, GpuMemoryFull | GpuLost | IndexClosed):
        return error
    text = str(error)
    if isinstance(error, MemoryError):
        return GpuMemoryFull(f"out of memory: {text or 'MemoryError'}")
    if not isinstance(error, RuntimeError):
        return error
    low = text.lower()
    if any(part in low for part in FULL_TEXTS):
        return GpuMemoryFull(text.strip())
    if any(part in low for part in LOST_TEXTS):
        return GpuLost(text.strip())
    return error
