"""The loop that reads requests from ``/dev/fuse`` and replies to them.

Workers are Trio tasks.  One of them, the *leader*, reads a request and handles it, then the next
one.  Most handlers complete without blocking, so that a request needs no turn of Trio's loop: only
a poll, a read, and a write.  Only if a handler blocks, on stable storage or a provider, another
worker becomes the leader.

A program that is killed while its request waits for a provider gets a reply at once, so that it can
exit.  The handler continues, since the provider may be executing the request: it is waited for, and
whatever the kernel would have got by the reply is released.

While no other request is pending, the leader polls for the next one for a moment, if the previous
one arrived quickly (``warabi/eventloop/busy_poll.py``), and then waits for it in the kernel: so
sequential requests are served without Trio.  Other tasks are delayed by at most ``_STREAK``
requests and moments.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import select
from collections.abc import Callable, Coroutine
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol

import trio

from warabi._core.caller import CALLER, Caller
from warabi._core.counters import Counters
from warabi._core.tuning import FUSE_MOMENT, HELLO_PATIENCE, KILL_CHECK
from warabi.eventloop.busy_poll import BusyPoll
from warabi.eventloop.eager_start import continued
from warabifs.frontends.kernel import protocol
from warabifs.frontends.kernel.fatal_signals import is_killed
from warabifs.frontends.kernel.protocol import HEADER, Header, Opcode
from warabifs.frontends.notifier import Notifier

log = logging.getLogger(__name__)

_STREAK = 16
"""Most requests between two turns of Trio's loop."""
_ROOM = 1 << 30
"""Most bytes of memory for blocked requests; beyond that no request is read, and killed threads are
not detected.  So it exceeds what the threads of a machine need, unless thousands of them write."""
_TASK = 16 * 1024
"""Bytes of overhead of a blocked request: its task, and a page of its buffer."""
_UNTOLD = protocol.MAX_BACKGROUND
"""Number of notifications, and of replies, beyond which a reply does not wait for a notification.

A notification waits for pages that are being read.  The reader may wait for one of the pending
requests, of which ``MAX_BACKGROUND`` are allowed, so not all of them may wait for notifications.
"""
_IDLE = 8
"""Idle workers that are kept."""
_SMALL = 16 * 1024
"""Up to this size in bytes a reply is copied into one buffer, rather than gathered."""
_OVER = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF)
_HEADER_SIZE = HEADER.size
_unpack_header = HEADER.unpack_from


class Early(NamedTuple):
    """A reply sent before the operation, which cannot fail, is executed by *rest*, which does not
    block and raises nothing, while the program continues.  No other request is handled until
    then."""

    answer: bytes
    rest: Callable[[], None]


class Told(NamedTuple):
    """A reply that is sent after all pending notifications; if these are too many, at once."""

    answer: bytes


Answer = bytes | memoryview | int | Early | Told | None
"""The result of a handler: the reply, or an errno; None for no reply.

A view must stay valid until the handler's task next awaits.
"""


class _Waiting:
    """A request whose handler is blocked.

    Attributes:
        thread: the calling thread.
        watched: it was interrupted, and a task checks whether that kills it.
    """

    __slots__ = ("caller", "thread", "watched")

    def __init__(self, thread: int, caller: Caller) -> None:
        self.thread = thread
        self.caller = caller
        self.watched = False


class Requests(Protocol):
    """The interface of the handler of the kernel's requests."""

    def handle(self, header: Header, body: memoryview) -> Coroutine[Any, Any, Answer]:
        """Handle a request, given its header and body, which is valid until the reply."""

    def refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        """Return the reply to a request whose handler raised *error*."""

    async def undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        """Release what *answer* would have given to the kernel, which got ``EINTR`` instead."""


