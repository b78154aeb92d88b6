"""The GPU benchmark's own logic, without a GPU: indexes of the stand-in, figures made up where the report is tested."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from actors.exact_search import exact_search
from benchmarks import gpu, gpu_ceilings, gpu_served, gpu_sets
from benchmarks.gpu_ceilings import Ceilings
from benchmarks.gpu_collection import make
from benchmarks.gpu_day import __main__ as gpu_day
from benchmarks.gpu_day import check
from benchmarks.gpu_report import Report, as_markdown, bars, row_of
from benchmarks.gpu_served import Server
from benchmarks.gpu_sets import K, Shape, made, make_set, read_words
from benchmarks.gpu_ways import parts_of, timed, timed_calls
from cluster.arrow_rows import vectors_array
from tests.gpu_double import double_device

ROOT = Path(__file__).parents[2]
TINY = Shape(1_200, 8, "cosine", queries=40)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SMOKE", TINY)
        patch.setattr(gpu_sets, "QUERIES", 40)
        yield


def run(out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """What a run leaves in its folder: JSON and Markdown."""
    given: dict[str, Any] = {"sets": "clusters-96", "kinds": "flat", "words": None, "rounds": 2, "seconds": 0.0}
    given |= {"serve": True, "hnsw": False, "most_s": 60.0, "cpu": False, "smoke": True, "out": out}
    gpu.main(**(given | options))
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


@pytest.fixture(scope="module")
def measured(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("gpu"), kinds="flat,ivf_pq", hnsw=True)


def test_every_way_is_measured_against_raw_search_of_the_same_index(measured: tuple[dict[str, Any], str]) -> None:
    told, text = measured
    assert [case["kind"] for case in told["cases"]] == ["flat", "ivf_pq"]
    for case in told["cases"]:
        assert case["index"].startswith(f"{case['kind']} ")
        assert "on the gpu" in case["index"]
        assert case["degraded"] == ""
        assert case["gpu_memory"]["predicted"] > 0
        assert [row["batch"] for row in case["rows"]] == list(gpu.SMOKE_BATCHES)
        for row in case["rows"]:
            ways = row["ways"]
            assert list(ways) == ["raw", "raw + scores", "shard", "replica x1", "replica x4"]
            assert ways["raw"]["ratio"] == 1.0
            assert all(way["per_second"] > 0 for way in ways.values())
    flat, lists = told["cases"]
    assert set(flat["recall"].values()) == {1.0}
    assert lists["recall"]["shard"] >= 0.9
    assert lists["recall"]["shard"] == lists["recall"]["replica x4"]
    assert told["cpu_hnsw"][0]["threads"] == gpu_sets.cores()
    assert {"what": "actor and HTTP", "why": "not asked for"} in told["skipped"]
    assert "| batch | raw | raw + scores | shard | replica x1 | replica x4 |" in text
    assert f"| {flat['set']} | flat | " in text
    assert text.startswith("NOT measured on a GPU: "), "a stand-in's figures do not pass for a GPU's"


def test_one_kind_that_fails_is_told_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = gpu.make

    def fail_once(data: Path, name: str, *given: Any) -> Any:
        if name.endswith("cagra"):
            raise RuntimeError("out of luck")
        return make(data, name, *given)

    monkeypatch.setattr(gpu, "make", fail_once)
    with pytest.raises(typer.Exit):
        run(tmp_path, kinds="cagra,flat", sets="words,clusters-96")
    told, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert [case["kind"] for case in told["cases"]] == ["flat"]
    assert "- clusters-96, cagra: RuntimeError: out of luck" in text
    assert "in fail_once" in capsys.readouterr().out, "where it came from is in the log"
    assert "- words: no folder with wordnet-minilm-384.parquet" in text


def test_a_way_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the served ones, in the middle of a case."""
    asked = 0

    def fail_later(way: Any, parts: Any, seconds: float) -> float:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise TimeoutError("no answer")
        return 1.0

    monkeypatch.setattr(gpu.ReplicaWay, "rate", fail_later)
    with pytest.raises(typer.Exit):
        run(tmp_path)
    told, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    (case,) = told["cases"]
    assert [list(row["ways"]) for row in case["rows"]] == [["raw", "raw + scores", "shard"]] * 2
    assert list(case["recall"]) == ["raw", "raw + scores", "shard"]
    assert "- clusters-96-flat: replica x1: TimeoutError: no answer" in text
    assert "- clusters-96-flat: replica x4: TimeoutError: no answer" in text


