"""Messages between coordinator and replica: nothing is lost, and what comes in wrong breaks no more than its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import shard_messages as messages
from actors.shard_messages import Message
from cluster.arrow_rows import vectors_array
from cluster.errors import EaglerayError, Exhausted, Fenced, Invalid, Unavailable
from cluster.query import Fetched, Hits, SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome

TABLE = pa.table({"name": ["a", None, "ü"], "vector": vectors_array(np.ones((3, 2), np.float32))})
INTS = Hits(np.array([1, 0, 2]), pa.array([5, 6, 7]), np.array([1, 2, 3], np.float32), None, 9)
WORDS = Hits(np.array([3]), pa.array(["a", "b", "c"]), np.array([1, 2, 3], np.float32), TABLE, 9)
GROUP = SearchGroup(0, 2, 10, SearchParams(rerank=2.0), ("name",))
SEARCH = ShardSearch(3, np.arange(8, dtype=np.float32).reshape(2, 4), (GROUP, GROUP), 1.5, 7)

Decode = Callable[[memoryview, memoryview], Any]
SAMPLES: dict[str, tuple[Message, Decode]] = {
    "search": (messages.encode_search(SEARCH), lambda head, body: messages.decode_search(head, body, 1.0)),
    "fetch": (messages.encode_fetch(1, pa.array(["a", "b"]), ["x"], 2), messages.decode_fetch),
    "writes": (
        messages.encode_writes([PointWrite(pa.record_batch({"id": [1, 2]})), PointWrite(deletes=pa.array(["a"]))]),
        messages.decode_writes,
    ),
    "outcomes": (messages.encode_outcomes([INTS, WORDS, Fenced("no")]), messages.decode_outcomes),
    "fetched": (messages.encode_fetched(Fetched(np.array([True, False]), TABLE, 3)), messages.decode_fetched),
    "written": (messages.encode_written([WriteOutcome(1, 2), Exhausted("full", 0.5)]), messages.decode_written),
    "error": (messages.encode_error(Unavailable("no")), lambda head, _: messages.decode_error(head)),
}


def views(head: bytes, body: list[Any]) -> tuple[memoryview, memoryview]:
    return memoryview(head), memoryview(b"".join(body))


def test_a_search_is_sent_whole() -> None:
    assert [f.name for f in fields(ShardSearch)] == ["generation", "vectors", "groups", "timeout_s", "min_lsn"]
    found = messages.decode_search(*views(*messages.encode_search(SEARCH)), 1.5)
    assert np.array_equal(found.vectors, SEARCH.vectors)
    assert (found.generation, found.groups, found.timeout_s, found.min_lsn) == (3, SEARCH.groups, 1.5, 7)


def test_vectors_are_looked_at_where_they_were_received() -> None:
    head, body = views(*messages.encode_search(SEARCH))
    assert np.shares_memory(messages.decode_search(head, body, 1.0).vectors, np.frombuffer(body, np.uint8))


def test_vectors_that_are_not_contiguous_are_sent_in_order() -> None:
    request = ShardSearch(1, np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2], (), 1.0)
    assert messages.decode_search(*views(*messages.encode_search(request)), 1.0).vectors.tolist() == [
        [0, 2], [4, 6], [8, 10]]  # fmt: skip


def test_write_of_several_batches_is_refused_rather_than_cut() -> None:
    batch = pa.record_batch({"id": [1, 2]})
    message = messages.encode_writes([PointWrite(pa.Table.from_batches([batch, batch]))])
    with pytest.raises(Invalid, match="more than one record batch came"):
        messages.decode_writes(*views(*message))


def test_numpy_numbers_in_a_request_are_numbers() -> None:
    group = SearchGroup(np.int64(0), np.int64(2), np.int32(10), SearchParams(rerank=np.float64(1.5)))  # type: ignore[arg-type]
    request = ShardSearch(np.int64(3), SEARCH.vectors, (group,), 1.0, np.int64(4))  # type: ignore[arg-type]
    found = messages.decode_search(*views(*messages.encode_search(request)), 1.0)
    assert (found.groups, found.min_lsn) == ((SearchGroup(0, 2, 10, SearchParams(rerank=1.5)),), 4)


def test_hits_are_sent_whole() -> None:
    assert [f.name for f in fields(Hits)] == ["counts", "ids", "scores", "columns", "lsn", "degraded"]
    for hits in (INTS, WORDS, replace(INTS, degraded="cpu")):
        (found,) = messages.decode_outcomes(*views(*messages.encode_outcomes([hits])))
        assert isinstance(found, Hits)
        assert (found.counts.tolist(), found.scores.tolist()) == (hits.counts.tolist(), hits.scores.tolist())
        assert (found.ids, found.columns, found.lsn) == (hits.ids, hits.columns, 9)
        assert found.degraded == hits.degraded


def test_hits_that_are_slices_are_sent_as_they_are_seen() -> None:
    hits = Hits(np.array([2]), pa.array([5, 6, 7]).slice(1), np.array([1, 2, 3], np.float32)[1:], TABLE.slice(1))
    (found,) = messages.decode_outcomes(*views(*messages.encode_outcomes([hits])))
    assert isinstance(found, Hits)
    assert (found.ids.to_pylist(), found.scores.tolist(), found.columns["name"].to_pylist()) == (
        [6, 7], [2.0, 3.0], [None, "ü"])  # fmt: skip


def test_written_points_keep_their_types() -> None:
    batch = pa.record_batch(
        [pa.array([1, 2]), vectors_array(np.ones((2, 3), np.float16)), pa.array(["a", "b"]).dictionary_encode()],
        schema=pa.schema(
            [("id", pa.int64()), ("vector", pa.list_(pa.float16(), 3)), ("tag", pa.dictionary(pa.int32(), pa.string()))]
        ),
    )
    (found,) = messages.decode_writes(*views(*messages.encode_writes([PointWrite(batch, shards=3)])))
    assert found.shards == 3
    assert isinstance(found.upserts, pa.RecordBatch)
    assert found.upserts == batch
    assert found.upserts.schema == batch.schema


@pytest.mark.parametrize("name", SAMPLES)
@settings(deadline=None)
@given(data=st.data())
def test_changed_messages_are_read_or_refused(name: str, data: st.DataObject) -> None:
    (head, body), decode = SAMPLES[name]
    changed = [bytearray(head), bytearray(b"".join(body))]
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from([one for one in changed if one]))
        at = data.draw(st.integers(0, len(part) - 1))
        part[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[1][data.draw(st.integers(0, len(changed[1]))) :]
    try:
        decode(memoryview(bytes(changed[0])), memoryview(bytes(changed[1])))
    except EaglerayError as error:
        assert "malformed" in str(error)  # noqa: PT017  # a change that means something else is fine, too


@pytest.mark.parametrize("name", SAMPLES)
@settings(deadline=None)
@given(head=st.binary(max_size=80), body=st.binary(max_size=200))
def test_random_bytes_are_refused(name: str, head: bytes, body: bytes) -> None:
    try:
        SAMPLES[name][1](memoryview(head), memoryview(body))
    except EaglerayError as error:
        assert "malformed" in str(error)  # noqa: PT017  # `b"\x90"` is an empty answer


@pytest.mark.parametrize(
    ("groups", "rows"), [((SearchGroup(0, 3, 1, SearchParams()),), 2), ((SearchGroup(-1, 1, 1, SearchParams()),), 2)]
)
def test_group_outside_of_the_vectors_is_invalid(groups: tuple[SearchGroup, ...], rows: int) -> None:
    request = ShardSearch(1, np.zeros((rows, 2), np.float32), groups)
    with pytest.raises(Invalid, match="malformed search"):
        messages.decode_search(*views(*messages.encode_search(request)), 1.0)


def test_deeply_nested_head_is_refused() -> None:
    with pytest.raises(Unavailable, match="malformed"):
        messages.decode_error(memoryview(b"\x91" * 100_000))


def test_error_of_an_unknown_kind_is_the_root_of_errors() -> None:
    class Newer(EaglerayError):
        pass

    error = messages.decode_error(memoryview(messages.encode_error(Newer("from a later release"))[0]))
    assert (type(error), str(error)) == (EaglerayError, "from a later release")
