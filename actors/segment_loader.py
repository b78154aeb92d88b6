"""Brings a segment of a manifest into this process: fetch or find its files, verify, map, self-test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil, log10
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.faiss_index import SearchableIndex, load_index
from actors.segment_searcher import SegmentSearcher
from actors.ties import found_with_ties
from cluster import paths
from cluster.config import Metric
from cluster.errors import Corrupt, Invalid, Unavailable
from cluster.index_spec import FAR_EF_SEARCH, FAR_SCORE, IndexSpec
from cluster.manifest import SegmentRef
from cluster.object_store import ObjectStore
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import (
    Checksum,
    FileEntry,
    OperatingPoint,
    Rows,
    SegmentDescription,
    check_entry,
    checksum_bytes,
    checksum_file,
    verify_file,
)
from cluster.topk import recall_at_k

SELF_TEST_SLACK = 0.02  # another instruction set may order near-equal distances differently
SELF_TEST_FLOATS = 20_000_000  # that the self-test of an exact index scans: some milliseconds
FILES_AT_ONCE = 4
OPEN_TRIES = 3
CACHE_UNUSED_S = 7 * 24 * 3600.0
T = TypeVar("T")


class LoadedSegment:
    """One searchable segment: memory-mapped rows and index, and the ids in memory."""

    def __init__(self, description: SegmentDescription, rows: Rows, index: SearchableIndex, metric: Metric) -> None:
        self.description = description
        self.rows = rows
        self.metric = metric
        self.spec = IndexSpec.from_dict(description.spec)
        self.ids = rows.ids()
        self._id_numbers = self.ids.to_numpy() if pa.types.is_integer(self.ids.type) else None
        self.searcher = SegmentSearcher(index, self.spec, rows, metric)

    def ids_of(self, rows: NDArray[np.int64]) -> Any:
        """The ids of some rows (n,) as an Arrow array."""
        if self._id_numbers is None:
            return self.ids.take(pa.array(rows))
        return pa.array(self._id_numbers[rows])

    def search(
        self, queries: NDArray[np.float32], k: int, params: SearchParams, selection: RowSelection | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(rows, scores), both (n, width), best first, row -1 where there is none; rows of the selection only.

        Width is min(k, count), or more where points tie with the k-th: the caller orders them by id and cuts.
        """
        return found_with_ties(lambda asked, width: self._found(asked, width, k, params, selection), queries, k)

    def _found(
        self,
        queries: NDArray[np.float32],
        width: int,
        k: int,
        params: SearchParams,
        selection: RowSelection | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best `width` rows by brute force, by the operating point, which always fills up k, or by raw knobs.

        A raw knob replaces that of the operating point; the answer then is as it comes.
        """
        if params.exact:
            return self.searcher.exact(queries, width, selection)
        given = params.given
        knobs = widened(self.operating_point_for(params.target_recall).params, k) | given
        if "ef_search" in given:  # for every query, however far it is
            knobs = {name: value for name, value in knobs.items() if name not in (FAR_EF_SEARCH, FAR_SCORE)}
        rows, scores = self.searcher.search(queries, width, knobs, selection)
        if given or not np.count_nonzero(rows < 0):
            return rows, scores
        wanted = min(k, rows.shape[1], selection.kept if selection else rows.shape[1])
        short: NDArray[np.bool_] = np.asarray((rows[:, :wanted] < 0).any(axis=1))
        if short.any():  # the tuned lists hold fewer points than asked for, or a graph reached fewer
            if self.spec.exhaustive_params is not None and selection is None:
                knobs = knobs | self.spec.exhaustive_params
                more = self.searcher.search(queries[short], width, knobs)
            else:
                more = self.searcher.exact(queries[short], width, selection)
            columns = more[0].shape[1]
            rows[short, :columns], scores[short, :columns] = more
        return rows, scores

    def operating_point_for(self, target_recall: float | None) -> OperatingPoint:
        """The cheapest tuned point for a target: the lowest that is no lower; Invalid above the highest that was met.

        None takes the collection's own.
        """
        if target_recall is None or self.spec.is_exact:
            return self.operating_point
        points = sorted(self.description.operating_points, key=lambda point: point.target_recall)
        for point in points:
            if point.target_recall >= target_recall and point.met:
                return point
        met = [point.target_recall for point in points if point.met]
        reached = f"up to {max(met):g}" if met else "none"
        raise Invalid.at(
            "params.target_recall", f"{target_recall:g} is not reached here; tuned are targets {reached}: or ask exact"
        )

    @property
    def operating_point(self) -> OperatingPoint:
        """The tuned point of the collection's own target."""
        return self.description.operating_points[0]


def widened(params: dict[str, float], k: int) -> dict[str, float]:
    """Tuned parameters, which hold for k = 10, for a larger k (docs/decisions/0002-index-policy.md)."""
    if k <= 10:
        return params
    wider = dict(params)
    for name in ("ef_search", FAR_EF_SEARCH):
        if name in params:
            wider[name] = k + params[name]
    if "nprobe" in params:
        wider["nprobe"] = ceil(params["nprobe"] * (1.0 + log10(k / 10.0)))
    return wider


def load_segment(
    store: ObjectStore, collection: str, ref: SegmentRef, metric: Metric, cache_dir: Path
) -> LoadedSegment:
    """Load and verify; Corrupt, naming the object, unless every byte and the self-test are as at build time."""
    description, home = read_description(store, collection, ref), ref.home(collection)
    name = paths.segment_file(home, ref.segment_id, paths.INDEX)

    def mapped() -> LoadedSegment:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            rows_path, index_path = pool.map(
                lambda file: verified_file(store, home, description, file, cache_dir), (paths.ROWS, paths.INDEX)
            )
        spec = IndexSpec.from_dict(description.spec)
        rows = Rows(rows_path, description.count, description.dimension, description.rows_per_batch)
        index = load_index(index_path, spec, description.dimension, metric, description.count, name)
        return LoadedSegment(description, rows, index, metric)

    segment = opened(mapped, name)
    segment.rows.forget_pages()  # of ids and hashes, which lie all over the file and are in memory now
    _run_self_test(segment, name)
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
        _download(store, key, cached, expected)
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


def _download(store: ObjectStore, key: str, target: Path, expected: FileEntry) -> None:
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
    width = max(len(line) for line in test.truth)
    truth = np.full((len(test.rows), width), -1, dtype=np.int64)
    for position, line in enumerate(test.truth):
        truth[position, : len(line)] = line
    queries = segment.rows.vectors(test.rows[0], test.rows[-1] + 1)
    recall = float(recall_at_k(_self_test_answers(segment, queries, truth), truth).mean())
    if recall < test.recall - SELF_TEST_SLACK:
        raise Corrupt(f"{name}: the self-test found {recall:.3f} of the neighbours, {test.recall:.3f} when built")


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
