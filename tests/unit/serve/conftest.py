"""One FAISS thread: small builds on a busy machine wait for their threads longer than they work."""

from __future__ import annotations

import pytest

from actors.faiss_index import use_threads


@pytest.fixture(autouse=True)
def one_faiss_thread() -> None:
    use_threads(1)
