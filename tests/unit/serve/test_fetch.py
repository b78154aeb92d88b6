from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.placement import ReplicaKey
from tests.unit.actors.points import name_of, random_points
from tests.unit.serve.endpoint import Endpoint, Json, points_of, problem, run_with_endpoint

FETCH = "/v1/collections/words/points:fetch"
CONFIG = CollectionConfig(3, metric="l2", shards=3, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 30)
IDS: list[int] = POINTS.ids.to_pylist()


def with_words(scenario: Any, tmp_path: Path, **options: Any) -> None:
    async def run(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        await scenario(endpoint)

    run_with_endpoint(run, tmp_path, **options)


async def fetched(endpoint: Endpoint, **body: Any) -> Json:
    response = await endpoint.http.post(FETCH, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_fetch_gives_points_in_the_order_asked_and_names_the_missing(tmp_path: Path) -> None:
    asked = [IDS[7], 10**12, IDS[0], IDS[29], -(2**63)]

    async def scenario(endpoint: Endpoint) -> None:
        answer = await fetched(endpoint, ids=asked)
        expected = [{"id": IDS[row], "attributes": {"name": name_of(IDS[row])}} for row in (7, 0, 29)]
        assert answer["lsn"].keys() == {"0", "1", "2"}
        assert answer == {"points": expected, "missing": [10**12, -(2**63)], "lsn": answer["lsn"]}

    with_words(scenario, tmp_path)


def test_fetch_with_vectors_gives_the_stored_vectors(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        answer = await fetched(endpoint, ids=IDS, with_vectors=True)
        assert [point["vector"] for point in answer["points"]] == POINTS.vectors.tolist()

    with_words(scenario, tmp_path)


def test_fetch_of_a_repeated_id_gives_it_each_time(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        answer = await fetched(endpoint, ids=[IDS[3], 10**12, IDS[3], 10**12])
        assert [point["id"] for point in answer["points"]] == [IDS[3], IDS[3]]
        assert answer["missing"] == [10**12, 10**12]

    with_words(scenario, tmp_path)


def test_fetch_from_an_empty_collection_finds_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, id_type="string", shards=2)
        answer = await fetched(endpoint, ids=["a", ""], with_vectors=True)
        assert answer["lsn"].keys() == {"0", "1"}
        assert answer == {"points": [], "missing": ["a", ""], "lsn": answer["lsn"]}

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("values", [[2**63 - 1, -(2**63), 0], ["", "a/b", "ä\0😀"]], ids=["int64", "string"])
def test_fetch_of_extreme_ids(values: list[Any], tmp_path: Path) -> None:
    id_type = "int64" if isinstance(values[0], int) else "string"
    config = CollectionConfig(2, id_type=id_type, shards=2)  # type: ignore[arg-type]

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points_of(values, np.ones((3, 2), np.float32)))
        answer = await fetched(endpoint, ids=values)
        assert [point["id"] for point in answer["points"]] == values
        assert answer["missing"] == []

    run_with_endpoint(scenario, tmp_path)


WRONG: list[tuple[str, Any]] = [
    ("ids", {}),
    ("ids", {"ids": []}),
    ("ids", {"ids": [1] * 21}),
    ("ids", {"ids": 1}),
    ("ids[1]", {"ids": [1, "a"]}),
    ("ids[0]", {"ids": [2**63]}),
    ("ids[1]", {"ids": [0, -(2**63) - 1]}),
    ("ids[0]", {"ids": [10**30]}),
    ("ids[2]", {"ids": [1, 2, 3.5]}),
    ("ids[0]", {"ids": [None]}),
    ("ids[0]", {"ids": [True]}),
    ("ids[0]", {"ids": [[1]]}),
    ("with_vectors", {"ids": [1], "with_vectors": "yes"}),
    ("with_attributes", {"ids": [1], "with_attributes": ["name"]}),
    ("body", [1]),
]


def test_wrong_fetch_names_the_field(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for field, body in WRONG:
            problem(await endpoint.http.post(FETCH, json=body), 400, field)
        huge = b'{"ids": [1' + b"0" * 5_000 + b"]}"
        problem(await endpoint.http.post(FETCH, content=huge), 400, "ids[0]")
        problem(await endpoint.http.post(FETCH, content=b'{"ids": ["\\udfff"]}'), 400, "body")
        problem(await endpoint.http.post(FETCH, content=b""), 400, "body")
        problem(await endpoint.http.post(FETCH, json={"ids": [1]}, params={"with_vectors": "1"}), 400, "with_vectors")
        assert len((await fetched(endpoint, ids=[10**12] * 20))["missing"]) == 20

    with_words(scenario, tmp_path, limits=Limits(ids_per_fetch=20))


def test_integer_ids_are_refused_where_ids_are_strings(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, id_type="string")
        problem(await endpoint.http.post(FETCH, json={"ids": ["1", 1]}), 400, "ids[1]")

    run_with_endpoint(scenario, tmp_path)


def test_fetch_from_a_lost_shard_is_unavailable_and_from_the_others_not(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        statuses = set()
        for point_id in IDS:
            response = await endpoint.http.post(FETCH, json={"ids": [point_id]})
            statuses.add(response.status_code)
            if response.status_code != 200:
                problem(response, 503)
                assert int(response.headers["retry-after"]) >= 1
        assert statuses == {200, 503}
        problem(await endpoint.http.post(FETCH, json={"ids": IDS}), 503)

    with_words(scenario, tmp_path)


def test_fetch_from_an_unknown_collection_is_not_found(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        problem(await endpoint.http.post(FETCH, json={"ids": [1]}), 404)

    run_with_endpoint(scenario, tmp_path)


ATTRIBUTES: dict[str, tuple[Any, Any]] = {
    "text": (pa.array(["ä"], pa.string()), "ä"),
    "nothing": (pa.array([None], pa.string()), None),
    "flag": (pa.array([True]), True),
    "largest": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "half": (pa.array([np.float16(0.5)]), 0.5),
    "not_a_number": (pa.array([float("nan")]), None),
    "bytes": (pa.array([b"\xff\x00"]), "/wA="),
    "list": (pa.array([[1, None]]), [1, None]),
    "struct": (pa.array([{"a": 1}]), {"a": 1}),
    "day": (pa.array([1], pa.date32()), "1970-01-02"),
    "time_us": (pa.array([1], pa.timestamp("us", "UTC")), "1970-01-01T00:00:00.000001Z"),
    "time_ns": (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "clock_ns": (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    "span_ns": (pa.array([1], pa.duration("ns")), 1),
}


def test_attributes_of_any_type_can_be_told(tmp_path: Path) -> None:
    columns = {name: array for name, (array, _) in ATTRIBUTES.items()}
    vector = pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"id": [7], "vector": vector, **columns}), tmp_path / "rows.parquet")
    expected = {name: value for name, (_, value) in sorted(ATTRIBUTES.items())}

    async def scenario(endpoint: Endpoint) -> None:
        body = {"kind": "import", "source": str(tmp_path / "rows.parquet"), "attribute_columns": "all", "create": {}}
        job_id = (await endpoint.http.post("/v1/collections/words/jobs", json=body)).json()["job_id"]
        assert (await endpoint.run_import(job_id)).state == "succeeded"
        await endpoint.served("words")
        assert (await fetched(endpoint, ids=[7]))["points"] == [{"id": 7, "attributes": expected}]
        answer = await endpoint.search("words", vector=[1, 0], with_attributes=list(expected))
        assert answer.json()["results"][0][0]["attributes"] == expected

    run_with_endpoint(scenario, tmp_path)
