"""The GPU of a task that builds or searches what is served on GPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from actors.gpu_device import GpuDevice
from cluster.errors import Unavailable
from cluster.gpu_memory import GpuFacts
from jobs.build_plan import BuildPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskGpus:
    """What a task knows of GPUs: what its plan was made with, and the share of one that it asked Ray for (0: none).

    `needed`: the plan is of a kind that only a GPU builds.
    """

    facts: GpuFacts | None = None
    share: float = 0.0
    needed: bool = False

    @classmethod
    def of(cls, plan: BuildPlan) -> TaskGpus:
        if plan.gpus is None or plan.device == "cpu":
            return cls()
        return cls(plan.gpus.facts, plan.builds.num_gpus, plan.index.spec.kind == "cagra")

    @classmethod
    def for_searches(cls, plan: BuildPlan | None) -> TaskGpus:
        """For what asks an index that is built: without a GPU its twin answers."""
        return cls() if plan is None else replace(cls.of(plan), needed=False)

    @contextmanager
    def device(self) -> Iterator[GpuDevice | None]:
        """The GPU that this process was given, closed afterwards; None where it has none.

        Where the one it should have cannot be used it goes on without, with a warning, if CPUs can build the kind; else
        Unavailable says why.
        """
        device = self._open()
        try:
            yield device
        finally:
            if device is not None:
                device.close()

    def _open(self) -> GpuDevice | None:
        if not self.share:
            return None
        try:
            return GpuDevice.open(self.share)
        except Unavailable as error:
            if self.needed:
                raise Unavailable(f"only a GPU builds a graph for GPUs, and this task has none: {error}") from error
            logger.warning("this task goes on without the GPU that it asked for: %s", error)
            return None


NO_TASK_GPUS = TaskGpus()
