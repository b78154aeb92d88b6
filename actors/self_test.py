"""The self-test of an index: what it finds for stored rows, against what was recorded of them when it was built.

Of an index on a GPU its own scores are tested as well, not only what the rows make of its candidates: an index whose
scores are wrong from some row on finds enough of what lies before that row (milvus issue 49864: beyond 100,000 rows).
So the rows that are asked for lie all over the segment, and some of them at its very end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import SearchableIndex, threads_in_use
from actors.rerank import exact_scores
from actors.segment_searcher import SegmentSearcher
from cluster.config import Metric
from cluster.index_spec import IndexSpec
from cluster.row_selection import RowSelection
from cluster.segment import Rows, SelfTest
from cluster.topk import recall_at_k, smaller_is_better

SLACK = 0.02  # another device or instruction set may order near-equal distances differently
# How far a score of the index may be from the true one, in squared lengths of the query and the row. A distance is the
# difference of such squares, each of which is rounded. Estimates, some times what the digits leave out that a tensor
# core (TF32) or the codes have: what is caught is an index that is broken, not one that rounds.
SCORE_SLACK = {"float32": 5e-3, "float16": 3e-2, "ivf_pq": 3e-2}
RAW_K = 10
TIE_SLACK = 1e-6  # of a score: what float32 leaves out
UNSEEN_MAX = 8  # of the asked rows next to each other that may all fail to find themselves, less one
SHORT_MAX = 0.5  # of the answers that may get short where a few rows are left out


class GpuWrong(Exception):
    """An index on a GPU does not answer as it must."""


Labels = NDArray[np.int64]
Vectors = NDArray[np.float32]


def truth_of(test: SelfTest) -> Labels:
    """The exact nearest rows of the test's rows, (rows, width), -1 where there are fewer."""
    width = max(map(len, test.truth), default=0)
    truth = np.full((len(test.rows), width), -1, dtype=np.int64)
    for position, line in enumerate(test.truth):
        truth[position, : len(line)] = line
    return truth


def asked_of(test: SelfTest, rows: Rows) -> Vectors:
    """The vectors of the test's rows, (rows, dimension)."""
    return rows.gather_vectors(np.array(test.rows, dtype=np.int64))


def recall_of(searcher: SegmentSearcher, test: SelfTest, params: dict[str, float]) -> float:
    """The share of the recorded neighbours that a search with these parameters finds."""
    truth = truth_of(test)
    found, _ = searcher.search(asked_of(test, searcher.rows), truth.shape[1], params)
    return float(recall_at_k(found, truth).mean())


def problem_on_gpu(
    searcher: SegmentSearcher,
    cpu: SearchableIndex,
    spec: IndexSpec,
    metric: Metric,
    test: SelfTest,
    params: dict[str, float],
) -> str:
    """What is wrong with the searcher's index, on a GPU, beside the same one on the host; "" where nothing is.

    It must have all rows and find them, find as many of the recorded neighbours as it did when it was built (all where
    it is exact, which nobody measured), score what it finds as the rows do (codes of a product quantizer: as the CPU
    does), and find others for rows that it is to leave out.
    """
    gpu, rows = searcher.index, searcher.rows
    if gpu.count != rows.count:
        return f"it has {gpu.count} rows of {rows.count}"
    if not test.rows:
        return ""
    queries, truth = asked_of(test, rows), truth_of(test)
    own = {name: value for name, value in params.items() if name != "rerank"}
    labels, scores = gpu.search(queries, RAW_K, own)
    if ((labels < -1) | (labels >= rows.count)).any():
        return f"it found row {int(labels.max())} of {rows.count}"
    if spec.kind == "ivf_pq":
        expected = scores_of(labels, *cpu.search(queries, RAW_K, own))
    else:
        expected = exact_scores(rows, queries, labels, metric, threads_in_use())
    slack = SCORE_SLACK.get(spec.kind, SCORE_SLACK[spec.codes]) * squares(rows, queries, labels, metric)
    if wrong := _wrong_score(labels, scores, expected, slack):
        return wrong
    if unseen := _unseen(rows, test, queries, labels):
        return unseen
    promised = 1.0 if spec.is_exact else test.recall
    recall = _recall_with_ties(searcher, queries, truth, params, metric)
    if recall < promised - SLACK:
        return f"it found {recall:.3f} of the neighbours, {promised:.3f} were promised"
    return _ignores_selections(gpu, queries, truth, own)


