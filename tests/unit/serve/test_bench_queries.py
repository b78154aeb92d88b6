"""Queries of a Parquet file, the requests made of them, and recall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.arrow_rows import vectors_array, vectors_view
from cluster.errors import Invalid
from serve import bench_queries
from serve.bench_queries import arrow_body, hits_of, read_queries, recall, search_requests

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


def written(tmp_path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "queries.parquet")
    return tmp_path / "queries.parquet"


@pytest.mark.parametrize(
    "column", [vectors_array(VECTORS), VECTORS.tolist(), vectors_array(VECTORS.astype(np.float16))]
)
def test_queries_are_float32_and_their_truth_is_cut_to_k(tmp_path: Path, column: Any) -> None:
    path = written(tmp_path, vector=column, exact_ids=[[1, 2, 3]] * 4)
    queries = read_queries(path, k=2)
    assert queries.vectors.dtype == np.float32
    assert queries.vectors.tolist() == VECTORS.tolist()
    assert queries.truth == [[1, 2]] * 4


def test_queries_without_truth_have_none(tmp_path: Path) -> None:
    assert read_queries(written(tmp_path, v=VECTORS.tolist()), 2, "v").truth is None


@pytest.mark.parametrize(
    ("columns", "options", "named"),
    [
        ({"v": [[1.0]]}, {}, "has no column 'vector'; it has v"),
        ({"vector": [[1.0]]}, {"truth_column": "true"}, "has no column 'true'"),
        ({"vector": [[1.0]], "exact_ids": [[1]]}, {}, "row 0 of exact_ids holds 1 ids, and k is 2"),
        (
            {"vector": [[1.0]], "exact_ids": pa.array([None], pa.list_(pa.int64()))},
            {},
            "row 0 of exact_ids holds no ids",
        ),
        ({"vector": [[1.0], [1.0, 2.0]]}, {}, "must hold vectors of one length"),
        ({"vector": pa.array([], pa.list_(pa.float32()))}, {}, "holds no rows"),
    ],
)
def test_wrong_queries_name_what_is_wrong(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], named: str
) -> None:
    with pytest.raises(Invalid, match=named):
        read_queries(written(tmp_path, **columns), 2, **options)


def test_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "queries.parquet").write_bytes(b"no")
    with pytest.raises(Invalid, match=r"queries\.parquet can't be read as Parquet"):
        read_queries(tmp_path / "queries.parquet", 2)
    with pytest.raises(Invalid, match="missing"):
        read_queries(tmp_path / "missing", 2)


def body_of(request: bytes) -> tuple[str, bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return head.decode().splitlines()[0], body


def test_json_requests_hold_the_queries_options_and_params() -> None:
    requests = search_requests("http://h:1", "c", VECTORS, "json", 2, {"k": 5}, {"ef_search": 8})
    lines, bodies = zip(*(body_of(each) for each in requests), strict=True)
    assert set(lines) == {"POST /v1/collections/c/points:search HTTP/1.1"}
    assert [json.loads(body) for body in bodies] == [
        {"vectors": VECTORS[at : at + 2].tolist(), "k": 5, "params": {"ef_search": 8}} for at in (0, 2)
    ]


def test_arrow_requests_hold_the_queries_and_options_in_the_path() -> None:
    [line, body] = body_of(search_requests("http://h:1", "c", VECTORS, "arrow", 4, {"k": 5}, {"nprobe": 8})[0])
    assert line == "POST /v1/collections/c/points:search?k=5&nprobe=8 HTTP/1.1"
    table = pa.ipc.open_stream(body).read_all()
    assert vectors_view(table["vector"].combine_chunks()).tolist() == VECTORS.tolist()


def test_batch_larger_than_the_queries_repeats_them() -> None:
    [request] = search_requests("http://h:1", "c", VECTORS, "json", 6, {}, {})
    assert json.loads(body_of(request)[1])["vectors"] == VECTORS[[0, 1, 2, 3, 0, 1]].tolist()


def test_requests_of_one_load_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_queries, "REQUEST_BYTES_MAX", 2 * len(arrow_body(VECTORS[:1])))
    assert len(search_requests("http://h:1", "c", VECTORS, "arrow", 1, {}, {})) == 2


def test_hits_of_an_answer_are_by_query() -> None:
    table = pa.table({"query": [0, 0, 2], "id": ["a", "b", "c"], "score": [0.0, 1.0, 2.0]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert hits_of(bytes(sink.getvalue()), 3) == [["a", "b"], [], ["c"]]


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([[1, 2], [3, 4]], [[2, 1], [3, 9]], 0.75),
        ([[1], []], [[1, 2], [3, 4]], 0.25),
        ([[7]], [[]], 1.0),
    ],
)
def test_recall_is_the_share_of_true_neighbours_found(
    found: list[list[int]], truth: list[list[int]], expected: float
) -> None:
    assert recall(found, truth) == expected
