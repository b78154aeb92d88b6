"""The wire's JSON bodies of collections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from actors.faiss_index import check_factory
from cluster.config import (
    DIMENSION_MAX,
    FACTORY_CHARACTERS_MAX,
    NUM_GPUS_MIN,
    OPTION_RANGES,
    REPLICAS_MAX,
    SHARDS_MAX,
    Codes,
    CollectionConfig,
    Device,
    GpuFull,
    IdType,
    IndexKindChoice,
    Metric,
    RerankStore,
    VectorDtype,
)
from serve.decoding import invalid_of

Memory = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Recall = Annotated[float, Meta(gt=0.0, le=1.0)]


def _range(option: str) -> Meta:
    low, high = OPTION_RANGES[option]
    return Meta(ge=low, le=high)


class IndexBody(Struct, forbid_unknown_fields=True):
    """Which index the shards build; null leaves an option to the policy."""

    kind: IndexKindChoice = "auto"
    target_recall: Recall = 0.95
    device: Device = "auto"
    memory_bytes: Memory | None = None
    build_seconds: Annotated[float, Meta(gt=0.0)] | None = None
    churn: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    num_gpus: Annotated[float, Meta(ge=NUM_GPUS_MIN, le=1.0)] | None = None
    cpu_twin: bool = True
    gpu_full: GpuFull = "step_down"
    wait_for_gpu: bool = False
    codes: Codes | None = None
    m: Annotated[int, _range("m")] | None = None
    ef_construction: Annotated[int, _range("ef_construction")] | None = None
    nlist: Annotated[int, _range("nlist")] | None = None
    pq_m: Annotated[int, _range("pq_m")] | None = None
    pq_bits: Literal[4, 8] | None = None
    graph_degree: Annotated[int, _range("graph_degree")] | None = None
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


def check_config(fields: dict[str, Any]) -> CollectionConfig:
    """The config that a PUT with these fields would make; Invalid as the endpoint's."""
    return collection_body(fields).to_config()


def collection_body(fields: dict[str, Any]) -> CollectionBody:
    """The fields as a PUT's body; Invalid names the field."""
    try:
        return msgspec.convert(fields, CollectionBody)
    except msgspec.ValidationError as error:
        raise invalid_of(error) from None
