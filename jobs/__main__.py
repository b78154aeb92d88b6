"""`python -m jobs import ...`, `compact ...` and the others: what `ray job submit` runs."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from actors import ray_runtime
from actors.niceness import work_in_background
from cluster.config import Settings
from cluster.errors import EaglerayError, Invalid
from cluster.garbage import GRACE_S
from jobs.collect_garbage import CollectGarbageOptions
from jobs.compact import CompactOptions
from jobs.export import ExportOptions
from jobs.import_source import Columns
from jobs.importer import DEFAULT_MEMORY_BYTES, ImportOptions
from jobs.rebuild import RebuildOptions
from jobs.report import JobStatus, check_job_id, new_job_id
from jobs.rollback import RollbackOptions
from jobs.run import run_compact, run_import, run_rebuild
from jobs.run_care import run_collect_garbage, run_scrub
from jobs.run_snapshots import run_branch, run_export, run_restore, run_rollback, run_snapshot
from jobs.scrub import ScrubOptions
from jobs.snapshots import BranchOptions, RestoreOptions, SnapshotOptions

Data = Annotated[str | None, typer.Option(help="Storage URL; taken from the running Eagleray if absent.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join.")]
Namespace = Annotated[str, typer.Option(help="Ray namespace of the Eagleray.")]
MemoryBytes = Annotated[
    int, typer.Option(help="Most bytes that the indexes being built at one time take on one node.", min=1)
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
JobId = Annotated[str | None, typer.Option(help="Name of this run; made up if absent.")]
app = typer.Typer(help="Eagleray's jobs.", no_args_is_help=True, add_completion=False)


@app.callback()
def jobs() -> None:
    """Jobs run on a Ray cluster, and report their progress to object storage."""


@app.command("import")
def import_command(
    collection: Annotated[str, typer.Option(help="The collection to fill; created if it does not exist.")],
    source: Annotated[str, typer.Option(help="Parquet file, folder or object-storage URL.")],
    data: Data = None,
    id_column: Annotated[str, typer.Option(help="Column of ids.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Column of vectors.")] = "vector",
    attribute_columns: Annotated[str, typer.Option(help="Comma-separated columns to keep, or 'all'.")] = "",
    create: Annotated[str, typer.Option(help="JSON config for a collection that does not exist yet.")] = "{}",
    memory_bytes: MemoryBytes = DEFAULT_MEMORY_BYTES,
    seed: Seed = 0,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Import a Parquet file, folder or URL: all of it becomes the collection's points, or nothing does."""
    columns = Columns(id_column, vector_column, parse_attributes(attribute_columns))
    options = ImportOptions(collection, source, columns, _json_object(create), memory_bytes, seed)
    settings = _connected(address, data, namespace)
    run_import(settings, options, _first_status("import", job_id, collection))


