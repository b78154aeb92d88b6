"""Export: Parquet files that an import reads back to the same points, all of them or none."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from actors.segment_loader import read_description
from cluster.config import CollectionConfig
from cluster.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.object_store import open_store
from cluster.snapshots import create_snapshot
from jobs import export, export_target, sealing
from jobs.build_plan import Workers
from jobs.export import Exporter, ExportOptions, export_schema, rows_at_once, write_part
from jobs.export_target import ExportTarget
from jobs.import_source import Columns
from jobs.report import JobReporter, JobStatus
from jobs.sealing import Sealer
from jobs.snapshots import named_version, now_utc
from tests.fakes import ManualClock, run_tasks_here
from tests.unit.jobs.histories import History
from tests.unit.jobs.imports import log_of, new_data_url, random_table, run_import, stored, write

ALL = Columns(attributes="all")


def run_export(
    data: str,
    target: Path | str,
    folder: Path,
    snapshot: str | None = None,
    listener: Callable[[JobStatus], None] = lambda status: None,
    run_tasks: Any = run_tasks_here,
    collection: str = "words",
    job_id: str = "export-1",
) -> dict[str, Any]:
    store, log = open_store(data), log_of(open_store(data), collection)
    workers = Workers(run_tasks, 2)

    def version(reporter: JobReporter) -> Manifest:
        if snapshot:
            return named_version(store, log, collection, snapshot)
        return Sealer(data, log, workers, str(folder)).sealed(collection, reporter, export.SEAL_SHARE)

    options = ExportOptions(collection, str(target), snapshot)
    exporter = Exporter(data, store, options, workers, version, str(folder))
    reporter = JobReporter(store, JobStatus(job_id, "export", collection), listener, ManualClock())
    return exporter.run(job_id, reporter)


def imported(folder: Path, count: int = 60, **create: Any) -> str:
    data = new_data_url()
    table = random_table(count)
    run_import(data, write(folder / "source" / "words.parquet", table), columns=ALL, create={"metric": "l2", **create})
    return data


def files_in(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir())


def points_of(data: str, collection: str = "words") -> dict[Any, Any]:
    store = open_store(data)
    return stored(store, log_of(store, collection).newest_live()).by_id()


@pytest.mark.parametrize("create", [{"shards": 1}, {"shards": 3}, {"shards": 2, "vector_dtype": "float16"}])
def test_import_reads_an_export_back(create: dict[str, Any], tmp_path: Path) -> None:
    data = imported(tmp_path, **create)
    target = tmp_path / "out" / "words"
    told = run_export(data, target, tmp_path)
    newest = log_of(open_store(data)).newest_live()
    assert files_in(target) == [f"part-{shard:04d}-0000.parquet" for shard in range(create["shards"])]
    assert [path.name for path in target.parent.iterdir()] == ["words"]
    size = sum((target / name).stat().st_size for name in files_in(target))
    facts = (told["points"], told["files"], told["bytes"], told["version"])
    assert facts == (60, create["shards"], size, newest.version)
    again = new_data_url()
    run_import(again, target, columns=ALL, create=told["config"])
    assert points_of(again) == points_of(data)
    assert log_of(open_store(again)).newest_live().config == newest.config
    assert log_of(open_store(again)).newest_live().attributes == newest.attributes


def test_string_ids_and_cosine_come_back(tmp_path: Path) -> None:
    data = new_data_url()
    run_import(data, write(tmp_path / "words.parquet", random_table(30, id_type="string")), create={"metric": "cosine"})
    told = run_export(data, tmp_path / "out", tmp_path)
    again = new_data_url()
    run_import(again, tmp_path / "out", create=told["config"])
    one, other = points_of(data), points_of(again)
    assert one.keys() == other.keys()
    np.testing.assert_allclose([other[i][0] for i in one], [one[i][0] for i in one], rtol=1e-6)


def test_only_live_points_are_exported_with_every_write_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = new_data_url()
    made = History(open_store(data), tmp_path / "cache")
    made.create()
    made.import_ids(range(20))
    made.write(range(18, 24), [3])
    made.seal(0)
    made.seal(1)
    made.write([7, 30], [8, 19])
    told = run_export(data, tmp_path / "out", tmp_path)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert {row["id"]: row["vector"][0] for row in rows} == made.held()
    assert len(rows) == told["points"] == made.newest.points
    monkeypatch.setattr(sealing, "seal_tail", None)  # a snapshot is in files already
    create_snapshot(made.store, "then", made.newest, now_utc())
    contents = made.held()
    made.write([7, 99])
    run_export(data, tmp_path / "then", tmp_path, snapshot="then")
    assert {row["id"]: row["vector"][0] for row in pq.read_table(tmp_path / "then").to_pylist()} == contents


def test_empty_collection_is_one_file_without_rows(tmp_path: Path) -> None:
    data = new_data_url()
    log_of(open_store(data)).create(CollectionConfig(7, id_type="string"))
    told = run_export(data, tmp_path / "out", tmp_path)
    assert (told["points"], told["files"]) == (0, 1)
    assert pq.read_table(tmp_path / "out").schema.field("vector").type == pa.list_(pa.float32(), 7)


def test_attributes_of_all_segments_have_one_type_in_all_files(tmp_path: Path) -> None:
    """One segment lacks an attribute, one has it in another type than is declared: as after a rollback of an import."""
    data = new_data_url()
    made = History(open_store(data), tmp_path / "cache")
    made.create()
    made.import_ids(range(4), shards=2)
    table = random_table(6, first=100)
    other = write(tmp_path / "o.parquet", table.set_column(2, "word", pa.array([["x"]] * 6, pa.list_(pa.string()))))
    run_import(data, other, collection="nested", columns=ALL, create={"metric": "l2"})
    nested = log_of(made.store, "nested").newest_live()
    refs = [replace(ref, origin="nested") for ref in nested.segments.values()]
    base = made.newest
    shards = (replace(base.shards[0], segments=(*base.shards[0].segments, *refs)), base.shards[1])
    mixed = replace(base, shards=shards, attributes={"name": "string", "rank": "int64"})
    schema = export_schema(made.store, mixed, tmp_path)
    assert schema.names == ["id", "vector", "name", "word", "pos", "rank"]
    types = (schema.field("name").type, schema.field("rank").type, schema.field("word").type)
    assert types == (pa.string(), pa.int64(), pa.list_(pa.string()))
    target = ExportTarget(str(tmp_path / "out"), "j")
    target.begin()
    sizes = {}
    for number, entry_ref in enumerate([base.shards[0].segments[0], refs[0]]):
        task = export.PartTask(data, "words", target, f"p{number}.parquet", schema, shards[0], entry_ref, str(tmp_path))
        sizes[task.name] = [*write_part(task)][-1]["bytes"]
    target.finish(sizes)
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert rows[103]["rank"] == 3
    assert rows[103]["word"] == ["x"]
    assert rows[103]["name"] is None
    assert [row["name"] for one, row in rows.items() if one < 4] == [f"name of {one}" for one in rows if one < 4]


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_row_groups_are_bounded_and_told(tmp_path: Path) -> None:
    data = imported(tmp_path, 300)
    events: list[dict[str, Any]] = []

    def small(function: Any, items: Sequence[Any], *bounds: Any) -> Iterator[tuple[int, Any]]:
        for number, event in run_tasks_here(function, [_small(item) for item in items], *bounds):
            events.append(event)
            yield number, event

    seen: list[JobStatus] = []
    run_export(data, tmp_path / "out", tmp_path, run_tasks=small, listener=seen.append)
    metadata = pq.read_metadata(tmp_path / "out" / "part-0000-0000.parquet")
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert len(rows) > 3
    assert max(rows) * 4 * 4 < 4096
    assert [event["rows"] for event in events[:-1]] == rows
    shares = [status.progress for status in seen if status.phase == "export"]
    assert shares == sorted(shares)
    assert shares[-1] == 0.99


def _small(item: Any) -> Any:
    return replace(item, row_group_bytes=4096) if isinstance(item, export.PartTask) else item


def test_rows_at_once_are_of_the_mean_size(tmp_path: Path) -> None:
    data = imported(tmp_path)
    store = open_store(data)
    newest = log_of(store).newest_live()
    described = read_description(store, "words", next(iter(newest.segments.values())))
    each = described.files["rows.arrow"].size_bytes / described.count
    assert rows_at_once(described, int(10.5 * each)) == 10
    assert rows_at_once(described, 1) == 1


# --- all or nothing -------------------------------------------------------------------------------------------------


def test_target_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = imported(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    run_export(data, target, tmp_path)  # an empty folder will do
    before = files_in(target)
    with pytest.raises(Conflict, match=r"is not empty: it has 'part-0000-0000.parquet'"):
        run_export(data, target, tmp_path)
    assert files_in(target) == before
    with pytest.raises(Invalid, match="is a file"):
        run_export(data, target / before[0], tmp_path)
    with pytest.raises(Invalid, match="target"):
        run_export(data, "ftp://somewhere", tmp_path)


def failing_at(at: int, error: BaseException) -> Any:
    """A task runner that fails before its `at`-th event of an export."""

    def run(function: Any, items: Sequence[Any], *bounds: Any) -> Iterator[tuple[int, Any]]:
        for seen, event in enumerate(run_tasks_here(function, items, *bounds)):
            if seen == at and function is write_part:
                raise error
            yield event

    return run


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("error", [SystemExit(15), Unavailable("away"), RuntimeError("a bug")])
def test_export_that_fails_leaves_nothing_and_can_be_run_again(
    error: BaseException, remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = imported(tmp_path, shards=3)
    out = tmp_path / "bucket" / "out"
    if remote:
        use_remote(monkeypatch, tmp_path / "bucket")
    for at in range(6):
        with pytest.raises(type(error)):
            run_export(data, "out" if remote else out, tmp_path, run_tasks=failing_at(at, error))
        assert not [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]
    assert run_export(data, "out" if remote else out, tmp_path)["files"] == 3
    assert len(files_in(out)) == 3


def use_remote(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """URLs are paths in a file system that is not local: files have their names at once."""
    folder.mkdir()
    monkeypatch.setattr(
        export_target, "resolve", lambda url: (fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), url)
    )


def test_killed_export_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = imported(tmp_path, shards=2)
    monkeypatch.setattr(ExportTarget, "discard", lambda self, names: None)  # it had no time for that
    with pytest.raises(Unavailable):
        run_export(data, tmp_path / "out", tmp_path, run_tasks=failing_at(2, Unavailable("killed")))
    (tmp_path / "out.export-1.unfinished" / "part-0007-0000.parquet").write_bytes(b"stale")
    run_export(data, tmp_path / "out", tmp_path)
    assert files_in(tmp_path / "out") == ["part-0000-0000.parquet", "part-0001-0000.parquet"]


def test_parts_that_another_node_wrote_to_its_own_disk_are_missed(tmp_path: Path) -> None:
    data = imported(tmp_path, shards=2)

    def elsewhere(function: Any, items: Sequence[Any], *bounds: Any) -> Iterator[tuple[int, Any]]:
        yield from run_tasks_here(function, items, *bounds)
        if function is write_part:
            (tmp_path / "out.export-1.unfinished" / "part-0001-0000.parquet").unlink()

    with pytest.raises(Unavailable, match=r"lacks 1 of 2 files, part-0001-0000.parquet .* that all nodes share"):
        run_export(data, tmp_path / "out", tmp_path, run_tasks=elsewhere)
    assert not (tmp_path / "out").exists()


def test_target_that_others_write_to_meanwhile_is_left_to_them(tmp_path: Path) -> None:
    data = imported(tmp_path)

    def others(function: Any, items: Sequence[Any], *bounds: Any) -> Iterator[tuple[int, Any]]:
        yield from run_tasks_here(function, items, *bounds)
        if function is write_part:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs.parquet").write_bytes(b"?")

    with pytest.raises(Conflict, match="was written to by others"):
        run_export(data, tmp_path / "out", tmp_path, run_tasks=others)
    assert files_in(tmp_path / "out") == ["theirs.parquet"]
    assert not (tmp_path / "out.export-1.unfinished").exists()


def test_of_two_exports_to_one_bucket_at_most_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found it empty; parts of one in the place of the other's would be a mixture of two versions."""
    use_remote(monkeypatch, tmp_path / "bucket")
    name, part = "part-0000-0000.parquet", tmp_path / "part"
    first, second = ExportTarget("out", "export-1"), ExportTarget("out", "export-2")
    for target in (first, second):
        target.check_empty()
    for target in (first, second):
        part.write_bytes(target.job_id.encode())
        target.begin()
        target.put(part, name)
    with pytest.raises(Conflict, match=f"was written to by others: export-2-{name}"):
        first.finish({name: 8})
    first.discard([name])
    second.finish({name: 8})
    assert [path.read_bytes() for path in (tmp_path / "bucket" / "out").iterdir()] == [b"export-2"]


