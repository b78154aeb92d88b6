"""Random collections, points and queries for the model: small enough that a segment is built in milliseconds."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.segment_builder import BuildOptions, build_segment, publish_segment
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IdType, IndexConfig, Metric
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.manifest import SegmentRef
from cluster.object_store import ObjectStore
from cluster.segment import rows_schema, write_rows
from tests.model.truth import Id, Point, State

COLLECTION = "words"
DIMENSION = 8
INDEXES = (
    IndexConfig(),
    IndexConfig("hnsw", codes="float32", m=4, ef_construction=8),
    IndexConfig("ivf_flat", codes="float32"),
    IndexConfig("ivf_rabitq", rerank_store="rows"),
)
METRICS: tuple[Metric, ...] = ("l2", "cosine", "ip")
ID_TYPES: tuple[IdType, ...] = ("int64", "string")
EXTREME_IDS = (-(2**63), 2**63 - 1, 0, -1, 1, -(2**31), 2**32)
TEXT_IDS = ("0", "-1", "é", "日本", "a" * 300, "A", "a b/c\\d", "\U0001f985")
TYPES = {"rank": pa.int64(), "name": pa.large_string(), "share": pa.float64(), "old": pa.bool_()}
ATTRIBUTES = tuple(TYPES) + tuple(f"{name}2" for name in TYPES)


@dataclass(frozen=True)
class Case:
    """One collection: its config, the ids that are used, and whether arithmetic on its vectors is exact."""

    config: CollectionConfig
    ids: tuple[Id, ...]
    exact: bool  # small integers, or halves under cosine: scores are the same whoever computes them, and ties many

    @classmethod
    def of(cls, number: int, random: np.random.Generator, pool: int) -> Case:
        """Numbers from 0 on go through all combinations: the parts repeat after 3, 2, 4 times 2, 5 and 7 of them."""
        metric, index = METRICS[number % 3], INDEXES[number // 2 % 4]
        id_type, dtype = ID_TYPES[number % 2], "float16" if number % 5 == 4 else "float32"
        config = CollectionConfig(DIMENSION, metric, id_type, vector_dtype=dtype, index=index)
        return cls(config, _ids(random, id_type, pool), number % 7 not in (2, 5))

    def vectors(self, random: np.random.Generator, count: int) -> NDArray[np.float32]:
        """(count, DIMENSION), of values that the stored type holds; of length one under cosine."""
        if self.exact:
            return _exact_vectors(random, count, self.config.metric)
        vectors = random.normal(size=(count, DIMENSION)).astype(np.float32)
        if self.config.metric == "cosine":
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(self.config.vector_dtype).astype(np.float32)

    def queries(self, random: np.random.Generator, count: int) -> NDArray[np.float32]:
        vectors = self.vectors(random, count)
        if not self.exact and self.config.metric == "cosine":
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def points(self, random: np.random.Generator, count: int, attributes: tuple[str, ...]) -> list[Point]:
        """Points of which some have no attributes, and some not all."""
        given = [name for name in attributes if random.random() < 0.6]
        there = (random.random((count, len(given))) < 0.8).tolist()
        numbers = random.integers(0, 1_000, size=(count, len(given))).tolist()
        values = [
            {name: _value(name, number) for name, number, here in zip(given, row, its, strict=True) if here}
            for row, its in zip(numbers, there, strict=True)
        ]
        return [Point(vector, its) for vector, its in zip(self.vectors(random, count), values, strict=True)]


def _ids(random: np.random.Generator, id_type: IdType, pool: int) -> tuple[Id, ...]:
    numbers = random.integers(-(2**40), 2**40, size=pool).tolist()
    if id_type == "int64":
        return tuple(dict.fromkeys((*EXTREME_IDS, *numbers)))
    return tuple(dict.fromkeys((*TEXT_IDS, *(f"id-{number}" for number in numbers))))


def _exact_vectors(random: np.random.Generator, count: int, metric: Metric) -> NDArray[np.float32]:
    if metric != "cosine":
        return random.integers(-3, 4, size=(count, DIMENSION)).astype(np.float32)
    halves = random.choice(np.array((-0.5, 0.5), dtype=np.float32), size=(count, DIMENSION))
    halves[:, 4:] = 0.0
    return random.permuted(halves, axis=1)


def type_of(attribute: str) -> Any:
    return TYPES[attribute.removesuffix("2")]


def _value(attribute: str, number: int) -> Any:
    kind = attribute.removesuffix("2")
    if kind == "name":
        return f"name {number}"
    return number if kind == "rank" else number / 8.0 if kind == "share" else number % 2 == 0


def upserts(case: Case, ids: list[Id], points: list[Point]) -> Any:
    """The record batch of a `PointWrite`; it has the attributes that any of the points has."""
    names = list(dict.fromkeys(name for point in points for name in point.attributes))
    vectors = np.array([point.vector for point in points], dtype=case.config.vector_dtype)
    columns = [pa.array(ids, ID_ARROW_TYPE[case.config.id_type]), vectors_array(vectors)]
    columns += [pa.array([point.attributes.get(name) for point in points], type_of(name)) for name in names]
    return pa.record_batch(columns, names=["id", "vector", *names])


def publish(store: ObjectStore, case: Case, state: State, attributes: tuple[str, ...]) -> tuple[SegmentRef, ...]:
    """A segment of all points, as an import makes it; none without points."""
    if not state.points:
        return ()
    ids = pa.array(list(state.points), ID_ARROW_TYPE[case.config.id_type])
    hashes = hash_ids(ids)
    values = ids.to_pylist()
    order = sorted(range(len(values)), key=lambda row: (hashes[row], values[row]))
    batch = upserts(case, [values[row] for row in order], [state.points[values[row]] for row in order])
    schema = rows_schema(case.config, {name: type_of(name) for name in attributes})
    columns = {"id_hash": pa.array(hashes[np.array(order)])} | dict(zip(batch.schema.names, batch.columns, strict=True))
    arrays = [columns.get(field.name, pa.nulls(len(order), field.type)).cast(field.type) for field in schema]
    segment_id = f"import-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / paths.ROWS, schema, iter([pa.record_batch(arrays, schema=schema)]))
        build_segment(folder, segment_id, case.config, len(order), len(order), BuildOptions(threads=1))
        return (publish_segment(store, COLLECTION, folder, segment_id),)
