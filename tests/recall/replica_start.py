"""Starts a replica of a stored shard in a fresh process: the shard, the process, and how long a plain read takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.segment_builder import BuildOptions, build_segment, publish_segment
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.file_store import FileStore
from cluster.ids import hash_ids
from cluster.index_costs import replica_memory
from cluster.manifest import ManifestLog, ShardEntry
from cluster.segment import SegmentDescription, rows_per_batch, rows_schema, write_rows
from tests.recall.index_memory import SEED, vectors
from tests.recall.replica_process import COLLECTION, SEARCHES, SMALL, Request, Started

ROOT = Path(__file__).resolve().parents[2]
FEW = 1_000
READ_CHUNK_BYTES = 8 << 20
NOISE = 0.1
ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


class StoredShard:
    """A collection of one shard and one segment in a folder, with queries near its points."""

    def __init__(self, folder: Path, index: IndexConfig, count: int, dimension: int, threads: int) -> None:
        self._folder = folder
        points = vectors(count, dimension)
        random = np.random.default_rng(SEED)
        noise = NOISE * random.standard_normal((SEARCHES, dimension), dtype=np.float32)
        np.save(folder / "queries.npy", points[random.integers(0, count, SEARCHES)] + noise)
        store = FileStore(folder / "data")
        self._config = config = CollectionConfig(dimension, "l2", index=index)
        few = replace(config, index=replace(index, nlist=None))
        _commit(store, SMALL, few, points[:FEW], threads, folder)
        self.description = _commit(store, COLLECTION, config, points, threads, folder)

    @property
    def predicted(self) -> int:
        """Bytes of the index and of the ids."""
        memory = replica_memory(self.description.spec["predicted_bytes"], self.description.count, self._config)
        return memory.index + memory.ids

    @property
    def files(self) -> list[Path]:
        names = (paths.ROWS, paths.INDEX)
        segment = self.description.segment_id
        return [self._folder / "data" / paths.segment_file(COLLECTION, segment, name) for name in names]

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def start(
        self, *, remote: bool = False, memory: bool = False, threads: int = 2, searches: int = SEARCHES
    ) -> Started:
        """Start a replica, wait until it has loaded the shard (and searched it), and end it."""
        with tempfile.TemporaryDirectory(dir=self._folder) as cache:
            store, queries = str(self._folder / "data"), str(self._folder / "queries.npy")
            request = Request(store, cache, queries, time.monotonic(), remote, memory, threads, searches)
            command = [sys.executable, "-m", "tests.recall.replica_process", json.dumps(asdict(request))]
            # how many heaps threads make, and what they keep of them, depends on how busy the machine is
            environment = os.environ | (ONE_HEAP if memory else {})
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return Started(**json.loads(done.stdout))

    def read_seconds(self) -> float:
        """To read all bytes of the segment once, by one thread into one buffer."""
        buffer, began_s = bytearray(READ_CHUNK_BYTES), time.perf_counter()
        for path in self.files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - began_s

    def drop_from_page_cache(self) -> None:
        """So that the next read comes from the disk, or from a cache beneath this system."""
        for path in self.files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _commit(
    store: FileStore,
    collection: str,
    config: CollectionConfig,
    points: NDArray[np.float32],
    threads: int,
    folder: Path,
) -> SegmentDescription:
    ids = pa.array(np.arange(len(points)))
    order = np.argsort(hash_ids(ids), kind="stable")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work, segment_id = Path(name), f"segment-{uuid.uuid4().hex}"
        write_rows(work / paths.ROWS, rows_schema(config, {}), _batches(config, points, order))
        options = BuildOptions(threads, SEED)
        description = build_segment(work, segment_id, config, len(points), rows_per_batch(config), options)
        ref = publish_segment(store, collection, work, segment_id)
    log = ManifestLog(store, collection, lambda: uuid.uuid4().hex)
    log.commit_generation(None, config, (ShardEntry(0, (ref,)),))
    return description


def _batches(config: CollectionConfig, points: NDArray[np.float32], order: NDArray[np.int64]) -> Iterator[Any]:
    step, schema = rows_per_batch(config), rows_schema(config, {})
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        ids = pa.array(rows)
        yield pa.record_batch([ids, vectors_array(points[rows]), pa.array(hash_ids(ids))], schema)
