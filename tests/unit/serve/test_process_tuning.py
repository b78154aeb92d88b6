from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from serve.process_tuning import COLLECT_AFTER_OBJECTS, tune_process


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    """What they were, and will be again."""
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_collections_become_rare_but_do_not_end(thresholds: tuple[int, int, int]) -> None:
    tune_process()
    assert gc.get_threshold() == (COLLECT_AFTER_OBJECTS, *thresholds[1:])
    assert gc.isenabled()
