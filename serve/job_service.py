"""Submitting, following and stopping jobs, for the endpoint."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from cluster.errors import Invalid, NotFound, Unavailable
from cluster.object_store import ObjectStore
from jobs.report import JobStatus, check_job_id, new_job_id, newest_statuses, read_status, write_pending
from serve.job_bodies import ImportBody, JobBody, RebuildBody, kind_of

LOG_LINES = 50
JOBS_LISTED = 50
LISTED = ("job_id", "kind", "collection", "state", "phase", "progress", "rate", "unit", "remaining_s")
UNFINISHED = ("running", "pending")
ENTRYPOINT_CHARACTERS = 30_000  # Linux takes 128 KiB in one argument, and a character may be 4 bytes
ENDED_STATES = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}  # Ray's, and ours
NO_REPORT = "the job ended without a report; its log may tell"
logger = logging.getLogger(__name__)


class JobRunner(Protocol):
    """Where jobs run (`ray_jobs`: Ray's job server). All methods block."""

    def submit_job(self, job_id: str, entrypoint: str) -> None: ...

    def job_state(self, job_id: str) -> str | None: ...

    def job_log_tail(self, job_id: str, lines: int) -> list[str]: ...

    def stop_job(self, job_id: str) -> bool: ...


class JobService:
    """Jobs of one Eagleray; their progress is what they wrote to object storage. All methods block."""

    def __init__(self, store: ObjectStore, runner: JobRunner, namespace: str) -> None:
        self._store = store
        self._runner = runner
        self._namespace = namespace

    def submit(self, collection: str, body: JobBody) -> str:
        """Submit a job on a collection, or with "" on all; returns its id. Invalid; Unavailable."""
        kind = kind_of(body)
        job_id = new_job_id(kind)
        entrypoint = shlex.join(command_line(job_id, collection, body, self._namespace))
        if len(entrypoint) > ENTRYPOINT_CHARACTERS or "\0" in entrypoint:
            raise Invalid.at("body", f"makes a command that is over {ENTRYPOINT_CHARACTERS} characters or holds a NUL")
        self._runner.submit_job(job_id, entrypoint)
        try:
            write_pending(self._store, JobStatus(job_id, kind, collection))
        except Unavailable as error:  # it was submitted all the same, and is found by its id
            logger.warning("job %s is not listed until it runs: %s", job_id, error)
        return job_id

    def status(self, job_id: str) -> dict[str, Any]:
        """What the job wrote, what Ray says of it, and, once it ended, the end of its log; NotFound.

        Unavailable where the job has written no end and Ray cannot be asked.
        """
        check_job_id(job_id)
        answer, state = self._told(job_id)
        return answer | {
            "log": self._log_tail(job_id) if answer["state"] not in UNFINISHED and state is not None else []
        }

    def recent(self) -> list[dict[str, Any]]:
        """The last jobs, newest first, as `status` tells them, but in a few words.

        `updated_at` is when a job last wrote its status. Unavailable where one wrote no end and Ray cannot be asked.
        """
        jobs = []
        for written, at in newest_statuses(self._store, JOBS_LISTED):
            answer = asdict(written) if written.state not in UNFINISHED else self._told(written.job_id)[0]
            told: dict[str, Any] = {name: answer[name] for name in LISTED}
            updated_at = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
            jobs.append(told | {"message": str(answer["report"].get("message", "")), "updated_at": updated_at})
        return jobs

    def _told(self, job_id: str) -> tuple[dict[str, Any], str | None]:
        """What the job wrote, corrected by what Ray says, and Ray's state of it; NotFound, Unavailable."""
        state, unknown = self._ray_state(job_id)  # before reading: what Ray says ended has written its last
        try:
            written = read_status(self._store, job_id)
        except NotFound:
            if unknown is not None:
                raise unknown from None
            if state is None:
                raise NotFound(f"no job {job_id!r}") from None
            written = JobStatus(job_id, job_id.split("-", 1)[0], "", state="pending")
        return asdict(written) | _ray_says(written, state, unknown), state

    def _ray_state(self, job_id: str) -> tuple[str | None, Unavailable | None]:
        """What Ray says of a job, or why it cannot be asked."""
        try:
            return self._runner.job_state(job_id), None
        except Unavailable as error:
            return None, error

    def _log_tail(self, job_id: str) -> list[str]:
        """Only of a job that ended: Ray hands out a log whole, which is too much for each look at a running one."""
        try:
            return self._runner.job_log_tail(job_id, LOG_LINES)
        except Unavailable as error:
            logger.warning("the log of job %s cannot be read: %s", job_id, error)
            return []

    def stop(self, job_id: str) -> None:
        check_job_id(job_id)
        self._runner.stop_job(job_id)


def _ray_says(written: JobStatus, state: str | None, unknown: Unavailable | None) -> dict[str, Any]:
    """What to tell of a job instead of what it wrote: of one that wrote no end, what Ray says of it.

    Failed where Ray does not know it any more; raises `unknown` where Ray could not be asked.
    """
    if not written.submitted or written.state not in UNFINISHED:
        return {}
    if unknown is not None:
        raise unknown
    ended = "failed" if state is None else ENDED_STATES.get(state)
    if ended == "failed":
        return {"state": ended, "report": {"error": "Crashed", "message": NO_REPORT}}
    if ended == "succeeded":  # it committed, or it would have ended with an error
        return {"state": ended, "progress": 1.0, "remaining_s": 0.0, "report": {"message": NO_REPORT}}
    return {"state": ended or written.state}


def command_line(job_id: str, collection: str, body: JobBody, namespace: str) -> list[str]:
    """`python -m jobs <kind>` with an option for each field of the body; null is left out, and so is false."""
    options = {"job_id": job_id, "collection": collection or None, **_fields(body), "namespace": namespace}
    given = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in options.items()
        if value is not None and value is not False
    ]
    return [sys.executable, "-m", "jobs", kind_of(body), *given]


def _fields(body: JobBody) -> dict[str, Any]:
    """By the name of the command line's option."""
    fields = msgspec.structs.asdict(body)
    if isinstance(body, ImportBody):
        del fields["mode"]  # the only one
        fields["attribute_columns"] = _attributes_option(body.attribute_columns) or None
        fields["create"] = _json_option(body.create)
    elif isinstance(body, RebuildBody):
        fields["index"] = _json_option(body.index)
    return fields


def _json_option(value: dict[str, Any] | None) -> str | None:
    return msgspec.json.encode(value).decode() if value else None


def _attributes_option(columns: list[str] | str) -> str:
    """Names joined by commas, or `all`. Invalid names what would be read as something else."""
    if isinstance(columns, str):
        return columns
    for position, name in enumerate(columns):
        if not name or "," in name or columns == ["all"]:
            raise Invalid.at(f"attribute_columns[{position}]", f'{name!r} cannot be named; "all" takes every column')
    return ",".join(columns)
