"""Eagleray beside what a user would take instead, on this machine, in one run, on the same vectors.

    python -m benchmarks.peers [--rounds 3] [--seconds 2] [--without-chroma]

Chroma's server and a plain Ray Serve deployment around FAISS, each at its cheapest setting that reaches the recall.
Chroma's package is installed into a temporary environment of its own. Every round measures all of them in turn at each
load; the tables show medians over the rounds, and ratios to Eagleray with JSON.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.faiss_base import BATCH, build_by_hand, measure_by_hand
from benchmarks.peer_servers import Peer, chroma_peers, eagleray_peers, install_chroma, ray_serve_peers
from benchmarks.served import cheapest_params, import_file, index_text, machine, served_eagleray
from benchmarks.vector_sets import MADE, K, VectorSet, read_vectors
from serve.load import LoadReport, in_child, run_closed_loop

LOADS = ((1, 1), (8, 1), (64, 1), (1, BATCH))  # connections, vectors per request
WARM_UP_S = 0.5


@dataclass
class Measured:
    """A peer's recall, and by load its rounds."""

    peer: Peer
    recall: float
    loads: dict[tuple[int, int], list[LoadReport]] = field(default_factory=lambda: {load: [] for load in LOADS})

    def vectors_per_s(self, load: tuple[int, int]) -> float:
        return float(np.median([each.per_second for each in self.loads[load]])) * load[1]

    def percentile_ms(self, load: tuple[int, int], percent: float) -> float:
        return float(np.median([each.percentile_ms(percent) for each in self.loads[load]]))

    def failures(self, load: tuple[int, int]) -> int:
        return sum(sum(each.failures.values()) + each.unanswered for each in self.loads[load])


def main(
    vectors: Annotated[str, typer.Option(help=f"Made in code: {' or '.join(MADE)}.")] = "images",
    data: Annotated[Path | None, typer.Option(help="Parquet with id and vector columns.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Parquet with vector and exact_ids columns.")] = None,
    metric: Annotated[str, typer.Option(help="Of those files: l2, cosine or ip.")] = "l2",
    target_recall: Annotated[float, typer.Option(help="Recall@10 that each must reach.")] = 0.98,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each load in a round.")] = 2.0,
    chroma: Annotated[Path | None, typer.Option(help="Program of a Chroma that is installed.")] = None,
    without_chroma: bool = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    if (data is None) != (queries is None) or vectors not in MADE:
        raise SystemExit(f"give both --data and --queries or neither, and --vectors of {', '.join(MADE)}")
    with tempfile.TemporaryDirectory(prefix="eagleray-peers-") as name:
        folder = Path(name)
        program = None if without_chroma else chroma or install_chroma(folder / "chroma-environment")
        chosen = read_vectors(data, queries, metric) if data and queries else MADE[vectors](folder)
        index = folder / "by_hand.faiss"
        ef_search = in_child(build_by_hand, chosen, target_recall, index)
        faiss_rates = []
        with all_peers(folder, chosen, target_recall, program, (index, ef_search)) as peers:
            measured = [Measured(peer, peer.recall(chosen)) for peer in peers]
            for _ in range(rounds):
                faiss_rates.append(in_child(measure_by_hand, index, ef_search, chosen.queries, seconds).per_second)
                measure_round(measured, chosen, seconds)
    report = report_of(measured, chosen, float(np.median(faiss_rates)), ef_search)
    print(json.dumps(report) if as_json else as_markdown(report))


@contextmanager
def all_peers(
    folder: Path, vectors: VectorSet, target_recall: float, chroma: Path | None, by_hand: tuple[Path, int]
) -> Iterator[list[Peer]]:
    """All servers run at the same time; those not measured are idle."""
    with ExitStack() as stack:
        served = stack.enter_context(served_eagleray())
        described = import_file(served.client, vectors.parquet, vectors.metric, 1, {"target_recall": target_recall})
        params = cheapest_params(served.client, described, vectors, target_recall)
        peers = eagleray_peers(served, index_text(described, params), params)
        if chroma is not None:
            peers += stack.enter_context(chroma_peers(chroma, folder, vectors, target_recall))
        yield peers + stack.enter_context(ray_serve_peers(*by_hand))


def measure_round(measured: list[Measured], vectors: VectorSet, seconds: float) -> None:
    for connections, batch in LOADS:
        for each in measured:
            peer, requests = each.peer, each.peer.requests(vectors.queries, batch)
            load = in_child(run_closed_loop, peer.target, requests, connections, seconds, WARM_UP_S)
            each.loads[connections, batch].append(load)


def report_of(measured: list[Measured], vectors: VectorSet, faiss_per_s: float, ef_search: int) -> dict[str, Any]:
    return {
        "machine": machine(),
        "data": vectors.name,
        "faiss_per_second": faiss_per_s,
        "faiss_ef_search": ef_search,
        "peers": [row_of(each, measured[0]) for each in measured],
    }


def row_of(measured: Measured, base: Measured) -> dict[str, Any]:
    loads = [
        {
            "connections": load[0],
            "batch": load[1],
            "vectors_per_second": measured.vectors_per_s(load),
            "ratio": measured.vectors_per_s(load) / max(1e-9, base.vectors_per_s(load)),
            "p50_ms": measured.percentile_ms(load, 50),
            "p99_ms": measured.percentile_ms(load, 99),
            "failures": measured.failures(load),
        }
        for load in LOADS
    ]
    return {"name": measured.peer.name, "setting": measured.peer.setting, "recall": measured.recall, "loads": loads}


def as_markdown(report: dict[str, Any]) -> str:
    heads = [f"{each['connections']} x {each['batch']}" for each in report["peers"][0]["loads"]]
    faiss = f"HNSW32 with efSearch {report['faiss_ef_search']}, 2 threads: {report['faiss_per_second']:,.0f} vectors/s"
    return "\n".join(
        [
            f"{report['data']}; {report['machine']}; FAISS in process in batches of {BATCH}, {faiss}.",
            "Vectors/s (ratio to the first row) p50 / p99 ms, at connections x vectors per request:",
            "",
            f"| system | recall@{K} | {' | '.join(heads)} |",
            f"|---|---:|{'---:|' * len(heads)}",
            *(
                f"| {row['name']} | {row['recall']:.4f} | {' | '.join(cell(load) for load in row['loads'])} |"
                for row in report["peers"]
            ),
            "",
            *(f"- {row['name']}: {row['setting']}" for row in report["peers"]),
        ]
    )


def cell(load: dict[str, Any]) -> str:
    failed = f", {load['failures']:,} failed" if load["failures"] else ""
    times = f"{load['p50_ms']:.2f} / {load['p99_ms']:.1f}"
    return f"{load['vectors_per_second']:,.0f} ({load['ratio']:.2f}) {times}{failed}"


if __name__ == "__main__":
    typer.run(main)
