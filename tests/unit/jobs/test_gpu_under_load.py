"""Rebuilds onto GPUs and back on a collection that is searched and written to: nobody notices, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ServedOn
from cluster.placement import ReplicaKey
from jobs import build_device
from tests.gpu_double import double_device
from tests.unit.jobs.under_load import COLLECTION, Load, Shape, run_under_load, until


@pytest.fixture(autouse=True)
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of build tasks, and old replicas that are ended soon."""
    monkeypatch.setattr(build_device.GpuDevice, "open", lambda share: double_device(share=share))
    monkeypatch.setattr("actors.supervisor.RETIRE_AFTER_S", 0.3)


async def only_on(load: Load, device: ServedOn) -> None:
    """Until none but the replicas on that device are there; on a GPU its index answers, not the twin."""
    key = ReplicaKey(COLLECTION, 0, 0, device)
    await until(lambda: load.runtime.existing() == [key], f"{key} is the only replica")
    status = load.runtime.replica(key).status()
    assert status.epoch > 0, "it leads"
    assert (status.gpu is None, status.degraded) == (device == "cpu", "")
    assert {segment["device"] for segment in status.segments} == {device}


def test_device_changes_under_load(tmp_path: Path) -> None:
    async def scenario(load: Load) -> None:
        await load.run_job("to a GPU", load.rebuild(index={"device": "gpu"}))
        await only_on(load, "gpu")
        assert load.runtime.free_gpus == 0.0
        await load.run_job("on the GPU", load.rebuild())
        await load.run_job("to CPUs", load.rebuild(index={"device": "cpu"}))
        await only_on(load, "cpu")
        await load.run_job("back", load.rollback())
        await only_on(load, "gpu")

    load = run_under_load(scenario, tmp_path, Shape(points=400, index={"kind": "auto"}, gpus=1.0))
    assert load.failed_writes == []
    assert {key.device for key in load.runtime.led} == {"cpu", "gpu"}
