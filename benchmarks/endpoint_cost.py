"""What a search costs the endpoint process in Eagleray's own code, by part and format.

    python benchmarks/endpoint_cost.py [--dimension 784] [--rounds 40]

The coordinator answers at once, and there is no server: the ASGI application is called in this process, so that
uvicorn, Serve, shards and the network are left out. Parts and formats take turns, and medians of the thread's CPU time
are printed: on a busy machine compare the rows of one run, not of two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from actors.admission import Admission, Admissions
from actors.shard_client import ServedCollection
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig, Limits
from cluster.query import Coverage, Hits, Query, SearchResult
from cluster.routing import Routing
from cluster.vectors import vector_problem
from serve.arrow_bodies import ARROW
from serve.bench_queries import arrow_body
from serve.declared_attributes import DeclaredAttributes
from serve.hit_streams import write_result
from serve.ingress import UNWATCHED
from serve.json_bodies import search_answer
from serve.metrics import EndpointMetrics
from serve.search_bodies import SearchBody, SearchOptions, arrow_query, decode_naming_keys, json_query
from serve.search_endpoint import SearchEndpoint
from serve.services import Services
from serve.vector_streams import VectorStreams

CALLS_PER_ROUND = 200
PATH = "/v1/collections/points/points:search"
Work = Callable[[], Awaitable[Any]]


class AnswersAtOnce:
    """A coordinator without shards; with `full` it admits none."""

    def __init__(self, config: CollectionConfig, k: int, full: bool = False) -> None:
        self.table = self
        self.collections = {"points": self._served(config)}
        self.unready: dict[str, str] = {}
        self._admissions = Admissions(Limits(), lambda _: 60.0 if full else 0.0)
        ids = pa.array(np.arange(k, dtype=np.int64) * 1_000)
        hits = Hits(np.array([k]), ids, np.linspace(0.1, 2.3, k).astype(np.float32), None, 17)
        self._result = SearchResult(hits, Coverage(1.0, 1.0), 3, {0: 17})

    def _served(self, config: CollectionConfig) -> ServedCollection:
        return ServedCollection(config, Routing(config.shards), 3, 3, {0: 1}, {}, {})

    def served(self, collection: str) -> ServedCollection:
        return self.collections[collection]

    def admit(self, collection: str) -> Admission:
        return self._admissions.admit(collection)

    async def search(self, collection: str, query: Query) -> SearchResult:
        return self._result


class Requests:
    """One search by each way to ask for it, to an endpoint whose coordinator answers at once."""

    def __init__(self, dimension: int, k: int, full: bool = False) -> None:
        self.config, self.limits = CollectionConfig(dimension, "l2"), Limits()
        self.coordinator = AnswersAtOnce(self.config, k, full)
        services: Any = Services(
            self.coordinator, None, None, None, EndpointMetrics(), None, self.limits, "benchmark", ClusterGpus  # type: ignore[arg-type]
        )  # fmt: skip
        self.endpoint = SearchEndpoint(services, DeclaredAttributes(services.log))
        self.vector = np.random.default_rng(1).standard_normal((1, dimension)).astype(np.float32)
        self.arrow = arrow_body(self.vector)
        self.json = json.dumps({"vector": self.vector[0].tolist(), "k": k}).encode()

    def call(self, body: bytes, media_type: str, parameters: bytes = b"") -> Work:
        """A request as uvicorn passes it on, with the headers that HAProxy and Serve add."""
        kept = [
            (b"host", b"127.0.0.1:8000"),
            (b"content-length", str(len(body)).encode()),
            (b"content-type", media_type.encode()),
            (b"accept", media_type.encode()),
            (b"x-request-id", b"0a1b2c3d-0000-0000-0000-000000000000"),
            UNWATCHED,
        ]
        message = {"type": "http.request", "body": body, "more_body": False}

        async def receive() -> dict[str, Any]:
            return message

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] in (200, 429), message

        async def work() -> None:
            scope = {
                "type": "http", "method": "POST", "path": PATH, "root_path": "", "query_string": parameters,
                "headers": list(kept), "path_params": {"collection": "points"},
            }  # fmt: skip
            await self.endpoint(scope, receive, send)

        return work


def parts_of(requests: Requests) -> dict[str, Work]:
    """Each part of a request's work by itself."""
    config, limits, streams = requests.config, requests.limits, VectorStreams()
    body, result = decode_naming_keys(requests.json, SearchBody), requests.coordinator._result
    metrics = EndpointMetrics()
    return {
        "Arrow: read the stream": _at_once(lambda: streams.read(requests.arrow)),
        "Arrow: read a stream of unknown layout": _at_once(lambda: VectorStreams().read(requests.arrow)),
        "Arrow: check, make the query": _at_once(lambda: arrow_query(requests.vector, SearchOptions(), config, limits)),
        "Arrow: encode the answer": _at_once(lambda: write_result(result)),
        "JSON: decode the body": _at_once(lambda: decode_naming_keys(requests.json, SearchBody)),
        "JSON: check, make the query": _at_once(lambda: json_query(body, config, limits)),
        "JSON: encode the answer": _at_once(lambda: msgspec.json.encode(search_answer(result, 1.0))),
        "both: check the vector": _at_once(lambda: vector_problem(requests.vector, "l2")),
        "both: count": _at_once(lambda: metrics.search("points", "ok", 1, 0.004)),
    }


def _at_once(work: Callable[[], Any]) -> Work:
    async def run() -> None:
        work()

    return run


async def measure(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median microseconds of a call, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.thread_time()
            for _ in range(CALLS_PER_ROUND):
                await work()
            seconds[name].append((time.thread_time() - started) / CALLS_PER_ROUND)
    return {name: statistics.median(each) * 1e6 for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=784)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    requests = Requests(options.dimension, options.k)
    works = {
        "whole request, Arrow": requests.call(requests.arrow, ARROW, b"k=10"),
        "whole request, JSON": requests.call(requests.json, "application/json"),
        "whole request, not admitted": Requests(options.dimension, options.k, full=True).call(requests.arrow, ARROW),
        **parts_of(requests),
    }
    figures = asyncio.run(measure(works, options.rounds))
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}; one vector of {options.dimension} dimensions, k {options.k}")
    print(f"bodies: Arrow {len(requests.arrow)} bytes, JSON {len(requests.json)} bytes")
    for name, microseconds in figures.items():
        print(f"{microseconds:8.1f} us  {name}")
    print(f"JSON takes {figures['whole request, JSON'] / figures['whole request, Arrow']:.2f} times as long as Arrow")


if __name__ == "__main__":
    main()
