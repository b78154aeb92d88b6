"""Runs of the model, each by its seed: in this process, or several at a time in processes of their own."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from tests.model.cases import Case
from tests.model.model import Model

PROCESSES = 2


@dataclass(frozen=True)
class Run:
    """`number` chooses the collection's config (`Case.of`); `failing` of a million store calls go wrong."""

    number: int
    seed: int
    steps: int
    failing: int = 0
    pool: int = 200  # ids
    points: int = 50  # most that one request upserts


def run(one: Run) -> Counter[str]:
    """Take the steps of a run; ModelError where anything is wrong. Returns how often each kind was taken.

    Segments are tuned for their own target only, and few threads read the WAL ahead: what the steps are about is the
    same, and they take an eighth less.
    """
    logging.disable(logging.WARNING)  # of a failing store there are thousands
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("actors.tuner.STANDARD_TARGETS", ()),
        mock.patch("cluster.wal.READ_WINDOW", 2),
    ):
        case = Case.of(one.number, np.random.default_rng(one.seed), one.pool)
        model = Model(case, one.seed, Path(folder), one.failing, one.points)
        model.run(one.steps)
        return model.counts


def run_all(runs: Iterable[Run]) -> Iterator[tuple[Run, Counter[str] | BaseException]]:
    """Each run with the kinds of steps taken, or its error, as they end. Not forked: FAISS may have run here."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, one): one for one in runs}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()
