"""Logs as any history leaves them, collected or not, are whole; what is done to one of their records is found."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from cluster import paths
from cluster.errors import Conflict
from cluster.garbage import Sweep
from cluster.log_check import CheckedLog, Finding, check_log, logs_of
from cluster.manifest import Manifest
from tests.unit.cluster.histories import CONFIG, ClockStore, History, log_of, needed_versions, switch, write


def findings(store: ClockStore, collection: str) -> tuple[list[CheckedLog], list[Finding]]:
    """Of the logs that the newest version and its rollback target read."""
    needed: list[Manifest] = needed_versions(store, collection)[0][:2]
    if not needed or needed[0].state == "deleted":
        return [], []
    logs = logs_of(store, needed[0], needed)
    return logs, [found for log in logs for found in check_log(store, log)[1]]


@pytest.mark.parametrize("seed", range(8))
def test_logs_of_random_histories_are_whole_before_and_after_a_collection_of_garbage(seed: int) -> None:
    store = ClockStore()
    history = History(store, seed)
    for _ in range(6):
        for _ in range(8):
            history.step()
        assert [findings(store, name)[1] for name in "abc"] == [[], [], []], history.steps
        store.now_s += 10.0
        Sweep(store, store.now_s - 5.0, 0.0).run(None, delete=True)
        assert [findings(store, name)[1] for name in "abc"] == [[], [], []], history.steps


@pytest.mark.parametrize("seed", range(8))
def test_a_record_that_is_damaged_or_gone_is_found(seed: int) -> None:
    store, chosen = ClockStore(), random.Random(seed)
    history = History(store, seed)
    for _ in range(60):
        history.step()
    checked = 0
    for name in "abc":
        with suppress(Conflict):  # one with another config is as good
            history.create(name)
        switch(store, name)
        write(store, name, 3)
        for log in findings(store, name)[0]:
            prefix = paths.wal_prefix(name, log.shard, log.log_set)
            keys = [info.key for info in store.objects(prefix) if (paths.wal_lsn(info.key) or 0) > log.after]
            for key in keys[:-1] if log.from_first else keys[1:-1]:
                copy = store.copy()
                data = bytearray(store.get(key))
                data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
                copy.put(key, bytes(data))
                assert [found.object for found in findings(copy, name)[1]] == [key]
                copy.delete(key)
                assert key in [found.object for found in findings(copy, name)[1]], history.steps
                checked += 1
    assert checked


def test_a_log_that_a_later_set_follows_must_have_ended() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    write(store, count=3)
    log = CheckedLog("a", 0, 0, ended=True)
    records, found = check_log(store, log)
    last = max(info.key for info in store.objects(paths.wal_prefix("a", 0)))
    assert records > 1
    assert [each.object for each in found] == [last]
    assert "no end record" in found[0].problem
