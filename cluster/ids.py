"""Point ids: int64 or strings, held as Arrow arrays, and their stable 64-bit hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cluster.config import IdType
from cluster.errors import Invalid

ID_ARROW_TYPE: dict[str, pa.DataType] = {"int64": pa.int64(), "string": pa.large_string()}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def id_array(ids: Sequence[int | str], id_type: IdType) -> pa.Array:
    """Arrow array of the collection's id type; raises Invalid with the position of the first wrong id."""
    for position, value in enumerate(ids):
        if id_type == "int64":
            if not isinstance(value, int) or isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
                raise Invalid.at(f"ids[{position}]", f"must be an int64, not {value!r}")
        elif not isinstance(value, str):
            raise Invalid.at(f"ids[{position}]", f"must be a string, not {value!r}")
    try:
        return pa.array(ids, type=ID_ARROW_TYPE[id_type])
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise Invalid.at("ids", f"must be valid UTF-8: {error}") from None


def hash_ids(ids: Any) -> NDArray[np.uint64]:
    """Stable hash of each id, shape (n,) uint64: the same in every process, version and machine.

    int64 ids go through the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); strings through XXH3
    of their UTF-8 bytes. Stored data depends on it: it must never change.
    """
    if pa.types.is_integer(ids.type):
        return splitmix64(ids.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64))
    digests = (xxhash.xxh3_64_intdigest(text.encode()) for text in ids.to_pylist())
    return np.fromiter(digests, dtype=np.uint64, count=len(ids))


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
