"""Writes the golden files of format version 2 beside it: `python tests/formats/make_v2.py`.

Run once, when writes to points came: manifests got LSNs, epochs, tombstones and attributes, and WAL records (of their
own format version 1) and tombstone files began. Like the files of `make_v1.py` these are read by the tests for ever
and never written anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig
from cluster.ids import id_array
from cluster.manifest import Manifest, SegmentRef, ShardEntry, TombstonesRef
from cluster.routing import Routing
from cluster.segment import checksum_bytes
from cluster.tombstones import encode_tombstones
from cluster.wal import WalRecord

FOLDER = Path(__file__).resolve().parent / "v2"
CONFIG = CollectionConfig(dimension=3, metric="l2", id_type="string", shards=2)


def golden_write() -> WalRecord:
    vectors = np.array([[1.0, -2.0, 0.5], [-0.0, 65504.0, -1.5]], dtype=np.float32)
    columns = {
        "id": id_array(["日本語", "a"], "string"),
        "vector": vectors_array(vectors),
        "title": pa.array([None, "first"], pa.string()),
        "year": pa.array([2003, None], pa.int32()),
    }
    upserts = pa.record_batch(list(columns.values()), names=list(columns))
    deletes = id_array(["löwe", ""], "string")
    return WalRecord(13, 2, "write", "000102030405060708090a0b0c0d0e0f", upserts, deletes)


def golden_claim() -> WalRecord:
    return WalRecord(14, 3, "claim", "f0e0d0c0b0a090807060504030201000")


def golden_manifest(tombstones: bytes) -> Manifest:
    return Manifest(
        collection="golden",
        version=9,
        config=CONFIG,
        routing=Routing(shards=2),
        generation=3,
        shards=(
            ShardEntry(
                0,
                (SegmentRef("seg-0001", 5, "xxh3_128:00"), SegmentRef("seg-0002", 7, "xxh3_128:01")),
                applied_lsn=12,
                epoch=2,
                tombstones=(TombstonesRef("seg-0001", 11, 3, checksum_bytes(tombstones)),),
            ),
            ShardEntry(1, applied_lsn=4, epoch=1),
        ),
        created_at="2026-01-02T03:04:05+00:00",
        writer="nonce-of-the-writer",
        attributes={"title": "string", "year": "int32"},
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    tombstones = encode_tombstones(np.array([0, 3, 4], dtype=np.int64))
    (FOLDER / "tombstones.arrow").write_bytes(tombstones)
    (FOLDER / "wal-write.arrow").write_bytes(golden_write().encode(shard=0))
    (FOLDER / "wal-claim.arrow").write_bytes(golden_claim().encode(shard=0))
    (FOLDER / "manifest.json").write_bytes(golden_manifest(tombstones).encode())


if __name__ == "__main__":
    main()
