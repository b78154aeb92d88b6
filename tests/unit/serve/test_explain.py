"""`eagleray explain` and `status`: the words and numbers of a collection's indexes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.config import CollectionConfig, IndexConfig
from serve.explain import bytes_text, explanation, index_name, plan_line, print_explanation, seconds_text
from serve.tables import print_collection, print_hits
from tests.unit.actors.points import random_points
from tests.unit.serve.command_line import cells, told, told_json
from tests.unit.serve.listening import listening

HNSW = {"m": 32, "ef_construction": 100}
CONSIDERED = [
    {
        "kind": "flat",
        "params": {},
        "codes": "float32",
        "rerank_store": "none",
        "predicted_bytes": 180_723_712,
        "predicted_build_seconds": 0.09,
        "reachable_recall": 1.0,
        "predicted_queries_per_s": 276.4,
        "rejected": "a scan of 45180928 floats takes about 7 ms a query",
    },
    {
        "kind": "hnsw",
        "params": HNSW,
        "codes": "float16",
        "rerank_store": "rows",
        "predicted_bytes": 122_365_360,
        "predicted_build_seconds": 12.5,
        "reachable_recall": 0.999,
        "predicted_queries_per_s": 14_000.0,
        "rejected": "",
    },
]
SEGMENT = {
    "segment_id": "import-1-000000",
    "count": 117_659,
    "index_kind": "hnsw",
    "index_params": HNSW,
    "codes": "float16",
    "rerank_store": "rows",
    "index_bytes": 121_000_000,
    "rows_bytes": 190_000_000,
    "predicted_bytes": 122_365_360,
    "reason": "117659 points: a graph [sic] fits",
    "considered": CONSIDERED,
    "operating_points": [
        {
            "target_recall": 0.95,
            "params": {"ef_search": 42},
            "recall": 0.9613,
            "recall_low": 0.9531,
            "latency_ms": 0.412,
            "met": True,
            "queries_per_s": 6_543.2,
        },
        {
            "target_recall": 0.99,
            "params": {"ef_search": 2_048},
            "recall": 0.981,
            "recall_low": 0.975,
            "latency_ms": 9.0,
            "met": False,
            "queries_per_s": 0.0,
        },
    ],
    "attributes": {},
    "built": {
        "predicted_seconds": 12.5,
        "seconds": 14.2,
        "tuning_seconds": 3.1,
        "tuned_on": "1000 rows with noise",
        "threads": 2,
        "seed": 0,
        "faiss": "1.15.1",
        "simd": "AVX512",
    },
}
OBSERVED = {
    "replica": 1,
    "generation": 3,
    "recall": 0.9444,
    "low": 0.93,
    "high": 0.96,
    "queries": 1_000,
    "k": 10,
    "dropped": 0,
}
DESCRIPTION: dict[str, Any] = {
    "name": "words",
    "config": CollectionConfig(384, index=IndexConfig(memory_bytes=2 * 10**9, churn=0.1)).to_dict(),
    "points": 117_659,
    "version": 4,
    "generation": 3,
    "device": "cpu",
    "num_gpus": 0.0,
    "serving_generation": 3,
    "ready": True,
    "reason": "",
    "switching": "",
    "rebuild_advised": None,
    "rebuild_reasons": [],
    "shards": [
        {
            "shard": 0,
            "points": 117_659,
            "tail_points": 0,
            "tombstones": 0,
            "upkeep": "",
            "replicas": [],
            "segments": [SEGMENT],
            "observed": [],
        }
    ],
}


def changed(**shard: Any) -> dict[str, Any]:
    """The description with another first shard."""
    description = copy.deepcopy(DESCRIPTION)
    description["shards"][0] |= shard
    return description


def printed(printer: Any, *arguments: Any) -> str:
    out = Console(file=io.StringIO(), width=250, markup=False, highlight=False)
    printer(out, *arguments)
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_explanation_says_what_was_chosen_and_why() -> None:
    lines = printed(print_explanation, DESCRIPTION).splitlines()
    assert lines[0] == (
        "words: 117,659 points, 384 dimensions, cosine; "
        "asked for: kind auto, target recall 0.95, memory_bytes 2.0 GB, churn 0.1"
    )
    name = "hnsw (float16 codes, rerank from rows, m 32, ef_construction 100)"
    assert f"shard 0, import-1-000000, 117,659 points: {name}" in lines
    assert "  why: 117659 points: a graph [sic] fits" in lines


def test_explanation_has_every_candidate_with_what_is_predicted_and_why_not() -> None:
    name = "hnsw (float16 codes, rerank from rows, m 32, ef_construction 100)"
    reason = "a scan of 45180928 floats takes about 7 ms a query"
    assert cells(printed(print_explanation, DESCRIPTION))[:2] == [
        ["flat (float32 codes)", "181 MB", "0.09", "1", "276", reason],
        [name, "122 MB", "12", "0.999", "14,000", "taken"],
    ]


def test_explanation_has_what_was_measured_beside_what_was_predicted() -> None:
    output = printed(print_explanation, DESCRIPTION)
    assert (
        "measured: index file 121 MB (predicted 122 MB), built in 14 s (predicted 12 s) with 2 threads, "
        "tuned in 3.1 s on 1000 rows with noise, FAISS 1.15.1 AVX512\n"
    ) in output
    assert cells(output)[2:] == [
        ["0.95", "ef_search 42", "0.9613", "0.9531", "0.41", "6,543", "yes"],
        ["0.99", "ef_search 2048", "0.9810", "0.9750", "9.00", "-", "no"],
    ]


def test_candidates_that_segments_share_are_printed_once() -> None:
    other = SEGMENT | {"segment_id": "import-1-000001"}
    output = printed(print_explanation, changed(segments=[SEGMENT, other]))
    assert output.count("7 ms a query") == output.count("considered: the same as above") == 1
    apart = SEGMENT | {"considered": CONSIDERED[1:]}
    output = printed(print_explanation, changed(segments=[SEGMENT, apart]))
    assert (output.count("taken"), output.count("the same as above")) == (2, 0)


def test_segment_of_an_earlier_version_is_explained_without_candidates() -> None:
    segment = SEGMENT | {"considered": [], "built": {"faiss": "1.12", "simd": "AVX2"}}
    output = printed(print_explanation, changed(segments=[segment, segment]))
    assert "same as above" not in output
    assert output.count("measured: index file 121 MB (predicted 122 MB), FAISS 1.12 AVX2\n") == 2


def test_observed_recall_is_explained_where_there_is_some() -> None:
    assert "observed" not in printed(print_explanation, DESCRIPTION)
    assert (
        "observed by replica 1: recall@10 0.944 (0.930 to 0.960) on 1,000 live queries of generation 3\n"
    ) in printed(print_explanation, changed(observed=[OBSERVED]))


def test_shard_without_points_has_no_index_to_explain() -> None:
    assert "shard 0: no index, 0 points" in printed(print_explanation, changed(segments=[], points=0))


def test_status_has_a_column_of_observed_recall_where_there_is_some() -> None:
    assert "observed" not in printed(print_collection, DESCRIPTION)
    output = printed(print_collection, changed(observed=[OBSERVED, OBSERVED | {"generation": 2, "recall": 0.5}]))
    assert "observed" in output
    assert cells(output) == [["0", "117,659", "", "hnsw", "121 MB", "0.961", "ef_search 42", "0.41", "0.944"]]


def test_status_has_columns_of_tail_and_deleted_rows_where_there_are_some() -> None:
    assert "tail" not in printed(print_collection, DESCRIPTION)
    output = printed(print_collection, changed(tail_points=1_204, tombstones=31))
    assert "tail" in output
    assert cells(output) == [["0", "117,659", "1,204", "31", "", "hnsw", "121 MB", "0.961", "ef_search 42", "0.41"]]


def test_points_that_no_segment_holds_yet_are_explained() -> None:
    told_of = "shard 0: 1,204 points written since the last segment, searched exactly; 31 rows of segments deleted"
    assert "written since" not in printed(print_explanation, DESCRIPTION)
    assert told_of in printed(print_explanation, changed(tail_points=1_204, tombstones=31))
    assert told_of in printed(print_explanation, changed(tail_points=1_204, tombstones=31, segments=[]))


def test_brackets_of_attributes_are_printed_as_they_are() -> None:
    hits = [{"id": 1, "score": 0.5, "attributes": {"gloss": "[bold] a [/word]"}}]
    assert cells(printed(print_hits, hits, ["gloss"], "")) == [["1", "0.5000", "[bold] a [/word]"]]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (110_400_000, "110 MB"),
        (999_600_000, "1.0 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_are_told_in_about_three_digits(size: float, text: str) -> None:
    assert bytes_text(size) == text


def test_seconds_are_told_in_about_two_digits() -> None:
    assert [seconds_text(s) for s in (0.0, 0.0451, 5.87, 19.4, 12_345.6)] == ["0", "0.045", "5.9", "19", "12,346"]


def test_index_without_codes_of_its_own_is_named_by_its_rerank_store() -> None:
    assert index_name("ivf_pq", "float32", "sq8", {"nlist": 4}) == "ivf_pq (sq8 copy, nlist 4)"
    assert index_name("factory", "float32", "none", {}) == "factory"


def test_plan_of_an_import_is_told_in_one_line() -> None:
    index = {"kind": "hnsw", "codes": "float16", "rerank_store": "rows", "params": HNSW}
    plan = {"index": index, "segments": 2, "predicted_bytes": 110_000_000, "predicted_build_seconds": 19.2}
    assert plan_line(plan) == "builds: 2 x hnsw (float16 codes), 110 MB, about 19 s"


def test_explain_command_tells_of_the_served_collection(tmp_path: Path) -> None:
    config = CollectionConfig(8, "l2", shards=2, index=IndexConfig("ivf_sq8", nlist=2))
    with listening(tmp_path, served={"lists": (config, random_points(config, 400))}) as (client, _):
        output = told("explain", "lists", client=client)
        answer = told_json("explain", "lists", client=client)
        description = client.collection("lists")
    assert answer == explanation(description)
    assert answer["config"] == config.to_dict()
    assert [shard["shard"] for shard in answer["shards"]] == [0, 1]
    for shard in answer["shards"]:
        (segment,) = shard["segments"]
        assert f"{segment['count']} points: ivf_sq8 (rerank from rows, nlist 2)" in output
        assert [candidate["kind"] for candidate in segment["considered"]] == ["ivf_sq8"]
        assert [point["target_recall"] for point in segment["operating_points"]] == [0.95, 0.9, 0.99]
    assert output.count("why: ivf_sq8 was asked for") == 2
    assert [row[0] for row in cells(output) if len(row) == 7] == ["0.95", "0.9", "0.99"] * 2


def test_status_says_what_goes_on_and_what_is_advised() -> None:
    told = {"switching": "switching to generation 4: shard 0 12 records behind", "rebuild_advised": "it grew"}
    lines = printed(print_collection, changed(upkeep="seals 5,000 points") | told).splitlines()
    assert [line.strip() for line in lines[1:4]] == [
        "switching to generation 4: shard 0 12 records behind",
        "a rebuild is advised: it grew",
        "shard 0: seals 5,000 points",
    ]
    assert "advised" not in printed(print_collection, DESCRIPTION)
