"""Options that many commands of the command line have."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_TARGET = "http://127.0.0.1:8000"
TargetOption = Annotated[
    str, typer.Option("--target", envvar="EAGLERAY_TARGET", help="The HTTP endpoint of a running Eagleray.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
