"""Questions about GPUs, asked of the policy in few words."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import choose

ROOMY = GpuFacts()  # of unknown memory
H100 = GpuFacts(80 * 10**9, "H100")


def config_of(dimension: int = 768, dtype: Any = "float32", metric: Any = "cosine", **index: Any) -> CollectionConfig:
    return CollectionConfig(dimension, metric, vector_dtype=dtype, index=IndexConfig(**{"device": "gpu"} | index))


def chosen(count: int, gpu: GpuFacts | None = H100, **options: Any) -> tuple[str, str, str]:
    """(kind, codes, device)."""
    spec = choose(count, config_of(**options), gpu)
    return spec.kind, spec.codes, spec.device


def refused(count: int, gpu: GpuFacts | None = H100, **options: Any) -> tuple[str, str]:
    with pytest.raises(Invalid) as caught:
        choose(count, config_of(**options), gpu)
    (error,) = caught.value.errors
    return error.field, error.message
