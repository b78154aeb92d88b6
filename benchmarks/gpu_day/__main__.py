"""A day with a GPU node: everything that needs one, in steps of less than nine minutes each.

    python -m benchmarks.gpu_day STEP... --out FOLDER [--words FOLDER]

Prepare. An environment with `requirements.txt` of this folder, which is `eagleray[gpu]` and pytest; PyTorch for CUDA 13
where ceilings shall be measured (it may be in the same environment: it runs in processes of its own). A node without a
network: `prepare.sh`. Without Ray and the endpoint's packages the steps leave out the actor and HTTP, and say so. The
WordNet set is left out unless --words names the folder with its two files.

Steps, in the order of what one wants to know first:
    check    1 to 2 minutes: do FAISS, cuVS and the GPU work together; each kind built and searched once, with figures
    indexes  tests/gpu: every kind under every metric; in three processes, so that one which FAISS ends, as it does
             where it only asserts, takes no other tests with it
    memory   tests/gpu: predicted and measured bytes, generations, words
    trouble  tests/gpu: no memory, a lost device and wrong answers; twelve processes that may die
    flat     exact search of 1M x 96 and 1M x 768, float32 and float16, beside the ceilings
    graph    CAGRA on 1M x 96, 1M x 768 and words, beside an HNSW built by all cores
    lists    IVF-PQ and IVF-Flat on 1M x 96 and 1M x 768
    rest     the others, on 1M x 128 and words

A step is ended after `LIMIT_S`; each of its commands leaves some of that to those after it. What comes back:
FOLDER/STEP/log.txt, to which another run of the step is added, and, of the last four, gpu.json and gpu.md, which are
written anew after each index: of a step that was ended they have what was measured until then. Some 100 KB each.

With --double all steps run small on a CPU, by a stand-in for the GPU: to try these programs, not to measure.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Annotated, TextIO

import typer

LIMIT_S, GRACE_S = 480.0, 50.0  # to end by itself, as by Ctrl-C: what it started is ended first
KEPT_SHARE = 1 / 8  # of the limit, for each command that comes after one
READ_S = 5.0  # for the last lines of a command that has ended, where something that it left behind holds its output
NO_NEW_CASE_S = 330.0
DOUBLE_SMALLER = 20  # by this factor the tests have fewer points with the stand-in
BENCHMARK, CHECK = "benchmarks.gpu", "benchmarks.gpu_day.check"
WIDE = "clusters-96,clusters-768"
# Which test runs is told before it does; where one hangs, all threads' stacks; at the end how long each took.
PYTEST = (
    *("pytest", "-s", "-v", "-p", "no:cacheprovider", "-W", "default"),
    *("-o", "faulthandler_timeout=100", "--durations=0", "--durations-min=0.5"),
)
INDEXES, OTHERS = "tests/gpu/test_gpu_indexes.py", ("memory", "generations", "words")
STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "check": ((CHECK,),),
    "indexes": tuple((*PYTEST, INDEXES, "-k", kind) for kind in ("flat and not ivf and not cagra", "ivf", "cagra")),
    "memory": tuple((*PYTEST, f"tests/gpu/test_gpu_{name}.py") for name in OTHERS),
    "trouble": ((*PYTEST, "tests/gpu/test_gpu_trouble.py"),),
    "flat": ((BENCHMARK, "--sets", WIDE, "--kinds", "flat,flat float16", "--no-hnsw"),),
    "graph": ((BENCHMARK, "--sets", f"{WIDE},words", "--kinds", "cagra"),),
    "lists": ((BENCHMARK, "--sets", WIDE, "--kinds", "ivf_pq,ivf_flat"),),
    "rest": ((BENCHMARK, "--sets", "words,clusters-128", "--kinds", "flat,ivf_pq,cagra,cagra float16"),),
}


def main(
    steps: Annotated[list[str], typer.Argument(help=f"Of {', '.join(STEPS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for what comes back.")],
    words: Annotated[Path | None, typer.Option(help="Folder with the WordNet set.")] = None,
    double: Annotated[bool, typer.Option("--double", help="Small, on a CPU, by a stand-in for the GPU.")] = False,
) -> None:
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: steps are {', '.join(STEPS)}")
    codes: dict[str, list[int]] = {}
    for step in steps:
        codes[step] = run(commands_of(step, out, words, double), out / step, environment=environment_of(words, double))
        print(f"exit codes: {codes}", flush=True)
    raise typer.Exit(int(any(any(each) for each in codes.values())))


def commands_of(step: str, out: Path, words: Path | None, double: bool = False) -> list[list[str]]:
    """With this Python; benchmarks leave their report in the step's folder."""
    report = ["--most-s", f"{NO_NEW_CASE_S:g}", "--out", str(out / step)]
    report += [] if words is None else ["--words", str(words)]
    report += ["--smoke"] if double else []
    given = {BENCHMARK: report, CHECK: ["--double"] if double else []}
    return [[sys.executable, "-m", *command, *given.get(command[0], [])] for command in STEPS[step]]


