"""The direct connection's end in a coordinator: `ShardClient` by frames, with one connection per replica's process.

Many calls are in flight on a connection; each is a future that the received frame resolves. A connection is made when
it is needed first, and again after it was lost, which fails all calls on it at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from actors import frames, handshake
from actors import shard_messages as messages
from actors.call_deadlines import CallDeadlines
from actors.frames import Frame, FrameError, FrameReader
from actors.handshake import Challenge, Hello, Proof, Ready, Refused
from actors.shard_client import CALL_TIMEOUT_S, ShardEndpoint
from actors.sockets import prepare_socket
from cluster.errors import EaglerayError, Exhausted, Unavailable
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, ShardSearch
from cluster.write import PointWrite, WriteOutcome

CONNECT_TIMEOUT_S = 3.0
ANSWER_SLACK_S = 0.25  # a replica's own word on a call that is late says more than ours
BUFFERED_BYTES = 4 * 1024 * 1024  # of requests; beyond it calls wait until the replica has taken some
NOTHING_APPLIED = "nothing was applied"
MAYBE_APPLIED = "the write may have been applied or not"
CLOSED = "was closed: the replica has another process now, or none"
logger = logging.getLogger(__name__)


class Link(asyncio.BufferedProtocol):
    """One TCP connection to a replica's process, from the handshake to its loss.

    `shaken` is done once the handshake is: calls may be sent, or it is `lost` already.
    """

    def __init__(self, key: ReplicaKey, endpoint: ShardEndpoint, loop: asyncio.AbstractEventLoop) -> None:
        self.shaken: asyncio.Future[None] = loop.create_future()
        self.lost = ""  # why, once it is
        self.frame_bytes_max = 0  # as the replica told it
        self._key = str(key)
        self._secret = endpoint.secret
        self._nonce = handshake.new_nonce()
        self._proved = False  # the replica has
        self._reader = FrameReader(handshake.HANDSHAKE_FRAME_BYTES_MAX)
        self._calls: dict[int, asyncio.Future[Frame | None]] = {}
        self._deadlines = CallDeadlines(loop, self._late)
        self._numbers = itertools.count(1)
        self._loop = loop
        self._writable: asyncio.Future[None] | None = None  # while requests wait to be sent
        self._transport: asyncio.Transport | None = None

    # --- the connection -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's own class
        prepare_socket(transport)
        transport.set_write_buffer_limits(BUFFERED_BYTES)
        self._say(frames.HELLO, Hello(self._key, self._nonce))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._reader.received(nbytes):
                if self.lost:
                    return
                if self.shaken.done():
                    self._take(frame)
                else:
                    self._take_word(frame)
        except FrameError as error:
            logger.warning("replica %s: its connection is closed: %s", self._key, error)
            self.end(f"was closed: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(f"was lost: {exc}" if exc else "was closed by the replica")

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def end(self, reason: str) -> None:
        """Close it; every call that is in flight is told so, now. `reason` goes on after "the connection"."""
        if self.lost:
            return
        self.lost = reason
        if self._transport is not None:
            self._transport.abort()
        self._deadlines.clear()
        self.resume_writing()
        if not self.shaken.done():
            self.shaken.set_result(None)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_result(None)

    # --- the handshake ------------------------------------------------------------------------------------------

    def _take_word(self, frame: Frame) -> None:
        try:
            if frame.kind == frames.CHALLENGE:
                self._answer(msgspec.msgpack.decode(frame.head, type=Challenge))
            elif frame.kind == frames.READY:
                self._begin(msgspec.msgpack.decode(frame.head, type=Ready))
            elif frame.kind == frames.REFUSED:
                self.end(f"was refused: {msgspec.msgpack.decode(frame.head, type=Refused).reason}")
            else:
                raise FrameError(f"a frame of kind {frame.kind} before the handshake is done")
        except (msgspec.MsgspecError, RecursionError) as error:
            raise FrameError(f"a malformed frame of kind {frame.kind}: {error}") from error

    def _answer(self, challenge: Challenge) -> None:
        if len(challenge.nonce) != handshake.NONCE_BYTES:
            raise FrameError(f"a nonce of {len(challenge.nonce)} bytes")
        if not handshake.proves(challenge.proof, self._proof(handshake.SERVER, challenge.nonce)):
            self.end("was given up: who listens there does not know the secret")
            return
        self._proved = True
        self._say(frames.PROOF, Proof(self._proof(handshake.CLIENT, challenge.nonce)))

    def _begin(self, ready: Ready) -> None:
        if not self._proved:
            raise FrameError("it has proved nothing")
        self.frame_bytes_max = self._reader.frame_bytes_max = ready.frame_bytes_max
        self.shaken.set_result(None)

    def _proof(self, role: bytes, server_nonce: bytes) -> bytes:
        return handshake.prove(self._secret, role, self._key, self._nonce, server_nonce)

    def _say(self, kind: int, word: msgspec.Struct) -> None:
        self._send(frames.encode_frame(kind, 0, 0, msgspec.msgpack.encode(word)))

    def _send(self, frame: list[frames.Part]) -> None:
        if self._transport is not None and not self.lost:
            self._transport.writelines(frame)

    # --- calls --------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        if frame.kind not in (frames.ANSWER, frames.ERROR):
            raise FrameError(f"a frame of kind {frame.kind} is no answer")
        answer = self._calls.pop(frame.call, None)
        if answer is not None and not answer.done():  # else its caller gave up
            answer.set_result(frame)

    def _late(self, call: int) -> None:
        answer = self._calls.pop(call, None)
        if answer is not None and not answer.done():
            answer.set_result(None)
            self._cancel(call)

    def _cancel(self, call: int) -> None:
        self._send(frames.encode_frame(frames.CANCEL, call, 0, b""))

    @property
    def usable(self) -> bool:
        """Whether a call can be sent now."""
        return not self.lost and self._writable is None

    async def sendable(self) -> None:
        """Until a call can be sent, or it is lost."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    async def call(self, kind: int, message: messages.Message, timeout_s: float) -> Frame | None:
        """Send a request and await its answer; None where the connection is lost, or the answer late, meanwhile.

        Cancelled with its caller, also at the replica.
        """
        call = next(self._numbers)
        answer = self._loop.create_future()
        self._calls[call] = answer
        self._send(frames.encode_frame(kind, call, frames.milliseconds(timeout_s), *message))
        self._deadlines.add(call, timeout_s + ANSWER_SLACK_S)
        try:
            frame: Frame | None = await answer
        except asyncio.CancelledError:
            self._cancel(call)
            raise
        finally:
            self._calls.pop(call, None)
            self._deadlines.remove(call)
        return frame


