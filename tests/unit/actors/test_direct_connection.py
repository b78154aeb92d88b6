"""The direct connection where something goes wrong: losses, refusals, late and cancelled calls, what is too large."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from actors import direct_client, frames, handshake, shard_server, sockets
from actors import replica as replica_module
from actors import shard_messages as messages
from actors.direct_client import DirectConnections, DirectShardClient, ShardConnection
from actors.frames import Frame, FrameReader
from actors.replica import Replica
from actors.shard import Shard
from actors.shard_client import ShardClient, ShardEndpoint
from actors.shard_server import ShardServer
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Settings
from cluster.errors import EaglerayError, Exhausted, Invalid, Unavailable
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey
from cluster.query import Fetched
from cluster.write import PointWrite, WriteOutcome
from tests.contract.shard_clients import WAITS, EchoReplica, ask_for, only
from tests.unit.actors.points import manifest_log

KEY = ReplicaKey("words", 2, 1)
HOST = "127.0.0.1"
FRAME_BYTES_MAX = 8 * 1024 * 1024
UPSERT = PointWrite(pa.record_batch({"id": [1, 2], "vector": vectors_array(np.ones((2, 2), np.float32))}))


@asynccontextmanager
async def serving(replica: ShardClient, key: ReplicaKey = KEY) -> AsyncIterator[ShardEndpoint]:
    server = ShardServer(replica, key, FRAME_BYTES_MAX)
    try:
        yield server.start(HOST, range(0))
    finally:
        await asyncio.to_thread(server.close)


@contextmanager
def connected(endpoint: ShardEndpoint, key: ReplicaKey = KEY) -> Iterator[DirectShardClient]:
    connection = ShardConnection(key, endpoint)
    try:
        yield DirectShardClient(connection)
    finally:
        connection.close()


async def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    while not true():
        await asyncio.sleep(0.001)


def run(test: Awaitable[None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(30.0):
            await test

    asyncio.run(within())


class RawPeer:
    """A client, or a server's accepted connection, that sends what it likes. Blocks: use it in a thread."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(10.0)
        self._reader = FrameReader(FRAME_BYTES_MAX)
        self._frames: list[Frame] = []

    def send(
        self, kind: int, call: int, head: bytes, body: Sequence[frames.Part] = (), timeout_ms: int = 5_000
    ) -> None:
        self.socket.sendall(b"".join(frames.encode_frame(kind, call, timeout_ms, head, body)))

    def receive(self) -> Frame | None:
        """The next frame; None at the end of the connection."""
        while not self._frames:
            try:
                count = self.socket.recv_into(self._reader.room())
            except ConnectionResetError:
                return None
            if not count:
                return None
            self._frames += self._reader.received(count)
        return self._frames.pop(0)

    def shake(self, endpoint: ShardEndpoint, key: ReplicaKey = KEY) -> Frame | None:
        nonce = handshake.new_nonce()
        self.send(frames.HELLO, 0, msgspec.msgpack.encode(handshake.Hello(str(key), nonce)))
        frame = self.receive()
        if frame is None or frame.kind != frames.CHALLENGE:
            return frame
        challenge = msgspec.msgpack.decode(frame.head, type=handshake.Challenge)
        proof = handshake.prove(endpoint.secret, handshake.CLIENT, str(key), nonce, challenge.nonce)
        self.send(frames.PROOF, 0, msgspec.msgpack.encode(handshake.Proof(proof)))
        return self.receive()


@contextmanager
def raw_client(endpoint: ShardEndpoint) -> Iterator[RawPeer]:
    with socket.create_connection((endpoint.host, endpoint.port)) as connected:
        yield RawPeer(connected)


# --- calls ----------------------------------------------------------------------------------------------------------


def test_cancelled_call_is_cancelled_at_the_replica() -> None:
    async def test() -> None:
        replica = EchoReplica()
        async with serving(replica) as endpoint:
            with connected(endpoint) as client:
                call = asyncio.ensure_future(client.search(ask_for(1, generation=WAITS)))
                await until(lambda: replica.waiting == 1)
                call.cancel()
                await until(lambda: replica.cancelled == 1)
                assert only(await client.search(ask_for(1))).lsn == 1

    run(test())


