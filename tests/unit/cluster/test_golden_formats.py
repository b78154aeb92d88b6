"""Files of every format version, as they were written once: each later version must read the same from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import id_array
from cluster.index_spec import IndexSpec
from cluster.manifest import Manifest, SegmentRef, ShardEntry, TombstonesRef
from cluster.memory_store import MemoryStore
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
from cluster.shard_entry import LogPosition, LogSet
from cluster.tombstones import read_tombstones
from cluster.wal import WalRecord

FORMATS = Path(__file__).resolve().parents[2] / "formats"
V1, V2, V3, V4, V5 = (FORMATS / f"v{version}" for version in (1, 2, 3, 4, 5))
ON_CPUS = IndexConfig(device="cpu")

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
ADAPTIVE = SegmentDescription(
    segment_id="seg-0002",
    count=10_000,
    dimension=99,
    metric="cosine",
    id_type="int64",
    vector_dtype="float16",
    rows_per_batch=84_733,
    attributes={},
    spec={
        "kind": "ivf_pq",
        "params": {"nlist": 256, "pq_m": 25, "pq_bits": 4},
        "codes": "float32",
        "predicted_bytes": 2_901_234,
        "reason": "for the mean shard: compressed lists with a float16 copy for the exact rerank",
        "policy_version": 2,
        "rerank_store": "float16",
        "factory": "",
    },
    operating_points=(
        OperatingPoint(0.95, {"nprobe": 12, "rerank": 4}, 0.9641, 0.9602, 0.125, True, 21_500.5),
        OperatingPoint(0.99, {"nprobe": 40, "rerank": 16}, 0.981, 0.979, 0.75, False, 4_000.0),
    ),
    self_test=SelfTest((9_998, 9_999), ((9_998, 17), (9_999,)), 1.0),
    files={
        "rows.arrow": FileEntry(2_140_000, "xxh3_128:433e602ecf7684c02093e076d3ccf66b"),
        "index.faiss": FileEntry(2_890_000, "xxh3_128:68b24a44ec91339bc8792b64334e9edd"),
    },
    built={
        "faiss": "1.15.1",
        "simd": "AVX2",
        "predicted_seconds": 0.75,
        "seconds": 0.5,
        "tuning_seconds": 0.25,
        "tuned_on": "1000 rows with noise",
        "threads": 2,
        "seed": 0,
    },
    considered=(
        {
            "kind": "hnsw",
            "params": {"m": 32, "ef_construction": 100},
            "codes": "float16",
            "rerank_store": "rows",
            "predicted_bytes": 4_700_000,
            "predicted_build_seconds": 0.611,
            "reachable_recall": 0.999,
            "predicted_queries_per_s": 30_000.0,
            "rejected": "needs 5405000 bytes, memory_bytes allows 4000000",
        },
        {
            "kind": "ivf_pq",
            "params": {"nlist": 256, "pq_m": 25, "pq_bits": 4},
            "codes": "float32",
            "rerank_store": "float16",
            "predicted_bytes": 2_901_234,
            "predicted_build_seconds": 0.75,
            "reachable_recall": 0.999,
            "predicted_queries_per_s": 18_000.0,
            "rejected": "",
        },
    ),
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


def test_manifest_of_format_1_is_written_as_one_of_format_5_that_says_the_same() -> None:
    """A new field needs a new format version: older processes refuse fields that they do not know."""
    assert Manifest.decode(MANIFEST.encode(), "manifest.json") == replace(MANIFEST, format=5)
    then, now = json.loads((V1 / "manifest.json").read_bytes()), json.loads(MANIFEST.encode())
    new = {"applied_lsn": 0, "epoch": 0, "tombstones": [], "behind": []}
    shards = [entry | new for entry in without_origins(then["shards"])]
    added = {"format": 5, "attributes": {}, "log_set": 0, "switch": "beside", "num_gpus": 0.0}
    assert now == then | added | {"shards": shards, "checksum": now["checksum"]}


def without_origins(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain data of shards as format 3 has their segments: of the collection itself."""
    return [entry | {"segments": [ref | {"origin": ""} for ref in entry["segments"]]} for entry in shards]


