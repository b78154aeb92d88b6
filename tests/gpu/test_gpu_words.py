"""Recall on real embeddings: every kind over WordNet's definitions, those of the repository or all of them.

All 117,659 are in the folder that EAGLERAY_WORDS names, where it is set (benchmarks.gpu_sets.WORDS).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.faiss_index import use_threads
from benchmarks.gpu_collection import KINDS, make
from benchmarks.gpu_sets import GpuSet, K, cores, read_words, true_rows
from cluster.arrow_rows import vectors_view
from cluster.query import SearchParams
from cluster.vectors import as_searched
from tests.gpu.cases import SEED, SLACK, TARGET, Case, recall, twin_of

FEW = Path(__file__).parents[2] / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
KEPT_OUT = 300  # of the few, to be asked


def few_words() -> GpuSet:
    vectors = vectors_view(pq.read_table(FEW, columns=["vector"])["vector"].combine_chunks()).astype(np.float32)
    shuffled = as_searched(vectors, "cosine")[np.random.default_rng(SEED).permutation(len(vectors))]
    rows, queries = shuffled[KEPT_OUT:], shuffled[:KEPT_OUT]
    return GpuSet("few words", "cosine", rows, queries, true_rows(rows, queries, "cosine"))


def all_words() -> GpuSet:
    folder = os.environ.get("EAGLERAY_WORDS")
    if not folder:
        pytest.skip("EAGLERAY_WORDS names no folder with all words")
    return read_words(Path(folder))


@pytest.fixture(scope="module", params=[few_words, all_words], ids=["few", "all"])
def words(request: pytest.FixtureRequest, device: Any) -> GpuSet:
    use_threads(cores())
    return request.param()


@pytest.mark.parametrize("kind", KINDS)
def test_recall_on_words_reaches_the_target(words: GpuSet, device: Any, tmp_path: Path, kind: str) -> None:
    collection = make(tmp_path, "words", words, Case(kind, "cosine").index, device)
    try:
        twin_of(collection)
        found, _ = collection.segment.search(words.queries[: len(words.truth)], K, SearchParams())
        reached, point = recall(found, words.truth), collection.segment.operating_point
        print(f"{words.name}, {kind}: recall@{K} {reached:.4f} at {point.params}, tuned {point.recall:.4f}")
        assert point.met, point
        assert reached >= TARGET - 2 * SLACK
    finally:
        collection.delete()
