"""Leaves a coordinator's samples of recent queries in object storage, where imports find them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from actors.coordinator import Coordinator
from cluster.errors import EaglerayError
from cluster.object_store import ObjectStore
from cluster.recent_queries import delete_queries, store_queries

PERIOD_S = 60.0
logger = logging.getLogger(__name__)


class QuerySamples:
    """The samples of one endpoint process, `name`. With `recent_queries` 0, what was left before is deleted."""

    def __init__(self, coordinator: Coordinator, store: ObjectStore, name: str, recent_queries: int) -> None:
        self._coordinator = coordinator
        self._store = store
        self._name = name
        self._recent_queries = recent_queries
        self._erased: set[str] = set()

    async def leave_for_ever(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.leave()

    async def leave(self) -> None:
        """Store the samples that changed, beside the event loop. What fails is logged, and tried again next time."""
        for collection in self._coordinator.recent.changed():
            await self._store_sample(collection)
        if not self._recent_queries and self._coordinator.table is not None:
            for collection in self._coordinator.table.collections.keys() - self._erased:
                if await self._logged(collection, lambda name: delete_queries(self._store, name)):
                    self._erased.add(collection)

    async def _store_sample(self, collection: str) -> None:
        recent = self._coordinator.recent
        sample = recent.sample(collection)
        if sample is None:  # deleted meanwhile
            return
        written = await self._logged(collection, lambda name: store_queries(self._store, name, self._name, sample))
        if written and not recent.stored(collection, sample):  # the collection was deleted meanwhile
            await self._logged(collection, lambda name: delete_queries(self._store, name))

    async def _logged(self, collection: str, work: Callable[[str], None]) -> bool:
        """Whether it succeeded."""
        try:
            await asyncio.to_thread(work, collection)
        except EaglerayError as error:
            logger.warning("the sample of recent queries of %r: %s", collection, error)
        except Exception:  # the task must go on with the other collections, and next time
            logger.exception("the sample of recent queries of %r", collection)
        else:
            return True
        return False
