"""Recent real queries of each collection: a bounded sample in a coordinator's memory, and its copies in the store.

Imports tune on them. The sample decays by time: an answered vector weighs exp(-age / MEAN_AGE_S), so that what is
kept follows the traffic of the last day or so, however dense it was.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster import paths
from cluster.arrow_rows import stream_of, vectors_array, vectors_view
from cluster.config import CollectionConfig, Metric
from cluster.errors import Corrupt, EaglerayError
from cluster.object_store import ObjectInfo, ObjectStore
from cluster.segment import checksum_bytes

FORMAT = b"1"
MEAN_AGE_S = 24 * 3600.0  # long enough that no hour of the day is missing
SAMPLE_BYTES_MAX = 32 * 1024**2  # of one collection: 1,000 vectors up to 8,388 dimensions
TOTAL_BYTES_MAX = 256 * 1024**2  # of all collections in one coordinator
IMPORT_QUERIES_MAX = 1_000  # as many as the tuner takes
OBJECT_OVERHEAD_MAX = 64 * 1024  # of an object beyond its vectors
KEPT_S = 7 * 24 * 3600.0  # samples of coordinators that are gone, or idle, are deleted after that
UNIFORM_EDGE = 1e-12  # keeps uniform numbers off 0 and 1, whose logarithms are infinite
logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


class QueryReservoir:
    """Up to `capacity` vectors (capacity, dimension) float32: a weighted random sample of all that were offered.

    Weights are exp(time / mean_age_s) at arrival, which orders vectors as decaying ones would at any later time
    (Cormode, Shkapenyuk, Srivastava, Xu: Forward decay, ICDE 2009). A vector's key is the logarithm of its weight plus
    a Gumbel number, and the largest keys are kept (Efraimidis, Spirakis: Weighted random sampling with a reservoir,
    IPL 2006, in logarithms). How many of a batch exceed the least key that is kept is one binomial number, so that a
    full reservoir looks at no vector which it does not take.
    """

    def __init__(
        self, capacity: int, dimension: int, random: np.random.Generator, mean_age_s: float = MEAN_AGE_S
    ) -> None:
        self._vectors = np.empty((capacity, dimension), dtype=np.float32)
        self._keys = np.full(capacity, -np.inf)
        self._least = -math.inf
        self._random = random
        self._mean_age_s = mean_age_s
        self.dimension = dimension
        self.taken = 0  # vectors that were ever taken

    def __len__(self) -> int:
        return min(self.taken, len(self._keys))

    @property
    def size_bytes(self) -> int:
        """What it takes once it is full."""
        return self._vectors.nbytes

    def offer(self, vectors: Vectors, now_s: float) -> None:
        """Take some of `vectors` (n, dimension), answered at `now_s` of a clock that never goes back."""
        log_weight = now_s / self._mean_age_s
        hazard = math.inf if self._least == -math.inf else math.exp(min(700.0, log_weight - self._least))
        share = -math.expm1(-hazard)  # of Gumbel numbers over the least key
        count = int(self._random.binomial(len(vectors), share))
        if count:
            uniform = np.clip(self._random.random(count), UNIFORM_EDGE, 1.0 - UNIFORM_EDGE)
            keys = log_weight - np.log(-np.log1p(-uniform * share))  # Gumbel numbers, given that they are over it
            self._take(vectors, self._random.choice(len(vectors), count, replace=False), keys)

    def _take(self, vectors: Vectors, rows: NDArray[np.int64], keys: NDArray[np.float64]) -> None:
        """Keep the largest of the old and the new keys."""
        capacity = len(self._keys)
        kept = np.argpartition(np.concatenate([self._keys, keys]), len(keys))[len(keys) :]
        new = kept[kept >= capacity] - capacity
        gone = np.ones(capacity, dtype=bool)
        gone[kept[kept < capacity]] = False
        places = np.flatnonzero(gone)
        self._vectors[places] = vectors[rows[new]]
        self._keys[places] = keys[new]
        self._least = float(self._keys.min())
        self.taken += len(new)

    def vectors(self) -> Vectors:
        """A copy of what is kept, shape (len, dimension)."""
        return self._vectors[self._keys > -np.inf]


@dataclass
class _Kept:
    reservoir: QueryReservoir
    metric: Metric
    stored: int = 0  # the reservoir's `taken` when it was last stored


@dataclass(frozen=True, eq=False)
class QuerySample:
    """A copy of what is kept of one collection: vectors (n, dimension) as searched. `taken` tells it from others."""

    vectors: Vectors
    metric: Metric
    taken: int = 0


class RecentQueries:
    """A reservoir per collection, bounded together. With `capacity` 0 nothing is kept. Belongs to one thread."""

    def __init__(
        self, capacity: int, clock: Callable[[], float] = time.monotonic, random: np.random.Generator | None = None
    ) -> None:
        self._capacity = capacity
        self._clock = clock
        self._random = random or np.random.default_rng()
        self._kept: dict[str, _Kept] = {}

    def offer(self, collection: str, vectors: Vectors, metric: Metric) -> None:
        """Vectors (n, dimension) as they were searched: of length one under cosine."""
        if not self._capacity:
            return
        kept = self._kept.get(collection) or self._new(collection, vectors.shape[1], metric)
        if kept is not None:
            kept.reservoir.offer(vectors, self._clock())

    def _new(self, collection: str, dimension: int, metric: Metric) -> _Kept | None:
        """None where the others leave no memory: what comes later is tuned without real queries."""
        capacity = max(1, min(self._capacity, SAMPLE_BYTES_MAX // (4 * dimension)))
        used = sum(kept.reservoir.size_bytes for kept in self._kept.values())
        if used + capacity * dimension * 4 > TOTAL_BYTES_MAX:
            return None
        self._kept[collection] = _Kept(QueryReservoir(capacity, dimension, self._random), metric)
        return self._kept[collection]

    def keep_only(self, served: Mapping[str, CollectionConfig], unready: Collection[str]) -> None:
        """Forget collections that are gone, and those whose name another one has now."""
        for name, kept in list(self._kept.items()):
            config = served.get(name)
            if config is None and name in unready:
                continue
            if config is None or (config.dimension, config.metric) != (kept.reservoir.dimension, kept.metric):
                del self._kept[name]

    def changed(self) -> list[str]:
        """Collections of which a vector was taken since they were `stored`."""
        return [name for name, kept in self._kept.items() if kept.reservoir.taken != kept.stored]

    def sample(self, collection: str) -> QuerySample | None:
        """None where nothing is kept of the collection."""
        kept = self._kept.get(collection)
        return QuerySample(kept.reservoir.vectors(), kept.metric, kept.reservoir.taken) if kept else None

    def stored(self, collection: str, sample: QuerySample) -> bool:
        """Note that a sample was stored; False where the collection was forgotten meanwhile."""
        kept = self._kept.get(collection)
        if kept is not None:
            kept.stored = sample.taken
        return kept is not None


# --- in the store -------------------------------------------------------------------------------------------------


def encode_queries(sample: QuerySample) -> bytes:
    """An Arrow stream of one batch with the column `vector`; metric and checksum are in the schema's metadata."""
    metadata = {"format": FORMAT, "metric": sample.metric, "checksum": checksum_bytes(sample.vectors.tobytes())}
    batch = pa.record_batch([vectors_array(sample.vectors)], names=["vector"]).replace_schema_metadata(metadata)
    return bytes(stream_of(batch))


