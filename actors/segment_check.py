"""Whether stored segments are what they must be: in order, in the right shard, no id live twice; and their recall."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.segment_loader import LoadedSegment, cached_path, download_verified
from actors.segment_rows import HashRange, LiveRows, SegmentPart
from actors.tuner import TUNING_K
from cluster import paths
from cluster.config import CollectionConfig, Metric
from cluster.errors import Corrupt
from cluster.ids import hash_ids
from cluster.object_store import ObjectStore
from cluster.query import SearchParams
from cluster.routing import Routing, slots_of_hashes
from cluster.row_selection import RowSelection
from cluster.segment import Checksum, Rows, SegmentDescription, check_entry
from cluster.topk import smaller_is_better

FREE_SHARE = 0.1  # of the disk of the cache that stays free of files which are kept only to save a second fetch
ROWS_AT_ONCE = 1_000_000  # ids that are compared with each other: 40 bytes each
UNIT_SLACK = 1e-2  # of a vector's length under cosine: float16 rounds it
TIE_SLACK = 1e-5  # relative: the same distance, computed in another order

Vectors = NDArray[np.float32]


def verify_stored(store: ObjectStore, home: str, description: SegmentDescription, cache_dir: Path) -> None:
    """Corrupt unless the store itself holds the files as they were written, whatever copies are cached here.

    Files that the store has locally are verified whenever they are opened. What is read of others is kept in the cache,
    where there is room: whoever opens them next does not fetch them again.
    """
    for name, expected in description.files.items():
        key = paths.segment_file(home, description.segment_id, name)
        if store.local_path(key) is not None:
            continue
        cached = cached_path(cache_dir, expected)
        if not cached.exists() and _has_room(cache_dir, expected.size_bytes):
            download_verified(store, key, cached, expected)
            continue
        checksum = Checksum()
        store.download(key, Path(os.devnull), checksum.add)
        check_entry(checksum.entry, expected, key)


def _has_room(cache_dir: Path, size_bytes: int) -> bool:
    """Whether so much less leaves free what others write meanwhile."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(cache_dir)
    return disk.free - size_bytes >= FREE_SHARE * disk.total


def wrong_rows(rows: Rows, config: CollectionConfig, routing: Routing, shard: int) -> Iterator[str]:
    """What is wrong with a segment's rows by themselves, each kind of problem once; block by block."""
    told: set[str] = set()
    last: tuple[int, int | str] | None = None
    for start, vectors in rows.blocks():
        batch = rows.take(np.arange(start, start + len(vectors)), ["id", "id_hash"])
        ids, hashes = batch.column("id"), batch.column("id_hash").to_numpy()
        for kind, at in _wrong_in_block(ids, hashes, vectors, config, routing, shard, last):
            if kind not in told:
                told.add(kind)
                yield f"row {start + at}: {kind}"
        last = int(hashes[-1]), ids[len(ids) - 1].as_py()
        rows.forget_pages()


def _wrong_in_block(
    ids: pa.Array,
    hashes: NDArray[np.uint64],
    vectors: Vectors,
    config: CollectionConfig,
    routing: Routing,
    shard: int,
    last: tuple[int, int | str] | None,
) -> Iterator[tuple[str, int]]:
    """(problem, the first row of the block that has it). `last` is the (hash, id) before the block."""
    norms = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    before = np.concatenate([hashes[:1] if last is None else np.array([last[0]], np.uint64), hashes[:-1]])
    wrong = {
        "the stored hash is not that of the id": hash_ids(ids) != hashes,
        "the rows are not in the order of their hashes": before > hashes,
        f"the id belongs to another shard than {shard}": slots_of_hashes(hashes, routing.shards) != shard,
        "the vector has a number that is not finite": ~np.isfinite(norms),
    }
    if config.metric == "cosine":
        wrong["the vector is not of length one"] = np.isfinite(norms) & (np.abs(norms - 1.0) > UNIT_SLACK)
    for kind, rows in wrong.items():
        if rows.any():
            yield kind, int(np.argmax(rows))
    for at in np.flatnonzero(before == hashes):
        if at == 0 and last is None:
            continue
        if not (ids[int(at) - 1].as_py() if at else last[1]) < ids[int(at)].as_py():  # type: ignore[index]
            yield "the id is there twice, or not in order after one of the same hash", int(at)
            return


