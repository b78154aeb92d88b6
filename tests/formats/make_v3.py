"""Writes the golden files of format version 3 beside it: `python tests/formats/make_v3.py`.

Run once, when collections could be resharded, branched and switched one replica at a time: manifests got log sets,
origins of segments and ways to switch, and WAL records (still of their own format version 1) a third kind. Like those
of `make_v1.py` and `make_v2.py` these files are read by the tests for ever and never written anew.
"""

from __future__ import annotations

from pathlib import Path

from cluster.config import CollectionConfig
from cluster.manifest import Manifest, SegmentRef, ShardEntry, TombstonesRef
from cluster.routing import Routing
from cluster.shard_entry import LogPosition, LogSet
from cluster.wal import WalRecord

FOLDER = Path(__file__).resolve().parent / "v3"


def golden_end() -> WalRecord:
    return WalRecord(15, 3, "end", "f0e0d0c0b0a090807060504030201001")


def golden_manifest() -> Manifest:
    return Manifest(
        collection="golden",
        version=12,
        config=CollectionConfig(dimension=3, metric="l2", id_type="string", shards=1, replicas=2),
        routing=Routing(shards=1),
        generation=4,
        shards=(
            ShardEntry(
                0,
                (SegmentRef("seg-0001", 5, "xxh3_128:00", "silver"), SegmentRef("seg-0002", 7, "xxh3_128:01")),
                applied_lsn=12,
                epoch=2,
                tombstones=(TombstonesRef("seg-0001", 11, 3, "xxh3_128:02", "0123456789abcdef"),),
                behind=(LogSet(0, 2, (LogPosition(0, 12, 1), LogPosition(1, 4, 2))), LogSet(1, 3)),
            ),
        ),
        created_at="2026-01-02T03:04:05+00:00",
        writer="nonce-of-the-writer",
        attributes={"title": "string"},
        log_set=2,
        switch="one_at_a_time",
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "wal-end.arrow").write_bytes(golden_end().encode(shard=0))
    (FOLDER / "manifest.json").write_bytes(golden_manifest().encode())


if __name__ == "__main__":
    main()
