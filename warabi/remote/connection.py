"""The connection of a blocking client: socket I/O in the calling threads.

There is no background thread.  Any number of threads share a connection; requests are
pipelined.  A thread that waits for a reply while no other reads becomes the reader and finishes
other threads' requests too, until its own is done; then it wakes another waiter to take over.

Locks: ``_send_lock`` is held while one frame is written.  ``_mutex`` guards the table of requests,
and is held when a thread becomes the reader; it is innermost and never held over a system call.  A
sender that finds the socket full reads replies while it waits, for the provider may be stuck until
they are taken.

Interrupts.  SIGINT raises ``KeyboardInterrupt`` in the main thread, between any two steps, and
again a moment later in the code that cleans up after the first.  Its effect on other threads is
limited in three ways:

* Once several threads use a connection, or while a region is being created, whose ID must not be
  lost, the main thread's calls run under ``interrupts.uninterrupted``, and so are interrupted only
  where they wait, after a moment (:meth:`BlockingConnection.guarded`).
* Reading and sending are protected as by robust mutexes (``PTHREAD_MUTEX_ROBUST``): they are
  released in any case, and a thread records the step that it begins, so that the next one detects
  an inconsistent state.  A reader that is interrupted while it waits in the kernel has lost
  nothing; one that is interrupted elsewhere, or a sender, closes the connection.  A thread
  that waits checks each second by itself whether it has to become the reader.
* A call that an exception leaves withdraws its requests: afterwards nothing accesses its
  buffers.  Before that, the connection is marked as ``torn``, so that it is not used any more if
  the withdrawal is interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from warabi import errors
from warabi._core import forks, interrupts
from warabi._core.tuning import (
    CLOSE_PATIENCE,
    CONNECT_TIMEOUT,
    DEADLINE_CHECK,
    HANDOVER_POLL,
    INTERRUPT_CHECK,
)
from warabi.errors import ConnectionLost, TimedOut
from warabi.eventloop.busy_poll import NOTHING, UNKNOWN, BusyPoll
from warabi.protocol import address, handshake, transport, wire
from warabi.protocol.address import Endpoint
from warabi.protocol.auth import Security
from warabi.protocol.pending import Patience, PendingRequest, Replies
from warabi.protocol.transport import Part
from warabi.protocol.wire import NEED_DATA, Limits, Message

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # computed once, which saves time

_CONSISTENT, _RECEIVING, _PARSING = range(3)
"""Steps of the reader.  An interrupt of the first leaves a consistent state, that of the second one
that :attr:`BusyPoll.received` describes, that of the third an unknown one."""


class BlockingConnection(Replies):
    """A connection to the engine at *endpoint*.

    Args:
        endpoint: where it listens.
        patience: timeouts of calls.
        security: what is presented to the engine, and required of it.
        read_only: request read-only access.
        descriptors: whether the engine may send some, see :meth:`take_descriptors`; this slows down
            every reply a little.  Only for local engines.

    Raises:
        ConnectionFailed: no engine listens there.
        PermissionDenied: the engine refuses this side, or cannot authenticate itself.
        ProtocolError: it is not an engine.
        TimedOut: it does not complete the handshake.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        patience: Patience,
        security: Security | None = None,
        read_only: bool = False,
        *,
        descriptors: bool = False,
    ) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.patience = patience
        self.timeout = timeout = patience.silence
        self._ids = itertools.count(1)
        self._send_lock = forks.lock()
        self._mutex = forks.lock()
        self._reading = False  # a thread is the reader
        self._reader = 0  # it, or the one before
        self._stage = _CONSISTENT  # of the reader
        self._sending = False  # a frame is being sent, or was not sent to its end
        self._lost: errors.Exception | None = None
        self._filling: PendingRequest | None = None  # whose buffer a payload is being received into
        self._undoing = 0  # threads that erase what interrupted requests create
        self._owner = threading.get_ident()
        self.shared = False  # by several threads
        self.making: set[int] = set()  # requests that create something
        self.torn = False  # a call was interrupted, and its cleanup is not done
        self.interruptible = True  # also under interrupts.uninterrupted()
        self._busy_poll = BusyPoll()  # the reader's
        self._heard = 0.0  # when something last came, by the monotonic clock
        self._asked = False  # a sign of life was asked for since then
        forks.register(self)
        security = security or Security()
        deadline = time.monotonic() + min(timeout, CONNECT_TIMEOUT)
        self._socket, self._transport = transport.connect(
            endpoint, min(timeout, CONNECT_TIMEOUT), security
        )
        # Blocking with a receive timeout: one system call per reply, and no endless wait.
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(DEADLINE_CHECK), 0)
        )
        self._recv_into: Callable[[memoryview, int, int], int] = self._transport.recv_into
        self._at_once = isinstance(self._transport, transport.Plain) and not descriptors  # in C
        if descriptors:
            self._recv_into = functools.partial(
                address.receive_with_descriptors, self._socket, self._descriptors
            )
        try:
            self.limits = self._open(deadline, security, read_only)
        except BaseException:
            self._socket.close()
            raise

    def _open(self, deadline: float, security: Security, read_only: bool) -> Limits:
        dialogue = handshake.client(
            self._wire.limits, security, local=self.endpoint.local, read_only=read_only
        )
        say = next(dialogue)
        try:
            while True:
                for parts in self._transport.sealed([say]):
                    # A refused client may get an error here: the received message explains it.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self._socket.sendall(b"".join(parts))
                while (event := self._wire.next_event()) is NEED_DATA:
                    if time.monotonic() > deadline:
                        raise TimedOut(f"{self.endpoint}: connected, but the peer does not respond")
                    try:
                        self._wire.received(self._recv_into(self._wire.buffer(), 0, 0))
                    except BlockingIOError:
                        continue
                say = dialogue.send(event)
        except StopIteration as end:
            limits: Limits = end.value
            return limits
        except TimedOut:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise ConnectionLost(f"{self.endpoint}: {reason} while connecting") from error
        except errors.Exception as error:
            raise type(error)(f"{self.endpoint}: {error}") from None

    @property
    def own_limits(self) -> Limits:
        """The limits of this side; ``limits`` are the provider's."""
        return self._wire.limits

    @property
    def usable(self) -> bool:
        if self.torn:
            self._fail("a call was interrupted, and so was the cleanup after it")
        return self._lost is None

    # Sending

    def submit(
        self, request: PendingRequest, header: list[Any], payload: memoryview | None = None
    ) -> None:
        """Send *request*, whose header lacks only its ID, in front.

        Raises:
            ConnectionLost, TimedOut: it cannot be sent.
            ProtocolError: it exceeds the provider's limits; nothing was sent.
        """
        request.connection = self
        request.number = number = next(self._ids)
        request.expires = time.monotonic() + self.patience.of(request.operation)
        size = 0 if payload is None else len(payload)
        parts: list[Part] = [wire.frame([number, *header], size, self.limits)]
        if payload is not None:
            parts.append(payload)
        with self._mutex:
            if self._lost is not None:
                raise self._lost
            self._requests[number] = request
            if request.late is not None:
                self.making.add(number)
        try:
            with self._send_lock:
                self._send(parts, request)
        except BaseException:
            with self._mutex:
                self._requests.pop(number, None)
                self.making.discard(number)
            raise

    def _send(self, parts: list[Part], request: PendingRequest) -> None:
        if self._sending:
            raise self._fail("interrupted while a request was being sent")
        self._sending = True
        try:
            for piece in self._transport.sealed(parts):
                self._send_piece(piece)
            self._sending = False
        except OSError as error:
            self.poll()  # a last message of the provider explains more than EPIPE
            raise self._fail(f"{request.what}: {error.strerror}") from error
        except BaseException:
            self._fail(f"{request.what}: interrupted while it was being sent")
            raise

    def _send_piece(self, parts: list[Part]) -> None:
        since = 0.0  # time since which nothing could be sent
        while parts:
            try:
                sent = self._socket.sendmsg(parts, (), _AT_ONCE)
                since = 0.0
            except BlockingIOError:
                since = since or time.monotonic()
                self._wait_for_room(since + self.timeout)
                continue
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[sent:]

    def _wait_for_room(self, deadline: float) -> None:
        poller = select.poll()
        try:
            poller.register(self._socket, select.POLLOUT | select.POLLIN)
        except ValueError:  # closed concurrently; the next send reports it
            return
        for _, event in poller.poll(DEADLINE_CHECK * 1000):
            if event & select.POLLIN and not self.poll():
                time.sleep(HANDOVER_POLL)  # another thread is reading
            return
        if self.interruptible:
            interrupts.check()
        if time.monotonic() > deadline:
            raise TimedOut(str(self._fail("the provider does not read more requests", TimedOut)))

    # Receiving

    def wait(self, request: PendingRequest) -> Any:
        """Wait for *request*; returns its result.

        Raises:
            TimedOut: no reply, nor any other sign of life, for ``timeout`` seconds.  The request
                may still take effect.
            ConnectionLost: the provider disconnected.
        """
        since = time.monotonic()
        while not request.done:
            if not self._read(since, request):
                interrupts.uninterrupted(self._follow, since, request)
        return request.outcome()

    def _follow(self, since: float, request: PendingRequest) -> None:
        """Wait until *request* is done, or until this thread has become the reader and done it."""
        with self._mutex:
            self.shared = True
            request.event = request.event or interrupts.Wakeup()
            request.waiters += 1
        try:
            while not self._read(since, request) and not request.done:
                pause = INTERRUPT_CHECK if interrupts.waits_held() else DEADLINE_CHECK
                if not request.event.wait(pause) or request.expires < time.monotonic():
                    self._check_silence(request, since)
        finally:
            with self._mutex:
                request.waiters -= 1
            if request.done:
                request.event.set()  # for another thread that waits for the same request
            else:
                self._wake_another()  # the wake-up may have been for this one

    def withdraw(self, request: PendingRequest) -> None:
        """Abandon *request*, whose caller does not wait any more; nothing accesses its buffer
        afterwards.

        A thread erases what it creates, since the reply may take long.
        """
        if request.late is not None and not request.done:
            with self._mutex:
                if request.number not in self._requests or request.undone:
                    return  # it was not sent: no answer will come
                request.undone = True
                self._undoing += 1
            undoing = threading.Thread(
                target=self._undo, args=(request, request.late), name="warabi-undo", daemon=True
            )
            undoing.start()
            return
        self._give_up(request, ConnectionLost(f"{request.what}: the call was interrupted"))

    def _undo(self, request: PendingRequest, undo: Callable[[Any], None]) -> None:
        try:
            undo(self.wait(request))
        except errors.Exception as error:
            log.debug("%s was interrupted, and rolling it back failed: %s", request.what, error)
        finally:
            with self._mutex:
                self._undoing -= 1

    def _give_up(self, request: PendingRequest, error: errors.Exception) -> None:
        with self._mutex:
            request.finish(error=error)
        # Another thread that receives into the buffer just now will soon be done, or is made to.
        deadline = time.monotonic() + DEADLINE_CHECK
        while self._filled_by_another(request):
            if time.monotonic() > deadline and self.usable:
                self._fail(f"{request.what}: abandoned in the middle of its reply")
            time.sleep(HANDOVER_POLL)

    def _filled_by_another(self, request: PendingRequest) -> bool:
        """Whether another thread is receiving into the buffer of *request*, which was abandoned."""
        with self._mutex:
            if self._filling is not request:
                return False
            if self._reading and self._reader != threading.get_ident():
                return True
            self._wire.drop_payload()  # the rest is for the next reader to throw away
            self._filling = None
            return False

    def guarded(
        self,
        requests: Sequence[PendingRequest],
        call: Callable[..., _T],
        arguments: tuple[Any, ...] = (),
    ) -> _T:
        """``call(*arguments)``, which sends or waits here; if it fails or is interrupted, those of
        *requests* that are not done are withdrawn, including those that it added."""
        guarded = self.shared or self.making
        try:
            if guarded:
                result: _T = interrupts.uninterrupted(self._guarded, requests, call, arguments)
                return result
            try:
                return call(*arguments)
            except errors.Exception:
                self.withdraw_all(requests)  # what was sent before that
                raise
        except errors.Exception:
            raise
        except BaseException:
            # Nothing can interrupt this step, for it calls nothing: see interrupts.py.
            self.torn = not (guarded and (not requests or requests[-1].done))
            interrupts.uninterrupted(self._recover, requests)
            raise

    def _guarded(
        self,
        requests: Sequence[PendingRequest],
        call: Callable[..., _T],
        arguments: tuple[Any, ...],
    ) -> _T:
        try:
            return call(*arguments)
        except BaseException:
            self.withdraw_all(requests)
            raise

    def _recover(self, requests: Sequence[PendingRequest]) -> None:
        """Restore a consistent state after a call of this thread was interrupted."""
        if self._lost is None:
            self._read(0.0, None)
        held = False
        try:
            (held,) = map(self._send_lock.acquire, (False,))
            if held and self._sending:
                self._fail("interrupted while a request was being sent")
        finally:
            if held:
                self._send_lock.release()
        self.withdraw_all(requests)
        self.torn = False

    def withdraw_all(self, requests: Sequence[PendingRequest]) -> None:
        """As :meth:`withdraw`, for those that were sent and not answered."""
        for request in requests:
            if request.connection is not None and not request.done:
                self.withdraw(request)

    def _wake_another(self) -> None:
        """Wake another waiting thread, which may have to become the reader."""
        with self._mutex:
            for request in self._requests.values():
                if request.waiters and not request.done:
                    request.event.set()
                    return

    def poll(self) -> bool:
        """Process replies that have arrived, without waiting; False if another thread reads."""
        return self.usable and self._read(0.0, None)

    def _check_silence(self, request: PendingRequest, since: float) -> None:
        """Request a sign of life after half the timeout without one, fail after all of it.

        A busy provider sends one; a stopped or unreachable one does not.  If it sends signs of
        life, but never the reply, *request* fails when its deadline expires.
        """
        if self.interruptible:
            interrupts.check()
        now = time.monotonic()
        silent = now - max(since, self._heard)
        if silent > self.timeout:
            self._time_out(request, f"{self.timeout:g} s")
        elif now > request.expires:
            self._time_out(request, f"{self.patience.of(request.operation):g} s, its deadline")
        elif silent > self.timeout / 2 and not self._asked:
            self._ask()

    def _ask(self) -> None:
        # Without waiting: the caller may be the reader, on which a sender may depend.
        poller = select.poll()
        try:
            poller.register(self._socket, select.POLLOUT)
        except ValueError:  # closed concurrently; waiting callers are notified
            return
        held = False
        try:
            if poller.poll(0):
                (held,) = map(self._send_lock.acquire, (False,))  # in one step: see interrupts.py
            if held:
                self._asked = True
                self._send(
                    [wire.frame([next(self._ids), 0, "ping", [], None])], PendingRequest("ping")
                )
        finally:
            if held:
                self._send_lock.release()

    def _read(self, since: float, request: PendingRequest | None) -> bool:
        """Read until *request* is done, or with None until no more data are available.

        Returns False if another thread reads.
        """
        reading = False
        try:
            with self._mutex:
                if self._reading:
                    return False
                self._reading = reading = True
                self._reader = reader = threading.get_ident()
            if reader != self._owner:
                self.shared = True
            if self._stage:
                self._repair()
            self._read_replies(since, request)
        except TimedOut:
            raise
        except errors.Exception as error:
            self._fail(str(error), type(error))
        except OSError as error:
            self._fail(error.strerror or str(error))
        finally:
            if reading:
                self._reading = False  # nothing can interrupt this step: see interrupts.py
                self._resigned(request)
        return True

    def _resigned(self, request: PendingRequest | None) -> None:
        """Clean up after this thread has read, and let another one become the reader."""
        with self._mutex:
            if request is not None and request.done:
                self._requests.pop(request.number, None)
                self.making.discard(request.number)
            if self._lost is not None:
                if request is not None:  # also if an interrupt prevented that
                    request.finish(error=self._lost_error(request))
                if not self._reading:
                    self._socket.close()
        if self._requests:
            self._wake_another()

    def _repair(self) -> None:
        """Continue after a reader that was interrupted.

        Raises:
            ConnectionLost: its state is unknown.
        """
        stage, self._stage = self._stage, _PARSING
        count = self._busy_poll.received
        if stage == _PARSING or not self._at_once or count in (UNKNOWN, 0):
            raise ConnectionLost("interrupted while a reply was being received")
        if count != NOTHING:
            self._wire.received(count)

    def _read_replies(self, since: float, request: PendingRequest | None) -> None:
        if request is not None and (place := self._wire.vacant()) is not None:
            count = self._receive(place, since, request)
            if count > 0:
                # The fast path: exactly the reply to this request.
                message = self._wire.whole(count)
                if message is not None and request.take_whole(*message):
                    self._stage = _CONSISTENT
                    return
                self._wire.received(count)
        while request is None or not request.done:
            self._stage = _PARSING
            event = self._wire.next_event()
            if event is not NEED_DATA:
                self._take(event)
                continue
            count = self._receive(self._wire.buffer(), since, request)
            if count == 0:
                raise ConnectionLost("the provider closed the connection")
            if count > 0:
                self._wire.received(count)
                if request is not None and self._heard > request.expires:
                    self._stage = _CONSISTENT
                    self._check_silence(request, since)
            elif request is None:
                return
        self._stage = _CONSISTENT

    def _receive(self, place: memoryview, since: float, request: PendingRequest | None) -> int:
        """Receive into *place*; returns -1 if nothing has arrived for a while or, without a
        *request* to wait for, if nothing is available."""
        self._busy_poll.received = UNKNOWN
        self._stage = _RECEIVING
        try:
            if request is None:
                count = self._recv_into(place, 0, socket.MSG_DONTWAIT)
            else:
                count = self._busy_poll.receive(self._recv_into, place)
        except BlockingIOError:
            self._stage = _CONSISTENT
            if request is not None:
                self._check_silence(request, since)
            return -1
        self._stage = _PARSING
        if count:
            self._heard = time.monotonic()
            self._asked = False
        return count

    def _take(self, event: wire.Event) -> None:
        if isinstance(event, Message) and event.payload:
            # With the lock, since another thread may abandon the request.
            with self._mutex:
                super()._take(event)
                found = self._requests.get(event.header[0])
                self._filling = found if found is not None and found.into is not None else None
        else:
            self._filling = None
            super()._take(event)

    def _finish(self, message: Message) -> None:
        with self._mutex:  # see _take
            request = self._requests.pop(message.header[0], None)
            self.making.discard(message.header[0])
            if request is None:
                return
            if request.done:
                return
            try:
                request.take_reply(message)
            except errors.Exception as error:  # already removed from the table
                request.finish(error=error)
                raise

    def _time_out(self, request: PendingRequest, patience: str) -> None:
        """Fail *request*; its late reply must not access the caller's buffer."""
        with self._mutex:
            request.finish(
                error=TimedOut(f"{request.what}: no reply from {self.endpoint} within {patience}")
            )
            filling = self._filling is request
        if filling:
            self._fail(f"{request.what}: its reply stalled")
            while self._filled_by_another(request):
                time.sleep(HANDOVER_POLL)

    # The end

    def _fail(self, reason: str, kind: type[errors.Exception] = ConnectionLost) -> errors.Exception:
        """Mark the connection as failed; every pending request fails."""
        return interrupts.uninterrupted(self._lose, kind(f"{self.endpoint}: {reason}"))

    def _lose(self, error: errors.Exception) -> errors.Exception:
        with self._mutex:
            self._lost = self._lost or error
            failed, self._requests = list(self._requests.values()), {}
            if not self._reading:
                self._socket.close()
            else:  # the reader closes it, so that the descriptor is not reused meanwhile
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        for request in failed:
            request.finish(error=self._lost_error(request))
        return self._lost

    def _lost_error(self, request: PendingRequest) -> errors.Exception:
        assert self._lost is not None
        return type(self._lost)(f"{request.what}: {self._lost}")

    def _forked(self) -> None:
        """In a forked child: close the socket without sending anything, since the parent uses
        it."""
        self._reading = False
        self._lost = ConnectionLost(
            f"{self.endpoint}: the connection belongs to the parent process; connect again in this"
            " fork"
        )
        self._socket.close()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.event = None  # its lock may be held by a thread of the parent
            request.finish(error=ConnectionLost(f"{request.what}: {self._lost}"))

    def _unfinished(self) -> bool:
        """Whether there are pending requests that were not abandoned."""
        with self._mutex:
            return bool(self._undoing) or any(not r.done for r in self._requests.values())

    def close(self, patience: float = CLOSE_PATIENCE) -> None:
        """Wait for pending requests that must not be lost, and close."""
        deadline = time.monotonic() + patience
        while self._unfinished() and self.usable and time.monotonic() < deadline:
            if not self.poll():
                time.sleep(HANDOVER_POLL)
                continue
            if self._unfinished() and self.usable:
                with contextlib.suppress(ValueError):  # closed concurrently
                    poller = select.poll()
                    poller.register(self._socket, select.POLLIN)
                    poller.poll(10)
        self._fail("the client was closed")
