"""Running `eagleray` commands in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from serve.cli import app
from serve.client import Client

COLUMNS = "250"  # wide enough that no cell wraps


def told(*arguments: str, client: Client | None = None) -> str:
    """What a command printed on standard output; its error is raised."""
    target = ["--target", client.target] if client is not None else []
    result = CliRunner(env={"COLUMNS": COLUMNS}).invoke(app, [*arguments, *target], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def told_json(*arguments: str, client: Client | None = None) -> Any:
    return json.loads(told(*arguments, "--json", client=client))


def cells(output: str) -> list[list[str]]:
    """The cells of every table row that was printed, heads left out."""
    rows = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
