"""HTTP routes of points: fetch, upsert, delete (`search_endpoint` has the search). Decode, call the coordinator,
encode."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response

from actors.shard_client import ServedCollection
from cluster.errors import Exhausted, Invalid, Unavailable
from cluster.ids import id_array
from serve.arrow_bodies import ARROW
from serve.arrow_writes import arrow_delete, arrow_upsert
from serve.attribute_columns import has_large_columns
from serve.declared_attributes import DeclaredAttributes
from serve.decoding import decode, decode_parameters
from serve.http_messages import (
    LARGE_BODY_BYTES,
    LARGE_NUMBERS,
    aside,
    content_type,
    json_response,
    read_body,
    read_json_body,
    refuse_parameters,
)
from serve.json_bodies import lsn_answer, points_of
from serve.search_bodies import (
    FetchBody,
    answer_numbers,
    check_answer,
    decode_naming_keys,
    read_min_lsn,
)
from serve.services import Services
from serve.write_bodies import CheckedWrite, DeleteBody, UpsertBody, WriteOptions, json_delete, json_upsert

FETCH_TIMEOUT_S = 10.0
LARGE_STREAM_BYTES = 64 * 1024  # of an upsert by Arrow: 1,000 columns take 110 KB of schema, and some 30 ms to check
Check = Callable[[ServedCollection, Mapping[str, str]], CheckedWrite]  # for a collection with these attributes
Decoded = tuple[Check, bool]  # and whether the check is large work


class PointRoutes:
    """The handlers."""

    def __init__(self, services: Services, attributes: DeclaredAttributes) -> None:
        self._services = services
        self._attributes = attributes

    def _counted(self, name: str) -> str:
        """The label of a collection: an unknown name would make a new time series for every typo."""
        return name if self._services.known(name) else ""

    async def fetch(self, request: Request) -> Response:
        name, limits = request.path_params["collection"], self._services.limits
        served = self._services.coordinator.served(name)
        body = decode_naming_keys(await read_json_body(request, limits.body_bytes), FetchBody)
        if not 1 <= len(body.ids) <= limits.ids_per_fetch:
            raise Invalid.at("ids", f"must hold 1 to {limits.ids_per_fetch} ids, not {len(body.ids)}")
        check_answer(len(body.ids), served.config, body.with_vectors, "ids", limits)
        min_lsn = read_min_lsn(body.min_lsn)
        ids = id_array(body.ids, served.config.id_type)
        attributes = self._attributes.known(name, served)
        columns = ("id", *(("vector",) if body.with_vectors else ()), *attributes)
        result = await self._services.coordinator.fetch(name, ids, columns, FETCH_TIMEOUT_S, min_lsn)
        missing = [value for value, here in zip(body.ids, result.found.tolist(), strict=True) if not here]
        large = answer_numbers(len(body.ids), served.config, body.with_vectors) > LARGE_NUMBERS

        def answer() -> Response:
            points = points_of(result.table, attributes)
            return json_response({"points": points, "missing": missing, "lsn": lsn_answer(result.lsn)})

        return await aside(large, answer)

    async def upsert(self, request: Request) -> Response:
        return await self._write(request, "upserted", self._decoded_upsert)

    async def delete(self, request: Request) -> Response:
        return await self._write(request, "deleted", self._decoded_delete)

    async def _write(
        self, request: Request, what: str, decoded: Callable[[Request, bytes], Awaitable[Decoded]]
    ) -> Response:
        """`what` is what the points are counted as; `decoded` gives a body's check."""
        name, services = request.path_params["collection"], self._services
        started = time.perf_counter()
        outcome, points = "error", 0
        try:
            served = services.coordinator.served(name)
            body = await read_body(request, services.limits.body_bytes)
            checked = await self._checked(name, served, *await decoded(request, body))
            result = await services.coordinator.write(name, checked.write, checked.timeout_s)
            outcome, points = "ok", result.count
        except (Unavailable, Exhausted) as error:
            outcome = type(error).__name__.lower()
            raise
        finally:
            services.metrics.write(self._counted(name), what, outcome, points, time.perf_counter() - started)
        return json_response({what: result.count, "lsn": lsn_answer(result.lsn)})

    async def _checked(self, name: str, served: ServedCollection, check: Check, large: bool) -> CheckedWrite:
        """The write of a body, its new attributes declared; Conflict where another write gave one another type."""
        checked = await aside(large, check, served, self._attributes.known(name, served))
        if not checked.new_attributes:
            return checked
        if not await self._declare(name, checked):
            # Another endpoint was first. What it declared is known now, and may do for these values just as well.
            checked = await aside(large, check, served, self._attributes.known(name, served))
            if checked.new_attributes:
                await self._declare(name, checked, last_try=True)
        await self._services.directory.refresh(name)
        return checked

    async def _declare(self, name: str, checked: CheckedWrite, last_try: bool = False) -> bool:
        """`DeclaredAttributes.declare` for a write that no shard will refuse for its size."""
        await self._services.coordinator.check_size(name, checked.write)
        return await self._attributes.declare(name, checked.new_attributes, last_try)

    async def _decoded_upsert(self, request: Request, body: bytes) -> Decoded:
        limits, large = self._services.limits, len(body) > LARGE_BODY_BYTES
        if content_type(request) == ARROW:
            options = decode_parameters(request.query_params.multi_items(), WriteOptions)
            large = len(body) > LARGE_STREAM_BYTES
            return lambda served, known: arrow_upsert(body, options, served.config, known, limits), large
        refuse_parameters(request)
        upsert = await aside(large, decode_naming_keys, body, UpsertBody)
        large = large or has_large_columns([point.attributes for point in upsert.points])
        return lambda served, known: json_upsert(upsert, served.config, known, limits), large

    async def _decoded_delete(self, request: Request, body: bytes) -> Decoded:
        limits, large = self._services.limits, len(body) > LARGE_BODY_BYTES
        if content_type(request) == ARROW:
            options = decode_parameters(request.query_params.multi_items(), WriteOptions)
            return lambda served, known: arrow_delete(body, options, served.config, limits), large
        refuse_parameters(request)
        ids = await aside(large, decode, body, DeleteBody)
        return lambda served, known: json_delete(ids, served.config, limits), large