def test_manifest_of_format_1_names_the_golden_segment() -> None:
    assert MANIFEST.segments["seg-0001"].checksum == checksum_bytes((V1 / "segment.json").read_bytes())


def test_description_of_format_1_is_read() -> None:
    assert SegmentDescription.decode((V1 / "segment.json").read_bytes(), "segment.json") == DESCRIPTION


def test_description_of_format_1_is_written_with_what_it_had() -> None:
    """Fields that came later have their defaults, and what was there is the same."""
    then, now = json.loads((V1 / "segment.json").read_bytes()), json.loads(DESCRIPTION.encode())
    assert now.pop("considered") == []
    assert [point.pop("queries_per_s") for point in now["operating_points"]] == [0.0, 0.0]
    assert now == then


def test_adaptive_description_of_format_1_is_read() -> None:
    data = (V1 / "segment-adaptive.json").read_bytes()
    assert SegmentDescription.decode(data, "segment-adaptive.json") == ADAPTIVE


def test_adaptive_description_of_format_1_is_still_written_the_same() -> None:
    assert ADAPTIVE.encode() == (V1 / "segment-adaptive.json").read_bytes()


def test_adaptive_index_spec_of_format_1_is_read() -> None:
    spec = IndexSpec.from_dict(ADAPTIVE.spec)
    assert (spec.kind, spec.rerank_store, spec.factory) == ("ivf_pq", "float16", "")
    assert spec.factory_string(99) == "Pad100,IVF256,PQ25x4fsr,Refine(SQfp16)"
    assert spec.to_dict() == ADAPTIVE.spec


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


# --- format 2: LSNs, tombstones and declared attributes in the manifest; WAL records; tombstone files -----------------

MANIFEST_2 = Manifest(
    collection="golden",
    version=9,
    config=CollectionConfig(dimension=3, metric="l2", id_type="string", shards=2, index=ON_CPUS),
    routing=Routing(shards=2, kind="hash"),
    generation=3,
    shards=(
        ShardEntry(
            0,
            (SegmentRef("seg-0001", 5, "xxh3_128:00"), SegmentRef("seg-0002", 7, "xxh3_128:01")),
            12,
            2,
            (TombstonesRef("seg-0001", 11, 3, "xxh3_128:914148e0282b9396ad100c93e7cb4722"),),
        ),
        ShardEntry(1, (), 4, 1, ()),
    ),
    created_at="2026-01-02T03:04:05+00:00",
    writer="nonce-of-the-writer",
    state="live",
    format=2,
    attributes={"title": "string", "year": "int32"},
)


def test_manifest_of_format_2_is_read() -> None:
    manifest = Manifest.decode((V2 / "manifest.json").read_bytes(), "manifest.json")
    assert manifest == MANIFEST_2
    assert [entry.points for entry in manifest.shards] == [9, 0]


def test_manifest_of_format_2_is_written_as_one_of_format_5_that_says_the_same() -> None:
    assert Manifest.decode(MANIFEST_2.encode(), "manifest.json") == replace(MANIFEST_2, format=5)
    then, now = json.loads((V2 / "manifest.json").read_bytes()), json.loads(MANIFEST_2.encode())
    shards = [entry | {"behind": []} for entry in without_origins(then["shards"])]
    for entry in shards:
        entry["tombstones"] = [ref | {"variant": ""} for ref in entry["tombstones"]]
    added = {"format": 5, "log_set": 0, "switch": "beside", "num_gpus": 0.0}
    assert now == then | added | {"shards": shards, "checksum": now["checksum"]}


