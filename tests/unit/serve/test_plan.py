"""`eagleray plan`: the policy's choice without a server, for a count and for a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid, NotFound
from cluster.index_costs import PROCESS_BYTES, REFERENCE
from cluster.index_policy import plan_index
from jobs.import_source import Columns
from serve.explain import bytes_text, seconds_text
from serve.plan import REFERENCE_MACHINE, plan_for, plan_source
from tests.unit.serve.command_line import cells, told, told_json

WORDS = ["--count", "117659", "--dimension", "384"]
SEED = 3


def write_vectors(path: Path, count: int, dimension: int, column: str = "vector", scale: float = 1.0) -> str:
    """Vectors as lists of varying length, in row groups of 1,000."""
    vectors = np.random.default_rng(SEED).normal(size=(count, dimension)).astype(np.float32) * scale
    rows = {"id": np.arange(count), column: pa.array(list(vectors), pa.list_(pa.float32()))}
    pq.write_table(pa.table(rows), path, row_group_size=1_000)
    return str(path)


def test_plan_prints_every_candidate_of_one_shard_and_the_total() -> None:
    output = told("plan", *WORDS, "--shards", "2")
    expected = plan_index(58_830, CollectionConfig(384, shards=2))
    rows = cells(output)
    assert [row[0].split(" ")[0] for row in rows] == [candidate.spec.kind for candidate in expected.considered]
    assert [row[-1] for row in rows].count("taken") == 1
    assert f"each of 2 shards, 58,830 points: {expected.spec.kind} (" in output
    assert f"why: {expected.spec.reason}\n" in output
    memory = f"{bytes_text(expected.spec.predicted_bytes)} of index, 471 kB of ids, 150 MB of process"
    assert f"each replica: {memory}; 91.3 MB of rows in the page cache where read, " in output
    took = f"about {seconds_text(expected.chosen.build_seconds)} s to build each shard"
    total = bytes_text(2 * expected.spec.predicted_bytes)
    assert output.splitlines()[-1] == f"total: {total}, {took}; {REFERENCE_MACHINE}"


def test_plan_as_json_has_the_numbers() -> None:
    answer = told_json("plan", *WORDS, "--shards", "2", "--metric", "l2", "--vector-dtype", "float16")
    config = CollectionConfig(384, "l2", shards=2, vector_dtype="float16")
    expected = plan_index(58_830, config)
    assert (answer["count"], answer["points_per_shard"]) == (117_659, 58_830)
    assert answer["config"] == config.to_dict()
    assert answer["index"] == expected.spec.to_dict()
    assert answer["predicted_bytes"] == 2 * answer["predicted_bytes_per_shard"] == 2 * expected.spec.predicted_bytes
    rows = 58_830 * (8 + 2 * 384 + 8)
    told = {"index": expected.spec.predicted_bytes, "ids": 58_830 * 8, "rows": rows, "process": PROCESS_BYTES}
    assert answer["predicted_replica_bytes"] == told
    assert answer["considered"] == [candidate.to_dict() for candidate in expected.considered]
    assert (answer["rates"]["measured"], answer["times"]) == (False, REFERENCE_MACHINE)


def test_plan_takes_the_options_of_the_index() -> None:
    options = ["--index", "ivf_pq", "--index-options", '{"pq_m": 48, "nlist": 512}', "--target-recall", "0.9"]
    bounds = ["--memory-bytes", "90000000", "--build-seconds", "30.5", "--churn", "0.5"]
    answer = told_json("plan", *WORDS, *options, *bounds)
    index = IndexConfig("ivf_pq", 0.9, "auto", 90_000_000, 30.5, 0.5, pq_m=48, nlist=512)
    assert answer["config"] == CollectionConfig(384, index=index).to_dict()
    assert answer["index"]["params"] == {"nlist": 512, "pq_m": 48, "pq_bits": 4}


def test_plan_that_nothing_fits_says_what_is_needed() -> None:
    with pytest.raises(Invalid, match=r"needed are: .* Raise it, use more shards") as error:
        told("plan", *WORDS, "--memory-bytes", "1000000")
    assert [field.field for field in error.value.errors] == ["index.memory_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "factory", "--index-options", '{"factory": "PQ5"}'], "HNSW32,SQ8"),
        (["--index", "ivf_flat", "--index-options", '{"nlist": 100000}'], "at most 3016"),
        (["--index", "tree"], "index.kind"),
        (["--metric", "manhattan"], "metric"),
        (["--threads", "4"], "threads: goes with --source"),
        (["--source", "rows.parquet"], "leave --count and --dimension out"),
    ],
)
def test_plan_of_wrong_options_says_what_would_work(options: list[str], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        told("plan", *WORDS, *options)


@pytest.mark.parametrize("given", [[], ["--count", "5"], ["--dimension", "5"]])
def test_plan_needs_count_and_dimension_or_a_source(given: list[str]) -> None:
    with pytest.raises(Invalid, match="give --count and --dimension, or --source"):
        told("plan", *given)


def test_plan_of_no_points_is_flat() -> None:
    assert "flat (float32 codes)\n" in told("plan", "--count", "0", "--dimension", "4")


def test_plan_of_a_source_reads_its_count_and_dimension_and_measures_this_machine(tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "rows.parquet", 2_500, 8, "embedding")
    options = ["--vector-column", "embedding", "--threads", "1", "--index", "hnsw", "--metric", "l2"]
    answer = told_json("plan", "--source", source, *options)
    assert (answer["count"], answer["config"]["dimension"]) == (2_500, 8)
    rates = answer["rates"]
    assert (rates["measured"], rates["threads"], rates["graph_points"]) == (True, 1, 2_500)
    assert rates["graph_ns"] != REFERENCE.graph_ns
    assert answer["predicted_build_seconds_per_shard"] > 0.0
    assert answer["times"] == "times are for this machine and these vectors, measured with 1 thread"
    assert answer["note"] == ""


def test_plan_of_a_small_source_takes_the_reference_machine(tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "rows.parquet", 300, 8)
    assert REFERENCE_MACHINE in told("plan", "--source", source)


def test_plan_of_a_source_samples_all_its_files(tmp_path: Path) -> None:
    for number in range(3):
        write_vectors(tmp_path / f"part-{number}.parquet", 1_500, 4)
    planned = plan_source(str(tmp_path), Columns(), {"metric": "l2"}, threads=1)
    assert (planned.count, planned.rates.graph_points) == (4_500, 4_500)


def test_plan_of_a_source_whose_vectors_the_codes_would_spoil_says_so(tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "rows.parquet", 1_500, 4_096, scale=1e6)  # beyond float16
    planned = plan_source(source, Columns(), {"metric": "l2"}, threads=1)
    assert (planned.index.spec.kind, planned.index.spec.codes) == ("hnsw", "float16")
    assert "float16 codes lose neighbours" in planned.note


@pytest.mark.parametrize(
    ("column", "message"), [("vectors", "vector_column"), ("vector", "holds no vector"), ("id", "not lists")]
)
def test_plan_of_a_source_without_vectors_names_the_column(column: str, message: str, tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "rows.parquet", 0, 4)
    with pytest.raises(Invalid, match=message):
        plan_for({}, None, source, vector_column=column, threads=1)


def test_plan_of_a_source_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.parquet"):
        told("plan", "--source", str(tmp_path / "nowhere.parquet"))


def test_plan_of_a_source_names_a_bad_row(tmp_path: Path) -> None:
    vectors: list[Any] = [[1.0, 2.0]] * 2_000 + [[1.0, float("nan")]]
    table = pa.table({"id": np.arange(2_001), "vector": pa.array(vectors, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1_000)
    with pytest.raises(Invalid, match="row group 2, row 0"):
        plan_for({}, None, str(tmp_path / "rows.parquet"), threads=1)
