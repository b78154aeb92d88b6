"""A segment: an immutable, row-aligned set of files, described and checksummed by `segment.json`.

Row i of `rows.arrow` is label i of `index.faiss`. Rows are ordered by (hash of id, id): an id is found by binary
search in the memory-mapped `id_hash` column, and any run of rows is a uniform random sample of the segment.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from cluster import paths
from cluster.arrow_rows import gather, vector_type, vectors_view
from cluster.config import CollectionConfig
from cluster.errors import Corrupt
from cluster.free_memory import give_back_memory
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.object_store import ObjectStore

FORMAT = 1
BATCH_BYTES = 16 * 1024 * 1024  # of vectors in one record batch of rows.arrow
CHECKSUM_CHUNK_BYTES = 1024 * 1024  # fits into a core's cache, from which it is hashed: 8 MiB took 1.7 times as long
ROW_COLUMNS = ("id", "vector", "id_hash")
RESERVED_COLUMNS = frozenset({*ROW_COLUMNS, "score", "query"})


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum (`xxh3_128:<hex>`) of one file of a segment."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True)
class OperatingPoint:
    """Search parameters with what was measured for them on this segment.

    `recall` is recall@10 over all tuning queries, `recall_low` the lower end of its one-sided 95% interval;
    `latency_ms` is for one query at a time, `queries_per_s` for batches of 256 (0: not measured).
    """

    target_recall: float
    params: dict[str, float]
    recall: float
    recall_low: float
    latency_ms: float
    met: bool
    queries_per_s: float = 0.0


@dataclass(frozen=True)
class SelfTest:
    """Rows searched as queries after every load, their exact nearest rows, and the recall seen at build time."""

    rows: tuple[int, ...] = ()
    truth: tuple[tuple[int, ...], ...] = ()
    recall: float = 1.0


@dataclass(frozen=True)
class SegmentDescription:
    """What `segment.json` holds: enough to verify, load, search and explain the segment.

    `cpu_twin` is empty but for an index that was tuned on a GPU: "operating_points" has what the same file reaches on a
    CPU with the same parameters, "recall" what it finds in the self-test.
    """

    segment_id: str
    count: int
    dimension: int
    metric: str
    id_type: str
    vector_dtype: str
    rows_per_batch: int
    attributes: dict[str, str]
    spec: dict[str, Any]
    operating_points: tuple[OperatingPoint, ...]
    self_test: SelfTest
    files: dict[str, FileEntry]
    built: dict[str, Any] = field(default_factory=dict)
    considered: tuple[dict[str, Any], ...] = ()  # `index_policy.Candidate` of every index that was thought of
    cpu_twin: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def encode(self) -> bytes:
        told = {name: value for name, value in asdict(self).items() if name != "cpu_twin" or value}
        return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()

    @property
    def twin_points(self) -> tuple[OperatingPoint, ...]:
        """What was measured for the operating points on the CPU's twin of an index that was tuned on a GPU."""
        return tuple(OperatingPoint(**point) for point in self.cpu_twin.get("operating_points", ()))

    @classmethod
    def decode(cls, data: bytes, name: str) -> SegmentDescription:
        """Parse `segment.json`; Corrupt, naming the object, where it is not one of a known format."""
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise Corrupt(f"{name}: format {raw['format']}, this version reads {FORMAT}")
            raw["operating_points"] = tuple(OperatingPoint(**point) for point in raw["operating_points"])
            test = raw["self_test"]
            raw["self_test"] = SelfTest(tuple(test["rows"]), tuple(tuple(row) for row in test["truth"]), test["recall"])
            raw["considered"] = tuple(raw.get("considered", ()))
            _check_twin(raw.get("cpu_twin", {}))
            raw["files"] = {key: FileEntry(**entry) for key, entry in raw["files"].items()}
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(f"{name}: not a segment description: {error!r}") from error


def _check_twin(twin: dict[str, Any]) -> None:
    """Raises one of the errors that tell a description of another form."""
    if twin:
        float(twin["recall"])
        [OperatingPoint(**point) for point in twin["operating_points"]]


def checksum_bytes(data: bytes) -> str:
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"


