"""Whether the cluster has the GPUs that a collection asks for: told when they are asked for, not by a job later.

The memory of GPUs is not looked at here: the job that builds for them asks their drivers. So where the share of one is
left to that, it is taken to be the least, or the one that the collection has.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import choose
from jobs.build_plan import NONE_HELD, HeldGpus, build_gpus

CountGpus = Callable[[], ClusterGpus]  # the cluster's, as Ray counts them; blocks


def gpus_for(
    config: CollectionConfig, count: CountGpus, held: HeldGpus = NONE_HELD, had: float = 0.0
) -> GpuFacts | None:
    """What a build of the collection would be told of GPUs; None: it does without.

    `held` are those of its own replicas, `had` is the share that it is served with. Invalid where it asks for GPUs that
    the cluster does not have, Unavailable where others hold them.
    """
    found = build_gpus(config, count, 0, held, had)
    return None if found is None else found.facts


def check_new_collection(config: CollectionConfig, count: CountGpus, exists: bool) -> None:
    """Refuse an index that no shard could build, and GPUs that are not there: Invalid, Unavailable.

    Of a collection that `exists` nothing is asked of the cluster: its replicas have their GPUs, or wait for them.
    """
    if exists or config.index.device == "cpu":
        gpu: GpuFacts | None = GpuFacts()
    elif config.index.device == "auto":  # without points it needs none yet
        gpu = GpuFacts() if config.index.wait_for_gpu or count().total > 0 else None
    else:
        gpu = gpus_for(config, count)
    choose(0, config, gpu)
