"""The wire's JSON bodies of collections and jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from actors.faiss_index import check_factory
from cluster.config import (
    DIMENSION_MAX,
    FACTORY_CHARACTERS_MAX,
    OPTION_RANGES,
    REPLICAS_MAX,
    SHARDS_MAX,
    Codes,
    CollectionConfig,
    Device,
    IdType,
    IndexKindChoice,
    Metric,
    RerankStore,
    VectorDtype,
)
from cluster.errors import FieldError, Invalid
from cluster.index_policy import choose
from serve.decoding import decode, invalid_fields, invalid_of

Memory = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Recall = Annotated[float, Meta(gt=0.0, le=1.0)]


def _range(option: str) -> Meta:
    low, high = OPTION_RANGES[option]
    return Meta(ge=low, le=high)


class IndexBody(Struct, forbid_unknown_fields=True):
    """Which index the shards build; null leaves an option to the policy."""

    kind: IndexKindChoice = "auto"
    target_recall: Recall = 0.95
    device: Device = "cpu"
    memory_bytes: Memory | None = None
    build_seconds: Annotated[float, Meta(gt=0.0)] | None = None
    churn: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    codes: Codes | None = None
    m: Annotated[int, _range("m")] | None = None
    ef_construction: Annotated[int, _range("ef_construction")] | None = None
    nlist: Annotated[int, _range("nlist")] | None = None
    pq_m: Annotated[int, _range("pq_m")] | None = None
    pq_bits: Literal[4, 8] | None = None
    rerank_store: RerankStore | None = None
    factory: Annotated[str, Meta(min_length=1, max_length=FACTORY_CHARACTERS_MAX)] | None = None


class CollectionBody(Struct, forbid_unknown_fields=True):
    """A collection to create."""

    dimension: Annotated[int, Meta(ge=1, le=DIMENSION_MAX)]
    metric: Metric = "cosine"
    id_type: IdType = "int64"
    shards: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] = 1
    replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    vector_dtype: VectorDtype = "float32"
    index: IndexBody = msgspec.field(default_factory=IndexBody)

    def to_config(self, check_factory_string: bool = True) -> CollectionConfig:
        """Invalid where options do not go together, or FAISS makes no index of the factory string."""
        config = CollectionConfig.from_dict(msgspec.to_builtins(self))
        if check_factory_string and config.index.factory is not None:
            check_factory(config.index.factory, config.dimension, config.metric)
        return config


class ImportBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="import"):
    """An import job. `create` allows a new collection and holds its config as far as the file does not give it."""

    source: Annotated[str, Meta(min_length=1)]
    id_column: str = "id"
    vector_column: str = "vector"
    attribute_columns: list[str] | Literal["all"] = []
    mode: Literal["replace"] = "replace"
    create: dict[str, Any] | None = None
    memory_bytes: Memory | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class CompactBody(Struct, forbid_unknown_fields=True, tag_field="kind", tag="compact"):
    """A compaction of all shards, or of one."""

    shard: Annotated[int, Meta(ge=0, lt=SHARDS_MAX)] | None = None
    memory_bytes: Memory | None = None


JobBody = ImportBody | CompactBody


def decode_job(data: bytes) -> JobBody:
    """The body of a job of either kind; Invalid names the field."""
    either: Any = JobBody  # mypy knows no type of a union
    body: JobBody = decode(data, either)
    return body


def check_create(create: dict[str, Any]) -> None:
    """Refuse now what an import job would refuse: the config of a new collection, whose dimension the file may give."""
    try:
        body = _collection_body({"dimension": 1, **create})
        if "dimension" not in create and body.index.pq_m is not None:
            body.dimension = body.index.pq_m  # the file's must be no less
        choose(0, body.to_config(check_factory_string="dimension" in create))
    except Invalid as error:
        raise invalid_fields(FieldError(f"create.{e.field}", e.message) for e in error.errors) from None


def check_config(fields: dict[str, Any]) -> CollectionConfig:
    """The config that a PUT with these fields would make; Invalid as the endpoint's."""
    return _collection_body(fields).to_config()


def _collection_body(fields: dict[str, Any]) -> CollectionBody:
    try:
        return msgspec.convert(fields, CollectionBody)
    except msgspec.ValidationError as error:
        raise invalid_of(error) from None
