"""An import and a rebuild of ten times as many bytes as `--memory-bytes` allows grow by no more than that.

What grows is anonymous memory of the process that runs the job and, one after the other, all of its tasks, beyond what
the same process had just before for the same job on a small set: the interpreter, libraries, and what reads and writes
rows, which is as large for any set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.arrow_rows import vectors_array

pytestmark = pytest.mark.recall

MEMORY_BYTES = 32 * 1024 * 1024
TIMES, DIMENSION, GROUP_ROWS = 10, 128, 30_000
SMALL_BYTES = 8 * 1024 * 1024  # many batches are decoded, and all libraries are there
JOBS = """
import json, mmap, sys, threading, time, uuid
from pathlib import Path
import jobs.gate
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from jobs.build_plan import Workers
from jobs.importer import Importer, ImportOptions
from jobs.rebuild import Rebuilder, RebuildOptions
from jobs.report import JobReporter, JobStatus
from tests.fakes import run_tasks_here

jobs.gate.LATENCY_QUERIES, jobs.gate.LATENCY_TRIES = 8, 12  # times are not what is measured here

def anonymous_bytes():
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(of_files)) * mmap.PAGESIZE

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)

def grown(work):
    global peak
    peak = anonymous_bytes()
    return work(), peak

kind, folder, memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = f"{folder}/data"
store, workers = open_store(data), Workers(run_tasks_here, 1)

def run(name):
    log = ManifestLog(store, name, lambda: uuid.uuid4().hex)
    job_id = f"{kind}-{name}"
    reporter = JobReporter(store, JobStatus(job_id, kind, name))
    if kind == "import":
        create = {"metric": "l2", "index": {"kind": "flat"}}
        options = ImportOptions(name, f"{folder}/{name}.parquet", create=create, memory_bytes=memory_bytes)
        Importer(data, store, log, options, workers).run(job_id, reporter)
    else:
        options = RebuildOptions(name, memory_bytes=memory_bytes)
        Rebuilder(data, store, log, options, workers, f"{folder}/cache").run(job_id, reporter)
    manifest = log.newest_live()
    return {"points": manifest.points, "segments": len(manifest.segments), "generation": manifest.generation}

threading.Thread(target=watch, daemon=True).start()
print(json.dumps([grown(lambda: run(name)) for name in ("small", "large")]))
"""


def write_rows(path: Path, size_bytes: int) -> int:
    """Returns the number of rows whose vectors take so many bytes."""
    count = size_bytes // (4 * DIMENSION)
    vectors = np.random.default_rng(5).integers(0, 2**24, (count, DIMENSION), dtype=np.int32).astype(np.float32)
    table = pa.table({"id": np.arange(count), "vector": vectors_array(vectors)})
    pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="none", use_dictionary=False)
    return count


def test_import_and_rebuild_of_ten_times_their_memory_stay_within_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "small.parquet", SMALL_BYTES)
    count = write_rows(tmp_path / "large.parquet", TIMES * MEMORY_BYTES)
    root = Path(__file__).resolve().parents[2]
    for generation, kind in enumerate(("import", "rebuild"), start=1):
        command = [sys.executable, "-c", JOBS, kind, str(tmp_path), str(MEMORY_BYTES)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (small, before), (large, peak) = json.loads(done.stdout)
        assert small["segments"] == 1
        assert (large["points"], large["generation"]) == (count, generation)
        assert large["segments"] > TIMES
        print(f"{kind}: {before:,} bytes at most for the small set, {peak - before:,} more for the large one")
        assert peak - before <= MEMORY_BYTES, kind
