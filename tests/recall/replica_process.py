"""A process that starts a replica of one shard as Ray's would, and tells what it took. Run by `replica_start`.

    python -m tests.recall.replica_process '{"store": ..., "cache": ..., ...}'     # a `Request`; prints a `Started`

Only the standard library is imported before the clock runs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLLECTION, SMALL = "points", "few"
SEARCHES, BATCH, K = 1_000, 10, 10
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Request:
    """`began_s` is when the process was started (monotonic clock); `remote` copies files as from object storage.

    `queries` is a .npy file, of which the first `searches` are asked. With `memory` a small collection is loaded and
    searched first, so that what a process allocates once does not count, and no time is worth anything.
    """

    store: str
    cache: str
    queries: str
    began_s: float
    remote: bool = False
    memory: bool = False
    threads: int = 2
    searches: int = SEARCHES


@dataclass(frozen=True)
class Started:
    """Seconds from the start of the process, and of loading alone. Bytes: `read` by system calls while loading;
    `base`, `peak` and `steady` of the whole process, mapped files included; of the growth between base and steady
    what is anonymous, of the index file and of the rows file."""

    imported_s: float
    ready_s: float
    load_s: float
    read: int
    base: int
    peak: int
    steady: int
    anonymous: int
    index_file: int
    rows_file: int

    @property
    def resident(self) -> int:
        """What the prediction is of: the index and the ids."""
        return self.anonymous + self.index_file


def main(request: Request) -> Started:
    import actors.ray_replica  # noqa: F401  # all that a replica's process imports
    from actors.faiss_index import use_threads
    from actors.shard import Shard

    imported_s = time.monotonic() - request.began_s
    use_threads(request.threads)
    store = _store(request)
    if request.memory:
        _search(_loaded(Shard(store, SMALL, 0, Path(request.cache))), request)
    anonymous, base, read = _anonymous(), _status("VmRSS"), _bytes_read()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began_s = time.monotonic()
    shard = _loaded(Shard(store, COLLECTION, 0, Path(request.cache)))
    ready_s, read = time.monotonic(), _bytes_read() - read
    peak = _status("VmHWM")
    if request.memory:
        _search(shard, request)
    return Started(
        imported_s,
        ready_s - request.began_s,
        ready_s - began_s,
        read,
        base,
        peak,
        _status("VmRSS"),
        _anonymous() - anonymous,
        *_resident_of_files(shard, request),
    )


def _store(request: Request) -> Any:
    from cluster.file_store import FileStore

    class RemoteStore(FileStore):
        """Files that have no path here."""

        def local_path(self, key: str) -> None:
            return None

    return (RemoteStore if request.remote else FileStore)(Path(request.store))


def _loaded(shard: Any) -> Any:
    shard.load()
    return shard


def _search(shard: Any, request: Request) -> None:
    import numpy as np

    from cluster.query import SearchGroup, SearchParams, ShardSearch

    vectors = np.load(request.queries)[: request.searches]
    for start in range(0, len(vectors), BATCH):
        group = SearchGroup(0, BATCH, K, SearchParams())
        shard.search(ShardSearch(shard.newest().view.generation, vectors[start : start + BATCH], (group,)))


def _resident_of_files(shard: Any, request: Request) -> tuple[int, int]:
    """Mapped bytes of the index's and of the rows' file."""
    from actors.segment_loader import cached_path
    from cluster import paths
    from tests.recall.index_memory import mappings

    (segment,) = shard.newest().view.segments
    sizes = []
    for name in (paths.INDEX, paths.ROWS):
        key = paths.segment_file(COLLECTION, segment.description.segment_id, name)
        cached = cached_path(Path(request.cache), segment.description.files[name])
        path = cached if request.remote else Path(request.store) / key
        sizes.append(sum(mapping.resident for mapping in mappings(path)))
    return sizes[0], sizes[1]


def _anonymous() -> int:
    from tests.recall.index_memory import anonymous_bytes

    return anonymous_bytes()


def _status(name: str) -> int:
    """Bytes of a line of the process's status."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1_024


def _bytes_read() -> int:
    """By read calls, from files or the page cache; what is mapped does not count."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


if __name__ == "__main__":
    print(json.dumps(asdict(main(Request(**json.loads(sys.argv[1]))))))
