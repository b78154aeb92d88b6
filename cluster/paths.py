"""Every object key. Nothing else formats or parses one."""

from __future__ import annotations

import re

MANIFEST_NAME = re.compile(r"(\d{20})\.json")

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


def segment_file(collection: str, segment_id: str, name: str) -> str:
    return f"collections/{collection}/segments/{segment_id}/{name}"


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


def job_status(job_id: str) -> str:
    return f"jobs/{job_id}/status.json"
