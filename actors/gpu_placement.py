"""Brings the indexes of loaded segments into GPU memory, and gives it back."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from actors.gpu_device import GpuDevice, GpuLost, GpuMemoryFull, GpuRefused
from actors.gpu_index import GpuIndex, place_on_gpu
from actors.loaded_segment import LoadedSegment
from actors.segment_searcher import SegmentSearcher
from actors.self_test import problem_on_gpu
from actors.twin_index import TwinIndex
from cluster.errors import Unavailable

NO_GPU = "this process has no GPU"  # of an index that was never placed
PAUSE_MAX = 31  # promotions, each 10 s: about five minutes
logger = logging.getLogger(__name__)


class GpuPlacement:
    """What of a shard's segments is on the GPU of this process. For one thread, the one that loads.

    `device` None: it has none, and `no_gpu` is why, where it should have one.
    What was refused for another reason than want of memory is not tried again. What the GPU had no room for although
    that was predicted is tried more and more seldom: each time it is copied, while searches wait.
    """

    def __init__(self, device: GpuDevice | None, no_gpu: str = "") -> None:
        self._device = device
        self._absent = f"{NO_GPU}: {no_gpu}" if no_gpu else NO_GPU
        self._known: list[LoadedSegment] = []  # those that are for GPUs, as long as a view may have them
        self._refused: set[str] = set()
        self._surprises: dict[str, int] = {}  # by segment id: how often that was
        self._pauses: dict[str, int] = {}  # promotions that it sits out

    def place(self, segment: LoadedSegment) -> None:
        """Have the GPU answer for a segment that was loaded for one; where it cannot, its twin says why.

        Unavailable, with the reason, where it has no twin that may answer.
        """
        twin = segment.twin
        if twin is None:
            return
        self._known.append(segment)
        self._try(segment)
        if twin.gpu is None and not twin.cpu_twin:
            self._known.remove(segment)
            raise Unavailable(f"segment {segment.description.segment_id}: {twin.why}; its cpu_twin is turned off", 5.0)

    def promote(self, in_use: Iterable[LoadedSegment]) -> list[str]:
        """Try again to place what could not be; which segments the GPU answers from now on.

        Those in use, the ones that matter most first. What is not in use is given back before.
        """
        wanted = list(in_use)
        self.keep_only(wanted)
        if self._device is None or self._device.lost:
            return []
        waiting = [one for one in wanted if (twin := one.twin) is not None and twin.gpu is None]
        for segment in waiting:
            if self._is_due(segment.description.segment_id):
                self._try(segment)
        return [
            one.description.segment_id for one in waiting if (twin := one.twin) is not None and twin.gpu is not None
        ]

    def _is_due(self, segment_id: str) -> bool:
        pause = self._pauses.get(segment_id, 0)
        self._pauses[segment_id] = max(0, pause - 1)
        return pause == 0 and segment_id not in self._refused

    def keep_only(self, in_use: Iterable[LoadedSegment]) -> None:
        """Give back the GPU memory of all other segments; searches that are still at one of these ask its twin."""
        kept = {id(segment) for segment in in_use}
        for segment in self._known:
            twin = segment.twin
            if id(segment) not in kept and twin is not None and twin.gpu is not None:
                twin.demote("its generation is no longer served")
        self._known = [segment for segment in self._known if id(segment) in kept]
        known = {segment.description.segment_id for segment in self._known}
        self._refused &= known
        self._surprises = {name: times for name, times in self._surprises.items() if name in known}
        self._pauses = {name: pause for name, pause in self._pauses.items() if name in known}

    def _try(self, segment: LoadedSegment) -> None:
        twin, device = segment.twin, self._device
        if twin is None:
            return
        if device is None:
            twin.demote(self._absent)
            return
        gpu: GpuIndex | None = None
        try:
            gpu = place_on_gpu(device, twin.cpu, segment.spec, segment.rows.dimension, segment.metric, segment.rows)
            why = self._problem(segment, twin, gpu)
            hopeless = bool(why)
        except (GpuMemoryFull, GpuLost) as error:
            why, hopeless = str(error), False
            if not isinstance(error, GpuRefused):
                self._sit_out(segment.description.segment_id)
        except RuntimeError as error:  # whatever FAISS has against it: its twin has not
            why, hopeless = f"FAISS refuses it: {error}", True
        segment.rows.forget_pages()
        if gpu is not None and not why:
            twin.promote(gpu)
            return
        if hopeless:
            self._refused.add(segment.description.segment_id)
        if twin.why != why:  # told once, not every time that it is tried again
            logger.warning("segment %s is not on the GPU: %s", segment.description.segment_id, why)
        if gpu is not None:
            gpu.close()
        twin.demote(why)

    def _sit_out(self, segment_id: str) -> None:
        times = self._surprises[segment_id] = self._surprises.get(segment_id, 0) + 1
        self._pauses[segment_id] = min(PAUSE_MAX, (1 << (times - 1)) - 1)

    def _problem(self, segment: LoadedSegment, twin: TwinIndex, gpu: GpuIndex) -> str:
        """What its self-test finds; "" where nothing is wrong."""
        searcher = SegmentSearcher(gpu, segment.spec, segment.rows, segment.metric)
        test, params = segment.description.self_test, segment.operating_point.params
        problem = problem_on_gpu(searcher, twin.cpu, segment.spec, segment.metric, test, params)
        return f"its self-test failed: {problem}" if problem else ""