def test_tombstone_file_of_format_2_is_read() -> None:
    store = MemoryStore()
    data = (V2 / "tombstones.arrow").read_bytes()
    store.put("collections/golden/shards/0000/tombstones/seg-0001-00000000000000000011.arrow", data)
    (ref,) = MANIFEST_2.shards[0].tombstones
    assert read_tombstones(store, "golden", 0, ref, 5).tolist() == [0, 3, 4]


def test_wal_write_of_format_1_is_read() -> None:
    data = (V2 / "wal-write.arrow").read_bytes()
    assert checksum_bytes(data) == "xxh3_128:6907aa2f9fa28e69427821b1808b689b"
    record = WalRecord.decode(data, "wal-write.arrow", 0, 13)
    assert (record.lsn, record.epoch, record.kind) == (13, 2, "write")
    assert record.nonce == "000102030405060708090a0b0c0d0e0f"
    assert record.upserts.schema == pa.schema(
        {
            "id": pa.large_string(),
            "vector": pa.list_(pa.float32(), 3),
            "title": pa.string(),
            "year": pa.int32(),
        }
    )
    assert record.upserts.to_pydict() == {
        "id": ["日本語", "a"],
        "vector": [[1.0, -2.0, 0.5], [-0.0, 65504.0, -1.5]],
        "title": [None, "first"],
        "year": [2003, None],
    }
    assert record.deletes.type == pa.large_string()
    assert record.deletes.to_pylist() == ["löwe", ""]


def test_wal_claim_of_format_1_is_read() -> None:
    record = WalRecord.decode((V2 / "wal-claim.arrow").read_bytes(), "wal-claim.arrow", 0, 14)
    assert (record.lsn, record.epoch, record.kind) == (14, 3, "claim")
    assert (record.nonce, record.upserts, record.deletes) == ("f0e0d0c0b0a090807060504030201000", None, None)


def test_wal_claim_of_format_1_is_still_written_the_same() -> None:
    claim = WalRecord(14, 3, "claim", "f0e0d0c0b0a090807060504030201000")
    assert claim.encode(0) == (V2 / "wal-claim.arrow").read_bytes()


# --- format 3: log sets, origins and ways to switch in the manifest; end records --------------------------------------

MANIFEST_3 = Manifest(
    collection="golden",
    version=12,
    config=CollectionConfig(dimension=3, metric="l2", id_type="string", shards=1, replicas=2, index=ON_CPUS),
    routing=Routing(shards=1, kind="hash"),
    generation=4,
    shards=(
        ShardEntry(
            0,
            (SegmentRef("seg-0001", 5, "xxh3_128:00", "silver"), SegmentRef("seg-0002", 7, "xxh3_128:01")),
            12,
            2,
            (TombstonesRef("seg-0001", 11, 3, "xxh3_128:02", "0123456789abcdef"),),
            (LogSet(0, 2, (LogPosition(0, 12, 1), LogPosition(1, 4, 2))), LogSet(1, 3)),
        ),
    ),
    created_at="2026-01-02T03:04:05+00:00",
    writer="nonce-of-the-writer",
    state="live",
    format=3,
    attributes={"title": "string"},
    log_set=2,
    switch="one_at_a_time",
)


def test_manifest_of_format_3_is_read() -> None:
    assert Manifest.decode((V3 / "manifest.json").read_bytes(), "manifest.json") == MANIFEST_3


def test_manifest_of_format_3_is_written_as_one_of_format_5_that_says_the_same() -> None:
    assert Manifest.decode(MANIFEST_3.encode(), "manifest.json") == replace(MANIFEST_3, format=5)
    then, now = json.loads((V3 / "manifest.json").read_bytes()), json.loads(MANIFEST_3.encode())
    assert now == then | {"format": 5, "num_gpus": 0.0, "checksum": now["checksum"]}


def test_wal_end_of_format_1_is_read() -> None:
    record = WalRecord.decode((V3 / "wal-end.arrow").read_bytes(), "wal-end.arrow", 0, 15)
    assert (record.lsn, record.epoch, record.kind) == (15, 3, "end")
    assert (record.nonce, record.upserts, record.deletes) == ("f0e0d0c0b0a090807060504030201001", None, None)


