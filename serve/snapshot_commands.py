"""The command line's snapshots, and what is made of one: restore, branch, export."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from serve.client import Client
from serve.command_options import DEFAULT_TARGET, JsonOption, SnapshotOption, TargetOption, WaitOption, source_url
from serve.index_options import given
from serve.job_terminal import run_in_terminal
from serve.tables import print_snapshots

out = Console(markup=False, highlight=False)


def snapshot(
    collection: str,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, _ and -.")],
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Name the points that a collection has now; they stay until the snapshot is deleted."""
    with Client(target) as client:
        run_in_terminal(client, collection, {"kind": "snapshot", "name": name}, as_json, wait)


def snapshots(
    collection: str,
    delete: Annotated[str | None, typer.Option("--delete", help="Delete this one.")] = None,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """List a collection's snapshots, or delete one."""
    with Client(target) as client:
        if delete is not None:
            client.delete_snapshot(collection, delete)
            print(json.dumps({"deleted": delete}) if as_json else f"snapshot {delete} of {collection} is deleted")
            return
        found = client.snapshots(collection)
    print(json.dumps({"snapshots": found})) if as_json else print_snapshots(out, found)


def restore(
    collection: str,
    name: Annotated[str, typer.Argument(help="The snapshot.")],
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Replace a collection's points by those of a snapshot of it. `rollback` takes that back."""
    with Client(target) as client:
        run_in_terminal(client, collection, {"kind": "restore", "snapshot": name}, as_json, wait)


def branch(
    collection: str,
    into: Annotated[str, typer.Argument(help="The new collection.")],
    snapshot: SnapshotOption = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Make a new collection of a collection's points without copying them."""
    with Client(target) as client:
        body = {"kind": "branch", "into": into, **given(snapshot=snapshot)}
        run_in_terminal(client, collection, body, as_json, wait)


def export(
    collection: str,
    folder: Annotated[str, typer.Argument(help="Empty folder or object-storage URL, as the server sees it.")],
    snapshot: SnapshotOption = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Write a collection's points to Parquet files, which `import` reads back."""
    with Client(target) as client:
        body = {"kind": "export", "target": source_url(folder), **given(snapshot=snapshot)}
        run_in_terminal(client, collection, body, as_json, wait)


SNAPSHOT_COMMANDS: dict[str, Any] = {
    "snapshot": snapshot,
    "snapshots": snapshots,
    "restore": restore,
    "branch": branch,
    "export": export,
}
