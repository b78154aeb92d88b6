"""Whether FAISS, cuVS and this node's GPU work together: every kind built, searched and compared once, small.

    python -m benchmarks.gpu_day.check

Each kind is built twice: what the first time takes longer is mostly the linking of kernels, once for a process. A kind
that fails is told, and the next one tried; the exit code then is 1.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from actors.gpu_device import GpuDevice
from actors.gpu_probe import seen_gpus
from benchmarks.gpu_collection import KINDS, Made, make
from benchmarks.gpu_report import versions
from benchmarks.gpu_sets import GpuSet, K, Shape, make_set
from benchmarks.gpu_ways import hits_of
from cluster.errors import Unavailable
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k

SHAPE = Shape(30_000, 64, "l2", queries=512)


def main(shape: Shape = SHAPE) -> int:
    """How many kinds failed."""
    print(f"versions: {versions()}")
    for seen in seen_gpus():
        print(f"GPU: {seen}")
    device = GpuDevice.open(1.0)
    print(f"device: {device.facts()}")
    vectors, failed = make_set("check", shape), 0
    for kind in KINDS:
        for attempt in ("first", "second"):
            try:
                print(f"{kind}, {attempt}: {told(kind, vectors, device)}", flush=True)
            except Exception:  # noqa: BLE001  # whatever it is: the other kinds are tried
                traceback.print_exc()
                failed += 1
                break
    print(f"device: {device.facts()}")
    device.close()
    return failed


def told(kind: str, vectors: GpuSet, device: Any) -> str:
    with tempfile.TemporaryDirectory(prefix="eagleray-check-") as folder:
        started = time.perf_counter()
        made = make(Path(folder), "check", vectors, KINDS[kind], device)
        built_s = time.perf_counter() - started
        try:
            return f"{built_s:.1f} s to build, tune and load; {searched(made, vectors)}"
        finally:
            made.delete()


def searched(made: Made, vectors: GpuSet) -> str:
    """Recall on the GPU and of its twin, the share of kept rows among what is found under a filter, and the bytes."""
    twin, segment = made.segment.twin, made.segment
    assert twin is not None, "the policy did not choose a GPU"
    if twin.gpu is None:
        raise Unavailable(f"not on the GPU: {twin.why}")
    queries, truth = vectors.queries[: len(vectors.truth)], vectors.truth
    (hits,) = made.view.search(made.request(queries))
    reached = float(recall_at_k(hits_of((hits,)), made.ids[truth]).mean())
    kept = RowSelection.of(np.arange(segment.rows.count) % 10 == 0)
    point = {name: value for name, value in segment.operating_point.params.items() if name != "rerank"}
    labels = twin.gpu.search(queries, K, point, kept)[0]
    on_host = twin.cpu.search(queries, K, {name: point[name] for name in point if name in twin.cpu.knobs})[0]
    filtered, _ = segment.search(queries, K, SearchParams(), kept)
    return (
        f"recall {reached:.4f}, its twin's candidates {float(recall_at_k(on_host, truth).mean()):.4f}, a tenth kept: "
        f"{(labels >= 0).mean():.1%} of places filled, kept {kept.holds(labels[labels >= 0]).mean():.1%} of them and "
        f"{kept.holds(filtered[filtered >= 0]).mean():.1%} of the answers; {twin.facts()}"
    )


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
