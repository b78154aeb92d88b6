from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from actors import gpu_device
from actors.gpu_device import GpuDevice, GpuLost, GpuMemoryFull, IndexClosed, device_error
from actors.gpu_probe import SeenGpu
from cluster.errors import Unavailable
from cluster.gpu_memory import PROCESS_BYTES, TEMP_BYTES
from tests.gpu_double import FULL, LOST, GpuDouble, double_device

GIB = 1 << 30


class Thing:
    """An object on the GPU that takes memory and must be used and destroyed where it was made."""

    def __init__(self, library: GpuDouble, size: int = 0) -> None:
        library.enter()
        library.take(size, "Thing")
        self.library, self.size = library, size

    def __del__(self) -> None:
        self.library.gone(self.size, "Thing")


def test_work_runs_in_one_thread_that_is_not_the_callers() -> None:
    device = double_device()
    with ThreadPoolExecutor(8) as pool:
        threads = set(pool.map(lambda _: device.run(lambda resources: threading.get_ident()), range(100)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_calls_never_overlap() -> None:
    device, inside, most = double_device(), [0], [0]

    def work(resources: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: device.run(work), range(40)))
    assert most == [1]


def test_device_is_busy_while_a_call_runs_or_waits() -> None:
    device, began, go = double_device(), threading.Event(), threading.Event()

    def work(resources: Any) -> None:
        began.set()
        assert go.wait(20)

    assert not device.busy
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(device.run, work)
        assert began.wait(20)
        assert device.busy
        go.set()
        running.result(20)
    assert not device.busy
    with pytest.raises(KeyError):
        device.run(lambda resources: {}["nothing"])
    assert not device.busy


def test_work_that_asks_for_work_is_not_stuck() -> None:
    device = double_device()
    assert device.run(lambda resources: device.run(lambda again: again is resources))


def test_memory_of_faiss_itself_is_set_before_the_first_use_and_taken_at_once() -> None:
    device = double_device(4 * GIB)
    assert device.library.memory() == (4 * GIB - TEMP_BYTES, 4 * GIB)


def test_device_without_room_for_its_temporary_memory_is_refused_with_the_reason() -> None:
    with pytest.raises(Unavailable, match=r"double cannot be used: .*out of memory"):
        double_device(TEMP_BYTES // 2)


FULL_ERRORS = [
    FULL.format(what="IVFLists", size=1 << 40),
    "failed to cudaHostAlloc 67108864 bytes for CPU <-> GPU async copy buffer (error 2 out of memory)",
    "C++ exception std::bad_alloc: out_of_memory: CUDA error (failed to allocate 8 bytes): cudaErrorMemoryAllocation",
    "C++ exception Maximum pool size exceeded (failed to allocate 3 GiB): std::bad_alloc",
    "C++ exception CUDA error encountered at: Reason=cudaErrorMemoryAllocation:out of memory",
    "C++ exception RAFT failure: Attempted to search without a dataset. Please call index.update_dataset(...) first.",
    "C++ exception cuBLAS error encountered at: call='cublasCreate', Reason=3:CUBLAS_STATUS_ALLOC_FAILED",
]
LOST_ERRORS = [
    LOST,
    "StandardGpuResources: alloc fail (cudaMalloc error an illegal memory access was encountered [700])",
    "C++ exception CUDA error at: /rmm/cuda_stream_view.hpp: cudaErrorAssert device-side assert triggered",
    "C++ exception parallel_for failed: cudaErrorLaunchFailure: unspecified launch failure",
    "CUDA-capable device(s) is/are busy or unavailable",
    "uncorrectable ECC error encountered",
    "no CUDA-capable device is detected",
    "Error: 'config_.device < getNumDevices()' failed: Invalid GPU device 0",
]
OTHER_ERRORS = [
    "Error: 'nprobe' failed: GPU IVF index only supports nprobe selection up to 16384 (requested 20000)",
    "C++ exception RAFT failure: topk = 100 must be smaller than itopk_size = 64",
    "Inconsistent numeric type for train and search",
]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, GpuMemoryFull) for text in FULL_ERRORS),
        *((text, GpuLost) for text in LOST_ERRORS),
        *((text, RuntimeError) for text in OTHER_ERRORS),
    ],
)
def test_class_of_an_error_is_told_by_its_text(text: str, kind: type[Exception]) -> None:
    told = device_error(RuntimeError(text))
    assert type(told) is kind
    assert str(told) == text.strip()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("std::bad_alloc"), GpuMemoryFull),  # what becomes of rmm::out_of_memory
        (MemoryError(), GpuMemoryFull),
        (ValueError("out of memory, but not of FAISS"), ValueError),
        (IndexClosed("no CUDA error"), IndexClosed),
        (GpuLost("CUDA error: out of memory"), GpuLost),
    ],
)
def test_class_of_an_error_is_told_by_its_class(error: Exception, kind: type[Exception]) -> None:
    assert type(device_error(error)) is kind


