"""Which GPUs a node has and how much of their memory is free, by NVML: it needs no context on the device.

A node without NVIDIA's driver, or without `nvidia-ml-py`, has no GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SeenGpu:
    """One GPU, or one part of a GPU that was split (MIG), as its driver tells."""

    name: str
    total_bytes: int
    free_bytes: int
    uuid: str
    driver: str


def seen_gpus() -> tuple[SeenGpu, ...]:
    """All GPUs of this node in the order of the bus, whatever of them this process may use."""
    nvml = _nvml()
    return () if nvml is None else _seen(nvml)


def own_gpu() -> SeenGpu | None:
    """Device 0 of this process: the first that `CUDA_VISIBLE_DEVICES` names, which Ray sets; None where there is none.

    Without the variable that is the node's first one.
    """
    nvml = _nvml()
    return None if nvml is None else _named(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"), _seen_gpu)


def own_memory() -> tuple[int, int] | None:
    """(free, total) bytes of device 0 of this process; None where nobody can tell. Nothing else is asked of it."""
    nvml = _nvml()
    return None if nvml is None else _named(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"), _memory)


@cache
def _nvml() -> Any:
    """NVIDIA's library, started; None without it. Found once: a driver does not come and go under a process."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _seen(nvml: Any) -> tuple[SeenGpu, ...]:
    """A GPU that does not answer (it fell off the bus) is left out."""
    numbers = range(nvml.nvmlDeviceGetCount())
    found = [_first(nvml, nvml.nvmlDeviceGetHandleByIndex, number, _seen_gpu) for number in numbers]
    return tuple(gpu for gpu in found if gpu is not None)


def _named(nvml: Any, visible: str | None, ask: Callable[[Any, Any], T]) -> T | None:
    """What `ask` tells of the GPU that CUDA takes as its first, by index, UUID or the beginning of one.

    CUDA stops at the first name that it does not know: `-1`, or nothing, hides all.
    """
    name = "0" if visible is None else visible.split(",")[0].strip()
    if name.isdecimal():
        return _first(nvml, nvml.nvmlDeviceGetHandleByIndex, int(name), ask)
    if not name.startswith(("GPU-", "MIG-")):
        return None
    exact = _first(nvml, nvml.nvmlDeviceGetHandleByUUID, name, ask)
    if exact is not None:
        return exact
    uuid = next((gpu.uuid for gpu in _seen(nvml) if gpu.uuid.startswith(name)), None)
    return None if uuid is None else _first(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid, ask)


def _first(nvml: Any, handle_of: Any, key: int | str, ask: Callable[[Any, Any], T]) -> T | None:
    """What `ask(nvml, handle)` tells of one device; None where NVML knows none, or cannot reach it."""
    try:
        return ask(nvml, handle_of(key))
    except nvml.NVMLError:
        return None


def _seen_gpu(nvml: Any, handle: Any) -> SeenGpu:
    free, total = _memory(nvml, handle)
    return SeenGpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=total,
        free_bytes=free,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(free, total) bytes."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.free), int(memory.total)


def _text(told: str | bytes) -> str:
    """Older versions of the library give bytes."""
    return told.decode() if isinstance(told, bytes) else told
