"""A collection of one shard for the GPU benchmark: built on a device, committed as a job would, and loaded."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from actors.faiss_index import use_threads
from actors.segment_builder import BuildOptions, build_segment, publish_segment
from actors.segment_loader import LoadedSegment
from actors.shard import Shard
from actors.shard_view import ShardView
from benchmarks.gpu_sets import SEED, GpuSet, K, cores
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.gpu_memory import GpuFacts
from cluster.ids import hash_ids
from cluster.manifest import ManifestLog, ShardEntry
from cluster.object_store import open_store
from cluster.placement import ReplicaKey
from cluster.query import SearchGroup, SearchParams, ShardSearch
from cluster.segment import SegmentDescription, rows_per_batch, rows_schema, write_rows

NUM_GPUS = 0.25  # of a replica: the benchmark has the index once more in its own process
KINDS: dict[str, IndexConfig] = {
    "flat": IndexConfig("flat", device="gpu", codes="float32"),
    "flat float16": IndexConfig("flat", device="gpu", codes="float16"),
    "ivf_flat": IndexConfig("ivf_flat", device="gpu"),
    "ivf_pq": IndexConfig("ivf_pq", device="gpu"),
    "cagra": IndexConfig("cagra", device="gpu", codes="float32"),
    "cagra float16": IndexConfig("cagra", device="gpu", codes="float16"),
}
EXACT_SEARCH = SearchParams()  # the tuned point: of a flat index it is exact


@dataclass(frozen=True)
class Made:
    """A committed collection of one shard, which `shard` serves in this process; row i of the set has id `ids[i]`."""

    data: Path
    name: str
    shard: Shard
    view: ShardView
    description: SegmentDescription
    ids: Any
    key: ReplicaKey  # of the replica that serves it

    @property
    def segment(self) -> LoadedSegment:
        return self.view.segments[0]

    def request(self, queries: Any, params: SearchParams = EXACT_SEARCH) -> ShardSearch:
        return ShardSearch(self.view.generation, queries, (SearchGroup(0, len(queries), K, params),))

    def delete(self) -> None:
        """Give back the device's memory and the disk's."""
        self.shard.retire(self.view.generation + 1)
        shutil.rmtree(self.data / "collections" / self.name, ignore_errors=True)


def make(data: Path, name: str, vectors: GpuSet, index: IndexConfig, device: Any) -> Made:
    """Build on `device` (None: on the CPU), commit and load the collection `name` under the folder `data`."""
    config = CollectionConfig(vectors.dimension, vectors.metric, index=index)
    store, ids = open_store(str(data)), ids_in_row_order(len(vectors.vectors))
    with tempfile.TemporaryDirectory(dir=data) as folder:
        write_segment_rows(Path(folder), config, vectors.vectors, ids)
        options = BuildOptions(cores(), SEED, gpu=facts_of(device, index), device=device)
        segment_id = f"segment-{uuid.uuid4().hex}"
        build_segment(Path(folder), segment_id, config, len(ids), rows_per_batch(config), options)
        ref = publish_segment(store, name, Path(folder), segment_id)
    log = ManifestLog(store, name, lambda: uuid.uuid4().hex)
    share = 0.0 if device is None else index.num_gpus or 1.0
    log.commit_generation(log.newest(), config, (ShardEntry(0, (ref,)),), num_gpus=share)
    use_threads(cores())
    shard = Shard(store, name, 0, data / "cache", device=device)
    view = shard.load()
    return Made(data, name, shard, view, view.segments[0].description, ids, ReplicaKey(name, 0, 0, share))


def facts_of(device: Any, index: IndexConfig) -> GpuFacts | None:
    """The share of the device that a replica of this index may take."""
    if device is None:
        return None
    facts = device.facts()
    return GpuFacts(int(facts["total_bytes"] * (index.num_gpus or 1.0)), facts["name"])


def on(index: IndexConfig, device: Any) -> IndexConfig:
    """The same kind on the CPU where there is no device; its share of a GPU where there is one."""
    return replace(index, num_gpus=NUM_GPUS) if device is not None else replace(index, device="cpu")


def ids_in_row_order(count: int) -> Any:
    """The ids 0 to count - 1 in the order of a segment's rows: by their hashes."""
    return np.argsort(hash_ids(pa.array(np.arange(count))), kind="stable")


def write_segment_rows(folder: Path, config: CollectionConfig, vectors: Any, ids: Any) -> Path:
    """The file of rows without attributes: vectors (n, d) with the ids (n,)."""
    schema, step = rows_schema(config, {}), rows_per_batch(config)

    def batches() -> Iterator[Any]:
        for start in range(0, len(ids), step):
            part = pa.array(ids[start : start + step])
            columns = [part, vectors_array(vectors[start : start + step]), pa.array(hash_ids(part))]
            yield pa.record_batch(columns, schema=schema)

    write_rows(folder / paths.ROWS, schema, batches())
    return folder / paths.ROWS


# --- FAISS's own search of the same index ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RawIndex:
    """The index object that a loaded segment searches, and how FAISS is asked for the tuned operating point.

    `use` calls something with that object, where it may be called: in the thread of its device.
    """

    use: Callable[[Callable[[Any], Any]], Any]
    params: Any
    wanted: int  # hits: candidates whose scores are then taken from the rows
    keywords: dict[str, Any]

    def search(self, index: Any, queries: Any) -> Any:
        """Rows (n, wanted): one call of FAISS's own `search`."""
        return index.search(queries, self.wanted, params=self.params, **self.keywords)[1]


def raw_index(segment: LoadedSegment) -> RawIndex:
    """What somebody would search by hand; on the device where the segment is there, else on the CPU."""
    twin, point, spec = segment.twin, segment.operating_point.params, segment.spec
    wanted = ceil(max(1.0, point.get("rerank", spec.rerank)) * K) if spec.rerank_store == "rows" else K
    if twin is not None and twin.gpu is not None:
        library, half = twin.gpu._library, spec.kind == "cagra" and spec.codes == "float16"
        keywords = {"numeric_type": library.Float16} if half else {}
        return RawIndex(twin.gpu._held.use, _raw_params(library, spec.kind, point, True), wanted, keywords)
    cpu = twin.cpu if twin is not None else segment.searcher.index
    return RawIndex(partial(_here, cpu.faiss_object), _raw_params(faiss, spec.kind, point, False), wanted, {})


def _here(index: Any, work: Callable[[Any], Any]) -> Any:
    use_threads(cores())
    return work(index)


def _raw_params(library: Any, kind: str, point: dict[str, float], on_device: bool) -> Any:
    if kind.startswith("ivf"):
        return library.SearchParametersIVF(nprobe=int(point["nprobe"]))
    if kind == "cagra" and on_device:
        return library.SearchParametersCagra(
            itopk_size=int(point["itopk_size"]), search_width=int(point["search_width"])
        )
    return library.SearchParametersHNSW(efSearch=int(point["ef_search"])) if "ef_search" in point else None
