"""Every key that `paths` gives is told apart, and no other key is taken for one of ours."""

from __future__ import annotations

import pytest

from cluster import paths
from cluster.stored_object import StoredObject, parsed

OURS = {
    paths.manifest("c", 7): StoredObject("manifest", "c", number=7),
    paths.segment_file("c", "import-1-000000-0a1b2c3d", paths.ROWS): StoredObject(
        "segment", "c", "import-1-000000-0a1b2c3d"
    ),
    paths.segment_file("c", "s", paths.INDEX): StoredObject("segment", "c", "s"),
    paths.segment_file("c", "s", paths.DESCRIPTION): StoredObject("segment", "c", "s"),
    paths.wal_record("c", 3, 9): StoredObject("wal", "c", shard=3, number=9),
    paths.wal_record("c", 12_345, 9, 2): StoredObject("wal", "c", shard=12_345, log_set=2, number=9),
    paths.tombstones("c", 3, "merge-0003-x", 9): StoredObject("tombstones", "c", shard=3, number=9),
    paths.tombstones("c", 3, "s", 9, "0123456789abcdef"): StoredObject("tombstones", "c", shard=3, number=9),
    paths.staging_piece("c", "import-1", 4, 5): StoredObject("staging", "c", "import-1"),
    paths.recent_queries("c", "node-1"): StoredObject("queries", "c", "node-1"),
    paths.snapshot("c", "monday"): StoredObject("snapshot", "c", "monday"),
    paths.job_status("import-1"): StoredObject("job", owner="import-1"),
}


@pytest.mark.parametrize("key", OURS)
def test_keys_that_paths_gives(key: str) -> None:
    assert parsed(key) == OURS[key]


@pytest.mark.parametrize("key", OURS)
def test_keys_that_are_a_little_different_are_not_ours(key: str) -> None:
    folder, _, name = key.rpartition("/")
    for other in (f"{key}.bak", f"{folder}/x/{name}", f"x/{key}", f"{key}/x", f"{folder}/.{name}x", key.upper()):
        assert parsed(other) is None, other


@pytest.mark.parametrize(
    "key",
    [
        "collections/c/shards/0000/wal-000000/00000000000000000001.arrow",
        "collections/c/shards/00003/wal/00000000000000000001.arrow",
        "collections/c/shards/00003/tombstones/s-00000000000000000001.arrow",
        "collections/c/shards/0003/tombstones/s-1.arrow",
        "collections/c/manifest/7.json",
        "collections/C/manifest/00000000000000000007.json",
        "collections/c/segments/rows.arrow",
    ],
)
def test_numbers_that_paths_does_not_write_are_not_ours(key: str) -> None:
    assert parsed(key) is None