class Checksum:
    """Size and checksum of bytes that come in pieces, in order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._size_bytes = 0

    def add(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        self._size_bytes += len(piece)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._size_bytes, f"xxh3_128:{self._digest.hexdigest()}")


def checksum_file(path: Path) -> FileEntry:
    """Size and checksum of a local file, read once, into one small buffer: it is mapped, not kept, afterwards."""
    checksum, buffer = Checksum(), memoryview(bytearray(CHECKSUM_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            checksum.add(buffer[:read])
    return checksum.entry


def verify_file(path: Path, expected: FileEntry, name: str) -> None:
    """Raise Corrupt, naming the object, unless the file has the recorded size and checksum."""
    check_entry(checksum_file(path), expected, name)


def check_entry(actual: FileEntry, expected: FileEntry, name: str) -> None:
    """Raise Corrupt, naming the object, unless what was read is what was recorded."""
    if actual != expected:
        raise Corrupt(
            f"{name}: {actual.size_bytes} bytes with checksum {actual.checksum}; "
            f"written were {expected.size_bytes} bytes with {expected.checksum}"
        )


def delete_segment(store: ObjectStore, collection: str, segment_id: str) -> None:
    """Delete all files of a segment; no error where some or all are gone."""
    for name in paths.SEGMENT_FILES:
        store.delete(paths.segment_file(collection, segment_id, name))


def rows_per_batch(config: CollectionConfig) -> int:
    """Rows of one record batch, so that its vectors take about `BATCH_BYTES`."""
    return max(1, BATCH_BYTES // (config.dimension * (4 if config.vector_dtype == "float32" else 2)))


def rows_schema(config: CollectionConfig, attributes: dict[str, pa.DataType]) -> pa.Schema:
    """The columns of `rows.arrow`."""
    return pa.schema(
        [
            pa.field("id", ID_ARROW_TYPE[config.id_type], nullable=False),
            pa.field("vector", vector_type(config.dimension, config.vector_dtype), nullable=False),
            pa.field("id_hash", pa.uint64(), nullable=False),
            *(pa.field(name, dtype) for name, dtype in attributes.items()),
        ]
    )


def write_rows(path: Path, schema: pa.Schema, batches: Iterator[Any]) -> None:
    """Write `rows.arrow`: uncompressed, so that it can be memory-mapped. All batches but the last of equal size.

    Memory that would be kept for the next batches is given back: an index is built next.
    """
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            del batch  # else it would be there while the next one is made
    give_back_memory()


def _mapping(path: Path) -> mmap.mmap:
    """The whole file, read-only; ValueError where it is empty."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


