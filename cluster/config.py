"""What a user configures: a collection, and the process-wide settings. Frozen data, checked once at the edge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from cluster.errors import FieldError, Invalid

Metric = Literal["cosine", "l2", "ip"]
IdType = Literal["int64", "string"]
VectorDtype = Literal["float32", "float16"]
IndexKindChoice = Literal["auto", "flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_rabitq", "cagra", "factory"]
Codes = Literal["float32", "float16", "sq8"]
RerankStore = Literal["none", "rows", "sq8", "float16", "float32"]
Device = Literal["auto", "cpu", "gpu"]
ServedOn = Literal["cpu", "gpu"]  # what "auto" comes to, for one generation
GpuFull = Literal["step_down", "refuse"]
ShardTransport = Literal["direct", "actor"]

COLLECTION_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
DIMENSION_MAX = 65_536
SHARDS_MAX = 1_024
REPLICAS_MAX = 16
FACTORY_CHARACTERS_MAX = 200


KIND_OPTIONS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "flat": ("codes",),
    "hnsw": ("m", "ef_construction", "codes", "rerank_store"),
    "ivf_flat": ("nlist", "codes", "rerank_store"),
    "ivf_sq8": ("nlist", "rerank_store"),
    "ivf_pq": ("nlist", "pq_m", "pq_bits", "rerank_store"),
    "ivf_rabitq": ("nlist", "rerank_store"),
    "cagra": ("graph_degree", "codes"),
    "factory": ("factory", "rerank_store"),
}
NUM_GPUS_MIN = 0.001  # Ray counts in ten-thousandths of a GPU
UNTRAINED_KINDS = ("flat", "cagra")  # whose codes are vectors as they come, of one precision or the other
ALWAYS_TOLD = ("kind", "target_recall", "device", "memory_bytes")
ALL_OPTIONS = tuple(dict.fromkeys(name for names in KIND_OPTIONS.values() for name in names))
OPTION_RANGES = {
    "m": (2, 128),
    "ef_construction": (4, 2_000),
    "nlist": (1, 1_048_576),
    "pq_m": (1, 65_536),
    "graph_degree": (8, 128),
}
OPTION_CHOICES: dict[str, tuple[object, ...]] = {
    "codes": get_args(Codes),
    "pq_bits": (4, 8),
    "rerank_store": get_args(RerankStore),
}


@dataclass(frozen=True)
class IndexConfig:
    """Which index the shards build.

    `kind="auto"` lets `cluster.index_policy.choose` decide. `target_recall` is recall@10 against exact search;
    1.0 asks for exact search. `memory_bytes` bounds the indexes of one shard, `build_seconds` the time to build one
    with the threads that a build has, two where nothing was measured (None: no bound). `churn` is the share of points
    that are expected to be deleted or replaced between two rebuilds.

    `device="auto"` takes GPUs where the cluster has free ones and they pay, when a generation is built; "gpu" asks for
    them. Each replica then asks Ray for `num_gpus`; None leaves that to each build (`cluster.gpu_share`). What does not
    fit its share of a GPU's memory steps down to a smaller index, and at last to the CPU, or is refused (`gpu_full`).
    `cpu_twin` has searches answered from the same index on host memory while the GPU cannot. `wait_for_gpu` accepts a
    collection before there are GPUs.

    The fields after these go with a named kind (`KIND_OPTIONS`); None lets the policy set them.
    """

    kind: IndexKindChoice = "auto"
    target_recall: float = 0.95
    device: Device = "auto"
    memory_bytes: int | None = None
    build_seconds: float | None = None
    churn: float = 0.0
    num_gpus: float | None = None
    cpu_twin: bool = True
    gpu_full: GpuFull = "step_down"
    wait_for_gpu: bool = False
    codes: Codes | None = None
    m: int | None = None
    ef_construction: int | None = None
    nlist: int | None = None
    pq_m: int | None = None
    pq_bits: int | None = None
    graph_degree: int | None = None
    rerank_store: RerankStore | None = None
    factory: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of the kind that were given, by name."""
        return {name: value for name in ALL_OPTIONS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class CollectionConfig:
    """A collection's fixed properties: one dimension, one metric, one id type."""

    dimension: int
    metric: Metric = "cosine"
    id_type: IdType = "int64"
    shards: int = 1
    replicas: int = 1
    vector_dtype: VectorDtype = "float32"
    index: IndexConfig = field(default_factory=IndexConfig)

    def __post_init__(self) -> None:
        errors = tuple(_config_errors(self))
        if errors:
            raise Invalid("; ".join(f"{e.field}: {e.message}" for e in errors), errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of the index only what was given beyond the first four fields."""
        defaults = asdict(IndexConfig())
        index = {k: v for k, v in asdict(self.index).items() if k in ALWAYS_TOLD or v != defaults[k]}
        return asdict(self) | {"index": index}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CollectionConfig:
        """Parse a decoded JSON object; unknown fields are Invalid."""
        _refuse_unknown(data, cls, "")
        index = data.get("index", {})
        if not isinstance(index, Mapping):
            raise Invalid.at("index", "must be an object")
        _refuse_unknown(index, IndexConfig, "index.")
        if "dimension" not in data:
            raise Invalid.at("dimension", "is required")
        return cls(**{**data, "index": IndexConfig(**index)})


def _refuse_unknown(data: Mapping[str, Any], cls: type, prefix: str) -> None:
    known = {f.name for f in fields(cls)}
    unknown = tuple(FieldError(prefix + name, "unknown field") for name in data if name not in known)
    if unknown:
        raise Invalid(f"unknown field {', '.join(e.field for e in unknown)}", unknown)


def _config_errors(config: CollectionConfig) -> list[FieldError]:
    errors = []

    def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            errors.append(FieldError(name, f"must be one of {', '.join(choices)}, not {value!r}"))

    def check_int(name: str, value: object, low: int, high: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            errors.append(FieldError(name, f"must be an integer from {low} to {high}, not {value!r}"))

    check_int("dimension", config.dimension, 1, DIMENSION_MAX)
    check_int("shards", config.shards, 1, SHARDS_MAX)
    check_int("replicas", config.replicas, 1, REPLICAS_MAX)
    check_choice("metric", config.metric, get_args(Metric))
    check_choice("id_type", config.id_type, get_args(IdType))
    check_choice("vector_dtype", config.vector_dtype, get_args(VectorDtype))
    index = config.index
    check_choice("index.kind", index.kind, get_args(IndexKindChoice))
    check_choice("index.device", index.device, get_args(Device))
    recall = index.target_recall
    if not isinstance(recall, int | float) or isinstance(recall, bool) or not 0.0 < recall <= 1.0:
        errors.append(FieldError("index.target_recall", f"must be over 0 and at most 1, not {recall!r}"))
    if index.memory_bytes is not None:
        check_int("index.memory_bytes", index.memory_bytes, 1, 2**63 - 1)
    if index.build_seconds is not None and not (_is_number(index.build_seconds) and index.build_seconds > 0):
        errors.append(FieldError("index.build_seconds", f"must be a number over 0, not {index.build_seconds!r}"))
    if not (_is_number(index.churn) and 0.0 <= index.churn <= 1.0):
        errors.append(FieldError("index.churn", f"must be a number from 0 to 1, not {index.churn!r}"))
    if index.num_gpus is not None and not (_is_number(index.num_gpus) and NUM_GPUS_MIN <= index.num_gpus <= 1.0):
        told = f"must be a number from {NUM_GPUS_MIN} to 1, not {index.num_gpus!r}"
        errors.append(FieldError("index.num_gpus", told))
    check_choice("index.gpu_full", index.gpu_full, get_args(GpuFull))
    for name in ("cpu_twin", "wait_for_gpu"):
        value = getattr(index, name)
        if not isinstance(value, bool):
            errors.append(FieldError(f"index.{name}", f"must be true or false, not {value!r}"))
    if index.kind in KIND_OPTIONS:
        errors += _option_errors(index)
    return errors


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _option_errors(index: IndexConfig) -> list[FieldError]:
    """Options of another kind, or out of range; the message says what would work."""
    errors = []
    for name, value in index.options.items():
        field_name = f"index.{name}"
        if name not in KIND_OPTIONS[index.kind]:
            kinds = ", ".join(kind for kind, names in KIND_OPTIONS.items() if name in names)
            errors.append(FieldError(field_name, f"does not go with kind {index.kind}; it goes with: {kinds}"))
        elif name in OPTION_RANGES:
            low, high = OPTION_RANGES[name]
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                errors.append(FieldError(field_name, f"must be an integer from {low} to {high}, not {value!r}"))
        elif name in OPTION_CHOICES and value not in OPTION_CHOICES[name]:
            choices = ", ".join(map(str, OPTION_CHOICES[name]))
            errors.append(FieldError(field_name, f"must be one of {choices}, not {value!r}"))
        elif value == "sq8" and name == "codes" and index.kind in UNTRAINED_KINDS:
            errors.append(FieldError(field_name, f"must be float32 or float16 with kind {index.kind}, not 'sq8'"))
        elif name == "factory" and (not isinstance(value, str) or not value or len(value) > FACTORY_CHARACTERS_MAX):
            errors.append(FieldError(field_name, f"must be text of 1 to {FACTORY_CHARACTERS_MAX} characters"))
    if index.kind == "factory" and index.factory is None:
        errors.append(FieldError("index.factory", "is required with kind factory, such as IVF1024,SQ8"))
    return errors


def check_collection_name(name: str) -> str:
    """Return `name`, or raise Invalid: lower-case letters, digits, `_` and `-`, at most 63 characters."""
    if not COLLECTION_NAME.fullmatch(name):
        raise Invalid.at("collection", f"{name!r} does not match {COLLECTION_NAME.pattern}")
    return name


@dataclass(frozen=True)
class Limits:
    """Every bound of the endpoint and the coordinator, by name (docs/http-api.md, "Limits").

    `answer_numbers` bounds the memory of an answer: a hit counts as 4 numbers, and its vector as its dimension.
    `recent_queries` is how many vectors of a collection's searches a coordinator keeps for its next import to tune
    on; 0 keeps none, and deletes what was kept. A call to a shard takes at most `batch_vectors` or `batch_bytes`, and
    those in flight to one replica about `batch_ms` of predicted time. An endpoint refuses searches while those of their
    collection are predicted to wait more than `queue_ms` for a shard, or `requests_in_flight` are in flight and their
    collection has its share of them. `attribute_bytes` is of one point. Writes that wait for a shard take
    at most `queued_write_bytes_per_shard`, those that share one WAL object `wal_object_bytes` (one that is larger goes
    alone).
    """

    body_bytes: int = 64 * 1024 * 1024
    vectors_per_search: int = 4_096
    k: int = 2_048
    answer_numbers: int = 4_194_304
    ids_per_fetch: int = 10_000
    timeout_ms: int = 60_000
    queued_vectors_per_shard: int = 65_536
    batch_vectors: int = 512
    batch_bytes: int = 4 * 1024 * 1024
    batch_ms: int = 25
    queue_ms: int = 500
    requests_in_flight: int = 320
    calls_in_flight_per_replica: int = 2
    recent_queries: int = 1_000
    points_per_upsert: int = 10_000
    ids_per_delete: int = 10_000
    attribute_bytes: int = 64 * 1024
    queued_write_bytes_per_shard: int = 128 * 1024 * 1024
    wal_object_bytes: int = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "recent_queries" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise Invalid.at(f"limits.{name}", f"must be an integer from {least} on, not {value!r}")


@dataclass(frozen=True)
class Upkeep:
    """When a shard seals its tail into a segment, when it merges segments, and when a rebuild is advised.

    The tail is sealed when it has `seal_points` points, `seal_bytes` of them or `seal_records` WAL records; at
    `tail_bytes_max` writes are refused until a seal is done. Segments are merged when there are more than
    `segments_max`; one is rebuilt when the share `tombstone_ratio` of its rows is deleted.

    What these do not repair is for a rebuild (`cluster.advice`). It is advised when a shard has more than
    `rebuild_growth` times the points that its largest index was trained on, when more than `rebuild_loose_share` of its
    rows are deleted, unsealed or in small segments, when the recall of live queries is below the target by more than
    `rebuild_recall_margin`, when the policy would choose another kind of index now, and when its share of a GPU is full
    and a build would take a larger one.
    """

    seal_points: int = 50_000
    seal_bytes: int = 64 * 1024 * 1024
    seal_records: int = 10_000
    tail_bytes_max: int = 512 * 1024 * 1024
    segments_max: int = 8
    tombstone_ratio: float = 0.2
    rebuild_growth: float = 10.0
    rebuild_loose_share: float = 0.5
    rebuild_recall_margin: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("tombstone_ratio", "rebuild_loose_share"):
                if not (_is_number(value) and 0.0 < value <= 1.0):
                    raise Invalid.at(f"upkeep.{name}", f"must be a number over 0 and at most 1, not {value!r}")
            elif name == "rebuild_growth":
                if not (_is_number(value) and 1.0 <= value < float("inf")):
                    raise Invalid.at(f"upkeep.{name}", f"must be a number from 1 on, not {value!r}")
            elif name == "rebuild_recall_margin":
                if not (_is_number(value) and 0.0 <= value < 1.0):
                    raise Invalid.at(f"upkeep.{name}", f"must be a number from 0 to below 1, not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Invalid.at(f"upkeep.{name}", f"must be an integer from 1 on, not {value!r}")
        if self.tail_bytes_max < self.seal_bytes:
            raise Invalid.at(
                "upkeep.tail_bytes_max",
                f"is {self.tail_bytes_max}, less than seal_bytes ({self.seal_bytes}): writes would be refused before "
                "anything is sealed; make it at least as large, or seal_bytes smaller",
            )


def parse_ports(text: str) -> range:
    """`shard_ports` as ports: of "20000-20999" those from 20000 to 20999, of "20000" that one, of "" none."""
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text) if isinstance(text, str) else None
    if text == "":
        return range(0)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1024 <= first <= last <= 65_535:
        raise Invalid.at("shard_ports", f"must be ports from 1024 to 65535, such as 20000-20999, not {text!r}")
    return range(first, last + 1)


@dataclass(frozen=True)
class Settings:
    """Process-wide settings, the same in every process of one Eagleray.

    `data` is the storage URL. `shard_cpus` is what a replica asks of Ray (0: no admission control, for one
    machine); `shard_threads` is what FAISS uses per replica (None: its `shard_cpus`, or where these are 0 the node's
    cores divided by the collection's shards). `cache_dir` keeps downloaded segments (None: a private folder under the
    system's temporary directory). `observed_share` of the live queries is answered exactly as well, to tell their
    recall (0: none); a replica spends at most the share `observed_duty` of one core's time on that.

    `shard_transport` is how coordinators call replicas: "direct" by a TCP connection to a port of the replica's node,
    "actor" by Ray's actor calls, where nodes may not open such connections to each other; it is slower. `shard_ports`
    are the ports that replicas take, such as "20000-20999", at least as many as there may be replicas on one node and
    none of Ray's ("": any that is free).
    """

    data: str
    namespace: str = "eagleray"
    shard_cpus: float = 1.0
    shard_threads: int | None = None
    cache_dir: str | None = None
    reconcile_period_s: float = 1.0
    replica_timeout_s: float = 5.0
    observed_share: float = 0.001
    observed_duty: float = 0.02
    shard_transport: ShardTransport = "direct"
    shard_ports: str = ""
    limits: Limits = field(default_factory=Limits)
    upkeep: Upkeep = field(default_factory=Upkeep)

    def __post_init__(self) -> None:
        if self.shard_transport not in get_args(ShardTransport):
            choices = ", ".join(get_args(ShardTransport))
            raise Invalid.at("shard_transport", f"must be one of {choices}, not {self.shard_transport!r}")
        parse_ports(self.shard_ports)
        if not isinstance(self.shard_cpus, int | float) or not 0 <= self.shard_cpus < float("inf"):
            raise Invalid.at("shard_cpus", f"must be a number from 0 on, not {self.shard_cpus!r}")
        for name in ("reconcile_period_s", "replica_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise Invalid.at(name, f"must be a number over 0, not {value!r}")
        if not (_is_number(self.observed_share) and 0.0 <= self.observed_share <= 1.0):
            raise Invalid.at("observed_share", f"must be a number from 0 (off) to 1, not {self.observed_share!r}")
        if not (_is_number(self.observed_duty) and 0.0 < self.observed_duty <= 1.0):
            raise Invalid.at("observed_duty", f"must be a number over 0 and at most 1, not {self.observed_duty!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Parse a decoded object such as the `args` of a Serve config file; unknown fields are Invalid."""
        cls.check_names(data)
        parts = {"limits": Limits(**data.get("limits", {})), "upkeep": Upkeep(**data.get("upkeep", {}))}
        return cls(**{**data, **parts})

    @classmethod
    def check_names(cls, data: Mapping[str, Any]) -> None:
        """Invalid where a field is unknown, or `data` is missing."""
        _refuse_unknown(data, cls, "")
        if "data" not in data:
            raise Invalid.at("data", "is required: the storage URL, such as file:///var/lib/eagleray")
        for name, part in (("limits", Limits), ("upkeep", Upkeep)):
            given = data.get(name, {})
            if not isinstance(given, Mapping):
                raise Invalid.at(name, "must be an object")
            _refuse_unknown(given, part, f"{name}.")

    def check_shared(self) -> None:
        """Invalid unless every process of a cluster finds the same data under `data`."""
        if self.data.startswith("memory:"):
            raise Invalid.at("data", "memory: belongs to one process; use file://, s3://, gs:// or az://")
        if "://" not in self.data and not self.data.startswith("/"):
            raise Invalid.at("data", f"{self.data!r} is relative; processes run in other folders: write file:///path")
