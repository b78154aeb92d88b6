"""Operating points and loads from the words of `eagleray bench`."""

from __future__ import annotations

import pytest

from cluster.errors import Invalid
from serve.bench_plan import (
    Shape,
    check_target,
    load_shapes,
    operating_points,
    read_formats,
    read_numbers,
    read_params,
    read_sweep,
)


def test_params_are_numbers_by_name() -> None:
    assert read_params("params", "ef_search=32,rerank=1.5") == {"ef_search": 32, "rerank": 1.5}
    assert read_params("params", "") == {}


def test_sweep_gives_an_operating_point_per_value_beside_what_is_fixed() -> None:
    assert read_sweep("nprobe=1,8") == [{"nprobe": 1}, {"nprobe": 8}]
    assert read_sweep("itopk_size=64,128") == [{"itopk_size": 64}, {"itopk_size": 128}]
    assert read_sweep("search_width=1,4") == [{"search_width": 1}, {"search_width": 4}]
    points = operating_points("rerank=2", None, "ef_search=16,64")
    assert points == ({"rerank": 2.0, "ef_search": 16}, {"rerank": 2.0, "ef_search": 64})
    assert operating_points("", 0.9, None) == ({"target_recall": 0.9},)
    assert operating_points("", None, None) == ({},)


@pytest.mark.parametrize(
    ("params", "target_recall", "sweep", "named"),
    [
        ("ef=3", None, None, "params: must look like ef_search=32"),
        ("ef_search", None, None, "params: must look like"),
        ("ef_search=a", None, None, "params: 'a' is not an integer"),
        ("rerank=x", None, None, "params: 'x' is not a number"),
        ("target_recall=0.9", 0.9, None, "target_recall: is given by --params as well"),
        ("ef_search=3", None, "ef_search=4,5", "sweep: ef_search is fixed"),
        ("", None, "ef_search", "sweep: must look like"),
        ("", None, "ef_search=4,4", "sweep: must be different values"),
        ("", None, "speed=1,2", "sweep: must look like"),
    ],
)
def test_wrong_operating_points_name_the_option(
    params: str, target_recall: float | None, sweep: str | None, named: str
) -> None:
    with pytest.raises(Invalid, match=named):
        operating_points(params, target_recall, sweep)


def test_shapes_are_all_combinations_but_those_with_too_much_in_flight() -> None:
    shapes, left_out = load_shapes(["json", "arrow"], [1, 256], [1, 64], [100.0], 32, in_flight_max=256)
    closed = [shape for shape in shapes if shape.loop == "closed"]
    assert len(closed) == 6
    assert Shape("arrow", 256, 1) in closed
    assert left_out == (Shape("json", 256, 64), Shape("arrow", 256, 64))
    assert [shape for shape in shapes if shape.loop == "open"] == [
        Shape(name, batch, 32, 100.0) for name in ("json", "arrow") for batch in (1, 256)
    ]


def test_rate_of_a_batch_is_in_vectors() -> None:
    assert Shape("json", 4, 1, 100.0).requests_per_s == 25.0
    assert Shape("json", 4, 1).requests_per_s is None
    assert str(Shape("json", 4, 1, 1_000.0)) == "json, 4 a request, 1 connection, 1,000 vectors/s"


@pytest.mark.parametrize(("text", "named"), [("", "different values"), ("1,,2", "different values"),
                                             ("1,1", "different values"), ("a", "not an integer"),
                                             ("0", "from 1 up, not 0")])  # fmt: skip
def test_wrong_numbers_name_the_option(text: str, named: str) -> None:
    with pytest.raises(Invalid, match=f"batch: .*{named}"):
        read_numbers("batch", text, int, 1)


def test_rate_must_be_finite() -> None:
    with pytest.raises(Invalid, match="rate: must be numbers from"):
        read_numbers("rate", "inf", float, 0.01)


def test_unknown_format_is_named() -> None:
    assert read_formats("arrow,json") == ["arrow", "json"]
    with pytest.raises(Invalid, match="format: must be of json, arrow, not 'xml'"):
        read_formats("json,xml")


@pytest.mark.parametrize("target", ["https://h:1", "h:1", "http://", "http://h:1/path"])
def test_target_must_be_plain_http(target: str) -> None:
    with pytest.raises(Invalid, match=r"compare: must look like http://127\.0\.0\.1:8000"):
        check_target("compare", target)
    assert check_target("target", "http://h:1/") == "http://h:1"
