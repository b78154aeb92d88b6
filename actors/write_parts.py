"""What of a write falls to each shard, and one answer of what the shards said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import EaglerayError, Unavailable
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome, WriteResult


def split_write(write: PointWrite, routing: Routing) -> dict[int, PointWrite]:
    """What falls to each shard. What falls to one alone is not copied."""
    if routing.shards == 1:
        return {0: write}
    ids = write.deletes if write.upserts is None else write.upserts.column("id")
    places = places_of(routing, ids)
    if len(places) == 1:
        return dict.fromkeys(places, write)
    if write.upserts is None:
        return {shard: PointWrite(deletes=ids.take(pa.array(at))) for shard, at in places.items()}
    return {shard: PointWrite(upserts=write.upserts.take(pa.array(at))) for shard, at in places.items()}


def places_of(routing: Routing, ids: Any) -> dict[int, NDArray[np.int64]]:
    """Shard -> positions of its ids."""
    shard_of = routing.shards_of_ids(ids)
    return {int(shard): np.flatnonzero(shard_of == shard) for shard in np.unique(shard_of)}


def joined_result(outcomes: Mapping[int, WriteOutcome | BaseException]) -> WriteResult:
    """One answer of the shards' outcomes.

    Exhausted, Conflict and the like mean that a shard applied nothing; they are raised where all shards say the same.
    Unavailable names the shards that acknowledged, with their LSNs, and what the others said; its `lsn` and `failed`
    have them as data.
    """
    errors = {shard: outcome for shard, outcome in outcomes.items() if isinstance(outcome, BaseException)}
    done = {shard: outcome for shard, outcome in outcomes.items() if isinstance(outcome, WriteOutcome)}
    if not errors:
        return WriteResult(sum(each.count for each in done.values()), {shard: each.lsn for shard, each in done.items()})
    for error in errors.values():
        if not isinstance(error, EaglerayError):
            raise error
    reasons = "; ".join(f"shard {shard}: {error}" for shard, error in errors.items())
    retry_after_s = max(getattr(error, "retry_after_s", None) or 1.0 for error in errors.values())
    first = next(iter(errors.values()))
    if not done and not isinstance(first, Unavailable) and all(type(error) is type(first) for error in errors.values()):
        raise first
    written = ", ".join(f"shard {shard} (LSN {each.lsn})" for shard, each in done.items())
    message = f"acknowledged by {written}; not by {reasons}" if done else f"no shard acknowledged the write; {reasons}"
    raise Unavailable(
        f"{message}. Sending the same again is safe",
        retry_after_s,
        lsn={shard: each.lsn for shard, each in done.items()},
        failed=tuple(errors),
    )
