"""Rebuilds onto GPUs, to another share of one and back while there are searches and writes: nobody notices, nothing is
lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.placement import ReplicaKey
from jobs import build_device
from tests.gpu_double import double_device
from tests.unit.jobs.under_load import COLLECTION, Load, Shape, run_under_load, until


@pytest.fixture(autouse=True)
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of build tasks, and old replicas that are ended soon."""
    monkeypatch.setattr(build_device.GpuDevice, "open", lambda share: double_device(share=share))
    monkeypatch.setattr("actors.supervisor.RETIRE_AFTER_S", 0.3)


async def only_with(load: Load, share: float) -> None:
    """Until none but the replicas with that share of a GPU are there; with some its index answers, not the twin."""
    key = ReplicaKey(COLLECTION, 0, 0, share)
    await until(lambda: load.runtime.existing() == [key], f"{key} is the only replica")
    status = load.runtime.replica(key).status()
    assert status.epoch > 0, "it leads"
    assert (status.gpu["share"] if status.gpu else 0.0, status.degraded) == (share, "")
    assert {segment["device"] for segment in status.segments} == {key.device}
    assert load.runtime.free_gpus == load.shape.gpus - share


def test_device_and_share_change_under_load(tmp_path: Path) -> None:
    """Other replicas take over each time, also from those that came back; the same share needs none."""

    async def scenario(load: Load) -> None:
        await load.run_job("to a GPU", load.rebuild(index={"device": "gpu", "num_gpus": 1.0}))
        await only_with(load, 1.0)
        first = load.runtime.replica(ReplicaKey(COLLECTION, 0, 0, 1.0))
        await load.run_job("on the GPU", load.rebuild())
        await only_with(load, 1.0)
        assert load.runtime.replica(ReplicaKey(COLLECTION, 0, 0, 1.0)) is first
        await load.run_job("to a quarter", load.rebuild(index={"num_gpus": 0.25}))
        await only_with(load, 0.25)
        assert load.log.newest_live().config.index.num_gpus == 0.25
        await load.run_job("back", load.rollback())
        await only_with(load, 1.0)
        assert load.log.newest_live().config.index.num_gpus == 1.0
        await load.run_job("to CPUs", load.rebuild(index={"device": "cpu"}))
        await only_with(load, 0.0)

    load = run_under_load(scenario, tmp_path, Shape(points=400, index={"kind": "auto"}, gpus=2.0))
    assert load.failed_writes == []
    assert {key.num_gpus for key in load.runtime.led} == {0.0, 0.25, 1.0}
