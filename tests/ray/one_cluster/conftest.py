"""One Ray of this process for all modules of this folder: each would wait as long as most of its tests for its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="package", autouse=True)
def cluster() -> Iterator[None]:
    """Two CPUs, and two GPUs that Ray only counts. It ends with the last test of the folder; tests end the actors they
    start."""
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, namespace="test",
             object_store_memory=100 * 1024 * 1024, _temp_dir="/tmp/er-test-ray")  # fmt: skip
    yield
    ray.shutdown()