class FuseSession:
    """A mount's connection to the kernel.

    Args:
        fd: ``/dev/fuse``, as it was mounted; the caller closes it.
        notifier: sends notifications, and replies that must come after them.
        counters: of the requests, by opcode.
    """

    def __init__(self, fd: int, notifier: Notifier, counters: Counters | None = None) -> None:
        self._fd = fd
        self._counters = counters or Counters()
        self._notifier = notifier
        os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._streak = 0
        self._busy_poll = BusyPoll()
        self._began = 0  # when the wait for the next request began
        self._over = False
        self._led = False  # whether a worker leads, or is about to
        self._busy = 0  # number of requests with blocked handlers
        self._held = 0  # approximate bytes of memory for them
        self._waiting: dict[int, _Waiting] = {}
        self._idle: list[trio.Event] = []
        self._nursery: trio.Nursery | None = None
        self._requests: Requests | None = None

    def begin(self, wanted: int) -> int:
        """Negotiate features with the kernel; returns those of *wanted* that it has.

        Raises:
            OSError: unmounted before it began.
            ValueError: the kernel is too old.
            TimeoutError: no request arrived.
        """
        buffer = memoryview(bytearray(protocol.BUFFER))
        while True:
            if not self._poll.poll(HELLO_PATIENCE):
                raise TimeoutError(errno.ETIMEDOUT, "the kernel did not start the FUSE session")
            count = os.readv(self._fd, [buffer])
            header = Header._make(_unpack_header(buffer))
            if header.opcode != Opcode.INIT:
                os.write(self._fd, protocol.refusal(header.unique, errno.EIO))
                continue
            agreed, reply = protocol.init_answer(buffer[_HEADER_SIZE:count], wanted)
            os.write(self._fd, protocol.answer(header.unique, len(reply)) + reply)
            if agreed:
                return agreed

    async def serve(self, requests: Requests) -> None:
        """Serve until the file system is unmounted or :meth:`stop` is called.

        Pending requests are completed.
        """
        self._requests = requests
        async with trio.open_nursery() as self._nursery:
            self._lead_on()

    def stop(self) -> None:
        """Read no more requests; :meth:`serve` returns when pending ones are completed."""
        self._over = True
        trio.lowlevel.notify_closing(self._fd)
        for idle in self._idle:
            idle.set()
        self._idle.clear()

    # Workers

    def _lead_on(self) -> None:
        """Make another worker the leader, if there is memory for another request."""
        if self._held >= _ROOM:
            self._led = False  # the first that completes will
        elif self._idle:
            self._led = True
            self._idle.pop().set()
        else:
            assert self._nursery is not None
            self._led = True
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        # Memory that is not allocated until it is used.
        place = mmap.mmap(-1, protocol.BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = memoryview(place)
        requests = self._requests
        assert requests is not None
        caller = Caller()
        CALLER.set(caller)
        while not self._over:
            count = self._take(buffer)
            if not count:
                await self._wait_for_request()
                continue
            header = Header._make(_unpack_header(buffer))
            body = buffer[_HEADER_SIZE:count]
            began = perf_counter_ns()
            handler = requests.handle(header, body)
            # Started directly: few block.
            try:
                step = handler.send(None)
            except StopIteration as done:
                self._send(header.unique, done.value)
                self._count(header.opcode, began, done.value)
                continue
            except Exception as error:
                self._send(header.unique, self._refusal(header, body, error))
                self._count(header.opcode, began)
                continue
            self._busy += 1
            self._held += _TASK + count
            self._lead_on()
            self._waiting[header.unique] = _Waiting(header.pid, caller)
            try:
                answer = await continued(handler, step)
                self._count(header.opcode, began, answer)
            except Exception as error:
                self._count(header.opcode, began)
                # For a killed thread the kernel has closed by now what its handler uses.
                answer = errno.EINTR if caller.gone else self._refusal(header, body, error)
            finally:
                self._busy -= 1
                self._held -= _TASK + count
                del self._waiting[header.unique]
            if caller.gone:
                caller.gone = False  # so that resources are released as for a living caller
                await self._undo(header, body, answer)
            else:
                self._send(header.unique, answer)
            if not self._led:
                self._led = True
            elif not self._over:
                if len(self._idle) >= _IDLE:
                    return
                idle = trio.Event()
                self._idle.append(idle)
                await idle.wait()

    def _count(self, opcode: int, began: int, answer: Answer = None) -> None:
        """Count a request whose handler has returned *answer*, or raised."""
        self._counters.add(opcode, perf_counter_ns() - began)
        if type(answer) is int:
            self._counters.add_error(opcode, errno.errorcode.get(answer, str(answer)))

    async def _wait_for_request(self) -> None:
        self._streak = 0
        with contextlib.suppress(trio.ClosedResourceError, OSError):
            await trio.lowlevel.wait_readable(self._fd)
        self._busy_poll.came(self._began)

    def _take(self, buffer: memoryview) -> int:
        """Read a request that is pending or arrives within a moment; returns its size, or 0: other
        tasks must get a turn."""
        if self._streak >= _STREAK:
            return 0
        self._streak += 1
        try:
            if self._busy:
                return os.readv(self._fd, (buffer,))
            self._began = began = perf_counter_ns()
            count = self._busy_poll.look(self._receive, buffer, began)
            if count < 0 and self._poll.poll(FUSE_MOMENT):
                count = os.readv(self._fd, (buffer,))
                self._busy_poll.came(began)
            return max(count, 0)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in _OVER:
                self.stop()
            elif error.errno != errno.ENOENT:  # withdrawn before it was read
                raise
        return 0

    def _receive(self, buffer: memoryview, size: int, flags: int) -> int:
        """The same as ``socket.recv_into``; never blocks."""
        return os.readv(self._fd, (buffer,))

    # Interruptions

    def interrupt(self, unique: int) -> None:
        """The calling thread has a pending signal; if that kills it, it gets ``EINTR`` and does not
        wait any more.

        The kernel notifies once per request: a signal that does not kill may be followed by one
        that does.
        """
        waiting = self._waiting.get(unique)
        if waiting is not None and not waiting.watched:
            waiting.watched = True
            assert self._nursery is not None
            self._nursery.start_soon(self._watch, unique, waiting)

    async def _watch(self, unique: int, waiting: _Waiting) -> None:
        while self._waiting.get(unique) is waiting:
            if is_killed(waiting.thread):
                waiting.caller.gone = True
                self._send(unique, errno.EINTR)
                return
            await trio.sleep(KILL_CHECK)

    async def _undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        """Undo a request that completed after the calling thread was killed."""
        assert self._requests is not None
        try:
            if isinstance(answer, Early):
                answer.rest()
            await self._requests.undo(header, body, answer)
        except Exception as error:
            self._refusal(header, body, error)  # logs it

    def _refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        """Return the reply to a request whose handler raised any *error*: an exception never ends
        the mount, and no request is left without a reply."""
        assert self._requests is not None
        self._counters.fail(header.opcode, error)
        try:
            return self._requests.refusal(header, body, error)
        except Exception as failure:
            log.error("unhandled exception in opcode %d", header.opcode, exc_info=failure)
            return errno.EIO

    def _send(self, unique: int, answer: Answer) -> None:
        """Send a reply; one that the kernel rejects becomes ``EIO``, since the program would wait
        forever."""
        if answer is None:
            return
        try:
            self._write(unique, answer)
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            if number in (*_OVER, errno.ENOENT):  # no thread waits for it any more
                return
            if number != errno.EFAULT:  # the file behind a view was truncated
                log.error("the kernel rejected a reply", exc_info=error)
            with contextlib.suppress(OSError):
                os.write(self._fd, protocol.refusal(unique, errno.EIO))

    def _write(self, unique: int, answer: bytes | memoryview | int | Early | Told) -> None:
        if isinstance(answer, int):
            os.write(self._fd, protocol.refusal(unique, answer))
        elif isinstance(answer, Early):
            self._send(unique, answer.answer)
            answer.rest()
        elif isinstance(answer, Told):
            if self._notifier.pending < _UNTOLD:
                reply = protocol.answer(unique, len(answer.answer)) + answer.answer
                self._notifier.soon(lambda: self.notify(reply))
            else:
                self._send(unique, answer.answer)
        elif len(answer) <= _SMALL:
            os.write(self._fd, protocol.answer(unique, len(answer)) + answer)
        else:
            os.writev(self._fd, (protocol.answer(unique, len(answer)), answer))

    # Backing files

    def register_backing(self, fd: int) -> int:
        """Register *fd* with the kernel; returns the ID by which a reply to OPEN refers to it.

        Raises:
            OSError: the kernel rejects it, or the mount has ended.
        """
        number: int = fcntl.ioctl(self._fd, protocol.BACKING_OPEN, protocol.backing(fd))
        return number

    def unregister_backing(self, number: int) -> None:
        """Unregister a backing ID."""
        with contextlib.suppress(OSError):  # the mount is over
            fcntl.ioctl(self._fd, protocol.BACKING_CLOSE, protocol.backing_id(number))

    def notify(self, notice: bytes) -> None:
        """Send the kernel a notification; raises ``OSError`` if the mount is over."""
        self._notifier.send(lambda: os.write(self._fd, notice))
