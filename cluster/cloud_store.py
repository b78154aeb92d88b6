"""S3, Google Cloud Storage and Azure through obstore."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from cluster.errors import NotFound, Unavailable
from cluster.object_store import ObjectInfo, Seen, check_key, unseen

DOWNLOAD_CHUNK_BYTES = 1024 * 1024
RANGE_BYTES = 4 * 1024 * 1024  # of a large object that are asked for at once; what is in flight lies in memory ...
RANGES_AT_ONCE = 4  # ... for each download: one connection to a cloud store gives less than the network does
STREAMED_BYTES_MAX = RANGES_AT_ONCE * RANGE_BYTES  # an object of up to so many comes over one connection
CONNECT_TIMEOUT_S = 3.0
STALL_TIMEOUT_S = 30.0  # of silence within a request; it does not bound a long transfer
TRANSFER_TIMEOUT_S = 3_600.0  # one request with its body; obstore's own 30 s cuts large segments into many retries
RETRIES_MAX = 4
BACKOFF_MAX_S = 1.0
RETRY_WINDOW_S = 180.0  # from the start of a request; a download that breaks within it goes on where it broke


class CloudStore:
    """An object store in a bucket, under the URL's path as prefix."""

    def __init__(self, url: str) -> None:
        self._url = url
        options: dict[str, Any] = {"client_options": _client_options(), "retry_config": _retry_config()}
        if urlsplit(url).scheme == "s3":
            options["conditional_put"] = "etag"
        with self._errors(url):
            self._store = from_url(url, **options)

    def get(self, key: str) -> bytes:
        with self._errors(key):
            return bytes(obstore.get(self._store, check_key(key)).bytes())

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            obstore.put(self._store, check_key(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._errors(key):
            try:
                obstore.put(self._store, check_key(key), data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key), path.open("rb") as source:
            obstore.put(self._store, check_key(key), source)

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        with self._errors(key):
            pieces = self._pieces(check_key(key))
            with path.open("wb") as target:
                for piece in pieces:
                    view = memoryview(piece)
                    seen(view)
                    target.write(view)

    def _pieces(self, key: str) -> Iterable[Any]:
        """The bytes of an object in order: as they come, or of a large one in ranges, several of them under way.

        A large object must not be written again meanwhile; who cannot be sure of that compares checksums.
        """
        found = obstore.get(self._store, key)
        size_bytes = found.meta["size"]
        if size_bytes <= STREAMED_BYTES_MAX:
            pieces: Iterable[Any] = found.stream(min_chunk_size=DOWNLOAD_CHUNK_BYTES)
            return pieces

        def fetch(start: int) -> Any:
            return obstore.get_range(self._store, key, start=start, end=min(start + RANGE_BYTES, size_bytes))

        return _in_order(fetch, range(0, size_bytes, RANGE_BYTES), RANGES_AT_ONCE)

    def local_path(self, key: str) -> Path | None:
        return None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        found = []
        with self._errors(prefix):
            for batch in obstore.list(self._store, prefix=prefix):
                found += [ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in batch]
        yield from sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
        return sorted(folder.rstrip("/").rsplit("/", 1)[-1] for folder in found)

    def delete(self, key: str) -> None:
        with self._errors(key):
            try:
                obstore.delete(self._store, check_key(key))
            except (FileNotFoundError, NotFoundError):
                return

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn obstore's errors into ours; the message names the object and the store."""
        try:
            yield
        except (FileNotFoundError, NotFoundError):
            raise NotFound(f"no object {what}") from None
        except (BaseError, OSError) as error:
            raise Unavailable(f"{self._url}: {what}: {str(error).partition(chr(10))[0]}") from error


def _in_order(fetch: Callable[[int], Any], items: Iterable[int], at_once: int) -> Iterator[Any]:
    """`fetch` of each item, in order, `at_once` of them under way or waiting to be taken."""
    left = iter(items)
    with ThreadPoolExecutor(at_once, "ranges") as pool:
        coming = deque(pool.submit(fetch, item) for item in islice(left, at_once))
        while coming:
            yield coming.popleft().result()
            coming.extend(pool.submit(fetch, item) for item in islice(left, 1))


def _client_options() -> dict[str, Any]:
    return {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=STALL_TIMEOUT_S),
        "timeout": timedelta(seconds=TRANSFER_TIMEOUT_S),
    }


def _retry_config() -> dict[str, Any]:
    """Bounded retries: a dead endpoint is Unavailable within seconds, not minutes."""
    return {
        "max_retries": RETRIES_MAX,
        "backoff": {"max_backoff": timedelta(seconds=BACKOFF_MAX_S)},
        "retry_timeout": timedelta(seconds=RETRY_WINDOW_S),
    }