def _recall_with_ties(
    searcher: SegmentSearcher, queries: Vectors, truth: Labels, params: dict[str, float], metric: Metric
) -> float:
    """As `recall_of`, but a row that is as near as the last of the recorded ones is as good as that.

    Of many equal rows a GPU finds others than the CPU did that recorded them. The searcher's scores are exact.
    """
    found, scores = searcher.search(queries, truth.shape[1], params)
    sign = np.float32(1.0 if smaller_is_better(metric) else -1.0)
    recorded = sign * exact_scores(searcher.rows, queries, truth, metric, threads_in_use())
    last = np.where(truth < 0, np.float32(-np.inf), recorded).max(axis=1, keepdims=True)
    near = (found >= 0) & (sign * scores <= last + TIE_SLACK * np.abs(last))
    labels = np.sort(np.where(near, found, -1), axis=1)
    again = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
    wanted = (truth >= 0).sum(axis=1)
    return float(np.minimum(1.0, ((labels >= 0).sum(axis=1) - again.sum(axis=1)) / wanted).mean())


def scores_of(labels: Labels, known_labels: Labels, known_scores: Vectors) -> Vectors:
    """The score that another index has for each label of the same query, (n, k); not a number where it has none."""
    same = labels[:, :, None] == known_labels[:, None, :]
    found = np.take_along_axis(known_scores, same.argmax(axis=2), axis=1)
    return np.where(same.any(axis=2), found, np.float32(np.nan))


def squares(rows: Rows, queries: Vectors, labels: Labels, metric: Metric) -> Vectors:
    """Squared lengths of each query and each row that it found, together, (n, k); but under an inner product from
    their middle, since distances do not change where all points are moved."""
    stored = rows.gather_vectors(np.maximum(labels, 0))
    middle = queries.mean(axis=0) if metric != "ip" else np.float32(0.0)
    stored, queries = stored - middle, queries - middle
    squares: Vectors = np.einsum("nkd,nkd->nk", stored, stored) + np.einsum("nd,nd->n", queries, queries)[:, None]
    return squares


def _wrong_score(labels: Labels, scores: Vectors, expected: Vectors, slack: Vectors) -> str:
    """The first score that is too far from what it should be, in words; what is not expected at all may be anything."""
    far = ~(np.abs(scores - expected) <= slack) & ~np.isnan(expected) & (labels >= 0)
    if not far.any():
        return ""
    at: Any = tuple(np.argwhere(far)[0])
    return f"it scores row {labels[at]} with {scores[at]:g}, the rows with {expected[at]:g}"


def _unseen(rows: Rows, test: SelfTest, queries: Vectors, labels: Labels) -> str:
    """Rows next to each other none of which is found by its own vector, nor an equal one; some are always missed."""
    equal = (rows.gather_vectors(np.maximum(labels, 0)) == queries[:, None, :]).all(axis=2) & (labels >= 0)
    missed = np.concatenate([[False], ~equal.any(axis=1), [False]])
    starts, ends = np.flatnonzero(missed[1:] & ~missed[:-1]), np.flatnonzero(missed[:-1] & ~missed[1:])
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start >= UNSEEN_MAX:
            return f"it finds none of the rows {test.rows[start]} to {test.rows[end - 1]} that it was asked for"
    return ""


def _ignores_selections(gpu: SearchableIndex, queries: Vectors, truth: Labels, own: dict[str, float]) -> str:
    """Without the nearest row of every query it must find others in their place.

    What it finds although it is left out is dropped by `GpuIndex`: then most answers are short that were not before.
    """
    gone = np.unique(truth[:, 0][truth[:, 0] >= 0])
    width = min(RAW_K, gpu.count - len(gone))
    if width <= 0:
        return ""
    plain, _ = gpu.search(queries, width, own)
    kept, _ = gpu.search(queries, width, own, RowSelection.everything(gpu.count).without(gone))
    short = float((kept < 0).any(axis=1).mean() - (plain < 0).any(axis=1).mean())
    return "it ignores which rows it may find" if short > SHORT_MAX else ""
