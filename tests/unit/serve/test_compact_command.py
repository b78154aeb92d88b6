"""The command line's `compact` against an endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import Invalid, NotFound
from cluster.object_store import open_store
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter, JobStatus
from serve.cli import app
from serve.client import Client
from serve.job_service import NO_REPORT
from tests.unit.actors.points import manifest_log
from tests.unit.serve.command_line import told, told_json
from tests.unit.serve.compactions import CompactJobs
from tests.unit.serve.endpoint import Endpoint
from tests.unit.serve.listening import POINTS, listening

IDS = POINTS.ids.to_pylist()
NEW = [10_000_000, 10_000_001, 10_000_002]
LIVE = len(IDS) - 4 + 3


def written_to(client: Client) -> None:
    """`words`, a segment in each of 2 shards: two points replaced, four deleted, three new."""
    client.upsert("words", [*NEW, *IDS[:2]], POINTS.vectors[:5], timeout_ms=20_000)
    client.delete_points("words", IDS[2:6], timeout_ms=20_000)


def arguments_of(jobs: CompactJobs) -> tuple[int | None, int]:
    (job_id,) = jobs.entrypoints
    given = jobs.arguments(job_id)
    return given["shard"], given["memory_bytes"]


def test_compact_says_what_was_done(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        jobs = CompactJobs.of(endpoint, tmp_path, at_once=True)
        written_to(client)
        output = told("compact", "words", client=client)
        assert output == f"collection words: 2 -> 2 segments, 6 deleted rows dropped, {LIVE} points\n"
        assert arguments_of(jobs) == (None, DEFAULT_MEMORY_BYTES)
        assert points_of(endpoint) == (LIVE, [1, 1])


def points_of(endpoint: Endpoint) -> tuple[int, list[int]]:
    """Points in the manifest, and segments by shard."""
    newest = manifest_log(endpoint.store, "words").newest_live()
    return newest.points, [len(entry.segments) for entry in newest.shards]


def test_compact_tells_its_status_as_json(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        jobs = CompactJobs.of(endpoint, tmp_path, at_once=True)
        written_to(client)
        status = told_json("compact", "words", "--shard", "1", "--memory-bytes", str(2**40), client=client)
        assert (status["state"], status["kind"], status["collection"]) == ("succeeded", "compact", "words")
        assert [each["shard"] for each in status["report"]["shards"]] == [1]
        assert arguments_of(jobs) == (1, 2**40)


def test_compact_tells_of_deleted_rows_that_are_left(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        CompactJobs.of(endpoint, tmp_path, at_once=True)
        written_to(client)
        output = told("compact", "words", "--memory-bytes", "1", client=client)
        assert output.endswith("; segments that still have deleted rows: 2\n")


class SilentJobs(CompactJobs):
    """Jobs whose end cannot be written."""

    def compact(self, job_id: str) -> None:
        JobReporter(open_store(self._data), JobStatus(job_id, "compact", "words"))
        self.states[job_id] = "SUCCEEDED"


def test_compact_whose_report_was_lost_says_so(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        SilentJobs.of(endpoint, tmp_path, at_once=True)
        assert told("compact", "words", client=client) == f"compact succeeded; {NO_REPORT}\n"


def test_compact_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        jobs = CompactJobs.of(endpoint, tmp_path, at_once=True)
        with pytest.raises(NotFound, match="nothing"):
            told("compact", "nothing", client=client)
        with pytest.raises(Invalid, match="shards 0 to 1"):
            told("compact", "words", "--shard", "2", client=client)
        assert jobs.entrypoints == {}


@pytest.mark.parametrize("option", [["--shard", "-1"], ["--memory-bytes", "0"], ["--shard", "x"], ["--colour", "red"]])
def test_wrong_option_is_refused_before_anything_is_sent(option: list[str]) -> None:
    assert CliRunner().invoke(app, ["compact", "words", *option]).exit_code == 2
