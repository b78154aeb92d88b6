"""A job in the terminal: submitted, followed under a progress bar, and its end in words or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from jobs.progress_bar import progress_bar, progress_note
from serve.client import Client
from serve.job_words import end_in_words, failure_in_words, plan_lines

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


def run_in_terminal(
    client: Client, collection: str | None, body: dict[str, Any], as_json: bool, wait: bool = True
) -> None:
    """Run a job on a collection (None: on all), and print what it did.

    Without `wait` only its id is printed. A job that did not succeed ends the command with exit code 1; Ctrl-C ends
    the command, and not the job.
    """
    job_id = client.submit_job(collection, body)
    if wait:
        show_end(follow(client, job_id, quiet=as_json), as_json)
    else:
        print(json.dumps({"job_id": job_id}) if as_json else f"job {job_id} is submitted: {how_it_is(job_id)}")


def follow(client: Client, job_id: str, quiet: bool) -> dict[str, Any]:
    """The job's last status. What it is going to build is told once that is known."""
    plans: list[dict[str, Any]] = []
    try:
        with progress_bar("submitted", hidden=quiet) as show:

            def listener(now: dict[str, Any]) -> None:
                message = now["report"].get("message", "")
                show(
                    now["phase"], now["progress"], progress_note(now["rate"], now["unit"], now["remaining_s"], message)
                )
                if now["plan"] and not plans and not quiet:
                    plans.append(now["plan"])
                    print("\n".join(plan_lines(now["plan"])))

            return client.follow_job(job_id, listener)
    except KeyboardInterrupt:
        print(f"eagleray: job {job_id} goes on: {how_it_is(job_id)}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def how_it_is(job_id: str) -> str:
    return f"`eagleray jobs {job_id}` tells how it is, `eagleray jobs {job_id} --stop` stops it"


def show_end(status: dict[str, Any], as_json: bool) -> None:
    """Print how a job ended; exit code 1 where it did not succeed."""
    ended_well = status["state"] == "succeeded"
    if as_json:
        print(json.dumps(status))
    elif ended_well:
        print(end_in_words(status))
    else:
        print(f"eagleray: {failure_in_words(status)}", file=sys.stderr)
    if not ended_well:
        raise typer.Exit(1)
