from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from actors.degradation import cpu_answers, note_cpu_answer
from actors.gpu_device import GpuDevice, GpuLost
from actors.twin_index import TwinIndex
from cluster.errors import Invalid, Unavailable
from cluster.row_selection import RowSelection
from tests.gpu_double import double_device
from tests.unit.actors.gpu_cases import COUNT, SPECS, case_of, vectors_of

NAMES = list(SPECS)


@pytest.fixture
def device() -> Iterator[GpuDevice]:
    made = double_device()
    yield made
    made.close()
    made.library.check()


def twin_of(name: str, device: GpuDevice, cpu_twin: bool = True) -> TwinIndex:
    case = case_of(name, "l2")
    cpu = case.loaded()
    return TwinIndex(cpu, case.placed(device, cpu), cpu_twin=cpu_twin)


def asked(device: GpuDevice) -> int:
    """How many searches the GPU was asked for."""
    return len(device.library.searches)


@pytest.mark.parametrize("name", NAMES)
def test_gpu_answers_as_long_as_it_can(name: str, device: GpuDevice) -> None:
    case, twin, before = case_of(name, "l2"), twin_of(name, device), cpu_answers()
    searches = asked(device)
    labels, scores = twin.search(case.vectors[:4], 5, case.wide)
    found = twin.gpu.search(case.vectors[:4], 5, case.wide) if twin.gpu else None
    assert found is not None
    np.testing.assert_array_equal(labels, found[0])
    np.testing.assert_array_equal(scores, found[1])
    assert asked(device) == searches + 2
    assert cpu_answers() == before
    assert (twin.count, twin.lists) == (COUNT, case.spec.params.get("nlist", 0))


@pytest.mark.parametrize("name", NAMES)
def test_search_without_memory_is_answered_by_the_twin_and_counted_and_the_gpu_stays(
    name: str, device: GpuDevice
) -> None:
    case, twin, before = case_of(name, "l2"), twin_of(name, device), cpu_answers()
    device.library.run_out_of_memory()
    labels, _ = twin.search(case.vectors[:4], 1, case.wide)
    assert labels[:, 0].tolist() == [0, 1, 2, 3]
    assert cpu_answers() == before + 1
    assert (twin.facts()["out_of_memory"], twin.facts()["degraded"]) == (1, "")
    searches = asked(device)
    twin.search(case.vectors[:4], 1, case.wide)
    assert asked(device) == searches + 1
    assert cpu_answers() == before + 1


@pytest.mark.parametrize("name", NAMES)
def test_from_a_lost_device_on_the_twin_answers(name: str, device: GpuDevice) -> None:
    case, twin, before = case_of(name, "l2"), twin_of(name, device), cpu_answers()
    device.library.lose()
    for _ in range(2):
        labels, _ = twin.search(case.vectors[:4], 1, case.wide)
        assert labels[:, 0].tolist() == [0, 1, 2, 3]
    assert cpu_answers() == before + 2
    assert twin.gpu is None
    assert "the GPU is lost: C++ exception CUDA error" in twin.why
    assert twin.facts() == {
        "gpu_predicted_bytes": None,
        "gpu_measured_bytes": None,
        "out_of_memory": 0,
        "degraded": twin.why,
    }


def test_selection_is_kept_by_whoever_answers(device: GpuDevice) -> None:
    case, twin, kept = case_of("cagra", "l2"), twin_of("cagra", device), np.arange(COUNT) % 4 == 0
    for full in (False, True):
        if full:
            device.library.run_out_of_memory()
        labels, _ = twin.search(case.vectors[:20], 10, case.wide, RowSelection.of(kept))
        assert kept[labels[labels >= 0]].all()
        assert (labels[:, 0] >= 0).all()


@pytest.mark.parametrize(
    ("k", "params"), [(600, {}), (10, {"itopk_size": 1_024}), (10, {"itopk_size": 544, "ef_search": 900})]
)
def test_search_over_a_limit_of_the_gpu_is_answered_by_the_twin_and_is_no_failure(
    k: int, params: dict[str, float], device: GpuDevice
) -> None:
    twin, before, searches = twin_of("cagra", device), cpu_answers(), asked(device)
    labels, _ = twin.search(case_of("cagra", "l2").vectors[:2], k, params)
    assert labels.shape == (2, k)
    assert labels[:, 0].tolist() == [0, 1]
    assert (cpu_answers(), asked(device)) == (before, searches)
    assert twin.facts()["degraded"] == ""
    assert twin.takes(k, params)


