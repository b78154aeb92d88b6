"""Prometheus metrics of the endpoint: counted per coordinator, told for the whole cluster by whichever answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.advice import REASON_KINDS
from cluster.placement import share_in_full

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OPERATIONS = {
    "upserted": "Points whose upsert was acknowledged.",
    "deleted": "Points whose delete was acknowledged, as far as they existed.",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EndpointMetrics:
    """What one coordinator counts (`coordinator.CoordinatorObserver`).

    The counters of a search are kept by what it is counted as: to find them by their labels takes longer than to count.
    """

    def __init__(self) -> None:
        self._of_search: dict[tuple[str, str], tuple[Counter, Counter, Histogram]] = {}
        self._of_batch: dict[tuple[str, int], Histogram] = {}
        self._registry = CollectorRegistry()
        self._queries = Counter(
            "eagleray_queries", "Search requests by outcome.", ("collection", "outcome"), registry=self._registry
        )
        self._vectors = Counter(
            "eagleray_query_vectors", "Query vectors searched.", ("collection",), registry=self._registry
        )
        self._degraded = Counter(
            "eagleray_degraded_searches",
            "Search requests that the CPU answered, in part at least, where a GPU should have.",
            ("collection",),
            registry=self._registry,
        )
        self._latency = Histogram(
            "eagleray_search_latency_seconds",
            "Time from the first byte of a search request to its merged answer.",
            ("collection",),
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._batches = Histogram(
            "eagleray_batch_vectors",
            "Vectors in one call to a shard.",
            ("collection", "shard"),
            buckets=BATCH_BUCKETS,
            registry=self._registry,
        )
        self._writes = Counter(
            "eagleray_writes",
            "Upsert and delete requests by outcome.",
            ("collection", "operation", "outcome"),
            registry=self._registry,
        )
        self._points = {
            operation: Counter(f"eagleray_points_{operation}", what, ("collection",), registry=self._registry)
            for operation, what in OPERATIONS.items()
        }
        self._write_latency = Histogram(
            "eagleray_write_latency_seconds",
            "Time from the first byte of an upsert or delete request to its acknowledgement.",
            ("collection", "operation"),
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )

    def batch(self, collection: str, shard: int, vectors: int) -> None:
        sizes = self._of_batch.get((collection, shard))
        if sizes is None:
            sizes = self._of_batch[collection, shard] = self._batches.labels(collection, str(shard))
        sizes.observe(vectors)

    def search(self, collection: str, outcome: str, vectors: int, seconds: float) -> None:
        counted = self._of_search.get((collection, outcome))
        if counted is None:
            counted = self._of_search[collection, outcome] = (
                self._queries.labels(collection, outcome),
                self._vectors.labels(collection),
                self._latency.labels(collection),
            )
        queries, searched, latency = counted
        queries.inc()
        searched.inc(vectors)
        latency.observe(seconds)

    def degraded(self, collection: str) -> None:
        """A search whose answer says that it is degraded."""
        self._degraded.labels(collection).inc()

    def write(self, collection: str, operation: str, outcome: str, points: int, seconds: float) -> None:
        """`operation` is one of `OPERATIONS`; `points` were acknowledged."""
        self._writes.labels(collection, operation, outcome).inc()
        self._points[operation].labels(collection).inc(points)
        self._write_latency.labels(collection, operation).observe(seconds)

    def snapshot(self) -> list[Metric]:
        """Everything counted so far, as plain data that travels."""
        return list(self._registry.collect())


class _Families:
    """A registry of metrics that were collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def render(snapshots: dict[str, list[Metric]], descriptions: list[dict[str, Any]]) -> bytes:
    """Prometheus text: every coordinator's counts under its label, and the shards' gauges."""
    families = [
        *_merged(snapshots),
        *_gauges(descriptions),
        *_write_gauges(descriptions),
        _advice_gauge(descriptions),
        *_observed_gauges(descriptions),
        *_gpu_gauges(descriptions),
    ]
    return generate_latest(_Families(families))


def _merged(snapshots: dict[str, list[Metric]]) -> list[Metric]:
    merged: dict[str, Metric] = {}
    for coordinator, families in sorted(snapshots.items()):
        for family in families:
            target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            target.samples += [
                sample._replace(labels={**sample.labels, "coordinator": coordinator}) for sample in family.samples
            ]
    return list(merged.values())


def _gauges(descriptions: list[dict[str, Any]]) -> list[Metric]:
    """Points, index kind and bytes, and ready replicas of every shard."""
    points = GaugeMetricFamily("eagleray_points", "Points of a shard.", labels=("collection", "shard"))
    index = GaugeMetricFamily(
        "eagleray_index_bytes", "Bytes of a shard's indexes, by kind.", labels=("collection", "shard", "kind")
    )
    ready = GaugeMetricFamily(
        "eagleray_replicas_ready", "Replicas that passed their self-test.", labels=("collection", "shard")
    )
    for description in descriptions:
        for shard in description["shards"]:
            place = (description["name"], str(shard["shard"]))
            points.add_metric(place, shard["points"])
            ready.add_metric(place, sum(replica["state"] == "ready" for replica in shard["replicas"]))
            sizes: dict[str, int] = {}
            for segment in shard["segments"]:
                sizes[segment["index_kind"]] = sizes.get(segment["index_kind"], 0) + segment["index_bytes"]
            for kind, size in sizes.items():
                index.add_metric((*place, kind), size)
    return [points, index, ready]


