"""Hits that score as the k-th does: all of them are returned, so that the caller can order them by id and cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TIES_MAX = 256  # points that tie with the k-th hit; among more, which are returned is not defined
Found = tuple[NDArray[np.int64], NDArray[np.float32]]  # rows, -1 where there is none, and scores; both (n, width)


def found_with_ties(find: Callable[[NDArray[np.float32], int], Found], queries: NDArray[np.float32], k: int) -> Found:
    """The best `k` rows that `find(queries, width)` has for each query, or more where points tie with the k-th."""
    rows, scores = find(queries, k + 1)
    if rows.shape[1] <= k:
        return rows, scores
    tied = scores[:, k] == scores[:, k - 1]
    if np.count_nonzero(tied):
        tied &= rows[:, k] >= 0
    if not np.count_nonzero(tied):
        return rows[:, :k], scores[:, :k]
    more = find(queries[tied], k + TIES_MAX)
    return _with_ties((rows, scores), more, tied, k)


def _with_ties(found: Found, more: Found, tied: NDArray[np.bool_], k: int) -> Found:
    """`found`, where the `tied` queries have from their wider answer `more` all that score as the k-th does."""
    more_rows, more_scores = more
    beyond = more_scores[:, k:] != more_scores[:, k - 1 : k]
    more_rows[:, k:][beyond] = -1
    rows = np.full((len(tied), more_rows.shape[1]), -1, dtype=np.int64)
    scores = np.zeros(rows.shape, dtype=np.float32)
    rows[:, :k], scores[:, :k] = found[0][:, :k], found[1][:, :k]
    rows[tied], scores[tied] = more_rows, more_scores
    return rows, scores
