"""Options that many commands of the command line have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TARGET = "http://127.0.0.1:8000"
TargetOption = Annotated[
    str, typer.Option("--target", envvar="EAGLERAY_TARGET", help="The HTTP endpoint of a running Eagleray.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")]
MemoryOption = Annotated[
    int | None, typer.Option(help="Most bytes that the indexes being built at one time take on one node.", min=1)
]
SnapshotOption = Annotated[str | None, typer.Option(help="A snapshot; absent: as of now.")]


def source_url(source: str) -> str:
    """A URL as it is; a path as an absolute one."""
    return source if "://" in source else str(Path(source).expanduser().absolute())
