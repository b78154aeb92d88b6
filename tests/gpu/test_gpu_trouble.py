"""What goes wrong on a GPU: no memory, a lost device, an index that answers wrongly. The twin on the host answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from actors import gpu_placement
from actors.faiss_index import FaissIndex, faiss_metric, use_threads
from actors.gpu_device import GpuDevice, GpuLost, GpuMemoryFull
from actors.gpu_index import place_on_gpu
from actors.gpu_placement import GpuPlacement
from actors.segment_loader import LoadedSegment, load_on_host
from actors.twin_index import TwinIndex
from benchmarks.gpu_collection import KINDS, Made, make
from benchmarks.gpu_sets import K, cores
from benchmarks.gpu_ways import hits_of
from cluster import paths
from cluster.config import Metric
from cluster.errors import Unavailable
from cluster.manifest import SegmentRef
from cluster.object_store import open_store
from cluster.query import Hits, SearchParams
from cluster.segment import checksum_bytes
from tests.gpu.cases import DIMENSION, SLACK, TARGET, Case, clusters, recall, sized

COUNT, WRONG_FROM = sized(120_000), sized(100_000)
ROOT = Path(__file__).parents[2]
PROVOKE_S, TOLD_CHARACTERS = 120, 6_000
METRIC: Metric = "l2"
EVERY_KIND = pytest.mark.parametrize("collection", list(KINDS), indirect=True)
FLAT_ALONE = pytest.mark.parametrize("collection", ["flat"], indirect=True)


@pytest.fixture(scope="module")
def collection(request: pytest.FixtureRequest, device: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Of the kind that the test asks for."""
    use_threads(cores())
    index = Case(request.param, METRIC).index
    collection = make(tmp_path_factory.mktemp("gpu"), "trouble", clusters(METRIC, COUNT), index, device)
    yield collection
    collection.delete()


def loaded_again(collection: Made, device: Any, cpu_twin: bool = True) -> LoadedSegment:
    """The segment loaded once more, and placed on that device if that can be."""
    segment_id = collection.description.segment_id
    store = open_store(str(collection.data))
    data = store.get(paths.segment_file(collection.name, segment_id, paths.DESCRIPTION))
    ref = SegmentRef(segment_id, collection.description.count, checksum_bytes(data))
    segment = load_on_host(store, collection.name, ref, METRIC, collection.data / "cache", cpu_twin)
    GpuPlacement(device).place(segment)
    return segment


def index_of(segment: LoadedSegment) -> TwinIndex:
    index = segment.searcher.index
    assert isinstance(index, TwinIndex)
    return index


def finds_enough(segment: LoadedSegment) -> bool:
    vectors = clusters(METRIC, COUNT)
    found = recall(segment.search(vectors.queries, K, SearchParams())[0], vectors.truth)
    return found >= (0.999 if segment.spec.kind == "flat" else TARGET - SLACK)


# --- memory ---------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_an_index_over_its_share_is_not_placed_and_the_twin_answers(collection: Made, device: Any) -> None:
    small = GpuDevice(device.library, device._memory, 1e-4, device.name)
    try:
        segment = loaded_again(collection, small)
        index = index_of(segment)
        assert index.gpu is None
        assert "bytes" in index.why
        assert finds_enough(segment)
        with pytest.raises(GpuMemoryFull, match=r"\d+ bytes"):
            place_on_gpu(small, index.cpu, segment.spec, DIMENSION, METRIC, segment.rows)
    finally:
        small.close()


@EVERY_KIND
def test_an_index_over_its_share_is_refused_without_a_twin(collection: Made, device: Any) -> None:
    small = GpuDevice(device.library, device._memory, 1e-4, device.name)
    try:
        with pytest.raises(Unavailable, match=r"\d+ bytes"):
            loaded_again(collection, small, cpu_twin=False)
    finally:
        small.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_without_memory_is_answered_by_the_twin_and_the_next_by_the_gpu(
    device: Any, tmp_path: Path, kind: str
) -> None:
    """All memory of the device is really taken meanwhile, in a process of its own.

    Exact search must run out. What others allocate depends on cuVS (tests.gpu.provoke): where there is enough after
    all, the GPU's own right answer is as good; which of the two it was is printed.
    """
    told = provoked("full", kind, tmp_path)
    before, during, after = told["before"], told["during"], told["after"]
    assert told["taken"] > 0
    for answer in (before, after):
        assert (answer["degraded"], answer["over"]) == ("", ""), answer
    assert before["refused"] == 0, "the memory was not yet taken"
    assert min(answer["recall"] for answer in (before, during, after)) >= floor_of(kind)
    refused = during["refused"] > 0
    print(f"{kind}: {'the twin answered, ' if refused else 'the GPU still answered, '}{told['left']:,} bytes were free")
    assert during["degraded"] == ("cpu" if refused else "")
    assert refused or not kind.startswith("flat"), "an exact search of this size cannot have found its memory"
    assert after["refused"] == during["refused"]
    assert not told["device"]["lost"]


