"""Jobs on a collection that is searched, fetched and written to all the time: nobody notices, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.jobs.under_load import Load, run_under_load

pytestmark = pytest.mark.usefixtures("one_target")


def test_rebuild_and_compaction_under_load(tmp_path: Path) -> None:
    async def scenario(load: Load) -> None:
        await load.run_job("compact", load.compact())
        await load.run_job("rebuild", load.rebuild())
        await load.run_job("rollback", load.rollback())
        await load.run_job("compact again", load.compact())

    run_under_load(scenario, tmp_path)


def test_reshard_under_load(tmp_path: Path) -> None:
    async def scenario(load: Load) -> None:
        await load.run_job("rebuild", load.rebuild())
        await load.run_job("1 to 3", load.rebuild(shards=3))
        await load.run_job("3 to 2", load.rebuild(shards=2))
        await load.run_job("back to 3", load.rollback())
        await load.run_job("compact", load.compact())

    run_under_load(scenario, tmp_path)
