"""The command line's `create`, `import` and `search` against an endpoint: options of the index and of accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Conflict, Invalid
from serve.client import Client
from serve.index_options import index_fields
from tests.unit.actors.points import brute_force, manifest_log, random_points, random_vectors
from tests.unit.serve.command_line import cells, told, told_json
from tests.unit.serve.endpoint import Endpoint, LocalJobs, hit_ids
from tests.unit.serve.listening import listening

INDEX = [
    *("--index", "hnsw", "--target-recall", "0.9", "--index-memory-bytes", "5000000"),
    *("--build-seconds", "60", "--churn", "0.25", "--index-options", '{"m": 16, "codes": "sq8"}'),
    *("--device", "cpu", "--num-gpus", "0.5", "--no-cpu-twin", "--gpu-full", "refuse", "--wait-for-gpu"),
]
GPU_FIELDS: dict[str, Any] = {"num_gpus": 0.5, "cpu_twin": False, "gpu_full": "refuse", "wait_for_gpu": True}
INDEX_CONFIG = IndexConfig("hnsw", 0.9, "cpu", 5_000_000, 60.0, 0.25, m=16, codes="sq8", **GPU_FIELDS)
LISTS = CollectionConfig(16, "l2", index=IndexConfig("ivf_flat", 0.9, nlist=16))
CODES = CollectionConfig(16, "l2", index=IndexConfig("ivf_pq", 0.9, nlist=4, pq_m=1, pq_bits=4))
POINTS = random_points(LISTS, 700)
QUERIES = random_vectors(LISTS, 20, seed=5)


class PromptJobs(LocalJobs):
    """Runs an import as soon as it is submitted."""

    def __init__(self, data: str) -> None:
        super().__init__()
        self._data = data

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        super().submit_job(job_id, entrypoint)
        self.run(job_id, self._data)


def run_jobs_at_once(endpoint: Endpoint) -> None:
    endpoint.services.jobs._runner = PromptJobs(endpoint.data)


def test_create_takes_the_options_of_the_index(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        assert told("create", "others", "--dimension", "8", *INDEX, client=client) == "collection others: ready\n"
        assert client.collection("others")["config"] == CollectionConfig(8, index=INDEX_CONFIG).to_dict()
        told("create", "plain", "--dimension", "8", client=client)
        assert client.collection("plain")["config"] == CollectionConfig(8).to_dict()
        told("create", "others", "--dimension", "8", *INDEX, client=client)
        with pytest.raises(Conflict):
            told("create", "others", "--dimension", "8", client=client)


def test_create_tells_what_the_endpoint_says_of_a_wrong_option(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        for options, message in (
            (["--index-options", '{"colour": 1}'], "colour"),
            (["--index", "factory", "--index-options", '{"factory": "HNSWx"}'], "HNSW32,SQ8 .* would do"),
            (["--index", "hnsw", "--index-options", '{"nlist": 4}'], "it goes with: ivf_flat"),
            (["--churn", "2"], "churn"),
        ):
            with pytest.raises(Invalid, match=message):
                told("create", "others", "--dimension", "8", *options, client=client)


@pytest.mark.parametrize(
    ("options", "message"),
    [("{'m': 32}", "not JSON"), ("[1]", "must be a JSON object"), ('{"m": 32, "churn": 0}', "churn is given")],
)
def test_index_options_that_cannot_be_read_are_refused(options: str, message: str) -> None:
    with pytest.raises(Invalid, match=message) as error:
        index_fields(options, kind="hnsw", churn=0.5, device=None)
    assert [field.field for field in error.value.errors] == ["index_options"]


def test_import_creates_with_the_options_of_the_index_and_tells_its_plan(tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": POINTS.ids, "vector": vectors_array(POINTS.vectors)}), source)
    arguments = ["import", str(source), "--metric", "l2", "--shards", "2", *INDEX]
    with listening(tmp_path) as (client, endpoint):
        run_jobs_at_once(endpoint)
        output = told(*arguments, "--collection", "others", client=client)
        status = told_json(*arguments, "--collection", "more", client=client)
        made = [manifest_log(endpoint.store, name).newest() for name in ("others", "more")]
    assert [m and m.config for m in made] == [CollectionConfig(16, "l2", shards=2, index=INDEX_CONFIG)] * 2
    plan, done = output.splitlines()
    assert done == "collection others: 700 points, generation 1"
    assert plan.startswith("builds: 2 x hnsw (sq8 codes), ")
    assert (status["plan"]["segments"], status["plan"]["index"]["params"]["m"]) == (2, 16)


def search(client: Client, tmp_path: Path, *options: str, collection: str = "lists") -> list[list[Any]]:
    np.save(tmp_path / "queries.npy", QUERIES)
    file = str(tmp_path / "queries.npy")
    return hit_ids(told_json("search", collection, "--vector-file", file, *options, client=client))


def test_search_takes_exact_target_and_knobs(tmp_path: Path) -> None:
    truth = brute_force(POINTS, QUERIES, 10, "l2")
    with listening(tmp_path, served={"lists": (LISTS, POINTS), "codes": (CODES, POINTS)}) as (client, _):
        assert search(client, tmp_path, "--nprobe", "1") != truth
        assert search(client, tmp_path, "--nprobe", "16") == truth
        assert search(client, tmp_path, "--exact") == truth
        assert search(client, tmp_path, "--target-recall", "0.9") == search(client, tmp_path)
        assert search(client, tmp_path, "--nprobe", "4", "--rerank", "70", collection="codes") == truth
        for options, field in (
            (["--exact", "--nprobe", "4"], "params.nprobe"),
            (["--target-recall", "0.9", "--rerank", "4"], "params.rerank"),
            (["--ef-search", "4"], "params.ef_search"),
        ):
            with pytest.raises(Invalid, match=field):
                search(client, tmp_path, *options)


def test_search_prints_hits_as_a_table(tmp_path: Path) -> None:
    with listening(tmp_path, served={"lists": (LISTS, POINTS)}) as (client, _):
        point = POINTS.ids[3].as_py()
        arguments = ["search", "lists", "--id", str(point), "-k", "2", "--exact", "--with-attributes", "name"]
        first, _second = cells(told(*arguments, client=client))
    assert first == [str(point), "0.0000", f"name of {point}"]


def test_status_shows_the_index_of_each_shard(tmp_path: Path) -> None:
    with listening(tmp_path, served={"lists": (LISTS, POINTS)}) as (client, _):
        (row,) = cells(told("status", "lists", client=client))
        everything = told_json("status", client=client)
    assert (row[:4], len(row)) == (["0", "700", "ready", "ivf_flat"], 8)
    assert [each["name"] for each in everything["collections"]] == ["lists", "words"]
    assert json.dumps(everything["collections"][0]["config"]) == json.dumps(LISTS.to_dict())
