"""The mutable part of a shard: points written since the last segment, searched exactly.

One writer appends; readers take a `TailView`, which never changes. Vectors and ids lie in blocks that are filled up
and never moved: a view looks at the first `count` rows only, so what is appended later is not seen by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.ties import found_with_ties
from cluster.arrow_rows import vector_type, vectors_view
from cluster.attributes import fitted
from cluster.config import CollectionConfig
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.row_selection import RowSelection

BLOCK_FLOATS = 1 << 20  # 4 MiB of vectors; memory that was not written to yet costs nothing
COPIED_WHOLE = 4  # times the rows asked for: a chunk of no more is copied, which costs less than to choose from it
Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class _Block:
    """Some rows, allocated at once: vectors (rows, dimension) float32, ids (rows,) int64 or text, their hashes."""

    vectors: Vectors
    ids: NDArray[Any]
    hashes: NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TailView:
    """The first `count` rows of a tail as they stood once. The lists are shared and only ever grow."""

    config: CollectionConfig
    count: int
    selection: RowSelection  # the rows that are live; over `count` rows or more
    per_block: int
    blocks: list[_Block]
    chunks: list[Any]  # record batches of attributes
    chunk_starts: list[int]
    chunk_count: int
    attributes: dict[str, Any]  # Arrow types, by name, of those that any row was given; as the last of them has it
    other_bytes: int  # of ids and attributes

    @property
    def points(self) -> int:
        return self.selection.kept - (self.selection.count - self.count)

    @property
    def size_bytes(self) -> int:
        """Of the vectors, ids and attributes of all rows, live or not."""
        return self.count * self.config.dimension * 4 + self.other_bytes

    def vector_blocks(self) -> Iterator[tuple[int, Vectors]]:
        """(first row, vectors) of every block, in order."""
        for first in range(0, self.count, self.per_block):
            yield first, self.blocks[first // self.per_block].vectors[: self.count - first]

    def search(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """(rows, scores), both (n, width), best first, -1 where there is none: brute force over the live rows.

        Width is min(k, rows), or more where points tie with the k-th (`ties.found_with_ties`).
        """
        live = self.selection if self.points < self.count else None

        def find(asked: Vectors, width: int) -> tuple[Rows, Vectors]:
            return exact_search(asked, self.vector_blocks(), min(width, self.count), self.config.metric, live)

        return found_with_ties(find, queries, k)

    def rows_of_ids(self, ids: Any) -> Rows:
        """The live row of each id of an Arrow array, -1 where there is none; shape (n,)."""
        wanted = np.unique(hash_ids(ids))
        values = ids.to_pylist()
        asked = set(values)
        row_of: dict[int | str, int] = {}
        for first in range(0, self.count if len(wanted) else 0, self.per_block):
            block = self.blocks[first // self.per_block]
            hashes = block.hashes[: self.count - first]
            at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            near = np.flatnonzero(wanted[at] == hashes)
            live = near[self.selection.holds(near + first)]
            row_of |= {value: first + row for row in live.tolist() if (value := _plain(block.ids[row])) in asked}
        return np.array([row_of.get(value, -1) for value in values], dtype=np.int64)

    def _taken(self, rows: Rows, columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Some rows (n,) of a column, given as that of each block: a copy."""
        block, row = np.divmod(rows, self.per_block)
        if not np.count_nonzero(block):
            return columns[0][row]
        out = np.empty((len(rows), *columns[0].shape[1:]), dtype=columns[0].dtype)
        for number in np.unique(block):
            mine = block == number
            out[mine] = columns[number][row[mine]]
        return out

    def ids(self, rows: Rows) -> Any:
        """The ids of some rows as an Arrow array."""
        values = self._taken(rows, [block.ids for block in self.blocks])
        return pa.array(values, ID_ARROW_TYPE[self.config.id_type])

    def vectors(self, rows: Rows) -> Any:
        """The vectors of some rows as an Arrow array of the stored type."""
        taken = self._taken(rows, [block.vectors for block in self.blocks])
        flat = pa.array(taken.reshape(-1).astype(self.config.vector_dtype, copy=False))
        return pa.FixedSizeListArray.from_arrays(
            flat, type=vector_type(self.config.dimension, self.config.vector_dtype)
        )

    def attributes_of(self, rows: Rows, types: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes of some rows as Arrow arrays of these types, by name; null where a row was not given one."""
        parts = self._by_chunk(rows) if types and len(rows) else []
        return {name: _attribute(parts, len(rows), name, dtype) for name, dtype in types.items()}

    def _by_chunk(self, rows: Rows) -> list[tuple[Any, Rows, Rows]]:
        """(record batch, some of its rows, their places among `rows`) of every chunk that has any of the rows."""
        starts = np.array(self.chunk_starts[: self.chunk_count], dtype=np.int64)
        chunk = np.searchsorted(starts, rows, side="right") - 1  # -1: before the first
        order = np.argsort(chunk, kind="stable")
        numbers, firsts = np.unique(chunk[order], return_index=True)
        ends = [*firsts[1:].tolist(), len(rows)]
        parts = []
        for number, first, end in zip(numbers.tolist(), firsts.tolist(), ends, strict=True):
            if number >= 0:
                mine = order[first:end]
                parts.append((self.chunks[number], rows[mine] - starts[number], mine))
        return parts


def _attribute(parts: Sequence[tuple[Any, Rows, Rows]], count: int, name: str, dtype: Any) -> Any:
    """One attribute of `count` rows, which lie in these parts (`TailView._by_chunk`), as an Arrow array."""
    places = np.zeros(count, dtype=np.int64)
    values, filled = [pa.nulls(1, dtype)], 1
    for chunk, rows, mine in parts:
        at = chunk.schema.get_field_index(name)
        if at < 0:
            continue
        given = chunk.column(at)
        if given.type == dtype and len(given) <= COPIED_WHOLE * len(rows):
            places[mine] = filled + rows
        else:
            given = fitted(given.take(pa.array(rows)), dtype, name)  # an import may have changed the type
            places[mine] = np.arange(filled, filled + len(rows))
        filled += len(given)
        values.append(given)
    return pa.concat_arrays(values).take(pa.array(places)) if len(values) > 1 else pa.nulls(count, dtype)


def _plain(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)


class Tail:
    """Appends and removes points. One thread at a time; `view` gives what was done so far to readers."""

    def __init__(self, config: CollectionConfig) -> None:
        self._config = config
        self._per_block = max(8, BLOCK_FLOATS // config.dimension // 8 * 8)
        self._blocks: list[_Block] = []
        self._chunks: list[Any] = []
        self._chunk_starts: list[int] = []
        self._types: dict[str, Any] = {}  # of the attributes; replaced, never changed in place
        self._other_bytes = 0
        self._selection = RowSelection.everything(0)  # over all rows of the blocks, used or not
        self._count = 0
        self._row_of: dict[int | str, int] = {}  # the live row of every id

    def view(self) -> TailView:
        """What the tail holds now; never changes."""
        return TailView(
            self._config,
            self._count,
            self._selection,
            self._per_block,
            self._blocks,
            self._chunks,
            self._chunk_starts,
            len(self._chunks),
            self._types,
            self._other_bytes,
        )

    def remove(self, ids: Sequence[int | str]) -> NDArray[np.bool_]:
        """Remove points; which of the ids (n,) there were."""
        rows = np.array([self._row_of.pop(value, -1) for value in ids], dtype=np.int64)
        here = rows >= 0
        if here.any():
            self._selection = self._selection.without(rows[here])
        return here

    def append(self, batch: Any, ids: Sequence[int | str], hashes: NDArray[np.uint64]) -> None:
        """Add the points of a record batch (`PointWrite.upserts`), none of which the tail holds."""
        first = self._count
        vectors = vectors_view(batch.column("vector"))
        done = 0
        while done < len(ids):
            block, at = self._room()
            stop = min(len(ids) - done, self._per_block - at) + done
            block.vectors[at : at + stop - done] = vectors[done:stop]
            block.ids[at : at + stop - done] = ids[done:stop]
            block.hashes[at : at + stop - done] = hashes[done:stop]
            self._count += stop - done
            done = stop
        self._other_bytes += batch.column("id").nbytes
        self._add_chunk(batch, first)
        self._row_of.update(zip(ids, range(first, self._count), strict=True))

    def _add_chunk(self, batch: Any, first: int) -> None:
        """Keep the attributes of the rows from `first` on, copied: as slices they would keep the whole record."""
        names = [name for name in batch.schema.names if name not in ("id", "vector")]
        if not names and not self._chunks:  # from the first row with attributes on every row belongs to a chunk
            return
        chunk = pa.record_batch({name: pa.concat_arrays([batch.column(name)]) for name in names})
        self._chunks.append(chunk)
        self._chunk_starts.append(first)
        self._other_bytes += chunk.nbytes
        types = {field.name: field.type for field in chunk.schema}
        if any(self._types.get(name) != dtype for name, dtype in types.items()):
            self._types = self._types | types

    def _room(self) -> tuple[_Block, int]:
        """A block with free rows, and the first of them."""
        number, at = divmod(self._count, self._per_block)
        if number == len(self._blocks):
            id_dtype = np.int64 if self._config.id_type == "int64" else object
            self._blocks.append(
                _Block(
                    np.empty((self._per_block, self._config.dimension), dtype=np.float32),
                    np.empty(self._per_block, dtype=id_dtype),
                    np.empty(self._per_block, dtype=np.uint64),
                )
            )
            self._selection = _grown(self._selection, self._per_block)
        return self._blocks[number], at


def _grown(selection: RowSelection, rows: int) -> RowSelection:
    """With so many more rows, all kept; `rows` is a multiple of 8."""
    more = RowSelection.everything(rows)
    return RowSelection(np.concatenate([selection.bits, more.bits]), selection.kept + rows, selection.count + rows)
