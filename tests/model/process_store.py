"""The object store as one process has it, which may be killed at any call, and which now and then fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from cluster.errors import Unavailable
from cluster.object_store import ObjectInfo, ObjectStore, Seen, unseen


class ProcessStore:
    """After `die`, or after the call that `die_at` names, every call fails.

    `failing` of a million calls fail, half of them after they took effect. Which ones depends on the seed, the key and
    how often that was asked for, not on what other threads do.
    """

    def __init__(self, inner: ObjectStore, failing: int = 0, seed: int = 0) -> None:
        self._inner = inner
        self._failing = failing
        self._seed = seed
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._left: int | None = None
        self._after_effect = False
        self.dead = False
        self.before_manifest: Callable[[], None] | None = None  # called once, before a manifest is put

    def die(self) -> None:
        self.dead = True

    def die_at(self, call: int, after_effect: bool) -> None:
        """Be killed at the `call`-th call from now (from 1), before or after it took effect."""
        self._left, self._after_effect = call, after_effect

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        meanwhile = self.before_manifest
        if meanwhile is not None and "/manifest/" in key:
            self.before_manifest = None
            meanwhile()
        return self._call("put_if_absent", key, data)

    def upload(self, path: Path, key: str) -> None:
        self._call("upload", path, key)

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        self._call("download", key, path, seen)

    def local_path(self, key: str) -> Path | None:
        return self._inner.local_path(key)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._call("objects", prefix)

    def folders(self, prefix: str) -> list[str]:
        return self._call("folders", prefix)

    def delete(self, key: str) -> None:
        self._call("delete", key)

    def _call(self, method: str, *args: Any) -> Any:
        before, after = self._fate(f"{method} {args[-1] if method == 'upload' else args[0]}")
        if before:
            raise Unavailable(f"{method} {args[0]}: the store failed")
        answer = getattr(self._inner, method)(*args)
        if after:
            raise Unavailable(f"{method} {args[0]}: the store's answer was lost")
        return answer

    def _fate(self, call: str) -> tuple[bool, bool]:
        """Whether the call fails before, and after it took effect."""
        with self._lock:
            if self.dead:
                return True, True
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self.dead = True
                    return not self._after_effect, True
            if not self._failing:
                return False, False
            self._asked[call] += 1
            lot = xxhash.xxh3_64_intdigest(f"{self._seed} {call} {self._asked[call]}".encode()) % 1_000_000
            return lot < self._failing // 2, lot < self._failing
