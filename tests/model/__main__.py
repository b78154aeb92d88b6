"""The soak: `python -m tests.model [SECONDS]` runs ever new seeds, for ever or for so long. Ends at the first error."""

from __future__ import annotations

import itertools
import sys
import time

from tests.model.runs import PROCESSES, Run, run_all


def main(seconds: float) -> int:
    """The exit code: 1 after an error, whose message says how to do it again."""
    ends = time.monotonic() + seconds
    first, total = int(time.time()), 0
    print(f"seeds from {first} on")
    for number in itertools.count(0, 2 * PROCESSES):
        failing = 20_000 if number // (2 * PROCESSES) % 5 == 4 else 0
        runs = [
            Run(number + i, first + number + i, 1_000 if failing else 5_000, failing, pool=2_000, points=200)
            for i in range(2 * PROCESSES)
        ]
        for run, outcome in run_all(runs):
            if isinstance(outcome, BaseException):
                print(f"{run}: {outcome}")
                return 1
            total += sum(outcome.values())
        print(f"{total:,} steps, all right")
        if time.monotonic() > ends:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")))
