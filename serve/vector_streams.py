"""Query vectors in Arrow streams, fast where a client sends the same kind of stream again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import Invalid
from serve.arrow_bodies import read_batches, vectors_of

LAYOUTS_MAX = 256  # one per length of body that clients send, such as each number of vectors
LAYOUT_BYTES_MAX = 4_096  # a schema and a record batch's metadata have some 360


@dataclass(frozen=True)
class _Layout:
    """What a stream holds around its numbers: `head` before them, `tail` after them.

    No other byte says anything of the numbers (there are no null bits, one column, one batch, nothing compressed). So
    a stream with this head and tail differs in its numbers only from one that was wholly checked, and every four
    bytes are some float32, every two some float16: there is nothing left to check.
    """

    head: bytes
    tail: bytes
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def vectors(self, body: bytes) -> NDArray[Any] | None:
        """The numbers as a view of the body; None where it is another kind of stream."""
        if not (body.startswith(self.head) and body.endswith(self.tail)):
            return None
        rows, dimension = self.shape
        return np.frombuffer(body, self.dtype, rows * dimension, len(self.head)).reshape(self.shape)


class VectorStreams:
    """Reads the `vector` column of streams. Remembers the layouts of some, by their length."""

    def __init__(self) -> None:
        self._layouts: dict[int, _Layout] = {}

    def read(self, body: bytes) -> NDArray[Any]:
        """FixedSizeList of float32 or float16 as an array of shape (n, dimension), a view of the body if it can be."""
        layout = self._layouts.get(len(body))
        vectors = layout.vectors(body) if layout is not None else None
        return self._read_checking(body) if vectors is None else vectors

    def _read_checking(self, body: bytes) -> NDArray[Any]:
        types, batches = read_batches(body)
        if not batches:
            raise Invalid.at("vector", "the stream holds no record batch")
        names = [column.name for column in types]
        if names != ["vector"]:
            raise Invalid.at("body", f"must hold exactly the column vector, not {', '.join(names) or 'none'}")
        views = [vectors_of(batch.column(0)) for batch in batches]
        if len(views) > 1:
            return np.concatenate(views)
        layout = _layout_of(body, batches[0].column(0), views[0])
        if layout is not None:
            if len(self._layouts) >= LAYOUTS_MAX and len(body) not in self._layouts:
                oldest = list(self._layouts)[0]  # noqa: RUF015  # in one step: large bodies are read in threads
                self._layouts.pop(oldest, None)
            self._layouts[len(body)] = layout
        return views[0]


def _layout_of(body: bytes, column: Any, vectors: NDArray[Any]) -> _Layout | None:
    """The layout of a checked stream of one batch; None where more than its numbers would have to be looked at."""
    if any(buffer is not None for buffer in column.buffers()[:-1]):  # null bits, which might share the numbers' bytes
        return None
    start = vectors.ctypes.data - pa.py_buffer(body).address
    stop = start + vectors.nbytes
    if not 0 <= start < stop <= len(body) or start % vectors.itemsize or len(body) - vectors.nbytes > LAYOUT_BYTES_MAX:
        return None
    return _Layout(body[:start], body[stop:], (len(vectors), vectors.shape[1]), vectors.dtype)