def test_wal_end_of_format_1_is_still_written_the_same() -> None:
    end = WalRecord(15, 3, "end", "f0e0d0c0b0a090807060504030201001")
    assert end.encode(0) == (V3 / "wal-end.arrow").read_bytes()


# --- format 4: the device of a generation in the manifest, and what its config says of GPUs --------------------------

MANIFEST_4 = Manifest(
    collection="golden",
    version=15,
    config=CollectionConfig(
        dimension=3,
        metric="l2",
        id_type="string",
        shards=1,
        replicas=2,
        index=IndexConfig(
            kind="cagra",
            target_recall=0.95,
            device="auto",
            num_gpus=0.5,
            cpu_twin=False,
            gpu_full="refuse",
            wait_for_gpu=True,
            codes="float16",
            graph_degree=32,
        ),
    ),
    routing=Routing(shards=1, kind="hash"),
    generation=5,
    shards=(ShardEntry(0, (SegmentRef("seg-0001", 5, "xxh3_128:00"),), 12, 2),),
    created_at="2026-01-02T03:04:05+00:00",
    writer="nonce-of-the-writer",
    state="live",
    format=4,
    attributes={"title": "string"},
    log_set=2,
    switch="beside",
    num_gpus=0.5,
)


def test_manifest_of_format_4_is_read() -> None:
    assert Manifest.decode((V4 / "manifest.json").read_bytes(), "manifest.json") == MANIFEST_4


def test_manifest_of_format_4_is_written_as_one_of_format_5_that_says_the_same() -> None:
    assert Manifest.decode(MANIFEST_4.encode(), "manifest.json") == replace(MANIFEST_4, format=5)
    then, now = json.loads((V4 / "manifest.json").read_bytes()), json.loads(MANIFEST_4.encode())
    del then["device"]
    assert now == then | {"format": 5, "num_gpus": 0.5, "checksum": now["checksum"]}


@pytest.mark.parametrize(
    ("device", "asked", "share"), [("gpu", 0.5, 0.5), ("gpu", None, 1.0), ("cpu", 0.5, 0.0), ("cpu", None, 0.0)]
)
def test_device_of_format_4_is_read_as_the_share_that_its_replicas_had(
    device: str, asked: float | None, share: float
) -> None:
    """A config that did not say a share meant a whole GPU."""
    body = json.loads((V4 / "manifest.json").read_bytes()) | {"device": device}
    del body["checksum"]
    if asked is None:
        del body["config"]["index"]["num_gpus"]
    checksum = checksum_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    manifest = Manifest.decode(json.dumps(body | {"checksum": checksum}).encode(), "manifest.json")
    assert (manifest.num_gpus, manifest.device) == (share, device)
    assert manifest.config.index.num_gpus == asked


# --- format 5: the share of a GPU that each replica of a generation has, in the place of its device ------------------

MANIFEST_5 = Manifest(
    collection="golden",
    version=18,
    config=CollectionConfig(
        dimension=3,
        metric="l2",
        id_type="string",
        shards=1,
        replicas=2,
        index=IndexConfig(kind="flat", target_recall=0.95, device="gpu"),
    ),
    routing=Routing(shards=1, kind="hash"),
    generation=6,
    shards=(ShardEntry(0, (SegmentRef("seg-0001", 5, "xxh3_128:00"),), 14, 3),),
    created_at="2026-01-02T03:04:05+00:00",
    writer="nonce-of-the-writer",
    state="live",
    format=5,
    attributes={"title": "string"},
    log_set=2,
    switch="beside",
    num_gpus=0.125,
)


def test_manifest_of_format_5_is_read() -> None:
    assert Manifest.decode((V5 / "manifest.json").read_bytes(), "manifest.json") == MANIFEST_5


def test_manifest_of_format_5_is_still_written_the_same() -> None:
    assert MANIFEST_5.encode() == (V5 / "manifest.json").read_bytes()
