"""What the routes of one endpoint process stand on."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from actors.coordinator import Coordinator
from actors.shard_client import Directory
from cluster.config import Limits
from cluster.manifest import ManifestLog
from cluster.object_store import ObjectStore
from serve.gpu_checks import CountGpus
from serve.job_service import JobService
from serve.metrics import EndpointMetrics


class MetricsExchange(Protocol):
    """Where coordinators leave their counts for each other."""

    async def exchange_metrics(self, coordinator: str, samples: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Services:
    """What the routes need; made once per endpoint process."""

    coordinator: Coordinator
    directory: Directory
    store: ObjectStore
    jobs: JobService
    metrics: EndpointMetrics
    exchange: MetricsExchange
    limits: Limits
    name: str
    gpus: CountGpus

    def log(self, collection: str) -> ManifestLog:
        return ManifestLog(self.store, collection, lambda: uuid.uuid4().hex)

    def known(self, collection: str) -> bool:
        """Whether there is such a collection, served or not."""
        table = self.coordinator.table
        return table is not None and (collection in table.collections or collection in table.unready)
