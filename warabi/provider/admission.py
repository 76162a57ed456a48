"""Which connections an engine keeps, and how much each may have under way.

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


class Visitor:
    """A connection from its arrival to its end.

    Args:
        host: whose it is; empty for this one's user.
        drop: ends the connection, before it has opened.
    """

    def __init__(self, host: str, drop: Callable[[], None]) -> None:
        self.host = host
        self.drop = drop


class Admission:
    """The connections of one engine, those that have opened and those that have not.

    They have limits of their own, so that peers which connect and say nothing keep out nobody
    else.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._unopened: dict[Visitor, None] = {}  # the oldest first
        self._opened: set[Visitor] = set()
        self._hosts: Counter[str] = Counter()

    def arrive(self, visitor: Visitor) -> None:
        """Somebody connected; the oldest of those that have not opened may have to go."""
        self._unopened[visitor] = None
        if len(self._unopened) > self._limits.unopened:
            oldest = next(iter(self._unopened))
            del self._unopened[oldest]
            log.info("dropping the oldest connection without a finished handshake")
            oldest.drop()

    def admit(self, visitor: Visitor) -> None:
        """The connection has opened.

        Raises:
            ConnectionFailed: there are too many; it has to be ended.
        """
        self._unopened.pop(visitor, None)
        limits = self._limits
        if len(self._opened) >= limits.connections:
            raise ConnectionFailed(f"{limits.connections} connections are open, which is the limit")
        if visitor.host and self._hosts[visitor.host] >= limits.connections_per_host:
            raise ConnectionFailed(
                f"{limits.connections_per_host} connections from {visitor.host} are open, which is"
                " the limit for one host"
            )
        self._opened.add(visitor)
        self._hosts[visitor.host] += 1

    def leave(self, visitor: Visitor) -> None:
        """The connection ended, whether it was admitted or not."""
        self._unopened.pop(visitor, None)
        if visitor in self._opened:
            self._opened.remove(visitor)
            self._hosts[visitor.host] -= 1
            if not self._hosts[visitor.host]:
                del self._hosts[visitor.host]


class Budget:
    """What one connection may have under way: requests, and their bytes.

    Only one task may acquire.

    Args:
        requests: how many at once.
        outstanding: how many bytes at once.
    """

    def __init__(self, requests: int, outstanding: int) -> None:
        self._most = self._requests = requests
        self._bytes = outstanding
        self._returned = trio.Event()

    @property
    def under_way(self) -> int:
        """How many requests are."""
        return self._most - self._requests

    async def acquire(self, size: int) -> None:
        """Return when another request, of *size* bytes at most ``outstanding``, may be started."""
        while self._requests < 1 or self._bytes < size:
            self._returned = trio.Event()
            await self._returned.wait()
        self._requests -= 1
        self._bytes -= size

    def release(self, size: int) -> None:
        """A request that was acquired with *size* has been answered."""
        self._requests += 1
        self._bytes += size
        self._returned.set()
