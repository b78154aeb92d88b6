"""Where an export goes: a local folder or an object-storage URL, as pyarrow's file systems have it.

A local folder gets its name when all files in it are complete. In object storage a file is there once it is complete;
what an export that failed had written is deleted. Its files have the job's name there, so that of two exports to one
target at the same time at most one succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from cluster.errors import Conflict, Invalid, Unavailable
from cluster.object_store import path_of_url

COPIED_BYTES = 8 * 1024 * 1024  # of a file at a time


@dataclass(frozen=True)
class ExportTarget:
    """`url` as it was given; `job_id` is part of the name of what is not complete yet."""

    url: str
    job_id: str

    def check_empty(self) -> None:
        """Invalid where it is no place for files; Conflict where it holds some: a rerun would mix old and new parts."""
        filesystem, folder = resolve(self.url)
        try:
            info = filesystem.get_file_info(folder)
            if info.type == fs.FileType.File:
                raise Invalid.at("target", f"{self.url!r} is a file; name a folder")
            held = [] if info.type == fs.FileType.NotFound else filesystem.get_file_info(fs.FileSelector(folder))
        except OSError as error:
            raise Invalid.at("target", f"{self.url!r} cannot be listed: {error}") from error
        if held:
            raise Conflict(f"target {self.url!r} is not empty: it has {held[0].base_name!r}; name another, or empty it")

    def begin(self) -> None:
        """Make the folder that parts are put into, anew where an earlier attempt of this job has left one."""
        filesystem, folder = resolve(self.url)
        begun = self._folder(filesystem, folder)
        try:
            if begun != folder and filesystem.get_file_info(begun).type != fs.FileType.NotFound:
                filesystem.delete_dir(begun)
            filesystem.create_dir(begun, recursive=True)
        except OSError as error:
            raise Invalid.at("target", f"{self.url!r} cannot be written to: {error}") from error

    def put(self, path: Path, name: str) -> None:
        """Copy a complete local file to it. Unavailable where that fails."""
        filesystem, folder = resolve(self.url)
        try:
            key = f"{self._folder(filesystem, folder)}/{self._name(filesystem, name)}"
            with path.open("rb") as file, filesystem.open_output_stream(key) as sink:
                while piece := file.read(COPIED_BYTES):
                    sink.write(piece)
        except OSError as error:
            raise Unavailable(f"target: {name} cannot be written to {self.url!r}: {error}") from error

    def finish(self, sizes: Mapping[str, int]) -> None:
        """Every part (name -> bytes) is there: give the folder its name. Unavailable where one is not; Conflict where
        others wrote to the target as well."""
        filesystem, folder = resolve(self.url)
        begun = self._folder(filesystem, folder)
        ours = {self._name(filesystem, name): size for name, size in sizes.items()}
        try:
            found = {info.base_name: info.size for info in filesystem.get_file_info(fs.FileSelector(begun))}
            if others := sorted(found.keys() - ours.keys()):
                raise Conflict(f"target {self.url!r} was written to by others: {others[0]}; name another")
            if missing := sorted(name for name, size in ours.items() if found.get(name) != size):
                raise Unavailable(
                    f"target {self.url!r} lacks {len(missing)} of {len(ours)} files, {missing[0]} among them: a local "
                    "folder must be one that all nodes share; take that, or an object-storage URL"
                )
            if begun != folder:
                filesystem.move(begun, folder)
        except OSError as error:
            raise Conflict(f"target {self.url!r} was written to by others: {error}") from error

    def discard(self, names: list[str]) -> None:
        """Delete what was written. Unavailable where that fails."""
        filesystem, folder = resolve(self.url)
        begun = self._folder(filesystem, folder)
        try:
            if begun != folder:
                filesystem.delete_dir(begun)
                return
            ours = {self._name(filesystem, name) for name in names}
            for info in filesystem.get_file_info(fs.FileSelector(begun, allow_not_found=True)):
                if info.base_name in ours:
                    filesystem.delete_file(info.path)
        except OSError as error:
            raise Unavailable(f"target: files are left behind in {begun!r}: {error}") from error

    def _name(self, filesystem: Any, name: str) -> str:
        return name if isinstance(filesystem, fs.LocalFileSystem) else f"{self.job_id}-{name}"

    def _folder(self, filesystem: Any, folder: str) -> str:
        """Where parts are put: where a folder can be renamed, beside the target."""
        return f"{folder}.{self.job_id}.unfinished" if isinstance(filesystem, fs.LocalFileSystem) else folder


def resolve(url: str) -> tuple[Any, str]:
    """pyarrow's file system of a URL, and the path in it."""
    try:
        if urlsplit(url).scheme in ("", "file"):
            return fs.LocalFileSystem(), str(path_of_url(url))
        filesystem, path = fs.FileSystem.from_uri(url)
    except Invalid as error:
        raise Invalid.at("target", error.errors[0].message) from error
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise Invalid.at("target", f"{url!r} cannot be opened: {error}") from error
    return filesystem, path.rstrip("/")
