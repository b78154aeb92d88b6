"""Writes the golden file of format version 5 beside it: `python tests/formats/make_v5.py`.

Run once, when the share of a GPU that a generation's replicas have took the place of its device in manifests, and
configs could leave it open. Like those of `make_v1.py` to `make_v4.py` it is read by the tests for ever and never
written anew.
"""

from __future__ import annotations

from pathlib import Path

from cluster.config import CollectionConfig, IndexConfig
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.routing import Routing

FOLDER = Path(__file__).resolve().parent / "v5"


def golden_manifest() -> Manifest:
    return Manifest(
        collection="golden",
        version=18,
        config=CollectionConfig(3, "l2", "string", shards=1, replicas=2, index=IndexConfig("flat", device="gpu")),
        routing=Routing(shards=1),
        generation=6,
        shards=(ShardEntry(0, (SegmentRef("seg-0001", 5, "xxh3_128:00"),), applied_lsn=14, epoch=3),),
        created_at="2026-01-02T03:04:05+00:00",
        writer="nonce-of-the-writer",
        attributes={"title": "string"},
        log_set=2,
        num_gpus=0.125,
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "manifest.json").write_bytes(golden_manifest().encode())


if __name__ == "__main__":
    main()
