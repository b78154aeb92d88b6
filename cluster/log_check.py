"""Whether a stored log is whole: every record decodes, none is missing, epochs do not go back, an end is the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from cluster import paths
from cluster.errors import Corrupt
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore
from cluster.references import CollectionReferences
from cluster.stored_object import parsed
from cluster.wal import READ_WINDOW, Wal, WalRecord


@dataclass(frozen=True)
class Finding:
    """What is wrong with an object, or with what several of them say together."""

    object: str
    problem: str


@dataclass(frozen=True)
class CheckedLog:
    """A log, and from where on its records are needed: `after` an LSN, 0: all that there are.

    `epoch` is that of the record at `after`. With `from_first` the first one must be right behind it; `ended` says that
    a later log set is in use.
    """

    collection: str
    log_set: int
    shard: int
    after: int = 0
    epoch: int = 0
    from_first: bool = True
    ended: bool = False


def logs_of(store: ObjectStore, newest: Manifest, needed: Sequence[Manifest]) -> list[CheckedLog]:
    """The logs that are stored and that some of the `needed` versions read, `newest` among them."""
    references = CollectionReferences(newest)
    epochs: dict[tuple[int, int, int], int] = {}
    for manifest in needed:
        references.add_logs(manifest)
        for entry in manifest.shards:
            epochs[manifest.log_set, entry.shard, entry.applied_lsn] = entry.epoch
            for logs in entry.behind:
                epochs |= {(logs.number, at.shard, at.lsn): at.epoch for at in logs.positions}
    listed = (parsed(info.key) for info in store.objects(paths.shards_prefix(newest.collection)))
    stored = sorted({(found.log_set, found.shard) for found in listed if found is not None and found.kind == "wal"})
    first_set = min(manifest.log_set for manifest in needed)
    checked = []
    for log_set, shard in stored:
        after = references.needed_after(log_set, shard)
        if after is not None:
            epoch = epochs.get((log_set, shard, after), 0)
            ended = log_set < newest.log_set and not newest.crossing
            from_first = log_set <= first_set and (after > 0 or log_set == 0)
            checked.append(CheckedLog(newest.collection, log_set, shard, after, epoch, from_first, ended))
    return checked


def check_log(store: ObjectStore, log: CheckedLog) -> tuple[int, list[Finding]]:
    """(records that were read, what is wrong). Raises Unavailable. Memory: some records, and every LSN."""
    wal = Wal(store, log.collection, log.shard, log.log_set)
    prefix = paths.wal_prefix(log.collection, log.shard, log.log_set)
    listed = (paths.wal_lsn(info.key) for info in store.objects(prefix))
    lsns = sorted(lsn for lsn in listed if lsn is not None and lsn > log.after)
    found: list[Finding] = []
    expected = log.after + 1 if log.from_first or not lsns else lsns[0]
    epoch, ended = log.epoch, False
    for lsn, record in _records(wal, log, lsns, found):
        key = paths.wal_record(log.collection, log.shard, lsn, log.log_set)
        if lsn != expected:
            missing = paths.wal_record(log.collection, log.shard, expected, log.log_set)
            found.append(Finding(missing, f"is missing; the log goes on at LSN {lsn}"))
        if ended and (record is None or record.kind != "claim"):  # which nobody reads: `Wal.end_record`
            found.append(Finding(key, "is behind the end record of its log"))
        expected = lsn + 1
        if record is not None:
            if record.epoch < epoch:
                found.append(Finding(key, f"its epoch {record.epoch} goes back from {epoch}"))
            epoch, ended = record.epoch, ended or record.kind == "end"
    if lsns and log.ended and not ended:
        found.append(Finding(key, "is the last record of a log that a later log set follows, and no end record"))
    return len(lsns), found


def _records(
    wal: Wal, log: CheckedLog, lsns: Sequence[int], found: list[Finding]
) -> Iterator[tuple[int, WalRecord | None]]:
    """The records in order, some of them read at one time; None where one cannot be read, which is added to `found`."""

    def read(lsn: int) -> tuple[int, WalRecord | None, str]:
        try:
            record = wal.read(lsn)
        except Corrupt as error:
            return lsn, None, str(error)
        return lsn, record, "" if record is not None else "was listed, and is gone"

    with ThreadPoolExecutor(READ_WINDOW, thread_name_prefix="log-check") as pool:
        rest = iter(lsns)
        while part := list(islice(rest, READ_WINDOW)):
            for lsn, record, problem in pool.map(read, part):
                if problem:
                    found.append(Finding(paths.wal_record(log.collection, log.shard, lsn, log.log_set), problem))
                yield lsn, record
