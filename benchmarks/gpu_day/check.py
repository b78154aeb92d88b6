"""Whether FAISS, cuVS and this node's GPU work together: every kind built, searched and compared once, small.

    python -m benchmarks.gpu_day.check [--double]

Each kind is built twice: what the first time takes longer is mostly the linking of kernels, once for a process. A kind
that fails is told, and the next one tried; the exit code then is 1. With --double a stand-in on the CPU answers, to
try this program.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from actors.gpu_device import GpuDevice
from actors.gpu_index import place_on_gpu
from actors.gpu_probe import seen_gpus
from benchmarks.gpu_collection import KINDS, Made, make
from benchmarks.gpu_figures import node_facts, self_test_figures
from benchmarks.gpu_report import machine, versions
from benchmarks.gpu_sets import GpuSet, K, Shape, make_set
from benchmarks.gpu_ways import hits_of
from cluster.errors import Unavailable
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k

SHAPE, DOUBLES_SHAPE = Shape(30_000, 64, "l2", queries=512), Shape(2_000, 64, "l2", queries=512)
TIMES = 5


def main(double: bool = False, shape: Shape | None = None) -> int:
    """How many kinds failed."""
    print(f"versions: {versions()}; {machine()}")
    for seen in seen_gpus():
        print(f"GPU: {seen}")
    for line in node_facts():  # before what may fail
        print(line, flush=True)
    device = opened(double)
    print(f"device: {device.facts()}", flush=True)
    shape = shape or (DOUBLES_SHAPE if double else SHAPE)
    vectors, failed = make_set("check", shape), 0
    for kind in KINDS:
        for attempt in ("first", "second"):
            try:
                print(f"{kind}, {attempt}: {told(kind, vectors, device)}", flush=True)
            except Exception:  # noqa: BLE001  # whatever it is: the other kinds are tried
                print(f"{kind}, {attempt}: FAILED", flush=True)
                traceback.print_exc()
                failed += 1
                break
    print(f"device: {device.facts()}")
    device.close()
    return failed


def opened(double: bool) -> Any:
    if not double:
        return GpuDevice.open(1.0)
    from tests.gpu_double import double_device

    print("NO GPU: a stand-in on the CPU answers. Nothing here is a GPU's.")
    return double_device()


def told(kind: str, vectors: GpuSet, device: Any) -> str:
    with tempfile.TemporaryDirectory(prefix="eagleray-check-") as folder:
        started = time.perf_counter()
        made = make(Path(folder), "check", vectors, KINDS[kind], device)
        built_s = time.perf_counter() - started
        try:
            return f"{built_s:.1f} s to build, tune and load; {searched(made, vectors, device)}"
        finally:
            made.delete()


def searched(made: Made, vectors: GpuSet, device: Any) -> str:
    """Recall on the GPU and of its twin, the share of kept rows among what is found under a filter, and the bytes."""
    twin, segment = made.segment.twin, made.segment
    assert twin is not None, f"the policy did not choose a GPU: {segment.spec}"
    if twin.gpu is None:
        raise Unavailable(f"not on the GPU: {twin.why}; {placed_by_hand(made, device)}")
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
        f"{kept.holds(filtered[filtered >= 0]).mean():.1%} of the answers; {segment.operating_point.params}; "
        f"{ms_of(made, queries[:1]):.2f} ms a query alone, {ms_of(made, queries):.2f} ms {len(queries)} together; "
        f"{self_test_figures(segment, twin.gpu)}; {twin.facts()}"
    )


def placed_by_hand(made: Made, device: Any) -> str:
    """The figures of an index that was not taken, where it can be placed at all."""
    segment, twin = made.segment, made.segment.twin
    assert twin is not None
    try:
        rows, metric = segment.rows, segment.metric
        gpu = place_on_gpu(device, twin.cpu, segment.spec, rows.dimension, metric, rows)
    except Exception as error:  # noqa: BLE001  # the reason is part of what is told
        return f"it cannot be placed: {type(error).__name__}: {error}"
    try:
        return self_test_figures(segment, gpu)
    finally:
        gpu.close()


def ms_of(made: Made, queries: Any) -> float:
    """Median milliseconds of a search of all of them."""
    times = []
    for _ in range(TIMES):
        started = time.perf_counter()
        made.view.search(made.request(queries))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


if __name__ == "__main__":
    raise SystemExit(1 if main("--double" in sys.argv[1:]) else 0)
