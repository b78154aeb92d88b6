"""Ray's TLS settings, from the environment variables that Ray itself reads, for connections that Ray does not make.

Both ends show the certificate that their Ray process has, and take one that Ray's CA has signed. Names in certificates
are not compared with addresses: Ray gives all nodes of a cluster the same certificate if it likes, and which replica
it is that answers is proved by the handshake. Two replicas of a node can therefore not be told apart by TLS alone.
"""

from __future__ import annotations

import os
import ssl

from cluster.errors import Unavailable

FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def server_context() -> ssl.SSLContext | None:
    """For a replica's server; None where Ray uses no TLS."""
    return _context(ssl.PROTOCOL_TLS_SERVER)


def client_context() -> ssl.SSLContext | None:
    """For connections to replicas; None where Ray uses no TLS."""
    return _context(ssl.PROTOCOL_TLS_CLIENT)


def _context(protocol: int) -> ssl.SSLContext | None:
    """Unavailable where a variable or file is missing, or a file is no certificate."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    paths = {name: os.environ.get(name) for name in FILES}
    missing = ", ".join(name for name, path in paths.items() if not path)
    if missing:
        raise Unavailable(f"RAY_USE_TLS is on, but not set: {missing}")
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(str(paths[FILES[0]]), str(paths[FILES[1]]))
        context.load_verify_locations(str(paths[FILES[2]]))
    except OSError as error:
        raise Unavailable(f"cannot use Ray's TLS files {', '.join(map(str, paths.values()))}: {error}") from error
    return context
