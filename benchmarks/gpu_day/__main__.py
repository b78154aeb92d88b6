"""A day with a GPU node: everything that needs one, in steps of less than nine minutes each.

    python -m benchmarks.gpu_day STEP... --out FOLDER [--words FOLDER]

Prepare. An environment with `requirements.txt` of this folder, which is `eagleray[gpu]` and pytest; PyTorch for CUDA 13
where ceilings shall be measured (it may be in the same environment: it runs in processes of its own). A node without a
network: `prepare.sh`. Without Ray and the endpoint's packages the steps leave out the actor and HTTP, and say so. The
WordNet set is left out unless --words names the folder with its two files.

Steps, in the order of what one wants to know first:
    check   1 to 2 minutes: do FAISS, cuVS and the GPU work together; each kind built and searched once
    tests   tests/gpu, with what they print: recall, predicted and measured bytes; in several processes, so that one
            which FAISS ends, as it does where it only asserts, takes no other tests with it
    flat    exact search of 1M x 96 and 1M x 768, float32 and float16, beside the ceilings
    graph   CAGRA on 1M x 96, 1M x 768 and words, beside an HNSW built by all cores
    lists   IVF-PQ and IVF-Flat on 1M x 96 and 1M x 768
    rest    the others, on 1M x 128 and words

A step is ended after `LIMIT_S`. What comes back: FOLDER/STEP/log.txt and, of the last four, gpu.json and gpu.md, which
are written anew after each index: of a step that was ended they have what was measured until then. Some 100 KB each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer

LIMIT_S, GRACE_S = 480.0, 50.0  # to end by itself, as by Ctrl-C: what it started is ended first
NO_NEW_CASE_S = 330.0
BENCHMARK = "benchmarks.gpu"
WIDE = "clusters-96,clusters-768"
PYTEST = ("pytest", "-s", "-p", "no:cacheprovider", "-W", "default")
INDEXES, OTHERS = "tests/gpu/test_gpu_indexes.py", ("memory", "generations", "trouble", "words")
STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "check": (("benchmarks.gpu_day.check",),),
    "tests": (
        *((*PYTEST, INDEXES, "-k", kind) for kind in ("flat and not ivf", "ivf", "cagra")),
        *((*PYTEST, f"tests/gpu/test_gpu_{name}.py") for name in OTHERS),
    ),
    "flat": ((BENCHMARK, "--sets", WIDE, "--kinds", "flat,flat float16", "--no-hnsw"),),
    "graph": ((BENCHMARK, "--sets", f"{WIDE},words", "--kinds", "cagra"),),
    "lists": ((BENCHMARK, "--sets", WIDE, "--kinds", "ivf_pq,ivf_flat"),),
    "rest": ((BENCHMARK, "--sets", "words,clusters-128", "--kinds", "flat,ivf_pq,cagra,cagra float16"),),
}


def main(
    steps: Annotated[list[str], typer.Argument(help=f"Of {', '.join(STEPS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for what comes back.")],
    words: Annotated[Path | None, typer.Option(help="Folder with the WordNet set.")] = None,
) -> None:
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: steps are {', '.join(STEPS)}")
    codes = {step: run(commands_of(step, out, words), out / step) for step in steps}
    print(f"exit codes: {codes}")
    raise typer.Exit(int(any(any(each) for each in codes.values())))


def commands_of(step: str, out: Path, words: Path | None) -> list[list[str]]:
    """With this Python; benchmarks leave their report in the step's folder."""
    given = ["--most-s", f"{NO_NEW_CASE_S:g}", "--out", str(out / step)]
    given += [] if words is None else ["--words", str(words)]
    return [[sys.executable, "-m", *command, *(given if command[0] == BENCHMARK else [])] for command in STEPS[step]]


def run(commands: Sequence[Sequence[str]], folder: Path, limit_s: float = LIMIT_S) -> list[int]:
    """Exit codes of commands, one after the other, whose output goes to the terminal and to `log.txt`.

    All of them have `limit_s` together; what runs then is ended as by Ctrl-C, and no other one begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until_s, codes = time.monotonic() + limit_s, []
    with (folder / "log.txt").open("w") as log:
        for command in commands:
            left_s = until_s - time.monotonic()
            if left_s <= 0.0:
                log.write(f"not begun, {limit_s:g} s are over: {' '.join(command)}\n")
                codes.append(1)
            else:
                codes.append(_run(command, log, left_s))
    return codes


def _run(command: Sequence[str], log: TextIO, limit_s: float) -> int:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        ends = [
            threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGINT)),
            threading.Timer(limit_s + GRACE_S, os.killpg, (process.pid, signal.SIGKILL)),
        ]
        for end in ends:
            end.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            return process.wait()
        finally:
            for end in ends:
                end.cancel()


if __name__ == "__main__":
    typer.run(main)
