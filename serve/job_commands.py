"""The command line's jobs: import, rebuild, compact, rollback, collect-garbage and scrub, and the list of jobs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import Conflict, Invalid
from serve.client import Client
from serve.command_options import DEFAULT_TARGET, JsonOption, MemoryOption, TargetOption, WaitOption, source_url
from serve.index_options import (
    BuildSecondsOption,
    ChurnOption,
    CpuTwinOption,
    DeviceOption,
    GpuFullOption,
    IndexMemoryOption,
    IndexOptionsOption,
    KindOption,
    NumGpusOption,
    TargetRecallOption,
    WaitForGpuOption,
    given,
    index_fields,
)
from serve.job_terminal import follow, run_in_terminal, show_end
from serve.tables import print_job, print_jobs

out = Console(markup=False, highlight=False)


def import_command(
    source: Annotated[str, typer.Argument(help="Parquet file, folder or object-storage URL, as the server sees it.")],
    collection: Annotated[str, typer.Option(help="The collection to fill; created if it does not exist.")],
    id_column: Annotated[str, typer.Option(help="Column of ids.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Column of vectors.")] = "vector",
    attribute_columns: Annotated[str, typer.Option(help="Comma-separated columns to keep, or 'all'.")] = "",
    metric: Annotated[str | None, typer.Option(help="Of a new collection: cosine, l2 or ip.")] = None,
    shards: Annotated[int | None, typer.Option(help="Of a new collection.", min=1)] = None,
    replicas: Annotated[int | None, typer.Option(help="Of a new collection.", min=1)] = None,
    vector_dtype: Annotated[str | None, typer.Option(help="Of a new collection: float32 or float16.")] = None,
    index: KindOption = None,
    target_recall: TargetRecallOption = None,
    index_memory_bytes: IndexMemoryOption = None,
    build_seconds: BuildSecondsOption = None,
    churn: ChurnOption = None,
    device: DeviceOption = None,
    num_gpus: NumGpusOption = None,
    cpu_twin: CpuTwinOption = None,
    gpu_full: GpuFullOption = None,
    wait_for_gpu: WaitForGpuOption = None,
    index_options: IndexOptionsOption = None,
    memory_bytes: MemoryOption = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Import vectors: all rows of the source become the collection's points, or nothing changes.

    Options of the index are those of a new collection.
    """
    create = given(metric=metric, shards=shards, replicas=replicas, vector_dtype=vector_dtype)
    index_config = index_fields(
        index_options,
        kind=index,
        target_recall=target_recall,
        memory_bytes=index_memory_bytes,
        build_seconds=build_seconds,
        churn=churn,
        device=device,
        num_gpus=num_gpus,
        cpu_twin=cpu_twin,
        gpu_full=gpu_full,
        wait_for_gpu=wait_for_gpu,
    )
    body = {
        "kind": "import",
        "source": source_url(source),
        "id_column": id_column,
        "vector_column": vector_column,
        "attribute_columns": "all" if attribute_columns == "all" else [a for a in attribute_columns.split(",") if a],
        "create": create | ({"index": index_config} if index_config else {}),
        **given(memory_bytes=memory_bytes),
    }

    with Client(target) as client:
        run_in_terminal(client, collection, body, as_json, wait)