@pytest.mark.parametrize("count", [59, 61])
def test_segment_of_another_count_than_the_manifest_says_is_corrupt(count: int, tmp_path: Path) -> None:
    data = imported(tmp_path)
    store = open_store(data)
    newest = log_of(store).newest_live()
    (ref,) = newest.shards[0].segments
    wrong = replace(newest, shards=(replace(newest.shards[0], segments=(replace(ref, count=count),)),))
    options = ExportOptions("words", str(tmp_path / "out"))
    exporter = Exporter(data, store, options, Workers(run_tasks_here, 2), lambda reporter: wrong, str(tmp_path))
    reporter = JobReporter(store, JobStatus("export-1", "export", "words"), clock=ManualClock())
    with pytest.raises(Corrupt, match=f"{ref.segment_id}.* 60 rows, the manifest says {count}"):
        exporter.run("export-1", reporter)
    assert not (tmp_path / "out").exists()


def test_rows_that_no_task_tells_of_are_missed(tmp_path: Path) -> None:
    data = imported(tmp_path, shards=2)

    def half(function: Any, items: Sequence[Any], *bounds: Any) -> Iterator[tuple[int, Any]]:
        yield from run_tasks_here(function, items[:1] if function is write_part else items, *bounds)

    with pytest.raises(Corrupt, match="says 60 points, its segments hold"):
        run_export(data, tmp_path / "out", tmp_path, run_tasks=half)
    assert not (tmp_path / "out").exists()


def test_collection_or_snapshot_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    data = imported(tmp_path)
    with pytest.raises(NotFound, match="no collection 'others'"):
        run_export(data, tmp_path / "out", tmp_path, collection="others")
    with pytest.raises(NotFound, match="no snapshot 'then'"):
        run_export(data, tmp_path / "out", tmp_path, snapshot="then")
    assert not (tmp_path / "out").exists()


def test_task_can_be_sent_to_another_process(tmp_path: Path) -> None:
    data = imported(tmp_path)
    store = open_store(data)
    newest = log_of(store).newest_live()
    schema = export_schema(store, newest, tmp_path)
    task = export.PartTask(data, "words", ExportTarget("out", "j"), "p", schema, newest.shards[0], None, None)
    assert pickle.loads(pickle.dumps(task)) == task
