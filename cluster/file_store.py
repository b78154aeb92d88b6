"""Objects as files under one folder, durable: written aside, fsynced, linked to their name, folder fsynced."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cluster.errors import NotFound, Unavailable
from cluster.object_store import ObjectInfo, check_key

ASIDE = ".aside"  # files being written; a crash leaves only garbage here
COPY_CHUNK_BYTES = 8 * 1024 * 1024


class FileStore:
    """An object store on a local (or mounted) file system with hard links and atomic rename."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            (root / ASIDE).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"the data folder {root} cannot be used: {error}") from error

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"no object {key}") from None

    def put(self, key: str, data: bytes) -> None:
        with _errors(key):
            self._publish(self._write_aside(data), self._path(key), overwrite=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with _errors(key):
            return self._publish(self._write_aside(data), self._path(key), overwrite=False)

    def upload(self, path: Path, key: str) -> None:
        with _errors(key):
            aside = self._aside_path()
            with path.open("rb") as source, aside.open("xb") as target:
                shutil.copyfileobj(source, target, COPY_CHUNK_BYTES)
                _sync_file(target)
            self._publish(aside, self._path(key), overwrite=True)

    def download(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"no object {key}") from None

    def local_path(self, key: str) -> Path | None:
        path = self._path(key)
        return path if path.is_file() else None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._root / prefix
        names = (Path(base) / name for base, _, files in os.walk(folder) for name in files)
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
        try:
            entries = list((self._root / prefix).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.name for entry in entries if entry.name != ASIDE and entry.is_dir())

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        self._remove_empty_folders(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _aside_path(self) -> Path:
        return self._root / ASIDE / uuid.uuid4().hex

    def _write_aside(self, data: bytes) -> Path:
        aside = self._aside_path()
        with aside.open("xb") as file:
            file.write(data)
            _sync_file(file)
        return aside

    def _publish(self, aside: Path, path: Path, *, overwrite: bool) -> bool:
        """Give the finished file its name; False if it exists and must not be overwritten."""
        try:
            self._name(aside, path, overwrite=overwrite)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def _name(self, aside: Path, path: Path, *, overwrite: bool) -> None:
        for attempts_left in (2, 1, 0):
            self._make_folders(path.parent)
            try:
                (os.replace if overwrite else os.link)(aside, path)
                return
            except FileNotFoundError:  # a concurrent delete removed the folder while it was empty
                if not attempts_left:
                    raise

    def _make_folders(self, folder: Path) -> None:
        """mkdir -p whose new directory entries are durable too."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder not in (self._root, self._root / ASIDE):
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone: someone else's business
                return
            folder = folder.parent


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