class ShardConnection:
    """The way to one process of a replica: a `Link` that is made when it is needed."""

    def __init__(self, key: ReplicaKey, endpoint: ShardEndpoint, tls: ssl.SSLContext | None = None) -> None:
        self.endpoint = endpoint
        self._key = key
        self._tls = tls
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._patience: asyncio.Timeout | None = None  # with that attempt
        self._closed = False

    async def call(self, kind: int, message: messages.Message, timeout_s: float) -> Frame:
        """The answer to a request, within `timeout_s` and a little for it to travel.

        Raises what the replica raised; Unavailable where it cannot be reached, is lost meanwhile, or is late;
        Exhausted where the request is too large.
        """
        link = self._link
        if link is None or not link.usable:
            link = await self._usable(kind, timeout_s)
        size = frames.frame_bytes(*message)
        if size > link.frame_bytes_max:
            raise Exhausted(f"the request has {size} bytes, a replica takes at most {link.frame_bytes_max}: send less")
        frame = await link.call(kind, message, timeout_s)
        if frame is None:
            late = f"it did not answer within {timeout_s:g} s"
            raise self._unavailable(kind, f"the connection {link.lost}" if link.lost else late, MAYBE_APPLIED)
        if frame.kind == frames.ERROR:
            raise messages.decode_error(frame.head)
        return frame

    async def _usable(self, kind: int, timeout_s: float) -> Link:
        """A link that a call can be sent on; Unavailable where there is none in time: nothing was sent."""
        try:
            async with asyncio.timeout(timeout_s):
                link = self._link
                if link is None or link.lost:
                    link = await asyncio.shield(self._attempt())
                await link.sendable()
        except TimeoutError:
            raise self._unavailable(kind, f"it was not reached within {timeout_s:g} s", NOTHING_APPLIED) from None
        if link.lost:
            raise self._unavailable(kind, f"the connection {link.lost}", NOTHING_APPLIED)
        return link

    def _unavailable(self, kind: int, reason: str, became: str) -> Unavailable:
        """For a write, with what became of it."""
        return Unavailable(f"replica {self._key}: {reason}" + (f"; {became}" if kind == frames.WRITE else ""))

    def _attempt(self) -> asyncio.Task[Link]:
        """To connect, once for all that wait for it; who gives up does not end it for the others."""
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(self._attempted)
        return self._connecting

    def _attempted(self, attempt: asyncio.Task[Link]) -> None:
        self._connecting = None
        if not attempt.cancelled():
            self._link = attempt.result()

    async def _connect(self) -> Link:
        """A link after its handshake; one that is lost says why."""
        loop = asyncio.get_running_loop()
        link = Link(self._key, self.endpoint, loop)
        if self._closed:
            link.end(CLOSED)
            return link
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S) as self._patience:
                await loop.create_connection(lambda: link, self.endpoint.host, self.endpoint.port, ssl=self._tls)
                await link.shaken
        except TimeoutError:
            link.end(CLOSED if self._closed else f"to {self.endpoint} was not made within {CONNECT_TIMEOUT_S:g} s")
        except OSError as error:
            link.end(f"to {self.endpoint} was not made: {error}")
        finally:
            self._patience = None
        if self._closed:
            link.end(CLOSED)
        return link

    def close(self) -> None:
        """Its process is gone, or another one took its place. Calls fail at once, also those that wait to connect."""
        self._closed = True
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())
        if self._link is not None:
            self._link.end(CLOSED)


