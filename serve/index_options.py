"""The command line's options that say which index a collection gets, and the config fields they make."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

import typer

from cluster.config import KIND_OPTIONS, Device, GpuFull, IndexKindChoice
from cluster.errors import Invalid

_MORE = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KIND_OPTIONS.items() if names)
KindOption = Annotated[str | None, typer.Option("--index", help=f"Index kind: {', '.join(get_args(IndexKindChoice))}.")]
TargetRecallOption = Annotated[float | None, typer.Option("--target-recall", help="Recall@10 to tune for; 0.95.")]
IndexMemoryOption = Annotated[
    int | None, typer.Option("--index-memory-bytes", help="Most bytes of one shard's index in memory.", min=1)
]
BuildSecondsOption = Annotated[
    float | None, typer.Option("--build-seconds", help="Longest time to build one shard's index.")
]
ChurnOption = Annotated[
    float | None, typer.Option("--churn", help="Share of points deleted or replaced between two rebuilds, 0 to 1.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help=f"{', '.join(get_args(Device))}: where it is served; auto: what pays.")
]
NumGpusOption = Annotated[
    float | None, typer.Option("--num-gpus", help="GPUs of each replica, a share of one; what its index takes.")
]
CpuTwinOption = Annotated[
    bool | None, typer.Option("--cpu-twin/--no-cpu-twin", help="Answer on the CPU while the GPU cannot.")
]
GpuFullOption = Annotated[
    str | None,
    typer.Option("--gpu-full", help=f"{', '.join(get_args(GpuFull))}: what is done where it does not fit a GPU."),
]
WaitForGpuOption = Annotated[
    bool | None, typer.Option("--wait-for-gpu/--no-wait-for-gpu", help="With device gpu: wait until there are GPUs.")
]
IndexOptionsOption = Annotated[
    str | None, typer.Option("--index-options", help=f'More options of a named kind, as JSON: {{"m": 32}}. {_MORE}.')
]


def index_fields(options: str | None, **fields: Any) -> dict[str, Any]:
    """The `index` of a collection's config: what was given, in JSON or by an option of its own, and no more."""
    more = _json_object(options) if options is not None else {}
    told = given(**fields)
    for name in told.keys() & more.keys():
        raise Invalid.at("index_options", f"{name} is given by an option of its own as well: leave one out")
    return told | more


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Invalid.at("index_options", f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Invalid.at("index_options", f'must be a JSON object such as {{"m": 32}}, not {text}')
    return value
