"""Brings a segment of a manifest into this process: fetch or find its files, verify, map, self-test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import FaissIndex, load_index
from actors.gpu_device import GpuDevice
from actors.gpu_placement import NO_GPU, GpuPlacement
from actors.loaded_segment import LoadedSegment, widened
from actors.self_test import SLACK, asked_of, truth_of
from actors.twin_index import TwinIndex
from cluster import paths
from cluster.config import Metric
from cluster.errors import Corrupt, Unavailable
from cluster.index_spec import IndexSpec
from cluster.manifest import SegmentRef
from cluster.object_store import ObjectStore
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import (
    Checksum,
    FileEntry,
    Rows,
    SegmentDescription,
    check_entry,
    checksum_bytes,
    checksum_file,
    verify_file,
)
from cluster.topk import recall_at_k

SELF_TEST_FLOATS = 20_000_000  # that the self-test of an exact index scans: some milliseconds
FILES_AT_ONCE = 4
OPEN_TRIES = 3
CACHE_UNUSED_S = 7 * 24 * 3600.0
T = TypeVar("T")

__all__ = [
    "LoadedSegment",
    "cached_path",
    "download_verified",
    "load_on_host",
    "load_segment",
    "opened",
    "read_description",
    "sweep_cache",
    "verified_file",
    "widened",
]


def load_segment(
    store: ObjectStore,
    collection: str,
    ref: SegmentRef,
    metric: Metric,
    cache_dir: Path,
    device: GpuDevice | None = None,
    cpu_twin: bool = True,
) -> LoadedSegment:
    """Load and verify; Corrupt, naming the object, unless every byte and the self-test are as at build time.

    What was built for a GPU is placed on `device`. Where that cannot be, or its self-test there fails, the index on the
    host answers; without `cpu_twin` that is Unavailable.
    """
    segment = load_on_host(store, collection, ref, metric, cache_dir, cpu_twin)
    GpuPlacement(device).place(segment)
    return segment


def load_on_host(
    store: ObjectStore, collection: str, ref: SegmentRef, metric: Metric, cache_dir: Path, cpu_twin: bool = True
) -> LoadedSegment:
    """Load and verify; Corrupt, naming the object, unless every byte and the self-test are as at build time.

    What was built for a GPU is not placed on one (`GpuPlacement.place`); without `cpu_twin` it answers nothing yet.
    """
    description, home = read_description(store, collection, ref), ref.home(collection)
    name = paths.segment_file(home, ref.segment_id, paths.INDEX)

    def mapped() -> tuple[LoadedSegment, FaissIndex]:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            rows_path, index_path = pool.map(
                lambda file: verified_file(store, home, description, file, cache_dir), (paths.ROWS, paths.INDEX)
            )
        spec = IndexSpec.from_dict(description.spec)
        rows = Rows(rows_path, description.count, description.dimension, description.rows_per_batch)
        index = load_index(index_path, spec, description.dimension, metric, description.count, name)
        return LoadedSegment(description, rows, index, metric), index

    segment, cpu = opened(mapped, name)
    segment.rows.forget_pages()  # of ids and hashes, which lie all over the file and are in memory now
    _run_self_test(segment, name)
    if segment.spec.device == "gpu":
        segment.searcher.index = TwinIndex(cpu, None, NO_GPU, cpu_twin)
    return segment


def opened(open_files: Callable[[], T], name: str) -> T:
    """What `open_files` returns. A cached file may be deleted by a replica that needs it no more between its
    verification and use: then it is called again. Unavailable, naming the object, where that does not end."""
    for _ in range(OPEN_TRIES):
        with suppress(FileNotFoundError):
            return open_files()
    raise Unavailable(f"{name}: its cached copy keeps vanishing")


def read_description(store: ObjectStore, collection: str, ref: SegmentRef) -> SegmentDescription:
    """What `segment.json` says; Corrupt where it is not the one that the manifest names."""
    key = paths.segment_file(ref.home(collection), ref.segment_id, paths.DESCRIPTION)
    data = store.get(key)
    if checksum_bytes(data) != ref.checksum:
        raise Corrupt(f"{key}: the checksum is not the one in the manifest")
    return SegmentDescription.decode(data, key)


def verified_file(store: ObjectStore, home: str, description: SegmentDescription, name: str, cache_dir: Path) -> Path:
    """A local path of the file: the store's own where it has one, else a copy in the cache named by checksum.

    `home` is the collection that holds it (`SegmentRef.home`).
    """
    key = paths.segment_file(home, description.segment_id, name)
    expected = description.files[name]
    local = store.local_path(key)
    if local is not None:
        verify_file(local, expected, key)
        return local
    cached = cached_path(cache_dir, expected)
    if _is_whole(cached, expected):
        os.utime(cached)  # in use: `sweep_cache` leaves it
    else:
        download_verified(store, key, cached, expected)
    return cached


def sweep_cache(cache_dir: Path, now_s: float) -> None:
    """Delete cached files that nothing has loaded for `CACHE_UNUSED_S`; who has mapped one keeps it."""
    for path in cache_dir.glob("xxh3_128-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < now_s - CACHE_UNUSED_S:
                path.unlink()


def _is_whole(path: Path, expected: FileEntry) -> bool:
    """False where a cached copy is missing, or damaged: the object itself may be sound."""
    try:
        return checksum_file(path) == expected
    except FileNotFoundError:
        return False


def cached_path(cache_dir: Path, entry: FileEntry) -> Path:
    return cache_dir / entry.checksum.replace(":", "-")


def download_verified(store: ObjectStore, key: str, target: Path, expected: FileEntry) -> None:
    """Fetch an object into a local file, which is there once it is whole; Corrupt unless it is as expected."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        checksum = Checksum()
        store.download(key, aside, checksum.add)
        check_entry(checksum.entry, expected, key)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _run_self_test(segment: LoadedSegment, name: str) -> None:
    """Stored vectors must find the neighbours they found when the segment was built."""
    test = segment.description.self_test
    if not test.rows:
        return
    truth, expected = truth_of(test), segment.description.cpu_twin.get("recall", test.recall)
    recall = float(recall_at_k(_self_test_answers(segment, asked_of(test, segment.rows), truth), truth).mean())
    if recall < expected - SLACK:
        raise Corrupt(f"{name}: the self-test found {recall:.3f} of the neighbours, {expected:.3f} when built")


def _self_test_answers(
    segment: LoadedSegment, queries: NDArray[np.float32], truth: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows found, best first. An exact index is asked among the truth and some others: to scan all of it for every
    query would take longer than to read it. What was found among all rows is found among these."""
    width, count = truth.shape[1], segment.description.count
    if not segment.spec.is_exact or segment.description.self_test.recall < 1.0:
        return segment.search(queries, width, SearchParams())[0]
    asked = np.zeros(count, dtype=bool)
    asked[: SELF_TEST_FLOATS // queries.size] = True
    asked[truth[truth >= 0]] = True
    return segment.searcher.index.search(queries, width, {}, RowSelection.of(asked))[0]