def test_a_server_that_does_not_serve_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(typer.Exit):
        run(tmp_path, smoke=False, cpu=True)
    told, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert [list(row["ways"])[-1] for row in told["cases"][0]["rows"]] == ["replica x4", "replica x4"]
    assert "- actor and HTTP: Unavailable: `eagleray up` did not serve within" in text


def test_a_server_is_known_to_serve_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "eagleray"
    program.write_text("#!/bin/sh\necho 'Eagleray serves http://127.0.0.1:1'\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    server = gpu_served._started(str(tmp_path), 1)
    assert server.poll() is None
    gpu_served._end(server)
    assert server.poll() is not None


def test_the_programs_need_neither_ray_nor_the_endpoints_packages() -> None:
    """A GPU node may have FAISS and little else."""
    block = (
        "import sys\n"
        f"absent = {('ray', 'httpx', 'starlette', 'uvloop', 'httptools', 'prometheus_client')}\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import benchmarks.gpu, benchmarks.gpu_day.check, benchmarks.gpu_day.__main__, tests.gpu.provoke\n"
    )
    subprocess.run([sys.executable, "-c", block], cwd=ROOT, check=True, timeout=60)


def test_no_case_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    told, text = run(tmp_path, most_s=0.0)
    assert told["cases"] == []
    assert "- clusters-96, flat: 0 s were over" in text


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'clusters-1' is none of the sets clusters-96"):
        run(tmp_path, sets="clusters-1")
    with pytest.raises(SystemExit, match="'hnsw' is none of the kinds flat"):
        run(tmp_path, kinds="hnsw")


def test_without_a_gpu_the_program_says_what_runs_without(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--smoke and --cpu run without a GPU"):
        run(tmp_path, smoke=False)


def test_everything_runs_on_a_cpu_when_asked_to(tmp_path: Path) -> None:
    told, _ = run(tmp_path, smoke=False, cpu=True, serve=False, kinds="flat")
    assert told["gpu"]["name"] == "none: CPU indexes"
    assert "on the cpu" in told["cases"][0]["index"]
    assert set(told["cases"][0]["recall"].values()) == {1.0}


def test_without_the_serving_stack_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.gpu_served, "missing", lambda: "ray, uvloop")
    told, text = run(tmp_path, smoke=False, cpu=True)
    assert [list(row["ways"])[-1] for row in told["cases"][0]["rows"]] == ["replica x4", "replica x4"]
    assert "- actor and HTTP: not installed: ray, uvloop" in text


# --- vectors --------------------------------------------------------------------------------------------------------


def test_vectors_are_the_same_however_many_threads_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sets, "CHUNK_FLOATS", 1_024)
    first = make_set("tiny", TINY)
    monkeypatch.setattr(gpu_sets, "cores", lambda: 1)
    again = make_set("tiny", TINY)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    np.testing.assert_array_equal(first.queries, again.queries)
    np.testing.assert_allclose(np.linalg.norm(first.vectors, axis=1), 1.0, rtol=1e-5)
    assert not np.isin(first.queries[:, 0], first.vectors[:, 0]).any(), "queries are other points of the clusters"
    truth = exact_search(first.queries, [(0, first.vectors)], K, "cosine")[0]
    np.testing.assert_array_equal(first.truth, truth)
    assert len(np.unique(made(100, replace(TINY, metric="l2"), 1).round(3), axis=0)) == 100


