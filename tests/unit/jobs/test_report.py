from __future__ import annotations

from typing import Any

import pytest

import jobs.__main__ as jobs_main
from cluster import paths
from cluster.errors import Corrupt, Invalid, NotFound
from cluster.memory_store import MemoryStore
from jobs.progress_bar import duration_text, progress_bar, progress_note
from jobs.report import FINISH_PAUSES_S, WRITE_PERIOD_S, JobReporter, JobStatus, read_status, write_pending
from tests.fakes import FaultyStore, ManualClock

START = JobStatus("job-1", "import", "words")


def test_status_is_written_at_once_and_read_back() -> None:
    store = MemoryStore()
    JobReporter(store, START, clock=ManualClock())
    assert read_status(store, "job-1") == START


@pytest.mark.parametrize("job_id", ["a/b", "../jobs", "nightly.1", "a\n", "x" * 129])
def test_name_of_a_run_that_is_no_part_of_a_key_is_refused_before_anything_is_done(job_id: str) -> None:
    with pytest.raises(Invalid, match=r"job_id: .* does not match"):
        jobs_main._first_status("rebuild", job_id, "words")
    assert jobs_main._first_status("rebuild", "nightly_1", "words").job_id == "nightly_1"


def test_progress_is_written_no_more_often_than_its_period() -> None:
    store, clock = FaultyStore(MemoryStore(), counted=frozenset({"put"})), ManualClock()
    reporter = JobReporter(store, START, clock=clock)
    for step in range(1, 101):  # 10 s in steps of .1 s: a write each WRITE_PERIOD_S
        clock.now = 1_000.0 + step / 10
        reporter.progress(step / 100)
    assert store.calls == 1 + 10 / WRITE_PERIOD_S
    assert read_status(store, "job-1").progress == 1.0


def test_progress_within_the_period_is_kept_for_the_next_write() -> None:
    store, clock = MemoryStore(), ManualClock()
    reporter = JobReporter(store, START, clock=clock)
    reporter.progress(0.5)
    assert read_status(store, "job-1").progress == 0.0
    assert reporter.status.progress == 0.5
    clock.advance(WRITE_PERIOD_S)
    reporter.progress(0.6)
    assert read_status(store, "job-1").progress == 0.6


def test_phase_and_finish_are_written_at_once() -> None:
    store, clock = MemoryStore(), ManualClock()
    reporter = JobReporter(store, START, clock=clock)
    reporter.phase("build")
    assert read_status(store, "job-1").phase == "build"
    reporter.progress(0.4)
    reporter.finish("succeeded", {"points": 3})
    status = read_status(store, "job-1")
    assert (status.state, status.progress, status.remaining_s) == ("succeeded", 1.0, 0.0)
    assert status.report == {"points": 3}


def test_failed_job_keeps_how_far_it_came_and_why_it_failed() -> None:
    store = MemoryStore()
    reporter = JobReporter(store, START, clock=ManualClock())
    reporter.phase("build")
    reporter.progress(0.4)
    reporter.finish("failed", {"error": "Invalid", "message": "row 7"})
    status = read_status(store, "job-1")
    assert (status.state, status.phase, status.progress) == ("failed", "build", 0.4)
    assert status.report == {"error": "Invalid", "message": "row 7"}


def test_rate_counts_the_rows_of_the_phase_and_time_left_the_share_of_the_whole() -> None:
    clock = ManualClock()
    reporter = JobReporter(MemoryStore(), START, clock=clock)
    clock.advance(10.0)
    reporter.phase("partition")
    clock.advance(4.0)
    reporter.progress(0.25, rows_done=1_000)
    assert reporter.status.rate == pytest.approx(250.0)
    assert reporter.status.remaining_s == pytest.approx(14.0 * 3)
    reporter.progress(0.25)
    assert reporter.status.rate == pytest.approx(250.0)
    reporter.phase("build")
    assert reporter.status.rate == 0.0


def test_time_left_is_unknown_at_the_beginning() -> None:
    reporter = JobReporter(MemoryStore(), START, clock=ManualClock())
    reporter.progress(0.0, rows_done=0)
    assert reporter.status.remaining_s is None


def test_time_that_was_waited_counts_for_neither_rate_nor_time_left() -> None:
    clock = ManualClock()
    reporter = JobReporter(MemoryStore(), START, clock=clock)
    reporter.phase("scan", unit="objects")
    clock.advance(10.0)
    reporter.waiting("waiting for a node")
    clock.advance(500.0)
    reporter.waiting("waiting for a node")  # told again
    clock.advance(490.0)
    reporter.progress(0.5, rows_done=100)
    assert reporter.status.rate == pytest.approx(10.0)
    assert reporter.status.unit == "objects"
    assert reporter.status.remaining_s == pytest.approx(10.0)
    reporter.waiting("waiting for a node")
    clock.advance(1_000.0)
    reporter.waiting("")
    clock.advance(5.0)
    reporter.progress(0.75, rows_done=150)
    assert reporter.status.remaining_s == pytest.approx(5.0)
    reporter.phase("write")
    assert reporter.status.unit == "rows"


