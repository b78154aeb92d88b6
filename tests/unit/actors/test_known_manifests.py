"""What the supervisor finds of earlier versions, some of which were collected."""

from __future__ import annotations

import asyncio

import pytest

from actors.known_manifests import KnownManifests
from cluster import paths
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from tests.unit.actors.batches import CONFIG
from tests.unit.actors.points import manifest_log
from tests.unit.actors.resharding import new_nonce


def declared(store: MemoryStore, count: int, prefix: str) -> None:
    """So many more versions of the same generation."""
    for number in range(count):
        manifest_log(store, "words").declare_attributes({f"{prefix}{number}": "int64"})


def earlier(store: MemoryStore, newest: Manifest, version: int) -> Manifest | None:
    return asyncio.run(KnownManifests(store, new_nonce).earlier(newest, version))


@pytest.mark.parametrize("gone", [(), (3,), (5, 7), (2, 3, 5, 6, 7, 8)])
def test_earlier_version_is_found_though_others_on_the_way_were_collected(gone: tuple[int, ...]) -> None:
    store = MemoryStore()
    log = manifest_log(store, "words")
    first, _ = log.create(CONFIG)
    declared(store, 3, "a")
    newest = log.newest_live()
    log.commit_generation(newest, CONFIG, log.wal_ends(newest, len(newest.shards)))
    declared(store, 4, "b")
    newest = log.newest_live()
    for version in gone:
        store.delete(paths.manifest("words", version))
    assert newest.version == 9
    assert earlier(store, newest, 4) == log.read(4)
    assert earlier(store, newest, 1) == first
    assert earlier(store, newest, 9) == newest
    for version in gone:
        assert earlier(store, newest, version) is None


def test_version_before_a_deletion_is_of_another_collection() -> None:
    store = MemoryStore()
    log = manifest_log(store, "words")
    log.create(CONFIG)
    declared(store, 1, "a")
    deleted = log.delete()
    again, _ = log.create(CONFIG)
    declared(store, 1, "b")
    newest = log.newest_live()
    assert [earlier(store, newest, version) for version in (1, 2, deleted.version)] == [None] * 3
    assert earlier(store, newest, again.version) == again
