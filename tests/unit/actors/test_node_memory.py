from __future__ import annotations

import sys
from pathlib import Path

import pytest

from actors.node_memory import READ_AGAIN_S, WatchedMemory, node_memory
from tests.fakes import ManualClock

GIB = 1024**3
MEMINFO = (
    f"MemTotal:       {16 * 1024**2} kB\nMemFree:  1 kB\nMemAvailable:   {8 * 1024**2} kB\nHugePages_Total:       0\n"
)


def system(root: Path, **files: str) -> Path:
    """A system of these files; `__` in a name stands for a slash."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(path: str, limit: str, used: int, cache: int = 0, version: int = 2) -> dict[str, str]:
    """The files of one control group."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        path = f"memory/{path}".rstrip("/")
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    stat = f"anon 1\n{names[2]} {cache}\n"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{used}\n", f"{folder}/memory.stat": stat}


def test_node_without_control_groups_has_what_meminfo_says(tmp_path: Path) -> None:
    assert node_memory(system(tmp_path)) == (8 * GIB, 16 * GIB)


def test_group_with_a_limit_bounds_both_and_its_page_cache_can_be_had(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/box\n"}
    files |= group("pod/box", str(4 * GIB), 3 * GIB, cache=GIB // 2) | group("pod", "max", 3 * GIB)
    assert node_memory(system(tmp_path, **files)) == (GIB + GIB // 2, 4 * GIB)


def test_limit_of_a_parent_group_counts_as_well(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/box\n"}
    files |= group("pod/box", str(6 * GIB), GIB) | group("pod", str(7 * GIB), 6 * GIB)
    assert node_memory(system(tmp_path, **files)) == (GIB, 6 * GIB)


def test_group_whose_path_is_not_there_is_the_one_that_is_mounted(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/0123\n"} | group("", str(2 * GIB), GIB)
    assert node_memory(system(tmp_path, **files)) == (GIB, 2 * GIB)


def test_group_of_the_first_version_is_that_of_its_memory_controller(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/pod\n0::/\n"}
    files |= group("pod", str(3 * GIB), 2 * GIB, GIB, version=1) | group("other", "1", 1, version=1)
    assert node_memory(system(tmp_path, **files)) == (2 * GIB, 3 * GIB)


def test_limit_larger_than_the_node_changes_nothing_and_overuse_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n"} | group("", str(2**63 - 4096), GIB)
    assert node_memory(system(tmp_path, **files)) == (8 * GIB, 16 * GIB)
    files |= group("", str(GIB), 2 * GIB)
    assert node_memory(system(tmp_path, **files)) == (0, GIB)


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\nMemTotal: 5 kB\n"])
def test_system_that_does_not_tell_is_unknown(text: str, tmp_path: Path) -> None:
    assert node_memory(system(tmp_path, proc__meminfo=text)) is None
    assert node_memory(tmp_path / "nothing") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_this_node_has_some_memory() -> None:
    told = node_memory()
    assert told is not None
    assert 0 <= told[0] <= told[1]
    assert told[1] > 100_000_000


def test_memory_is_read_again_only_after_a_while() -> None:
    clock, reads = ManualClock(), iter([(1, 10), None, (3, 10)])
    memory = WatchedMemory(clock, lambda: next(reads))
    assert [memory.told(), memory.told()] == [(1, 10), (1, 10)]
    clock.advance(READ_AGAIN_S)
    assert [memory.told(), memory.told()] == [None, None]
    clock.advance(READ_AGAIN_S)
    assert memory.told() == (3, 10)
