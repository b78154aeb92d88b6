"""Every object key. Nothing else formats or parses one."""

from __future__ import annotations

import re

MANIFEST_NAME = re.compile(r"(\d{20})\.json")
WAL_NAME = re.compile(r"([0-9]{20})\.arrow")
TOMBSTONES_NAME = re.compile(r".+-([0-9]{20})(?:-[0-9a-f]{16})?\.arrow")
SNAPSHOT_FILE = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})\.json")
JOB_STATUS = re.compile(r"jobs/([^/]+)/status\.json")

ROWS, INDEX, DESCRIPTION = "rows.arrow", "index.faiss", "segment.json"
SEGMENT_FILES = (ROWS, INDEX, DESCRIPTION)


def collections_prefix() -> str:
    return "collections/"


def manifest_prefix(collection: str) -> str:
    return f"collections/{collection}/manifest/"


def manifest(collection: str, version: int) -> str:
    return f"{manifest_prefix(collection)}{version:020d}.json"


def manifest_version(key: str) -> int | None:
    """The version a manifest key names, or None for any other key."""
    match = MANIFEST_NAME.fullmatch(key.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else None


def segments_prefix(collection: str) -> str:
    return f"collections/{collection}/segments/"


def segment_prefix(collection: str, segment_id: str) -> str:
    return f"collections/{collection}/segments/{segment_id}/"


def segment_file(collection: str, segment_id: str, name: str) -> str:
    return f"collections/{collection}/segments/{segment_id}/{name}"


def shards_prefix(collection: str) -> str:
    return f"collections/{collection}/shards/"


def wal_prefix(collection: str, shard: int, log_set: int = 0) -> str:
    """The log of a shard in a log set (`Manifest.log_set`)."""
    folder = f"wal-{log_set:06d}" if log_set else "wal"
    return f"{shards_prefix(collection)}{shard:04d}/{folder}/"


def wal_record(collection: str, shard: int, lsn: int, log_set: int = 0) -> str:
    return f"{wal_prefix(collection, shard, log_set)}{lsn:020d}.arrow"


def wal_lsn(key: str) -> int | None:
    """The LSN that the key of a WAL record names, or None for any other key."""
    match = WAL_NAME.fullmatch(key.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else None


def tombstones_prefix(collection: str, shard: int) -> str:
    return f"collections/{collection}/shards/{shard:04d}/tombstones/"


def tombstones(collection: str, shard: int, segment_id: str, lsn: int, variant: str = "") -> str:
    """The deleted rows of a segment, as of an LSN of its shard; `variant` (16 hex digits) tells those of two
    generations apart, "" is what older versions wrote."""
    name = f"{segment_id}-{lsn:020d}-{variant}" if variant else f"{segment_id}-{lsn:020d}"
    return f"{tombstones_prefix(collection, shard)}{name}.arrow"


def tombstones_lsn(key: str) -> int | None:
    """The LSN that the key of a tombstone file names, or None for any other key."""
    match = TOMBSTONES_NAME.fullmatch(key.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else None


def staging_prefix(collection: str, job_id: str = "") -> str:
    """Where an import keeps its partitions until they are built; all jobs' folders without a job_id."""
    folder = f"collections/{collection}/staging/"
    return f"{folder}{job_id}/" if job_id else folder


def staging_piece(collection: str, job_id: str, partition: int, unit: int) -> str:
    return f"{staging_prefix(collection, job_id)}{partition:06d}/{unit:08d}.arrow"


def queries_prefix(collection: str) -> str:
    return f"collections/{collection}/queries/"


def recent_queries(collection: str, coordinator: str) -> str:
    """Where a coordinator leaves a sample of the queries it answered."""
    return f"{queries_prefix(collection)}{coordinator}.arrow"


def snapshots_prefix(collection: str) -> str:
    return f"collections/{collection}/snapshots/"


def snapshot(collection: str, name: str) -> str:
    return f"{snapshots_prefix(collection)}{name}.json"


def snapshot_name(key: str) -> str | None:
    """The name that a snapshot's key has, or None for any other key."""
    match = SNAPSHOT_FILE.fullmatch(key.rsplit("/", 1)[-1])
    return match.group(1) if match else None


def jobs_prefix() -> str:
    return "jobs/"


def job_status(job_id: str) -> str:
    return f"{jobs_prefix()}{job_id}/status.json"


def job_of_status(key: str) -> str | None:
    """The id of the job whose status has this key, or None for any other key."""
    match = JOB_STATUS.fullmatch(key)
    return match.group(1) if match else None
