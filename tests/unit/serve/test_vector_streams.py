"""Streams of query vectors that are read by a layout seen before: the same vectors, and the same refusals."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import Invalid
from serve import vector_streams
from serve.vector_streams import LAYOUTS_MAX, VectorStreams
from tests.unit.serve.endpoint import arrow_stream, stream_of

SEED = 20_240_601
SHAPE = (2, 5)


def vectors_like(seed: int, dtype: Any = np.float32, shape: tuple[int, int] = SHAPE) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def whole_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the streams that Arrow reads from now on."""
    lengths: list[int] = []

    def counted(body: bytes) -> Any:
        lengths.append(len(body))
        return read_batches(body)

    read_batches = vector_streams.read_batches
    monkeypatch.setattr(vector_streams, "read_batches", counted)
    return lengths


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_streams_of_one_layout_are_read_by_arrow_once(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, streams = whole_reads(monkeypatch), VectorStreams()
    for seed in range(4):
        vectors = vectors_like(seed, dtype)
        read = streams.read(arrow_stream(vectors))
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, vectors)
    assert len(reads) == 1


def test_vectors_are_a_view_of_the_body() -> None:
    streams = VectorStreams()
    for seed in range(2):
        body = arrow_stream(vectors_like(seed))
        address = streams.read(body).ctypes.data - pa.py_buffer(body).address
        assert 0 < address < len(body)


def test_numbers_that_are_not_finite_are_read_as_they_are() -> None:
    streams = VectorStreams()
    streams.read(arrow_stream(vectors_like(1)))
    strange = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]] * 2, np.float32)
    np.testing.assert_array_equal(streams.read(arrow_stream(strange)), strange)


def test_streams_of_the_same_length_and_other_layouts_are_told_apart() -> None:
    streams = VectorStreams()
    arrays = [vectors_like(seed, np.float32, shape) for seed, shape in enumerate([(4, 4), (8, 2), (2, 8)])]
    bodies = [(arrow_stream(vectors), vectors) for vectors in arrays]
    lengths = {len(body) for body, _ in bodies}
    assert len(lengths) == 1
    for _ in range(2):
        for body, vectors in bodies:
            read = streams.read(body)
            assert (read.dtype, read.shape) == (vectors.dtype, vectors.shape)
            np.testing.assert_array_equal(read, vectors)


def test_damaged_stream_is_read_or_refused_as_by_a_reader_that_knows_no_layout() -> None:
    whole, chance = arrow_stream(vectors_like(1)), random.Random(SEED)
    warm, outcomes = VectorStreams(), set()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= chance.randrange(1, 256)
        answers = []
        for streams in (warm, VectorStreams()):
            warm.read(whole)
            try:
                answers.append(streams.read(bytes(damaged)).tobytes())
            except Invalid as error:
                answers.append(str(error))
        assert answers[0] == answers[1], (SEED, position)
        outcomes.add(type(answers[0]))
    assert outcomes == {bytes, str}


def column_stream(column: Any) -> bytes:
    batch = pa.record_batch([column], names=["vector"])
    return stream_of([batch], batch.schema)


def test_null_is_refused_after_a_stream_without_nulls_of_that_shape() -> None:
    streams, dtype = VectorStreams(), pa.list_(pa.float32(), 2)
    rows: list[Any] = [[1.0, 2.0], [3.0, 4.0]]
    assert streams.read(column_stream(pa.array(rows, dtype))).tolist() == rows
    for wrong in ([[1.0, 2.0], None], [[1.0, 2.0], [None, 4.0]]):
        for _ in range(2):
            with pytest.raises(Invalid, match="nulls"):
                streams.read(column_stream(pa.array(wrong, dtype)))


def test_stream_with_null_bits_is_read_by_arrow_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its null bits may lie anywhere, even within the numbers."""
    values = pa.array([1.0, 2.0, 3.0, 4.0], pa.float32())
    bits = pa.py_buffer(b"\x03" + b"\0" * 63)
    column = pa.Array.from_buffers(pa.list_(pa.float32(), 2), 2, [bits], 0, children=[values])
    body = column_stream(column)
    reads, streams = whole_reads(monkeypatch), VectorStreams()
    stored = pa.ipc.open_stream(body).read_next_batch().column(0).buffers()[0]
    for _ in range(2):
        assert streams.read(body).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert len(reads) == (1 if stored is None else 2)


def test_several_batches_are_read_by_arrow_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, streams = whole_reads(monkeypatch), VectorStreams()
    body = arrow_stream(vectors_like(1), vectors_like(2))
    for _ in range(2):
        np.testing.assert_array_equal(streams.read(body), np.concatenate([vectors_like(1), vectors_like(2)]))
    assert len(reads) == 2


def test_layouts_are_bounded_and_so_is_what_each_keeps() -> None:
    streams = VectorStreams()
    for rows in range(1, LAYOUTS_MAX + 20):
        vectors = vectors_like(rows, np.float32, (rows, 2))
        np.testing.assert_array_equal(streams.read(arrow_stream(vectors)), vectors)
    assert len(streams._layouts) == LAYOUTS_MAX
    before = dict(streams._layouts)
    batch = pa.record_batch([pa.array([[1.0]], pa.list_(pa.float32(), 1))], names=["vector"])
    large = batch.replace_schema_metadata({"note": "x" * 10_000})
    assert streams.read(stream_of([large], large.schema)).tolist() == [[1.0]]
    assert streams._layouts == before