class Rows:
    """The memory-mapped rows of one segment."""

    def __init__(self, path: Path, count: int, dimension: int, rows_per_batch: int) -> None:
        self.count = count
        self.dimension = dimension
        self._per_batch = rows_per_batch
        try:
            self._mapping = _mapping(path)
            mapped = pa.py_buffer(self._mapping)
            reader = pa.ipc.open_file(mapped)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except ValueError as error:  # an ArrowInvalid is one
            raise Corrupt(f"{path}: not an Arrow file: {error}") from error
        self.schema = reader.schema
        self._check_shape(path)
        self._vector_numbers, self._shifts = self._numbers(mapped)
        self._hashes = [batch.column("id_hash").to_numpy() for batch in self._batches]  # views of the mapping
        self._first_hashes = np.array([hashes[0] for hashes in self._hashes], dtype=np.uint64)

    @property
    def row_bytes(self) -> int:
        """Of a row in the file, attributes and all: the mean."""
        return max(1, len(self._mapping) // max(1, self.count))

    def forget_pages(self) -> None:
        """Give back the pages of the file that were read so far; they are mapped again when they are needed."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def _check_shape(self, path: Path) -> None:
        sizes = [batch.num_rows for batch in self._batches]
        if sum(sizes) != self.count or any(size != self._per_batch for size in sizes[:-1]):
            raise Corrupt(f"{path}: batches of {sizes[:3]}... rows do not make up {self.count} rows")

    def _numbers(self, mapped: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The whole file as overlapping runs of `dimension` numbers, and what is added to `row * dimension` to have the
        run that is the vector of a row of each batch. One index into the runs gathers rows of many batches at once.
        """
        starts = np.zeros(len(self._batches), dtype=np.int64)
        dtype = np.dtype(np.float32)
        for number, batch in enumerate(self._batches):
            view = vectors_view(batch.column("vector"))
            dtype = view.dtype
            starts[number] = (view.__array_interface__["data"][0] - mapped.address) // dtype.itemsize
        flat = np.frombuffer(mapped, dtype=dtype, count=mapped.size // dtype.itemsize)
        runs = max(0, len(flat) - self.dimension + 1)
        shape, strides = (runs, self.dimension), (dtype.itemsize, dtype.itemsize)
        shifts = starts - np.arange(len(starts)) * self._per_batch * self.dimension
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False), shifts

    def gather_vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of any rows, shape (*rows.shape, dimension) float32: a copy."""
        vectors: NDArray[Any] = self._vector_numbers[rows * self.dimension + self._shifts[rows // self._per_batch]]
        return vectors if vectors.dtype == np.float32 else vectors.astype(np.float32)

    def vectors(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32, shape (stop - start, dimension). A view where possible: do not write."""
        parts = []
        while start < stop:
            batch, first = divmod(start, self._per_batch)
            last = min(first + stop - start, self._per_batch)
            view = vectors_view(self._batches[batch].column("vector").slice(first, last - first))
            parts.append(view.astype(np.float32, copy=False))
            start += last - first
        if not parts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, vectors) of every record batch, in order."""
        for start in range(0, self.count, self._per_batch):
            yield start, self.vectors(start, min(start + self._per_batch, self.count))

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """A record batch of the given columns and rows, in the order asked; `rows` (n,), n >= 1."""
        return gather(self._batches, rows // self._per_batch, rows % self._per_batch, columns)

    def ids(self) -> Any:
        """Every row's id as one Arrow array, copied into memory."""
        return pa.concat_arrays([batch.column("id") for batch in self._batches])

    def rows_of_ids(self, ids: Any, hashes: NDArray[np.uint64] | None = None) -> NDArray[np.int64]:
        """The row of each id of an Arrow array, -1 where this segment does not hold it; shape (n,).

        `hashes` are those of the ids, where they are known already.
        """
        rows = np.full(len(ids), -1, dtype=np.int64)
        if len(ids) == 0 or self.count == 0:
            return rows
        hashes = hash_ids(ids) if hashes is None else hashes
        order = np.argsort(hashes)
        if len(self._batches) == 1:
            rows[order] = self._rows_in_batch(0, ids, order, hashes[order])
            return rows
        batches = np.maximum(0, np.searchsorted(self._first_hashes, hashes[order], side="left") - 1)
        starts = np.flatnonzero(np.append(True, batches[1:] != batches[:-1]))
        for start, stop in zip(starts, np.append(starts[1:], len(order)), strict=True):
            positions = order[start:stop]
            rows[positions] = self._rows_in_batch(int(batches[start]), ids, positions, hashes[positions])
        return rows

    def _rows_in_batch(
        self, number: int, ids: Any, positions: NDArray[np.int64], hashes: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Rows of the ids at `positions`, whose hashes begin in this batch if anywhere."""
        column = self._hashes[number]
        at = np.searchsorted(column, hashes, side="left")
        equal = column[np.minimum(at, len(column) - 1)] == hashes
        rows = np.where(equal, number * self._per_batch + at, -1)
        doubtful = at == len(column)  # its hash may begin the next batch; or another id has the same hash
        if equal.any():
            doubtful[equal] = _differ(self._batches[number].column("id"), at[equal], ids, positions[equal])
        for place in np.flatnonzero(doubtful):
            rows[place] = self._row_of_id(ids[int(positions[place])].as_py(), hashes[place])
        return rows

    def _row_of_id(self, value: int | str, digest: np.uint64) -> int:
        batch = max(0, int(np.searchsorted(self._first_hashes, digest, side="left")) - 1)
        while batch < len(self._batches) and self._first_hashes[batch] <= digest:
            hashes = self._hashes[batch]
            row = int(np.searchsorted(hashes, digest, side="left"))
            while row < len(hashes) and hashes[row] == digest:
                if self._batches[batch].column("id")[row].as_py() == value:
                    return batch * self._per_batch + row
                row += 1
            if row < len(hashes):
                return -1
            batch += 1
        return -1


def _differ(stored: Any, rows: NDArray[np.int64], wanted: Any, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the stored ids of `rows` are others than the wanted ones of `positions`, both Arrow arrays; (n,)."""
    if pa.types.is_integer(stored.type):  # without a copy, and without a kernel of Arrow, which costs more than these
        numbers: NDArray[Any] = wanted.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return stored.to_numpy()[rows] != numbers[positions]  # type: ignore[no-any-return]
    asked = wanted.take(pa.array(positions)).cast(stored.type)
    differ: NDArray[np.bool_] = pc.not_equal(stored.take(pa.array(rows)), asked).to_numpy(zero_copy_only=False)
    return differ
