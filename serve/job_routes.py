"""Handlers of jobs, rollback and snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.config import check_collection_name
from cluster.errors import Conflict, Invalid, NotFound
from cluster.gpu_memory import GpuFacts
from cluster.manifest import Manifest
from cluster.rollback import roll_back
from cluster.snapshots import check_snapshot_name, delete_snapshot, list_snapshots, read_snapshot
from jobs.build_plan import held_gpus
from jobs.collect_garbage import CollectGarbageOptions
from serve.decoding import decode
from serve.descriptions import describe_collection
from serve.gpu_checks import gpus_for
from serve.http_messages import json_response, read_json_body
from serve.job_bodies import (
    BranchBody,
    CollectGarbageBody,
    CompactBody,
    ExportBody,
    ImportBody,
    JobBody,
    RebuildBody,
    RestoreBody,
    RollbackNowBody,
    check_create,
    check_rebuild,
    decode_job,
    decode_job_of_all,
)
from serve.services import Services

WaitUntilServed = Callable[[Manifest], Awaitable[None]]


class JobRoutes:
    """`wait_until_served` has the supervisor look at a commit, and returns when it is served or after a while."""

    def __init__(self, services: Services, wait_until_served: WaitUntilServed) -> None:
        self._services = services
        self._wait_until_served = wait_until_served

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def submit_job(self, request: Request) -> Response:
        name = check_collection_name(request.path_params["collection"])
        body = decode_job(await self._body(request))
        if isinstance(body, ImportBody):
            await self._check_import(name, body)
        else:
            await self._check(await self._services.directory.describe(name), body)
        return await self._submit(name, body)

    async def submit_job_of_all(self, request: Request) -> Response:
        body = decode_job_of_all(await self._body(request))
        _garbage_options("", body).check()
        return await self._submit("", body)

    async def _submit(self, name: str, body: JobBody) -> Response:
        return json_response({"job_id": await asyncio.to_thread(self._services.jobs.submit, name, body)}, 202)

    async def list_jobs(self, request: Request) -> Response:
        return json_response({"jobs": await asyncio.to_thread(self._services.jobs.recent)})

    async def get_job(self, request: Request) -> Response:
        return json_response(await asyncio.to_thread(self._services.jobs.status, request.path_params["job_id"]))

    async def stop_job(self, request: Request) -> Response:
        await asyncio.to_thread(self._services.jobs.stop, request.path_params["job_id"])
        return Response(status_code=204)

    async def _check_import(self, name: str, body: ImportBody) -> None:
        """`create` says what a new collection is like; of one that exists, what it is already."""
        count, known = self._services.gpus, self._services.known(name)
        if body.create is not None:
            create = body.create
            await asyncio.to_thread(check_create, create, lambda new: GpuFacts() if known else gpus_for(new, count))
        if known:
            facts = await self._services.directory.describe(name)
            manifest: Manifest = facts["manifest"]
            held = held_gpus(facts["statuses"])
            await asyncio.to_thread(gpus_for, manifest.config, count, held, manifest.num_gpus)
        elif body.create is None:
            raise NotFound(f"no collection {name!r}; give create to have the import make it")

    async def _check(self, facts: dict[str, Any], body: JobBody) -> None:
        """Refuse now what the job would refuse: Invalid, NotFound, Conflict. `facts`: as of `Directory.describe`."""
        manifest: Manifest = facts["manifest"]
        match body:
            case CompactBody(shard=int(shard)) if shard >= len(manifest.shards):
                shards = f"the shards 0 to {len(manifest.shards) - 1}"
                raise Invalid.at("shard", f"collection {manifest.collection!r} has {shards}")
            case RebuildBody():
                points = describe_collection(facts, None)["points"]  # those that are not in segments yet, too
                count, held, had = self._services.gpus, held_gpus(facts["statuses"]), manifest.num_gpus
                await asyncio.to_thread(
                    check_rebuild, body, manifest.config, points, lambda wanted: gpus_for(wanted, count, held, had)
                )
            case BranchBody(into=into) if into == manifest.collection or self._services.known(into):
                raise Conflict(f"collection {into!r} exists: delete it first, or take another name")
            case (
                RestoreBody(snapshot=str(snapshot))
                | BranchBody(snapshot=str(snapshot))
                | ExportBody(snapshot=str(snapshot))
            ):
                await asyncio.to_thread(read_snapshot, self._services.store, manifest.collection, snapshot)
            case CollectGarbageBody():
                _garbage_options(manifest.collection, body).check()

    # --- rollback -------------------------------------------------------------------------------------------------

    async def roll_back(self, request: Request) -> Response:
        """Answers when the earlier generation's points are served, under the number of a new generation."""
        name = check_collection_name(request.path_params["collection"])
        body = decode(await self._body(request), RollbackNowBody)
        services = self._services
        manifest = await asyncio.to_thread(roll_back, services.store, services.log(name), body.generation)
        await self._wait_until_served(manifest)
        served = services.coordinator.table.collections.get(name) if services.coordinator.table else None
        answer = {"generation": manifest.generation, "version": manifest.version}
        return json_response(answer | {"serving_generation": served.generation if served else None})

    # --- snapshots ------------------------------------------------------------------------------------------------

    async def list_snapshots(self, request: Request) -> Response:
        name = await self._known_name(request)
        found = await asyncio.to_thread(list_snapshots, self._services.store, name)
        return json_response({"snapshots": [asdict(snapshot) for snapshot in found]})

    async def delete_snapshot(self, request: Request) -> Response:
        name, snapshot = await self._known_name(request), request.path_params["name"]
        check_snapshot_name(snapshot)
        await asyncio.to_thread(delete_snapshot, self._services.store, name, snapshot)
        return Response(status_code=204)

    async def _known_name(self, request: Request) -> str:
        """NotFound where there is no such collection."""
        name = check_collection_name(request.path_params["collection"])
        await self._services.directory.describe(name)
        return name

    async def _body(self, request: Request) -> bytes:
        return await read_json_body(request, self._services.limits.body_bytes)


def _garbage_options(collection: str, body: CollectGarbageBody) -> CollectGarbageOptions:
    grace_s = CollectGarbageOptions.grace_s if body.grace_s is None else body.grace_s
    return CollectGarbageOptions(collection or None, body.delete, grace_s)
