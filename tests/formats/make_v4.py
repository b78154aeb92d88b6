"""Writes the golden file of format version 4 beside it: `python tests/formats/make_v4.py`.

Run once, when generations could be served on GPUs: manifests got the device of their generation, and configs what they
say of GPUs. Like those of `make_v1.py` to `make_v3.py` it is read by the tests for ever and never written anew.
"""

from __future__ import annotations

from pathlib import Path

from cluster.config import CollectionConfig, IndexConfig
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.routing import Routing

FOLDER = Path(__file__).resolve().parent / "v4"


def golden_manifest() -> Manifest:
    index = IndexConfig(
        "cagra",
        device="auto",
        num_gpus=0.5,
        cpu_twin=False,
        gpu_full="refuse",
        wait_for_gpu=True,
        codes="float16",
        graph_degree=32,
    )
    return Manifest(
        collection="golden",
        version=15,
        config=CollectionConfig(3, "l2", "string", shards=1, replicas=2, index=index),
        routing=Routing(shards=1),
        generation=5,
        shards=(ShardEntry(0, (SegmentRef("seg-0001", 5, "xxh3_128:00"),), applied_lsn=12, epoch=2),),
        created_at="2026-01-02T03:04:05+00:00",
        writer="nonce-of-the-writer",
        attributes={"title": "string"},
        log_set=2,
        device="gpu",
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "manifest.json").write_bytes(golden_manifest().encode())


if __name__ == "__main__":
    main()