def live_twice(parts: Sequence[SegmentPart], shard: int, shards: int) -> str | None:
    """Which id is live in two segments of a shard, if one is; `ROWS_AT_ONCE` rows are looked at at a time."""
    slots = max(1, ceil(sum(part.ref.count for part in parts) / ROWS_AT_ONCE))
    for slot in range(slots):
        hashes = HashRange.of_slot(shard * slots + slot, shards * slots)
        try:
            LiveRows([SegmentPart(part.ref, part.rows, part.deleted, hashes.rows(part.rows)) for part in parts])
        except Corrupt as error:
            return str(error)
    return None


def sampled_vectors(parts: Sequence[SegmentPart], count: int, seed: int) -> Vectors:
    """Up to `count` live vectors, (n, dimension), drawn evenly from all segments of a shard."""
    random = np.random.default_rng(seed)
    live = [part.live for part in parts]
    total = sum(map(len, live))
    taken = np.sort(random.choice(total, min(count, total), replace=False)) if total else np.empty(0, np.int64)
    found, first = [], 0
    for part, rows in zip(parts, live, strict=True):
        inside = taken[(taken >= first) & (taken < first + len(rows))] - first
        first += len(rows)
        if len(inside):
            found.append(part.rows.gather_vectors(rows[inside]))
    return np.concatenate(found) if found else np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Answers:
    """The nearest ten of each query: ids as lists, None where there is none; scores (n, 10), there the worst ones."""

    ids: list[list[int | str | None]]
    scores: Vectors


@dataclass(frozen=True, eq=False)
class Measured:
    """What a segment's index finds of its live rows, and what is there."""

    found: Answers
    truth: Answers


def measured(segment: LoadedSegment, deleted: NDArray[np.int64], queries: Vectors) -> Measured:
    """Search at the collection's operating point, and exactly."""
    kept = np.ones(segment.rows.count, dtype=bool)
    kept[deleted] = False
    selection = RowSelection.of(kept) if len(deleted) else None
    rows, scores = segment.search(queries, TUNING_K, SearchParams(), selection)
    found = _answers(segment, rows[:, :TUNING_K], scores[:, :TUNING_K])
    true_rows, true_scores = exact_search(queries, segment.rows.blocks(), TUNING_K, segment.metric, selection)
    segment.rows.forget_pages()
    return Measured(found, _answers(segment, true_rows, true_scores))


def _answers(segment: LoadedSegment, rows: NDArray[np.int64], scores: Vectors) -> Answers:
    worst = np.float32(np.inf if smaller_is_better(segment.metric) else -np.inf)
    wide = np.full((len(rows), TUNING_K), worst, dtype=np.float32)
    wide[:, : rows.shape[1]] = np.where(rows < 0, worst, scores)
    ids = segment.ids_of(np.maximum(rows, 0).reshape(-1)).to_pylist()
    lines = np.where(rows >= 0, np.arange(rows.size).reshape(rows.shape), -1)
    return Answers([[ids[at] if at >= 0 else None for at in line] for line in lines.tolist()], wide)


def merged(parts: Sequence[Answers], metric: Metric) -> Answers:
    """The nearest ten of each query over disjoint sets of points."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    order = np.argsort(scores if smaller_is_better(metric) else -scores, axis=1, kind="stable")[:, :TUNING_K]
    lines = []
    for query, places in enumerate(order):
        ids = [point for part in parts for point in _filled(part.ids[query])]
        lines.append([ids[place] for place in places])
    return Answers(lines, np.take_along_axis(scores, order, 1))


def _filled(line: list[int | str | None]) -> list[int | str | None]:
    return line + [None] * (TUNING_K - len(line))


def recalls(found: Answers, truth: Answers, metric: Metric) -> NDArray[np.float64]:
    """Recall@10 of each query. A hit that is as near as the tenth true one counts: which of them is true is chance."""
    sign = 1.0 if smaller_is_better(metric) else -1.0
    shares = []
    for query, true_ids in enumerate(truth.ids):
        wanted = [point for point in true_ids if point is not None]
        if not wanted:
            shares.append(1.0)
            continue
        tenth = sign * float(truth.scores[query, len(wanted) - 1])
        near = sign * found.scores[query] <= tenth + TIE_SLACK * abs(tenth)
        hits = sum(
            point is not None and (point in wanted or bool(near[place])) for place, point in enumerate(found.ids[query])
        )
        shares.append(min(hits, len(wanted)) / len(wanted))
    return np.array(shares)