def decode_queries(data: bytes, key: str) -> QuerySample:
    """Corrupt, naming the object, where the bytes are not what was written."""
    try:
        batch = pa.ipc.open_stream(data).read_next_batch()
        batch.validate(full=True)
        metadata = dict(batch.schema.metadata or {})
        vectors = _vectors_of(batch)
    except (pa.ArrowException, OSError, StopIteration, ValueError) as error:
        raise Corrupt(f"{key}: not a sample of queries: {error!r}") from error
    if metadata.get(b"format") != FORMAT:
        raise Corrupt(f"{key}: format {metadata.get(b'format')!r}, this version reads {FORMAT!r}")
    if metadata.get(b"checksum") != checksum_bytes(vectors.tobytes()).encode():
        raise Corrupt(f"{key}: the checksum does not match the content")
    metric = metadata.get(b"metric", b"").decode("ascii", "replace")
    return QuerySample(vectors, _metric(metric, key))


def _vectors_of(batch: Any) -> Vectors:
    """ValueError where the batch has another form than `encode_queries` gives it."""
    if batch.schema.names != ["vector"]:
        raise ValueError(f"its columns are {batch.schema.names}")
    column = batch.column(0)
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32():
        raise ValueError(f"it holds {column.type}")
    if column.null_count or column.flatten().null_count or column.type.list_size < 1:
        raise ValueError("it holds nulls, or vectors of no numbers")
    if column.nbytes > SAMPLE_BYTES_MAX:
        raise ValueError(f"its {column.nbytes} bytes are more than a sample ever has")
    return vectors_view(column)


