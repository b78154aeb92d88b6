"""What a primary pushes to the other replicas of its shard: never waits, and is bounded. Ray is a small fake."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors import ray_replica
from actors.ray_replica import PUSHES_IN_FLIGHT, PUSHES_WAITING, UNKNOWN_S, PeerPushes
from cluster.placement import ReplicaKey

KEY = ReplicaKey("words", 0, 1)


class Peer:
    """An actor handle: `receive.remote` records what came; a call is done once `took` it, or `died`."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.took = True
        self.died = False
        self.receive = self

    def remote(self, data: Any) -> Peer:
        self.came.append(data)
        return self


class FakeRay:
    """As much of Ray as pushing needs. A reference is the peer itself, or the bytes."""

    def __init__(self) -> None:
        self.actors: dict[str, Peer] = {}
        self.looked: list[str] = []

    def get_actor(self, name: str, namespace: str) -> Peer:
        self.looked.append(name)
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def put(self, data: bytes) -> bytes:
        return data

    def wait(self, references: list[Peer], num_returns: int, timeout: float) -> tuple[list[Peer], list[Peer]]:
        assert (num_returns, timeout) == (len(references), 0)
        done = [peer for peer in references if peer.took or peer.died]
        return done, [peer for peer in references if peer not in done]

    def get(self, peer: Peer) -> None:
        if peer.died:
            raise ActorDiedError


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("get_actor", "put", "wait", "get"):
        monkeypatch.setattr(ray_replica.ray, name, getattr(fake, name))
    return fake


def pushes_of(fake: FakeRay, replicas: int, *running: int) -> tuple[PeerPushes, list[Peer]]:
    peers = [Peer() for _ in running]
    fake.actors = {f"replica:words/0/{number}": peer for number, peer in zip(running, peers, strict=True)}
    return PeerPushes(KEY, "test", lambda: replicas), peers


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_record_goes_to_every_other_replica_and_none_to_itself(fake_ray: FakeRay) -> None:
    pushes, peers = pushes_of(fake_ray, 3, 0, 1, 2)
    pushes.push(b"one")
    until(lambda: len(peers[2].came) == 1)
    assert [peer.came for peer in peers] == [[b"one"], [], [b"one"]]
    pushes.push(b"two")
    until(lambda: len(peers[2].came) == 2)
    assert fake_ray.looked == ["replica:words/0/0", "replica:words/0/2"], "handles are kept"


def test_record_goes_to_replicas_with_the_same_share_of_a_gpu(fake_ray: FakeRay) -> None:
    _, (on_cpu,) = pushes_of(fake_ray, 2, 0)
    whole = fake_ray.actors["replica:words/0/0/gpu:1"] = Peer()
    quarter = fake_ray.actors["replica:words/0/0/gpu:0.25"] = Peer()
    PeerPushes(replace(KEY, num_gpus=0.25), "test", lambda: 2)._send(b"one")
    assert (on_cpu.came, whole.came, quarter.came) == ([], [], [b"one"])


def test_only_replica_pushes_nothing_and_has_no_thread(fake_ray: FakeRay) -> None:
    pushes, _ = pushes_of(fake_ray, 1, 0)
    pushes.push(b"one")
    assert pushes._thread is None


def test_record_goes_to_one_more_that_stands_in_on_a_gpu_and_from_it_to_the_others(fake_ray: FakeRay) -> None:
    names = [f"replica:words/0/{number}/gpu:0.5" for number in range(2)]
    for sender, receiver in ((0, 1), (1, 0)):
        peer = fake_ray.actors[names[receiver]] = Peer()
        pushes = PeerPushes(ReplicaKey("words", 0, sender, 0.5), "test", lambda: 1)
        pushes.push(b"one")
        until(lambda peer=peer: peer.came == [b"one"])


def test_replica_that_takes_nothing_is_left_alone_until_it_does(fake_ray: FakeRay) -> None:
    pushes, (slow, quick) = pushes_of(fake_ray, 3, 0, 2)
    slow.took = False
    for number in range(PUSHES_IN_FLIGHT + 3):
        pushes._send(b"%d" % number)
    assert (len(slow.came), len(quick.came)) == (PUSHES_IN_FLIGHT, PUSHES_IN_FLIGHT + 3)
    slow.took = True
    pushes._send(b"last")
    assert slow.came[-1] == b"last"


def test_replica_that_died_is_looked_for_again_and_one_that_is_missing_only_now_and_then(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes, (peer,) = pushes_of(fake_ray, 2, 0)
    now = 1_000.0
    monkeypatch.setattr(ray_replica.time, "monotonic", lambda: now)
    pushes._send(b"one")
    peer.died = True
    fake_ray.actors.clear()
    for _ in range(3):
        pushes._send(b"two")
    assert (peer.came, len(fake_ray.looked)) == ([b"one"], 2)
    (another,) = pushes_of(fake_ray, 2, 0)[1]
    now += UNKNOWN_S
    pushes._send(b"three")
    assert another.came == [b"three"]


def test_push_never_waits_for_ray(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    pushes, (peer,) = pushes_of(fake_ray, 2, 0)
    look = fake_ray.get_actor
    stuck: list[bool] = [True]

    def slow(name: str, namespace: str) -> Peer:
        until(lambda: not stuck)
        return look(name, namespace)

    monkeypatch.setattr(ray_replica.ray, "get_actor", slow)
    for number in range(PUSHES_WAITING + 20):
        pushes.push(b"%d" % number)
    assert peer.came == []
    stuck.clear()
    until(lambda: len(peer.came) >= PUSHES_WAITING)
    assert len(peer.came) <= PUSHES_WAITING + 1
