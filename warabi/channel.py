"""One connection's bytes on the provider's side: events in, frames out, on a Trio socket."""

from __future__ import annotations

import math
from collections.abc import Sequence

import trio

from warabi import wire
from warabi.errors import ProtocolError
from warabi.wire import NEED_DATA, PAYLOAD_DONE, PLACE_FULL, Limits, Opened

OPENING_PATIENCE = 10.0
"""Seconds that a peer has for its opening."""
STALL_PATIENCE = 60.0
"""Seconds for which a peer may stop in the middle of a transfer that holds shared buffers."""

Part = bytes | bytearray | memoryview


class Channel:
    """A connected socket and the protocol on it.

    One task receives.  Any number send; a frame, or a :meth:`stream` of several parts, is never
    mixed with another's.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._connection = wire.Connection(Limits())
        self._sending = trio.Lock()
        self._draining = False
        self._deaf = False  # the peer no longer takes replies; its requests still count
        self.peer = Limits()

    @property
    def limits(self) -> Limits:
        """What this side receives, and allocates."""
        return self._connection.limits

    async def open(self) -> bool:
        """Exchange openings; False when the peer closes instead.

        Raises:
            ProtocolError, trio.TooSlowError, OSError: it is no peer of ours.
        """
        with trio.fail_after(OPENING_PATIENCE):
            await self.send([wire.opening(self.limits)])
            opened = await self.next_event()
        if isinstance(opened, Opened):
            self.peer = opened.limits
        return opened is not None

    def drain(self) -> None:
        """From now on :meth:`next_event` gives what has come in, and then None."""
        self._draining = True

    async def next_event(self, patience: float = math.inf) -> wire.Event | None:
        """The next event, or None when the peer closed between two messages.

        Raises:
            ProtocolError: the peer broke a rule, or closed elsewhere.
            trio.TooSlowError: nothing came for *patience* seconds.
            OSError: the connection broke.
        """
        while (event := self._connection.next_event()) is NEED_DATA:
            if self._draining and self._connection.between_messages:
                return None
            with trio.fail_after(patience):
                count = await self._socket.recv_into(self._connection.buffer())
            if count == 0 and self._connection.between_messages:
                return None
            self._connection.received(count)
        return event

    async def fill(self, place: memoryview, patience: float = math.inf) -> None:
        """Receive the next bytes of the current payload into *place*, all of it."""
        self._connection.accept_payload(place)
        if await self.next_event(patience) not in (PAYLOAD_DONE, PLACE_FULL):
            raise ProtocolError("the peer closed the connection within a payload")

    async def drop_payload(self) -> None:
        """Receive what is left of the current payload into nothing."""
        self._connection.accept_payload(None)
        if await self.next_event() is not PAYLOAD_DONE:
            raise ProtocolError("the peer closed the connection within a payload")

    async def send(self, parts: Sequence[Part]) -> None:
        """Send *parts* as one; a peer that is gone is no error, for its requests still count."""
        async with self._sending:
            await self._send(parts, math.inf)

    async def _send(self, parts: Sequence[Part], patience: float) -> None:
        if self._deaf:
            return
        try:
            with trio.fail_after(patience):
                sent = await self._socket.sendmsg(parts)
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                    continue
                rest = memoryview(part)[sent:]
                sent = 0
                while rest:
                    with trio.fail_after(patience):
                        rest = rest[await self._socket.send(rest) :]
        except OSError:
            self._deaf = True

    def stream(self) -> Stream:
        """A frame whose parts are sent one by one: ``async with channel.stream() as stream``."""
        return Stream(self)

    def close(self) -> None:
        self._socket.close()


class Stream:
    """The right to send, held for several parts; one that is left half way ends the connection."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def __aenter__(self) -> Stream:
        await self._channel._sending.acquire()
        return self

    async def send(self, part: Part) -> None:
        """Raises ``trio.TooSlowError`` when the peer takes nothing for ``STALL_PATIENCE``."""
        await self._channel._send([part], STALL_PATIENCE)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._channel._deaf = True
            self._channel.close()
        self._channel._sending.release()
