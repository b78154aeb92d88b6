"""Writes the golden files of format version 1 beside it: `python tests/formats/make_v1.py`.

Run once, when a format version is made. Its files are then read by the tests for ever; they are never written anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import hash_ids, id_array
from cluster.index_spec import IndexSpec
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.routing import Routing
from cluster.segment import (
    OperatingPoint,
    SegmentDescription,
    SelfTest,
    checksum_bytes,
    checksum_file,
    rows_schema,
    write_rows,
)

FOLDER = Path(__file__).resolve().parent / "v1"
PER_BATCH = 2
SEGMENT_ID = "seg-0001"
CONFIG = CollectionConfig(
    dimension=3,
    metric="l2",
    id_type="string",
    shards=2,
    replicas=1,
    vector_dtype="float32",
    index=IndexConfig(kind="auto", target_recall=0.95, device="cpu", memory_bytes=1_000_000),
)
POINTS = {
    "": ([0.0, 0.0, 0.0], "the empty id", 1900),
    "a": ([1.0, -2.0, 0.5], "first", 2001),
    "löwe": ([0.25, 1e-30, 3.5], "ümlaut", None),
    "日本語": ([-0.0, 65504.0, -1.5], None, 2003),
    "🐟": ([0.1, 0.2, 0.3], "fish", 2004),
}


def write_golden_rows(path: Path) -> None:
    ids = id_array(list(POINTS), "string")
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable")
    points = [list(POINTS.values())[i] for i in order]
    schema = rows_schema(CONFIG, {"title": pa.string(), "year": pa.int32()})
    columns = [
        ids.take(pa.array(order)),
        vectors_array(np.array([vector for vector, _, _ in points], dtype=np.float32)),
        pa.array(hashes[order]),
        pa.array([title for _, title, _ in points], pa.string()),
        pa.array([year for _, _, year in points], pa.int32()),
    ]
    rows = pa.record_batch(columns, schema=schema)
    write_rows(path, schema, (rows.slice(start, PER_BATCH) for start in range(0, len(ids), PER_BATCH)))


def golden_description(rows_path: Path) -> SegmentDescription:
    return SegmentDescription(
        segment_id=SEGMENT_ID,
        count=len(POINTS),
        dimension=CONFIG.dimension,
        metric=CONFIG.metric,
        id_type=CONFIG.id_type,
        vector_dtype=CONFIG.vector_dtype,
        rows_per_batch=PER_BATCH,
        attributes={"title": "string", "year": "int32"},
        spec=IndexSpec("flat", {}, "float32", 60, "5 x 3 = 15 floats are scanned exactly").to_dict(),
        operating_points=(
            OperatingPoint(0.95, {}, 1.0, 1.0, 0.0625, True),
            OperatingPoint(0.99, {"nprobe": 4}, 0.98, 0.97, 0.5, False),
        ),
        self_test=SelfTest((3, 4), ((3, 0, 1), (4,)), 0.875),
        files={"rows.arrow": checksum_file(rows_path)},
        built={"faiss": "1.15.1", "seconds": 0.25, "threads": 1, "seed": 0},
    )


def golden_manifest(description: bytes) -> Manifest:
    return Manifest(
        collection="golden",
        version=7,
        config=CONFIG,
        routing=Routing(shards=2),
        generation=3,
        shards=(ShardEntry(0, (SegmentRef(SEGMENT_ID, len(POINTS), checksum_bytes(description)),)), ShardEntry(1)),
        created_at="2026-01-02T03:04:05+00:00",
        writer="nonce-of-the-writer",
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write_golden_rows(FOLDER / "rows.arrow")
    description = golden_description(FOLDER / "rows.arrow").encode()
    (FOLDER / "segment.json").write_bytes(description)
    (FOLDER / "manifest.json").write_bytes(golden_manifest(description).encode())


if __name__ == "__main__":
    main()
