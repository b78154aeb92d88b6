"""Provokes what may end a process: no memory left for a search, and a lost device. Run by the tests, one at a time.

    python -m tests.gpu.provoke full|lost FOLDER

Prints one JSON object: what was answered before, during and after.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.gpu_device import GpuDevice
from benchmarks.gpu_collection import Made, make
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.gpu.cases import Case, clusters, recall
from tests.gpu.cuda import filled, lose_device

COUNT, ASKED = 200_000, 1_024
HITS = 1_000  # so many that cuVS keeps all distances of its queries, and not only the best: 400 MB, 512 at a time
LEFT_BYTES = 24 << 20  # free while a search must take that


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    device = GpuDevice.open(1.0)
    vectors = clusters("l2", COUNT)
    collection = make(folder, "trouble", vectors, Case("flat", "l2").index, device)
    queries = vectors.queries[np.arange(ASKED) % len(vectors.queries)]
    truth = collection.ids[vectors.truth[np.arange(ASKED) % len(vectors.truth)]]

    def asked() -> dict[str, Any]:
        return told(collection, queries, truth)

    outcome = {"full": _full, "lost": _lost}[what](asked)
    twin = collection.segment.searcher.index
    print(json.dumps(outcome | {"facts": twin.facts(), "device": device.facts()}, default=str), flush=True)


def told(collection: Made, queries: Any, truth: Any) -> dict[str, Any]:
    """One search of all queries: its recall, and where it says that it was answered."""
    groups = (SearchGroup(0, len(queries), HITS, SearchParams()),)
    (hits,) = collection.view.search(ShardSearch(collection.view.generation, queries, groups))
    assert isinstance(hits, Hits), hits
    return {"recall": recall(hits.ids.to_numpy().reshape(-1, HITS), truth), "degraded": hits.degraded}


def _full(asked: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before = asked()
    with filled(LEFT_BYTES) as taken:
        during = asked()
    return {"before": before, "taken": taken, "during": during, "after": asked()}


def _lost(asked: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before, error = asked(), lose_device()
    print(f"the kernel ended with CUDA's error {error}", file=sys.stderr, flush=True)
    return {"before": before, "error": error, "during": asked(), "after": asked()}


if __name__ == "__main__":
    main()
