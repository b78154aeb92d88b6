"""The memory model against what a loaded index takes: predicted and measured resident bytes of every kind.

python -m benchmarks.index_memory                     # all kinds, 50,000 and 200,000 points, 96, 384, 768 dimensions
python -m benchmarks.index_memory --count 50000 --dimension 96 ivf_pq hnsw
"""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from actors.faiss_index import library_facts, use_threads
from tests.recall.index_memory import CASES, Measured, measure, vectors

COUNTS, DIMENSIONS = (50_000, 200_000), (96, 384, 768)
LINE = "{:<20} {:>8} {:>5} {:>9} {:>9} {:>9} {:>9} {:>6}"
MIB = 1 << 20


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help="Beginnings of names; none: all.")] = None,
    count: Annotated[list[int], typer.Option(help="Points.")] = list(COUNTS),  # noqa: B006
    dimension: Annotated[list[int], typer.Option(help="Dimensions.")] = list(DIMENSIONS),  # noqa: B006
    threads: Annotated[int, typer.Option(help="FAISS threads of the builds.")] = 2,
) -> None:
    """Print a table in MiB; anonymous and file are the parts of the measured bytes."""
    use_threads(threads)
    print(f"{library_facts()}, {platform.machine()}")
    print(LINE.format("index", "points", "d", "predicted", "measured", "anonymous", "file", "ratio"))
    ratios = []
    for points in count:
        for d in dimension:
            stored = vectors(points, d)
            for case in (name for name in CASES if not kinds or name.startswith(tuple(kinds))):
                measured = measure(case, stored)
                ratios.append(measured.ratio)
                print(line_of(case, points, d, measured), flush=True)
    print(f"{len(ratios)} indexes; predicted / measured from {min(ratios):.3f} to {max(ratios):.3f}")


def line_of(case: str, count: int, dimension: int, measured: Measured) -> str:
    sizes = (measured.predicted, measured.resident, measured.anonymous, measured.file)
    return LINE.format(case, count, dimension, *(f"{size / MIB:.2f}" for size in sizes), f"{measured.ratio:.3f}")


if __name__ == "__main__":
    typer.run(main)