@pytest.mark.parametrize(
    ("k", "params", "words"),
    [
        (600, {}, "k: 600 is more than cagra takes on a GPU, at most 512"),
        (10, {"itopk_size": 1_024}, "params.itopk_size: 1024 is more than cagra takes on a GPU, at most 512"),
    ],
)
def test_search_over_a_limit_without_a_twin_is_refused_by_name(
    k: int, params: dict[str, float], words: str, device: GpuDevice
) -> None:
    twin = twin_of("cagra", device, cpu_twin=False)
    assert not twin.takes(k, params)
    with pytest.raises(Invalid, match=words):
        twin.search(case_of("cagra", "l2").vectors[:2], k, params)


def test_without_a_twin_full_and_lost_are_unavailable_and_the_reason_is_told(device: GpuDevice) -> None:
    case, twin, before = case_of("ivf_pq", "l2"), twin_of("ivf_pq", device, cpu_twin=False), cpu_answers()
    device.library.run_out_of_memory()
    with pytest.raises(Unavailable, match="out of memory"):
        twin.search(case.vectors[:1], 1, {})
    assert twin.facts()["out_of_memory"] == 1
    assert twin.search(case.vectors[:1], 1, case.wide)[0].shape == (1, 1)
    device.library.lose()
    for _ in range(2):
        with pytest.raises(Unavailable, match="the GPU is lost"):
            twin.search(case.vectors[:1], 1, {})
    assert cpu_answers() == before


def test_without_a_twin_an_index_that_is_not_on_the_gpu_is_unavailable() -> None:
    case = case_of("flat", "l2")
    twin = TwinIndex(case.loaded(), None, "it does not fit: 9 bytes of 8", cpu_twin=False)
    with pytest.raises(Unavailable, match="it does not fit: 9 bytes of 8"):
        twin.search(case.vectors[:1], 1, {})


def test_index_that_waits_for_the_gpu_is_degraded_until_it_is_promoted(device: GpuDevice) -> None:
    case, before = case_of("cagra", "l2"), cpu_answers()
    twin = TwinIndex(case.loaded(), None, "no room yet")
    assert twin.facts()["degraded"] == "no room yet"
    twin.search(case.vectors[:1], 1, {})
    assert cpu_answers() == before + 1
    gpu = case.placed(device, twin.cpu)
    twin.promote(gpu)
    searches = asked(device)
    twin.search(case.vectors[:1], 1, {})
    assert asked(device) == searches + 1
    assert cpu_answers() == before + 1
    assert twin.facts() == {
        "gpu_predicted_bytes": gpu.predicted_bytes,
        "gpu_measured_bytes": gpu.measured_bytes,
        "out_of_memory": 0,
        "degraded": "",
    }


def test_demoted_index_gives_its_memory_back_and_says_why(device: GpuDevice) -> None:
    case, free = case_of("ivf_flat", "l2"), device.free_bytes()
    twin = twin_of("ivf_flat", device)
    twin.demote("its self-test failed")
    assert device.free_bytes() == free
    assert (twin.gpu, twin.why) == (None, "its self-test failed")
    assert twin.search(case.vectors[:1], 1, case.wide)[0].tolist() == [[0]]
    twin.demote("another reason")
    assert twin.why == "another reason"


def test_closed_index_gives_its_memory_back(device: GpuDevice) -> None:
    free = device.free_bytes()
    twin = twin_of("cagra", device)
    twin.close()
    twin.close()
    assert device.free_bytes() == free


def test_searches_that_run_while_an_index_is_demoted_and_promoted_are_all_answered(device: GpuDevice) -> None:
    case = case_of("ivf_flat", "l2")
    twin, stop = twin_of("ivf_flat", device), threading.Event()

    def searching() -> int:
        done = 0
        while not stop.is_set():
            assert twin.search(case.vectors[:3], 1, case.wide)[0][:, 0].tolist() == [0, 1, 2]
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(searching) for _ in range(4)]
        for _ in range(10):
            twin.demote("for a moment")
            twin.promote(case.placed(device, twin.cpu))
        stop.set()
        assert all(each.result(20) > 0 for each in running)
    assert device.lost == ""


