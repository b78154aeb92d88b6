"""Some of the tests that need a GPU, run against the stand-in: that their code is right, before a GPU is at hand.

`make test-gpu-double` runs all of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import test_gpu_trouble
from tests.gpu.test_gpu_trouble import provoked

ROOT = Path(__file__).parents[2]
SMALLER = 50  # 1,200 points
TESTS = (
    *(
        f"test_gpu_indexes.py::test_{name}"
        for name in (
            "index_is_of_its_kind_on_the_gpu_and_its_file_is_read_by_a_cpu[cagra-l2]",
            "queries_that_are_asked_one_by_one_find_as_much[cagra-l2]",
            "raw_search_of_the_same_index_finds_the_same[cagra-l2]",
            "parameters_go_with_the_call_and_change_no_other[cagra-l2]",
            "deleted_rows_are_not_found_and_cost_no_recall[cagra-l2]",
            "the_twins_own_recall_reaches_the_target[cagra-l2]",
            "limits_of_the_kinds_are_refused_or_answered_by_the_twin[ivf-flat-cosine]",
            "the_gpu_itself_finds_only_what_a_filter_keeps[ivf-flat-cosine-0.1]",
            "scores_are_those_of_the_rows[ivf-flat-cosine]",
            "flat_answers_are_the_cpus_within_tolerance[flat-float16-ip]",
            "an_answer_of_the_gpu_is_not_marked[flat-float16-ip]",
        )
    ),
    "test_gpu_memory.py::test_bytes_of_a_loaded_index_are_about_as_predicted[flat]",
    "test_gpu_generations.py::test_a_switch_serves_both_generations_and_then_the_new_one_alone[ivf_flat]",
    "test_gpu_generations.py::test_writes_are_seen_beside_the_index_on_the_gpu",
    "test_gpu_trouble.py::test_an_index_over_its_share_is_not_placed_and_the_twin_answers[flat]",
    "test_gpu_trouble.py::test_wrong_answers_above_100000_rows_are_noticed_at_load[scores-flat]",
    "test_gpu_trouble.py::test_a_search_without_memory_is_answered_by_the_twin_and_the_next_by_the_gpu[ivf_flat]",
)


def test_tests_for_gpus_pass_with_the_stand_in() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--durations=10"]
    done = subprocess.run(
        [*command, *(f"tests/gpu/{name}" for name in TESTS)],
        cwd=ROOT,
        env=os.environ | {"EAGLERAY_GPU_DOUBLE": str(SMALLER), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{len(TESTS)} passed" in done.stdout
    assert "NO GPU: EAGLERAY_GPU_DOUBLE is set" in done.stdout
    print(done.stdout)


# --- what becomes of a process that may die -----------------------------------------------------------------------


TRAPPED = "the kernel ended with CUDA_ERROR_LAUNCH_FAILED (719)\n"


def ends(patch: pytest.MonkeyPatch, code: int, said: str, answer: str = "") -> None:
    done = subprocess.CompletedProcess([], code, answer, said)
    patch.setattr(test_gpu_trouble.subprocess, "run", lambda *given, **named: done)


def test_process_that_faiss_ended_for_a_lost_device_is_as_good_as_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends(monkeypatch, -signal.SIGABRT, TRAPPED)
    assert provoked("lost", "flat", tmp_path, may_abort=True) == {}
    ends(monkeypatch, -signal.SIGABRT, TRAPPED, 'a line\n{"error": "719"}\n')
    assert provoked("lost", "flat", tmp_path, may_abort=True) == {"error": "719"}, "it answered, and died as it ended"


@pytest.mark.parametrize(
    ("may_abort", "code", "said", "answer"),
    [
        (False, -signal.SIGABRT, TRAPPED, ""),
        (True, -signal.SIGABRT, "before: {}\n", ""),
        (True, -signal.SIGABRT, "the kernel ended with no error\n", ""),
        (True, -signal.SIGSEGV, TRAPPED, ""),
        (True, 1, f"{TRAPPED}Traceback ...\n", ""),
        (False, 1, "", "{}\n"),
    ],
)
def test_process_that_died_otherwise_fails(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    may_abort: bool,
    code: int,
    said: str,
    answer: str,
) -> None:
    ends(monkeypatch, code, said, answer)
    with pytest.raises(AssertionError):
        provoked("full", "flat", tmp_path, may_abort)
    assert f"full, flat: exit code {code}\n{said}" in capsys.readouterr().out


def test_process_that_hangs_fails_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(command: list[str], **named: object) -> None:
        raise subprocess.TimeoutExpired(command, 120, output=None, stderr=b"on the GPU: ...\n")

    monkeypatch.setattr(test_gpu_trouble.subprocess, "run", hang)
    with pytest.raises(pytest.fail.Exception, match=r"not done after 120 s\non the GPU"):
        provoked("lost", "flat", tmp_path)
