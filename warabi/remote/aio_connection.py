"""The connection of a Trio client.

One task reads.  The only pending request polls for its reply itself for a moment, without a turn of
Trio's loop, if replies arrive quickly.  Sending is synchronous as far as the socket accepts data,
and otherwise continues in a separate task, so that a cancelled caller never leaves an incomplete
frame.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
from collections import deque
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import trio

from warabi import errors
from warabi._core import forks
from warabi._core.caller import is_gone
from warabi._core.tuning import CLIENT_TURN, CONNECT_TIMEOUT, SLOW_FACTOR
from warabi.errors import ConnectionLost, TimedOut
from warabi.eventloop.busy_poll import BusyPoll
from warabi.eventloop.inline_wait import InlineWait
from warabi.protocol import address as _address
from warabi.protocol import handshake, wire
from warabi.protocol.auth import Security
from warabi.protocol.operations import OPERATIONS, ChangeScope, undo
from warabi.protocol.pending import Patience, PendingRequest, Replies
from warabi.protocol.transport import Plain, Transport
from warabi.protocol.wire import NEED_DATA, Limits

_IN_FLIGHT = 64  # most pending requests of one connection
_TURN_SIZE = 1024 * 1024
"""Bytes received after which other tasks get a turn; a call counts as a sixteenth of it."""


class TrioConnection(Replies):
    """A connection to an engine, used by tasks of one Trio loop.

    Args:
        sock: connected and non-blocking.
        transport: the transport on it.
        name: of the peer, for messages.
        patience: timeouts of requests.
        descriptors: whether the engine may send some, see :meth:`take_descriptors`.
        deadlines: whether a request also fails if the provider completes others, but not this one,
            within *timeout*: ten times that if the operation may wait for stable storage.
    """

    def __init__(
        self,
        sock: socket.socket,
        transport: Transport,
        name: str,
        patience: Patience,
        *,
        descriptors: bool = False,
        deadlines: bool = False,
    ) -> None:
        super().__init__()
        self._deadlines = deadlines
        self._plain = sock
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._transport = transport
        self._recv_into = transport.recv_into
        if descriptors:  # only from local engines, without TLS
            self._recv_into = functools.partial(
                _address.receive_with_descriptors, sock, self._descriptors
            )
        self._name = name
        self._patience = patience
        self._timeout = patience.silence
        self._late: dict[int, PendingRequest] = {}  # abandoned, to be undone when they complete
        self._heard = 0.0  # when data last arrived, by Trio's clock
        self._asked = False  # a sign of life was requested since then
        self._busy_poll = BusyPoll()
        self._awaited = 0  # pending requests whose replies are expected soon
        self._turn = 0  # time of the last checkpoint
        self._busy = trio.Event()  # set while requests are pending
        # With TLS the socket does not tell whether data are available.
        self._inline_wait = InlineWait(sock.fileno()) if isinstance(transport, Plain) else None
        self.limits = Limits()
        self._ids = itertools.count(1)
        self._slots = trio.Semaphore(_IN_FLIGHT)
        self._unyielding = 0  # bytes received since the last checkpoint
        self._unsent: deque[memoryview] = deque()
        self._has_unsent = trio.Event()
        self._running = trio.CancelScope()
        self._lost: tuple[type[errors.Exception], str] | None = None
        forks.register(self)

    def _forked(self) -> None:
        """In a forked child: the socket, and the loop, belong to the parent."""
        reason = "the connection belongs to the parent process; connect again in this fork"
        self._lost = (ConnectionLost, f"{self._name}: {reason}")
        if self._socket.fileno() >= 0:
            forks.disconnect([self._socket.fileno()])

    async def open(self, security: Security, *, local: bool, read_only: bool) -> None:
        """Execute the handshake; the arguments are those of ``handshake.client``.

        Raises:
            PermissionDenied: the engine refuses this side, or cannot authenticate itself.
            ProtocolError, TimedOut, ConnectionLost: the handshake failed.
        """
        limits = self._wire.limits
        dialogue = handshake.client(limits, security, local=local, read_only=read_only)
        say = next(dialogue)
        try:
            with trio.fail_after(min(self._timeout, CONNECT_TIMEOUT)):
                while True:
                    for parts in self._transport.sealed([say]):
                        # A refused client may get an error here: the received message explains it.
                        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                            await self._socket.send(b"".join(parts))  # small: fits into the buffer
                    say = dialogue.send(await self._next_event())
        except StopIteration as end:
            self.limits = end.value
        except trio.TooSlowError:
            raise TimedOut(f"{self._name}: connected, but the peer does not respond") from None
        except errors.Exception as error:
            raise type(error)(f"{self._name}: {error}") from None
        except OSError as error:
            reason = error.strerror or error
            raise ConnectionLost(f"{self._name}: {reason} while connecting") from error

    @trio.lowlevel.enable_ki_protection  # Ctrl-C is raised in the main task, at a checkpoint
    async def run(self) -> None:
        """Receive replies until the connection ends; then every pending request fails."""
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_unsent)
                    nursery.start_soon(self._watch_silence)
                    await self._read()
        finally:
            self._fail(ConnectionLost, "the connection was closed")
            self._socket.close()
            for fd in self.take_descriptors():  # their request was cancelled
                os.close(fd)

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._next_event())
        except (errors.Exception, OSError) as error:
            self._end(error)  # before another task sees the end of the stream

    def _end(self, error: errors.Exception | OSError) -> None:
        """Mark the connection as failed."""
        if isinstance(error, errors.Exception):
            self._fail(type(error), str(error))
        else:
            self._fail(ConnectionLost, error.strerror or str(error))
        self.close()

    def close(self) -> None:
        """Make :meth:`run` return; pending requests fail."""
        self._running.cancel()

    async def _next_event(self) -> wire.Event:
        while (event := self._wire.next_event()) is NEED_DATA:
            if self._unyielding >= _TURN_SIZE:
                self._unyielding = 0
                await trio.lowlevel.checkpoint()
            try:
                self._unyielding += max(self._receive(), _TURN_SIZE // 16)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                self._unyielding = 0
        return event

    def _receive(self) -> int:
        # Without waiting: between buffer() and the receive, a waiting request could be cancelled,
        # after which its buffer belongs to the caller again.
        count = self._recv_into(self._wire.buffer())
        self._received(count)
        return count

    def _received(self, count: int) -> None:
        if count == 0 and self._wire.between_messages:
            raise ConnectionResetError("the provider closed the connection")
        self._wire.received(count)
        self._heard = trio.current_time()
        self._asked = False

    def _not_sent(self, error: OSError) -> None:
        """Handle a send error; a message that the provider sent before it closed explains more."""
        try:
            while True:
                event = self._wire.next_event()
                if event is NEED_DATA:
                    self._receive()
                else:
                    self._take(event)
        except BlockingIOError:
            self._end(error)
        except (errors.Exception, OSError) as said:
            self._end(said)

    def _receive_alone(self, request: PendingRequest) -> None:
        """Receive the reply of the only pending request, without a turn of Trio's loop.

        It polls for a moment, and then waits as long as nothing else arrives.  The reading task
        sleeps meanwhile, and misses nothing: it is between two messages, or two chunks of one, and
        also receives without waiting.  What arrived together with the reply, to a request that
        waits for an event, is taken here, since the socket is not readable for it any more.
        """
        began = perf_counter_ns()
        asleep = False
        inline = self._inline_wait
        try:
            while not request.done:
                event = self._wire.next_event()
                if event is not NEED_DATA:
                    self._take(event)
                elif asleep:
                    if self._unsent or not (inline and inline.wait()):
                        return
                    self._receive()
                else:
                    place = self._wire.buffer()
                    count = self._busy_poll.look(self._recv_into, place, perf_counter_ns())
                    if count >= 0:
                        self._received(count)
                        continue
                    asleep = True
                    if inline:
                        inline.begin()
            while (event := self._wire.next_event()) is not NEED_DATA:
                self._take(event)
        except BlockingIOError:
            return
        except (errors.Exception, OSError) as error:
            self._end(error)
        if asleep:
            self._busy_poll.came(began)

    def _fail(self, kind: type[errors.Exception], reason: str) -> None:
        if self._lost is None:
            self._lost = (kind, f"{self._name}: {reason}")
        failed, self._requests = list(self._requests.values()), {}
        for request in failed:
            request.finish(error=self._lost_error(request.what))

    def _lost_error(self, what: str) -> errors.Exception:
        """Return a new error each time: one that is raised repeatedly collects tracebacks."""
        assert self._lost is not None
        kind, reason = self._lost
        return kind(f"{what}: {reason}")

    @trio.lowlevel.enable_ki_protection
    async def request(
        self,
        request: PendingRequest,
        header: Sequence[Any],
        payload: memoryview | None = None,
        *,
        soon: bool = True,
    ) -> Any:
        """Send *request* and return its result, or raise its error.

        *soon* is false for requests that wait for an event, such as the release of a lock: they do
        not count as pending ones, of which there may be only so many.
        """
        if self._lost is not None:
            raise self._lost_error(request.what)
        await trio.lowlevel.checkpoint_if_cancelled()
        turn = (self._inline_wait and self._inline_wait.turn) or CLIENT_TURN
        if perf_counter_ns() - self._turn > turn:
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._turn = perf_counter_ns()
        if not soon:
            return await self._request(request, header, payload, False)
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._acquire_slot(request)
        self._awaited += 1
        try:
            return await self._request(request, header, payload, self._awaited == 1)
        finally:
            self._awaited -= 1
            self._slots.release()

    async def _acquire_slot(self, request: PendingRequest) -> None:
        """Wait until one of the pending requests has ended.

        Raises:
            TimedOut: the request's timeout expired, or it would change something for a cancelled
                caller; it was not sent.
        """
        request.since = trio.current_time()  # this wait counts for the request's timeout
        limit = self._limit(request)
        with trio.move_on_after(limit) as scope:
            await self._slots.acquire()
        if scope.cancelled_caught:
            error = TimedOut(
                f"{request.what}: not sent to {self._name}, which has not replied to {_IN_FLIGHT}"
                f" earlier requests for {limit:g} s"
            )
            error.alone = True
            raise error
        operation = OPERATIONS.get(request.operation)
        if operation is not None and operation.changes is not ChangeScope.NOTHING and is_gone():
            self._slots.release()
            error = TimedOut(f"{request.what}: not sent, its caller was cancelled")
            error.alone = error.unsent = True
            raise error

    async def _request(
        self,
        request: PendingRequest,
        header: Sequence[Any],
        payload: memoryview | None,
        alone: bool,
    ) -> Any:
        if self._lost is not None:
            raise self._lost_error(request.what)
        request_id = next(self._ids)
        size = 0 if payload is None else len(payload)
        frame = wire.frame([request_id, *header], size, self.limits)
        request.event = trio.Event()
        request.since = request.since or trio.current_time()
        request.expires = request.since + self._limit(request)
        self._requests[request_id] = request
        self._busy.set()
        self._send([frame, payload])
        began = perf_counter_ns()
        if alone:
            self._receive_alone(request)
        try:
            if not request.done:
                await request.event.wait()
                self._turn = perf_counter_ns()
                if alone:
                    self._busy_poll.came(began)
        except trio.Cancelled:
            if request.done and request.error is None and request.late is not None:
                request.late(request.result)  # it completed after the wait was cancelled
            raise
        finally:
            answered = request.done
            if not answered:
                self._abandon(request_id, request)
        if not answered:
            raise self._timed_out(request)
        return request.outcome()

    def _timed_out(self, request: PendingRequest) -> TimedOut:
        passed = trio.current_time() - max(self._heard, request.since)
        if passed >= self._timeout:
            return TimedOut(
                f"{request.what}: no reply from {self._name} within {self._timeout:g} s"
            )
        error = TimedOut(
            f"{request.what}: {self._name} is alive, but has not completed this request for"
            f" {trio.current_time() - request.since:.0f} s"
        )
        error.alone = True
        return error

    def _deadline(self, request: PendingRequest) -> float:
        """Return when *request* times out, by Trio's clock, if nothing arrives until then."""
        return min(max(self._heard, request.since) + self._timeout, request.expires)

    def _limit(self, request: PendingRequest) -> float:
        """Return the deadline of *request* in seconds, regardless of signs of life."""
        limit = self._patience.of(request.operation)
        if not self._deadlines:
            return limit
        operation = OPERATIONS.get(request.operation)
        if request.operation == "lock":
            return limit  # unlike ``watch``, it is not just asked again
        slow = operation is None or operation.waits or operation.long
        return min(limit, self._timeout * (SLOW_FACTOR if slow else 1))

    async def _watch_silence(self) -> None:
        """Fail requests if the provider has been silent for too long, or does not complete one of
        them.

        After half of the timeout a sign of life is requested, which a busy provider sends, and a
        stopped or unreachable one does not.  A request with an expired deadline fails regardless.
        """
        while True:
            await self._busy.wait()
            now = trio.current_time()
            since = max(self._heard, min((r.since for r in self._requests.values()), default=now))
            late = [r for r in self._requests.values() if now >= self._deadline(r)]
            if late:
                for request in late:
                    request.event.set()
                await trio.lowlevel.checkpoint()  # they remove themselves from the table
            elif not self._requests:
                self._busy = trio.Event()
            else:
                if now - since >= self._timeout / 2 and not self._asked:
                    self._asked = True
                    self._send([wire.frame([next(self._ids), 0, "ping", [], None])])
                look = since + self._timeout / (1 if self._asked else 2)
                await trio.sleep_until(min(look, *map(self._deadline, self._requests.values())))

    def _pop(self, number: int) -> PendingRequest | None:
        return self._requests.pop(number, None) or self._late.pop(number, None)

    def undo_later(
        self, request: PendingRequest, provider_id: int, arguments: Sequence[Any]
    ) -> None:
        """Undo *request* if it completes after it was abandoned."""

        def late(result: Any) -> None:
            undoing = undo(request.what, arguments, result)
            if undoing is not None and self._lost is None:
                self._send([wire.frame([next(self._ids), provider_id, *undoing, None])])

        request.late = late

    def _abandon(self, request_id: int, request: PendingRequest) -> None:
        request.finish(error=errors.TimedOut(f"{request.what}: the request was abandoned"))
        self._requests.pop(request_id, None)  # its late reply is discarded
        if request.late is not None:
            self._late[request_id] = request
        if self._message is not None and self._message.header[0] == request_id:
            self._wire.drop_payload()

    def _send(self, parts: list[Any]) -> None:
        # With TLS, data that the socket does not accept at once are held twice, also encrypted.
        pieces = self._transport.sealed([part for part in parts if part is not None])
        views = [memoryview(part) for piece in pieces for part in piece]
        if not self._unsent:
            try:
                sent = self._plain.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._not_sent(error)
                return
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]
        if views:
            self._unsent.extend(views)
            self._has_unsent.set()

    async def _send_unsent(self) -> None:
        while True:
            await self._has_unsent.wait()
            while self._unsent:
                try:
                    sent = await self._socket.send(self._unsent[0])
                except OSError as error:
                    self._not_sent(error)
                    return
                if sent == len(self._unsent[0]):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = self._unsent[0][sent:]
            self._has_unsent = trio.Event()