def _metric(name: str, key: str) -> Metric:
    for metric in get_args(Metric):
        if name == metric:
            return metric  # type: ignore[no-any-return]
    raise Corrupt(f"{key}: unknown metric {name!r}")


def store_queries(
    store: ObjectStore, collection: str, coordinator: str, sample: QuerySample, now_s: Callable[[], float] = time.time
) -> None:
    """Overwrite what this coordinator left before; delete what others left long ago."""
    store.put(paths.recent_queries(collection, coordinator), encode_queries(sample))
    for info in list(store.objects(paths.queries_prefix(collection))):
        if info.modified_s < now_s() - KEPT_S:
            store.delete(info.key)


def delete_queries(store: ObjectStore, collection: str) -> None:
    """Delete what all coordinators left of a collection."""
    for info in list(store.objects(paths.queries_prefix(collection))):
        store.delete(info.key)


def read_queries(store: ObjectStore, collection: str, config: CollectionConfig, seed: int) -> Vectors | None:
    """Up to `IMPORT_QUERIES_MAX` vectors (n, dimension) that coordinators left, the newest samples', shuffled.

    Never fails: what cannot be read, or is of another dimension or metric, is logged and left out. None without any.
    """
    most = max(1, min(IMPORT_QUERIES_MAX, SAMPLE_BYTES_MAX // (4 * config.dimension)))
    random = np.random.default_rng(seed)
    parts: list[Vectors] = []
    for info in _newest_first(store, collection):
        missing = most - sum(map(len, parts))
        if missing <= 0:
            break
        sample = _read_sample(store, info, config)
        if sample is not None:
            parts.append(random.permutation(sample.vectors)[:missing])
    return random.permutation(np.concatenate(parts)) if parts else None


def _newest_first(store: ObjectStore, collection: str) -> list[ObjectInfo]:
    try:
        found = list(store.objects(paths.queries_prefix(collection)))
    except EaglerayError as error:
        logger.warning("recent queries of %r are not tuned on: %s", collection, error)
        return []
    return sorted(found, key=lambda info: info.modified_s, reverse=True)


def _read_sample(store: ObjectStore, info: ObjectInfo, config: CollectionConfig) -> QuerySample | None:
    """None, and a warning, where the sample is of no use."""
    try:
        if info.size_bytes > SAMPLE_BYTES_MAX + OBJECT_OVERHEAD_MAX:
            raise Corrupt(f"{info.key}: {info.size_bytes} bytes are more than a sample of queries has")
        sample = decode_queries(store.get(info.key), info.key)
        form = (sample.vectors.shape[1], sample.metric)
        if form != (config.dimension, config.metric):
            raise Corrupt(f"{info.key}: holds queries of {form}, the collection has {config.dimension, config.metric}")
    except EaglerayError as error:
        logger.warning("a sample of recent queries is left out: %s", error)
        return None
    return sample
