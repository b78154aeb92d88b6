"""Says whether exactly one FAISS is installed, without importing it."""

from __future__ import annotations

from importlib.metadata import distributions

from cluster.errors import Invalid

FAISS_DISTRIBUTIONS = frozenset(
    {"faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"}
)


def check_faiss_installation() -> str:
    """Return the name of the one installed FAISS distribution; raise Invalid when there is none, or several.

    Several overwrite each other's files and fail later in ways that do not name the cause.
    """
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in distributions()}
    return one_faiss(sorted(names & FAISS_DISTRIBUTIONS))


def one_faiss(installed: list[str]) -> str:
    if not installed:
        raise Invalid("FAISS is not installed: pip install 'eagleray[cpu]', or 'eagleray[gpu]' on a GPU node")
    if len(installed) > 1:
        raise Invalid(
            f"{' and '.join(installed)} are both installed and overwrite each other: "
            f"pip uninstall {' '.join(installed)}, then install one of eagleray[cpu] and eagleray[gpu]"
        )
    return installed[0]
