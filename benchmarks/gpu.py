"""Eagleray on a GPU beside raw FAISS and cuVS: the same index searched in ever more of the system, in one run.

    python -m benchmarks.gpu [--sets clusters-96,clusters-768] [--kinds flat,cagra] [--words FOLDER] [--out FOLDER]
    python -m benchmarks.gpu --smoke      # the program's own logic on a CPU, by a stand-in for the GPU's indexes

For every set and kind an index is built on the GPU, committed as a collection of one shard, and loaded. Each round then
measures in turn: FAISS's own search of that index object; the same with exact scores from the rows; the shard's view;
a replica in this process; and, where the serving stack is installed, the shard's Ray actor over the direct connection
and Arrow batches over HTTP, both of an `eagleray up` over the same files. These two have the index in another process,
so that the GPU holds it twice. Flat search is also compared with what the GPU's bandwidth and products allow, measured
in the same run (`gpu_ceilings`). Builds are compared with an HNSW that all cores of this machine build.

What could not be measured is listed with the reason. After each case the report is written to FOLDER as `gpu.json` and
`gpu.md`, so that a run that is stopped has told what it knew; none is begun after `--most-s` seconds.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from actors.faiss_index import build_index, use_threads
from benchmarks import gpu_served
from benchmarks.gpu_ceilings import Ceilings, measured_ceilings
from benchmarks.gpu_collection import KINDS, Made, make, on
from benchmarks.gpu_report import Report, as_markdown, row_of
from benchmarks.gpu_sets import SEED, SHAPES, WORDS, GpuSet, Shape, cores, make_set, read_words
from benchmarks.gpu_ways import RawWay, ReplicaWay, ScoredWay, ShardWay, Way, parts_of, replica_of
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import EaglerayError, Unavailable
from cluster.index_policy import choose
from cluster.topk import recall_at_k

BATCHES = (1, 32, 256, 1_024, 4_096)
IN_FLIGHT = (1, 4)
SMOKE = Shape(3_000, 16, "cosine", queries=128)
SMOKE_BATCHES, SMOKE_BYTES = (1, 32), 4 << 30


@dataclass(frozen=True)
class Bench:
    """What all cases have in common. `device` is None where indexes are those of a CPU, `server` where none runs."""

    data: Path
    device: Any
    server: gpu_served.Server | None
    batches: Sequence[int]
    rounds: int
    seconds: float


def main(
    sets: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)} and words.")] = "clusters-96,clusters-768,words",
    kinds: Annotated[str, typer.Option(help=f"Of {', '.join(KINDS)}.")] = ",".join(KINDS),
    words: Annotated[Path | None, typer.Option(help=f"Folder with {WORDS[0]}; none: without words.")] = None,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each way and batch in a round, at least.")] = 0.2,
    serve: Annotated[bool, typer.Option(help="Measure the actor and HTTP, too.")] = True,
    hnsw: Annotated[bool, typer.Option(help="Build an HNSW on the CPU, too.")] = True,
    most_s: Annotated[float, typer.Option(help="Begin no case after so many seconds.")] = 3_600.0,
    out: Annotated[Path | None, typer.Option(help="Folder for gpu.json and gpu.md.")] = None,
    cpu: Annotated[bool, typer.Option(help="Tiny, on the CPU: to try this program, with what it serves.")] = False,
    smoke: Annotated[bool, typer.Option(help="Tiny, by a stand-in for the GPU: the program's own logic.")] = False,
) -> None:
    until_s = time.monotonic() + most_s
    with tempfile.TemporaryDirectory(prefix="eagleray-gpu-") as folder, ExitStack() as stack:
        device = _device(cpu, smoke)
        ceilings = _ceilings(kinds, smoke or cpu)
        report = Report(gpu_facts(device), ceilings, {"rounds": rounds, "seconds": seconds, "smoke": smoke, "cpu": cpu})
        server = stack.enter_context(_server(Path(folder), serve and not smoke, report))
        bench = Bench(Path(folder), device, server, SMOKE_BATCHES if smoke or cpu else BATCHES, rounds, seconds)
        for vectors in chosen_sets(sets, words, smoke or cpu, report):
            for kind in kinds.split(","):
                if time.monotonic() > until_s:
                    report.skip(f"{vectors.name}, {kind}", f"{most_s:g} s were over")
                    continue
                _try_case(bench, vectors, kind, report)
                write(report, out)
            if hnsw and time.monotonic() <= until_s:
                say(f"{vectors}: HNSW on the CPU")
                report.graphs.append(cpu_graph(vectors))
                write(report, out)
            elif hnsw:
                report.skip(f"{vectors.name}, HNSW on the CPU", f"{most_s:g} s were over")
    write(report, out)
    print(as_markdown(report.to_dict()))
    if report.failures:
        raise typer.Exit(1)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def write(report: Report, out: Path | None) -> None:
    if out is not None:
        told = report.to_dict()
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(told, indent=1))
        (out / "gpu.md").write_text(as_markdown(told) + "\n")


# --- what there is --------------------------------------------------------------------------------------------------


def _device(cpu: bool, smoke: bool) -> Any:
    if cpu:
        return None
    if smoke:
        from tests.gpu_double import double_device

        return double_device(memory_bytes=SMOKE_BYTES)
    from actors.gpu_device import GpuDevice

    try:
        return GpuDevice.open(1.0)
    except Unavailable as error:
        raise SystemExit(f"{error}; --smoke and --cpu run without a GPU") from None


def _ceilings(kinds: str, tried: bool) -> Ceilings | str:
    if tried:
        return "this is no GPU"
    if not any(kind.startswith("flat") for kind in kinds.split(",")):
        return "no exact search is asked for"
    return measured_ceilings()


def gpu_facts(device: Any) -> dict[str, Any]:
    from actors.gpu_probe import own_gpu

    if device is None:
        return {"name": "none: CPU indexes", "driver": "-", "total_bytes": 0}
    seen, facts = own_gpu(), device.facts()
    return {"name": facts["name"], "driver": seen.driver if seen else "-", "total_bytes": facts["total_bytes"]}


@contextmanager
def _server(data: Path, wanted: bool, report: Report) -> Iterator[gpu_served.Server | None]:
    """A running Eagleray, or None: then the report says why."""
    missing = gpu_served.missing()
    if not wanted or missing:
        report.skip("actor and HTTP", f"not installed: {missing}" if wanted else "not asked for")
        yield None
        return
    with ExitStack() as stack:
        try:
            server = stack.enter_context(gpu_served.running(data))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the rest is measured without
            report.fail("actor and HTTP", error)
            server = None
        yield server


def chosen_sets(names: str, words: Path | None, tiny: bool, report: Report) -> Iterator[GpuSet]:
    """One after the other: each takes gigabytes."""
    for name in names.split(","):
        if name == "words":
            if words is None or not all((words / file).is_file() for file in WORDS):
                report.skip("words", f"no folder with {' and '.join(WORDS)} was given")
            else:
                yield read_words(words, SMOKE.count if tiny else None)
        elif name in SHAPES:
            yield make_set(name, SMOKE if tiny else SHAPES[name])
        else:
            raise SystemExit(f"{name!r} is none of the sets {', '.join(SHAPES)} and words")


# --- one case -------------------------------------------------------------------------------------------------------


def _try_case(bench: Bench, vectors: GpuSet, kind: str, report: Report) -> None:
    if kind not in KINDS:
        raise SystemExit(f"{kind!r} is none of the kinds {', '.join(KINDS)}")
    say(f"{vectors}: {kind}")
    started = time.perf_counter()
    try:
        report.cases.append(measure_case(bench, vectors, kind, report))
    except Exception as error:  # noqa: BLE001  # one kind that fails must not cost the others their figures
        report.fail(f"{vectors.name}, {kind}", error)
    say(f"{vectors}: {kind} took {time.perf_counter() - started:.1f} s")
    gc.collect()  # what the device holds for it


def measure_case(bench: Bench, vectors: GpuSet, kind: str, report: Report) -> dict[str, Any]:
    name = f"{vectors.name}-{kind}".replace(" ", "-").replace("_", "-")
    made = make(bench.data, name, vectors, on(KINDS[kind], bench.device), bench.device)
    try:
        return measure_made(bench, made, vectors, kind, report)
    finally:
        if bench.server is not None:
            with suppress(EaglerayError):
                bench.server.client.delete(name)
        made.delete()


def measure_made(bench: Bench, made: Made, vectors: GpuSet, kind: str, report: Report) -> dict[str, Any]:
    if bench.device is not None and (why := made.segment.searcher.index.facts()["degraded"]):
        raise Unavailable(f"the index is not on the GPU: {why}")
    with replica_of(made, bench.device) as replica:
        ways: list[Way] = [RawWay(made), ScoredWay(made), ShardWay(made)]
        ways += [ReplicaWay(made, replica, many) for many in IN_FLIGHT]
        over_network = _served_ways(bench, made, report)
        ways += over_network
        rows = [measure_batch(bench, ways, made, vectors, kind, batch, report) for batch in bench.batches]
        say(f"{made.name}: timed; recall")
        recalls = _recalls(ways, made, vectors, report)
    told = told_of(made, vectors, kind) | {"rows": rows, "recall": recalls}
    return told | {"degraded": told["degraded"] or (_trouble(bench, made, report) if over_network else "")}


def _recalls(ways: list[Way], made: Made, vectors: GpuSet, report: Report) -> dict[str, float]:
    found: dict[str, float] = {}
    for way in list(ways):
        with _without(way, ways, made, report):
            found[way.name] = recall_of(way, made, vectors)
    return found


def _trouble(bench: Bench, made: Made, report: Report) -> str:
    assert bench.server is not None
    try:
        return bench.server.trouble(made.name)
    except Exception as error:  # noqa: BLE001  # what was measured stays
        report.fail(f"{made.name}: status of the served replica", error)
        return "the served replica did not tell whether its GPU answered"


@contextmanager
def _without(way: Way, ways: list[Way], made: Made, report: Report) -> Iterator[None]:
    """A way that fails is told, and left out from then on; all are compared with the first."""
    try:
        yield
    except Exception as error:
        if way is ways[0]:
            raise
        ways.remove(way)
        report.fail(f"{made.name}: {way.name}", error)


def _served_ways(bench: Bench, made: Made, report: Report) -> list[Way]:
    if bench.server is None:
        return []
    if bench.server.failures:
        report.skip(f"{made.name}: actor and HTTP", "not tried again")
        return []
    try:
        handle = bench.server.wait_for(made)
        actors = [gpu_served.ActorWay(made, handle, bench.server, many) for many in IN_FLIGHT]
        return [*actors, *(gpu_served.HttpWay(made, bench.server, many) for many in IN_FLIGHT)]
    except Exception as error:  # noqa: BLE001  # the rest is measured without
        report.fail(f"{made.name}: actor and HTTP", error)
        bench.server.failures.append(made.name)  # to wait for each that is not served would take the step's time
        return []


def measure_batch(
    bench: Bench, ways: list[Way], made: Made, vectors: GpuSet, kind: str, batch: int, report: Report
) -> dict[str, Any]:
    """Every way in turn in each round; what each does first is not counted."""
    parts = parts_of(vectors.queries, batch)
    measured: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(bench.rounds + 1):
        for way in list(ways):
            with _without(way, ways, made, report):
                rate = way.rate(parts, bench.seconds if number else 0.0)
                measured[way.name] += [rate] if number else []
    rates = {way.name: measured[way.name] for way in ways}
    bound = None
    if kind.startswith("flat") and not isinstance(report.ceilings, str):
        spec = made.segment.spec
        bound = report.ceilings.flat_bound(len(vectors.vectors), vectors.dimension, spec.codes, batch)
    return row_of(batch, rates, bound)


def recall_of(way: Way, made: Made, vectors: GpuSet) -> float:
    """Of the queries whose exact neighbours are known, asked in batches of 100."""
    truth = made.ids[vectors.truth]
    shares = [
        recall_at_k(way.ids(vectors.queries[start : start + 100][: len(truth) - start]), truth[start : start + 100])
        for start in range(0, len(truth), 100)
    ]
    return float(np.concatenate(shares).mean())


def told_of(made: Made, vectors: GpuSet, kind: str) -> dict[str, Any]:
    """What a case is, beside its figures."""
    spec, point, index = made.segment.spec, made.segment.operating_point, made.segment.searcher.index
    facts: Mapping[str, Any] = index.facts() if hasattr(index, "facts") else {}
    return {
        "set": str(vectors),
        "kind": kind,
        "index": f"{spec.kind} {spec.params} {spec.codes} on the {spec.device}, searched with {point.params}",
        "tuned_recall": point.recall,
        "build_s": made.description.built["seconds"],
        "tuning_s": made.description.built["tuning_seconds"],
        "gpu_memory": {
            "predicted": facts.get("gpu_predicted_bytes"),
            "measured": facts.get("gpu_measured_bytes"),
        },
        "out_of_memory": facts.get("out_of_memory", 0),
        "degraded": facts.get("degraded", ""),
    }


def cpu_graph(vectors: GpuSet) -> dict[str, Any]:
    """Seconds that all cores take to build the HNSW of the policy over the same vectors."""
    config = CollectionConfig(vectors.dimension, vectors.metric, index=IndexConfig("hnsw", device="cpu"))
    rows = vectors.vectors
    use_threads(cores())
    spec = choose(len(rows), config)
    started = time.perf_counter()
    index = build_index(spec, vectors.dimension, vectors.metric, rows[: spec.training_points(len(rows))], SEED)
    index.reserve(len(rows))
    index.add(rows)
    seconds = time.perf_counter() - started
    return {"set": str(vectors), "seconds": seconds, "threads": cores(), "index": f"{spec.params} {spec.codes}"}


if __name__ == "__main__":
    typer.run(main)
