"""Provokes what may end a process: no memory left for a search, and a lost device. Run by the tests, one at a time.

    python -m tests.gpu.provoke full|lost KIND FOLDER

Prints one JSON object: what was answered before, during and after, and by whom. What happens meanwhile goes to the
standard error output, so that a process that dies has told how far it came.

`full` leaves `LEFT_BYTES` free while each search, by the source of cuVS, must allocate several times as much:
flat: with so many hits all distances of a batch are kept, 512 queries x 200,000 points x 4 bytes (`chooseTileSize`).
ivf_flat, ivf_pq: likewise where all lists are probed and k is over what a list's scan keeps (256 and 128).
cagra: in one piece of global memory a hash table of the nodes that each query visited, 128 Ki entries of 4 bytes, where
the candidates and the neighbours that are looked at in one step are too many for the small one in shared memory:
512 + 64 x 64 > 4,096 (`calc_hashmap_params`), with at least twice as many queries as the GPU has multiprocessors.
All of that comes from RMM's current resource, which by default keeps nothing from one search to the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from actors.faiss_index import use_threads
from benchmarks.gpu_collection import Made, make
from benchmarks.gpu_sets import cores
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.gpu.cases import Case, clusters, recall, sized, twin_of
from tests.gpu.cuda import filled, lose_device
from tests.gpu.stand_in import DOUBLE, open_device

COUNTS = {"full": sized(200_000), "lost": sized(40_000)}
ASKED = max(64, sized(1_024))  # queries, 512 at a time
LEFT_BYTES = sized(24 << 20)
GRAPH_DEGREE, ITOPK, WIDTH = 64, 512, 64
RERANK = 8.0


@dataclass(frozen=True)
class Ask:
    """How a kind is searched: hits of each query, and parameters."""

    hits: int
    params: SearchParams


def ask_of(collection: Made) -> Ask:
    """Within the limits of the kind: what is over them is not asked of the GPU at all."""
    spec = collection.segment.spec
    if spec.kind == "cagra":
        return Ask(100, SearchParams(itopk_size=ITOPK, search_width=WIDTH))
    if spec.kind == "flat":
        return Ask(1_000, SearchParams())
    return Ask(1_000, SearchParams(nprobe=spec.params["nlist"], rerank=RERANK if spec.kind == "ivf_pq" else None))


def main() -> None:
    what, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    say(f"{what}, {kind}: {COUNTS[what]} points")
    use_threads(cores())
    device = open_device()
    vectors, index = clusters("l2", COUNTS[what]), Case(kind, "l2").index
    index = replace(index, graph_degree=GRAPH_DEGREE) if index.kind == "cagra" else index
    collection = make(folder, "trouble", vectors, index, device)
    ask, twin = ask_of(collection), twin_of(collection)
    say(f"on the GPU: {collection.segment.spec}; {twin.facts()}; asked for {ask}")
    queries = vectors.queries[np.arange(ASKED) % len(vectors.queries)]
    truth = collection.ids[vectors.truth[np.arange(ASKED) % len(vectors.truth)]]

    def asked(when: str) -> dict[str, Any]:
        answer = told(collection, ask, queries, truth)
        say(f"{when}: {answer}")
        return answer

    outcome = {"full": _full, "lost": _lost}[what](asked, device)
    print(json.dumps(outcome | {"facts": twin.facts(), "device": device.facts()}, default=str), flush=True)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def told(collection: Made, ask: Ask, queries: Any, truth: Any) -> dict[str, Any]:
    """One search of all queries: its recall, and where it says that it was answered.

    `refused`: how many searches found no memory, in all; `over`: what of the search the kind does not take on a GPU, ""
    where it takes all.
    """
    groups = (SearchGroup(0, len(queries), ask.hits, ask.params),)
    started = time.perf_counter()
    (hits,) = collection.view.search(ShardSearch(collection.view.generation, queries, groups))
    took_s = time.perf_counter() - started
    assert isinstance(hits, Hits), hits
    index: Any = collection.segment.searcher.index
    candidates = ceil((ask.hits + 1) * max(collection.segment.spec.rerank, ask.params.rerank or 0.0))  # one for ties
    over = None if index.gpu is None else index.gpu.over_limit(candidates, ask.params.given)
    return {
        "recall": recall(first_ids(hits), truth),
        "degraded": hits.degraded,
        "refused": index.facts()["out_of_memory"],
        "over": "" if over is None else f"{over.field}: {over.message}",
        "seconds": round(took_s, 3),
    }


def first_ids(hits: Hits) -> Any:
    """(queries, 10), -1 where there are fewer."""
    counts = np.asarray(hits.counts)
    starts, found = np.cumsum(counts) - counts, np.append(hits.ids.to_numpy(), -1)
    places = np.arange(10)[None, :]
    return found[np.where(places < counts[:, None], starts[:, None] + places, -1)]


def _full(asked: Callable[[str], dict[str, Any]], device: Any) -> dict[str, Any]:
    before = asked("before")
    with _filled(device) as how:
        say(f"filled: {how}")
        during = asked("during")
    return {"before": before, "during": during, "after": asked("after")} | how


@contextmanager
def _filled(device: Any) -> Iterator[dict[str, int]]:
    if not DOUBLE:
        with filled(LEFT_BYTES) as how:
            yield how
        return
    library, taken = device.library, device.library.memory()[0] - LEFT_BYTES
    library.taken_by_others(taken)
    yield {"taken": taken, "left": LEFT_BYTES}
    library.taken_by_others(-taken)


def _lost(asked: Callable[[str], dict[str, Any]], device: Any) -> dict[str, Any]:
    before = asked("before")
    if DOUBLE:
        device.library.lose()
        error = "the stand-in is lost"
    else:
        error = lose_device()
    say(f"the kernel ended with {error or 'no error'}")
    return {"before": before, "error": error, "during": asked("during"), "after": asked("after")}


if __name__ == "__main__":
    main()
