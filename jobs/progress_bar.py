"""A job's progress bar in the terminal, for whoever runs the job and for whoever follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Show = Callable[[str, float, str], None]
UNITS_S = (("h", 3600), ("min", 60), ("s", 1))


@contextmanager
def progress_bar(first_phase: str, hidden: bool = False) -> Iterator[Show]:
    """A bar on standard error; call what it gives with the phase, the share done (0 to 1) and a note."""
    columns = (TextColumn("{task.description:>9}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    note_column = TextColumn("{task.fields[note]}", markup=False)  # it may hold brackets, as of eagleray[gpu]
    with Progress(*columns, note_column, console=Console(stderr=True), disable=hidden) as progress:
        bar = progress.add_task(first_phase, total=1.0, note="")

        def show(phase: str, share: float, note: str) -> None:
            progress.update(bar, completed=share, description=phase, note=note)

        yield show


def progress_note(rate: float, unit: str, remaining_s: float | None, message: str = "") -> str:
    """What a bar says after its percentage: the message of a job, or its rate and time left, as far as known."""
    if message:
        return message
    told = [f"{rate:,.0f} {unit}/s"] if rate else []
    if remaining_s:
        told.append(f"{duration_text(remaining_s)} left")
    return ", ".join(told)


def duration_text(seconds: float) -> str:
    """In its largest unit, such as `3 min`; what is nearly two units in the smaller one, such as `90 s`."""
    unit, size = next(((unit, size) for unit, size in UNITS_S if seconds >= 2 * size), UNITS_S[-1])
    return f"{max(1, round(seconds / size))} {unit}"
