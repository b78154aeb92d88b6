"""The double fails where FAISS on a GPU would, or would go wrong without a word."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest

from tests.gpu_double import (
    GpuClonerOptions,
    GpuDouble,
    GpuIndexCagraConfig,
    GpuIndexFlatConfig,
    GpuIndexIVFFlatConfig,
    GpuIndexIVFPQConfig,
    SearchParametersCagra,
)

L2 = faiss.METRIC_L2
POINTS = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
EVERY = np.full(38, 0xFF, np.uint8)


@pytest.fixture
def library() -> GpuDouble:
    return GpuDouble(4 << 30)


def with_cuvs(config: Any) -> Any:
    config.use_cuvs = True
    return config


def flat(library: GpuDouble) -> Any:
    index = library.GpuIndexFlat(library.StandardGpuResources(), 8, L2, with_cuvs(GpuIndexFlatConfig()))
    index.add(POINTS)
    return index


def lists(library: GpuDouble) -> Any:
    index = library.GpuIndexIVFFlat(library.StandardGpuResources(), 8, 4, L2, with_cuvs(GpuIndexIVFFlatConfig()))
    index.train(POINTS)
    index.add(POINTS)
    return index


def graph(library: GpuDouble, vectors: Any = POINTS, numeric_type: int = faiss.Float32) -> Any:
    config = with_cuvs(GpuIndexCagraConfig())
    config.graph_degree, config.intermediate_graph_degree = 16, 32
    index = library.GpuIndexCagra(library.StandardGpuResources(), 8, L2, config)
    index.train(vectors, numeric_type=numeric_type)
    return index


def copied(library: GpuDouble, half: bool = False) -> Any:
    vectors = POINTS.astype(np.float16) if half else POINTS
    index = graph(library, vectors, faiss.Float16 if half else faiss.Float32)
    cpu = faiss.IndexHNSWCagra()
    cpu.base_level_only = half
    index.copyTo(cpu)
    return cpu


@pytest.mark.parametrize("make", [flat, lists, graph])
def test_call_from_another_thread_fails(make: Callable[[GpuDouble], Any], library: GpuDouble) -> None:
    index, failed = make(library), []

    def search() -> None:
        try:
            index.search(POINTS[:1], 1)
        except AssertionError as error:
            failed.append(str(error))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert failed == ["called in another thread than that of the resources"]


def test_destruction_in_another_thread_is_a_violation(library: GpuDouble) -> None:
    held = [flat(library)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    with pytest.raises(AssertionError, match="GpuIndexFlat was destroyed in another thread"):
        library.check()


def test_destruction_on_a_lost_device_is_a_violation(library: GpuDouble) -> None:
    index = flat(library)
    library.lose()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        index.search(POINTS[:1], 1)
    del index
    gc.collect()
    with pytest.raises(AssertionError, match="on a lost device"):
        library.check()


@pytest.mark.parametrize(
    "config", [GpuIndexFlatConfig(), GpuIndexIVFFlatConfig(), GpuIndexIVFPQConfig(), GpuIndexCagraConfig()]
)
def test_index_without_cuvs_fails(config: Any, library: GpuDouble) -> None:
    kinds = {"GpuIndexIVFFlatConfig": (4,), "GpuIndexIVFPQConfig": (4, 4, 8)}
    make = getattr(library, type(config).__name__.removesuffix("Config"))
    with pytest.raises(AssertionError, match="use_cuvs is not set"):
        make(library.StandardGpuResources(), 8, *kinds.get(type(config).__name__, ()), L2, config)


def test_copy_without_cuvs_or_of_what_cuvs_does_not_copy_fails(library: GpuDouble) -> None:
    resources, options = library.StandardGpuResources(), GpuClonerOptions()
    with pytest.raises(AssertionError, match="use_cuvs is not set"):
        library.index_cpu_to_gpu(resources, 0, faiss.IndexFlatL2(8), options)
    options.use_cuvs = True
    halves = faiss.index_factory(8, "SQfp16")
    for unknown in (halves, faiss.index_factory(8, "HNSW8,Flat"), copied(library)):
        with pytest.raises(RuntimeError, match="not implemented for cuVS"):
            library.index_cpu_to_gpu(resources, 0, unknown, options)


def test_copied_graph_has_the_numbers_that_it_says(library: GpuDouble) -> None:
    config = with_cuvs(GpuIndexCagraConfig())
    index = library.GpuIndexCagra(library.StandardGpuResources(), 8, L2, config)
    with pytest.raises(AssertionError, match="numbers of another size"):
        index.copyFrom_ex(copied(library, half=True), faiss.Float32)


@pytest.mark.parametrize(
    ("make", "params"),
    [
        (flat, faiss.SearchParametersIVF(nprobe=1)),
        (lists, faiss.SearchParameters()),
        (graph, faiss.SearchParameters()),
        (graph, faiss.SearchParametersHNSW(efSearch=10)),
        (flat, SearchParametersCagra()),
    ],
)
def test_parameters_of_another_class_fail(make: Any, params: Any, library: GpuDouble) -> None:
    with pytest.raises(AssertionError, match="SearchParameters"):
        make(library).search(POINTS[:1], 1, params=params)


@pytest.mark.parametrize("make", [flat, lists, graph])
def test_k_over_the_number_of_points_fails(make: Any, library: GpuDouble) -> None:
    with pytest.raises(AssertionError, match="301 of 300 points"):
        make(library).search(POINTS[:1], 301)


def test_limits_fail_as_those_of_cuvs_do(library: GpuDouble) -> None:
    with pytest.raises(RuntimeError, match="selection up to 16384"):
        flat(library).search(POINTS[:1], 20_000)
    with pytest.raises(AssertionError, match="nprobe 5 of 4 lists"):
        lists(library).search(POINTS[:1], 1, params=faiss.SearchParametersIVF(nprobe=5))
    index = graph(library)
    with pytest.raises(RuntimeError, match="topk = 65"):
        index.search(POINTS[:1], 65)
    with pytest.raises(RuntimeError, match="larger than 512"):
        index.search(POINTS[:1], 1, params=SearchParametersCagra(itopk_size=544))


@pytest.mark.parametrize("make", [flat, lists, graph])
def test_selector_that_is_no_bitmap_fails(make: Any, library: GpuDouble) -> None:
    index, every = make(library), faiss.IDSelectorAll()
    with pytest.raises(AssertionError, match="row by row"):
        index.search(POINTS[:1], 1, params=index.parameters(sel=every))
    bitmap = faiss.IDSelectorBitmap(EVERY)
    assert index.search(POINTS[:1], 1, params=index.parameters(sel=bitmap))[1].tolist() == [[0]]


def test_graph_takes_its_vectors_once(library: GpuDouble) -> None:
    index = graph(library)
    with pytest.raises(AssertionError, match="a second call adds nothing"):
        index.train(POINTS)


def test_graph_of_numbers_that_are_converted_on_the_way_fails(library: GpuDouble) -> None:
    with pytest.raises(AssertionError, match="a copy that is gone"):
        graph(library, POINTS, faiss.Float16)


def test_graph_whose_vectors_are_gone_cannot_be_copied(library: GpuDouble) -> None:
    index = graph(library, POINTS.copy())
    with pytest.raises(AssertionError, match="made from are gone"):
        index.copyTo(faiss.IndexHNSWCagra())


def test_graph_whose_source_is_gone_cannot_be_searched(library: GpuDouble) -> None:
    source = copied(library)
    index = library.GpuIndexCagra(library.StandardGpuResources(), 8, L2, with_cuvs(GpuIndexCagraConfig()))
    index.copyFrom_ex(source, faiss.Float32)
    assert index.search(POINTS[:1], 1)[1].tolist() == [[0]]
    del source
    with pytest.raises(AssertionError, match="copied from is gone"):
        index.search(POINTS[:1], 1)


def test_float16_graph_is_copied_as_its_lowest_level_alone(library: GpuDouble) -> None:
    vectors = POINTS.astype(np.float16)
    with pytest.raises(RuntimeError, match="Only base level copy"):
        graph(library, vectors, faiss.Float16).copyTo(faiss.IndexHNSWCagra())


def test_numbers_of_queries_are_those_of_the_graph(library: GpuDouble) -> None:
    with pytest.raises(RuntimeError, match="Inconsistent numeric type"):
        graph(library).search(POINTS[:1], 1, numeric_type=faiss.Float16)


def test_temporary_memory_is_set_before_the_first_use(library: GpuDouble) -> None:
    resources = library.StandardGpuResources()
    resources.setTempMemory(1 << 20)
    resources.syncDefaultStreamCurrentDevice()
    with pytest.raises(AssertionError, match="before the first use"):
        resources.setTempMemory(2 << 20)


@pytest.mark.parametrize("make", [flat, lists, graph])
def test_bytes_are_counted_and_given_back(make: Any, library: GpuDouble) -> None:
    library.StandardGpuResources().syncDefaultStreamCurrentDevice()
    free = library.memory()[0]
    index = make(library)
    assert free - library.memory()[0] >= POINTS.nbytes
    del index
    assert library.memory()[0] == free
    library.check()


def test_resources_have_threads_of_their_own(library: GpuDouble) -> None:
    """An index is searched in that of the resources that it was made with, whatever others there are by then."""
    index, others = flat(library), []
    thread = threading.Thread(target=lambda: others.append(flat(library)))
    thread.start()
    thread.join()
    assert index.search(POINTS[:1], 1)[1].tolist() == [[0]]
    with pytest.raises(AssertionError, match="another thread"):
        others[0].search(POINTS[:1], 1)


@pytest.mark.parametrize(
    ("make", "few", "many"),
    [
        (flat, (64, None), (65, None)),
        (lists, (256, faiss.SearchParametersIVF(nprobe=4)), (257, faiss.SearchParametersIVF(nprobe=4))),
        (graph, (10, SearchParametersCagra(search_width=8)), (10, SearchParametersCagra(search_width=512))),
    ],
)
def test_large_searches_take_memory_of_their_own(make: Any, few: Any, many: Any, library: GpuDouble) -> None:
    """All distances, or a hash table of visited nodes that does not fit into shared memory."""
    index, queries = make(library), POINTS[:256]
    moved_bytes = len(queries) * (4 * 8 + 12 * many[0])  # queries and answers
    library.taken_by_others(library.memory()[0] - moved_bytes)
    index.search(queries, few[0], params=few[1])
    with pytest.raises(RuntimeError, match="out of memory"):
        index.search(queries, many[0], params=many[1])


def test_spoiled_rows_have_other_distances(library: GpuDouble) -> None:
    index = flat(library)
    sound = index.search(POINTS[200:201], 1)
    library.spoil_from(150)
    wrong = index.search(POINTS[200:201], 1)
    assert wrong[0][0, 0] != sound[0][0, 0]
    library.spoil_from(None)
    assert index.search(POINTS[200:201], 1)[0][0, 0] == sound[0][0, 0]


@pytest.mark.parametrize("config", [GpuIndexFlatConfig(), SearchParametersCagra(), GpuIndexIVFPQConfig()])
def test_unknown_settings_fail(config: Any) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'itopk'"):
        config.itopk = 3