def test_words_are_read_with_their_own_neighbours(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    points, asked = random.normal(size=(60, 8)), random.normal(size=(7, 8))
    for name, vectors in zip(gpu_sets.WORDS, (points, asked), strict=True):
        pq.write_table(pa.table({"vector": vectors_array(vectors.astype(np.float16))}), tmp_path / name)
    words = read_words(tmp_path, 50)
    assert words.vectors.shape == (50, 8)
    assert words.queries.shape == (40, 8)
    cosine = (words.queries @ words.vectors.T)[: len(words.truth)]
    np.testing.assert_array_equal(words.truth[:, 0], cosine.argmax(axis=1))


# --- timing ---------------------------------------------------------------------------------------------------------


def test_parts_have_the_batch_and_are_bounded() -> None:
    queries = np.arange(200, dtype=np.float32).reshape(100, 2)
    assert [len(part) for part in parts_of(queries, 32)] == [32, 32, 32]
    assert len(parts_of(queries, 1)) == 64
    assert [len(part) for part in parts_of(queries, 1_000)] == [100]


def test_calls_are_timed_at_least_thrice() -> None:
    asked: list[int] = []
    assert timed(lambda part: asked.append(len(part)), [np.zeros(4), np.zeros(4)], 0.0) > 0
    assert asked == [4, 4, 4]


def test_so_many_calls_are_in_flight_and_no_more() -> None:
    flying, most, asked = 0, 0, 0

    async def ask(part: Any) -> None:
        nonlocal flying, most, asked
        flying, asked = flying + 1, asked + 1
        most = max(most, flying)
        await asyncio.sleep(0)
        flying -= 1

    assert asyncio.run(timed_calls(ask, [np.zeros(4)], 0.0, 3)) > 0
    assert (most, asked) == (3, 9)


# --- the report -----------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_round() -> None:
    """The machine was slower in the last round, for both alike."""
    row = row_of(32, {"raw": [100.0, 100.0, 10.0], "shard": [90.0, 90.0, 9.0]}, None)
    assert row["ways"]["shard"] == {"per_second": 90.0, "ratio": 0.9}


def test_flat_search_is_bounded_by_reading_or_by_multiplying() -> None:
    ceilings = Ceilings(1e12, {"float32": 50e12, "float16": 500e12})
    few, why = ceilings.flat_bound(1_000_000, 100, "float32", 1)
    assert (few, why) == (pytest.approx(2_500.0), "memory")
    many, why = ceilings.flat_bound(1_000_000, 100, "float32", 1_000)
    assert (many, why) == (pytest.approx(250_000.0), "float32 products")
    assert ceilings.flat_bound(1_000_000, 100, "float16", 1)[0] == pytest.approx(5_000.0)


def test_bars_tell_what_is_missed() -> None:
    def case(ratio: float, share: float) -> dict[str, Any]:
        slow = row_of(1, {"raw": [100.0], "actor x1": [10.0]}, (1_000.0, "memory"))
        fast = row_of(4_096, {"raw": [100.0], "actor x1": [10.0], "actor x4": [100.0 * ratio]}, (100.0 / share, "x"))
        return {"set": "s", "kind": "flat", "rows": [slow, fast]}

    assert [(bar["reached"], bar["met"]) for bar in bars([case(0.95, 0.8)])] == [
        (pytest.approx(0.95), True),
        (pytest.approx(0.8), True),
    ]
    assert [bar["met"] for bar in bars([case(0.85, 0.6)])] == [False, False]


def test_ceilings_and_bounds_are_in_the_table(measured: tuple[dict[str, Any], str]) -> None:
    told = measured[0]
    report = Report(told["gpu"], Ceilings(3e12, {"float32": 50e12}), told["options"])
    case = deepcopy(told["cases"][0])
    case["rows"][0] |= {"bound_per_second": 2_000.0, "bound_by": "memory", "of_bound": 0.75}
    case |= {"degraded": "the GPU is lost", "out_of_memory": 3, "gpu_memory": {"predicted": 1_000, "measured": None}}
    report.cases.append(case)
    text = as_markdown(report.to_dict())
    assert "Bytes on the GPU: 1,000 predicted, not measured. DEGRADED" in text
    assert "DEGRADED: 3 searches found no memory." in text
    assert "copy 3.00 TB/s (read + written); products, TFLOP/s: float32 50.0." in text
    assert "DEGRADED: the GPU is lost." in text
    assert "| 2,000 (memory) | 0.75 |" in text
    assert "raw / bound, the best batch | 0.7 | 0.75 | yes |" in text


def test_ceilings_without_pytorch_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ceilings.importlib.util, "find_spec", lambda name: None)
    assert gpu_ceilings.measured_ceilings() == "PyTorch is not installed"


# --- a day with a GPU -----------------------------------------------------------------------------------------------


def test_steps_name_sets_kinds_and_tests_that_there_are(tmp_path: Path) -> None:
    for step in gpu_day.STEPS:
        for _, _, module, *given in gpu_day.commands_of(step, tmp_path, tmp_path / "words"):
            if module == gpu_day.BENCHMARK:
                options = dict(zip(given[0::2], given[1::2], strict=False))
                assert set(options["--kinds"].split(",")) <= gpu.KINDS.keys()
                assert set(options["--sets"].split(",")) <= {*gpu_sets.SHAPES, "words"}
                assert {str(tmp_path / step), str(tmp_path / "words"), "--most-s"} <= set(given)
            elif module == "pytest":
                assert all((ROOT / each).is_file() for each in given if each.startswith("tests/"))
            else:
                assert importlib.util.find_spec(module) is not None


def test_output_is_kept_and_a_command_that_fails_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [[sys.executable, "-c", f"print({number}); raise SystemExit({number})"] for number in (3, 0)]
    assert gpu_day.run(commands, tmp_path / "step") == [3, 0]
    log = (tmp_path / "step" / "log.txt").read_text()
    assert log == capsys.readouterr().out
    told = [line for line in log.splitlines() if " $ " not in line]
    assert told[0::2] == ["3", "0"]
    assert [line.split(" after ")[0] for line in told[1::2]] == ["exit code 3", "exit code 0"]
    gpu_day.run(commands, tmp_path / "step")
    assert (tmp_path / "step" / "log.txt").read_text().startswith(log), "what an earlier run told is kept"


