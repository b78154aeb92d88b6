"""The model in CI: 20,000 steps over collections of every metric, id type and kind of index. `make soak` goes on."""

from __future__ import annotations

from collections import Counter

from tests.model.model import STEPS
from tests.model.runs import Run, run_all

SEED = 20_261_125
RUNS = [Run(number, SEED + number, steps=1_000) for number in range(20)]
FAILING_RUNS = [Run(number, SEED + 100 + number, steps=250, failing=20_000) for number in range(8)]


def check(runs: list[Run]) -> Counter[str]:
    """Run them all; how often each kind of step was taken."""
    taken: Counter[str] = Counter()
    for run, outcome in run_all(runs):
        if isinstance(outcome, BaseException):
            raise AssertionError(f"{run}: {outcome}") from outcome
        taken += outcome
    assert sum(taken.values()) == sum(run.steps for run in runs)
    return taken


def test_shard_equals_the_model_after_every_step() -> None:
    assert sum(run.steps for run in RUNS) == 20_000
    assert check(RUNS).keys() == STEPS.keys()


def test_shard_equals_the_model_on_a_store_that_fails_now_and_then() -> None:
    check(FAILING_RUNS)
