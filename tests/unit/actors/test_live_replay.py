"""Records that are replayed many at a time: the generation is what it would be had each been applied by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from actors.generation_files import GenerationFiles
from actors.live_generation import LiveGeneration
from cluster.errors import Unavailable
from cluster.memory_store import MemoryStore
from cluster.wal import WalRecord
from cluster.write import PointWrite
from tests.unit.actors.batches import delete, upsert
from tests.unit.actors.log_writer import LogWriter, contents


@pytest.fixture
def writer() -> LogWriter:
    return LogWriter(MemoryStore())


def fresh(writer: LogWriter, folder: Path) -> LiveGeneration:
    """The newest version as its files have it, before any record of the log."""
    manifest = writer.import_points(1, 2, 3, 4)
    return GenerationFiles(writer.store, "words", 0, folder).at_own_log(manifest, ())


def records_of(writer: LogWriter) -> list[WalRecord]:
    """Ids of the segment and the tail, written, deleted and written again, the last of another width; and a claim."""
    writes = [upsert(1, 9, at=7.0), delete(2, 9), upsert(9, 2, at=8.0), delete(1), upsert(5), upsert(5, 1, at=3.0)]
    records = [writer.put(write) for write in writes]
    return [*records, writer.claim(), writer.put(PointWrite(deletes=pa.array([2, 77], pa.int32())))]


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_replay_is_as_if_each_record_was_applied(
    together: int, writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.live_generation.REPLAYED_TOGETHER", together)
    replayed, applied = fresh(writer, tmp_path), fresh(writer, tmp_path)
    records = records_of(writer)
    replayed.replay(records)
    for record in records:
        applied.apply(record)
    assert contents(replayed.view) == contents(applied.view) == writer.live == {3: 3.0, 4: 4.0, 9: 8.0, 5: 3.0, 1: 3.0}
    for generation in (replayed, applied):
        generation.check()
        (selection,) = generation.view.selections.values()
        assert (generation.view.lsn, generation.epoch, generation.records) == (8, 2, 7)
        assert (selection.kept, generation.view.points) == (2, 5)
    replayed.replay(records)
    assert (replayed.view.lsn, replayed.records) == (8, 7), "what it holds already changes nothing"


def test_replay_asks_each_segment_once_for_all_records(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = fresh(writer, tmp_path)
    (segment,) = generation.view.segments
    asked, rows_of_ids = list[int](), segment.rows.rows_of_ids
    monkeypatch.setattr(
        segment.rows, "rows_of_ids", lambda ids, *rest: asked.append(len(ids)) or rows_of_ids(ids, *rest)
    )
    generation.replay(records_of(writer))
    assert asked == [12]


def test_replay_whose_log_cannot_be_read_on_goes_on_from_where_it_stands(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.live_generation.REPLAYED_TOGETHER", 2)
    generation = fresh(writer, tmp_path)
    records = records_of(writer)

    def failing() -> Iterator[WalRecord]:
        yield from records[:5]
        raise Unavailable("the store is away")

    with pytest.raises(Unavailable):
        generation.replay(failing())
    assert generation.view.lsn == 4
    assert contents(generation.view) == {3: 3.0, 4: 4.0, 9: 8.0, 2: 8.0}
    generation.replay(records[4:])
    assert contents(generation.view) == writer.live


def test_replay_takes_no_record_after_a_gap(writer: LogWriter, tmp_path: Path) -> None:
    generation = fresh(writer, tmp_path)
    records = records_of(writer)
    with pytest.raises(RuntimeError, match="record 4 does not follow record 2"):
        generation.replay([*records[:2], *records[3:]])
    assert generation.view.lsn == 0


def test_replayed_together_are_no_more_bytes_than_allowed(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.live_generation.REPLAYED_BYTES", 1)
    generation, taken = fresh(writer, tmp_path), list[int]()
    take = generation._take
    monkeypatch.setattr(generation, "_take", lambda records, lsn: taken.append(len(records)) or take(records, lsn))
    records = records_of(writer)
    generation.replay(records)
    assert taken == [1, 1, 1, 1, 1, 1, 2], "deleted ids count as well; a claim has neither"
    assert contents(generation.view) == writer.live
