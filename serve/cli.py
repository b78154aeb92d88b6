"""The command line, `eagleray`: up, down, create, delete, search, status, explain and plan, and the commands of
`job_commands`, `snapshot_commands` and `bench_command`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from cluster.config import Settings
from cluster.errors import EaglerayError, Invalid
from cluster.gpu_memory import GpuFacts
from serve.bench_command import bench
from serve.client import Client
from serve.command_options import DEFAULT_TARGET, JsonOption, TargetOption, source_url
from serve.explain import explanation, print_explanation
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
from serve.job_commands import JOB_COMMANDS
from serve.snapshot_commands import SNAPSHOT_COMMANDS
from serve.tables import print_collection, print_hits

app = typer.Typer(help="Eagleray: a sharded vector index on Ray.", no_args_is_help=True, add_completion=False)
out = Console(markup=False, highlight=False)  # attributes and reasons may hold brackets


@app.command()
def up(
    data: Annotated[str, typer.Option(help="Storage URL or folder; made if it does not exist.")],
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; none: start Ray here.")] = None,
    shard_threads: Annotated[int | None, typer.Option(help="FAISS threads of each shard.", min=1)] = None,
    namespace: Annotated[str, typer.Option(help="Ray namespace; two Eaglerays on a cluster need two.")] = "eagleray",
    as_json: JsonOption = False,
) -> None:
    """Start Eagleray and serve until Ctrl-C."""
    from cluster.object_store import path_of_url
    from serve.local_cluster import UpOptions
    from serve.local_cluster import up as serve_until_stopped

    if "://" not in data:
        data = path_of_url(data).as_uri()
    shard_cpus = 0.0 if address is None else 1.0  # one machine: every collection may start, cores are shared
    settings = Settings(data, namespace, shard_cpus=shard_cpus, shard_threads=shard_threads)

    def announce(message: str) -> None:
        print(json.dumps({"event": message}) if as_json else f"eagleray: {message}", flush=True)

    serve_until_stopped(UpOptions(settings, host, port, address), announce)


@app.command()
def down(
    port: Annotated[int, typer.Option(help="Port of the `up` to stop.")] = 8000, as_json: JsonOption = False
) -> None:
    """Stop the `eagleray up` that listens on this machine's port."""
    from serve.local_cluster import down as stop_server

    stopped = stop_server(port)
    _show(as_json, {"stopped": stopped}, "stopped" if stopped else f"nothing runs on port {port}")
    if not stopped:
        raise typer.Exit(1)


