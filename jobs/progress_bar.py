"""A job's progress bar in the terminal, for whoever runs the job and for whoever follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Show = Callable[[str, float, str], None]


@contextmanager
def progress_bar(first_phase: str, hidden: bool = False) -> Iterator[Show]:
    """A bar on standard error; call what it gives with the phase, the share done (0 to 1) and a note."""
    columns = (TextColumn("{task.description:>9}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    note_column = TextColumn("{task.fields[note]}")
    with Progress(*columns, note_column, console=Console(stderr=True), disable=hidden) as progress:
        bar = progress.add_task(first_phase, total=1.0, note="")

        def show(phase: str, share: float, note: str) -> None:
            progress.update(bar, completed=share, description=phase, note=note)

        yield show


def rate_note(rows_per_second: float) -> str:
    """The rate for a bar's note; nothing while there is none."""
    return f"{rows_per_second:,.0f} rows/s" if rows_per_second else ""
