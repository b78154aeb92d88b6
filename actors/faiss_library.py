"""What comes before FAISS is imported: that exactly one is installed, how its threads wait, how GPUs are numbered."""

from __future__ import annotations

import os
from importlib.metadata import distributions

from cluster.errors import Invalid

FAISS_DISTRIBUTIONS = frozenset(
    {"faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"}
)


def check_faiss_installation() -> str:
    """Return the name of the one installed FAISS distribution; raise Invalid when there is none, or several.

    Several overwrite each other's files and fail later in ways that do not name the cause. Looked up by name: to read
    what all that is installed says of itself took 40 ms of every process's start.
    """
    return one_faiss([name for name in sorted(FAISS_DISTRIBUTIONS) if any(True for _ in distributions(name=name))])


def let_threads_sleep() -> None:
    """FAISS's threads sleep between calls unless the environment says otherwise; before FAISS is loaded.

    By default they spin for milliseconds after each call, on cores that the rest of the process and the endpoint need
    (docs/decisions/0006-speed.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def let_gpus_be_numbered_by_bus() -> None:
    """CUDA numbers GPUs as the driver does, and so Ray, unless the environment says otherwise; before CUDA is started.

    By default it has the fastest first: on a node with different ones a process would ask the driver about another
    GPU than the one it works on.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def gpus_are_supported() -> bool:
    """Whether the installed FAISS has cuVS, as only one of them does."""
    return check_faiss_installation() == "faiss-gpu-cuvs"


def one_faiss(installed: list[str]) -> str:
    if not installed:
        raise Invalid("FAISS is not installed: pip install 'eagleray[cpu]', or 'eagleray[gpu]' on a GPU node")
    if len(installed) > 1:
        raise Invalid(
            f"{' and '.join(installed)} are both installed and overwrite each other: "
            f"pip uninstall {' '.join(installed)}, then install one of eagleray[cpu] and eagleray[gpu]"
        )
    return installed[0]
