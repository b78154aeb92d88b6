"""What every `ShardClient` must do, as cases; and a replica that answers them from what it was asked, without data.

`tests/contract/test_shard_client.py` runs the cases in one process, its namesake below `tests/ray` against an actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.shard_client import CALL_TIMEOUT_S, ShardClient
from cluster.arrow_rows import vectors_array
from cluster.errors import (
    Conflict,
    Corrupt,
    EaglerayError,
    Exhausted,
    Fenced,
    FieldError,
    Invalid,
    NotFound,
    Unavailable,
)
from cluster.query import Fetched, Hits, SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome

STRING_IDS, WAITS, LETS_GO, BUG, RAISES = 2, 50, 51, 52, 100  # generations that make the replica do something else
REFUSED_K = 13
ERRORS: tuple[EaglerayError, ...] = (
    EaglerayError("a bug"),
    Invalid("k: too large", (FieldError("k", "too large"), FieldError("vectors[3]", "wrong: ü"))),
    NotFound("no collection 'x'"),
    Conflict("another was there"),
    Exhausted("too much", 0.25),
    Exhausted("can never be"),
    Unavailable("not now"),
    Unavailable("half", 2.5, {"shards": 0.5, "points": 0.25, "missing": [1]}, {0: 17, 3: 2**60}, (1, 2)),
    Fenced("epoch 3 was given up"),
    Corrupt("segments/7/rows.arrow"),
)


class EchoReplica:
    """Answers from the question: the score of hit `i` of a query is its vector's first value plus `i`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.waiting = 0
        self.cancelled = 0

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        await self._disturb(request.generation)
        return tuple(self._group(request, group) for group in request.groups)

    def _group(self, request: ShardSearch, group: SearchGroup) -> Hits | EaglerayError:
        if group.k == REFUSED_K:
            return Invalid.at("k", f"{REFUSED_K} is refused")
        queries = request.vectors[group.start : group.stop]
        scores = (queries[:, :1] + np.arange(group.k, dtype=np.float32)).reshape(-1)
        ids = pa.array(np.arange(len(scores)) - 2**40)
        columns: dict[str, Any] = {}
        if "params" in group.columns:
            columns["params"] = pa.array([repr(group.params)] * len(scores))
        if "lsn" in group.columns:
            columns["lsn"] = pa.array([request.min_lsn] * len(scores), pa.int64())
        if "vector" in group.columns:
            columns["vector"] = vectors_array(np.repeat(queries, group.k, axis=0))
        return Hits(
            np.full(len(queries), group.k, np.int64),
            pa.array([f"id-{i}" for i in range(len(scores))]) if request.generation == STRING_IDS else ids,
            scores,
            pa.table(columns) if group.columns else None,
            request.min_lsn + 1,
        )

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        """Finds every other id; each column holds the ids."""
        await self._disturb(generation)
        found = np.arange(len(ids)) % 2 == 0
        kept = ids.filter(pa.array(found))
        table = pa.table(dict.fromkeys(("id", *columns), kept)) if len(kept) else None
        return Fetched(found, table, min_lsn + round(timeout_s))

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        """The count is that of the points, the LSN the sum of their ids; deletes of nothing are refused."""
        outcomes: list[WriteOutcome | EaglerayError] = []
        for write in writes:
            ids = write.deletes if write.upserts is None else write.upserts.column("id")
            lsn = sum(ids.to_pylist()) if ids.type == pa.int64() else round(timeout_s)
            outcomes.append(WriteOutcome(lsn, write.points) if write.points else Fenced("nothing to write"))
        return tuple(outcomes)

    async def _disturb(self, generation: int) -> None:
        if generation == WAITS:
            self.waiting += 1
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if generation == LETS_GO:
            self.go_on.set()
        if generation == BUG:
            raise ValueError("a bug in the replica")
        if generation >= RAISES:
            raise ERRORS[generation - RAISES]


def ask_for(*ks: int, generation: int = 1, dimension: int = 3, queries: int = 2, **more: Any) -> ShardSearch:
    """A search with a group per `k`, each of some queries; query `i` is (i, i, ..)."""
    columns, params = more.pop("columns", ()), more.pop("params", SearchParams())
    vectors = np.repeat(np.arange(len(ks) * queries, dtype=np.float32)[:, None], dimension, axis=1)
    groups = [SearchGroup(i * queries, (i + 1) * queries, k, params, columns) for i, k in enumerate(ks)]
    return ShardSearch(generation, vectors, tuple(groups), **more)


def only(outcomes: tuple[Hits | EaglerayError, ...]) -> Hits:
    (hits,) = outcomes
    assert isinstance(hits, Hits), hits
    return hits


async def search_with_one_group(client: ShardClient) -> None:
    hits = only(await client.search(ask_for(3)))
    assert hits.counts.tolist() == [3, 3]
    assert hits.counts.dtype == np.int64
    assert hits.ids.type == pa.int64()
    assert hits.ids.to_pylist() == [i - 2**40 for i in range(6)]
    assert hits.scores.tolist() == [0.0, 1.0, 2.0, 1.0, 2.0, 3.0]
    assert hits.scores.dtype == np.float32
    assert (hits.columns, hits.lsn) == (None, 1)


async def search_with_several_groups_of_which_one_is_refused(client: ShardClient) -> None:
    first, refused, last = await client.search(ask_for(1, REFUSED_K, 2))
    assert isinstance(first, Hits)
    assert isinstance(last, Hits)
    assert (first.scores.tolist(), last.scores.tolist()) == ([0.0, 1.0], [4.0, 5.0, 5.0, 6.0])
    assert isinstance(refused, Invalid)
    assert refused.errors == (FieldError("k", f"{REFUSED_K} is refused"),)


