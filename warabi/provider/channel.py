"""The provider's side of one connection: events in, frames out, on a Trio socket.

The socket may use TLS (``protocol/transport.py``); the peer is authenticated before anything else
is accepted from it (``protocol/handshake.py``).
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import perf_counter_ns

import trio

from warabi._core.tuning import IDLE_TURN, OPENING_PATIENCE, PAYLOAD_TURN
from warabi.errors import PermissionDenied, ProtocolError
from warabi.protocol import handshake, wire
from warabi.protocol.auth import Peer, Security
from warabi.protocol.transport import NO_TLS, Part, Plain, Tls, Transport
from warabi.protocol.wire import NEED_DATA, PAYLOAD_DONE, PLACE_FULL, Limits
from warabi.provider.idle_connections import IdleConnections, Serve

STALL_SIZE = 4 * 1024 * 1024
_ONE = memoryview(bytearray(1))  # for MSG_PEEK
_UNREAD = 64  # reads of unused input when closing
_UNREAD_PIECE = 256 * 1024

SendParts = Callable[..., Awaitable[None]]


class Channel:
    """A connected socket and the protocol on it.

    One task receives, or the leader of the idle connections does for it.  Any number of tasks send;
    a frame, or a :meth:`stream` of several parts, is never interleaved with another's.

    Data that can be received or sent at once are, without a turn of Trio's loop, which would cost
    more than most requests.  The loop gets a turn when there is nothing to do, and after
    ``IDLE_TURN``.

    Args:
        sock: the connected, non-blocking socket.
        limits: what this side accepts after authentication.
        idle_connections: the idle connections of the loop.

    Attributes:
        draining: only data that have already arrived are still accepted.
    """

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        idle_connections: IdleConnections,
    ) -> None:
        self._socket = sock
        self._transport: Transport = Plain(sock)
        self._encrypted = False
        self._idle_connections = idle_connections
        self._attention = self._idle_connections.attention
        self._busy_poll = self._idle_connections.busy_poll
        self._turn = 0  # time of this task's last checkpoint
        self._limits = limits
        self._connection = wire.ProtocolConnection(handshake.STRANGER)
        self._sending = trio.Lock()
        self.draining = False
        self._deaf = False  # the peer no longer reads replies; its requests are still executed
        self.peer = Limits()

    def fileno(self) -> int:
        """The socket's descriptor; -1 if it is closed."""
        return self._socket.fileno()

    @property
    def limits(self) -> Limits:
        """The limits of this side."""
        return self._limits

    async def open(self, security: Security, *, local: bool) -> Peer | None:
        """Execute the handshake; returns the peer, None if it closes the connection instead.

        Raises:
            PermissionDenied: the peer is refused.
            ProtocolError, trio.TooSlowError, OSError: the handshake failed.
        """
        with trio.fail_after(OPENING_PATIENCE):
            if security.tls is not None and not local:
                await self._start_tls(security)
            dialogue = handshake.provider(self._limits, security, local=local)
            say = next(dialogue)
            try:
                while True:
                    if say:
                        await self.send([say])
                    event = await self.next_event()
                    if event is None:
                        return None
                    say = dialogue.send(event)
            except StopIteration as end:
                sender: Peer
                self.peer, sender, say = end.value
            self._connection.limits = self._limits
            if say:
                await self.send([say])
        return sender

    async def _start_tls(self, security: Security) -> None:
        assert security.tls is not None
        tls = Tls(self._socket, security.tls.server, None)
        done = False
        while not done:
            try:
                done = tls.shake_hands()
            except (PermissionDenied, ProtocolError):
                await self.send([tls.unsent() or NO_TLS])
                self._deaf = True  # after a failed TLS handshake only an alert can be sent
                raise
            if unsent := tls.unsent():
                await self.send([unsent])
            if not done:
                await trio.lowlevel.wait_readable(self._socket)
                with contextlib.suppress(BlockingIOError):  # spurious wake-up
                    tls.receive()
        self._transport = tls
        self._encrypted = True

    def _look(self, buffer: memoryview, began: int, look: bool, within: bool) -> int:
        """Receive data without a checkpoint; -1 if other tasks must get a turn."""
        receive = self._transport.recv_into
        alone = self._attention.alone(self, began)
        count = -1
        if alone or self._encrypted:  # decrypted data may be left from before
            if within:
                count = self._busy_poll.piece(receive, buffer, began, wait=alone)
                self._busy_poll.moved(max(0, count))
            else:
                count = self._busy_poll.look(receive, buffer, began, wait=look and alone)
        if count >= 0:
            self._attention.give(self, perf_counter_ns())
        return count

    async def _receive(self, buffer: memoryview, within: bool) -> int:
        began = perf_counter_ns()
        count = -1
        while count < 0:
            await trio.lowlevel.wait_readable(self._socket)
            with contextlib.suppress(BlockingIOError):
                count = self._transport.recv_into(buffer, 0, 0)
        self._came(began, within)
        self._busy_poll.moved(count)
        self._attention.give(self, self._turn)
        return count

    def _came(self, began: int, within: bool) -> None:
        """Record that data arrived after blocking since *began*: a message or, *within* one, a
        chunk."""
        if within:
            self._busy_poll.piece_came(began)
        else:
            self._busy_poll.came(began)
        self._turn = perf_counter_ns()

    async def _turn_within(self) -> int:
        """Let other tasks run after many chunks of a message; returns the current time."""
        now = perf_counter_ns()
        if now - self._turn > PAYLOAD_TURN:
            await trio.lowlevel.checkpoint()
            self._turn = now = perf_counter_ns()
        return now

    def drain(self) -> None:
        """Make :meth:`next_event` return only events that have arrived, and then None."""
        self.draining = True

    async def next_event(self, *, look: bool = False, wait: bool = True) -> wire.Event | None:
        """Return the next event, or None if the peer closed the connection between two messages.

        With *look* it may poll for a moment, since no request of this connection is pending.
        Without
        *wait* it returns ``NEED_DATA`` if other tasks should get a turn first.

        Raises:
            ProtocolError: the peer violated the protocol, or closed within a message.
            OSError: the connection broke.
        """
        if perf_counter_ns() - self._turn > IDLE_TURN:
            await trio.lowlevel.checkpoint()
            self._turn = perf_counter_ns()
        while (event := self._connection.next_event()) is NEED_DATA:
            if self.draining and self._connection.between_messages:
                last = self.event_nowait()
                if last is not NEED_DATA:
                    return last
                continue  # a part of a message
            within = not self._connection.between_messages
            began = await self._turn_within() if within else perf_counter_ns()
            buffer = self._connection.buffer()
            count = self._look(buffer, began, look, within)
            if count < 0 and not wait:
                return event
            if count < 0:
                count = await self._receive(buffer, within)
            if count == 0 and self._connection.between_messages:
                return None
            self._connection.received(count)
        return event

    def event_nowait(self) -> wire.Event | None:
        """Return the next event from received data, ``NEED_DATA`` if it is incomplete; otherwise as
        :meth:`next_event`."""
        connection = self._connection
        event = connection.next_event()
        if event is NEED_DATA:
            try:
                count = self._transport.recv_into(connection.buffer())
            except BlockingIOError:
                return None if self.draining and connection.between_messages else event
            self._busy_poll.message(count)
            self._attention.give(self, perf_counter_ns())
            if count == 0 and connection.between_messages:
                return None
            connection.received(count)
            event = connection.next_event()
        return event

    async def wait_to_serve(self, serve: Serve) -> None:
        """See :meth:`IdleConnections.wait_to_serve`; only if the connection is :attr:`plain`."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        await self._idle_connections.wait_to_serve(self._socket.fileno(), serve)

    @property
    def between_messages(self) -> bool:
        """See :class:`warabi.protocol.wire.ProtocolConnection`."""
        return self._connection.between_messages

    async def fill(self, place: memoryview, patience: float = math.inf) -> None:
        """Receive the next bytes of the current payload into *place*, filling it.

        Raises:
            trio.TooSlowError: the peer took more than *patience* seconds for ``STALL_SIZE`` bytes;
                occasional single bytes do not reset this.
        """
        self._connection.accept_payload(place)
        with trio.fail_after(_scaled(patience, len(place))):
            event = await self.next_event()
        if event not in (PAYLOAD_DONE, PLACE_FULL):
            raise ProtocolError("the peer closed the connection in the middle of a payload")

    async def readable(self) -> None:
        """Return when the next chunk of a payload has arrived, or the peer has closed.

        Only without TLS, where the socket does not tell.
        """
        began = await self._turn_within()
        alone = self._attention.alone(self, began)
        if self._busy_poll.piece(self._peek, _ONE, began, wait=alone) < 0:
            await trio.lowlevel.wait_readable(self._socket)
            self._came(began, True)

    def _peek(self, place: memoryview, size: int, flags: int) -> int:
        return self._transport.recv_into(place, size, flags | socket.MSG_PEEK)

    @property
    def plain(self) -> bool:
        """Whether the connection is not encrypted."""
        return isinstance(self._transport, Plain)

    def arrived(self) -> memoryview:
        """See :meth:`warabi.protocol.wire.ProtocolConnection.arrived`."""
        return self._connection.arrived()

    @property
    def alone(self) -> bool:
        """Whether to poll only this connection for the next message."""
        now = perf_counter_ns()
        return self._attention.alone(self, now) and self._busy_poll.until(now) > now

    def skip(self, count: int) -> None:
        """See :meth:`warabi.protocol.wire.ProtocolConnection.skip`."""
        self._connection.skip(count)

    def fill_nowait(self, place: memoryview) -> int:
        """The same as :meth:`fill`, without waiting; returns the number of bytes received."""
        connection = self._connection
        connection.accept_payload(place)
        try:
            while connection.next_event() is NEED_DATA:
                count = self._transport.recv_into(connection.buffer())
                connection.received(count)
                self._busy_poll.moved(count)
        except BaseException as error:
            done = len(place) - connection.take_back()
            if isinstance(error, BlockingIOError) or (done and isinstance(error, OSError)):
                return done
            raise
        return len(place)

    async def drop_payload(self) -> None:
        """Receive and discard the rest of the current payload."""
        self._connection.accept_payload(None)
        if await self.next_event() is not PAYLOAD_DONE:
            raise ProtocolError("the peer closed the connection in the middle of a payload")

    async def send(self, parts: Sequence[Part], descriptors: Sequence[int] = ()) -> None:
        """Send *parts* as one frame; ignores a closed peer, since its requests are still executed.

        On a local socket *descriptors* are sent with the first part.
        """
        if not (descriptors or self._encrypted or self._sending.locked()):
            # Most frames are sent here, without the lock, since there is no checkpoint.
            try:
                parts = self._send_some(parts)
            except BlockingIOError:
                pass
            except OSError:
                self._deaf = True
            if self._deaf or not parts:
                return
        await self._acquire()
        try:
            await self._send(parts, descriptors)
        finally:
            self._sending.release()

    async def _acquire(self) -> None:
        """Acquire the lock for sending, without a checkpoint if it is free."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()

    def _send_some(
        self, parts: Sequence[Part], rights: Sequence[tuple[int, int, array.array[int]]] = ()
    ) -> Sequence[Part]:
        """Send what the socket accepts at once, and return the rest."""
        sent = self._socket.sendmsg(parts, rights)
        self._busy_poll.moved(sent)
        rest: list[Part] = []
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                rest.append(memoryview(part)[sent:])
                sent = 0
        return rest

    async def _send(self, parts: Sequence[Part], descriptors: Sequence[int] = ()) -> None:
        if self._deaf:
            return
        rights = []
        if descriptors:
            rights.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)))
        try:
            for piece in self._transport.sealed(parts):
                rest: Sequence[Part] = piece
                while rest:
                    try:
                        rest = self._send_some(rest, rights)
                        rights = []
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._socket)
        except (OSError, ProtocolError, PermissionDenied):
            self._deaf = True

    def send_nowait(self, parts: Sequence[Part]) -> int:
        """Send what the socket accepts at once, in a :meth:`stream`; returns the number of bytes.

        Parts that cannot be read are not sent.
        """
        try:
            sent = 0 if self._deaf else self._socket.sendmsg(parts)
            self._busy_poll.moved(sent)
            return sent
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._deaf = error.errno != errno.EFAULT
            return 0

    @contextlib.asynccontextmanager
    async def stream(self, patience: float) -> AsyncIterator[SendParts]:
        """Return a context for sending one frame in several parts; the context's value sends some.

        An incomplete frame closes the connection.  Sending raises ``trio.TooSlowError`` if the
        peer reads less than ``STALL_SIZE`` bytes in *patience* seconds.
        """

        async def send(*parts: Part) -> None:
            with trio.fail_after(_scaled(patience, sum(map(len, parts)))):
                await self._send(parts)

        await self._acquire()
        try:
            yield send
        except BaseException:
            self._deaf = True
            self.close()
            raise
        finally:
            self._sending.release()

    def close(self) -> None:
        """Close the connection so that replies that were sent still arrive.

        Unread input would make the kernel reset the connection, and the peer would lose data that
        it has not received yet.
        """
        with contextlib.suppress(OSError):  # nothing left to read
            for _ in range(_UNREAD):
                if not self._socket.recv(_UNREAD_PIECE):
                    break
        if self._socket.fileno() >= 0:
            self._idle_connections.closing(self._socket.fileno())
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def _scaled(patience: float, size: int) -> float:
    """Return the timeout for *size* bytes, given that for ``STALL_SIZE``, which is the minimum."""
    return patience * max(1.0, size / STALL_SIZE)
