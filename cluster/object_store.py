"""Object storage behind one protocol. `open_store` picks the class by URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from cluster.errors import Invalid


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its key, its size and its time of writing (seconds since the epoch)."""

    key: str
    size_bytes: int
    modified_s: float


Seen = Callable[[bytes | memoryview], object]  # called with pieces of an object


def unseen(piece: bytes | memoryview) -> None:
    """For who does not look at the pieces."""


class ObjectStore(Protocol):
    """Keys are `/`-separated names; values are bytes. Every method blocks and may be called from any thread.

    A `put` that returned is durable. `put_if_absent` is atomic: of many writers of one key exactly one gets
    True. Failures of the storage itself raise `Unavailable`.
    """

    def get(self, key: str) -> bytes:
        """The whole object; NotFound if there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; True when this call wrote it."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Write a local file of any size as an object, streaming."""
        ...

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        """Copy an object to a local file, streaming; NotFound if there is none.

        `seen` is given every piece, in order, so that who wants a checksum need not read the file again.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """A readable local path of an existing object, where the store has one; else None."""
        ...

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object under a prefix that ends in `/`, in key order."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """The names directly under a prefix that ends in `/` which have objects under them, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; no error when it is not there."""
        ...


def open_store(url: str) -> ObjectStore:
    """Open a storage URL: `file:///path` or a plain path, `memory://name`, `s3://`, `gs://`, `az://bucket/prefix`.

    Cloud credentials come from the provider's own environment variables, as obstore reads them.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        from cluster.file_store import FileStore

        return FileStore(path_of_url(url))
    if scheme == "memory":
        from cluster.memory_store import MemoryStore

        return MemoryStore.named(url)
    if scheme in ("s3", "gs", "az"):
        from cluster.cloud_store import CloudStore

        return CloudStore(url)
    raise Invalid.at("data", f"unknown storage scheme {scheme!r}; known: file, memory, s3, gs, az")


def path_of_url(url: str) -> Path:
    """The absolute local path of a `file:` URL or plain path."""
    parts = urlsplit(url)
    path = unquote(parts.path) if parts.scheme == "file" else url
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise Invalid.at("data", f"{url!r} names the host {parts.netloc!r}; write file:///absolute/path")
    return Path(path).expanduser().absolute()


def check_key(key: str) -> str:
    """Return `key`, or raise Invalid where it could leave the root."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts):
        raise Invalid.at("key", f"{key!r} is not a plain object key")
    return key
