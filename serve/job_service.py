"""Submitting, following and stopping jobs, for the endpoint."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from dataclasses import asdict
from typing import Any, Protocol

import msgspec

from cluster.errors import Invalid, NotFound, Unavailable
from cluster.object_store import ObjectStore
from jobs.report import JobStatus, read_status
from serve.schemas import CompactBody, ImportBody

JOB_ID = re.compile(r"[a-zA-Z0-9_-]{1,128}")
LOG_LINES = 50
UNFINISHED = ("running", "pending")
ENTRYPOINT_CHARACTERS = 30_000  # Linux takes 128 KiB in one argument, and a character may be 4 bytes
ENDED_STATES = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}  # Ray's, and ours
NO_REPORT = "the job ended without a report; its log may tell"
Options = dict[str, str | int | None]  # of a command line; None is left out
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

    def submit_import(self, job_id: str, collection: str, body: ImportBody) -> None:
        self._submit(job_id, import_command(job_id, collection, body, self._namespace))

    def submit_compact(self, job_id: str, collection: str, body: CompactBody) -> None:
        self._submit(job_id, compact_command(job_id, collection, body, self._namespace))

    def _submit(self, job_id: str, command: list[str]) -> None:
        entrypoint = shlex.join(command)
        if len(entrypoint) > ENTRYPOINT_CHARACTERS or "\0" in entrypoint:
            raise Invalid.at("body", f"makes a command that is over {ENTRYPOINT_CHARACTERS} characters or holds a NUL")
        self._runner.submit_job(job_id, entrypoint)

    def status(self, job_id: str) -> dict[str, Any]:
        """What the job wrote, what Ray says of it, and, once it ended, the end of its log; NotFound.

        Unavailable where the job has written no end and Ray cannot be asked.
        """
        _check_job_id(job_id)
        state, unknown = self._ray_state(job_id)  # before reading: what Ray says ended has written its last
        try:
            written = read_status(self._store, job_id)
        except NotFound:
            if unknown is not None:
                raise unknown from None
            if state is None:
                raise NotFound(f"no job {job_id!r}") from None
            written = JobStatus(job_id, job_id.split("-", 1)[0], "", state="pending")
        answer = asdict(written)
        if written.submitted and written.state in UNFINISHED:
            if unknown is not None:
                raise unknown
            answer |= _state_of_unfinished(written, state)
        return answer | {
            "log": self._log_tail(job_id) if answer["state"] not in UNFINISHED and state is not None else []
        }

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
        _check_job_id(job_id)
        self._runner.stop_job(job_id)


def _check_job_id(job_id: str) -> None:
    if not JOB_ID.fullmatch(job_id):
        raise Invalid.at("job_id", f"{job_id!r} does not match {JOB_ID.pattern}")


def _state_of_unfinished(written: JobStatus, state: str | None) -> dict[str, Any]:
    """What to tell of a job that wrote no end: as Ray says; failed where Ray does not know it any more."""
    ended = "failed" if state is None else ENDED_STATES.get(state)
    if ended == "failed":
        return {"state": ended, "report": {"error": "Crashed", "message": NO_REPORT}}
    if ended == "succeeded":  # it committed, or it would have ended with an error
        return {"state": ended, "progress": 1.0, "remaining_s": 0.0, "report": {"message": NO_REPORT}}
    return {"state": ended or written.state}


def import_command(job_id: str, collection: str, body: ImportBody, namespace: str) -> list[str]:
    """The command line of an import job."""
    attributes = _attributes_option(body.attribute_columns)
    options: Options = {
        "--job-id": job_id,
        "--collection": collection,
        "--source": body.source,
        "--id-column": body.id_column,
        "--vector-column": body.vector_column,
        "--attribute-columns": attributes or None,
        "--create": msgspec.json.encode(body.create).decode() if body.create else None,
        "--memory-bytes": body.memory_bytes,
        "--seed": body.seed,
        "--namespace": namespace,
    }
    return _command("import", options)


def compact_command(job_id: str, collection: str, body: CompactBody, namespace: str) -> list[str]:
    """The command line of a compaction."""
    options: Options = {
        "--job-id": job_id,
        "--collection": collection,
        "--shard": body.shard,
        "--memory-bytes": body.memory_bytes,
        "--namespace": namespace,
    }
    return _command("compact", options)


def _command(kind: str, options: Options) -> list[str]:
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", "jobs", kind, *given]


def _attributes_option(columns: list[str] | str) -> str:
    """Names joined by commas, or `all`. Invalid names what would be read as something else."""
    if isinstance(columns, str):
        return columns
    for position, name in enumerate(columns):
        if not name or "," in name or columns == ["all"]:
            raise Invalid.at(f"attribute_columns[{position}]", f'{name!r} cannot be named; "all" takes every column')
    return ",".join(columns)
