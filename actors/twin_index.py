"""An index on a GPU and the same on the CPU: the GPU answers, and where it cannot, its twin does.

The CPU's index is the file that the GPU's was copied from, mapped: it takes memory only while it is searched.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from actors.degradation import note_cpu_answer
from actors.faiss_index import FaissIndex, Vectors, check_knobs
from actors.faiss_index import Rows as Labels
from actors.gpu_device import GpuLost, GpuMemoryFull, IndexClosed
from actors.gpu_index import GpuIndex
from cluster.errors import Invalid, Unavailable
from cluster.row_selection import RowSelection

RETRY_AFTER_S = 1.0
logger = logging.getLogger(__name__)


class TwinIndex:
    """`SearchableIndex` of a segment that a GPU serves.

    `gpu` is None where there is none there, `why` then says why: the twin answers, and each answer counts as degraded
    (`actors.degradation`). Without `cpu_twin` such searches are Unavailable, as those of a replica that is away.
    """

    def __init__(self, cpu: FaissIndex, gpu: GpuIndex | None, why: str = "", cpu_twin: bool = True) -> None:
        self.cpu = cpu
        self.gpu = gpu
        self.why = why if gpu is None else ""
        self.cpu_twin = cpu_twin
        self.count = cpu.count
        self.lists = cpu.lists
        self._kind = cpu.kind
        graph = cpu.kind == "cagra"
        self.knobs = ("itopk_size", "search_width", *cpu.knobs) if graph else cpu.knobs
        self._out_of_memory = 0
        self._told = False
        self._lock = threading.Lock()

    def check(self, params: dict[str, float]) -> None:
        """Invalid, by name, where a parameter is not one of `knobs`."""
        check_knobs(params, self.knobs, self._kind)

    def takes(self, k: int, params: dict[str, float]) -> bool:
        """Whether such a search is answered: its twin has no limits."""
        gpu = self.gpu
        return self.cpu_twin or gpu is None or gpu.takes(k, params)

    def search(
        self, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Labels, Vectors]:
        """As `FaissIndex.search`. What is over a limit of the GPU's kind is answered by the twin, and no failure.

        Without a twin: Invalid, naming the limit; Unavailable where the GPU cannot answer.
        """
        self.check(params)
        gpu = self.gpu
        if gpu is None:
            return self._degraded(self.why, queries, k, params, selection)
        if (over := gpu.over_limit(k, params)) is not None:
            if not self.cpu_twin:
                raise Invalid.at(over.field, f"{over.message}, and there is no twin (index.cpu_twin): ask for less")
            return self.cpu.search(queries, k, params, selection)
        try:
            return gpu.search(queries, k, params, selection)
        except GpuMemoryFull as error:
            with self._lock:
                self._out_of_memory += 1
            why = f"the GPU is out of memory: {error}"
        except GpuLost as error:
            why = f"the GPU is lost: {error}"
            self._demote_from(gpu, why)
        except IndexClosed as error:
            why = self.why or str(error)
        except RuntimeError as error:  # what FAISS says of a search that it does not do: the GPU may do the next one
            why = f"FAISS refuses the search on the GPU: {error}"
            self._tell_once(why)
        return self._degraded(why, queries, k, params, selection)

    def promote(self, gpu: GpuIndex) -> None:
        """From now on the GPU answers."""
        with self._lock:
            self.gpu, self.why = gpu, ""

    def demote(self, why: str) -> None:
        """From now on the twin answers; the memory on the GPU is given back."""
        gpu = self.gpu
        if gpu is not None:
            self._demote_from(gpu, why)
        else:
            self.why = why

    def save(self, path: Path) -> None:
        """The file that both are made from."""
        self.cpu.save(path)

    def close(self) -> None:
        """Give the GPU's memory back, as nobody will search again."""
        self.demote("it is no longer served")

    def facts(self) -> dict[str, Any]:
        """For status. `degraded` is why the twin answers all searches, "" where it does not."""
        gpu = self.gpu
        return {
            "gpu_predicted_bytes": gpu.predicted_bytes if gpu else None,
            "gpu_measured_bytes": gpu.measured_bytes if gpu else None,
            "out_of_memory": self._out_of_memory,
            "degraded": self.why,
        }

    def _demote_from(self, gpu: GpuIndex, why: str) -> None:
        """Several searches may find it lost at once."""
        with self._lock:
            if self.gpu is gpu:
                self.gpu, self.why = None, why
        gpu.close()

    def _tell_once(self, why: str) -> None:
        """In the log, at the first one: such a search was thought to be within the limits."""
        with self._lock:
            first, self._told = not self._told, True
        if first:
            logger.error("%s of %d points is answered by its twin: %s", self._kind, self.count, why)

    def _degraded(
        self, why: str, queries: Vectors, k: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        if not self.cpu_twin:
            raise Unavailable(f"no GPU answers, and there is no twin (index.cpu_twin): {why}", RETRY_AFTER_S)
        note_cpu_answer()
        return self.cpu.search(queries, k, params, selection)
