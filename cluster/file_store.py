"""Objects as files under one folder, durable: written aside, fsynced, linked to their name, folder fsynced."""

from __future__ import annotations

import io
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.errors import NotFound, Unavailable
from cluster.object_store import ObjectInfo, Seen, check_key, unseen

ASIDE = ".aside"  # files being written; a crash leaves only garbage here
ASIDE_ABANDONED_S = 24 * 3600.0
COPY_CHUNK_BYTES = 1024 * 1024  # two of them are in memory
DOWNLOAD_CHUNK_BYTES = 1024 * 1024  # stays in a core's cache while it is hashed
NAME_ATTEMPTS = 20  # to name a file in a folder that concurrent deletes keep removing


class FileStore:
    """An object store on a local (or mounted) file system with hard links and atomic rename."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable_folders: dict[Path, int] = {}  # -> inode; their entries were fsynced by this process
        try:
            (root / ASIDE).mkdir(parents=True, exist_ok=True)
            _sync_folder(root)
            _sync_folder(root.parent)
            self._sweep_aside()
        except OSError as error:
            raise Unavailable(f"the data folder {root} cannot be used: {error}") from error

    def _sweep_aside(self) -> None:
        """Delete what writers that were killed left behind."""
        for path in (self._root / ASIDE).iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - ASIDE_ABANDONED_S:
                    path.unlink()

    def get(self, key: str) -> bytes:
        with _errors(key), _not_found(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with _errors(key):
            self._publish(self._write_aside(io.BytesIO(data)), self._path(key), overwrite=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with _errors(key):
            return self._publish(self._write_aside(io.BytesIO(data)), self._path(key), overwrite=False)

    def upload(self, path: Path, key: str) -> None:
        with _errors(key), path.open("rb") as source:
            self._publish(self._write_aside(source), self._path(key), overwrite=True)

    def download(self, key: str, path: Path, seen: Seen = unseen) -> None:
        buffer = memoryview(bytearray(DOWNLOAD_CHUNK_BYTES))
        with (
            _errors(key),
            _not_found(key),
            self._path(key).open("rb", buffering=0) as source,
            path.open("wb") as target,
        ):
            while read := source.readinto(buffer):
                seen(buffer[:read])
                target.write(buffer[:read])

    def local_path(self, key: str) -> Path | None:
        path = self._path(key)
        return path if path.is_file() else None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        with _errors(prefix):
            names = (Path(base) / name for base, files in _walk(self._root / prefix) for name in files)
            keys = sorted(path.relative_to(self._root).as_posix() for path in names)
        for key in keys:
            if key.startswith(ASIDE + "/"):
                continue
            try:
                stat = (self._root / key).stat()
            except FileNotFoundError:  # deleted while listing
                continue
            yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    def folders(self, prefix: str) -> list[str]:
        with _errors(prefix):
            try:
                entries = list((self._root / prefix).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(entry.name for entry in entries if entry.name != ASIDE and _holds_files(entry))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _errors(key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
        self._remove_empty_folders(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _write_aside(self, source: BinaryIO) -> Path:
        aside = self._root / ASIDE / uuid.uuid4().hex
        try:
            with aside.open("xb") as file:
                shutil.copyfileobj(source, file, COPY_CHUNK_BYTES)
                _sync_file(file)
        except OSError:
            aside.unlink(missing_ok=True)  # a full disk is not filled further by retries
            raise
        return aside

    def _publish(self, aside: Path, path: Path, *, overwrite: bool) -> bool:
        """Give the finished file its name; False if it exists and must not be overwritten."""
        try:
            named = self._name(aside, path, overwrite=overwrite)
        finally:
            aside.unlink(missing_ok=True)
        if named:
            with suppress(FileNotFoundError):  # deleted again meanwhile, and the folder with it
                _sync_folder(path.parent)
        return named

    def _name(self, aside: Path, path: Path, *, overwrite: bool) -> bool:
        for _ in range(NAME_ATTEMPTS):
            with suppress(FileNotFoundError):  # a concurrent delete removed the folder while it was empty
                self._make_folders(path.parent)
                return _replace(aside, path) if overwrite else _link(aside, path)
        raise Unavailable(f"{path}: its folder was removed {NAME_ATTEMPTS} times by concurrent deletes")

    def _make_folders(self, folder: Path) -> None:
        """mkdir -p whose directory entries are durable, also where another process has just made the folder."""
        chain = [folder, *folder.parents]
        below_root = chain[: chain.index(self._root)]
        for each in reversed(below_root):
            _make_folder(each)
            inode = each.stat().st_ino
            if self._durable_folders.get(each) != inode:
                _sync_folder(each.parent)
                self._durable_folders[each] = inode

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder not in (self._root, self._root / ASIDE):
            try:
                folder.rmdir()
                self._durable_folders.pop(folder, None)
            except OSError:  # not empty, or gone: someone else's business
                return
            folder = folder.parent


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # a file of that name; or a folder that was deleted before it was looked at: try again
        if folder.is_file():
            raise
        raise FileNotFoundError(folder) from None


def _replace(aside: Path, path: Path) -> bool:
    os.replace(aside, path)
    return True


def _link(aside: Path, path: Path) -> bool:
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    return True


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) for every folder below; unlike `os.walk`, a folder that cannot be read is an error."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # none, or deleted meanwhile
            raise error

    for base, _, files in os.walk(folder, onerror=refuse):
        yield base, files


def _holds_files(folder: Path) -> bool:
    return any(files for _, files in _walk(folder))


@contextmanager
def _not_found(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise NotFound(f"no object {key}") from None


@contextmanager
def _errors(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{key}: the file system refused: {error}") from error


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
