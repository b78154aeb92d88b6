"""64-bit hashes of Arrow values, column by column: of what is stored, wherever it lies. For checksums of one process or
job, not for storage: they may be others in another version."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cluster.ids import splitmix64

Hashes = NDArray[np.uint64]
NULL = np.uint64(0)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_map)


def hash_values(column: Any) -> Hashes:
    """Of each value of an Arrow array, (n,) uint64; of null 0.

    Equal values of one type have the same hash, bit by bit: 0.0 and -0.0 are two, and so are NaNs of other bits. What a
    dictionary or an extension type stands for is what counts, and of a list the order.
    """
    hashes = _of_type(column, column.type)
    return np.where(column.is_null().to_numpy(zero_copy_only=False), NULL, hashes) if column.null_count else hashes


def hash_row_values(batch: Any) -> Hashes:
    """Of all columns of a record batch together, (n,) uint64: the order of the columns, and those that are null, leave
    it as it is."""
    total = np.zeros(batch.num_rows, dtype=np.uint64)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        hashes = hash_values(column)
        total += np.where(hashes == NULL, NULL, splitmix64(hashes + _seed(name)))
    return total


def _of_type(column: Any, dtype: Any) -> Hashes:
    """Of values that are not null; anything of the others."""
    if isinstance(dtype, pa.BaseExtensionType):
        return hash_values(column.storage)
    if pa.types.is_null(dtype):
        return np.zeros(len(column), dtype=np.uint64)
    if pa.types.is_dictionary(dtype):
        return _of_dictionary(column)
    if _is(dtype, TEXTS):
        return _of_texts(column)
    if pa.types.is_struct(dtype):
        fields = [column.field(number) for number in range(dtype.num_fields)]
        names = [dtype.field(number).name for number in range(dtype.num_fields)]
        return splitmix64(hash_row_values(pa.record_batch(fields, names)) + np.uint64(1)) if fields else _ones(column)
    if _is(dtype, LISTS):
        offsets = column.offsets.to_numpy().astype(np.int64)
        return _of_lists(column.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0])
    if pa.types.is_fixed_size_list(dtype):
        size = dtype.list_size
        return _of_lists(
            column.values.slice(column.offset * size, len(column) * size), np.arange(len(column) + 1) * size
        )
    if pa.types.is_boolean(dtype):
        return _of_type(column.cast(pa.uint8()), pa.uint8())
    width = _width(dtype)
    return _of_bytes(column, width) if width else _of_objects(column)


def _is(dtype: Any, kinds: Sequence[Any]) -> bool:
    return any(is_kind(dtype) for is_kind in kinds)


def _width(dtype: Any) -> int:
    """Bytes of a value; 0 where that is not one number."""
    try:
        return int(dtype.byte_width)
    except ValueError:
        return 0


def _of_bytes(column: Any, width: int) -> Hashes:
    """Numbers, times, decimals: words of up to 8 bytes, mixed one after the other."""
    count, words = len(column), -(-width // 8)
    if not count:
        return np.empty(0, dtype=np.uint64)
    start = column.offset * width
    stored = np.frombuffer(column.buffers()[1], dtype=np.uint8)[start : start + count * width]
    wide = np.zeros((count, 8 * words), dtype=np.uint8)
    wide[:, :width] = stored.reshape(count, width)
    hashes = np.full(count, width, dtype=np.uint64)
    for word in wide.view(np.uint64).T:
        hashes = splitmix64(hashes ^ word)
    return hashes


def _of_texts(column: Any) -> Hashes:
    plain = column.cast(pa.large_binary())
    _, starts, data = plain.buffers()
    if not len(plain):
        return np.empty(0, dtype=np.uint64)
    offsets = np.frombuffer(starts, dtype=np.int64)[plain.offset : plain.offset + len(plain) + 1].tolist()
    text, digest = memoryview(data) if data is not None else memoryview(b""), xxhash.xxh3_64_intdigest
    return np.fromiter((digest(text[a:b]) for a, b in pairwise(offsets)), dtype=np.uint64, count=len(plain))


def _of_dictionary(column: Any) -> Hashes:
    hashes = hash_values(column.dictionary)
    if not len(hashes):
        return np.zeros(len(column), dtype=np.uint64)
    places: NDArray[np.int64] = column.indices.fill_null(0).to_numpy().astype(np.int64)
    return hashes[places]


def _of_lists(values: Any, offsets: NDArray[np.int64]) -> Hashes:
    """List i has the values `offsets[i]` to `offsets[i + 1]`: each is mixed with its place in the list."""
    lengths = np.diff(offsets)
    places = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    mixed = splitmix64(hash_values(values) + splitmix64(places.astype(np.uint64)))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return splitmix64(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def _of_objects(column: Any) -> Hashes:
    """Types that are none of these, such as unions and views: one by one."""
    return np.array([_seed(repr(value)) for value in column.to_pylist()], dtype=np.uint64)


def _ones(column: Any) -> Hashes:
    return np.ones(len(column), dtype=np.uint64)


def _seed(text: str) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(text.encode()))
