"""Streams of query vectors that are read by a layout seen before: the same vectors, and the same refusals."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
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


def outcome(streams: VectorStreams, body: bytes) -> Any:
    try:
        vectors = streams.read(body)
    except Invalid as error:
        return str(error)
    return vectors.dtype, vectors.shape, vectors.tobytes()


def with_null_bits(null_count: int) -> bytes:
    values = pa.array(vectors_like(2).reshape(-1))
    bits = pa.py_buffer(b"\x03" + b"\0" * 63)
    return column_stream(pa.Array.from_buffers(pa.list_(values.type, 5), 2, [bits], null_count, children=[values]))


def test_layout_of_a_strange_stream_that_was_taken_holds_for_all_numbers() -> None:
    """Streams damaged or forged that Arrow still takes: where a layout was kept, no numbers make it wrong."""
    chance, layouts = random.Random(SEED), 0
    bases = [arrow_stream(vectors_like(1)), arrow_stream(vectors_like(1, np.float16)), with_null_bits(0)]
    bases += [bases[0] + b"trailing", with_null_bits(1)]
    for number in range(1_500):
        forged = bytearray(chance.choice(bases))
        for _ in range(chance.choice((1, 1, 2, 3))):
            forged[chance.randrange(len(forged))] = chance.choice((0, 1, 2, 8, 16, 24, 40, 64, chance.randrange(256)))
        warm = VectorStreams()
        outcome(warm, bytes(forged))
        for layout in warm._layouts.values():
            layouts += 1
            size = len(forged) - len(layout.head) - len(layout.tail)
            for numbers in (b"\0" * size, b"\xff" * size, chance.randbytes(size)):
                body = layout.head + numbers + layout.tail
                assert outcome(warm, body) == outcome(VectorStreams(), body), (SEED, number)
    assert layouts > 100


def test_stream_of_the_other_byte_order_is_read_right_each_time() -> None:
    native = pa.schema([pa.field("vector", pa.list_(pa.float32(), 2))]).serialize().to_pybytes()
    stream = arrow_stream(np.array([[1.0, 2.0]], np.float32))
    assert stream.startswith(native)
    streams = VectorStreams()
    for position in range(len(native)):  # the schema's field `endianness` is among them
        for _ in range(2):
            forged = bytearray(stream)
            forged[position] ^= 1
            assert outcome(streams, bytes(forged)) == outcome(VectorStreams(), bytes(forged)), position


def test_layouts_are_kept_while_threads_read() -> None:
    """Large bodies are read in threads."""
    streams = VectorStreams()
    bodies = [
        (arrow_stream(vectors), vectors) for vectors in (vectors_like(n, np.float32, (n, 2)) for n in range(1, 300))
    ]

    def read_all(turn: int) -> bool:
        return all((streams.read(body) == vectors).all() for body, vectors in bodies[turn:] + bodies[:turn])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(0, 300, 25)))
    assert len(streams._layouts) <= LAYOUTS_MAX + 4


def test_new_layout_of_a_known_length_puts_no_other_out() -> None:
    streams = VectorStreams()
    for rows in range(1, LAYOUTS_MAX + 1):
        streams.read(arrow_stream(vectors_like(rows, np.float32, (8 * rows, 2))))
    lengths = set(streams._layouts)
    streams.read(arrow_stream(vectors_like(1, np.float32, (4, 4))))
    assert set(streams._layouts) == lengths
    assert streams._layouts[len(arrow_stream(vectors_like(1, np.float32, (8, 2))))].shape == (4, 4)