def test_memory_that_is_full_for_once_leaves_the_device_as_it_is() -> None:
    device = double_device()
    device.library.run_out_of_memory()
    with pytest.raises(GpuMemoryFull, match="bad_alloc"):
        device.run(lambda resources: device.library.enter())
    assert device.lost == ""
    assert device.run(lambda resources: "works") == "works"


def test_lost_device_refuses_all_that_comes_with_the_first_reason() -> None:
    device = double_device()
    device.library.lose()
    for _ in range(2):
        with pytest.raises(GpuLost, match="illegal memory access"):
            device.run(lambda resources: device.library.enter())
    with pytest.raises(GpuLost, match="illegal memory access"):
        device.run(lambda resources: "not even this")
    assert "illegal memory access" in device.lost
    assert device.facts()["lost"] == device.lost


def test_calls_that_waited_while_the_device_was_lost_are_not_made() -> None:
    device, gate, made = double_device(), threading.Event(), []

    def losing(resources: Any) -> None:
        gate.wait(10)
        raise RuntimeError(LOST)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(device.run, losing)
        waiting = [pool.submit(device.run, lambda resources: made.append(1)) for _ in range(3)]
        gate.set()
        for call in (first, *waiting):
            with pytest.raises(GpuLost):
                call.result(10)
    assert made == []


def test_other_errors_reach_the_caller_as_they_are() -> None:
    device = double_device()
    with pytest.raises(ZeroDivisionError):
        device.run(lambda resources: 1 // 0)
    assert device.lost == ""


def test_kept_object_counts_is_measured_and_gives_its_memory_back_when_closed() -> None:
    device = double_device(4 * GIB)
    left, free = device.left_bytes(), device.free_bytes()
    held = device.keep(lambda resources: Thing(device.library, GIB), GIB)
    assert held.measured_bytes == GIB
    assert (device.left_bytes(), device.free_bytes()) == (left - GIB, free - GIB)
    assert device.facts()["used_bytes"] == PROCESS_BYTES + GIB
    held.close()
    assert (device.left_bytes(), device.free_bytes()) == (left, free)
    held.close()
    assert device.free_bytes() == free
    with pytest.raises(IndexClosed):
        held.use(lambda thing: thing)
    assert device.lost == ""
    device.library.check()


def test_kept_object_that_is_forgotten_is_destroyed_in_the_thread_of_the_device() -> None:
    device = double_device(4 * GIB)
    free = device.free_bytes()
    device.keep(lambda resources: Thing(device.library, GIB), GIB)
    gc.collect()
    device.run(lambda resources: None)  # comes after it
    assert device.free_bytes() == free
    device.library.check()


def test_object_that_was_half_made_when_an_error_came_is_destroyed_in_the_thread() -> None:
    device = double_device(4 * GIB)
    free = device.free_bytes()

    def make(resources: Any) -> Any:
        thing = Thing(device.library, GIB)
        try:
            raise RuntimeError("the first")
        except RuntimeError:
            assert thing.size  # kept by the frames of both errors
            raise RuntimeError(FULL.format(what="CAGRA", size=1)) from None

    with pytest.raises(GpuMemoryFull) as caught:
        device.keep(make, GIB)
    assert device.free_bytes() == free
    del caught
    gc.collect()
    device.library.check()


def test_error_that_is_passed_on_as_it_is_keeps_nothing_of_the_gpu() -> None:
    device = double_device(4 * GIB)
    free = device.free_bytes()

    def make(resources: Any) -> Any:
        thing = Thing(device.library, GIB)
        try:
            raise ValueError("the first")
        except ValueError:
            raise KeyError(thing.size)  # noqa: B904 - the first one is its context

    with pytest.raises(KeyError) as caught:
        device.keep(make, GIB)
    assert device.free_bytes() == free
    del caught
    gc.collect()
    device.library.check()


class Large:
    """An argument or an answer that somebody waits to see freed."""


def test_thread_keeps_nothing_of_a_call_that_is_over() -> None:
    device, argument = double_device(), Large()
    references = [weakref.ref(argument), weakref.ref(device.run(lambda resources, large=argument: Large()))]
    del argument
    deadline = time.monotonic() + 5
    while any(reference() is not None for reference in references) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [reference() for reference in references] == [None, None]


def test_nothing_is_destroyed_on_a_lost_device() -> None:
    device = double_device(4 * GIB)
    library = device.library
    held = device.keep(lambda resources: Thing(library, GIB), GIB)
    forgotten = device.keep(lambda resources: Thing(library, GIB), GIB)

    def lose(resources: Any) -> None:
        thing = Thing(library, 1)
        library.lose()
        library.enter()
        assert thing

    with pytest.raises(GpuLost):
        device.run(lose)
    held.close()
    del forgotten
    device.close()
    del held, device
    gc.collect()
    library.check()
    assert library.taken_bytes > 2 * GIB


def test_share_bounds_what_is_left_and_so_does_what_others_took() -> None:
    device = double_device(8 * GIB, share=0.5)
    assert device.left_bytes() == 4 * GIB - PROCESS_BYTES
    held = device.keep(lambda resources: Thing(device.library, GIB), GIB)
    assert device.left_bytes() == 3 * GIB - PROCESS_BYTES
    device.library.taken_by_others(6 * GIB)
    assert device.left_bytes() == device.free_bytes() == GIB - TEMP_BYTES
    held.close()


def test_nothing_is_told_of_memory_where_nobody_can() -> None:
    device = GpuDevice(GpuDouble(GIB), lambda: None)
    held = device.keep(lambda resources: Thing(device.library, 8), 8)
    assert held.measured_bytes is None
    assert device.left_bytes() is None
    assert device.free_bytes() is None
    assert device.facts()["total_bytes"] is None
    held.close()


def test_closed_device_destroys_all_in_its_thread_and_refuses_calls() -> None:
    device = double_device(4 * GIB)
    held = device.keep(lambda resources: Thing(device.library, GIB), GIB)
    device.close()
    device.close()
    assert device.library.memory() == (4 * GIB, 4 * GIB)
    with pytest.raises(Unavailable, match="closed"):
        device.run(lambda resources: None)
    held.close()
    device.library.check()


def test_call_is_refused_where_the_collector_closes_the_device_as_it_is_put(monkeypatch: pytest.MonkeyPatch) -> None:
    device, told = double_device(), []
    owner, calls = device._owner, device._owner._calls

    class Collecting:
        get, empty = calls.get, calls.empty

        def put(self, call: Any) -> None:
            if call is not None:
                owner.close()
            calls.put(call)

    def call() -> None:
        with pytest.raises(Unavailable, match="the GPU was closed"):
            device.run(lambda resources: None)
        told.append(True)

    monkeypatch.setattr(owner, "_calls", Collecting())
    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(5)
    assert told == [True]


def test_device_that_is_forgotten_ends_its_thread() -> None:
    device = double_device(4 * GIB)
    library, thread = device.library, device._owner._thread
    del device
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    assert library.memory() == (4 * GIB, 4 * GIB)


# --- the GPU that Ray gave --------------------------------------------------------------------------------------------


def test_open_with_a_faiss_for_cpus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_device.faiss, "get_compile_options", lambda: "OPTIMIZE AVX2 GPU")
    with pytest.raises(Unavailable, match=r"install eagleray\[gpu\]"):
        GpuDevice.open(1.0)


