"""Queries of a Parquet file, as vectors, as requests ready to be sent, and the recall of what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.arrow_rows import stream_of, vectors_array
from cluster.errors import Invalid
from serve.arrow_bodies import ARROW
from serve.load import encode_request

QUERIES_MAX = 10_000  # read of a file
REQUEST_BYTES_MAX = 64 << 20  # encoded beforehand for one load
TRUTH_COLUMN = "exact_ids"
Ids = list[int] | list[str]


@dataclass(frozen=True)
class Queries:
    """Vectors (n, dimension) float32, and of each the ids of its true neighbours, best first, where they are known."""

    name: str
    vectors: NDArray[np.float32]
    truth: Sequence[Ids] | None = None


def read_queries(path: Path, k: int, vector_column: str = "vector", truth_column: str | None = None) -> Queries:
    """The first 10,000 rows. Without a name the truth is taken from `exact_ids` where there is such a column."""
    wanted = truth_column or TRUTH_COLUMN
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in (vector_column, *([truth_column] if truth_column else [])):
                if column not in names:
                    raise Invalid.at("data", f"{path} has no column {column!r}; it has {', '.join(names)}")
            columns = [vector_column, *([wanted] if wanted in names else [])]
            batch = next(file.iter_batches(batch_size=QUERIES_MAX, columns=columns), None)
    except (OSError, pa.ArrowException) as error:
        raise Invalid.at("data", f"{path} can't be read as Parquet: {error}") from None
    if batch is None or not batch.num_rows:
        raise Invalid.at("data", f"{path} holds no rows")
    vectors = _vectors(path, batch.column(vector_column))
    return Queries(path.name, vectors, _truth(batch.column(wanted), wanted, k) if wanted in names else None)


def _vectors(path: Path, column: Any) -> NDArray[np.float32]:
    rows = column.to_pylist() if not pa.types.is_fixed_size_list(column.type) else None
    try:
        flat = np.asarray(rows if rows is not None else column.flatten().to_numpy(zero_copy_only=False), np.float32)
        vectors: NDArray[np.float32] = flat.reshape(len(column), -1)
    except (TypeError, ValueError) as error:
        raise Invalid.at("data", f"{path} must hold vectors of one length, without nulls: {error}") from None
    return vectors


def _truth(column: Any, name: str, k: int) -> list[Ids]:
    truth = column.to_pylist()
    for row, ids in enumerate(truth):
        if ids is None or len(ids) < k:
            held = "no ids" if ids is None else f"{len(ids)} ids"
            raise Invalid.at("data", f"row {row} of {name} holds {held}, and k is {k}: ask for at most that many")
    return [ids[:k] for ids in truth]


def search_requests(
    target: str,
    collection: str,
    vectors: NDArray[np.float32],
    wire: str,
    batch: int,
    options: Mapping[str, Any],
    params: dict[str, float],
) -> list[bytes]:
    """Requests of `batch` vectors each, in the format `wire`: all the vectors once, or the first 64 MiB of requests.

    A batch larger than the number of vectors has them more than once.
    """
    path = f"/v1/collections/{collection}/points:search"
    requests: list[bytes] = []
    size = 0
    for start in range(0, max(1, len(vectors) - batch + 1), batch):
        asked = vectors.take(range(start, start + batch), axis=0, mode="wrap")
        body = arrow_body(asked) if wire == "arrow" else _json_body(asked, options, params)
        at = f"{path}?{urlencode({**options, **params})}" if wire == "arrow" else path
        headers = {"Content-Type": ARROW, "Accept": ARROW} if wire == "arrow" else {"Content-Type": "application/json"}
        requests.append(encode_request(target, at, body, headers))
        size += len(body)
        if size >= REQUEST_BYTES_MAX:
            break
    return requests


def _json_body(vectors: NDArray[np.float32], options: Mapping[str, Any], params: dict[str, float]) -> bytes:
    return json.dumps({"vectors": vectors.tolist(), **options, **({"params": dict(params)} if params else {})}).encode()


def arrow_body(vectors: NDArray[np.float32]) -> bytes:
    return bytes(stream_of(pa.record_batch({"vector": vectors_array(vectors.astype(np.float32, copy=False))})))


def hits_of(body: bytes, queries: int) -> list[Ids]:
    """The ids found for each query of an Arrow answer."""
    table = pa.ipc.open_stream(body).read_all()
    found: list[Any] = [[] for _ in range(queries)]
    for query, point_id in zip(table["query"].to_pylist(), table["id"].to_pylist(), strict=True):
        found[query].append(point_id)
    return found


def recall(found: Sequence[Ids], truth: Sequence[Ids]) -> float:
    """The share of the true neighbours that was found, over all queries; 1.0 where there are none."""
    wanted = sum(len(ids) for ids in truth)
    met = sum(len(set(a) & set(b)) for a, b in zip(found, truth, strict=True))
    return met / wanted if wanted else 1.0
