"""Writes as a shard gets them, and a shard that is led here: for the tests of tail, view, shard and primary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.shard import Shard
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Limits, Upkeep
from cluster.ids import id_array
from cluster.object_store import ObjectStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import WalRecord
from cluster.write import PointWrite
from tests.unit.actors.points import manifest_log

Ids = Sequence[int | str]
CONFIG = CollectionConfig(4, metric="l2", index=IndexConfig("flat"))
LIMITS, UPKEEP = Limits(), Upkeep()
WAIT_S = 20.0


def vectors_of(numbers: Sequence[float], dimension: int = 4) -> Any:
    """(n, dimension) float32: (number, 0, 0, ...)."""
    vectors = np.zeros((len(numbers), dimension), dtype=np.float32)
    vectors[:, 0] = numbers
    return vectors


def batch_of(config: CollectionConfig, ids: Ids, vectors: Any, **attributes: Any) -> Any:
    """`PointWrite.upserts`; attributes are Arrow arrays."""
    stored = vectors_array(np.asarray(vectors).astype(config.vector_dtype))
    return pa.record_batch({"id": id_array(ids, config.id_type), "vector": stored, **attributes})


def upsert(*ids: int, at: float | None = None, **attributes: Any) -> PointWrite:
    """Points that lie where their id says, or all at `at`."""
    vectors = vectors_of(ids if at is None else [at] * len(ids))
    return PointWrite(upserts=batch_of(CONFIG, ids, vectors, **attributes))


def delete(*ids: int) -> PointWrite:
    return PointWrite(deletes=id_array(ids, "int64"))


def record(lsn: int, write: PointWrite | None = None, epoch: int = 1, nonce: int = 0) -> WalRecord:
    """A write, or a claim without one."""
    kind: Any = "write" if write is not None else "claim"
    upserts, deletes = (write.upserts, write.deletes) if write is not None else (None, None)
    return WalRecord(lsn, epoch, kind, f"{nonce * 1_000_000 + lsn:032x}", upserts, deletes)


def created(store: ObjectStore, cache_dir: Path, config: CollectionConfig = CONFIG) -> Shard:
    """Shard 0 of the empty collection `words`, loaded."""
    manifest_log(store, "words").create(config)
    return opened(store, cache_dir)


def opened(store: ObjectStore, cache_dir: Path) -> Shard:
    shard = Shard(store, "words", 0, cache_dir)
    shard.load()
    return shard


def held_ids(shard: Shard, generation: int = 1, k: int = 1_000) -> list[int | str]:
    """Every live id, nearest to the origin first; of one query."""
    return hits_of(shard, k=k, generation=generation).ids.to_pylist()  # type: ignore[no-any-return]


def hits_of(
    shard: Shard, number: float = 0.0, k: int = 1_000, columns: tuple[str, ...] = (), generation: int = 1
) -> Hits:
    group = SearchGroup(0, 1, k, SearchParams(exact=True), columns)
    (outcome,) = shard.search(ShardSearch(generation, vectors_of([number]), (group,)))
    assert isinstance(outcome, Hits), outcome
    return outcome


def all_in_threads(*calls: Callable[[], object]) -> list[BaseException]:
    """Run them at once to their ends; what they raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # for the test to look at
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a thread hangs"
    return errors
