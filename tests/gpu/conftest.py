"""Tests that need a GPU. Each is marked `gpu`, and skipped with the reason where there is none.

They need neither Ray nor the serving stack: FAISS with cuVS, numpy, pyarrow, and what `actors` imports.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Unavailable

HERE = Path(__file__).parent


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
    from actors.gpu_device import GpuDevice

    try:
        opened = GpuDevice.open(1.0)
    except Unavailable as error:
        pytest.skip(f"needs a GPU: {error}")
    yield opened
    opened.close()
