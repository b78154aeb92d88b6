"""What the GPU benchmark measured, as plain data for JSON and as Markdown, and whether it is what was asked for."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_ceilings import Ceilings
from benchmarks.gpu_sets import K, cores

ACTOR_BAR, ACTOR_BATCH_MIN = 0.9, 1_024
FLAT_BAR = 0.7
VERSIONED = (
    *("faiss-gpu-cuvs", "faiss-cpu", "libcuvs-cu13", "libraft-cu13", "librmm-cu13", "nvidia-cuda-runtime"),
    *("nvidia-cublas", "nvidia-nvjitlink", "nvidia-cuda-nvrtc", "nvidia-ml-py", "torch", "ray", "numpy", "pyarrow"),
)
Rates = Mapping[str, Sequence[float]]  # vectors per second of each round, by way; the first way is raw FAISS


@dataclass
class Report:
    """`cases` have one entry for each kind of index over each set, `skipped` what was not measured, and why.

    `failures` of it is what should have been.
    """

    gpu: dict[str, Any]
    ceilings: Ceilings | str
    options: dict[str, Any]
    cases: list[dict[str, Any]] = field(default_factory=list)
    graphs: list[dict[str, Any]] = field(default_factory=list)  # HNSW built on the CPU, by set
    skipped: list[dict[str, str]] = field(default_factory=list)
    failures: int = 0

    def fail(self, what: str, error: BaseException) -> None:
        """Told at once, with where it came from."""
        print(f"FAILED {what}: {''.join(traceback.format_exception(error))}", flush=True)
        self.skip(what, f"{type(error).__name__}: {error}")
        self.failures += 1

    def skip(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})

    def to_dict(self) -> dict[str, Any]:
        ceilings = self.ceilings if isinstance(self.ceilings, str) else vars(self.ceilings)
        return {
            "gpu": self.gpu,
            "machine": machine(),
            "versions": versions(),
            "ceilings": ceilings,
            "options": self.options,
            "cases": self.cases,
            "cpu_hnsw": self.graphs,
            "skipped": self.skipped,
            "bars": bars(self.cases),
        }


def machine() -> str:
    """The cores that this process may use, which in a container are fewer than the machine's, and their kind."""
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
    return f"{cores()} cores, {models[0] if models else platform.machine()}"


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def row_of(batch: int, rates: Rates, bound: tuple[float, str] | None) -> dict[str, Any]:
    """Medians over the rounds; ratios to raw FAISS are those of each round."""
    raw = next(iter(rates.values()))
    ways = {
        name: {"per_second": median(found), "ratio": median([a / b for a, b in zip(found, raw, strict=True)])}
        for name, found in rates.items()
    }
    row: dict[str, Any] = {"batch": batch, "ways": ways}
    if bound is not None:
        row |= {"bound_per_second": bound[0], "bound_by": bound[1], "of_bound": median(raw) / bound[0]}
    return row


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def bars(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every case: the actor beside raw FAISS in large batches, and flat search beside the ceilings."""
    found = []
    for case in cases:
        name = f"{case['set']}, {case['kind']}"
        for row in case["rows"]:
            actor = [way["ratio"] for who, way in row["ways"].items() if who.startswith("actor")]
            if actor and row["batch"] >= ACTOR_BATCH_MIN:
                found.append(_bar(f"{name}, batch {row['batch']}: actor / raw", ACTOR_BAR, max(actor)))
        shares = [row["of_bound"] for row in case["rows"] if "of_bound" in row]
        if shares:
            found.append(_bar(f"{name}: raw / bound, the best batch", FLAT_BAR, max(shares)))
    return found


def _bar(name: str, bar: float, reached: float) -> dict[str, Any]:
    return {"name": name, "bar": bar, "reached": reached, "met": bool(reached >= bar)}


# --- Markdown -------------------------------------------------------------------------------------------------------


def as_markdown(told: Mapping[str, Any]) -> str:
    lines = [*_head(told)]
    for case in told["cases"]:
        lines += ["", *_case(case)]
    if told["cases"]:
        lines += ["", *_builds(told)]
    if told["bars"]:
        lines += ["", "| asked for | bar | reached | met |", "|---|---:|---:|---|"]
        lines += [
            f"| {bar['name']} | {bar['bar']:g} | {bar['reached']:.2f} | {'yes' if bar['met'] else 'NO'} |"
            for bar in told["bars"]
        ]
    if told["skipped"]:
        lines += ["", "Not measured:", *(f"- {each['what']}: {each['why']}" for each in told["skipped"])]
    return "\n".join(lines)


def _head(told: Mapping[str, Any]) -> list[str]:
    gpu, options = told["gpu"], told["options"]
    which = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    tried = options.get("smoke") or options.get("cpu")
    return [
        *(["NOT measured on a GPU: a tiny run on the CPU, to try the program.", ""] if tried else []),
        f"{gpu['name']}, driver {gpu['driver']}, {gpu['total_bytes'] / 2**30:.0f} GiB; {which}; {told['machine']}.",
        f"k = {K}; vectors per second, medians of {options['rounds']} alternating rounds of at least "
        f"{options['seconds']:g} s; in brackets the ratio to raw FAISS of the same round. x4: four calls at a time.",
        _ceilings_line(told["ceilings"]),
    ]


def _ceilings_line(ceilings: Any) -> str:
    if isinstance(ceilings, str):
        return f"Ceilings were not measured: {ceilings}."
    products = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in ceilings["operations_per_s"].items())
    copied = ceilings["bytes_per_s"] / 1e12
    return f"Measured ceilings: copy {copied:.2f} TB/s (read + written); products, TFLOP/s: {products}."


def _case(case: Mapping[str, Any]) -> Sequence[str]:
    ways = list(case["rows"][0]["ways"])
    bound = any("of_bound" in row for row in case["rows"])
    recalls = ", ".join(f"{name} {value:.4f}" for name, value in case["recall"].items())
    memory = case["gpu_memory"]
    head = [
        f"### {case['set']}: {case['kind']}",
        f"{case['index']}; recall@{K}: {recalls}; the tuning measured {case['tuned_recall']:.4f}.",
        _memory_line(memory) + _trouble(case),
        "",
        f"| batch | {' | '.join(ways)} |" + (" bound | raw / bound |" if bound else ""),
        "|---:" * (len(ways) + 1 + 2 * bound) + "|",
    ]
    return [*head, *(_line(row, ways) for row in case["rows"])]


def _memory_line(memory: Mapping[str, int | None]) -> str:
    predicted, measured = memory["predicted"], memory["measured"]
    if predicted is None:
        return "Not on a GPU."
    return f"Bytes on the GPU: {predicted:,} predicted, {'not' if measured is None else f'{measured:,}'} measured."


def _trouble(case: Mapping[str, Any]) -> str:
    """Which of the figures are not the GPU's: the CPU answered."""
    degraded = f" DEGRADED: {case['degraded']}." if case["degraded"] else ""
    missing = case["out_of_memory"]
    return degraded + (f" DEGRADED: {missing} searches found no memory." if missing else "")


def _line(row: Mapping[str, Any], ways: Sequence[str]) -> str:
    found = row["ways"]
    cells = [f"{found[way]['per_second']:,.0f} ({found[way]['ratio']:.2f})" if way in found else "-" for way in ways]
    if "of_bound" in row:
        cells += [f"{row['bound_per_second']:,.0f} ({row['bound_by']})", f"{row['of_bound']:.2f}"]
    return f"| {row['batch']} | {' | '.join(cells)} |"


def _builds(told: Mapping[str, Any]) -> list[str]:
    """Train and add, as a segment states them of itself, beside an HNSW of the same vectors on the CPU."""
    graphs = {each["set"]: each for each in told["cpu_hnsw"]}
    lines = [
        "Build: train and add; on a GPU the copy back to the host is part of it.",
        "",
        "| set | index | build s | CPU HNSW s (threads) | HNSW / index |",
        "|---|---|---:|---:|---:|",
    ]
    for case in told["cases"]:
        graph, build_s = graphs.get(case["set"]), case["build_s"]
        cells = [f"{graph['seconds']:.1f} ({graph['threads']})", f"{graph['seconds'] / build_s:.1f}"] if graph else "--"
        lines.append(f"| {case['set']} | {case['kind']} | {build_s:.2f} | {' | '.join(cells)} |")
    return lines
