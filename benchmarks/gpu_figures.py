"""What the self-test of an index on a GPU measures, as figures: whether it passed does not say how nearly it failed.

Also what a node has, for whoever reads the figures later and cannot ask it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from actors.faiss_index import threads_in_use
from actors.gpu_index import GpuIndex
from actors.loaded_segment import LoadedSegment
from actors.rerank import exact_scores
from actors.self_test import RAW_K, SCORE_SLACK, asked_of, scores_of, squares, truth_of
from cluster.row_selection import RowSelection

LIBRARIES = ("libcuda.", "cudart", "cublas", "cuvs", "raft", "rmm", "nvJitLink", "nvrtc", "faiss", "gomp")
SMI_S = 20.0


def self_test_figures(segment: LoadedSegment, gpu: GpuIndex) -> str:
    """How far the index's own scores are from what they should be, and what its self-test counts, on one line.

    `of the slack`: 1 is what `actors.self_test` allows.
    """
    twin, test, rows, spec = segment.twin, segment.description.self_test, segment.rows, segment.spec
    assert twin is not None
    own = {name: value for name, value in segment.operating_point.params.items() if name != "rerank"}
    queries, truth = asked_of(test, rows), truth_of(test)
    labels, scores = gpu.search(queries, RAW_K, own)
    if spec.kind == "ivf_pq":
        expected = scores_of(labels, *twin.cpu.search(queries, RAW_K, own))
    else:
        expected = exact_scores(rows, queries, labels, segment.metric, threads_in_use())
    known = (labels >= 0) & ~np.isnan(expected)
    off = np.abs(scores - expected)[known] / np.maximum(squares(rows, queries, labels, segment.metric)[known], 1e-30)
    slack = SCORE_SLACK.get(spec.kind, SCORE_SLACK[spec.codes])
    found = [np.isin(own_rows[own_rows >= 0], line).mean() for own_rows, line in zip(truth, labels, strict=True)]
    gone = np.unique(truth[:, 0][truth[:, 0] >= 0])
    left, _ = gpu.search(queries, RAW_K, own, RowSelection.everything(gpu.count).without(gone))
    missed = (labels != np.array(test.rows)[:, None]).all(axis=1).mean()
    short = (left < 0).any(axis=1).mean()
    return (
        f"{len(queries)} self-test queries: scores off by {_spread(off)} of the squared lengths, at most "
        f"{_spread(off / slack, only_most=True)} of the slack {slack:g}; {known.mean():.1%} comparable; "
        f"{np.mean(found):.4f} of the recorded neighbours, without rerank; {missed:.1%} do not find themselves; "
        f"without {len(gone)} rows {short:.1%} of the answers are short, {np.isin(left, gone).sum()} wrong"
    )


def _spread(values: Any, only_most: bool = False) -> str:
    if not values.size:
        return "nothing"
    most = f"{values.max():.2g}"
    return most if only_most else f"{np.median(values):.2g} (median), {most} (most)"


def node_facts() -> list[str]:
    """Lines: FAISS and how it was compiled, the libraries of CUDA that this process has loaded, the driver's table."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps if "/" in line}
    loaded = sorted(path for path in paths if any(name in Path(path).name for name in LIBRARIES))
    return [
        f"FAISS {faiss.__version__}: {faiss.get_compile_options().strip()}",
        *(f"loaded: {path}" for path in loaded),
        *_driver_table(),
    ]


def _driver_table() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ["nvidia-smi: not there"]
    try:
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi: no answer within {SMI_S:g} s"]
    return (done.stdout + done.stderr).splitlines()
