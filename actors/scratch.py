"""A folder on this machine that belongs to this user alone: caches, and what runs here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cluster.errors import Conflict


def private_folder(name: str = "") -> Path:
    """`name` under a folder only this user can enter; made if need be. Conflict where another user sits on it."""
    folder = Path(tempfile.gettempdir()) / f"eagleray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise Conflict(f"{folder} must belong to this user alone; remove it, or set TMPDIR")
    return folder / name if name else folder
