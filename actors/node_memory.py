"""How much memory the node of this process has, and how much of it can still be had. Linux; elsewhere nobody knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

KIB = 1024
CGROUPS = "sys/fs/cgroup"
READ_AGAIN_S = 5.0  # to read it takes up to 1.5 ms
Memory = tuple[int, int]


class WatchedMemory:
    """`node_memory`, read at most each `READ_AGAIN_S`."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, read: Callable[[], Memory | None] | None = None
    ) -> None:
        self._clock = clock
        self._read = read or node_memory
        self._read_at = float("-inf")
        self._told: Memory | None = None

    def told(self) -> Memory | None:
        now = self._clock()
        if now - self._read_at >= READ_AGAIN_S:
            self._told, self._read_at = self._read(), now
        return self._told


def node_memory(root: Path = Path("/")) -> Memory | None:
    """(available, total) bytes: of the node, or of the control groups that bound this process, whichever is less.

    Page cache that can be dropped counts as available. None where the system does not tell. `root` is where `proc` and
    `sys` are.
    """
    node = _of_node(root)
    if node is None:
        return None
    available, total = node
    for limit, free in _of_groups(root):
        available, total = min(available, free), min(total, limit)
    return max(0, available), total


def _of_node(root: Path) -> Memory | None:
    fields = _fields(root / "proc/meminfo")
    try:
        return fields["MemAvailable:"] * KIB, fields["MemTotal:"] * KIB
    except KeyError:
        return None


def _of_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) of each control group with a limit, from this process's own to the root's.

    In a container the group's path may be that of the node, which is not there; what is there then is its own group.
    """
    for folder, names in _places(root):
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and used is not None:
            cache = _fields(folder / "memory.stat").get(names[2], 0)
            yield limit, limit - used + cache


def _places(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the groups, with the names of a limit, of what is used, and of the page cache in `memory.stat`."""
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = (root / CGROUPS / "memory", first) if controllers else (root / CGROUPS, second)
        group = PurePosixPath("/") / path
        for each in (group, *group.parents):
            yield mount / each.relative_to("/"), names


def _lines(path: Path) -> list[str]:
    """None where the system has no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    """The first number after each name."""
    fields = (line.split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in fields if len(words) > 1 and words[1].isdecimal()}


def _number(path: Path) -> int | None:
    """None where there is no number, such as "max" for no limit."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None