@app.command("compact")
def compact_command(
    collection: Annotated[str, typer.Option(help="The collection to compact.")],
    shard: Annotated[int | None, typer.Option(help="Only this shard.", min=0)] = None,
    data: Data = None,
    memory_bytes: MemoryBytes = DEFAULT_MEMORY_BYTES,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Seal what was written into segments, and merge each shard's segments into one without deleted rows."""
    settings = _connected(address, data, namespace)
    options = CompactOptions(collection, shard, memory_bytes)
    run_compact(settings, options, _first_status("compact", job_id, collection))


@app.command("rebuild")
def rebuild_command(
    collection: Annotated[str, typer.Option(help="The collection to rebuild.")],
    index: Annotated[str, typer.Option(help="Another index kind, or a JSON object of index fields.")] = "{}",
    target_recall: Annotated[float | None, typer.Option(help="Another target for recall@10.")] = None,
    shards: Annotated[int | None, typer.Option(help="Another number of shards.", min=1)] = None,
    metric_report: Annotated[
        str | None, typer.Option(help="File on the node that runs this, for what the gate measured, as JSON.")
    ] = None,
    data: Data = None,
    memory_bytes: MemoryBytes = DEFAULT_MEMORY_BYTES,
    seed: Seed = 0,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Build the collection's next generation from its points, and serve it if it passes the gate."""
    fields = parse_index(index) | ({} if target_recall is None else {"target_recall": target_recall})
    options = RebuildOptions(collection, fields, shards, memory_bytes, seed, metric_report)
    settings = _connected(address, data, namespace)
    run_rebuild(settings, options, _first_status("rebuild", job_id, collection))


@app.command("rollback")
def rollback_command(
    collection: Annotated[str, typer.Option(help="The collection to take back.")],
    generation: Annotated[int | None, typer.Option(help="Which one; absent: the one before the newest.", min=1)] = None,
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Go back to an earlier generation; every write acknowledged since stays."""
    settings = _connected(address, data, namespace)
    run_rollback(settings, RollbackOptions(collection, generation), _first_status("rollback", job_id, collection))


@app.command("snapshot")
def snapshot_command(
    collection: Annotated[str, typer.Option(help="The collection to take a snapshot of.")],
    name: Annotated[str, typer.Option(help="Its name: lower-case letters, digits, _ and -.")],
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Name the points that the collection has now; they stay until the snapshot is deleted."""
    settings = _connected(address, data, namespace)
    run_snapshot(settings, SnapshotOptions(collection, name), _first_status("snapshot", job_id, collection))


@app.command("restore")
def restore_command(
    collection: Annotated[str, typer.Option(help="The collection whose points are replaced.")],
    snapshot: Annotated[str, typer.Option(help="A snapshot of it.")],
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Replace a collection's points by those of a snapshot; writes from now on stay on top. It can be rolled back."""
    settings = _connected(address, data, namespace)
    run_restore(settings, RestoreOptions(collection, snapshot), _first_status("restore", job_id, collection))


@app.command("branch")
def branch_command(
    collection: Annotated[str, typer.Option(help="The collection to branch.")],
    into: Annotated[str, typer.Option(help="The new collection.")],
    snapshot: Annotated[str | None, typer.Option(help="A snapshot of the first; absent: as of now.")] = None,
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Make a new collection of a collection's points without copying them."""
    settings = _connected(address, data, namespace)
    run_branch(settings, BranchOptions(collection, into, snapshot), _first_status("branch", job_id, collection))


@app.command("export")
def export_command(
    collection: Annotated[str, typer.Option(help="The collection to export.")],
    target: Annotated[str, typer.Option(help="Folder that all nodes share, or object-storage URL; it must be empty.")],
    snapshot: Annotated[str | None, typer.Option(help="A snapshot of it; absent: the points of now.")] = None,
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Write a collection's points to Parquet files, which an import reads back."""
    settings = _connected(address, data, namespace)
    run_export(settings, ExportOptions(collection, target, snapshot), _first_status("export", job_id, collection))


@app.command("collect_garbage")
def collect_garbage_command(
    collection: Annotated[str | None, typer.Option(help="Only this collection; else everything.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; else it is only listed and counted.")] = False,
    grace_s: Annotated[float, typer.Option(help="What is younger than so many seconds stays.")] = GRACE_S,
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Find what nothing names any more, and delete it with --delete."""
    options = CollectGarbageOptions(collection, delete, grace_s)
    options.check()
    settings = _connected(address, data, namespace)
    run_collect_garbage(settings, options, _first_status("collect_garbage", job_id, collection or ""))


@app.command("scrub")
def scrub_command(
    collection: Annotated[str, typer.Option(help="The collection to check.")],
    sample: Annotated[int, typer.Option(help="Queries that recall is measured with; 0: none.")] = 200,
    seed: Seed = 0,
    memory_bytes: MemoryBytes = DEFAULT_MEMORY_BYTES,
    data: Data = None,
    address: Address = None,
    namespace: Namespace = "eagleray",
    job_id: JobId = None,
) -> None:
    """Read all that the collection needs, check it, and measure its recall; exit code 1 if something is wrong."""
    options = ScrubOptions(collection, sample, seed, memory_bytes)
    options.check()
    settings = _connected(address, data, namespace)
    run_scrub(settings, options, _first_status("scrub", job_id, collection))


def _connected(address: str | None, data: str | None, namespace: str) -> Settings:
    """Join the Ray cluster; the settings of the Eagleray there, or with `data` those of none."""
    ray_runtime.connect(address)
    settings = Settings(data=data, namespace=namespace) if data else ray_runtime.settings_of_supervisor(namespace)
    settings.check_shared()
    return settings


def _first_status(kind: str, job_id: str | None, collection: str) -> JobStatus:
    submission_id = _submission_id()
    name = job_id or submission_id or new_job_id(kind)
    check_job_id(name)
    return JobStatus(name, kind, collection, submitted=submission_id == name)


def _submission_id() -> str | None:
    """The name under which Ray's job server runs this process, if it does."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return str(json.loads(config)["metadata"]["job_submission_id"]) if config else None


def parse_attributes(text: str) -> tuple[str, ...] | str:
    return "all" if text == "all" else tuple(name for name in text.split(",") if name)


def parse_index(text: str) -> dict[str, Any]:
    """`IndexConfig` fields of `--index`."""
    return _json_object(text, "index") if text.startswith("{") else {"kind": text}


def _json_object(text: str, name: str = "create") -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Invalid.at(name, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Invalid.at(name, "must be a JSON object")
    return value


def main() -> None:
    """Run; an error of ours ends with its message and exit code 1."""
    try:
        app()
    except EaglerayError as error:
        print(f"eagleray: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    work_in_background()
    main()
