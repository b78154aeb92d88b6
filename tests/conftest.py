"""Shared fixtures: unit, contract and recall tests may not start Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RAY = Path(__file__).parent / "ray"
os.environ["COLUMNS"] = "250"  # rich reads it when the first table of the process is printed


@pytest.fixture
def one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are tuned for their own target alone: the others take most of the time of a small build."""
    monkeypatch.setattr("actors.tuner.STANDARD_TARGETS", ())


@pytest.fixture(autouse=True)
def refuse_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ray.init` raise outside tests/ray/."""
    if request.path.is_relative_to(RAY):
        return

    import ray

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this test may not start Ray; move it to tests/ray/")

    monkeypatch.setattr(ray, "init", refuse)
