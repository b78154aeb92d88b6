"""What of a write falls to each shard, and one answer of what the shards said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import EaglerayError, Unavailable
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome, WriteResult


def split_write(write: PointWrite, routing: Routing) -> dict[int, PointWrite]:
    """What falls to each shard. What falls to one alone is not copied."""
    write = replace(write, shards=routing.shards)
    if routing.shards == 1:
        return {0: write}
    ids = write.deletes if write.upserts is None else write.upserts.column("id")
    places = places_of(routing, ids)
    if len(places) == 1:
        return dict.fromkeys(places, write)
    if write.upserts is None:
        return {shard: replace(write, deletes=ids.take(pa.array(at))) for shard, at in places.items()}
    return {shard: replace(write, upserts=write.upserts.take(pa.array(at))) for shard, at in places.items()}


def places_of(routing: Routing, ids: Any) -> dict[int, NDArray[np.int64]]:
    """Shard -> positions of its ids."""
    shard_of = routing.shards_of_ids(ids)
    return {int(shard): np.flatnonzero(shard_of == shard) for shard in np.unique(shard_of)}


def joined_write(parts: Sequence[PointWrite]) -> PointWrite:
    """One write of parts that were split from one. A part alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].upserts is None:
        return PointWrite(deletes=pa.concat_arrays([part.deletes for part in parts]))
    return PointWrite(upserts=pa.concat_batches([part.upserts for part in parts]))


def joined_result(outcomes: Iterable[tuple[int, WriteOutcome | BaseException]]) -> WriteResult:
    """One answer of what shards said. One that was split twice may have said more than one thing of a shard number.

    Exhausted, Conflict and the like mean that a shard applied nothing; they are raised where all shards say the same.
    Unavailable names the shards that acknowledged, with their LSNs, and what the others said; its `lsn` and `failed`
    have them as data.
    """
    done: dict[int, WriteOutcome] = {}
    errors: list[tuple[int, EaglerayError]] = []
    for shard, outcome in sorted(outcomes, key=lambda each: each[0]):
        if isinstance(outcome, WriteOutcome):
            before = done.get(shard, WriteOutcome(0, 0))
            done[shard] = WriteOutcome(max(before.lsn, outcome.lsn), before.count + outcome.count)
        elif isinstance(outcome, EaglerayError):
            errors.append((shard, outcome))
        else:
            raise outcome
    lsn = {shard: each.lsn for shard, each in done.items()}
    if not errors:
        return WriteResult(sum(each.count for each in done.values()), lsn)
    reasons = "; ".join(f"shard {shard}: {error}" for shard, error in errors)
    retry_after_s = max(getattr(error, "retry_after_s", None) or 1.0 for _, error in errors)
    first = errors[0][1]
    if not done and not isinstance(first, Unavailable) and all(type(error) is type(first) for _, error in errors):
        raise first
    written = ", ".join(f"shard {shard} (LSN {number})" for shard, number in lsn.items())
    message = f"acknowledged by {written}; not by {reasons}" if done else f"no shard acknowledged the write; {reasons}"
    failed = tuple(dict.fromkeys(shard for shard, _ in errors))
    raise Unavailable(f"{message}. Sending the same again is safe", retry_after_s, lsn=lsn, failed=failed)
