"""A shard on a GPU over time: writes, a switch of generations, no room for two, and room again."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.faiss_index import use_threads
from actors.gpu_device import GpuDevice
from benchmarks.gpu_collection import KINDS, Made, make
from benchmarks.gpu_sets import K, cores
from benchmarks.gpu_ways import hits_of, replica_of
from cluster.arrow_rows import vectors_array
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.row_selection import RowSelection
from cluster.wal import Wal, WalRecord
from tests.gpu.cases import COUNT, Case, clusters, exact, recall, twin_of

METRIC = "cosine"
FRESH = 40  # new points, copies of queries
OLD, NEW = Case("flat", METRIC), Case("cagra", METRIC)
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture
def collection(device: Any, tmp_path: Path) -> Iterator[Made]:
    use_threads(cores())
    collection = make(tmp_path, "switched", clusters(METRIC), OLD.index, device)
    yield collection
    collection.delete()
    gc.collect()


def answer(collection: Made, generation: int, queries: Any) -> Hits:
    groups = (SearchGroup(0, len(queries), K, SearchParams()),)
    (hits,) = collection.shard.search(ShardSearch(generation, queries, groups))
    assert isinstance(hits, Hits), hits
    return hits


def found(collection: Made, generation: int) -> float:
    vectors = clusters(METRIC)
    return recall(hits_of((answer(collection, generation, vectors.queries),)), collection.ids[vectors.truth])


def commit_next(collection: Made, case: Case, device: Any) -> None:
    """Another generation of the same points, built on the GPU; the shard that serves the first is not told."""
    other = make(collection.data, collection.name, clusters(METRIC), case.index, device)
    assert other.view.generation == collection.view.generation + 1
    other.shard.retire(other.view.generation + 1)


@EVERY_KIND
def test_a_switch_serves_both_generations_and_then_the_new_one_alone(collection: Made, device: Any, kind: str) -> None:
    old, new = collection.view.generation, Case(kind, METRIC)
    commit_next(collection, new, device)
    gc.collect()
    alone = device.facts()["used_bytes"]
    view = collection.shard.load()
    kinds = [segment.spec.kind for segment in view.segments]
    assert (view.generation, kinds) == (old + 1, [new.index.kind])
    for generation in (old, old + 1):
        assert found(collection, generation) >= 0.94
        assert answer(collection, generation, clusters(METRIC).queries).degraded == ""
    both = device.facts()["used_bytes"]
    assert both > alone
    collection.shard.retire(old + 1)
    assert device.facts()["used_bytes"] < both
    assert found(collection, old + 1) >= 0.94


def test_writes_are_seen_beside_the_index_on_the_gpu(collection: Made, device: Any) -> None:
    """Deleted points are left out of the GPU's search, not of its answer; new ones lie in the tail."""
    generation, vectors = collection.view.generation, clusters(METRIC)
    nearest = np.unique(collection.ids[vectors.truth[:, :5]])
    fresh = np.arange(COUNT, COUNT + FRESH)
    batch = pa.record_batch({"id": pa.array(fresh), "vector": vectors_array(vectors.queries[:FRESH])})
    wal, lsn = Wal(collection.shard.wal._store, collection.name, 0, 0), collection.shard.applied_lsn
    wal.append(WalRecord(lsn + 1, 1, "write", uuid.uuid4().hex, batch, pa.array(nearest)))
    collection.shard.catch_up()
    hits = answer(collection, generation, vectors.queries)
    found = hits_of((hits,))
    assert hits.degraded == ""
    assert not np.isin(found, nearest).any()
    assert found[:FRESH, 0].tolist() == fresh.tolist()
    points, ids = np.concatenate([vectors.vectors, vectors.queries[:FRESH]]), np.concatenate([collection.ids, fresh])
    truth = ids[exact(points, vectors.queries, METRIC, RowSelection.of(~np.isin(ids, nearest)))]
    reached = recall(found, truth)
    print(f"{len(nearest)} of {COUNT} deleted, {FRESH} written: recall@{K} {reached:.4f}")
    assert reached >= 0.999, "the places of the deleted are filled from the index"


def test_without_room_the_twin_answers_until_there_is_some(device: Any, tmp_path: Path) -> None:
    """What is free is told by this test; the index is really on the GPU or not."""
    whole = device._memory()
    assert whole is not None
    told = [whole]
    scarce = GpuDevice(device.library, lambda: told[0], 1.0, device.name)
    try:
        collection = make(tmp_path, "scarce", clusters(METRIC), OLD.index, scarce)
        generation = collection.view.generation
        commit_next(collection, NEW, scarce)
        told[0] = (1 << 20, whole[1])
        collection.shard.load()
        hits = answer(collection, generation + 1, clusters(METRIC).queries)
        assert hits.degraded == "cpu"
        assert found(collection, generation + 1) >= 0.94
        assert answer(collection, generation, clusters(METRIC).queries).degraded == ""
        told[0] = whole
        collection.shard.retire(generation + 1)
        collection.shard.promote()
        assert answer(collection, generation + 1, clusters(METRIC).queries).degraded == ""
        assert found(collection, generation + 1) >= 0.94
        collection.delete()
    finally:
        scarce.close()


def test_a_replica_tells_of_its_gpu_and_answers_from_it(collection: Made, device: Any) -> None:
    queries = clusters(METRIC).queries
    with replica_of(collection, device) as replica:
        (hits,) = asyncio.run(replica.search(collection.request(queries)))
        status = replica.status()
    assert isinstance(hits, Hits)
    assert (hits.degraded, status.degraded) == ("", "")
    assert status.gpu is not None
    assert status.gpu["name"] == device.name
    assert twin_of(collection).facts()["degraded"] == "", "the device outlives the replica of this test"
