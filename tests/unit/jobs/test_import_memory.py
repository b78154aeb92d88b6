"""An import's memory is bounded by its options, not by the size of the file or of its row groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.arrow_rows import vectors_array

ROWS, DIMENSION = 400_000, 128
FILE_BYTES = ROWS * DIMENSION * 4
MEMORY_BYTES = 16 * 1024 * 1024
IMPORT = """
import sys, threading, time, uuid
from pathlib import Path
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from jobs.importer import Importer, ImportOptions, Workers
from jobs.report import JobReporter, JobStatus
from tests.fakes import run_tasks_here

def anonymous_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.005)

source, data, memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = open_store(data)
log = ManifestLog(store, "big", lambda: uuid.uuid4().hex)
create = {"metric": "l2", "index": {"kind": "flat"}}
options = ImportOptions("big", source, create=create, memory_bytes=memory_bytes)
importer = Importer(data, store, log, options, Workers(run_tasks_here, 1))
before = anonymous_bytes()
threading.Thread(target=watch, daemon=True).start()
manifest = importer.run("job", JobReporter(store, JobStatus("job", "import", "big")))
print(manifest.points, len(manifest.segments), peak - before)
"""


def test_import_of_one_large_row_group_stays_within_its_memory(tmp_path: Path) -> None:
    """205 MB in a single row group, 16 MiB for each index; decoding and BLAS buffers take about 130 MiB at any size."""
    vectors = np.random.default_rng(5).standard_normal((ROWS, DIMENSION), dtype=np.float32)
    table = pa.table({"id": np.arange(ROWS), "vector": vectors_array(vectors)})
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=ROWS, compression="none")
    assert pq.read_metadata(tmp_path / "big.parquet").num_row_groups == 1
    arguments = [str(tmp_path / "big.parquet"), str(tmp_path / "data"), str(MEMORY_BYTES)]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    points, segments, grown_bytes = (int(number) for number in done.stdout.split())
    assert points == ROWS
    assert segments == -(-int(FILE_BYTES * 1.15) // MEMORY_BYTES)
    assert grown_bytes < 192 * 1024 * 1024