def test_pending_is_written_only_where_the_job_has_said_nothing() -> None:
    store = MemoryStore()
    write_pending(store, START)
    assert (read_status(store, "job-1").state, read_status(store, "job-1").phase) == ("pending", "pending")
    JobReporter(store, START, clock=ManualClock())
    write_pending(store, START)
    assert read_status(store, "job-1") == START


def test_listener_is_told_every_change() -> None:
    seen: list[JobStatus] = []
    reporter = JobReporter(MemoryStore(), START, seen.append, ManualClock())
    reporter.phase("build")
    for share in (0.1, 0.2, 0.3):
        reporter.progress(share)
    reporter.finish("succeeded", {})
    assert [(status.phase, status.progress) for status in seen] == [
        ("build", 0.0),
        ("build", 0.1),
        ("build", 0.2),
        ("build", 0.3),
        ("build", 1.0),
    ]


def test_progress_that_cannot_be_written_is_logged_and_the_job_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    store, clock = FaultyStore(MemoryStore(), at=1, fault="die"), ManualClock()
    reporter = JobReporter(store, START, clock=clock)
    reporter.phase("build")
    clock.advance(WRITE_PERIOD_S)
    reporter.progress(0.5)
    reporter.progress(0.6)
    assert reporter.status.progress == 0.6
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3  # none of the last: within the period
    assert "the status of job job-1 could not be written" in caplog.text


def test_finish_is_tried_again_until_it_is_written() -> None:
    inner, pauses = MemoryStore(), []
    store = FaultyStore(inner)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        store.at = store.calls + 1 if len(pauses) < 3 else 0

    reporter = JobReporter(store, START, clock=ManualClock(), sleep=sleep)
    store.at = store.calls + 1
    reporter.finish("failed", {"error": "Invalid"})
    assert pauses == list(FINISH_PAUSES_S[:3])
    assert read_status(inner, "job-1").state == "failed"


def test_finish_that_cannot_be_written_at_all_ends_without_an_error() -> None:
    pauses: list[float] = []
    store = FaultyStore(MemoryStore(), at=2, fault="die")
    JobReporter(store, START, clock=ManualClock(), sleep=pauses.append).finish("failed", {})
    assert pauses == list(FINISH_PAUSES_S)
    assert store.calls == 2 + len(FINISH_PAUSES_S)


def test_waiting_is_told_in_the_report_until_the_job_goes_on() -> None:
    store = MemoryStore()
    reporter = JobReporter(store, START, clock=ManualClock())
    reporter.waiting("waiting for 16 CPUs")
    assert read_status(store, "job-1").report == {"message": "waiting for 16 CPUs"}
    reporter.waiting("")
    assert read_status(store, "job-1").report == {}
    reporter.waiting("waiting for 16 CPUs")
    reporter.progress(0.5)
    assert reporter.status.report == {}


def test_status_of_an_unknown_job_is_not_found() -> None:
    with pytest.raises(NotFound, match="job-1"):
        read_status(MemoryStore(), "job-1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"3", b'{"job_id": "job-1"}', b'{"unknown": 1}', b"\xff"])
def test_damaged_status_is_corrupt_by_name(data: bytes) -> None:
    store = MemoryStore()
    store.put(paths.job_status("job-1"), data)
    with pytest.raises(Corrupt, match=r"jobs/job-1/status\.json: not a job status"):
        read_status(store, "job-1")


@pytest.mark.parametrize(
    ("note", "text"),
    [
        ((0.0, "rows", None), ""),
        ((12_345.6, "rows", None), "12,346 rows/s"),
        ((12.0, "objects", 200.0), "12 objects/s, 3 min left"),
        ((0.0, "rows", 0.4), "1 s left"),
        ((0.0, "rows", 0.0), ""),
        ((5.0, "rows", 9.0, "waiting for a node"), "waiting for a node"),
    ],
)
def test_note_of_a_progress_bar(note: tuple[Any, ...], text: str) -> None:
    assert progress_note(*note) == text


def test_progress_bar_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("build") as show:
        show("build", 0.5, "install eagleray[gpu]")
    assert "install eagleray[gpu]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.0, "59 s"), (119.0, "119 s"), (120.0, "2 min"), (7_100.0, "118 min"), (9_000.0, "2 h")],
)
def test_duration_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
