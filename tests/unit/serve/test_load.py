"""The load generator against a responder whose answers, delays and losses the tests decide."""

from __future__ import annotations

import os
import select
import socket
import time

import numpy as np
import pyarrow as pa
import pytest

from cluster.query import Coverage, Degraded, Hits, SearchResult
from serve import load
from serve.hit_streams import write_result
from serve.http_messages import json_response
from serve.json_bodies import search_answer
from serve.load import Arrivals, encode_request, in_child, run_closed_loop, run_load, run_open_loop
from serve.ticks import Alarm
from tests.unit.serve.responder import Answer, responding


def posts(target: str, *bodies: bytes) -> list[bytes]:
    return [encode_request(target, "/search", body, {"Content-Type": "text/plain"}) for body in bodies]


def test_load_sends_all_requests_in_turn_and_keeps_the_last_body_of_each() -> None:
    with responding(lambda number, body: Answer(body=body.upper())) as responder:
        report = run_load(responder.target, posts(responder.target, b"a", b"b", b"c"), 2, 7, keep=True)
    assert sorted(responder.bodies) == sorted(b"abcabca"[i : i + 1] for i in range(7))
    assert report.bodies == {0: b"A", 1: b"B", 2: b"C"}
    assert (len(report.latencies_s), report.completed, report.sent, report.failures) == (7, 7, 7, {})
    assert report.per_second == pytest.approx(7 / report.seconds)


def test_load_reads_answers_in_chunks() -> None:
    with responding(lambda number, body: Answer(chunks=(b"one ", b"two"))) as responder:
        report = run_load(responder.target, posts(responder.target, b"a"), 1, 3, keep=True)
    assert report.bodies == {0: b"one two"}
    assert len(report.latencies_s) == 3


def answer_of(form: str, degraded: Degraded, kind: str) -> bytes:
    """What the endpoint says of one hit. Its id, where that is text, looks like what is searched for."""
    alike = '"degraded":"cpu"' if form == "json" else "degraded\0cpu"
    ids = pa.array([5]) if kind == "int64" else pa.array([alike], pa.large_string())
    hits = Hits(np.array([1]), ids, np.ones(1, np.float32))
    result = SearchResult(hits, Coverage(1.0, 1.0), 7, {0: 3}, degraded)
    return write_result(result) if form == "arrow" else bytes(json_response(search_answer(result, 0.5)).body)


@pytest.mark.parametrize("parts", [1, 2, 400])
@pytest.mark.parametrize("kind", ["int64", "string"])
@pytest.mark.parametrize("form", ["json", "arrow"])
def test_load_counts_degraded_answers_wherever_their_packets_end(form: str, kind: str, parts: int) -> None:
    class Transport:
        def write(self, data: bytes) -> None:
            assert data == b"ask"

    sent = load._ClosedLoop([b"ask"], 9, keep=False)
    sent.ready = lambda connection: None  # type: ignore[method-assign]
    connection = load._Connection(sent)
    connection.transport = Transport()  # type: ignore[assignment]
    degraded: tuple[Degraded, ...] = ("", "cpu", "", "cpu")
    for number, each in enumerate(degraded):
        body = answer_of(form, each, kind)
        status = 503 if number == 3 else 200  # a failure is counted as one
        answer = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
        sent.send(connection, 0.0)
        step = max(1, len(answer) // parts)
        for start in range(0, len(answer), step):
            connection.data_received(answer[start : start + step])
    assert (sent.report.degraded, len(sent.report.latencies_s), sent.report.failures) == (1, 3, {503: 1})


def test_load_counts_failures_by_status_and_their_times_nowhere() -> None:
    statuses = (200, 429, 503, 429)
    with responding(lambda number, body: Answer(statuses[number % 4])) as responder:
        report = run_load(responder.target, posts(responder.target, b"a"), 1, 8)
    assert report.failures == {429: 4, 503: 2}
    assert len(report.latencies_s) == 2


def test_lost_connection_is_a_failure_and_another_one_takes_its_place() -> None:
    with responding(lambda number, body: Answer(lost=number in (1, 2))) as responder:
        report = run_load(responder.target, posts(responder.target, b"a"), 1, 6)
    assert report.failures == {load.CLOSED: 2}
    assert len(report.latencies_s) == 4
    assert responder.connections == 3


def test_connection_that_the_answer_closes_is_no_failure() -> None:
    with responding(lambda number, body: Answer(headers="Connection: close\r\n")) as responder:
        report = run_load(responder.target, posts(responder.target, b"a"), 2, 6)
    assert report.failures == {}
    assert len(report.latencies_s) == 6
    assert responder.connections >= 6


def test_load_without_an_endpoint_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} can't be reached"):
        run_load(f"http://127.0.0.1:{port}", [b""], 2, 1)