def test_late_call_is_unavailable_and_cancelled_at_the_replica() -> None:
    async def test() -> None:
        replica = EchoReplica()
        async with serving(replica) as endpoint:
            with connected(endpoint) as client:
                with pytest.raises(Unavailable, match=r"replica words/2/1: it did not answer within 0\.05 s"):
                    await client.search(ask_for(1, generation=WAITS, timeout_s=0.05))
                await until(lambda: replica.cancelled == 1)

    run(test())


def test_late_call_of_a_client_that_forgot_it_is_cancelled_by_the_server() -> None:
    async def test() -> None:
        replica = EchoReplica()
        async with serving(replica) as endpoint:
            with raw_client(endpoint) as peer:
                await asyncio.to_thread(peer.shake, endpoint)
                peer.send(frames.SEARCH, 1, *messages.encode_search(ask_for(1, generation=WAITS)), timeout_ms=10)
                await until(lambda: replica.cancelled == 1)

    run(test())


class BlockedSearches(EchoReplica):
    """Searches wait for each other in one thread, as those of a `Replica`; the first is let go by `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.searching, self.release = threading.Event(), threading.Event()

    async def search(self, request: Any) -> Any:
        def block() -> None:
            self.searching.set()
            self.release.wait(20.0)

        await asyncio.to_thread(block)
        return await super().search(request)


def test_fetches_and_writes_do_not_wait_behind_searches() -> None:
    async def test() -> None:
        replica = BlockedSearches()
        async with serving(replica) as endpoint:
            with connected(endpoint) as client:
                search = asyncio.ensure_future(client.search(ask_for(1)))
                await asyncio.to_thread(replica.searching.wait, 20.0)
                fetched = await client.fetch(1, pa.array([1]), [])
                assert isinstance(fetched, Fetched)
                assert await client.write([UPSERT]) == (WriteOutcome(3, 2),)
                assert not search.done()
                replica.release.set()
                await search

    run(test())


def test_replica_whose_searches_are_busy_fetches_writes_and_tells_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "AT_ONCE_S", 0.0)  # all searches wait for the thread

    async def test() -> None:
        store, key = MemoryStore(), ReplicaKey("words", 0, 0)
        manifest_log(store, "words").create(CollectionConfig(2, metric="l2"))
        replica = Replica(key, lambda: Shard(store, "words", 0, tmp_path), Settings(data="memory://x"), 1)
        await replica.lead()
        busy, done = threading.Event(), threading.Event()
        occupied = asyncio.ensure_future(replica._searcher.run(busy.wait, 20.0))
        await asyncio.sleep(0)
        async with serving(replica, key) as endpoint:
            with connected(endpoint, key) as client:
                search = asyncio.ensure_future(client.search(ask_for(1, dimension=2, queries=1)))
                (written,) = await client.write([UPSERT])
                assert isinstance(written, WriteOutcome)
                fetched = await client.fetch(1, pa.array([2, 3]), ["vector"], written.lsn)
                assert fetched.found.tolist() == [True, False]
                assert fetched.table["vector"].to_pylist() == [[1.0, 1.0]]
                assert replica.status().lsn == written.lsn
                assert not search.done()
                busy.set()
                assert only(await search).ids.to_pylist() == [1]
                late = asyncio.ensure_future(replica._searcher.run(done.wait, 20.0))
                await asyncio.gather(occupied, asyncio.sleep(0))
                asked = [asyncio.ensure_future(client.search(ask_for(1, dimension=2, queries=1))) for _ in range(3)]
                await until(lambda: replica._searcher._jobs.qsize() == 3)
                replica.close()
                done.set()
                for call in asked:
                    with pytest.raises(Unavailable, match="replica words/0/0 ends"):
                        await call
                await late

    run(test())


def test_request_that_is_too_large_is_exhausted_and_the_connection_goes_on() -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with connected(endpoint) as client:
                with pytest.raises(Exhausted, match=f"at most {FRAME_BYTES_MAX}: send less"):
                    await client.search(ask_for(1, dimension=2**20, queries=3))
                with pytest.raises(Exhausted, match=f"at most {FRAME_BYTES_MAX} may be sent: ask for less"):
                    await client.search(ask_for(2_000, dimension=2_000, queries=1, columns=("vector",)))
                assert only(await client.search(ask_for(1))).lsn == 1

    run(test())


def test_malformed_request_is_invalid_and_the_connection_goes_on() -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                await asyncio.to_thread(peer.shake, endpoint)
                for kind in (frames.SEARCH, frames.FETCH, frames.WRITE):
                    peer.send(kind, kind, b"\xc1", [b"what?"])
                    frame = await asyncio.to_thread(peer.receive)
                    assert frame is not None
                    assert (frame.kind, frame.call) == (frames.ERROR, kind)
                    assert isinstance(messages.decode_error(frame.head), Invalid)
                peer.send(frames.SEARCH, 1, *messages.encode_search(ask_for(1)))
                frame = await asyncio.to_thread(peer.receive)
                assert frame is not None
                assert frame.kind == frames.ANSWER

    run(test())


def test_calls_over_the_bound_are_exhausted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "CALLS_MAX", 2)

    async def test() -> None:
        replica = EchoReplica()
        async with serving(replica) as endpoint:
            with connected(endpoint) as client:
                calls = [asyncio.ensure_future(client.search(ask_for(1, generation=WAITS))) for _ in range(2)]
                await until(lambda: replica.waiting == 2)
                with pytest.raises(Exhausted, match="2 calls wait already; nothing was done"):
                    await client.search(ask_for(1))
                for call in calls:
                    call.cancel()
                await until(lambda: replica.cancelled == 2)
                assert only(await client.search(ask_for(1))).lsn == 1

    run(test())


# --- losses ---------------------------------------------------------------------------------------------------------


def test_loss_of_the_server_fails_all_calls_at_once() -> None:
    async def test() -> None:
        replica = EchoReplica()
        server = ShardServer(replica, KEY, FRAME_BYTES_MAX)
        with connected(server.start(HOST, range(0))) as client:
            calls = [asyncio.ensure_future(client.search(ask_for(1, generation=WAITS))) for _ in range(5)]
            await until(lambda: replica.waiting == 5)
            await asyncio.to_thread(server.close)
            for call in calls:
                with pytest.raises(Unavailable, match="replica words/2/1: the connection was"):
                    await call
            with pytest.raises(Unavailable, match=f"the connection to {HOST}:.* was not made"):
                await client.search(ask_for(1))

    run(test())


class NeverWrites(EchoReplica):
    async def write(self, writes: Any, timeout_s: float = 60.0) -> Any:
        await self._disturb(WAITS)


def test_write_that_was_sent_may_have_been_applied_and_one_that_was_not_was_not() -> None:
    async def test() -> None:
        replica = NeverWrites()
        server = ShardServer(replica, KEY, FRAME_BYTES_MAX)
        with connected(server.start(HOST, range(0))) as client:
            write = asyncio.ensure_future(client.write([UPSERT]))
            await until(lambda: replica.waiting == 1)
            await asyncio.to_thread(server.close)
            with pytest.raises(Unavailable, match="the write may have been applied or not"):
                await write
            with pytest.raises(Unavailable, match="nothing was applied"):
                await client.write([UPSERT])

    run(test())


def test_calls_of_a_lost_client_are_cancelled() -> None:
    async def test() -> None:
        replica = EchoReplica()
        async with serving(replica) as endpoint:
            with connected(endpoint) as client:
                call = asyncio.ensure_future(client.search(ask_for(1, generation=WAITS)))
                await until(lambda: replica.waiting == 1)
            await until(lambda: replica.cancelled == 1)
            with pytest.raises(Unavailable):
                await call

    run(test())


def test_lost_connection_is_made_again_by_the_next_call() -> None:
    async def test() -> None:
        server = ShardServer(EchoReplica(), KEY, FRAME_BYTES_MAX)
        endpoint = server.start(HOST, range(0))
        with connected(endpoint) as client:
            await client.search(ask_for(1))
            for connection in tuple(server.connections):
                server._loop.call_soon_threadsafe(connection.abort)
            link = client.connection._link
            assert link is not None
            await until(lambda: bool(link.lost))
            assert only(await client.search(ask_for(1))).lsn == 1
            await asyncio.to_thread(server.close)

    run(test())


def test_calls_that_come_while_connecting_share_one_connection() -> None:
    async def test() -> None:
        server = ShardServer(EchoReplica(), KEY, FRAME_BYTES_MAX)
        with connected(server.start(HOST, range(0))) as client:
            hasty = asyncio.ensure_future(client.search(ask_for(1)))
            others = [asyncio.ensure_future(client.search(ask_for(1))) for _ in range(20)]
            await asyncio.sleep(0)
            hasty.cancel()  # gives up before there is a connection; the others go on
            assert [only(outcomes).lsn for outcomes in await asyncio.gather(*others)] == [1] * 20
            assert len(server.connections) == 1
            await asyncio.to_thread(server.close)

    run(test())


def test_connections_follow_the_endpoints_of_the_table() -> None:
    async def test() -> None:
        connections = DirectConnections()
        async with serving(EchoReplica()) as first, serving(EchoReplica()) as second:
            connections.update({KEY: first})
            client = connections.client(KEY)
            assert client is not None
            await client.search(ask_for(1))
            connections.update({KEY: first})
            assert connections.client(KEY) is client
            connections.update({KEY: second})
            with pytest.raises(Unavailable, match="the replica has another process now, or none"):
                await client.search(ask_for(1))
            later = connections.client(KEY)
            assert later is not None
            assert only(await later.search(ask_for(1))).lsn == 1
            connections.update({})
            assert connections.client(KEY) is None
            connections.close()

    run(test())


def test_calls_that_wait_to_connect_fail_as_soon_as_the_endpoint_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_client, "CONNECT_TIMEOUT_S", 120.0)

    async def test() -> None:
        with sockets.listen(HOST, range(0)) as silent:  # the kernel lets clients connect, nobody answers
            connections = DirectConnections()
            connections.update({KEY: ShardEndpoint(HOST, silent.getsockname()[1], b"secret")})
            client = connections.client(KEY)
            assert client is not None
            write, search = (
                asyncio.ensure_future(call) for call in (client.write([UPSERT]), client.search(ask_for(1)))
            )
            accepted, _ = await asyncio.to_thread(silent.accept)
            connections.update({})
            with pytest.raises(Unavailable, match="the replica has another process now, or none; nothing was applied"):
                await write
            with pytest.raises(Unavailable, match="the replica has another process now, or none"):
                await search
            with pytest.raises(Unavailable, match="the replica has another process now, or none; nothing was applied"):
                await client.write([UPSERT])
            silent.setblocking(False)
            with pytest.raises(BlockingIOError):  # who still has the client connects no more
                silent.accept()
            accepted.close()

    run(test())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_stale_secret_is_unavailable_and_nothing_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            stale = replace(endpoint, secret=handshake.new_secret())
            told = pytest.raises(Unavailable, match="who listens there does not know the secret")
            with connected(stale) as client, told:
                await client.search(ask_for(1))
            for secret in (endpoint.secret, stale.secret):
                assert repr(secret) not in caplog.text + repr(endpoint) + str(stale)

    run(test())


def test_client_without_the_secret_is_refused() -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                frame = await asyncio.to_thread(peer.shake, replace(endpoint, secret=b"guessed"))
                assert frame is not None
                assert (frame.kind, bytes(frame.head[2:])) == (frames.REFUSED, b"its secret is another one")
                assert await asyncio.to_thread(peer.receive) is None

    run(test())


def test_wrong_replica_is_unavailable() -> None:
    async def test() -> None:
        other = ReplicaKey("words", 2, 0)
        async with serving(EchoReplica()) as endpoint:
            told = pytest.raises(Unavailable, match="was refused: replica 'words/2/0' is not here, but words/2/1")
            with connected(endpoint, other) as client, told:
                await client.search(ask_for(1))

    run(test())


def test_other_version_is_told_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                peer.socket.sendall(frames.PREFIX.pack(frames.MAGIC, 9, frames.HELLO, 0, 0, 0, 0))
                frame = await asyncio.to_thread(peer.receive)
                assert frame is not None
                assert frame.kind == frames.REFUSED
                assert b"protocol version 9, this is version 3" in bytes(frame.head)

    run(test())


def test_server_of_another_version_is_unavailable() -> None:
    async def test() -> None:
        def answer() -> None:
            accepted, _ = listening.accept()
            with accepted:
                accepted.sendall(frames.PREFIX.pack(frames.MAGIC, 9, frames.REFUSED, 0, 0, 0, 0))
                accepted.recv(100)

        with sockets.listen(HOST, range(0)) as listening:
            answering = asyncio.ensure_future(asyncio.to_thread(answer))
            told = pytest.raises(Unavailable, match="protocol version 9, this is version 3")
            with connected(ShardEndpoint(HOST, listening.getsockname()[1], b"secret")) as client, told:
                await client.search(ask_for(1))
            await answering

    run(test())


def test_who_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_client, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def test() -> None:
        listening = sockets.listen(HOST, range(0))
        endpoint = ShardEndpoint(HOST, listening.getsockname()[1], b"secret")
        with listening, connected(endpoint) as client:
            with pytest.raises(Unavailable, match=r"was not made within 0\.1 s"):
                await client.search(ask_for(1))
            with pytest.raises(Unavailable, match=r"it was not reached within 0\.05 s; nothing was applied"):
                await client.write([UPSERT], 0.05)
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                assert await asyncio.to_thread(peer.receive) is None

    run(test())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
        frames.PREFIX.pack(frames.MAGIC, frames.VERSION, frames.HELLO, 0, 0, 2_000, 0),
        b"".join(frames.encode_frame(frames.SEARCH, 1, 1_000, b"", [])),
        b"".join(frames.encode_frame(frames.PROOF, 1, 1_000, b"\x91\xc4\x00", [])),
        b"".join(frames.encode_frame(frames.HELLO, 1, 1_000, b"\x92\xa1x\xc4\x00", [])),
        b"".join(frames.encode_frame(frames.HELLO, 1, 1_000, b"\x91" * 1_000, [])),
    ],
    ids=["http", "too large", "a call", "a proof", "a short nonce", "nested"],
)
def test_stranger_is_cut_off_with_a_log_line(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                peer.socket.sendall(data)
                assert await asyncio.to_thread(peer.receive) is None
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "is closed" in record.getMessage()

    run(test())


def test_stranger_writes_no_lines_of_its_own_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    hello = msgspec.msgpack.encode(handshake.Hello("x\nERROR all is lost", handshake.new_nonce()))

    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                peer.send(frames.HELLO, 0, hello)
                frame = await asyncio.to_thread(peer.receive)
                assert frame is not None
                assert frame.kind == frames.REFUSED
        (record,) = caplog.records
        assert "\n" not in record.getMessage()

    run(test())


@pytest.mark.parametrize("kind", [frames.HELLO, frames.READY, frames.ANSWER])
def test_frame_that_is_no_call_ends_the_connection(kind: int) -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as peer:
                await asyncio.to_thread(peer.shake, endpoint)
                peer.send(kind, 1, b"")
                assert await asyncio.to_thread(peer.receive) is None

    run(test())


def test_strangers_over_the_bound_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "UNPROVEN_MAX", 1)

    async def test() -> None:
        server = ShardServer(EchoReplica(), KEY, FRAME_BYTES_MAX)
        endpoint = server.start(HOST, range(0))
        with raw_client(endpoint) as first:
            await until(lambda: len(server.unproven) == 1)
            with raw_client(endpoint) as second:
                assert await asyncio.to_thread(second.receive) is None
            frame = await asyncio.to_thread(first.shake, endpoint)
            assert frame is not None
            assert frame.kind == frames.READY
            with connected(endpoint) as client:
                assert only(await client.search(ask_for(1))).lsn == 1
        await asyncio.to_thread(server.close)

    run(test())


# --- slow readers ---------------------------------------------------------------------------------------------------


def fill(peer: RawPeer, calls: int) -> None:
    """Ask for answers of 4 MB each without reading them."""
    request = messages.encode_search(ask_for(1_000, dimension=1_000, queries=1, columns=("vector",)))
    for call in range(calls):
        peer.send(frames.SEARCH, call, *request, timeout_ms=60_000)


def test_client_that_reads_slowly_gets_all_answers_and_holds_up_nobody() -> None:
    async def test() -> None:
        async with serving(EchoReplica()) as endpoint:
            with raw_client(endpoint) as slow, connected(endpoint) as client:
                await asyncio.to_thread(slow.shake, endpoint)
                await asyncio.to_thread(fill, slow, 8)
                assert only(await client.search(ask_for(1))).lsn == 1
                received = [await asyncio.to_thread(slow.receive) for _ in range(8)]
                assert sorted(frame.call for frame in received if frame is not None) == list(range(8))

    run(test())


def test_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "STALLED_S", 0.2)

    async def test() -> None:
        server = ShardServer(EchoReplica(), KEY, FRAME_BYTES_MAX)
        endpoint = server.start(HOST, range(0))
        with raw_client(endpoint) as peer:
            await asyncio.to_thread(peer.shake, endpoint)
            await asyncio.to_thread(fill, peer, 8)
            await until(lambda: not server.connections)
        await asyncio.to_thread(server.close)

    run(test())


def test_requests_wait_while_the_replica_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that shook hands and then reads nothing: calls are sent until the buffers are full, then none is."""

    async def test() -> None:
        secret, done = handshake.new_secret(), threading.Event()

        def shake_and_stall() -> None:
            accepted, _ = listening.accept()
            with accepted:
                peer = RawPeer(accepted)
                frame = peer.receive()
                assert frame is not None
                hello = msgspec.msgpack.decode(frame.head, type=handshake.Hello)
                nonce = handshake.new_nonce()
                proof = handshake.prove(secret, handshake.SERVER, hello.key, hello.nonce, nonce)
                peer.send(frames.CHALLENGE, 0, msgspec.msgpack.encode(handshake.Challenge(nonce, proof)))
                peer.receive()
                peer.send(frames.READY, 0, msgspec.msgpack.encode(handshake.Ready(FRAME_BYTES_MAX)))
                done.wait(20.0)

        with sockets.listen(HOST, range(0)) as listening:
            stalling = asyncio.ensure_future(asyncio.to_thread(shake_and_stall))
            with connected(ShardEndpoint(HOST, listening.getsockname()[1], secret)) as client:
                large = ask_for(1, dimension=2**20, queries=1, timeout_s=20.0)
                calls = [asyncio.ensure_future(client.search(large)) for _ in range(8)]
                while client.connection._link is None or client.connection._link.usable:
                    await asyncio.sleep(0.001)
                with pytest.raises(Unavailable, match=r"was not reached within 0\.1 s; nothing was applied"):
                    await client.write([UPSERT], 0.1)
                done.set()
                for call in calls:
                    with pytest.raises(Unavailable):
                        await call
            await stalling

    run(test())


