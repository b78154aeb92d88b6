"""The direct connection's end in a replica's process: listens, lets in who knows the secret, and answers frames.

It has an event loop and a thread of its own, so that what the actor's loop does (status, loads, claims) never waits
behind searches. A call is a task that asks the replica; searches wait for each other only in the replica's own thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
import uvloop

from actors import frames, handshake
from actors import shard_messages as messages
from actors.call_deadlines import CallDeadlines
from actors.frames import Frame, FrameError, FrameReader, WrongVersion
from actors.handshake import Challenge, Hello, Proof, Ready, Refused
from actors.shard_client import ShardClient, ShardEndpoint
from actors.sockets import BACKLOG, listen, prepare_socket
from cluster.errors import EaglerayError, Exhausted
from cluster.placement import ReplicaKey
from cluster.query import Hits

CALLS_MAX = 1000  # on one connection at once, as many as an actor takes
UNPROVEN_MAX = 64  # connections whose other end has not proved anything yet
BUFFERED_BYTES = 4 * 1024 * 1024  # of answers; beyond it no further calls are read until the client has taken some
STALLED_S = 30.0  # after which a client that takes nothing loses its connection
DEADLINE_SLACK_S = 0.25  # the replica's own word on a call that is late comes first
logger = logging.getLogger(__name__)


class ShardServer:
    """Serves one replica, to all coordinators. `start` and `close` are called from outside of its thread."""

    def __init__(
        self,
        replica: ShardClient,
        key: ReplicaKey,
        frame_bytes_max: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.replica = replica
        self.key = key
        self.frame_bytes_max = frame_bytes_max
        self.secret = handshake.new_secret()
        self.connections: set[Connection] = set()
        self.unproven: set[Connection] = set()  # those of them whose other end has not proved anything yet
        self._tls = tls
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server

    def start(self, host: str, ports: range) -> ShardEndpoint:
        """Listen on one of the ports of this address (an empty range: any that is free). Unavailable where none is."""
        listening = listen(host, ports)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="direct", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(listening), self._loop).result()
        return ShardEndpoint(host, listening.getsockname()[1], self.secret)

    async def _serve(self, listening: socket.socket) -> None:
        patience_s = handshake.HANDSHAKE_TIMEOUT_S if self._tls else None
        self._server = await self._loop.create_server(
            lambda: Connection(self, self._loop),
            sock=listening,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=patience_s,
        )

    def close(self) -> None:
        """Stop listening, and end all connections and calls."""
        if self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for connection in tuple(self.connections):
            connection.abort()
        while self.connections:
            await asyncio.sleep(0)
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


class Connection(asyncio.BufferedProtocol):
    """One client of a `ShardServer`: `_take` is what the next frame goes to."""

    def __init__(self, server: ShardServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._reader = FrameReader(handshake.HANDSHAKE_FRAME_BYTES_MAX)
        self._take: Callable[[Frame], None] = self._take_hello
        self._client_nonce = b""
        self._server_nonce = b""
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._deadlines = CallDeadlines(loop, self._cancel)
        self._patience: asyncio.TimerHandle | None = None  # with the handshake, and later with one that takes nothing
        self._transport: asyncio.Transport
        self._peer = ""

    # --- the connection -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's own class
        self._peer = f"{self._server.key}: the connection of {transport.get_extra_info('peername')}"
        self._server.connections.add(self)
        if len(self._server.unproven) >= UNPROVEN_MAX:
            self._drop(f"{UNPROVEN_MAX} others have not proved yet that they may connect")
            return
        prepare_socket(transport)
        transport.set_write_buffer_limits(BUFFERED_BYTES)
        self._server.unproven.add(self)
        self._patience = self._loop.call_later(
            handshake.HANDSHAKE_TIMEOUT_S, self._drop, "it did not prove in time that it may connect"
        )

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._reader.received(nbytes):
                self._take(frame)
                if self._transport.is_closing():
                    return
        except WrongVersion as error:
            self._refuse(str(error))
        except FrameError as error:
            self._drop(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for what it asked for."""
        self._server.connections.discard(self)
        self._server.unproven.discard(self)
        self._lose_patience(None)
        self._deadlines.clear()
        for call in list(self._calls):
            self._cancel(call)

    def pause_writing(self) -> None:
        """The client is slow to take its answers: it gets no more calls in."""
        self._transport.pause_reading()
        self._lose_patience(
            self._loop.call_later(STALLED_S, self._drop, f"it took none of its answers for {STALLED_S:g} s")
        )

    def resume_writing(self) -> None:
        self._lose_patience(None)
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    def _lose_patience(self, timer: asyncio.TimerHandle | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = timer

    def _drop(self, reason: str) -> None:
        logger.warning("%s is closed: %s", self._peer, reason)
        self._transport.abort()

    # --- the handshake ------------------------------------------------------------------------------------------

    def _take_hello(self, frame: Frame) -> None:
        hello = _heard(frame, frames.HELLO, Hello)
        key = str(self._server.key)
        if len(hello.nonce) != handshake.NONCE_BYTES:
            raise FrameError(f"a nonce of {len(hello.nonce)} bytes")
        if hello.key != key:
            self._refuse(f"replica {hello.key[:200]!r} is not here, but {key}")
            return
        self._client_nonce, self._server_nonce = hello.nonce, handshake.new_nonce()
        self._say(frames.CHALLENGE, Challenge(self._server_nonce, self._proof(handshake.SERVER)))
        self._take = self._take_proof

    def _take_proof(self, frame: Frame) -> None:
        told = _heard(frame, frames.PROOF, Proof)
        if not handshake.proves(told.proof, self._proof(handshake.CLIENT)):
            self._refuse("its secret is another one")
            return
        self._lose_patience(None)
        self._server.unproven.discard(self)
        self._reader.frame_bytes_max = self._server.frame_bytes_max
        self._say(frames.READY, Ready(self._server.frame_bytes_max))
        self._take = self._take_call

    def _proof(self, role: bytes) -> bytes:
        server = self._server
        return handshake.prove(server.secret, role, str(server.key), self._client_nonce, self._server_nonce)

    def _say(self, kind: int, word: msgspec.Struct) -> None:
        self._transport.writelines(frames.encode_frame(kind, 0, 0, msgspec.msgpack.encode(word)))

    def _refuse(self, reason: str) -> None:
        """Say why before the connection is closed."""
        logger.warning("%s is refused: %s", self._peer, reason)
        self._say(frames.REFUSED, Refused(reason))
        self._transport.close()

    # --- calls --------------------------------------------------------------------------------------------------

    def _take_call(self, frame: Frame) -> None:
        call = frame.call
        if frame.kind == frames.CANCEL:
            self._deadlines.remove(call)
            self._cancel(call)
        elif frame.kind not in (frames.SEARCH, frames.FETCH, frames.WRITE):
            raise FrameError(f"a frame of kind {frame.kind} is no call")
        elif call in self._calls:
            raise FrameError(f"call {call} came twice")
        elif len(self._calls) >= CALLS_MAX:
            refusal = Exhausted(f"replica {self._server.key}: {CALLS_MAX} calls wait already; nothing was done", 0.1)
            self._send(call, frames.ERROR, messages.encode_error(refusal))
        else:
            self._calls[call] = self._loop.create_task(self._answer(frame))
            self._deadlines.add(call, frame.timeout_s + DEADLINE_SLACK_S)

    def _cancel(self, call: int) -> None:
        task = self._calls.pop(call, None)
        if task is not None:
            task.cancel()

    async def _answer(self, frame: Frame) -> None:
        """Answer one call. One that was cancelled gets no answer: nobody waits for it."""
        kind = frames.ANSWER
        try:
            message = await self._ask_replica(frame)
        except EaglerayError as error:
            kind, message = frames.ERROR, messages.encode_error(error)
        except Exception as error:
            logger.exception("%s: a call of kind %d", self._server.key, frame.kind)
            told = EaglerayError(f"replica {self._server.key}: {type(error).__name__}: {error}")
            kind, message = frames.ERROR, messages.encode_error(told)
        self._calls.pop(frame.call, None)
        self._deadlines.remove(frame.call)
        self._send(frame.call, kind, message)

    def _ask_replica(self, frame: Frame) -> Awaitable[messages.Message]:
        if frame.kind == frames.SEARCH:
            return self._search(frame)
        return self._fetch(frame) if frame.kind == frames.FETCH else self._write(frame)

    async def _search(self, frame: Frame) -> messages.Message:
        request = messages.decode_search(frame.head, frame.body, frame.timeout_s)
        outcomes = await self._server.replica.search(request)
        columns = [one.columns for one in outcomes if isinstance(one, Hits) and one.columns is not None]
        if not columns:
            return messages.encode_outcomes(outcomes)
        return await messages.beside(sum(table.nbytes for table in columns), messages.encode_outcomes, outcomes)

    async def _fetch(self, frame: Frame) -> messages.Message:
        asked = messages.decode_fetch(frame.head, frame.body)
        fetched = await self._server.replica.fetch(*asked, frame.timeout_s)
        size = 0 if fetched.table is None else fetched.table.nbytes
        return await messages.beside(size, messages.encode_fetched, fetched)

    async def _write(self, frame: Frame) -> messages.Message:
        writes = await messages.beside(len(frame.body), messages.decode_writes, frame.head, frame.body)
        return messages.encode_written(await self._server.replica.write(writes, frame.timeout_s))

    def _send(self, call: int, kind: int, message: messages.Message) -> None:
        if self._transport.is_closing():
            return
        size = frames.frame_bytes(*message)
        if size > self._server.frame_bytes_max:
            refusal = f"the answer has {size} bytes, at most {self._server.frame_bytes_max} may be sent: ask for less"
            kind, message = frames.ERROR, messages.encode_error(Exhausted(refusal))
        self._transport.writelines(frames.encode_frame(kind, call, 0, *message))


def _heard(frame: Frame, kind: int, word: type[messages.T]) -> messages.T:
    """The word of a handshake; FrameError where it is another one, or malformed."""
    if frame.kind != kind or len(frame.body):
        raise FrameError(f"a frame of kind {frame.kind}, where one of kind {kind} belongs")
    try:
        return msgspec.msgpack.decode(frame.head, type=word)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FrameError(f"a malformed frame of kind {kind}: {error}") from error
