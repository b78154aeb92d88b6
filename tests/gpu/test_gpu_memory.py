"""What indexes take of a GPU's memory: predicted beside measured, and given back when nothing needs them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from actors.faiss_index import use_threads
from actors.gpu_index import GpuIndex, build_on_gpu, place_on_gpu
from benchmarks.gpu_collection import KINDS, facts_of, make, write_segment_rows
from benchmarks.gpu_sets import GpuSet, Shape, cores, made
from cluster.config import CollectionConfig
from cluster.gpu_memory import BATCH_MAX, RERANKED, SIZED_K, gpu_need
from cluster.index_policy import choose
from cluster.index_spec import ITOPK_MAX, IndexSpec
from cluster.segment import Rows, rows_per_batch
from tests.gpu.cases import CASES, clusters, sized

COUNT, DIMENSION = sized(400_000), 128
SLACK_BYTES = 64 << 20  # CUDA gives memory by 2 MiB, and libraries keep some for the next call
OVER, UNDER = 1.25, 0.5  # measured, in predicted bytes
SEARCHES, LOOK_S = 3, 0.0005
T = TypeVar("T")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    use_threads(cores())
    folder, shape = tmp_path_factory.mktemp("rows"), Shape(COUNT, DIMENSION, "l2")
    config = CollectionConfig(DIMENSION, "l2")
    path = write_segment_rows(folder, config, made(COUNT, shape, 1), np.arange(COUNT))
    return Rows(path, COUNT, DIMENSION, rows_per_batch(config))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_loaded_index_are_about_as_predicted(device: Any, rows: Rows, kind: str) -> None:
    index = KINDS[kind]
    spec = choose(COUNT, CollectionConfig(DIMENSION, "l2", index=index), facts_of(device, index))
    assert spec.kind == kind.split()[0], spec
    (cpu, built), building = most_taken(device, lambda: build_on_gpu(device, spec, DIMENSION, "l2", rows, seed=7))
    built.close()
    device.run(lambda resources: None)  # after which it is closed
    placed = place_on_gpu(device, cpu, spec, DIMENSION, "l2", rows)
    predicted, measured = placed.predicted_bytes, placed.measured_bytes
    need = gpu_need(spec, COUNT, DIMENSION)
    _, searched = most_taken(device, lambda: largest_search(placed, spec, rows))
    placed.close()
    assert predicted > 0
    assert measured is not None, "the driver tells how much is free"
    print(
        f"{kind} of {COUNT} x {DIMENSION}: predicted {predicted:,} bytes, measured {measured:,}; a search: predicted "
        f"{need.search:,}, seen {searched:,}; the build, with kernels: predicted {need.build:,}, seen {building:,}"
    )
    assert UNDER * predicted - SLACK_BYTES <= measured <= OVER * predicted + SLACK_BYTES
    assert searched <= OVER * need.search + SLACK_BYTES


def largest_search(placed: GpuIndex, spec: IndexSpec, rows: Rows) -> None:
    """What `gpu_need` reckons with."""
    reranked = RERANKED if spec.kind == "ivf_pq" else 1
    k = ITOPK_MAX if spec.kind == "cagra" else SIZED_K * reranked
    knobs = {"cagra": {"itopk_size": ITOPK_MAX}, "flat": {}}.get(spec.kind, {"nprobe": spec.params.get("nlist", 1)})
    queries = rows.vectors(0, min(BATCH_MAX, COUNT))
    for _ in range(SEARCHES):
        labels, _ = placed.search(queries, k, dict(knobs))
        assert labels.shape == (len(queries), min(k, COUNT))


def most_taken(device: Any, work: Callable[[], T]) -> tuple[T, int]:
    """What comes of it, and how many bytes of the device were seen taken meanwhile, by asking its driver."""
    before, least, done = device.free_bytes(), [device.free_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            least[0] = min(least[0], device.free_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        made = work()
    finally:
        done.set()
        looking.join()
    return made, int(before - least[0])


def test_memory_of_what_is_dropped_is_given_back(device: Any, tmp_path: Path) -> None:
    """By the numbers that are kept here, and by the driver's."""
    count = sized(200_000)
    vectors = GpuSet("wide", "l2", made(count, Shape(count, 256, "l2"), 1), clusters("l2").queries, None)
    used, free = device.facts()["used_bytes"], device.free_bytes()
    collection = make(tmp_path, "gone", vectors, CASES[1].index, device)
    taken_bytes = count * 256 * 4
    assert device.facts()["used_bytes"] >= used + taken_bytes
    assert device.free_bytes() <= free - taken_bytes + SLACK_BYTES
    collection.delete()
    del collection
    gc.collect()
    device.run(lambda resources: None)
    assert device.facts()["used_bytes"] == used
    assert device.free_bytes() >= free - SLACK_BYTES
