"""Writes the golden description of an adaptive segment, format version 1: `python tests/formats/make_v1_adaptive.py`.

Run once, when the adaptive index came: its fields are those that format version 1 got then. Like the files of
`make_v1.py` it is read by the tests for ever and never written anew.
"""

from __future__ import annotations

from pathlib import Path

from cluster.segment import FileEntry, OperatingPoint, SegmentDescription, SelfTest

FOLDER = Path(__file__).resolve().parent / "v1"


def adaptive_description() -> SegmentDescription:
    return SegmentDescription(
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


def main() -> None:
    (FOLDER / "segment-adaptive.json").write_bytes(adaptive_description().encode())


if __name__ == "__main__":
    main()
