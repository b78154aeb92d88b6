"""A replica's start reads every byte once and maps it: memory does not peak, and is what was predicted.

Figures of larger shards, with times: `python -m benchmarks.cold_start`.
"""

from __future__ import annotations

import pytest

import actors.tuner
from cluster.config import IndexConfig
from tests.recall.replica_process import Started
from tests.recall.replica_start import StoredShard

pytestmark = pytest.mark.recall

COUNT, DIMENSION = 14_000, 384  # 41 MiB of files
QUERIES = 250  # read all rows of a flat index, and ask for each list
INDEXES = {
    "flat": IndexConfig("flat"),
    "ivf_flat": IndexConfig("ivf_flat", target_recall=0.5, nlist=32, codes="float32"),
}
PEAK_MAX = 1.15  # of the steady state
PREDICTION_TOLERANCE = 0.10
READ_MAX = 1.05  # of the bytes of the segment's files: what else is read is small


@pytest.fixture(scope="module", params=INDEXES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoredShard:
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors.tuner, "STANDARD_TARGETS", ())  # bytes do not depend on them
        return StoredShard(folder, INDEXES[request.param], COUNT, DIMENSION, threads=1)


@pytest.fixture(scope="module", params=[False, True], ids=["in place", "copied"])
def started(request: pytest.FixtureRequest, stored: StoredShard) -> Started:
    started = stored.start(remote=request.param, memory=True, threads=1, searches=QUERIES)
    print(started, stored.predicted)
    return started


def test_loading_reads_every_byte_once(stored: StoredShard, started: Started) -> None:
    assert 1.0 <= started.read / stored.size_bytes <= READ_MAX


def test_memory_while_loading_stays_near_the_steady_state(started: Started) -> None:
    assert started.steady - started.base > 0
    assert started.peak / started.steady <= PEAK_MAX
    assert (started.peak - started.base) / (started.steady - started.base) <= PEAK_MAX


def test_steady_state_is_as_predicted(stored: StoredShard, started: Started) -> None:
    assert abs(stored.predicted / started.resident - 1.0) <= PREDICTION_TOLERANCE
    assert started.rows_file < 0.1 * stored.files[0].stat().st_size  # neither index asks the rows again
