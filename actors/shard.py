"""One replica's work: hold generations of one shard, search and fetch under an immutable view. Runs without Ray."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.segment_loader import LoadedSegment, cached_path, load_segment
from cluster.config import CollectionConfig
from cluster.errors import EaglerayError, Invalid, Unavailable
from cluster.ids import ID_ARROW_TYPE
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaState
from cluster.query import Hits, SearchGroup, ShardSearch
from cluster.segment import ROW_COLUMNS
from cluster.topk import merge_hits


@dataclass(frozen=True)
class ShardView:
    """One generation of the shard; never changes."""

    version: int
    generation: int
    config: CollectionConfig
    segments: tuple[LoadedSegment, ...]

    @property
    def points(self) -> int:
        return sum(segment.description.count for segment in self.segments)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that any segment holds."""
        return tuple(sorted({name for segment in self.segments for name in segment.description.attributes}))


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself. `error` is why it serves nothing, where that is so.

    `points` and `segments` are those of its newest generation; `attributes` are names by generation. `observed` has
    the recall of live queries (`RecallObserver.observed`), for each generation of which some were evaluated.
    """

    state: ReplicaState
    versions: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    points: int = 0
    threads: int = 0
    pid: int = 0
    node: str = ""
    error: str = ""
    segments: tuple[dict[str, Any], ...] = field(default=())
    attributes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    observed: tuple[dict[str, Any], ...] = ()


class Shard:
    """The segments of one shard, by generation. `load` adds a view, `retire` drops old ones."""

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        shard: int,
        cache_dir: Path,
        new_nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._store = store
        self._collection = collection
        self._shard = shard
        self._cache_dir = cache_dir
        self._log = ManifestLog(store, collection, new_nonce)
        self._views: dict[int, ShardView] = {}  # by generation; replaced, never changed in place

    def load(self, version: int | None = None) -> ShardView:
        """Load a manifest version (the newest without one) beside what is served; the view is self-tested."""
        manifest = self._log.newest_live() if version is None else self._log.read(version)
        loaded = {s.description.segment_id: s for view in self._views.values() for s in view.segments}
        segments = tuple(
            loaded.get(ref.segment_id)
            or load_segment(self._store, self._collection, ref, manifest.config.metric, self._cache_dir)
            for ref in self._entry(manifest)
        )
        view = ShardView(manifest.version, manifest.generation, manifest.config, segments)
        self._views = {**self._views, view.generation: view}
        return view

    def _entry(self, manifest: Manifest) -> Sequence[Any]:
        """The shard's segments in a manifest; none where that generation has fewer shards."""
        return manifest.shards[self._shard].segments if self._shard < len(manifest.shards) else ()

    def retire(self, generation: int) -> None:
        """Drop every view older than `generation`, and their cached files that no later view uses."""
        before = self._cached_files()
        self._views = {g: view for g, view in self._views.items() if g >= generation}
        for path in before - self._cached_files():
            path.unlink(missing_ok=True)

    def _cached_files(self) -> set[Path]:
        """Where the files of all views lie if they are cached; equal files are one."""
        segments = (segment for view in self._views.values() for segment in view.segments)
        return {cached_path(self._cache_dir, entry) for s in segments for entry in s.description.files.values()}

    def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        """One `Hits`, or the error of that group alone, per group. Unavailable where the generation is not held."""
        view = self._view(request.generation)
        return tuple(_group_outcome(view, request.vectors, group) for group in request.groups)

    def fetch(self, generation: int, ids: Any, columns: Sequence[str]) -> tuple[NDArray[np.bool_], Any]:
        """(found (n,), table of `columns` for the found ids in their order) for an Arrow array of ids."""
        view = self._view(generation)
        _check_columns(view, columns)
        found = np.zeros(len(ids), dtype=bool)
        parts, positions = [], []
        for segment in view.segments:
            rows = segment.rows.rows_of_ids(ids)
            here = rows >= 0
            if here.any():
                parts.append(pa.table(segment.rows.take(rows[here], columns)))
                positions.append(np.flatnonzero(here))
                found |= here
        if not parts:
            return found, None
        order = np.argsort(np.concatenate(positions))
        return found, pa.concat_tables(parts).take(pa.array(order))

    def status(self) -> ReplicaStatus:
        views = sorted(self._views.values(), key=lambda view: view.generation)
        if not views:
            return ReplicaStatus("failed", error="nothing is loaded")
        return ReplicaStatus(
            "ready",
            tuple(view.version for view in views),
            tuple(view.generation for view in views),
            views[-1].points,
            segments=tuple(_segment_facts(segment) for segment in views[-1].segments),
            attributes={view.generation: view.attributes for view in views},
        )

    def _view(self, generation: int) -> ShardView:
        view = self._views.get(generation)
        if view is None:
            raise Unavailable(f"generation {generation} of {self._collection!r} is not loaded here", 0.1)
        return view


def _group_outcome(view: ShardView, vectors: NDArray[np.float32], group: SearchGroup) -> Hits | EaglerayError:
    try:
        return _search_group(view, vectors, group)
    except EaglerayError as error:
        return error


def _search_group(view: ShardView, vectors: NDArray[np.float32], group: SearchGroup) -> Hits:
    queries = vectors[group.start : group.stop]
    _check_columns(view, group.columns)
    if not view.segments:
        return _no_hits(view.config, len(queries))
    parts = [_segment_hits(segment, queries, group) for segment in view.segments]
    return merge_hits(parts, group.k, view.config.metric)


def _segment_hits(segment: LoadedSegment, queries: NDArray[np.float32], group: SearchGroup) -> Hits:
    labels, scores = segment.search(queries, group.k, group.params)
    found = labels >= 0
    rows = labels[found]
    ids = segment.ids.take(pa.array(rows))
    columns = _columns(segment, rows, group.columns) if group.columns else None
    return Hits(found.sum(axis=1), ids, scores[found], columns)


def _columns(segment: LoadedSegment, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
    """The table of some rows; without rows an empty one, so that the answer's schema does not depend on the data."""
    if len(rows) == 0:
        return segment.rows.schema.empty_table().select(columns)
    return pa.table(segment.rows.take(rows, columns))


def _no_hits(config: CollectionConfig, queries: int) -> Hits:
    ids = pa.array([], type=ID_ARROW_TYPE[config.id_type])
    return Hits(np.zeros(queries, np.int64), ids, np.empty(0, np.float32))


def _check_columns(view: ShardView, columns: Sequence[str]) -> None:
    for segment in view.segments:
        for name in columns:
            if name not in segment.rows.schema.names:
                known = sorted(set(segment.rows.schema.names) - set(ROW_COLUMNS))
                raise Invalid.at("with_attributes", f"no attribute {name!r}; the collection has: {known}")


def _segment_facts(segment: LoadedSegment) -> dict[str, Any]:
    description = segment.description
    return {
        "segment_id": description.segment_id,
        "count": description.count,
        "index_kind": segment.spec.kind,
        "index_params": segment.spec.params,
        "codes": segment.spec.codes,
        "rerank_store": segment.spec.rerank_store,
        "index_bytes": description.files["index.faiss"].size_bytes,
        "rows_bytes": description.files["rows.arrow"].size_bytes,
        "predicted_bytes": segment.spec.predicted_bytes,
        "reason": segment.spec.reason,
        "considered": list(description.considered),
        "operating_points": [vars(point) for point in description.operating_points],
        "attributes": description.attributes,
        "built": description.built,
    }
