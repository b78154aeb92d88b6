"""Retries without long pauses, and one FAISS thread."""

from __future__ import annotations

import logging

import pytest

from actors.faiss_index import use_threads


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.primary.RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr("cluster.wal.APPEND_PAUSE_S", 0.0)
    monkeypatch.setattr("actors.primary.IDLE_CHECK_S", 60.0)  # store calls are counted: none at a moment of its own
    use_threads(1)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