class DirectShardClient:
    """`ShardClient` over a `ShardConnection`."""

    def __init__(self, connection: ShardConnection) -> None:
        self.connection = connection

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        answer = await self.connection.call(frames.SEARCH, messages.encode_search(request), request.timeout_s)
        if len(answer.body) < messages.BESIDE_BYTES:
            return messages.decode_outcomes(answer.head, answer.body)
        return await asyncio.to_thread(messages.decode_outcomes, answer.head, answer.body)

    async def fetch(
        self,
        generation: int,
        ids: Any,
        columns: Sequence[str],
        min_lsn: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Fetched:
        message = messages.encode_fetch(generation, ids, columns, min_lsn)
        answer = await self.connection.call(frames.FETCH, message, timeout_s)
        return await messages.beside(len(answer.body), messages.decode_fetched, answer.head, answer.body)

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        size = sum(write.size_bytes for write in writes)
        message = await messages.beside(size, messages.encode_writes, writes)
        answer = await self.connection.call(frames.WRITE, message, timeout_s)
        return messages.decode_written(answer.head, answer.body)


class DirectConnections:
    """Clients of all replicas that listen, by the endpoints of the last serving table. Used within one event loop."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._clients: dict[ReplicaKey, DirectShardClient] = {}

    def update(self, endpoints: Mapping[ReplicaKey, ShardEndpoint]) -> None:
        """Keep the connections whose endpoints stay, close the others."""
        for key, client in list(self._clients.items()):
            if endpoints.get(key) != client.connection.endpoint:
                del self._clients[key]
                client.connection.close()
        for key, endpoint in endpoints.items():
            if key not in self._clients:
                self._clients[key] = DirectShardClient(ShardConnection(key, endpoint, self._tls))

    def client(self, key: ReplicaKey) -> DirectShardClient | None:
        """None where the replica does not listen, or that is not known yet."""
        return self._clients.get(key)

    def close(self) -> None:
        self.update({})