def _write_gauges(descriptions: list[dict[str, Any]]) -> list[Metric]:
    """What the writes since the last segment left behind, and how far each replica is in the log."""
    place_labels = ("collection", "shard")
    tail = GaugeMetricFamily("eagleray_tail_points", "Live points of a shard in no segment yet.", labels=place_labels)
    dead = GaugeMetricFamily(
        "eagleray_tombstones", "Rows of a shard's segments that are deleted or replaced.", labels=place_labels
    )
    lsn = GaugeMetricFamily(
        "eagleray_lsn",
        "Last record of the shard's log that a replica has applied.",
        labels=(*place_labels, "replica", "device", "num_gpus"),
    )
    for description in descriptions:
        for shard in description["shards"]:
            place = (description["name"], str(shard["shard"]))
            tail.add_metric(place, shard["tail_points"])
            dead.add_metric(place, shard["tombstones"])
            for replica in shard["replicas"]:
                lsn.add_metric((*place, *_which(replica)), replica["lsn"])
    return [tail, dead, lsn]


def _advice_gauge(descriptions: list[dict[str, Any]]) -> Metric:
    """Of a collection that nobody can tell of there is no sample."""
    gauge = GaugeMetricFamily(
        "eagleray_rebuild_advised",
        "Whether a rebuild is advised for that reason.",
        labels=("collection", "reason_kind"),
    )
    for description in descriptions:
        for kind in REASON_KINDS if description["version"] else ():
            gauge.add_metric((description["name"], kind), float(kind in description["rebuild_reasons"]))
    return gauge


def _observed_gauges(descriptions: list[dict[str, Any]]) -> list[Metric]:
    """The recall that live queries had against exact answers, per replica and generation."""
    labels = ("collection", "shard", "replica", "device", "num_gpus", "generation")
    what = "recall@min(k, 10) of the sampled live queries"
    gauges = {
        "recall": GaugeMetricFamily("eagleray_observed_recall", f"Mean {what}.", labels=labels),
        "low": GaugeMetricFamily(
            "eagleray_observed_recall_low", f"Lower end of the 95% interval of the {what}.", labels=labels
        ),
        "high": GaugeMetricFamily(
            "eagleray_observed_recall_high", f"Upper end of the 95% interval of the {what}.", labels=labels
        ),
        "queries": GaugeMetricFamily(
            "eagleray_observed_queries", "Queries that the observed recall is the mean of.", labels=labels
        ),
    }
    for description in descriptions:
        for shard in description["shards"]:
            for observed in shard["observed"]:
                place = (description["name"], str(shard["shard"]), *_which(observed))
                for name, gauge in gauges.items():
                    gauge.add_metric((*place, str(observed["generation"])), observed[name])
    return list(gauges.values())


def _gpu_gauges(descriptions: list[dict[str, Any]]) -> list[Metric]:
    """What the indexes of each replica take of its GPU, beside what was predicted, and what goes wrong there."""
    labels = ("collection", "shard", "replica", "num_gpus")
    gauges = {
        "index_predicted_bytes": GaugeMetricFamily(
            "eagleray_gpu_index_predicted_bytes", "GPU memory that a replica's indexes should take.", labels=labels
        ),
        "index_measured_bytes": GaugeMetricFamily(
            "eagleray_gpu_index_measured_bytes",
            "GPU memory that a replica's indexes took as they were loaded; no sample where nobody can tell.",
            labels=labels,
        ),
        "out_of_memory": GaugeMetricFamily(
            "eagleray_gpu_out_of_memory_searches",
            "Searches of a replica's indexes that found no GPU memory, since they were loaded.",
            labels=labels,
        ),
    }
    degraded = GaugeMetricFamily(
        "eagleray_replica_degraded",
        "Whether the CPU answers for an index of the replica that its GPU should answer for.",
        labels=labels,
    )
    for name, shard, replica in _gpu_replicas(descriptions):
        number, _, share = _which(replica)
        place = (name, str(shard), number, share)
        degraded.add_metric(place, float(bool(replica["degraded"])))
        for fact, gauge in gauges.items():
            told = (replica["gpu"] or {}).get(fact)
            if told is not None:
                gauge.add_metric(place, told)
    return [*gauges.values(), degraded]


def _which(replica: dict[str, Any]) -> tuple[str, str, str]:
    """Number, device and share of a GPU: while one share takes over from another a number has a replica of each."""
    return str(replica["replica"]), replica["device"], share_in_full(replica["num_gpus"])


def _gpu_replicas(descriptions: list[dict[str, Any]]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(collection, shard, replica) of all that are to have a GPU."""
    for description in descriptions:
        for shard in description["shards"]:
            for replica in shard["replicas"]:
                if replica["device"] == "gpu":
                    yield description["name"], shard["shard"], replica