def test_search_whose_index_was_closed_on_its_way_is_answered_by_the_twin(device: GpuDevice) -> None:
    case, twin, before = case_of("cagra", "l2"), twin_of("cagra", device), cpu_answers()
    assert twin.gpu is not None
    twin.gpu.close()
    assert twin.search(case.vectors[:2], 1, case.wide)[0].tolist() == [[0], [1]]
    assert cpu_answers() == before + 1
    assert device.lost == ""


@pytest.mark.parametrize("cpu_twin", [True, False])
def test_search_that_faiss_refuses_on_the_gpu_is_answered_by_the_twin_and_told_once(
    cpu_twin: bool, device: GpuDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case, twin, before = case_of("cagra", "l2"), twin_of("cagra", device, cpu_twin), cpu_answers()

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("C++ exception RAFT failure: hash_bitlen cannot be larger than 20")

    with monkeypatch.context() as patch:
        patch.setattr("tests.gpu_double.GpuIndexCagra.search", refused)
        for _ in range(2):
            if cpu_twin:
                assert twin.search(case.vectors[:2], 1, case.wide)[0].tolist() == [[0], [1]]
            else:
                with pytest.raises(Unavailable, match=r"FAISS refuses the search on the GPU: .*hash_bitlen"):
                    twin.search(case.vectors[:2], 1, case.wide)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "hash_bitlen" in caplog.text
    assert cpu_answers() == before + 2 * cpu_twin
    searches = asked(device)
    twin.search(case.vectors[:1], 1, case.wide)
    assert asked(device) == searches + 1


def test_late_news_of_an_index_that_was_replaced_leaves_the_new_one(
    device: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, twin = case_of("ivf_flat", "l2"), twin_of("ivf_flat", device)
    fresh = case.placed(device, twin.cpu)

    def replaced_and_lost(*_: object) -> None:
        twin.promote(fresh)
        raise GpuLost("what was said of the old one")

    monkeypatch.setattr(twin.gpu, "search", replaced_and_lost)
    assert twin.search(case.vectors[:1], 1, case.wide)[0].tolist() == [[0]]
    assert (twin.gpu, twin.why) == (fresh, "")


def test_device_that_is_lost_under_many_searches_answers_all_of_them(device: GpuDevice) -> None:
    case, twin = case_of("cagra", "l2"), twin_of("cagra", device)

    def searching(number: int) -> list[int]:
        if number == 20:
            device.library.lose()
        found: list[int] = twin.search(case.vectors[:2], 1, case.wide)[0][:, 0].tolist()
        return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(searching, range(60))) == [[0, 1]] * 60
    assert twin.gpu is None


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("flat", ("rerank",)),
        ("ivf_flat", ("nprobe", "rerank")),
        ("ivf_pq", ("nprobe", "rerank")),
        ("cagra", ("itopk_size", "search_width", "ef_search", "rerank")),
    ],
)
def test_knobs_are_those_of_both_and_others_are_refused(name: str, knobs: tuple[str, ...], device: GpuDevice) -> None:
    twin = twin_of(name, device)
    assert twin.knobs == knobs
    twin.check(dict.fromkeys(knobs, 64.0))
    with pytest.raises(Invalid, match=r"params\.depth: does not fit"):
        twin.search(np.zeros((1, 16), np.float32), 1, {"depth": 3})


def test_saved_twin_is_the_cpus_index(device: GpuDevice, tmp_path: Path) -> None:
    twin_of("cagra", device).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == case_of("cagra", "l2").path.read_bytes()


def test_answers_are_counted_for_each_thread_by_itself() -> None:
    before = cpu_answers()
    note_cpu_answer()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cpu_answers).result() == 0
    assert cpu_answers() == before + 1


def test_half_of_the_searches_of_many_threads_find_no_memory_and_each_knows_of_its_own(device: GpuDevice) -> None:
    twin, queries = twin_of("flat", device), vectors_of("l2", 1, seed=3)
    device.library.run_out_of_memory(10)

    def searching(_: int) -> int:
        before = cpu_answers()
        twin.search(queries, 3, {})
        return cpu_answers() - before

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(searching, range(20))) == 10
    assert twin.facts()["out_of_memory"] == 10