@app.command()
def create(
    collection: str,
    dimension: Annotated[int, typer.Option(help="Numbers in each vector.", min=1)],
    metric: Annotated[str, typer.Option(help="cosine, l2 or ip.")] = "cosine",
    id_type: Annotated[str, typer.Option(help="int64 or string.")] = "int64",
    shards: Annotated[int, typer.Option(min=1)] = 1,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    vector_dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
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
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Create an empty collection."""
    config = {
        "dimension": dimension,
        "metric": metric,
        "id_type": id_type,
        "shards": shards,
        "replicas": replicas,
        "vector_dtype": vector_dtype,
        "index": index_fields(
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
        ),
    }
    with Client(target) as client:
        answer = client.create(collection, config)
    _show(as_json, answer, f"collection {collection}: {'ready' if answer['ready'] else answer['reason']}")


@app.command()
def delete(collection: str, target: TargetOption = DEFAULT_TARGET, as_json: JsonOption = False) -> None:
    """Delete a collection and its points."""
    with Client(target) as client:
        client.delete(collection)
    _show(as_json, {"deleted": collection}, f"collection {collection} is deleted")


@app.command()
def search(
    collection: str,
    point_id: Annotated[str | None, typer.Option("--id", help="Search with the vector of this point.")] = None,
    vector_file: Annotated[Path | None, typer.Option(help="A .npy file of shape (d,) or (n, d).")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1)] = 10,
    with_attributes: Annotated[str, typer.Option(help="Comma-separated attributes to show.")] = "",
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector, whatever the index.")] = False,
    target_recall: Annotated[float | None, typer.Option(help="Take what was tuned for this recall@10.")] = None,
    nprobe: Annotated[int | None, typer.Option(help="Inverted lists to visit.")] = None,
    ef_search: Annotated[int | None, typer.Option(help="Candidates to keep in a graph search.")] = None,
    rerank: Annotated[float | None, typer.Option(help="Candidates per hit to compare exactly.")] = None,
    itopk_size: Annotated[int | None, typer.Option(help="Candidates to keep in a graph search on a GPU.")] = None,
    search_width: Annotated[int | None, typer.Option(help="Of them, how many to expand at a time.")] = None,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Show the nearest points of a stored point or of vectors in a file."""
    if (point_id is None) == (vector_file is None):
        raise Invalid("give either --id or --vector-file")
    attributes = [name for name in with_attributes.split(",") if name]
    knobs = given(nprobe=nprobe, ef_search=ef_search, rerank=rerank, itopk_size=itopk_size, search_width=search_width)
    params = knobs | given(target_recall=target_recall)
    with Client(target) as client:
        if point_id is not None:
            vectors = client.vector_of(collection, _typed_id(client, collection, point_id))
        else:
            vectors = _read_vectors(vector_file)
        answer = client.search(collection, vectors, k=k, params=params, exact=exact, with_attributes=attributes)
    if as_json:
        print(json.dumps(answer))
        return
    for number, hits in enumerate(answer["results"]):
        print_hits(out, hits, attributes, f"query {number}" if len(answer["results"]) > 1 else "")
    if "degraded" in answer:
        out.print("degraded: a GPU should have answered, the CPU did; `eagleray status` says why", soft_wrap=True)


def _typed_id(client: Client, collection: str, text: str) -> int | str:
    if client.collection(collection)["config"]["id_type"] == "string":
        return text
    try:
        return int(text)
    except ValueError:
        raise Invalid.at("id", f"{text!r} is not an integer, and {collection!r} has int64 ids") from None


def _read_vectors(path: Path | None) -> Any:
    try:
        vectors = np.load(str(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Invalid.at("vector_file", f"{path} is not a .npy file: {error}") from error
    if vectors.ndim not in (1, 2):
        raise Invalid.at("vector_file", f"{path} has shape {vectors.shape}; (d,) or (n, d) are needed")
    return np.atleast_2d(vectors)


@app.command()
def status(
    collection: Annotated[str | None, typer.Argument(help="One collection; all without it.")] = None,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Show collections, their shards, replicas and indexes."""
    with Client(target) as client:
        found = [client.collection(collection)] if collection else client.collections()
    if as_json:
        print(json.dumps(found[0] if collection else {"collections": found}))
        return
    if not found:
        out.print("no collections")
    for each in found:
        print_collection(out, each)


@app.command()
def explain(collection: str, target: TargetOption = DEFAULT_TARGET, as_json: JsonOption = False) -> None:
    """Show which index each segment has and why, what else was considered, and what was measured."""
    with Client(target) as client:
        description = client.collection(collection)
    if as_json:
        print(json.dumps(explanation(description)))
    else:
        print_explanation(out, description)


@app.command()
def plan(
    count: Annotated[int | None, typer.Option(help="Points of the collection.", min=0)] = None,
    dimension: Annotated[int | None, typer.Option(help="Numbers in each vector.", min=1)] = None,
    source: Annotated[str | None, typer.Option(help="Parquet source to plan for, instead of a count.")] = None,
    id_column: Annotated[str, typer.Option(help="Column of ids of the source.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Column of vectors of the source.")] = "vector",
    metric: Annotated[str, typer.Option(help="cosine, l2 or ip.")] = "cosine",
    shards: Annotated[int, typer.Option(min=1)] = 1,
    vector_dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    index: KindOption = None,
    target_recall: TargetRecallOption = None,
    memory_bytes: Annotated[
        int | None,
        typer.Option("--memory-bytes", "--index-memory-bytes", help="Most bytes of one shard's index.", min=1),
    ] = None,
    build_seconds: BuildSecondsOption = None,
    churn: ChurnOption = None,
    device: DeviceOption = None,
    num_gpus: NumGpusOption = None,
    gpu_full: GpuFullOption = None,
    index_options: IndexOptionsOption = None,
    threads: Annotated[int | None, typer.Option(help="To measure a source with; all cores.", min=1)] = None,
    gpu_memory: Annotated[
        int | None, typer.Option(help="Bytes of one GPU that there would be; without it none is thought of.", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which index a collection would get and what it should take; needs no server.

    With --source the times are measured on this machine and these vectors.
    """
    from serve.plan import plan_for, print_plan

    fields = {
        "metric": metric,
        "shards": shards,
        "vector_dtype": vector_dtype,
        "index": index_fields(
            index_options,
            kind=index,
            target_recall=target_recall,
            memory_bytes=memory_bytes,
            build_seconds=build_seconds,
            churn=churn,
            device=device,
            num_gpus=num_gpus,
            gpu_full=gpu_full,
        ),
        **given(dimension=dimension),
    }
    url = None if source is None else source_url(source)
    gpu = None if gpu_memory is None else GpuFacts(gpu_memory)
    planned = plan_for(fields, count, url, id_column, vector_column, threads, gpu)
    if as_json:
        print(json.dumps(planned.to_dict()))
    else:
        print_plan(out, planned)


for command_name, command in (JOB_COMMANDS | SNAPSHOT_COMMANDS).items():
    app.command(command_name)(command)
app.command()(bench)


def _show(as_json: bool, content: Any, text: str) -> None:
    print(json.dumps(content) if as_json else text)


def main() -> None:
    """Run; an error of ours ends with its message and exit code 1."""
    try:
        app()
    except EaglerayError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            print(f"eagleray: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
