"""Admission control: limits on an engine's connections, and on pending requests of each.

Used from one Trio loop; nothing here is thread-safe.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import trio

from warabi.errors import ConnectionFailed
from warabi.protocol.limits import EngineLimits

log = logging.getLogger(__name__)


class PeerConnection:
    """A connection from accept(2) to its end.

    Args:
        host: the peer's host; empty for local connections.
        drop: closes the connection before its handshake has completed.
    """

    def __init__(self, host: str, drop: Callable[[], None]) -> None:
        self.host = host
        self.drop = drop


class Admission:
    """The connections of one engine, before and after the handshake.

    These have separate limits, so that peers which connect without completing the handshake do not
    block other clients.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._unopened: dict[PeerConnection, None] = {}  # oldest first
        self._opened: set[PeerConnection] = set()
        self._hosts: Counter[str] = Counter()

    def arrive(self, peer: PeerConnection) -> None:
        """Add a new connection; may drop the oldest one without a completed handshake."""
        self._unopened[peer] = None
        if len(self._unopened) > self._limits.unopened:
            oldest = next(iter(self._unopened))
            del self._unopened[oldest]
            log.info("dropping the oldest connection without a finished handshake")
            oldest.drop()

    def admit(self, peer: PeerConnection) -> None:
        """Admit a connection whose handshake has completed.

        Raises:
            ConnectionFailed: there are too many; the caller must close it.
        """
        self._unopened.pop(peer, None)
        limits = self._limits
        if len(self._opened) >= limits.connections:
            raise ConnectionFailed(f"{limits.connections} connections are open, which is the limit")
        if peer.host and self._hosts[peer.host] >= limits.connections_per_host:
            raise ConnectionFailed(
                f"{limits.connections_per_host} connections from {peer.host} are open, which is"
                " the limit for one host"
            )
        self._opened.add(peer)
        self._hosts[peer.host] += 1

    def leave(self, peer: PeerConnection) -> None:
        """Remove a closed connection, whether it was admitted or not."""
        self._unopened.pop(peer, None)
        if peer in self._opened:
            self._opened.remove(peer)
            self._hosts[peer.host] -= 1
            if not self._hosts[peer.host]:
                del self._hosts[peer.host]


class Budget:
    """Limits on the pending requests of one connection, and their bytes.

    Only one task may acquire.

    Args:
        requests: most pending requests.
        outstanding: most bytes of pending requests.
    """

    def __init__(self, requests: int, outstanding: int) -> None:
        self._most = self._requests = requests
        self._bytes = outstanding
        self._returned = trio.Event()

    @property
    def under_way(self) -> int:
        """Number of pending requests."""
        return self._most - self._requests

    async def acquire(self, size: int) -> None:
        """Wait until another request, of *size* bytes (at most ``outstanding``), may start."""
        while self._requests < 1 or self._bytes < size:
            self._returned = trio.Event()
            await self._returned.wait()
        self._requests -= 1
        self._bytes -= size

    def release(self, size: int) -> None:
        """Release a request of *size* bytes that was completed."""
        self._requests += 1
        self._bytes += size
        self._returned.set()
