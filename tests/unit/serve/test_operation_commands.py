"""The command line's jobs, rollback and snapshots against an endpoint whose jobs run in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import cluster.rollback
from cluster.errors import Conflict, Invalid, NotFound
from jobs import rebuild
from jobs.report import JobReporter, JobStatus
from serve import job_terminal
from serve.cli import app
from serve.client import Client
from tests.unit.actors.points import random_points
from tests.unit.serve.command_line import COLUMNS, cells, told, told_json
from tests.unit.serve.endpoint import Endpoint, LocalJobs
from tests.unit.serve.jobs_here import JobsHere, generation_of, until
from tests.unit.serve.listening import CONFIG, POINTS, listening

COUNT = len(POINTS)
MORE = random_points(CONFIG, 30, seed=3)


@contextmanager
def serving_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Client, Endpoint]]:
    """`words` is served, and jobs run as soon as they are submitted."""
    with listening(tmp_path) as (client, endpoint):
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        yield client, endpoint


def failed(*arguments: str, client: Client) -> tuple[str, str]:
    """(standard output, standard error) of a command that ends with exit code 1 and no exception."""
    result = CliRunner(env={"COLUMNS": COLUMNS}).invoke(app, [*arguments, "--target", client.target])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.stdout, result.stderr


# --- rebuild and rollback -------------------------------------------------------------------------------------------


def test_rebuild_tells_its_plan_the_gate_and_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, _):
        output = told("rebuild", "words", "--index", "hnsw", "--target-recall", "0.9", "--shards", "1", client=client)
        plan, memory, gate, *measured, done = output.splitlines()
        assert plan.startswith("builds: 1 x hnsw")
        assert memory.startswith("memory: ")
        assert memory.endswith("the new generation is loaded beside what is served")
        assert gate == "gate passed:"
        assert any(line.startswith("  recall@10 of ") and line.endswith("target 0.9") for line in measured)
        assert measured[-1] == f"  points: {COUNT} of {COUNT}; the same checksum of ids, vectors and attributes"
        assert done == f"collection words: {COUNT} points, 1 shard, generation 2"
        config = client.collection("words")["config"]
        assert (config["index"]["kind"], config["index"]["target_recall"], config["shards"]) == ("hnsw", 0.9, 1)
        status = told_json("rebuild", "words", "--index-options", '{"m": 8}', "--seed", "3", client=client)
        assert (status["state"], status["report"]["generation"]) == ("succeeded", 3)
        assert client.collection("words")["config"]["index"]["m"] == 8


def test_rebuild_whose_gate_fails_says_why_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "recall@10 of 500 rows is 0.8000, 0.95 is the target"
    with serving_jobs(tmp_path, monkeypatch) as (client, endpoint):
        monkeypatch.setattr(rebuild, "refusals", lambda facts: [reason])
        output, errors = failed("rebuild", "words", client=client)
        assert "collection words" not in output
        (told_why,) = (line for line in errors.splitlines() if line.startswith("eagleray: job rebuild-"))
        assert reason in told_why
        assert f"  points: {COUNT} of {COUNT}; the same checksum of ids, vectors and attributes" in errors.splitlines()
        output, _ = failed("rebuild", "words", "--json", client=client)
        assert json.loads(output)["report"]["gate"]["points"]["new"]["count"] == COUNT
        assert generation_of(endpoint, "words") == 1


def test_rebuild_that_cannot_be_built_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, endpoint):
        for options, field in ((["--index-options", '{"nlist": 4}'], "index.nlist"), (["--index", "tree"], "kind")):
            with pytest.raises(Invalid, match=field):
                told("rebuild", "words", *options, client=client)
        assert endpoint.services.jobs._runner.entrypoints == {}  # type: ignore[attr-defined]


def test_rollback_goes_back_and_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, _):
        with pytest.raises(NotFound, match="no earlier one is kept"):
            told("rollback", "words", client=client)
        told("rebuild", "words", "--index", "hnsw", client=client)
        assert told("rollback", "words", client=client) == "collection words: generation 3 is served\n"
        assert client.collection("words")["config"]["index"]["kind"] == "flat"
        answer = told_json("rollback", "words", "--generation", "2", client=client)
        assert (answer["generation"], answer["serving_generation"]) == (4, 4)
        assert client.collection("words")["config"]["index"]["kind"] == "hnsw"


def test_rollback_falls_to_the_job_where_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.rollback, "ROLLBACK_REPLAY_MAX", 0)
    with serving_jobs(tmp_path, monkeypatch) as (client, endpoint):
        told("rebuild", "words", client=client)
        client.upsert("words", [10**9], POINTS.vectors[:1], timeout_ms=20_000)
        output = told("rollback", "words", client=client)
        assert output == "collection words: generation 3, which is generation 1 with every write since\n"
        assert generation_of(endpoint, "words") == 3
        assert client.fetch("words", [10**9])["missing"] == []


class OvertakenClient(Client):
    """Somebody commits a generation between the look at the collection and the rollback."""

    def roll_back(self, name: str, generation: int | None = None) -> dict[str, object]:
        self.generation = 9
        raise Conflict("another version was committed")

    def collection(self, name: str) -> dict[str, object]:
        return {"generation": getattr(self, "generation", 8)}


def test_rollback_that_was_overtaken_does_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.job_commands.Client", OvertakenClient)
    with pytest.raises(Conflict, match="another version"):
        told("rollback", "words")


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshot_branch_restore_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, _):
        assert told("snapshots", "words", client=client) == "no snapshots\n"
        version = client.collection("words")["version"]
        output = told("snapshot", "words", "before", client=client)
        assert output == f"snapshot before of words: {COUNT} points, version {version}\n"
        ((name, points, *_),) = cells(told("snapshots", "words", client=client))
        assert (name, points) == ("before", str(COUNT))
        client.delete_points("words", POINTS.ids.to_pylist()[:5], timeout_ms=20_000)
        output = told("branch", "words", "others", "--snapshot", "before", client=client)
        assert output == f"collection others: branched from words, version {version}\n"
        assert client.collection("others")["points"] == COUNT
        with pytest.raises(Conflict, match="exists"):
            told("branch", "words", "others", client=client)
        output = told("export", "words", f"{tmp_path}/out", client=client)
        assert output.startswith(f"{tmp_path}/out: {COUNT - 5} points of words, ")
        assert pq.read_table(tmp_path / "out").num_rows == COUNT - 5
        output = told("restore", "words", "before", client=client)
        assert output == "collection words: as snapshot before has it, generation 2\n"
        assert client.collection("words")["points"] == COUNT
        assert told("snapshots", "words", "--delete", "before", client=client) == (
            "snapshot before of words is deleted\n"
        )
        assert told_json("snapshots", "words", client=client) == {"snapshots": []}
        with pytest.raises(NotFound, match="before"):
            told("restore", "words", "before", client=client)


# --- garbage and scrub ----------------------------------------------------------------------------------------------


def test_garbage_is_listed_and_deleted_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, endpoint):
        endpoint.store.put("collections/words/segments/ghost/rows.arrow", b"12345")
        output = told("collect-garbage", "words", "--grace-hours", "0", client=client)
        assert "  segment: 1 object, 5 B" in output.splitlines()
        assert "garbage: 1 object, 5 B; --delete deletes it" in output
        assert endpoint.store.get("collections/words/segments/ghost/rows.arrow") == b"12345"
        status = told_json("collect-garbage", "--delete", client=client)
        assert (status["collection"], status["report"]["deleted"], status["report"]["grace_s"]) == ("", True, 86_400.0)
        assert endpoint.store.get("collections/words/segments/ghost/rows.arrow") == b"12345"  # too young
        with pytest.raises(Invalid, match="grace_s"):
            told("collect-garbage", "--delete", "--grace-hours", "0.5", client=client)


def test_scrub_says_what_it_read_and_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_jobs(tmp_path, monkeypatch) as (client, endpoint):
        output = told("scrub", "words", "--sample", "10", client=client)
        assert output.startswith(f"{COUNT} points in 2 segments, ")
        assert ": all as it was written, recall@10 1.0000 of 10 stored rows with noise" in output
        key = first_description(endpoint)
        endpoint.store.put(key, b"{")
        _, errors = failed("scrub", "words", client=client)
        assert "eagleray: job scrub-" in errors
        (last,) = [line for line in errors.splitlines() if line.startswith("eagleray: job scrub-")]
        assert last == errors.splitlines()[-1]
        assert last.count(key) == 1, "it is told once"


def first_description(endpoint: Endpoint) -> str:
    return next(
        info.key for info in endpoint.store.objects("collections/words/segments/") if info.key.endswith("/segment.json")
    )


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_shown_stopped_and_followed(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        assert told("jobs", client=client) == "no jobs\n"
        job_id = told_json("compact", "words", "--no-wait", client=client)["job_id"]
        output = told("compact", "words", "--no-wait", client=client)
        assert output.startswith("job compact-")
        assert "--stop` stops it" in output
        listed = {row[0]: row[1:3] for row in cells(told("jobs", client=client))}
        assert listed[job_id] == ["words", "pending, 0%"]
        reporter = JobReporter(endpoint.store, JobStatus(job_id, "compact", "words", phase="compact", progress=0.5))
        endpoint.jobs.states[job_id] = "RUNNING"
        assert told("jobs", job_id, client=client) == f"{job_id}: compact of words, running, 50%, compact\n"
        reporter.finish("failed", {"error": "Invalid", "message": "no such shard", "points": 7, "shards": [1]})
        endpoint.jobs.states[job_id] = "FAILED"
        endpoint.jobs.logs[job_id] = ["a line"]
        assert told("jobs", job_id, client=client).splitlines() == [
            f"{job_id}: compact of words, failed, 50%, no such shard",
            "  error: Invalid",
            "  points: 7",
            "  | a line",
        ]
        _, errors = failed("jobs", job_id, "--wait", client=client)
        assert "no such shard" in errors
        output = told("jobs", client=client)
        assert f"{job_id}: no such shard" in output.splitlines(), "whole, whatever the width"
        ((_, _, state, at),) = [row for row in cells(output) if row[0] == job_id]
        assert state == "failed, 50%"
        assert datetime.fromisoformat(at) <= datetime.now(UTC).replace(tzinfo=None)
        reporter.status = replace(reporter.status, kind="snapshot")
        reporter.finish("succeeded", {"name": "before", "points": 7, "version": 3})
        assert told("jobs", job_id, "--wait", client=client) == "snapshot before of words: 7 points, version 3\n"
        other = next(iter(listed.keys() - {job_id}))
        assert told("jobs", other, "--stop", client=client) == f"job {other} is told to stop\n"
        assert endpoint.jobs.states[other] == "STOPPED"
        assert told_json("jobs", other, client=client)["state"] == "stopped"
        with pytest.raises(Invalid, match="name the job"):
            told("jobs", "--stop", client=client)


def test_command_that_is_interrupted_leaves_its_job_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "follow_job", interrupted)
    with listening(tmp_path) as (client, endpoint):
        result = CliRunner().invoke(app, ["compact", "words", "--target", client.target])
        (job_id,) = endpoint.jobs.entrypoints
        assert result.exit_code == job_terminal.INTERRUPTED
        assert f"job {job_id} goes on" in result.stderr
        assert endpoint.jobs.states[job_id] == "PENDING"


class EndsLater(LocalJobs):
    """Jobs that are stopped by somebody else."""

    def job_state(self, job_id: str) -> str | None:
        return "STOPPED"


def test_command_ends_with_1_where_its_job_was_stopped(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        endpoint.services.jobs._runner = EndsLater()
        _, errors = failed("compact", "words", client=client)
        assert " stopped: " in errors
        until(lambda: client.jobs()[0]["state"] == "stopped")
