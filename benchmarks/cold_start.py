"""How soon a replica serves after its process starts, and what memory it takes: against reading its bytes once.

    python -m benchmarks.cold_start                          # flat and ivf_flat shards of 300,000 x 384
    python -m benchmarks.cold_start --count 60000 hnsw ivf_pq

Times are medians of rounds in which a plain read of the files and a start take turns; `cold` has the files dropped from
the page cache before each (a cache beneath the system may still hold them). A start is that of a replica's process:
interpreter, imports, then loading: verify, map, self-test. Memory is measured in a start of its own, after 1,000
searches.
"""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from actors.faiss_index import library_facts
from cluster.config import IndexConfig
from tests.recall.replica_process import Started
from tests.recall.replica_start import StoredShard

MIB = 1 << 20
INDEXES = {
    "flat": IndexConfig("flat"),
    "hnsw": IndexConfig("hnsw", target_recall=0.9, ef_construction=40),
    "ivf_flat": IndexConfig("ivf_flat", target_recall=0.9, nlist=256, codes="float32"),
    "ivf_sq8": IndexConfig("ivf_sq8", target_recall=0.9, nlist=256),
    "ivf_pq": IndexConfig("ivf_pq", target_recall=0.9, nlist=256),
    "ivf_pq float16": IndexConfig("ivf_pq", target_recall=0.9, nlist=256, rerank_store="float16"),
}


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(INDEXES)}.")] = None,
    count: Annotated[int, typer.Option(help="Points.")] = 300_000,
    dimension: Annotated[int, typer.Option(help="Dimensions.")] = 384,
    threads: Annotated[int, typer.Option(help="FAISS threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Starts whose times count, warm and cold each.")] = 5,
    remote: Annotated[bool, typer.Option(help="Copy the files as from object storage.")] = False,
) -> None:
    """Print two tables."""
    print(f"{library_facts()}, {platform.machine()}, {count:,} x {dimension}, {'copied' if remote else 'in place'}\n")
    print("| index | MiB | cache | read s | load s | ratio | imports s | ready s |\n|---|---:|---|" + "---:|" * 5)
    sizes = [
        "| index | process MiB | peak | steady | peak / steady | anonymous | index file | rows file "
        "| predicted | predicted / resident |",
        "|---|" + "---:|" * 9,
    ]
    for kind in kinds or ("flat", "ivf_flat"):
        with tempfile.TemporaryDirectory(prefix="eagleray-cold-start-") as folder:
            stored = StoredShard(Path(folder), INDEXES[kind], count, dimension, threads)
            for cold in (False, True):
                print(time_line(kind, stored, cold, rounds, threads, remote), flush=True)
            sizes.append(size_line(kind, stored, stored.start(remote=remote, memory=True, threads=threads)))
    print("\n".join(["", *sizes]))


def time_line(kind: str, stored: StoredShard, cold: bool, rounds: int, threads: int, remote: bool) -> str:
    read_s, starts = [], []
    for _ in range(rounds + 1):  # the first one warms up
        if cold:
            stored.drop_from_page_cache()
        read_s.append(stored.read_seconds())
        if cold:
            stored.drop_from_page_cache()
        starts.append(stored.start(remote=remote, threads=threads))
    read, load, imported, ready = (
        median(read_s[1:]),
        *(median(getattr(start, name) for start in starts[1:]) for name in ("load_s", "imported_s", "ready_s")),
    )
    return (
        f"| {kind} | {stored.size_bytes / MIB:,.0f} | {'cold' if cold else 'warm'} | {read:.3f} | {load:.3f} "
        f"| {load / read:.2f} | {imported:.2f} | {ready:.2f} |"
    )


def size_line(kind: str, stored: StoredShard, started: Started) -> str:
    of_process = (started.base, started.peak, started.steady)
    grown = (started.anonymous, started.index_file, started.rows_file, stored.predicted)
    base, peak, steady = (f"{size / MIB:,.0f}" for size in of_process)
    return (
        f"| {kind} | {base} | {peak} | {steady} | {started.peak / started.steady:.2f} | "
        + " | ".join(f"{size / MIB:,.1f}" for size in grown)
        + f" | {stored.predicted / started.resident:.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
