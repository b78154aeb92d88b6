"""The one timed test: the endpoint keeps what was recorded of FAISS's speed.

Both are measured in turn on the same files, only their ratio counts, and a busy machine gets several tries. When the
endpoint was made faster, or slower for a reason, `make bench-record` records anew.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.served import COLLECTION
from benchmarks.speed_guard import import_words, losses, measure_ratios, read_recorded
from tests.ray.server import RunningServer

pytestmark = pytest.mark.ray

ROUNDS, TRIES = 5, 3


@pytest.fixture(scope="module")
def server(eagleray: RunningServer) -> Iterator[RunningServer]:
    """That of the folder, on which nothing else is yet: this module is the first one that uses it."""
    yield eagleray
    eagleray.client.call("DELETE", f"/v1/collections/{COLLECTION}")


def test_endpoint_keeps_its_share_of_faiss_speed(server: RunningServer) -> None:
    described, recorded = import_words(server.client), read_recorded()
    best = dict.fromkeys(recorded, 0.0)
    for attempt in range(TRIES):
        measured = measure_ratios(server.client, str(server.data), described, ROUNDS)
        print(f"try {attempt}: {measured}, recorded {recorded}")
        best = {name: max(best[name], measured[name]) for name in recorded}
        if not losses(best, recorded):
            return
    pytest.fail(f"slower than recorded in {TRIES} tries: {'; '.join(losses(best, recorded))}")
