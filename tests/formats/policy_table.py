"""Writes what the policy chooses over a grid: `python -m tests.formats.policy_table`, after a change of the policy.

The file beside it pins the choices (tests/unit/cluster/test_index_policy.py): a change of it shows in review.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import choose

FILE = Path(__file__).resolve().parent / "policy_table.txt"
COUNTS = (0, 1_000, 20_000, 200_000, 1_000_000, 5_000_000, 20_000_000)
DIMENSIONS = (3, 96, 384, 1_536)
TARGETS = (0.95, 1.0)
BYTES_PER_FLOAT = (None, 4.0, 2.0, 1.0, 0.25)  # of memory_bytes
GPU_COUNTS = (1_000, 20_000, 200_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000)
GPU_DIMENSIONS = (96, 384, 1_536)
GPU_BYTES = (None, 4 * 10**9, 16 * 10**9, 80 * 10**9)  # of what a replica may use there
FACTS = ("gpu_bytes", "gpu_builds")  # not of the config


def questions() -> Iterator[dict[str, Any]]:
    """Counts, dimensions, targets and memory in full; each of the other inputs on part of them."""
    for count, dimension, target, share in product(COUNTS, DIMENSIONS, TARGETS, BYTES_PER_FLOAT):
        memory = None if share is None else max(1, int(share * count * dimension))
        yield question(count, dimension, target_recall=target, memory_bytes=memory)
    for count, dimension in product(COUNTS[2:5], (96, 384)):
        for metric in ("l2", "ip"):
            yield question(count, dimension, metric=metric)
        for share in (None, 2.0, 1.0):
            memory = None if share is None else int(share * count * dimension)
            yield question(count, dimension, vector_dtype="float16", memory_bytes=memory)
        for seconds in (5.0, 60.0, 600.0):
            yield question(count, dimension, build_seconds=seconds)
        for churn in (0.3, 0.5):
            yield question(count, dimension, churn=churn)
    yield from questions_of_gpus()


def questions_of_gpus() -> Iterator[dict[str, Any]]:
    """The same for GPUs: what fits, what is wanted, and what becomes of the rest."""
    for count, dimension, target, size in product(GPU_COUNTS, GPU_DIMENSIONS, TARGETS, GPU_BYTES):
        yield question(count, dimension, device="gpu", target_recall=target, gpu_bytes=size)
    for count, dimension, size in product(GPU_COUNTS[1:-1], (96, 1_536), GPU_BYTES[1:3]):
        for device in ("auto", "gpu"):
            yield question(count, dimension, device=device, gpu_full="refuse", gpu_bytes=size)
            yield question(count, dimension, device=device, metric="ip", gpu_bytes=size)
            yield question(count, dimension, device=device, vector_dtype="float16", gpu_bytes=size)
            yield question(count, dimension, device=device, gpu_bytes=size)
        for churn in (0.3, 0.5):
            yield question(count, dimension, device="gpu", churn=churn, gpu_bytes=size)
        yield question(count, dimension, device="gpu", gpu_builds=False, gpu_bytes=size)
        for kind in ("flat", "cagra", "ivf_flat", "ivf_pq"):
            yield question(count, dimension, device="gpu", kind=kind, gpu_bytes=size)


def question(count: int, dimension: int, **given: Any) -> dict[str, Any]:
    return {"count": count, "dimension": dimension} | {name: v for name, v in given.items() if v is not None}


def answer(asked: dict[str, Any]) -> str:
    """The choice in a few words, or the field that is too tight."""
    basics = {name: asked[name] for name in ("dimension", "metric", "vector_dtype") if name in asked}
    index = {name: value for name, value in asked.items() if name not in {"count", *basics, *FACTS}}
    gpu = GpuFacts(asked.get("gpu_bytes"), builds=asked.get("gpu_builds", True)) if "device" in asked else None
    try:
        spec = choose(asked["count"], CollectionConfig(**basics, index=IndexConfig(**index)), gpu)
    except Invalid as error:
        return f"refused: {error.errors[0].field}"
    params = "".join(f" {name}={value}" for name, value in spec.params.items())
    on = " on=gpu" if spec.device == "gpu" else ""
    return f"{spec.kind}{params} codes={spec.codes} store={spec.rerank_store}{on}"


def lines() -> list[str]:
    return [" ".join(f"{n}={v}" for n, v in asked.items()) + " -> " + answer(asked) for asked in questions()]


def main() -> None:
    FILE.write_text("\n".join(lines()) + "\n")


if __name__ == "__main__":
    main()