def environment_of(words: Path | None, double: bool) -> dict[str, str]:
    """What the commands read there: of the tests what they have no options for. A process that dies tells where."""
    told = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    told |= {} if words is None else {"EAGLERAY_WORDS": str(words.absolute())}
    return told | {"EAGLERAY_GPU_DOUBLE": str(DOUBLE_SMALLER if double else 0)}


def run(
    commands: Sequence[Sequence[str]],
    folder: Path,
    limit_s: float = LIMIT_S,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[int]:
    """Exit codes of commands, one after the other, whose output goes to the terminal and to `log.txt`.

    All of them have `limit_s` together; what runs too long is ended as by Ctrl-C, and what then has no time not begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until_s, codes = time.monotonic() + limit_s, []
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for after, command in zip(range(len(commands) - 1, -1, -1), commands, strict=True):
            left_s = until_s - time.monotonic() - after * KEPT_SHARE * limit_s
            if left_s <= 0.0:
                _tell(f"not begun, {limit_s:g} s are over: {shlex.join(command)}\n", log)
                codes.append(1)
            else:
                codes.append(_run(command, log, left_s, environment))
    return codes


def _run(command: Sequence[str], log: TextIO, limit_s: float, environment: Mapping[str, str]) -> int:
    started = time.monotonic()
    _tell(f"{time.strftime('%H:%M:%S')} $ {shlex.join(command)}\n", log)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | dict(environment),
        start_new_session=True,
    ) as process:
        reader = threading.Thread(target=_read, args=(process.stdout, log), daemon=True)
        reader.start()
        code = _ended(process, limit_s, log)
        reader.join(READ_S)
        _tell(f"exit code {code} after {time.monotonic() - started:.1f} s\n", log)
        if reader.is_alive():  # some process that it started lives on: to close what it writes to would wait for it
            process.stdout = None
        return code


def _ended(process: subprocess.Popen[str], limit_s: float, log: TextIO) -> int:
    """The exit code; after the limit, that of what was ended with all that it started."""
    for sent, wait_s in ((signal.SIGINT, limit_s), (signal.SIGKILL, GRACE_S)):
        try:
            return process.wait(wait_s)
        except subprocess.TimeoutExpired:
            _tell(f"it ran {wait_s:.1f} s: {sent.name}\n", log)
            os.killpg(process.pid, sent)
        except KeyboardInterrupt:  # it is in a session of its own, which the terminal does not end
            os.killpg(process.pid, signal.SIGINT)
            raise
    return process.wait()


def _read(lines: IO[str], log: TextIO) -> None:
    with lines:
        for line in lines:
            _tell(line, log)


def _tell(line: str, log: TextIO) -> None:
    print(line, end="", flush=True)
    if not log.closed:
        log.write(line)
        log.flush()


if __name__ == "__main__":
    typer.run(main)