async def search_for_nothing(client: ShardClient) -> None:
    assert await client.search(ShardSearch(1, np.zeros((0, 3), np.float32), ())) == ()
    hits = only(await client.search(ask_for(5, queries=0)))
    assert (len(hits.counts), len(hits.ids), len(hits.scores)) == (0, 0, 0)


async def search_with_string_ids_attributes_and_vectors(client: ShardClient) -> None:
    request = ask_for(2, 1, generation=STRING_IDS, columns=("params", "vector"), params=SearchParams(ef_search=7))
    first, last = await client.search(request)
    assert isinstance(first, Hits)
    assert isinstance(last, Hits)
    assert first.ids.to_pylist() == ["id-0", "id-1", "id-2", "id-3"]
    assert first.columns.column_names == ["params", "vector"]
    assert first.columns["vector"].to_pylist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert last.columns["params"].to_pylist() == [repr(SearchParams(ef_search=7))] * 2


async def search_with_every_parameter(client: ShardClient) -> None:
    params = SearchParams(nprobe=3, ef_search=4, rerank=1.5, target_recall=0.9, exact=True)
    hits = only(await client.search(ask_for(1, params=params, columns=("params", "lsn"), min_lsn=2**50)))
    assert hits.columns["params"].to_pylist() == [repr(params)] * 2
    assert hits.columns["lsn"].to_pylist() == [2**50] * 2
    assert hits.lsn == 2**50 + 1


async def search_with_megabytes(client: ShardClient) -> None:
    request = ask_for(10, dimension=512, queries=1_000, columns=("vector",))
    hits = only(await client.search(request))
    assert len(hits.scores) == 10_000
    expected = (request.vectors[:, :1] + np.arange(10, dtype=np.float32)).reshape(-1)
    assert np.array_equal(hits.scores, expected)
    assert hits.columns["vector"].chunk(0).values.to_numpy()[-1] == 999.0


async def errors_with_all_their_fields(client: ShardClient) -> None:
    for number, expected in enumerate(ERRORS):
        with pytest.raises(EaglerayError) as caught:
            await client.search(ask_for(1, generation=RAISES + number))
        assert type(caught.value) is type(expected)
        assert vars(caught.value) == vars(expected)
        assert str(caught.value) == str(expected)


async def bug_of_the_replica(client: ShardClient) -> None:
    with pytest.raises(EaglerayError, match="a bug in the replica") as caught:
        await client.search(ask_for(1, generation=BUG))
    assert type(caught.value) is EaglerayError
    assert only(await client.search(ask_for(1))).counts.tolist() == [1, 1]


async def fetch_of_int64_and_string_ids(client: ShardClient) -> None:
    for ids in (pa.array([5, -6, 7]), pa.array(["a", "bé", "c"])):
        fetched = await client.fetch(1, ids, ["x", "y"], 40, 2.0)
        assert fetched.found.tolist() == [True, False, True]
        assert fetched.found.dtype == np.bool_
        assert fetched.table.column_names == ["id", "x", "y"]
        assert fetched.table["y"].to_pylist() == [ids[0].as_py(), ids[2].as_py()]
        assert fetched.lsn == 42


async def fetch_of_nothing(client: ShardClient) -> None:
    fetched = await client.fetch(1, pa.array([], pa.int64()), [], 0, 1.0)
    assert (len(fetched.found), fetched.table, fetched.lsn) == (0, None, 1)


async def fetch_that_fails(client: ShardClient) -> None:
    with pytest.raises(NotFound, match="no collection 'x'"):
        await client.fetch(RAISES + 2, pa.array([1]), [])


async def write_of_upserts_and_deletes(client: ShardClient) -> None:
    vectors = vectors_array(np.ones((3, 4), np.float32))
    batch = pa.record_batch([pa.array([1, 2, 3]), vectors, pa.array(["a", None, "c"])], ["id", "vector", "name"])
    writes = [
        PointWrite(batch),
        PointWrite(batch.slice(1, 1)),
        PointWrite(deletes=pa.array([7, 8])),
        PointWrite(deletes=pa.array([], pa.int64())),
        PointWrite(deletes=pa.array(["x"])),
    ]
    *done, refused, last = await client.write(writes, 9.0)
    assert done == [WriteOutcome(6, 3), WriteOutcome(2, 1), WriteOutcome(15, 2)]
    assert isinstance(refused, Fenced)
    assert last == WriteOutcome(9, 1)


async def answers_as_soon_as_they_are_there(client: ShardClient) -> None:
    waiting = asyncio.ensure_future(client.search(ask_for(1, generation=WAITS)))
    assert only(await client.search(ask_for(2))).counts.tolist() == [2, 2]
    assert not waiting.done()
    await client.fetch(LETS_GO, pa.array([1]), [])
    assert only(await waiting).counts.tolist() == [1, 1]


async def many_calls_at_once(client: ShardClient) -> None:
    async def one(number: int) -> None:
        hits = only(await client.search(ask_for(number % 7 + 1, queries=number % 5 + 1, min_lsn=number)))
        assert (hits.lsn, len(hits.counts)) == (number + 1, number % 5 + 1)
        assert hits.scores[-1] == number % 5 + number % 7

    await asyncio.gather(*map(one, range(200)))


CASES: tuple[Callable[[ShardClient], Awaitable[None]], ...] = (
    search_with_one_group,
    search_with_several_groups_of_which_one_is_refused,
    search_for_nothing,
    search_with_string_ids_attributes_and_vectors,
    search_with_every_parameter,
    search_with_megabytes,
    errors_with_all_their_fields,
    bug_of_the_replica,
    fetch_of_int64_and_string_ids,
    fetch_of_nothing,
    fetch_that_fails,
    write_of_upserts_and_deletes,
    answers_as_soon_as_they_are_there,
    many_calls_at_once,
)