def test_a_step_is_ended_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not heed Ctrl-C is killed; then nothing is left for what comes after it."""
    monkeypatch.setattr(gpu_day, "GRACE_S", 0.3)
    deaf = ["/bin/sh", "-c", "trap '' INT; echo begun; sleep 60"]
    assert gpu_day.run([deaf, ["/bin/echo", "second"]], tmp_path, limit_s=0.3) == [-signal.SIGKILL, 1]
    log = (tmp_path / "log.txt").read_text()
    assert "\nbegun\n" in log
    assert "not begun, 0.3 s are over: /bin/echo second" in log


def test_a_command_that_hangs_leaves_time_to_the_next(tmp_path: Path) -> None:
    codes = gpu_day.run([["/bin/sleep", "60"], ["/bin/echo", "second"]], tmp_path, limit_s=0.8)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [-signal.SIGINT, 0]
    assert "it ran 0.7 s: SIGINT" in log
    assert "\nsecond\n" in log


def test_what_a_command_leaves_behind_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on writing where the command did, as a cluster would."""
    monkeypatch.setattr(gpu_day, "READ_S", 0.1)
    started = time.monotonic()
    assert gpu_day.run([["/bin/sh", "-c", "echo said; setsid sleep 5 & exit 4"]], tmp_path) == [4]
    assert time.monotonic() - started < 3.0
    assert "\nsaid\n" in (tmp_path / "log.txt").read_text()


def test_output_that_is_no_text_ends_nothing(tmp_path: Path) -> None:
    assert gpu_day.run([["/usr/bin/printf", r"\377 x\n"]], tmp_path) == [0]
    assert " x\n" in (tmp_path / "log.txt").read_text()


def test_steps_by_the_stand_in_are_told_so(tmp_path: Path) -> None:
    """Else a run on a node would measure nothing, or one without a GPU fail."""
    for step in gpu_day.STEPS:
        for _, _, module, *given in gpu_day.commands_of(step, tmp_path, None, double=True):
            assert ({"pytest": "-s", gpu_day.CHECK: "--double", gpu_day.BENCHMARK: "--smoke"}[module]) in given
        for _, _, _, *given in gpu_day.commands_of(step, tmp_path, None):
            assert not {"--double", "--smoke"} & set(given)
    assert gpu_day.environment_of(None, True)["EAGLERAY_GPU_DOUBLE"] == "20"
    assert gpu_day.environment_of(None, False)["EAGLERAY_GPU_DOUBLE"] == "0"
    assert gpu_day.environment_of(tmp_path, False)["EAGLERAY_WORDS"] == str(tmp_path)


def test_kind_that_is_not_on_the_gpu_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its twin answers right, on the CPU."""

    def made_without_room(*given: Any) -> Any:
        made = make(*given)
        assert made.segment.twin is not None
        made.segment.twin.demote("no room")
        return made

    monkeypatch.setattr(check.GpuDevice, "open", lambda share: double_device(memory_bytes=gpu.SMOKE_BYTES))
    monkeypatch.setattr(check, "KINDS", {"flat": check.KINDS["flat"]})
    assert check.main(shape=TINY) == 0
    told = capfd.readouterr().out
    assert "of the slack 0.005; 100.0% comparable; 1.0000 of the recorded neighbours" in told
    monkeypatch.setattr(check, "make", made_without_room)
    assert check.main(shape=TINY) == 1
    told = capfd.readouterr()
    assert "flat, first: FAILED" in told.out
    assert "not on the GPU: no room; 63 self-test queries: scores off by" in told.err, "its figures all the same"


@pytest.mark.parametrize(
    ("replica", "told"),
    [
        ({"degraded": "", "gpu": {"out_of_memory": 0}}, ""),
        ({"degraded": "", "gpu": None}, ""),
        ({"degraded": "the GPU is lost", "gpu": None}, "the served replica: the GPU is lost"),
        ({"degraded": "", "gpu": {"out_of_memory": 2}}, "2 searches of the served replica found no memory"),
    ],
)
def test_searches_that_the_cpu_answered_are_told_of_the_served_ways_too(replica: dict[str, Any], told: str) -> None:
    client = SimpleNamespace(collection=lambda name: {"shards": [{"replicas": [replica]}]})
    assert Server("", client, None).trouble("words") == told
