"""The sample of recent queries: its bounds, whom it represents, and its copies in the store."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from cluster import paths, recent_queries
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig
from cluster.errors import Corrupt
from cluster.file_store import FileStore
from cluster.memory_store import MemoryStore
from cluster.recent_queries import (
    IMPORT_QUERIES_MAX,
    KEPT_S,
    QueryReservoir,
    QuerySample,
    RecentQueries,
    decode_queries,
    delete_queries,
    encode_queries,
    read_queries,
    store_queries,
)
from tests.fakes import FaultyStore, ManualClock
from tests.unit.actors.points import flipped, keys

L2 = CollectionConfig(4, metric="l2")


def numbered(first: int, count: int, dimension: int = 4) -> NDArray[np.float32]:
    """Vectors (count, dimension) whose every number is their own: first, first + 1, ..."""
    return np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], dimension, axis=1)


def numbers_of(vectors: NDArray[np.float32]) -> list[int]:
    assert (vectors == vectors[:, :1]).all(), "numbers of two vectors were mixed"
    return [int(number) for number in vectors[:, 0]]


def reservoir(capacity: int, seed: int = 0, mean_age_s: float = 1_000.0) -> QueryReservoir:
    return QueryReservoir(capacity, 4, np.random.default_rng(seed), mean_age_s)


# --- the reservoir ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [7, 90, 3], [0, 100, 0]])
def test_reservoir_that_is_not_full_keeps_everything_once(sizes: list[int]) -> None:
    kept, first = reservoir(100), 0
    for number, size in enumerate(sizes):
        kept.offer(numbered(first, size), now_s=float(number))
        first += size
    assert len(kept) == 100
    assert sorted(numbers_of(kept.vectors())) == list(range(100))


@pytest.mark.parametrize("sizes", [[250], [99, 2, 149], [1] * 250, [60, 60, 60, 70], [4_096]])
def test_reservoir_keeps_no_more_than_its_capacity_and_nothing_twice(sizes: list[int]) -> None:
    kept, first = reservoir(100), 0
    for size in sizes:
        kept.offer(numbered(first, size), now_s=5.0)
        first += size
    numbers = numbers_of(kept.vectors())
    assert len(numbers) == len(set(numbers)) == len(kept) == 100
    assert set(numbers) <= set(range(sum(sizes)))
    assert kept.size_bytes == 100 * 4 * 4


@pytest.mark.parametrize("batch", [1, 64, 5_000])
def test_vectors_of_one_time_are_kept_with_equal_probability(batch: int) -> None:
    kept = reservoir(1_000, seed=batch)
    for first in range(0, 10_000, batch):
        kept.offer(numbered(first, min(batch, 10_000 - first)), now_s=0.0)
    tenths = np.bincount(np.array(numbers_of(kept.vectors())) // 1_000, minlength=10)
    assert tenths.sum() == 1_000
    deviation = math.sqrt(1_000 * 0.1 * 0.9 * 0.9)  # hypergeometric
    assert (abs(tenths - 100) < 4 * deviation).all(), tenths


@pytest.mark.parametrize("batch", [1, 50])
def test_share_of_vectors_decays_with_their_age(batch: int) -> None:
    """At a constant rate 1 - exp(-1) of what is kept is younger than the mean age, and exp(-3) older than three."""
    kept, last = reservoir(1_000, seed=1, mean_age_s=1_000.0), 30_000
    for first in range(0, last, batch):
        kept.offer(numbered(first, batch), now_s=first / 5)  # five a second
    ages_s = (last - np.array(numbers_of(kept.vectors()))) / 5
    for bound in (1, 3):
        share, expected = (ages_s < bound * 1_000.0).mean(), 1 - math.exp(-bound)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1_000))


def test_traffic_after_a_long_silence_replaces_what_was_kept() -> None:
    kept = reservoir(100)
    kept.offer(numbered(0, 1_000), now_s=0.0)
    kept.offer(numbered(1_000, 1), now_s=1e9)
    assert numbers_of(kept.vectors()).count(1_000) == 1
    kept.offer(numbered(1_001, 99), now_s=1e9)
    assert sorted(numbers_of(kept.vectors())) == list(range(1_000, 1_100))


def test_reservoir_with_the_same_seed_keeps_the_same() -> None:
    def kept(seed: int) -> list[int]:
        sample = reservoir(50, seed)
        for first in range(0, 1_000, 10):
            sample.offer(numbered(first, 10), now_s=float(first))
        return numbers_of(sample.vectors())

    assert kept(3) == kept(3)
    assert kept(3) != kept(4)


def test_reservoir_keeps_copies_and_gives_copies() -> None:
    kept, offered = reservoir(10), numbered(0, 5)
    kept.offer(offered, now_s=0.0)
    offered[:] = -1.0
    kept.vectors()[:] = -2.0
    assert sorted(numbers_of(kept.vectors())) == [0, 1, 2, 3, 4]


# --- all collections ----------------------------------------------------------------------------------------------


def test_nothing_is_kept_where_none_are_to_be_kept() -> None:
    recent = RecentQueries(0)
    recent.offer("words", numbered(0, 5), "l2")
    assert recent.changed() == []
    assert recent.sample("words") is None


def test_collections_have_samples_of_their_own() -> None:
    recent = RecentQueries(10)
    recent.offer("words", numbered(0, 3), "l2")
    recent.offer("birds", numbered(5, 2, dimension=7), "cosine")
    words, birds = recent.sample("words"), recent.sample("birds")
    assert words is not None
    assert birds is not None
    assert (sorted(numbers_of(words.vectors)), words.metric) == ([0, 1, 2], "l2")
    assert (sorted(numbers_of(birds.vectors)), birds.metric) == ([5, 6], "cosine")


def test_only_samples_that_took_something_since_they_were_stored_are_changed() -> None:
    recent = RecentQueries(10, ManualClock())
    recent.offer("words", numbered(0, 3), "l2")
    sample = recent.sample("words")
    assert sample is not None
    assert recent.changed() == ["words"]
    recent.offer("words", numbered(3, 1), "l2")  # while that sample is being stored
    assert recent.stored("words", sample)
    assert recent.changed() == ["words"]
    sample = recent.sample("words")
    assert sample is not None
    assert recent.stored("words", sample)
    assert recent.changed() == []


def test_collections_that_are_gone_or_another_are_forgotten() -> None:
    recent = RecentQueries(10)
    for name in ("same", "loading", "gone", "wider", "angular"):
        recent.offer(name, numbered(0, 3), "l2")
    sample = recent.sample("gone")
    assert sample is not None
    wider, angular = CollectionConfig(5, metric="l2"), CollectionConfig(4, metric="cosine")
    recent.keep_only({"same": L2, "wider": wider, "angular": angular, "new": L2}, {"loading", "wider"})
    assert recent.changed() == ["same", "loading"]
    assert not recent.stored("gone", sample)


def test_memory_of_one_collection_and_of_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_queries, "SAMPLE_BYTES_MAX", 50 * 16)
    monkeypatch.setattr(recent_queries, "TOTAL_BYTES_MAX", 100 * 16)
    recent = RecentQueries(1_000)
    for name in ("a", "b", "c"):
        recent.offer(name, numbered(0, 200), "l2")
    assert recent.changed() == ["a", "b"]
    sample = recent.sample("a")
    assert sample is not None
    assert len(sample.vectors) == 50
    recent.keep_only({"b": L2, "c": L2}, ())
    recent.offer("c", numbered(0, 200), "l2")
    assert recent.changed() == ["b", "c"]


# --- in the store -------------------------------------------------------------------------------------------------

SAMPLE = QuerySample(np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), "l2")


def test_sample_is_read_back_as_it_was_written() -> None:
    read = decode_queries(encode_queries(SAMPLE), "key")
    np.testing.assert_array_equal(read.vectors, SAMPLE.vectors)
    assert (read.metric, read.vectors.dtype) == ("l2", np.float32)


def test_sample_is_an_arrow_stream_that_others_can_read() -> None:
    table = pa.ipc.open_stream(encode_queries(SAMPLE)).read_all()
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 4)
    assert table["vector"].to_pylist() == SAMPLE.vectors.tolist()


def test_damaged_sample_is_corrupt_or_reads_as_it_was_written() -> None:
    """A flipped bit may hit padding; numbers and metric are never others."""
    data, corrupt = encode_queries(SAMPLE), 0
    for position in range(len(data)):
        try:
            read = decode_queries(flipped(data, position), "the-key")
        except Corrupt:
            corrupt += 1
        else:
            assert read.vectors.tobytes() == SAMPLE.vectors.tobytes()
            assert read.metric == "l2"
    assert corrupt > SAMPLE.vectors.nbytes


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_sample_is_corrupt(share: float) -> None:
    data = encode_queries(SAMPLE)
    with pytest.raises(Corrupt, match="the-key"):
        decode_queries(data[: int(share * (len(data) - 16))], "the-key")


OTHER_BATCHES = {
    "float64": pa.record_batch([vectors_array(SAMPLE.vectors.astype(np.float64))], ["vector"]),
    "float16": pa.record_batch([vectors_array(SAMPLE.vectors.astype(np.float16))], ["vector"]),
    "list": pa.record_batch([pa.array([[1.0, 2.0]], pa.list_(pa.float32()))], ["vector"]),
    "number": pa.record_batch([pa.array([1.0], pa.float32())], ["vector"]),
    "another name": pa.record_batch([vectors_array(SAMPLE.vectors)], ["queries"]),
    "two columns": pa.record_batch([vectors_array(SAMPLE.vectors)] * 2, ["vector", "id"]),
    "no column": pa.record_batch([], []),
    "null": pa.record_batch([pa.array([None], pa.list_(pa.float32(), 2))], ["vector"]),
    "null inside": pa.record_batch([pa.array([[1.0, None]], pa.list_(pa.float32(), 2))], ["vector"]),
    "no numbers": pa.record_batch([pa.array([[]], pa.list_(pa.float32(), 0))], ["vector"]),
    "no checksum": pa.record_batch([vectors_array(SAMPLE.vectors)], ["vector"]),
}


@pytest.mark.parametrize("name", OTHER_BATCHES)
def test_arrow_stream_of_something_else_is_corrupt(name: str) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, OTHER_BATCHES[name].schema) as writer:
        writer.write_batch(OTHER_BATCHES[name])
    with pytest.raises(Corrupt, match="the-key"):
        decode_queries(bytes(sink.getvalue()), "the-key")


def test_sample_that_is_larger_than_any_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_queries(SAMPLE)
    monkeypatch.setattr(recent_queries, "SAMPLE_BYTES_MAX", SAMPLE.vectors.nbytes - 1)
    with pytest.raises(Corrupt, match="480 bytes are more than"):
        decode_queries(data, "the-key")


def put(store: MemoryStore, coordinator: str, sample: QuerySample, collection: str = "words") -> None:
    store.put(paths.recent_queries(collection, coordinator), encode_queries(sample))


def test_samples_of_all_coordinators_are_read_together_and_shuffled() -> None:
    store = MemoryStore()
    put(store, "a", QuerySample(numbered(0, 300), "l2"))
    put(store, "b", QuerySample(numbered(300, 300), "l2"))
    put(store, "a", QuerySample(numbered(600, 5), "l2"), collection="words2")
    read = read_queries(store, "words", L2, seed=1)
    again, other = read_queries(store, "words", L2, seed=1), read_queries(store, "words", L2, seed=2)
    assert read is not None
    assert again is not None
    assert other is not None
    assert sorted(numbers_of(read)) == list(range(600))
    assert numbers_of(read) == numbers_of(again) != numbers_of(other)
    of_a = sum(number < 300 for number in numbers_of(read)[:300])
    assert 100 < of_a < 200, "the halves are of one coordinator each"


def test_newest_samples_are_read_first_and_no_more_than_the_tuner_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = MemoryStore(), ManualClock()
    monkeypatch.setattr("cluster.memory_store.time.time", now)
    for number, coordinator in enumerate(("b", "a", "c")):
        now.advance(1.0)
        put(store, coordinator, QuerySample(numbered(1_000 * number, 600), "l2"))
    read = read_queries(store, "words", L2, seed=1)
    assert read is not None
    assert len(read) == IMPORT_QUERIES_MAX
    coordinators = np.bincount(np.array(numbers_of(read)) // 1_000, minlength=3)
    assert coordinators.tolist() == [0, 400, 600]
    second = [number for number in numbers_of(read) if number < 2_000]
    assert max(second) > 1_400, "the first 400 of its 600 were taken, which are not a random part"


def test_no_samples_are_none() -> None:
    assert read_queries(MemoryStore(), "words", L2, seed=0) is None


def test_samples_that_cannot_be_used_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    put(store, "wider", QuerySample(numbered(0, 9, dimension=5), "l2"))
    put(store, "angular", QuerySample(numbered(0, 9), "cosine"))
    store.put(paths.recent_queries("words", "garbage"), b"garbage")
    store.put(paths.recent_queries("words", "huge"), bytes(recent_queries.SAMPLE_BYTES_MAX + 100_000))
    assert read_queries(store, "words", L2, seed=0) is None
    put(store, "good", QuerySample(numbered(100, 9), "l2"))
    caplog.clear()
    read = read_queries(store, "words", L2, seed=0)
    assert read is not None
    assert sorted(numbers_of(read)) == list(range(100, 109))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    for name in ("wider", "angular", "garbage", "huge"):
        assert paths.recent_queries("words", name) in caplog.text


@pytest.mark.parametrize("at", [1, 2])
def test_store_that_fails_costs_the_queries_and_no_more(at: int, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    put(store, "a", SAMPLE)
    assert read_queries(FaultyStore(store, at), "words", L2, seed=0) is None
    assert "the store failed" in caplog.text


def test_stored_sample_replaces_the_coordinators_last_and_old_ones_of_others_are_deleted() -> None:
    store = MemoryStore()
    for coordinator in ("a", "b"):
        store_queries(store, "words", coordinator, SAMPLE)
    store_queries(store, "birds", "b", SAMPLE)
    newer = QuerySample(numbered(0, 3), "l2")
    store_queries(store, "words", "a", newer)
    key = paths.recent_queries("words", "a")
    assert keys(store, paths.queries_prefix("words")) == [key, paths.recent_queries("words", "b")]
    np.testing.assert_array_equal(decode_queries(store.get(key), key).vectors, newer.vectors)
    (written_s,) = [info.modified_s for info in store.objects(paths.queries_prefix("birds"))]
    store_queries(store, "words", "a", newer, now_s=lambda: written_s + KEPT_S - 1.0)
    assert len(keys(store, paths.queries_prefix("words"))) == 2
    store_queries(OldStore(store, paths.recent_queries("words", "b")), "words", "a", newer)  # type: ignore[arg-type]
    assert keys(store, paths.queries_prefix("words")) == [key]
    assert len(keys(store, paths.queries_prefix("birds"))) == 1


class OldStore:
    """Says that one object was written long ago."""

    def __init__(self, inner: MemoryStore, key: str) -> None:
        self._inner = inner
        self._key = key

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def objects(self, prefix: str) -> list[object]:
        infos = self._inner.objects(prefix)
        return [replace(info, modified_s=info.modified_s - 2 * KEPT_S * (info.key == self._key)) for info in infos]


def test_deleting_queries_leaves_those_of_other_collections(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    delete_queries(store, "words")  # none yet
    for collection in ("words", "words2"):
        for coordinator in ("a", "b"):
            store_queries(store, collection, coordinator, SAMPLE)
    delete_queries(store, "words")
    assert keys(store, "collections/") == [paths.recent_queries("words2", name) for name in ("a", "b")]  # type: ignore[arg-type]
