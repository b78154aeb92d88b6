"""Indexes of every kind that a GPU serves, with the rows they are made of, for tests with `tests.gpu_double`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.faiss_index import FaissIndex, load_index
from actors.gpu_device import GpuDevice
from actors.gpu_index import GpuIndex, build_on_gpu, place_on_gpu
from cluster.arrow_rows import vectors_array
from cluster.config import Codes, CollectionConfig, Metric, VectorDtype
from cluster.ids import hash_ids
from cluster.index_spec import IndexSpec
from cluster.segment import Rows, rows_schema, write_rows
from tests.gpu_double import double_device

COUNT, DIMENSION, PER_BATCH = 1_200, 16, 500
Vectors = NDArray[np.float32]


def spec_on_gpu(kind: str, codes: Codes = "float32", **params: int) -> IndexSpec:
    return IndexSpec(kind, params, codes, 0, "a test", rerank_store="rows", device="gpu")  # type: ignore[arg-type]


SPECS = {
    "flat": spec_on_gpu("flat"),
    "flat float16": spec_on_gpu("flat", "float16"),
    "ivf_flat": spec_on_gpu("ivf_flat", nlist=16),
    "ivf_pq": spec_on_gpu("ivf_pq", nlist=16, pq_m=8, pq_bits=8),
    "cagra": spec_on_gpu("cagra", graph_degree=32, intermediate_graph_degree=64),
    "cagra float16": spec_on_gpu("cagra", "float16", graph_degree=32, intermediate_graph_degree=64),
}
METRICS: dict[str, tuple[Metric, ...]] = {"flat": ("cosine", "l2", "ip")}
CASES = [(name, metric) for name, spec in SPECS.items() for metric in METRICS.get(spec.kind, ("cosine", "l2"))]
WIDE: dict[str, dict[str, float]] = {  # parameters with which a kind finds (nearly) all neighbours, on both devices
    "flat": {},
    "ivf_flat": {"nprobe": 16},
    "ivf_pq": {"nprobe": 16},
    "cagra": {"itopk_size": 256, "search_width": 4, "ef_search": 256},
}


@dataclass(frozen=True)
class Case:
    """One index, built, saved and loaded again, and what it is of. Nothing in it changes."""

    spec: IndexSpec
    metric: Metric
    vectors: Vectors
    rows: Rows
    path: Path

    def loaded(self) -> FaissIndex:
        return load_index(self.path, self.spec, DIMENSION, self.metric, len(self.vectors), "index.faiss")

    def placed(self, device: GpuDevice, cpu: FaissIndex | None = None) -> GpuIndex:
        return place_on_gpu(device, cpu or self.loaded(), self.spec, DIMENSION, self.metric, self.rows)

    @property
    def wide(self) -> dict[str, float]:
        return WIDE[self.spec.kind]


def vectors_of(metric: Metric, count: int, seed: int, offset: float = 0.0) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32) + np.float32(offset)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if metric == "cosine" else vectors


def rows_of(vectors: Vectors, folder: Path, dtype: VectorDtype = "float32") -> Rows:
    """`rows.arrow` of these vectors, in their order."""
    config = CollectionConfig(vectors.shape[1], "l2", vector_dtype=dtype)
    schema = rows_schema(config, {})
    ids = pa.array(np.arange(len(vectors)))
    hashes = pa.array(np.sort(hash_ids(ids)))
    batch = pa.record_batch([ids, vectors_array(vectors.astype(dtype)), hashes], schema=schema)
    write_rows(folder / "rows.arrow", schema, (batch.slice(at, PER_BATCH) for at in range(0, len(vectors), PER_BATCH)))
    return Rows(folder / "rows.arrow", len(vectors), vectors.shape[1], PER_BATCH)


@cache
def case_of(name: str, metric: Metric) -> Case:
    spec, folder = SPECS[name], Path(tempfile.mkdtemp())
    vectors = vectors_of(metric, COUNT, seed=1)
    rows = rows_of(vectors, folder, "float16" if spec.codes == "float16" else "float32")
    device = double_device()
    cpu, gpu = build_on_gpu(device, spec, DIMENSION, metric, rows, seed=3)
    cpu.save(folder / "index.faiss")
    gpu.close()
    device.close()
    device.library.check()
    return Case(spec, metric, vectors, rows, folder / "index.faiss")