def test_open_without_a_gpu_never_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    library = GpuDouble(GIB)
    library.get_num_gpus = lambda: pytest.fail("it may end the process")  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_device, "faiss", library)
    monkeypatch.setattr(gpu_device, "own_gpu", lambda: None)
    with pytest.raises(Unavailable, match="this process sees no GPU"):
        GpuDevice.open(1.0)


def test_open_where_cuda_finds_none_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    library = GpuDouble(GIB)
    library.get_num_gpus = lambda: 0  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_device, "faiss", library)
    monkeypatch.setattr(gpu_device, "own_gpu", lambda: SeenGpu("L40S", GIB, GIB, "GPU-1", "470.1"))
    with pytest.raises(Unavailable, match=r"there is L40S: is driver 470\.1 too old"):
        GpuDevice.open(1.0)


def test_open_takes_the_gpu_that_the_driver_names(monkeypatch: pytest.MonkeyPatch) -> None:
    library = GpuDouble(4 * GIB)
    library.get_num_gpus = lambda: 1  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_device, "faiss", library)
    monkeypatch.setattr(gpu_device, "own_gpu", lambda: SeenGpu("L40S", 4 * GIB, GIB, "GPU-1", "580.1"))
    monkeypatch.setattr(gpu_device, "own_memory", lambda: (GIB, 4 * GIB))
    device = GpuDevice.open(0.5)
    assert device.facts() == {
        "name": "L40S",
        "total_bytes": 4 * GIB,
        "free_bytes": GIB,
        "used_bytes": PROCESS_BYTES,
        "share": 0.5,
        "lost": "",
    }
    device.close()
