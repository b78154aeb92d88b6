"""TCP sockets of the direct connections: where a replica listens, and what both ends set."""

from __future__ import annotations

import asyncio
import errno
import random
import socket

from cluster.errors import Unavailable

BACKLOG = 128
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2}  # seconds
USER_TIMEOUT_MS = 10_000  # what a peer has not acknowledged by then it never will: its node is gone


def listen(host: str, ports: range) -> socket.socket:
    """A socket bound to this address alone. Several replicas share a node: they begin to look at different ports.

    A port on which connections of an earlier process have only just ended is as good as any (`SO_REUSEADDR`).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    begin = random.randrange(len(ports)) if ports else 0
    candidates = [*ports[begin:], *ports[:begin]] or [0]
    for port in candidates:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(BACKLOG)
            return listening
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise Unavailable(f"cannot listen on {host}:{port}: {error}") from error
    raise Unavailable(
        f"cannot listen on {host}: all ports of shard_ports, {ports.start} to {ports.stop - 1}, are in use; "
        "give it as many as there may be replicas on one node"
    )


def prepare_socket(transport: asyncio.Transport) -> None:
    """Send small frames at once, and notice within seconds that the other end's node is gone."""
    connected = transport.get_extra_info("socket")
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**KEEPALIVE, "TCP_USER_TIMEOUT": USER_TIMEOUT_MS}.items():
        if hasattr(socket, name):  # not every system has them
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
