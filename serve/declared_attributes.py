"""The attributes of collections as an endpoint knows them: the serving table's, and what was declared since."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from actors.shard_client import ServedCollection
from cluster.errors import Conflict
from cluster.manifest import Manifest, ManifestLog


class DeclaredAttributes:
    """Attributes by collection (name -> Arrow type). The next write need not wait for the table to know one."""

    def __init__(self, log: Callable[[str], ManifestLog]) -> None:
        self._log = log
        self._since: dict[str, Manifest] = {}  # newer than the table, as far as is known

    def known(self, collection: str, served: ServedCollection) -> Mapping[str, str]:
        since = self._since.get(collection)
        if since is None:
            return served.attributes
        if served.version >= since.version:
            del self._since[collection]
            return served.attributes
        return {**since.attributes, **served.attributes}

    async def declare(self, collection: str, new: Mapping[str, str], last_try: bool = False) -> bool:
        """Declare attributes durably. False where one of them has another type already, which is known from then on;
        Conflict on the last try."""
        log = self._log(collection)
        try:
            manifest = await asyncio.to_thread(log.declare_attributes, dict(new))
        except Conflict:
            if last_try:
                raise
            self._since[collection] = await asyncio.to_thread(log.newest_live)
            return False
        self._since[collection] = manifest
        return True