# --- ports ----------------------------------------------------------------------------------------------------------


def test_ports_of_a_range_are_taken_until_none_is_left() -> None:
    with sockets.listen(HOST, range(0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"shard_ports, {port} to {port}, are in use"):
            sockets.listen(HOST, range(port, port + 1))
    with sockets.listen(HOST, range(port, port + 1)) as again:
        assert again.getsockname()[:2] == (HOST, port)


def test_port_whose_connections_have_just_ended_is_free() -> None:
    """A replica that is started again finds its port, although connections to the process before linger there."""
    with sockets.listen(HOST, range(0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection((HOST, port)) as client:
            accepted, _ = listening.accept()
            accepted.close()  # the side that closes first keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    with sockets.listen(HOST, range(port, port + 1)) as again:
        assert again.getsockname()[:2] == (HOST, port)


@pytest.mark.parametrize(("host", "told"), [("192.0.2.1", "192.0.2.1:80"), ("2001:db8::1", "[2001:db8::1]:80")])
def test_endpoint_is_told_without_its_secret(host: str, told: str) -> None:
    endpoint = ShardEndpoint(host, 80, b"hidden")
    assert str(endpoint) == told
    assert "hidden" not in repr(endpoint)


def test_address_that_is_not_of_this_machine_is_unavailable() -> None:
    with pytest.raises(Unavailable, match=r"cannot listen on 192\.0\.2\.1"):
        sockets.listen("192.0.2.1", range(0))


def test_error_of_ours_is_not_mistaken_for_the_connections(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(EchoReplica):
        async def fetch(self, *args: Any) -> Any:
            raise EaglerayError("of the replica")

    async def test() -> None:
        async with serving(Fails()) as endpoint:
            with connected(endpoint) as client, pytest.raises(EaglerayError, match="of the replica"):
                await client.fetch(1, pa.array([1]), [])
        assert caplog.records == []

    run(test())
