from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.query import Coverage, Hits, SearchResult
from serve.hit_streams import write_result


def ids_of(kind: str, count: int) -> Any:
    numbers = np.random.default_rng(count).integers(-(2**62), 2**62, count + 3)
    if kind == "string":
        return pa.array([str(number) for number in numbers[:count]], pa.large_string())
    return pa.array(numbers).slice(3) if kind == "sliced" else pa.array(numbers[:count])


@pytest.mark.parametrize("with_attributes", [False, True])
@pytest.mark.parametrize("kind", ["int64", "sliced", "string"])
@pytest.mark.parametrize("counts", [[10], [1], [0], [3, 0, 5], [7] * 9, []])
def test_answer_is_read_as_it_was_written(counts: list[int], kind: str, with_attributes: bool) -> None:
    count = sum(counts)
    ids, scores = ids_of(kind, count), np.random.default_rng(1).random(count).astype(np.float32)
    columns = pa.table({"rank": pa.array(range(count), pa.int8())}) if with_attributes else None
    hits = Hits(np.array(counts, np.int64), ids, scores, columns)
    written = write_result(SearchResult(hits, Coverage(0.5, 0.25, (1,)), 7, {0: 17, 2: 4}))
    table = pa.ipc.open_stream(written).read_all()
    table.validate(full=True)
    assert table.column_names == ["query", "id", "score", *(["rank"] if with_attributes else [])]
    assert [str(field.type) for field in table.schema][:3] == ["int32", str(ids.type), "float"]
    assert table.column("query").to_pylist() == [query for query, hits in enumerate(counts) for _ in range(hits)]
    assert table.column("id").to_pylist() == ids.to_pylist()
    assert table.column("score").to_pylist() == scores.tolist()
    if with_attributes:
        assert table.column("rank").to_pylist() == list(range(count))
    metadata = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
    coverage = {"shards": 0.5, "points": 0.25, "missing": [1]}
    assert metadata == {"coverage": coverage, "generation": 7, "lsn": {"0": 17, "2": 4}}


def test_answers_after_a_write_tell_its_lsn() -> None:
    hits = Hits(np.array([1]), pa.array([5]), np.ones(1, np.float32))
    for lsn in (1, 2, 1):
        table = pa.ipc.open_stream(write_result(SearchResult(hits, Coverage(1.0, 1.0), 1, {0: lsn}))).read_all()
        assert json.loads(table.schema.metadata[b"lsn"]) == {"0": lsn}


def test_answer_is_told_to_be_degraded_where_it_is() -> None:
    for columns in (None, pa.table({"rank": pa.array([7], pa.int8())})):
        hits = Hits(np.array([1]), pa.array([5]), np.ones(1, np.float32), columns)
        for degraded in ("cpu", "", "cpu"):  # what is kept of one answer is not the next one's
            written = write_result(SearchResult(hits, Coverage(1.0, 1.0), 1, {0: 1}, degraded))  # type: ignore[arg-type]
            metadata = pa.ipc.open_stream(written).read_all().schema.metadata
            assert metadata.get(b"degraded") == (b"cpu" if degraded else None)


def plainly_written(result: SearchResult) -> Any:
    """The table that the documentation promises, made without any shortcut."""
    hits = result.hits
    queries = [query for query, count in enumerate(hits.counts.tolist()) for _ in range(count)]
    columns = {"query": pa.array(queries, pa.int32()), "id": hits.ids, "score": pa.array(hits.scores, pa.float32())}
    columns |= (
        dict(zip(hits.columns.column_names, hits.columns.columns, strict=True)) if hits.columns is not None else {}
    )
    metadata = {
        "coverage": json.dumps(result.coverage.to_dict(), separators=(",", ":")),
        "generation": str(result.generation),
        "lsn": json.dumps({str(shard): lsn for shard, lsn in result.lsn.items()}, separators=(",", ":")),
    }
    return pa.table(columns).replace_schema_metadata(metadata)


def test_any_answers_one_after_the_other_are_read_as_plainly_written_ones() -> None:
    """What is kept of one answer is used for the next, which differs in anything."""
    seed = 20_240_602
    chance = np.random.default_rng(seed)
    for number in range(400):
        counts = chance.integers(0, 4, chance.integers(0, 5))
        count = int(counts.sum())
        ids = ids_of(("int64", "string", "sliced")[chance.integers(3)], count)
        scores = chance.random(count * 2).astype(np.float32)[:count]
        columns = pa.table({"rank": pa.array(range(count), pa.int8())}) if chance.random() < 0.2 else None
        missing = tuple(range(chance.integers(0, 3)))
        coverage = Coverage(1.0 - len(missing) / 4, 1.0 - len(missing) / 4, missing)
        lsn = {shard: int(chance.integers(3)) for shard in range(len(missing), 4)}
        result = SearchResult(Hits(counts.astype(np.int64), ids, scores, columns), coverage, number % 3, lsn)
        table = pa.ipc.open_stream(write_result(result)).read_all()
        table.validate(full=True)
        assert table.equals(plainly_written(result), check_metadata=True), (seed, number)
