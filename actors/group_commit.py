"""Many writes as one WAL record, and what each of them did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from actors.live_generation import Existed
from cluster.wal import WalRecord
from cluster.write import PointWrite


def fold(writes: Sequence[PointWrite]) -> tuple[Any, Any]:
    """(upserts, deletes) of a record, None where there are none: of every id the last write, in the order given."""
    if len(writes) == 1:
        return writes[0].upserts, writes[0].deletes
    batches = [write.upserts for write in writes if write.upserts is not None]
    whole: Any = _concatenated(batches) if batches else None
    if len(batches) == len(writes) and len(whole.column("id").unique()) == len(whole):
        return whole, None
    row_of: dict[int | str, int] = {}  # -1: deleted
    row = 0
    for write in writes:
        if write.upserts is not None:
            ids = write.upserts.column("id").to_pylist()
            row_of.update(zip(ids, range(row, row + len(ids)), strict=True))
            row += len(ids)
        else:
            row_of.update(dict.fromkeys(write.deletes.to_pylist(), -1))
    rows = sorted(at for at in row_of.values() if at >= 0)
    deleted = [value for value, at in row_of.items() if at < 0]
    id_type = (whole.column("id") if whole is not None else writes[0].deletes).type
    if whole is not None and len(rows) < row:
        whole = whole.take(pa.array(rows, pa.int64()))
    return whole if rows else None, pa.array(deleted, id_type) if deleted else None


def shares_types(types: dict[str, Any], write: PointWrite) -> bool:
    """Whether a write fits into a record whose columns have these types, by name; if so its own are added to them.

    Two types of one attribute are under way at once where an import changed it a moment ago.
    """
    own = {field.name: field.type for field in write.upserts.schema} if write.upserts is not None else {}
    if any(types.get(name, dtype) != dtype for name, dtype in own.items()):
        return False
    types.update(own)
    return True


def _concatenated(batches: Sequence[Any]) -> Any:
    """One record batch; an attribute that some of them lack is null there."""
    if all(batch.schema.equals(batches[0].schema) for batch in batches):
        return pa.concat_batches(batches)
    table = pa.concat_tables([pa.table(batch) for batch in batches], promote_options="default")
    return table.combine_chunks().to_batches()[0]


def counts_of(writes: Sequence[PointWrite], record: WalRecord, existed: Existed) -> list[int]:
    """Per write the points it upserted, or deleted that existed at its turn. `existed` is from before the record."""
    if all(write.deletes is None for write in writes):
        return [write.points for write in writes]
    there: dict[int | str, bool] = {}
    if record.upserts is not None:
        there.update(zip(record.upserts.column("id").to_pylist(), existed.upserts.tolist(), strict=True))
    if record.deletes is not None:
        there.update(zip(record.deletes.to_pylist(), existed.deletes.tolist(), strict=True))
    counts = []
    for write in writes:
        if write.upserts is not None:
            there.update(dict.fromkeys(write.upserts.column("id").to_pylist(), True))
            counts.append(write.points)
        else:
            ids = write.deletes.to_pylist()
            counts.append(sum(there[value] for value in ids))
            there.update(dict.fromkeys(ids, False))
    return counts
