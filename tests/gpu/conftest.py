"""Tests that need a GPU. Each is marked `gpu`, and skipped with the reason where there is none.

They need neither Ray nor the serving stack: FAISS with cuVS, numpy, pyarrow, and what `actors` imports.

With EAGLERAY_GPU_DOUBLE=20 all of them run small against the stand-in of `tests.gpu_double`: whether they are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Unavailable
from tests.gpu.stand_in import DOUBLE, WARNING, open_device

HERE = Path(__file__).parent


def pytest_report_header() -> list[str]:
    """What a log must tell to be read without the node."""
    from benchmarks.gpu_figures import node_facts
    from benchmarks.gpu_report import machine, versions

    return [*([WARNING] if DOUBLE else []), f"{versions()}; {machine()}", *node_facts()]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if DOUBLE:
        terminalreporter.write_line(WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def refuse_ray() -> None:
    """In place of the fixture for all tests, which imports Ray."""


@pytest.fixture(scope="session")
def device() -> Iterator[Any]:
    """The GPU of this process, all of it."""
    try:
        opened = open_device()
    except Unavailable as error:
        pytest.skip(f"needs a GPU: {error}")
    yield opened
    opened.close()
