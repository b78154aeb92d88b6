"""One Eagleray, started as a user does, for all modules of this folder: each has a collection of its own on it.

Its shards have as many threads on every machine, for the sake of the one module that measures.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.speed_guard import UP_OPTIONS
from tests.ray.server import RunningServer


@pytest.fixture(scope="package")
def eagleray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path_factory.mktemp("data") / "data", *UP_OPTIONS)
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.stop()
        server.client.close()
