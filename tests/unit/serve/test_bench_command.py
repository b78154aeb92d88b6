"""`eagleray bench` against endpoints that listen in this process, with the load in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid, NotFound, Unavailable
from serve import bench_run
from serve.client import Client
from tests.unit.actors.points import random_points
from tests.unit.serve.command_line import told, told_json
from tests.unit.serve.listening import POINTS, listening

BRIEF = ("--seconds", "0.1", "--warm-up", "0", "--connections", "2", "--batch", "1", "-k", "3")
GRAPH = CollectionConfig(3, metric="l2", index=IndexConfig(kind="hnsw"))


def exact_ids(queries: Any, k: int) -> list[list[int]]:
    distances = ((queries[:, None, :] - np.asarray(POINTS.vectors)[None]) ** 2).sum(axis=2)
    return np.asarray(POINTS.ids)[np.argsort(distances, axis=1)[:, :k]].tolist()  # type: ignore[no-any-return]


def query_file(folder: Path, **columns: Any) -> str:
    queries = np.random.default_rng(5).standard_normal((60, 3)).astype(np.float32)
    more = {name: column(queries) for name, column in columns.items()}
    pq.write_table(pa.table({"vector": vectors_array(queries), **more}), folder / "queries.parquet")
    return str(folder / "queries.parquet")


def test_bench_measures_closed_and_open_loops_and_recall_of_true_neighbours(tmp_path: Path) -> None:
    data = query_file(tmp_path, exact_ids=lambda queries: exact_ids(queries, 5))
    with listening(tmp_path) as (client, _):
        report = told_json("bench", "--collection", "words", "--data", data, "--rate", "50", *BRIEF, client=client)
    assert [point["recall"] for point in report["operating_points"]] == [1.0]
    assert report["operating_points"][0]["against"] == "the true neighbours of 60 queries in queries.parquet"
    loads = report["loads"]
    assert [(load["loop"], load["format"]) for load in loads] == [
        ("closed", "json"), ("closed", "arrow"), ("open", "json"), ("open", "arrow"),
    ]  # fmt: skip
    for load in loads:
        assert load["answered"] > 0
        assert (load["refused"], load["failures"], load["unanswered"]) == (0, {}, 0)
        assert load["generator_us"] > 0
    assert loads[2]["answered"] == pytest.approx(5, abs=1)


def test_bench_sweeps_compares_and_draws(tmp_path: Path) -> None:
    """Without true neighbours the endpoint's own exact answers are the truth."""
    data, graph = query_file(tmp_path), {"graph": (GRAPH, random_points(GRAPH, 40))}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with listening(tmp_path / "a", served=graph) as (one, _), listening(tmp_path / "b", served=graph) as (two, _):
        text = told(
            "bench", "--collection", "graph", "--data", data, "--sweep", "ef_search=16,64", "--format", "arrow",
            "--compare", two.target, "--picture", str(tmp_path / "out.svg"), *BRIEF, client=one,
        )  # fmt: skip
    assert text.count("against the endpoint's own exact answers to 60 queries") == 4
    assert f"{two.target} over {one.target}: ratios of medians" in text
    assert "ef_search 64" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        (("--collection", "none"), NotFound, "none"),
        (("--collection", "words", "--params", "ef_search=3"), Invalid, "ef_search"),
        (("--collection", "words", "--params", "speed=3"), Invalid, "params: must look like"),
        (("--collection", "words", "--in-flight", "1"), Invalid, "in_flight: leaves no load out of 2"),
        (("--collection", "words", "--picture", "out.png"), Invalid, "picture: must be"),
    ],
)
def test_bench_refuses_what_cannot_be_measured_before_it_loads_anything(
    tmp_path: Path, arguments: tuple[str, ...], kind: type[Exception], named: str
) -> None:
    with listening(tmp_path) as (client, _), pytest.raises(kind, match=named):
        told("bench", "--data", query_file(tmp_path), *BRIEF, *arguments, client=client)


def test_bench_of_an_endpoint_with_itself_is_refused(tmp_path: Path) -> None:
    client = Client("http://127.0.0.1:9")
    with pytest.raises(Invalid, match="there is nothing to compare"):
        told("bench", "--collection", "c", "--data", query_file(tmp_path), "--compare", client.target, client=client)
    client.close()


def test_bench_tells_true_neighbours_of_another_id_type(tmp_path: Path) -> None:
    data = query_file(tmp_path, exact_ids=lambda queries: [["a", "b", "c"]] * len(queries))
    with listening(tmp_path) as (client, _), pytest.raises(Invalid, match="are str ids, the collection has int"):
        told("bench", "--collection", "words", "--data", data, *BRIEF, client=client)


def test_bench_without_an_endpoint_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run.time, "sleep", pytest.fail)
    client = Client("http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 does not answer"):
        told("bench", "--collection", "c", "--data", query_file(tmp_path), client=client)
    client.close()
