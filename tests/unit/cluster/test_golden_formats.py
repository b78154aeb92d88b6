"""Files of format version 1, as they were written once: every later version must read the same from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import id_array
from cluster.index_spec import IndexSpec
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.routing import Routing
from cluster.segment import (
    FileEntry,
    OperatingPoint,
    Rows,
    SegmentDescription,
    SelfTest,
    checksum_bytes,
    rows_schema,
    verify_file,
)

V1 = Path(__file__).resolve().parents[2] / "formats" / "v1"

CONFIG = CollectionConfig(
    dimension=3,
    metric="l2",
    id_type="string",
    shards=2,
    replicas=1,
    vector_dtype="float32",
    index=IndexConfig(kind="auto", target_recall=0.95, device="cpu", memory_bytes=1_000_000),
)
MANIFEST = Manifest(
    collection="golden",
    version=7,
    config=CONFIG,
    routing=Routing(shards=2, kind="hash"),
    generation=3,
    shards=(
        ShardEntry(0, (SegmentRef("seg-0001", 5, "xxh3_128:68b24a44ec91339bc8792b64334e9edd"),)),
        ShardEntry(1, ()),
    ),
    created_at="2026-01-02T03:04:05+00:00",
    writer="nonce-of-the-writer",
    state="live",
    format=1,
)
DESCRIPTION = SegmentDescription(
    segment_id="seg-0001",
    count=5,
    dimension=3,
    metric="l2",
    id_type="string",
    vector_dtype="float32",
    rows_per_batch=2,
    attributes={"title": "string", "year": "int32"},
    spec={
        "kind": "flat",
        "params": {},
        "codes": "float32",
        "predicted_bytes": 60,
        "reason": "5 x 3 = 15 floats are scanned exactly",
        "policy_version": 1,
    },
    operating_points=(
        OperatingPoint(0.95, {}, 1.0, 1.0, 0.0625, True),
        OperatingPoint(0.99, {"nprobe": 4}, 0.98, 0.97, 0.5, False),
    ),
    self_test=SelfTest((3, 4), ((3, 0, 1), (4,)), 0.875),
    files={"rows.arrow": FileEntry(2_522, "xxh3_128:433e602ecf7684c02093e076d3ccf66b")},
    built={"faiss": "1.15.1", "seconds": 0.25, "threads": 1, "seed": 0},
    format=1,
)
IDS = ["日本語", "", "löwe", "🐟", "a"]
VECTORS = [[-0.0, 65504.0, -1.5], [0.0, 0.0, 0.0], [0.25, 1e-30, 3.5], [0.1, 0.2, 0.3], [1.0, -2.0, 0.5]]
HASHES = [0x11FEC42C806050B7, 0x2D06800538D394C2, 0x466BF7BDD2F5563A, 0xCAA3A4C4F312AB68, 0xE6C632B61E964E1F]
TITLES = [None, "the empty id", "ümlaut", "fish", "first"]
YEARS = [2003, 1900, None, 2004, 2001]


def open_rows() -> Rows:
    return Rows(V1 / "rows.arrow", 5, 3, 2)


def test_manifest_of_format_1_is_read() -> None:
    assert Manifest.decode((V1 / "manifest.json").read_bytes(), "manifest.json") == MANIFEST


def test_manifest_of_format_1_is_still_written_the_same() -> None:
    """A new field needs a new format version: older processes refuse fields that they do not know."""
    assert MANIFEST.encode() == (V1 / "manifest.json").read_bytes()


def test_manifest_of_format_1_names_the_golden_segment() -> None:
    assert MANIFEST.segments["seg-0001"].checksum == checksum_bytes((V1 / "segment.json").read_bytes())


def test_description_of_format_1_is_read() -> None:
    assert SegmentDescription.decode((V1 / "segment.json").read_bytes(), "segment.json") == DESCRIPTION


def test_description_of_format_1_is_still_written_the_same() -> None:
    assert DESCRIPTION.encode() == (V1 / "segment.json").read_bytes()


def test_index_spec_of_format_1_is_read() -> None:
    expected = IndexSpec("flat", {}, "float32", 60, "5 x 3 = 15 floats are scanned exactly", policy_version=1)
    assert IndexSpec.from_dict(DESCRIPTION.spec) == expected


def test_rows_of_format_1_have_the_recorded_checksum() -> None:
    verify_file(V1 / "rows.arrow", DESCRIPTION.files["rows.arrow"], "rows.arrow")


def test_rows_of_format_1_are_read() -> None:
    rows = open_rows()
    assert rows.schema == rows_schema(CONFIG, {"title": pa.string(), "year": pa.int32()})
    assert rows.ids().to_pylist() == IDS
    expected = np.array(VECTORS, dtype=np.float32)
    assert rows.vectors(0, 5).tobytes() == expected.tobytes()  # bit for bit, the sign of zero too
    assert [first for first, _ in rows.blocks()] == [0, 2, 4]
    table = rows.take(np.arange(5), ["id_hash", "title", "year"])
    assert table.to_pydict() == {"id_hash": HASHES, "title": TITLES, "year": YEARS}


def test_rows_of_format_1_are_found_by_id() -> None:
    asked = id_array(["a", "absent", "🐟", "löwe", "", "日本語"], "string")
    assert open_rows().rows_of_ids(asked).tolist() == [4, -1, 3, 2, 1, 0]
