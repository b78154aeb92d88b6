"""Object keys, as stored data has them: none of these may change."""

from __future__ import annotations

import pytest

from cluster import paths


def test_keys_are_pinned() -> None:
    assert paths.collections_prefix() == "collections/"
    assert paths.segments_prefix("c") == "collections/c/segments/"
    assert paths.manifest_prefix("c") == "collections/c/manifest/"
    assert paths.manifest("c", 7) == "collections/c/manifest/00000000000000000007.json"
    assert paths.segment_file("c", "s1", paths.ROWS) == "collections/c/segments/s1/rows.arrow"
    assert paths.wal_prefix("c", 3) == "collections/c/shards/0003/wal/"
    assert paths.wal_record("c", 3, 7) == "collections/c/shards/0003/wal/00000000000000000007.arrow"
    assert paths.tombstones("c", 12, "s1", 7) == "collections/c/shards/0012/tombstones/s1-00000000000000000007.arrow"
    assert paths.tombstones("c", 1, "s1", 7, "0123456789abcdef") == (
        "collections/c/shards/0001/tombstones/s1-00000000000000000007-0123456789abcdef.arrow"
    )
    assert paths.segment_prefix("c", "s1") == "collections/c/segments/s1/"
    assert paths.snapshots_prefix("c") == "collections/c/snapshots/"
    assert paths.snapshot("c", "before-1") == "collections/c/snapshots/before-1.json"
    assert paths.staging_prefix("c") == "collections/c/staging/"
    assert paths.staging_prefix("c", "job") == "collections/c/staging/job/"
    assert paths.staging_piece("c", "job", 3, 12) == "collections/c/staging/job/000003/00000012.arrow"
    assert paths.queries_prefix("c") == "collections/c/queries/"
    assert paths.recent_queries("c", "replica-1") == "collections/c/queries/replica-1.arrow"
    assert paths.job_status("job") == "jobs/job/status.json"


def test_segment_files_are_pinned() -> None:
    assert paths.SEGMENT_FILES == ("rows.arrow", "index.faiss", "segment.json")


@pytest.mark.parametrize("version", [0, 1, 42, 10**19, 10**20 - 1])
def test_manifest_version_is_read_back(version: int) -> None:
    assert paths.manifest_version(paths.manifest("c", version)) == version


def test_manifest_keys_sort_by_version() -> None:
    versions = [10, 2, 9, 10**12, 1, 100, 99]
    keys = [paths.manifest("c", version) for version in versions]
    assert sorted(keys) == [paths.manifest("c", version) for version in sorted(versions)]


def test_wal_keys_sort_by_lsn() -> None:
    lsns = [10, 2, 9, 10**12, 1, 100, 99]
    keys = [paths.wal_record("c", 0, lsn) for lsn in lsns]
    assert sorted(keys) == [paths.wal_record("c", 0, lsn) for lsn in sorted(lsns)]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "collections/c/manifest/",
        "collections/c/manifest/7.json",
        "collections/c/manifest/00000000000000000007.json.tmp",
        "collections/c/manifest/x00000000000000000007.json",
        "collections/c/manifest/000000000000000000007.json",
        "collections/c/manifest/0000000000000000000a.json",
    ],
)
def test_manifest_version_of_another_key_is_none(key: str) -> None:
    assert paths.manifest_version(key) is None


@pytest.mark.parametrize("variant", ["", "0123456789abcdef"])
@pytest.mark.parametrize("segment_id", ["s1", "seal-0000-7-0123456789abcdef0123456789abcdef", "a-00000000000000000003"])
def test_lsn_of_tombstones_is_read_back(segment_id: str, variant: str) -> None:
    assert paths.tombstones_lsn(paths.tombstones("c", 3, segment_id, 7, variant)) == 7


def test_name_of_a_snapshot_is_read_back() -> None:
    assert paths.snapshot_name(paths.snapshot("c", "before_1-x")) == "before_1-x"
    for name in ("Upper.json", ".json", "a.json.tmp", "a.arrow", f"{'a' * 64}.json"):
        assert paths.snapshot_name(paths.snapshots_prefix("c") + name) is None
