"""Frames: whatever bytes come in whatever pieces, the result is frames or a FrameError, and memory is bounded."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import frames
from actors.frames import Frame, FrameError, FrameReader, WrongVersion, encode_frame, milliseconds

BYTES_MAX = 200_000
KINDS = st.sampled_from(sorted(frames.KINDS))
SIZES = st.one_of(st.integers(0, 100), st.integers(60_000, 90_000))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int, int, bytes, bytes]]]:
    """Some frames, as bytes and as what is in them."""
    told = []
    for _ in range(draw(st.integers(0, 6))):
        body = random.Random(draw(st.integers(0, 99))).randbytes(draw(SIZES))
        number, timeout_ms = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, frames.TIMEOUT_MS_MAX))
        told.append((draw(KINDS), number, timeout_ms, draw(st.binary(max_size=40)), body))
    return b"".join(part for frame in told for part in encoded(*frame)), told


def encoded(kind: int, call: int, timeout_ms: int, head: bytes, body: bytes) -> list[frames.Part]:
    half = len(body) // 2
    return encode_frame(kind, call, timeout_ms, head, [body[:half], memoryview(body)[half:]])


def feed(reader: FrameReader, stream: bytes, pieces: random.Random) -> list[Frame]:
    """The frames of a stream that comes in random pieces."""
    found, at = [], 0
    while at < len(stream):
        room = reader.room()
        assert 0 < len(room) <= max(frames.SCRATCH_BYTES, reader.frame_bytes_max)
        count = min(len(room), len(stream) - at, pieces.choice((1, 7, 23, 24, 25, 1_000, 100_000)))
        room[:count] = stream[at : at + count]
        at += count
        found += reader.received(count)
    return found


def told_by(found: list[Frame]) -> list[tuple[int, int, int, bytes, bytes]]:
    return [(f.kind, f.call, f.timeout_ms, bytes(f.head), bytes(f.body)) for f in found]


@settings(deadline=None)
@given(streams(), st.integers(0, 2**32))
def test_frames_in_any_pieces_are_what_was_sent(
    stream: tuple[bytes, list[tuple[int, int, int, bytes, bytes]]], seed: int
) -> None:
    assert told_by(feed(FrameReader(BYTES_MAX), stream[0], random.Random(seed))) == stream[1]


@settings(deadline=None)
@given(st.binary(max_size=2_000), st.integers(0, 2**32))
def test_random_bytes_are_a_frame_error_or_wait_for_more(data: bytes, seed: int) -> None:
    try:
        assert feed(FrameReader(BYTES_MAX), data, random.Random(seed)) == []
    except FrameError as error:
        assert len(str(error)) < 200  # noqa: PT017  # no error at all is fine, too


@settings(deadline=None)
@given(streams(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
       st.integers(0, 2**32))  # fmt: skip
def test_changed_bytes_are_frames_or_a_frame_error(
    stream: tuple[bytes, list[tuple[int, int, int, bytes, bytes]]], changes: list[tuple[int, int]], seed: int
) -> None:
    data = bytearray(stream[0] + encode_frame(frames.CANCEL, 7, 0, b"")[0])
    for at, value in changes:
        data[at % len(data)] = value
    reader = FrameReader(BYTES_MAX)
    try:
        found = feed(reader, bytes(data), random.Random(seed))
    except FrameError:
        return
    assert len(found) <= len(data) // frames.PREFIX.size
    assert all(frame.kind in frames.KINDS and len(frame.head) + len(frame.body) <= BYTES_MAX for frame in found)


def test_a_large_frame_is_received_into_a_buffer_of_its_own() -> None:
    body = random.Random(1).randbytes(150_000)
    reader = FrameReader(BYTES_MAX)
    stream = b"".join(encode_frame(frames.ANSWER, 1, 0, b"head", [body]))
    reader.room()[:1_000] = stream[:1_000]
    assert list(reader.received(1_000)) == []
    room = reader.room()
    assert len(room) == len(stream) - 1_000
    room[:] = stream[1_000:]
    (frame,) = reader.received(len(room))
    assert frame.body.obj is room.obj
    assert bytes(frame.body) == body
    assert len(reader.room()) == frames.SCRATCH_BYTES


def test_large_parts_are_sent_as_they_lie() -> None:
    body = memoryview(bytearray(100_000))
    assert encode_frame(frames.SEARCH, 1, 0, b"head", [body])[1] is body


@pytest.mark.parametrize(
    ("prefix", "error", "words"),
    [
        ((0x4547, 2, frames.SEARCH, 0, 1, 0, 0), FrameError, "begins with b'GE'"),
        ((frames.MAGIC, 4, frames.SEARCH, 0, 1, 0, 0), WrongVersion, "version 4, this is version 3"),
        ((frames.MAGIC, 3, 99, 0, 1, 0, 0), FrameError, "unknown kind 99"),
        ((frames.MAGIC, 3, frames.SEARCH, 0, 1, 1, BYTES_MAX), FrameError, f"at most {BYTES_MAX}"),
        ((frames.MAGIC, 3, frames.SEARCH, 0, 1, 2**32 - 1, 2**32 - 1), FrameError, f"at most {BYTES_MAX}"),
    ],
)
def test_prefix_that_is_wrong(prefix: tuple[int, ...], error: type[FrameError], words: str) -> None:
    with pytest.raises(error, match=words):
        feed(FrameReader(BYTES_MAX), frames.PREFIX.pack(*prefix), random.Random(0))


def test_milliseconds_are_rounded_up_and_bounded() -> None:
    assert [milliseconds(s) for s in (-1.0, 0.0, 0.0001, 1.5, 1e12, math.inf)] == [
        0, 0, 1, 1_500, frames.TIMEOUT_MS_MAX, frames.TIMEOUT_MS_MAX]  # fmt: skip
