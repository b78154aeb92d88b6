"""What an object is, by its key: for who goes through all that is stored. A key that is none of ours is None."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster import paths

Kind = Literal["manifest", "segment", "tombstones", "wal", "staging", "queries", "snapshot", "job"]
NAME = r"[a-z0-9][a-z0-9_-]{0,62}"  # of a collection, as `config.COLLECTION_NAME` has it
WHOLE = r"[^/]+"
FORMS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("manifest", re.compile(rf"collections/({NAME})/manifest/(?P<number>[0-9]{{20}})\.json")),
    ("segment", re.compile(rf"collections/({NAME})/segments/(?P<owner>{WHOLE})/(?P<file>{WHOLE})")),
    ("tombstones", re.compile(rf"collections/({NAME})/shards/(?P<shard>[0-9]{{4,}})/tombstones/(?P<file>{WHOLE})")),
    (
        "wal",
        re.compile(
            rf"collections/({NAME})/shards/(?P<shard>[0-9]{{4,}})/wal(?:-(?P<set>[0-9]{{6,}}))?"
            r"/(?P<number>[0-9]{20})\.arrow"
        ),
    ),
    ("staging", re.compile(rf"collections/({NAME})/staging/(?P<owner>{WHOLE})/[0-9]{{6,}}/[0-9]{{8,}}\.arrow")),
    ("queries", re.compile(rf"collections/({NAME})/queries/(?P<owner>{WHOLE})\.arrow")),
    ("snapshot", re.compile(rf"collections/({NAME})/snapshots/(?P<owner>{NAME})\.json")),
    ("job", re.compile(rf"()jobs/(?P<owner>{WHOLE})/status\.json")),
)


@dataclass(frozen=True)
class StoredObject:
    """`owner` is the segment, job, coordinator or snapshot; `number` the version or LSN."""

    kind: Kind
    collection: str = ""
    owner: str = ""
    shard: int = 0
    log_set: int = 0
    number: int = 0


def parsed(key: str) -> StoredObject | None:
    """None for a key that this version does not write: it may be of a later one, or somebody's own file."""
    for kind, form in FORMS:
        match = form.fullmatch(key)
        if match is None:
            continue
        parts = match.groupdict()
        shard, log_set = int(parts.get("shard") or 0), int(parts.get("set") or 0)
        number = int(parts.get("number") or 0)
        if kind == "segment" and parts["file"] not in paths.SEGMENT_FILES:
            return None
        if kind == "tombstones":
            lsn = paths.tombstones_lsn(key)
            if lsn is None:
                return None
            number = lsn
        found = StoredObject(kind, match.group(1), parts.get("owner") or "", shard, log_set, number)
        return found if _is_ours(found, key) else None
    return None


def _is_ours(found: StoredObject, key: str) -> bool:
    """Whether `paths` gives the object that key: `wal-000000` and a shard of five digits with zeros are not ours."""
    folders = {
        "tombstones": paths.tombstones_prefix(found.collection, found.shard),
        "wal": paths.wal_prefix(found.collection, found.shard, found.log_set),
    }
    return key.startswith(folders.get(found.kind, ""))