def test_closed_loop_reports_nothing_of_the_warm_up() -> None:
    """The first answers are 503 for as long as the warm-up lasts."""
    with responding(lambda number, body: Answer(503 if number == 0 else 200, after_s=0.002)) as responder:
        report = run_closed_loop(responder.target, posts(responder.target, b"a"), 1, 0.2, warm_up_s=0.1)
    assert report.failures == {}
    assert report.seconds == 0.2
    assert 0 < len(report.latencies_s) < report.sent == len(responder.bodies)


def test_unanswered_requests_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "DRAIN_S", 0.05)
    with responding(lambda number, body: Answer(silent=True)) as responder:
        closed = run_closed_loop(responder.target, posts(responder.target, b"a"), 3, 0.05)
        opened = run_open_loop(responder.target, posts(responder.target, b"a"), 2, rate=200.0, seconds=0.1)
    assert (closed.unanswered, closed.latencies_s, closed.failures) == (3, [], {})
    assert opened.sent == 2
    assert opened.unanswered == pytest.approx(20, abs=1)  # with those that never found a free connection


STALL_S, RATE = 0.3, 100.0


def stall_once(number: int, body: bytes) -> Answer:
    """The first answer of all takes long, and with one connection everything waits for it."""
    return Answer(after_s=STALL_S if number == 0 else 0.0)


def test_open_loop_counts_a_stall_in_every_request_that_was_due_in_it() -> None:
    """Request i was due i / rate after the first, and was not sent before the stall ended."""
    with responding(stall_once) as responder:
        report = run_open_loop(responder.target, posts(responder.target, b"a"), 1, RATE, seconds=0.4)
    waited = [STALL_S - number / RATE for number in range(int(STALL_S * RATE))]
    slack_s = 0.002  # a timer of the responder's event loop may be that early
    assert all(got >= least - slack_s for got, least in zip(report.latencies_s, waited, strict=False))
    assert len(report.latencies_s) == pytest.approx(0.4 * RATE, abs=1)
    assert responder.busy_max == 1
    assert len(report.lags_s) == pytest.approx(0.4 * RATE, abs=1)  # the generator itself does not stall
    assert report.queued >= STALL_S * RATE - 2


def test_closed_loop_sees_a_stall_once() -> None:
    """What the open loop is for: here the requests that the stall kept back are not even sent."""
    with responding(stall_once) as responder:
        report = run_load(responder.target, posts(responder.target, b"a"), 1, 40)
    assert report.latencies_s[0] >= STALL_S - 0.002
    assert sum(report.latencies_s[1:]) <= report.seconds - report.latencies_s[0]


def test_open_loop_takes_no_more_connections_than_allowed() -> None:
    with responding(lambda number, body: Answer(after_s=0.03)) as responder:
        report = run_open_loop(responder.target, posts(responder.target, b"a"), 3, rate=300.0, seconds=0.2)
    assert responder.connections == responder.busy_max == 3
    assert len(report.latencies_s) == pytest.approx(60, abs=1)


def test_open_loop_goes_on_after_lost_connections() -> None:
    with responding(lambda number, body: Answer(lost=number % 5 == 0)) as responder:
        report = run_open_loop(responder.target, posts(responder.target, b"a"), 4, rate=100.0, seconds=0.2)
    assert report.failures[load.CLOSED] == len(range(0, report.sent, 5))
    assert report.failures[load.CLOSED] + len(report.latencies_s) == report.sent


def test_arrivals_are_due_once_each_and_evenly() -> None:
    arrivals = Arrivals(10.0, rate=4.0)
    assert arrivals.due(9.9) == []
    assert arrivals.next_s == 10.0
    assert arrivals.due(10.6) == [10.0, 10.25, 10.5]
    assert arrivals.due(10.6) == []
    assert arrivals.next_s == 10.75
    assert arrivals.due(11.0) == [10.75, 11.0]


def test_alarm_is_readable_from_its_time_on() -> None:
    alarm = Alarm()
    try:
        alarm.set(time.perf_counter() + 3_600.0)
        assert select.select([alarm.fd], [], [], 0.0)[0] == []
        at_s = time.perf_counter() + 0.01
        alarm.set(at_s)
        assert select.select([alarm.fd], [], [], 20.0)[0] == [alarm.fd]
        assert time.perf_counter() >= at_s
        alarm.set(time.perf_counter() + 3_600.0)
        assert select.select([alarm.fd], [], [], 0.0)[0] == []
    finally:
        alarm.close()


def test_child_is_another_process_and_its_errors_come_back() -> None:
    assert in_child(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_child(divmod, 1, 0)
