"""Many writes as one record: the last one of each id wins, and each write is told what it did at its turn."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.group_commit import counts_of, fold, shares_types
from actors.live_generation import NOTHING, Existed
from cluster.config import CollectionConfig
from cluster.ids import id_array
from cluster.wal import WalRecord
from cluster.write import PointWrite
from tests.unit.actors.batches import batch_of, delete, upsert, vectors_of

TEXT = CollectionConfig(4, id_type="string")


def folded(*writes: PointWrite) -> tuple[dict[Any, float], set[Any]]:
    """(id -> where it lies, deleted ids)."""
    upserts, deletes = fold(writes)
    points: dict[Any, float] = {}
    if upserts is not None:
        vectors = upserts.column("vector").to_pylist()
        points = {value: v[0] for value, v in zip(upserts.column("id").to_pylist(), vectors, strict=True)}
        assert len(points) == len(upserts)
    gone = deletes.to_pylist() if deletes is not None else []
    assert len(set(gone)) == len(gone)
    assert not points.keys() & set(gone)
    return points, set(gone)


@pytest.mark.parametrize(
    ("writes", "points", "gone"),
    [
        ((upsert(1, 2),), {1: 1, 2: 2}, set()),
        ((delete(1, 2),), {}, {1, 2}),
        ((upsert(1), upsert(2)), {1: 1, 2: 2}, set()),
        ((upsert(1, at=5), upsert(1, at=6)), {1: 6}, set()),
        ((upsert(1, 2, at=5), upsert(2, 3, at=6), upsert(3, 1, at=7)), {1: 7, 2: 6, 3: 7}, set()),
        ((upsert(1), delete(1)), {}, {1}),
        ((delete(1), upsert(1)), {1: 1}, set()),
        ((delete(1, 2), delete(2, 3)), {}, {1, 2, 3}),
        ((upsert(1, 2), delete(2), upsert(2, at=9), delete(1)), {2: 9}, {1}),
        ((delete(1), upsert(1, at=4), delete(1), upsert(1, at=8)), {1: 8}, set()),
        ((upsert(1), upsert(2), delete(3)), {1: 1, 2: 2}, {3}),
    ],
)
def test_fold_keeps_the_last_write_of_each_id(
    writes: tuple[PointWrite, ...], points: dict[int, float], gone: set[int]
) -> None:
    assert folded(*writes) == (points, gone)


def test_fold_of_text_ids_and_missing_attributes() -> None:
    first = PointWrite(batch_of(TEXT, ["a", "b"], vectors_of([1, 2]), n=pa.array([10, 20])))
    second = PointWrite(batch_of(TEXT, ["b", "c"], vectors_of([3, 4]), word=pa.array(["x", "y"])))
    upserts, deletes = fold([first, second, PointWrite(deletes=id_array(["c", "d"], "string"))])
    assert {row["id"]: (row["n"], row["word"]) for row in upserts.to_pylist()} == {"a": (10, None), "b": (None, "x")}
    assert deletes.type == pa.large_string()
    assert sorted(deletes.to_pylist()) == ["c", "d"]
    assert upserts.schema.names[:2] == ["id", "vector"]
    one = WalRecord(1, 1, "write", uuid.uuid4().hex, upserts, deletes)
    assert WalRecord.decode(one.encode(0), "k", 0, 1).upserts.equals(upserts)


def test_fold_of_dictionaries_keeps_their_values() -> None:
    words = [pa.array([word]).dictionary_encode() for word in ("a", "b")]
    upserts, _ = fold([upsert(1, word=words[0]), upsert(2, word=words[1])])
    assert upserts.column("word").to_pylist() == ["a", "b"]


def test_writes_of_which_an_attribute_has_two_types_share_no_record() -> None:
    types: dict[str, Any] = {}
    assert shares_types(types, upsert(1, n=pa.array([1])))
    assert shares_types(types, delete(1))
    assert shares_types(types, upsert(2))
    assert not shares_types(types, upsert(3, n=pa.array(["three"]), word=pa.array(["x"])))
    assert "word" not in types
    assert shares_types(types, upsert(4, word=pa.array([4.5]), n=pa.array([4])))
    assert not shares_types(types, upsert(5, word=pa.array(["x"])))


# --- counts -----------------------------------------------------------------------------------------------------


def counted(there: set[int], *writes: PointWrite) -> list[int]:
    upserts, deletes = fold(writes)
    one = WalRecord(1, 1, "write", "0" * 32, upserts, deletes)

    def here(ids: Any) -> Any:
        return np.array([value in there for value in ids.to_pylist()] if ids is not None else [], dtype=bool)

    existed = Existed(here(upserts.column("id") if upserts is not None else None), here(deletes))
    return counts_of(writes, one, existed)


@pytest.mark.parametrize(
    ("there", "writes", "counts"),
    [
        (set(), (upsert(1, 2),), [2]),
        ({1}, (upsert(1, 2), upsert(1)), [2, 1]),
        ({1}, (delete(1, 2),), [1]),
        ({1}, (delete(1), delete(1)), [1, 0]),
        (set(), (upsert(1), delete(1, 2), delete(1)), [1, 1, 0]),
        ({1}, (delete(1), upsert(1), delete(1)), [1, 1, 1]),
        (set(), (delete(1), upsert(1)), [0, 1]),
        ({1}, (delete(1), upsert(1)), [1, 1]),
        ({1, 3}, (delete(3, 4), upsert(4, 5), delete(4, 3, 1)), [1, 2, 2]),
    ],
)
def test_each_write_counts_what_it_met_at_its_turn(
    there: set[int], writes: tuple[PointWrite, ...], counts: list[int]
) -> None:
    assert counted(there, *writes) == counts


def test_random_groups_end_and_count_as_one_write_after_the_other() -> None:
    for seed in range(150):
        dice = np.random.default_rng(seed)
        before = {int(value): -1.0 for value in dice.choice(8, 4, replace=False)}
        points, counts, writes = dict(before), [], []
        for step in range(int(dice.integers(1, 8))):
            ids = dice.choice(8, int(dice.integers(1, 5)), replace=False).tolist()
            if dice.random() < 0.5:
                writes.append(upsert(*ids, at=step))
                points |= dict.fromkeys(ids, float(step))
                counts.append(len(ids))
            else:
                writes.append(delete(*ids))
                counts.append(sum(points.pop(value, None) is not None for value in ids))
        kept, gone = folded(*writes)
        left = {value: at for value, at in before.items() if value not in gone} | kept
        assert (left, counted(set(before), *writes)) == (points, counts), f"seed {seed}"


def test_upserts_alone_are_counted_without_knowing_what_there_was() -> None:
    writes = [upsert(1, 2), upsert(2)]
    assert counts_of(writes, WalRecord(1, 1, "write", "0" * 32, fold(writes)[0]), NOTHING) == [2, 1]