# --- a lost device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_device_ends_the_process_or_the_twin_answers_from_then_on(
    device: Any, tmp_path: Path, kind: str
) -> None:
    """A kernel that traps ends the context in a process of its own. FAISS asserts for some calls, which ends the
    process, and Ray starts it again; where it raises, the twin answers."""
    told = provoked("lost", kind, tmp_path, may_abort=True)
    if not told:
        print(f"{kind}: FAISS ended the process")
        return
    print(f"{kind}: the twin answered; {told['device']['lost']}")
    assert told["error"], "the kernel did not trap"
    assert (told["before"]["degraded"], told["before"]["over"]) == ("", "")
    assert told["before"]["recall"] >= floor_of(kind)
    for answer in (told["during"], told["after"]):
        assert answer["degraded"] == "cpu"
        assert answer["recall"] >= floor_of(kind)
    assert told["device"]["lost"]
    assert told["facts"]["degraded"]


@EVERY_KIND
def test_after_an_error_that_says_lost_nothing_is_asked_of_the_gpu(collection: Made, device: Any) -> None:
    """The error is made here, in the thread of a second device object: the GPU itself is well."""
    doomed = GpuDevice(device.library, device._memory, 0.5, device.name)
    segment = loaded_again(collection, doomed)
    index = index_of(segment)
    assert index.gpu is not None, index.why

    def fail(resources: Any) -> None:
        raise RuntimeError("CUDA error 700 an illegal memory access was encountered")

    with pytest.raises(GpuLost):
        doomed.run(fail)
    assert "700" in doomed.lost
    assert finds_enough(segment)
    assert "700" in str(index.facts()["degraded"])
    with pytest.raises(GpuLost):
        doomed.run(lambda resources: None)


def floor_of(kind: str) -> float:
    """The recall that any answer must have, whoever gave it."""
    return 0.999 if kind.startswith("flat") else TARGET - SLACK


def provoked(what: str, kind: str, folder: Path, may_abort: bool = False) -> dict[str, Any]:
    """What `tests.gpu.provoke` tells; {} where an assertion ended the process and that may be, after its kernel."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.provoke", what, kind, str(folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PROVOKE_S)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{what}, {kind}: not done after {PROVOKE_S} s\n{_text(late.stderr)}\n{_text(late.stdout)}")
    said = f"{what}, {kind}: exit code {done.returncode}\n{done.stderr[-TOLD_CHARACTERS:]}\n{done.stdout}"
    print(said)
    if done.stdout.strip():
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == 0 or may_abort, "it answered, and died as it ended"
        return told
    assert may_abort, said
    assert done.returncode == -signal.SIGABRT, said
    assert "the kernel ended with" in done.stderr, "it died before the device was lost"
    assert "the kernel ended with no error" not in done.stderr
    return {}


def _text(output: str | bytes | None) -> str:
    """Of a process that was ended in time it comes undecoded."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-TOLD_CHARACTERS:]


# --- wrong answers --------------------------------------------------------------------------------------------------


@FLAT_ALONE
@pytest.mark.parametrize("wrong", ["rows", "scores"])
def test_wrong_answers_above_100000_rows_are_noticed_at_load(
    collection: Made, device: Any, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """As of an index that computes right for the first rows alone: what is placed has other vectors from there on."""
    assert index_of(loaded_again(collection, device)).gpu is not None, "a right one is taken"
    vectors = clusters(METRIC, COUNT).vectors.copy()
    vectors[WRONG_FROM:] *= np.float32(0.0 if wrong == "rows" else 1.02)
    place = place_on_gpu

    def place_wrong(device: Any, cpu: FaissIndex, spec: Any, dimension: int, metric: Any, rows: Any) -> Any:
        other = faiss.IndexFlat(dimension, faiss_metric(metric))
        other.add(vectors)
        return place(device, FaissIndex(other, spec, metric), spec, dimension, metric, rows)

    monkeypatch.setattr(gpu_placement, "place_on_gpu", place_wrong)
    segment = loaded_again(collection, device)
    index = index_of(segment)
    assert index.gpu is None
    assert "self-test" in index.why
    assert finds_enough(segment)
    (hits,) = collection.view.search(collection.request(clusters(METRIC, COUNT).queries))
    assert isinstance(hits, Hits), "what was loaded before is not touched"
    assert recall(hits_of((hits,)), collection.ids[clusters(METRIC, COUNT).truth]) >= 0.999
