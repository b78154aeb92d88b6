"""The HTTP endpoint over replicas that have GPUs: the stand-in for FAISS's GPU part, one per replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from actors.gpu_device import GpuDevice
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig
from cluster.object_store import open_store
from tests.fakes import LocalRuntime, serving
from tests.gpu_double import GpuDouble, double_device
from tests.unit.actors.gpu_segments import committed, double_of, published
from tests.unit.actors.points import Points
from tests.unit.serve.endpoint import TEST_TIMEOUT_S, Endpoint, EndpointOptions, another_endpoint, memory_url


class Gpus:
    """The devices that replicas opened, in order."""

    def __init__(self) -> None:
        self.doubles: list[GpuDouble] = []

    def open(self, share: float) -> GpuDevice:
        device = double_device(share=share)
        self.doubles.append(double_of(device))
        return device


@asynccontextmanager
async def running_gpu_endpoint(cache_dir: Path, total: float) -> AsyncIterator[tuple[Endpoint, Gpus]]:
    """`total` GPUs are there."""
    data, gpus = memory_url(), Gpus()
    store = open_store(data)
    runtime = LocalRuntime(store, cache_dir, gpus=total, open_gpu=gpus.open)
    try:
        async with (
            serving(store, cache_dir, runtime=runtime) as eagleray,
            another_endpoint(eagleray, data, EndpointOptions(gpus=lambda: counted(runtime))) as endpoint,
        ):
            yield endpoint, gpus
    finally:
        runtime.close()


def counted(runtime: LocalRuntime) -> ClusterGpus:
    return ClusterGpus(runtime._gpus, runtime.free_gpus)


def run_with_gpus(scenario: Callable[[Endpoint, Gpus], Awaitable[None]], tmp_path: Path, total: float = 2.0) -> None:
    """Run a scenario on a fresh Eagleray in memory, with so many GPUs."""

    async def run() -> None:
        async with (
            asyncio.timeout(TEST_TIMEOUT_S),
            running_gpu_endpoint(tmp_path / "cache", total) as (endpoint, gpus),
        ):
            await scenario(endpoint, gpus)

    asyncio.run(run())


async def publish(
    endpoint: Endpoint, config: CollectionConfig, points: Points, device: GpuDevice | None = None
) -> None:
    """Make them `words`, served on GPUs; built on `device`, or without one where the kind can be."""
    ref = await asyncio.to_thread(published, endpoint.store, config, points, device)
    manifest = await asyncio.to_thread(committed, endpoint.store, config, ref)
    await endpoint.eagleray.directory.refresh("words")
    await endpoint.served("words", manifest.version)
