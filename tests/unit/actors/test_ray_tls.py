"""The direct connection under Ray's TLS: certificates of Ray's CA are needed on both sides, and the secret still is."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from actors import ray_tls
from actors.direct_client import DirectShardClient, ShardConnection
from actors.handshake import new_secret
from actors.shard_server import ShardServer
from cluster.errors import Unavailable
from cluster.placement import ReplicaKey
from tests.contract.shard_clients import CASES, EchoReplica, ask_for

KEY = ReplicaKey("words", 2, 1)


@dataclass(frozen=True)
class Authority:
    """A certificate authority and one certificate that it signed, in files as Ray wants them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        ca = certificate("an authority", "an authority", ca_key, ca_key, authority=True)
        write_pem(folder / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
        signed = certificate("a node", "an authority", key, ca_key, authority=False)
        write_pem(folder / "cert.pem", signed.public_bytes(serialization.Encoding.PEM))
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        write_pem(folder / "key.pem", pem)
        return cls(folder)

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """As Ray's processes are told."""
        patch.setenv("RAY_USE_TLS", "1")
        patch.setenv("RAY_TLS_SERVER_CERT", str(self.folder / "cert.pem"))
        patch.setenv("RAY_TLS_SERVER_KEY", str(self.folder / "key.pem"))
        patch.setenv("RAY_TLS_CA_CERT", str(self.folder / "ca.pem"))


def write_pem(path: Path, pem: bytes) -> None:
    path.write_bytes(pem)


def certificate(
    subject: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    name, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer))
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )


def run(test: Awaitable[None], runner: Callable[..., None] = asyncio.run) -> None:
    async def within() -> None:
        async with asyncio.timeout(30.0):
            await test

    runner(within())


async def check(server_tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None, *, proved: bool = True) -> None:
    """All cases over one connection."""
    server = ShardServer(EchoReplica(), KEY, 64 * 1024 * 1024, server_tls)
    endpoint = server.start("127.0.0.1", range(0))
    connection = ShardConnection(KEY, endpoint if proved else replace(endpoint, secret=new_secret()), client_tls)
    try:
        for case in CASES:
            await case(DirectShardClient(connection))
    finally:
        connection.close()
        await asyncio.sleep(0)
        await asyncio.to_thread(server.close)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_calls_with_certificates_of_one_authority(
    runner: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Authority.make(tmp_path / "ours").use(monkeypatch)
    run(check(ray_tls.server_context(), ray_tls.client_context()), runner)


def test_certificate_alone_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Authority.make(tmp_path / "ours").use(monkeypatch)
    with pytest.raises(Unavailable, match="does not know the secret"):
        run(check(ray_tls.server_context(), ray_tls.client_context(), proved=False))


@pytest.mark.parametrize("stranger", ["client", "server"])
def test_certificate_of_another_authority_is_unavailable(
    stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (Authority.make(tmp_path / name) for name in ("ours", "theirs"))
    (theirs if stranger == "server" else ours).use(monkeypatch)
    server_tls = ray_tls.server_context()
    (theirs if stranger == "client" else ours).use(monkeypatch)
    with pytest.raises(Unavailable, match="the connection"):
        run(check(server_tls, ray_tls.client_context()))


def test_client_without_tls_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Authority.make(tmp_path / "ours").use(monkeypatch)
    with pytest.raises(Unavailable, match="the connection"):
        run(check(ray_tls.server_context(), None))


def test_client_without_a_certificate_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Authority.make(tmp_path / "ours").use(monkeypatch)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(tmp_path / "ours" / "ca.pem")

    async def test() -> None:
        server = ShardServer(EchoReplica(), KEY, 1_000_000, ray_tls.server_context())
        connection = ShardConnection(KEY, server.start("127.0.0.1", range(0)), bare)
        with pytest.raises(Unavailable, match="the connection"):
            await DirectShardClient(connection).search(ask_for(1))
        connection.close()
        await asyncio.to_thread(server.close)

    run(test())


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Authority.make(tmp_path / "ours").use(monkeypatch)
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "absent.pem"))
    with pytest.raises(Unavailable, match=r"cannot use Ray's TLS files .*absent\.pem"):
        ray_tls.client_context()
    monkeypatch.delenv("RAY_TLS_CA_CERT")
    with pytest.raises(Unavailable, match="RAY_USE_TLS is on, but not set: RAY_TLS_CA_CERT"):
        ray_tls.server_context()


@pytest.mark.parametrize("value", ["0", "false", None])
def test_without_rays_tls_there_is_no_context(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_USE_TLS", value)
    assert (ray_tls.server_context(), ray_tls.client_context()) == (None, None)
