"""What the served endpoint keeps of FAISS's speed, in half a minute.

tests/ray/one_eagleray/test_endpoint_speed.py guards the ratios.

    python -m benchmarks.speed_guard [--record]

Only ratios are compared, FAISS in process and the endpoint measured in turn on the same files, with two threads each
on every machine: what else works there, or more cores than two, takes no more from the endpoint than from FAISS.
--record writes the ratios to benchmarks/recorded_ratios.json; the machine should be quiet then, because FAISS loses
more than the endpoint where it is not.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer

from benchmarks.faiss_base import BATCH, measure_served_files
from benchmarks.served import COLLECTION, import_file, machine, served_eagleray
from cluster.arrow_rows import vectors_view
from serve.bench_plan import Shape
from serve.bench_queries import search_requests
from serve.client import Client
from serve.load import run_closed_loop

RECORDED = Path(__file__).with_name("recorded_ratios.json")
WORDS = Path(__file__).resolve().parents[1] / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
LOADS = {
    "Arrow, single vectors, 64 connections": Shape("arrow", 1, 64),
    f"Arrow, batches of {BATCH}, 2 connections": Shape("arrow", BATCH, 2),
}
PARAMS = {"ef_search": 32}  # given, so that tuning does not change what is compared
LOST_MAX = 0.25
ROUND_S, WARM_UP_S = 0.5, 0.1
QUERIES, SEED = 1_024, 11
THREADS = 2
UP_OPTIONS = ("--shard-threads", str(THREADS))  # of the `eagleray up` that is measured


def import_words(client: Client) -> dict[str, Any]:
    """The collection's description, with a graph of fixed parameters in one shard."""
    return import_file(client, WORDS, "cosine", 1, {"kind": "hnsw", "m": 32})


def measure_ratios(client: Client, data: str, described: dict[str, Any], rounds: int) -> dict[str, float]:
    """Of each load the median over the rounds of its vectors per second over FAISS's in the same round."""
    words = vectors_view(pq.read_table(WORDS)["vector"].combine_chunks()).astype(np.float32)
    pairs = np.random.default_rng(SEED).integers(0, len(words), (QUERIES, 2))
    queries = words[pairs[:, 0]] + words[pairs[:, 1]]
    requests = {
        name: search_requests(client.target, COLLECTION, queries, shape.format, shape.batch, {"k": 10}, PARAMS)
        for name, shape in LOADS.items()
    }
    ratios: dict[str, list[float]] = {name: [] for name in LOADS}
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as faiss_process, spawn.Pool(1) as load_process:
        for _ in range(rounds):
            arguments = (data, described, PARAMS, queries, ROUND_S, THREADS)
            base = faiss_process.apply(measure_served_files, arguments).per_second
            for name, shape in LOADS.items():
                load = (client.target, requests[name], shape.connections, ROUND_S, WARM_UP_S)
                ratios[name].append(load_process.apply(run_closed_loop, load).per_second * shape.batch / base)
    return {name: float(np.median(each)) for name, each in ratios.items()}


def read_recorded() -> dict[str, float]:
    return dict(json.loads(RECORDED.read_text())["ratios"])


def losses(measured: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """What lost more than a quarter of its recorded ratio, in words."""
    return [
        f"{name}: {measured[name]:.3f} of FAISS in process, recorded {ratio:.3f}"
        for name, ratio in recorded.items()
        if measured[name] < (1.0 - LOST_MAX) * ratio
    ]


def main(
    record: Annotated[bool, typer.Option("--record", help=f"Write them to {RECORDED.name}.")] = False,
    rounds: int = 9,
) -> None:
    with served_eagleray(*UP_OPTIONS) as served:
        ratios = measure_ratios(served.client, served.data, import_words(served.client), rounds)
    if record:
        told = {
            "machine": machine(),
            "rounds": rounds,
            "ratios": {name: round(each, 4) for name, each in ratios.items()},
        }
        RECORDED.write_text(json.dumps(told, indent=2) + "\n")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} of FAISS in process")


if __name__ == "__main__":
    typer.run(main)
