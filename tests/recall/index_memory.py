"""Predicted against measured resident bytes of one index: built cheaply, measured in a process that only loads it.

Bytes do not depend on how good an index is, so that graphs get an efConstruction of 4 and lists one round of k-means.
Resident is what searches need: the growth of anonymous memory while the index is loaded, plus those pages of the
mapped file that are read after loading. Lists of a fast scan are copied out of the file as it is loaded; the pages
they came from are never read again and belong to nobody.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from actors import faiss_index
from actors.faiss_index import build_index, load_index, use_threads
from cluster import index_costs
from cluster.config import CollectionConfig, IndexConfig
from cluster.index_policy import choose
from cluster.index_spec import IndexSpec

PAGE_BYTES = 4_096
LATENT_DIMENSIONS = 16  # of the vectors: lists of independent dimensions would be far more unequal than any real ones
TRAINING_POINTS_PER_LIST = 4
SEED = 20_261_124
MADV_DONTNEED = 4
METRIC = "l2"

CASES: dict[str, dict[str, Any]] = {
    "flat": {"kind": "flat"},
    "flat float16": {"kind": "flat", "codes": "float16"},
    "hnsw float32": {"kind": "hnsw", "codes": "float32"},
    "hnsw float16": {"kind": "hnsw", "codes": "float16"},
    "hnsw sq8": {"kind": "hnsw", "codes": "sq8"},
    "ivf_flat float32": {"kind": "ivf_flat", "codes": "float32"},
    "ivf_flat float16": {"kind": "ivf_flat", "codes": "float16"},
    "ivf_sq8": {"kind": "ivf_sq8"},
    "ivf_pq 8 bits": {"kind": "ivf_pq", "pq_bits": 8},
} | {
    f"{kind} {store}": {"kind": kind, "rerank_store": store}
    for kind in ("ivf_pq", "ivf_rabitq")
    for store in ("none", "rows", "sq8", "float16", "float32")
}


@dataclass(frozen=True)
class Measured:
    """Bytes: predicted, resident (`anonymous` plus `file`), and of the whole file."""

    predicted: int
    anonymous: int
    file: int
    whole_file: int

    @property
    def resident(self) -> int:
        return self.anonymous + self.file

    @property
    def ratio(self) -> float:
        return self.predicted / self.resident


def spec_of(case: str, count: int, dimension: int) -> IndexSpec:
    """What the policy builds for a case, with the cheapest construction."""
    options = CASES[case]
    named = {name: value for name, value in options.items() if name != "codes" or options["kind"] != "flat"}
    config = CollectionConfig(dimension, METRIC, index=IndexConfig(target_recall=0.5, **named))
    spec = choose(count, config)
    if options["kind"] == "flat":
        spec = replace(spec, codes=options.get("codes", "float32"))
    if "ef_construction" in spec.params:
        spec = replace(spec, params=spec.params | {"ef_construction": 4})
    return spec


def vectors(count: int, dimension: int) -> NDArray[np.float32]:
    random = np.random.default_rng(SEED)
    latent = random.standard_normal((count, LATENT_DIMENSIONS), dtype=np.float32)
    return latent @ random.standard_normal((LATENT_DIMENSIONS, dimension), dtype=np.float32)


def measure(case: str, points: NDArray[np.float32]) -> Measured:
    """Build, save, load in a fresh process and measure there."""
    count, dimension = points.shape
    spec = spec_of(case, count, dimension)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        _build(spec, points).save(path)
        anonymous, file = _in_fresh_process(path, spec, count, dimension)
        return Measured(index_costs.index_bytes(spec, count, dimension), anonymous, file, path.stat().st_size)


def _build(spec: IndexSpec, points: NDArray[np.float32]) -> faiss_index.FaissIndex:
    prepare = faiss_index._prepare
    sample = points[: max(1_024, TRAINING_POINTS_PER_LIST * spec.params.get("nlist", 0))]
    try:
        faiss_index._prepare = _cheaply(prepare)
        index = build_index(spec, points.shape[1], METRIC, sample, SEED)
    finally:
        faiss_index._prepare = prepare
    index.add(points)
    return index


def _cheaply(prepare: Any) -> Any:
    def prepared(level: Any, spec: IndexSpec, seed: int) -> None:
        prepare(level, spec, seed)
        quantizer = getattr(level, "pq", None)
        for clustering in ([level.cp] if isinstance(level, faiss.IndexIVF) else []) + (
            [quantizer.cp] if quantizer else []
        ):
            clustering.niter = 1

    return prepared


def _in_fresh_process(path: Path, spec: IndexSpec, count: int, dimension: int) -> tuple[int, int]:
    context = multiprocessing.get_context("forkserver")  # forked from a process that has only imported this module
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(path, spec, count, dimension, theirs))
    process.start()
    theirs.close()
    try:
        anonymous, file = ours.recv()
    finally:
        process.join()
    return anonymous, file


def _report(path: Path, spec: IndexSpec, count: int, dimension: int, connection: Connection) -> None:
    use_threads(1)
    _warm_up(path.with_name("warm"), dimension)
    anonymous_bytes()
    before = anonymous_bytes()
    index = load_index(path, spec, dimension, METRIC, count, path.name)
    anonymous = anonymous_bytes() - before
    for mapping in mappings(path):
        mapping.drop()
    if spec.kind == "hnsw":  # every page is read sooner or later
        for mapping in mappings(path):
            mapping.touch()
    else:
        params = dict(spec.exhaustive_params or {}) | ({"rerank": count} if "rerank" in index.knobs else {})
        if spec.rerank_store == "rows":
            params.pop("rerank")
        index.search(np.zeros((1, dimension), dtype=np.float32), 1, params)
    connection.send((anonymous, sum(mapping.resident for mapping in mappings(path))))


def _warm_up(path: Path, dimension: int) -> None:
    """What the first load and search of a process allocate once is not the index's."""
    spec = IndexSpec("flat", {}, "float32", 0, "")
    index = build_index(spec, dimension, METRIC, np.zeros((1, dimension), dtype=np.float32), SEED)
    index.add(np.zeros((100, dimension), dtype=np.float32))
    index.save(path)
    load_index(path, spec, dimension, METRIC, 100, path.name).search(np.zeros((1, dimension), np.float32), 1, {})


@dataclass
class Mapping:
    """One line of /proc/self/smaps, in bytes."""

    start: int
    stop: int
    resident: int = 0
    anonymous: int = 0

    def drop(self) -> None:
        """Unmap its pages, of which the file has the same."""
        if ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(self.start), ctypes.c_size_t(self.stop - self.start), MADV_DONTNEED
        ):
            raise OSError(ctypes.get_errno(), "madvise")

    def touch(self) -> None:
        pages: Any = (ctypes.c_uint8 * (self.stop - self.start)).from_address(self.start)
        np.frombuffer(pages, dtype=np.uint8)[::PAGE_BYTES].sum()


def anonymous_bytes() -> int:
    """Of the whole process, without pages that the allocator only keeps."""
    ctypes.CDLL(None).malloc_trim(0)
    return sum(mapping.anonymous for mapping in mappings())


def mappings(path: Path | None = None) -> list[Mapping]:
    """All of this process, or those of one file."""
    found: list[Mapping] = []
    named = True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            named = path is None or line.endswith(str(path))
            start, stop = (int(bound, 16) for bound in words[0].split("-"))
            found += [Mapping(start, stop)] if named else []
        elif named and words[0] == "Rss:":
            found[-1].resident = int(words[1]) * 1_024
        elif named and words[0] == "Anonymous:":
            found[-1].anonymous = int(words[1]) * 1_024
    return found
