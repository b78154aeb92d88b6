"""How the two ends of a direct connection prove to each other that they know the secret of a replica's process.

Each end proves it by an HMAC of both nonces, so that nothing that was seen on one connection helps on another, and the
ends differ in the words they sign, so that neither can be had to answer its own challenge. The secret is never sent.
"""

from __future__ import annotations

import hmac
import secrets

import msgspec

SECRET_BYTES = 32
NONCE_BYTES = 32
HANDSHAKE_FRAME_BYTES_MAX = 1024  # before the other end has proved anything
HANDSHAKE_TIMEOUT_S = 5.0
SERVER, CLIENT = b"eagleray replica", b"eagleray coordinator"


class Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A client's first word: which replica it wants to reach."""

    key: str
    nonce: bytes


class Challenge(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The server's answer: its proof, and what the client must sign."""

    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    proof: bytes


class Ready(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The client is let in; `frame_bytes_max` bounds the frames of both ends from now on."""

    frame_bytes_max: int


class Refused(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    reason: str


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, role: bytes, key: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """The proof of one end (`SERVER` or `CLIENT`). Nonces are of fixed length, and the key comes last."""
    return hmac.digest(secret, role + client_nonce + server_nonce + key.encode(), "sha256")


def proves(proof: bytes, expected: bytes) -> bool:
    """In a time that does not depend on where they differ."""
    return hmac.compare_digest(proof, expected)
