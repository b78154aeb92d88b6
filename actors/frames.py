"""Frames of the direct connection between a coordinator and a replica: bytes to frames and back, nothing else.

A frame is a prefix of 24 bytes, a head (msgpack), padding, and a body (arrays as they lie in memory). Head and body
begin at multiples of `ALIGNMENT` in the buffer that they are received into, so that numpy and Arrow look at them there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

MAGIC = 0x5245  # "ER" in the stream
VERSION = 3
PREFIX = struct.Struct("<HBBIQII")  # magic, version, kind, time left in ms, call, bytes of head and of body
ALIGNMENT = 16
SCRATCH_BYTES = 64 * 1024  # small frames are received many at a time
JOIN_BYTES = 16 * 1024  # what is smaller is copied into one piece rather than sent as pieces
TIMEOUT_MS_MAX = 2**32 - 1
BYTES_MAX = 2**31  # of any frame: what fits into a prefix, with room to spare

HELLO, CHALLENGE, PROOF, READY, REFUSED = 1, 2, 3, 4, 5
SEARCH, FETCH, WRITE, CANCEL = 16, 17, 18, 19
ANSWER, ERROR = 32, 33
KINDS = frozenset({HELLO, CHALLENGE, PROOF, READY, REFUSED, SEARCH, FETCH, WRITE, CANCEL, ANSWER, ERROR})

Part = bytes | memoryview  # a memoryview of single bytes


class FrameError(Exception):
    """What was received is no frame, or one that is too large: the connection is of no use any more."""


class WrongVersion(FrameError):
    """The other side speaks another version of this protocol."""


class Frame(NamedTuple):
    """A received frame. `call` is chosen by the client; `timeout_ms` is how long it still waits for an answer."""

    kind: int
    call: int
    timeout_ms: int
    head: memoryview
    body: memoryview

    @property
    def timeout_s(self) -> float:
        return self.timeout_ms / 1000.0


def milliseconds(timeout_s: float) -> int:
    """Seconds as a frame tells them: rounded up, within what fits."""
    return min(max(0, math.ceil(timeout_s * 1000.0)), TIMEOUT_MS_MAX) if timeout_s < math.inf else TIMEOUT_MS_MAX


def padding(size: int) -> int:
    """The bytes after `size` ones until the next multiple of `ALIGNMENT`."""
    return -size % ALIGNMENT


def encode_frame(kind: int, call: int, timeout_ms: int, head: bytes, body: Sequence[Part] = ()) -> list[Part]:
    """A frame as pieces to be sent one after the other; large pieces of the body are not copied."""
    size = sum(map(len, body))
    start = PREFIX.pack(MAGIC, VERSION, kind, timeout_ms, call, len(head), size) + head + bytes(padding(len(head)))
    if size <= JOIN_BYTES:
        return [b"".join((start, *body))]
    return [start, *body]


def frame_bytes(head: bytes, body: Sequence[Part]) -> int:
    """What counts against the bound of a frame's size."""
    return len(head) + padding(len(head)) + sum(map(len, body))


class FrameReader:
    """Finds the frames in a stream of bytes. Receive into `room()`, then take the frames with `received(count)`.

    Small frames are copied out of a scratch buffer; one that has not arrived whole gets a buffer of its own, which the
    rest of it is received into. It never holds more than the scratch buffer and one frame.
    """

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._frame: memoryview | None = None  # of the frame that is being received: its head and body
        self._prefix = (0, 0, 0, 0)  # its kind, call, time left and bytes of its head
        self._filled = 0  # bytes in that frame, or else in the scratch buffer

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return (self._scratch if self._frame is None else self._frame)[self._filled :]

    def received(self, count: int) -> list[Frame]:
        """The frames that are complete with the `count` bytes that were put into `room()`. FrameError."""
        self._filled += count
        if self._frame is None:
            return self._cut()
        if self._filled < len(self._frame):
            return []
        done, self._frame, self._filled = self._frame, None, 0
        return [_frame_of(done, *self._prefix)]

    def _cut(self) -> list[Frame]:
        """The frames in the scratch buffer; the beginning of another goes where the rest of it will follow."""
        found: list[Frame] = []
        start, end, scratch = 0, self._filled, self._scratch
        while end - start >= PREFIX.size:
            kind, call, timeout_ms, head, size = self._read_prefix(start)
            begin = start + PREFIX.size
            start = begin + size
            if start > end:
                self._prefix = kind, call, timeout_ms, head
                self._frame, self._filled = memoryview(bytearray(size)), end - begin
                self._frame[: self._filled] = scratch[begin:end]
                return found
            found.append(_frame_of(memoryview(bytes(scratch[begin:start])), kind, call, timeout_ms, head))
        self._filled = end - start
        if start < end:
            scratch[: self._filled] = bytes(scratch[start:end])
        return found

    def _read_prefix(self, at: int) -> tuple[int, int, int, int, int]:
        """Kind, call, time left, bytes of the head, and of all that follows the prefix."""
        magic, version, kind, timeout_ms, call, head, body = PREFIX.unpack_from(self._scratch, at)
        if magic != MAGIC:
            raise FrameError(f"not a frame of this protocol: it begins with {bytes(self._scratch[at : at + 2])!r}")
        if version != VERSION:
            raise WrongVersion(f"protocol version {version}, this is version {VERSION}: run one release of Eagleray")
        if kind not in KINDS:
            raise FrameError(f"a frame of the unknown kind {kind}")
        size = head + padding(head) + body
        if size > self.frame_bytes_max:
            raise FrameError(f"a frame of {size} bytes, at most {self.frame_bytes_max} may come")
        return kind, call, timeout_ms, head, size


def _frame_of(data: memoryview, kind: int, call: int, timeout_ms: int, head: int) -> Frame:
    return Frame(kind, call, timeout_ms, data[:head], data[head + padding(head) :])
