"""The Serve application: `serve run serve.app:build data=file:///var/lib/eagleray`, or serve-config.yaml."""

from __future__ import annotations

import logging
import os
from typing import Any

import msgspec
from ray import serve as ray_serve

from actors import ray_jobs, ray_runtime
from actors.coordinator import Coordinator
from cluster.config import Settings
from cluster.object_store import open_store
from serve.job_service import JobService
from serve.metrics import EndpointMetrics
from serve.process_tuning import tune_process
from serve.routes import Services, build_app

MAX_ONGOING_REQUESTS = 1_000  # per endpoint process; Serve's default of 5 would starve the batching
logger = logging.getLogger(__name__)


@ray_serve.ingress()
class _Endpoint:
    """One endpoint process: a coordinator behind HTTP. The first one starts the supervisor."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        _warn_without_haproxy()
        tune_process()
        supervisor = await ray_runtime.ensure_supervisor(settings)
        directory = ray_runtime.RayDirectory(supervisor, settings.namespace)
        store = open_store(settings.data)
        metrics = EndpointMetrics()
        self._services = Services(
            coordinator=Coordinator(directory, settings.limits, metrics),
            directory=directory,
            store=store,
            jobs=JobService(store, ray_jobs.job_server, settings.namespace),
            metrics=metrics,
            exchange=directory,
            limits=settings.limits,
            name=ray_serve.get_replica_context().replica_id.unique_id,
            gpus=ray_jobs.counted_gpus,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._services)


Endpoint = ray_serve.deployment(_Endpoint, name="Endpoint", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def build(args: dict[str, Any]) -> Any:
    """The application for `cluster.config.Settings` given as plain data, such as a Serve config file's `args`."""
    Settings.check_names(args)
    return application(msgspec.convert(args, Settings, strict=False))  # `serve run` gives every value as text


def application(settings: Settings, num_cpus: float = 1.0) -> Any:
    settings.check_shared()
    return Endpoint.options(ray_actor_options={"num_cpus": num_cpus}).bind(settings)


def _warn_without_haproxy() -> None:
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        logger.warning(
            "RAY_SERVE_ENABLE_HA_PROXY is not 1 on this node: requests pass Serve's Python proxy, at a tenth of the "
            "speed. Set it before `ray start` (ray-cluster.yaml shows how)"
        )