def rebuild(
    collection: str,
    index: KindOption = None,
    target_recall: TargetRecallOption = None,
    shards: Annotated[int | None, typer.Option(help="Number of shards from now on.", min=1)] = None,
    index_memory_bytes: IndexMemoryOption = None,
    build_seconds: BuildSecondsOption = None,
    churn: ChurnOption = None,
    device: DeviceOption = None,
    num_gpus: NumGpusOption = None,
    cpu_twin: CpuTwinOption = None,
    gpu_full: GpuFullOption = None,
    wait_for_gpu: WaitForGpuOption = None,
    index_options: IndexOptionsOption = None,
    memory_bytes: MemoryOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.", min=0)] = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Build the index anew of the stored vectors, with other options where they are given; served once it is as good
    as it must be. Searches and writes go on.
    """
    changed = index_fields(
        index_options,
        kind=index,
        target_recall=target_recall,
        memory_bytes=index_memory_bytes,
        build_seconds=build_seconds,
        churn=churn,
        device=device,
        num_gpus=num_gpus,
        cpu_twin=cpu_twin,
        gpu_full=gpu_full,
        wait_for_gpu=wait_for_gpu,
    )
    body = {"kind": "rebuild", "index": changed, **given(shards=shards, memory_bytes=memory_bytes, seed=seed)}

    with Client(target) as client:
        run_in_terminal(client, collection, body, as_json, wait)


def compact(
    collection: str,
    shard: Annotated[int | None, typer.Option(help="Only this shard.", min=0)] = None,
    memory_bytes: MemoryOption = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Seal what was written into segments, and merge each shard's segments into one without deleted rows."""
    with Client(target) as client:
        body = {"kind": "compact", **given(shard=shard, memory_bytes=memory_bytes)}
        run_in_terminal(client, collection, body, as_json, wait)


def rollback(
    collection: str,
    generation: Annotated[
        int | None, typer.Option(help="Which one to go back to; the one before the newest.", min=1)
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Serve an earlier generation again, with every write since. Another rollback goes forward again."""
    with Client(target) as client:
        newest = client.collection(collection)["generation"]
        try:
            answer = client.roll_back(collection, generation)
        except Conflict as error:
            if client.collection(collection)["generation"] != newest:  # somebody else's: going back is not what it was
                raise
            typer.echo(f"eagleray: {error}", err=True)
            body = {"kind": "rollback", **given(generation=generation)}
            run_in_terminal(client, collection, body, as_json)
            return
    served = answer["serving_generation"] == answer["generation"]
    told = "is served" if served else f"is committed, and not served yet: see `eagleray status {collection}`"
    print(json.dumps(answer) if as_json else f"collection {collection}: generation {answer['generation']} {told}")


def collect_garbage(
    collection: Annotated[str | None, typer.Argument(help="One collection; all without it.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; else it is only listed.")] = False,
    grace_hours: Annotated[
        float | None, typer.Option(help="How old garbage must be; 24. With --delete at least 1.", min=0.0)
    ] = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """List what nothing needs any more, or delete it."""
    grace_s = None if grace_hours is None else grace_hours * 3600.0
    body = {"kind": "collect_garbage", "delete": delete, **given(grace_s=grace_s)}
    with Client(target) as client:
        run_in_terminal(client, collection, body, as_json, wait)


def scrub(
    collection: str,
    sample: Annotated[int | None, typer.Option(help="Queries to measure recall with; 0: none.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.", min=0)] = None,
    memory_bytes: MemoryOption = None,
    wait: WaitOption = True,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Read everything that is stored of a collection, and say what is not as it was written; measure its recall."""
    body = {"kind": "scrub", **given(sample=sample, seed=seed, memory_bytes=memory_bytes)}
    with Client(target) as client:
        run_in_terminal(client, collection, body, as_json, wait)


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="One job; the last ones without it.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop it.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Show the last jobs or one, follow it, or stop it."""
    if job_id is None and (stop or wait):
        raise Invalid("name the job to stop or to follow; `eagleray jobs` lists them")
    with Client(target) as client:
        if job_id is None:
            listed = client.jobs()
            print(json.dumps({"jobs": listed})) if as_json else print_jobs(out, listed)
            return
        if stop:
            client.stop_job(job_id)
            print(json.dumps({"stopped": job_id}) if as_json else f"job {job_id} is told to stop")
            return
        if wait:
            show_end(follow(client, job_id, quiet=as_json), as_json)
            return
        status = client.job(job_id)
    print(json.dumps(status)) if as_json else print_job(out, status)


JOB_COMMANDS: dict[str, Any] = {
    "import": import_command,
    "rebuild": rebuild,
    "compact": compact,
    "rollback": rollback,
    "collect-garbage": collect_garbage,
    "scrub": scrub,
    "jobs": jobs,
}
