"""An object store in this process's memory, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from cluster.errors import NotFound
from cluster.object_store import ObjectInfo, Seen, check_key, unseen


class MemoryStore:
    """Objects in a dict; gone with the process."""

    _by_name: ClassVar[dict[str, MemoryStore]] = {}

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, url: str) -> MemoryStore:
        """The one store of this process with that URL."""
        return cls._by_name.setdefault(url, cls())

    def get(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)][0]
        except KeyError:
            raise NotFound(f"no object {key}") from None

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[check_key(key)] = (bytes(data), time.time())

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = (bytes(data), time.time())
            return True

    def upload(self, path: Path, key: str) -> None:
        self.put(key, path.read_bytes())

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        data = self.get(key)
        seen(data)
        path.write_bytes(data)

    def local_path(self, key: str) -> Path | None:
        return None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        for key, (data, modified_s) in sorted(self._objects.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(data), modified_s)

    def folders(self, prefix: str) -> list[str]:
        below = (key.removeprefix(prefix) for key in list(self._objects) if key.startswith(prefix))
        return sorted({rest.split("/", 1)[0] for rest in below if "/" in rest})

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)
