"""The loop that takes requests from ``/dev/fuse`` and answers them.

Workers are Trio tasks.  One of them leads: it takes a request and handles it, then the next one.
Most handlers come to their end without waiting, so that a request costs no turn of Trio's loop:
a look whether it is there, one read, and one write.  Only when a handler waits, for the medium or
for a provider, another worker becomes the leader.

A program that is killed while its request waits for a provider gets an answer at once, so that it
can end.  Its handler goes on, for the provider may be at it: what has been sent is waited for, and
what the kernel would have got by the answer is given back.

While no other request is being served, the leader looks for the next one for a moment, if the one
before came so soon (``warabi/eventloop/busy_poll.py``), and then waits for it in the kernel:
whoever sends one request after the other is answered without Trio.  Other tasks wait no
longer for that than ``_STREAK`` requests and moments.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import queue
import select
import threading
from collections.abc import Callable, Coroutine
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol

import trio

from warabi._core.caller import CALLER, Caller
from warabi.eventloop.busy_poll import Lookout
from warabi.eventloop.eager_start import continued
from warabifs.frontends.kernel import protocol
from warabifs.frontends.kernel.fatal_signals import is_killed
from warabifs.frontends.kernel.protocol import HEADER, Header, Opcode

log = logging.getLogger(__name__)

_MOMENT = 5
"""Milliseconds for which the loop may stand still when nothing is under way.

Shorter than the kernel's clock ticks, it would have to set a timer each time, which costs more
than all else that it does for a request.
"""
_STREAK = 16
"""Requests that may be taken between two turns of Trio's loop."""
_ROOM = 1 << 30
"""Bytes of memory that requests which wait may take; beyond that none is taken, nor is it noticed
that a thread which waits is killed.  So this is more than the threads of a machine take, unless
thousands of them write."""
_TASK = 16 * 1024
"""Bytes that such a request takes besides what was asked for: its task, and its buffer's page."""
_LOOK = 0.2
"""Seconds between two looks whether a thread that was interrupted is being killed."""
_IN_KERNEL = 0.5
"""Seconds after which a thread that tells the kernel something must have got there."""
_UNTOLD = protocol.MAX_BACKGROUND
"""Notices and answers, an equal number, after which an answer does not wait for a notice.

A notice waits for pages that are being read.  Who reads may wait for one of the requests under way
to be answered, of which ``MAX_BACKGROUND`` are allowed, so not all of them may wait for notices.
"""
_IDLE = 8
"""Workers that are kept for later."""
_SMALL = 16 * 1024
"""Bytes up to which an answer is copied together rather than gathered."""
_OVER = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF)
_HEADER_SIZE = HEADER.size
_unpack_header = HEADER.unpack_from
_HELLO = 30_000  # milliseconds for the kernel to say that a mount begins


class Early(NamedTuple):
    """An answer to what is not done yet, but cannot fail: done by *rest*, which does not wait and
    raises nothing, while the program goes on.  Until then nothing else is handled."""

    answer: bytes
    rest: Callable[[], None]


class Told(NamedTuple):
    """An answer that the kernel gets once it has been told all that it was to be told before; if
    that is too much to wait for, at once."""

    answer: bytes


Answer = bytes | memoryview | int | Early | Told | None
"""Of a handler: what the kernel gets, or an errno; None for what is not answered.

A view has to be valid until the handler's task waits for anything.
"""


class _Waiting:
    """A request whose handler waits.

    Attributes:
        thread: that made it.
        watched: it was interrupted, and a task looks whether that kills it.
    """

    __slots__ = ("caller", "thread", "watched")

    def __init__(self, thread: int, caller: Caller) -> None:
        self.thread = thread
        self.caller = caller
        self.watched = False


class Requests(Protocol):
    """What handles the kernel's requests."""

    def handle(self, header: Header, body: memoryview) -> Coroutine[Any, Any, Answer]:
        """Handle a request, given its header and what follows, which is valid until the answer."""

    def refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        """The answer to a request whose handler raised *error*."""

    async def undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        """Give back what *answer* would have given to the kernel, which got another one: that the
        request was interrupted."""


class FuseSession:
    """A mount's connection to the kernel.

    Args:
        fd: ``/dev/fuse``, as it was mounted; the caller closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._streak = 0
        self._lookout = Lookout()
        self._began = 0  # when the wait for the next request did
        self._over = False
        self._led = False  # a worker leads, or is about to
        self._busy = 0  # requests whose handlers wait
        self._held = 0  # bytes of memory that they take, about
        self._waiting: dict[int, _Waiting] = {}
        self._idle: list[trio.Event] = []
        self._nursery: trio.Nursery | None = None
        self._requests: Requests | None = None
        self._notices: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._telling: threading.Thread | None = None
        self._notifying = threading.Lock()
        self._silent = False

    def begin(self, wanted: int) -> int:
        """Agree with the kernel on features; returns those of *wanted* that it has.

        Raises:
            OSError: the mount was over before it began.
            ValueError: the kernel is too old.
            TimeoutError: it says nothing.
        """
        buffer = memoryview(bytearray(protocol.BUFFER))
        while True:
            if not self._poll.poll(_HELLO):
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

        What is being served then is carried to its end.
        """
        self._requests = requests
        async with trio.open_nursery() as self._nursery:
            self._lead_on()

    def stop(self) -> None:
        """Take no more requests; :meth:`serve` returns when those under way are answered."""
        self._over = True
        trio.lowlevel.notify_closing(self._fd)
        for idle in self._idle:
            idle.set()
        self._idle.clear()

    # Workers

    def _lead_on(self) -> None:
        """Have another worker lead, if there is room for another request."""
        if self._held >= _ROOM:
            self._led = False  # the first that is done will
        elif self._idle:
            self._led = True
            self._idle.pop().set()
        else:
            assert self._nursery is not None
            self._led = True
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        # Memory that takes no room until it is used.
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
            handler = requests.handle(header, body)
            # Begun right here: few have to wait for anything.
            try:
                step = handler.send(None)
            except StopIteration as done:
                self._send(header.unique, done.value)
                continue
            except Exception as error:
                self._send(header.unique, self._refusal(header, body, error))
                continue
            self._busy += 1
            self._held += _TASK + count
            self._lead_on()
            self._waiting[header.unique] = _Waiting(header.pid, caller)
            try:
                answer = await continued(handler, step)
            except Exception as error:
                # For a killed thread the kernel has closed by now what its handler uses.
                answer = errno.EINTR if caller.gone else self._refusal(header, body, error)
            finally:
                self._busy -= 1
                self._held -= _TASK + count
                del self._waiting[header.unique]
            if caller.gone:
                caller.gone = False  # what is given back, is not for the one that is gone
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

    async def _wait_for_request(self) -> None:
        self._streak = 0
        with contextlib.suppress(trio.ClosedResourceError, OSError):
            await trio.lowlevel.wait_readable(self._fd)
        self._lookout.came(self._began)

    def _take(self, buffer: memoryview) -> int:
        """Take a request that is there or comes within a moment; its size, or 0: others have to
        get a turn."""
        if self._streak >= _STREAK:
            return 0
        self._streak += 1
        try:
            if self._busy:
                return os.readv(self._fd, (buffer,))
            self._began = began = perf_counter_ns()
            count = self._lookout.look(self._receive, buffer, began)
            if count < 0 and self._poll.poll(_MOMENT):
                count = os.readv(self._fd, (buffer,))
                self._lookout.came(began)
            return max(count, 0)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in _OVER:
                self.stop()
            elif error.errno != errno.ENOENT:  # taken back before it was read
                raise
        return 0

    def _receive(self, buffer: memoryview, size: int, flags: int) -> int:
        """As ``socket.recv_into``; never waits."""
        return os.readv(self._fd, (buffer,))

    # Interruptions

    def interrupt(self, unique: int) -> None:
        """The thread that made this request has a signal pending; if that kills it, it is answered
        with ``EINTR`` and does not wait any more.

        The kernel says so once for each request: a signal that does not kill may be followed by
        one that does.
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
            await trio.sleep(_LOOK)

    async def _undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        """What was asked for was done, after the thread that asked had been killed."""
        assert self._requests is not None
        try:
            if isinstance(answer, Early):
                answer.rest()
            await self._requests.undo(header, body, answer)
        except Exception as error:
            self._refusal(header, body, error)  # logs it

    def _refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        """The answer to a request whose handler raised *error*, whatever that is: one exception
        does not end the mount, and no request is left without an answer."""
        assert self._requests is not None
        try:
            return self._requests.refusal(header, body, error)
        except Exception as failure:
            log.error("unhandled exception in opcode %d", header.opcode, exc_info=failure)
            return errno.EIO

    def _send(self, unique: int, answer: Answer) -> None:
        """Answer a request; what the kernel does not take becomes ``EIO``, since the program would
        wait for ever."""
        if answer is None:
            return
        try:
            self._write(unique, answer)
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            if number in (*_OVER, errno.ENOENT):  # nobody waits for it any more
                return
            if number != errno.EFAULT:  # the file behind a view became shorter
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
            if self._notices.qsize() < _UNTOLD:
                self._tell(protocol.answer(unique, len(answer.answer)) + answer.answer)
            else:
                self._send(unique, answer.answer)
        elif len(answer) <= _SMALL:
            os.write(self._fd, protocol.answer(unique, len(answer)) + answer)
        else:
            os.writev(self._fd, (protocol.answer(unique, len(answer)), answer))

    # Descriptors that stand behind open files

    def back(self, fd: int) -> int:
        """Have the kernel keep *fd*; returns the number by which an answer to OPEN refers to it.

        Raises:
            OSError: the kernel refuses, or the mount is over.
        """
        number: int = fcntl.ioctl(self._fd, protocol.BACKING_OPEN, protocol.backing(fd))
        return number

    def let_go(self, number: int) -> None:
        """No other answer will refer to that."""
        with contextlib.suppress(OSError):  # the mount is over
            fcntl.ioctl(self._fd, protocol.BACKING_CLOSE, protocol.backing_id(number))

    # What the kernel is told unasked

    def forget_inode(self, ino: int, attributes_only: bool) -> None:
        """Make the kernel forget an inode's attributes and bytes.

        Waits for requests that concern it, so it must not be called where they are served.

        Raises:
            FileNotFoundError: it does not know it.
        """
        self._notify(protocol.forget_inode(ino, -1 if attributes_only else 0))

    def forget_name(self, directory: int, name: bytes) -> None:
        """As :meth:`forget_inode`, for what a name means."""
        self._notify(protocol.forget_name(directory, name))

    def _notify(self, notice: bytes) -> None:
        with self._notifying:
            if self._silent:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            os.write(self._fd, notice)

    def silence(self) -> None:
        """Tell the kernel nothing any more, since the descriptor is about to be closed.

        A thread that is in the kernel by now keeps the file, and does no harm.
        """
        self._silent = True
        if self._notifying.acquire(timeout=_IN_KERNEL):
            self._notifying.release()

    def drop_name(self, directory: int, name: bytes) -> None:
        """Make the kernel let go of a name, in a thread, soon."""
        self._tell(protocol.forget_name(directory, name))

    def drop_attributes(self, ino: int) -> None:
        """Make the kernel forget an inode's attributes, in a thread, soon."""
        self._tell(protocol.forget_inode(ino, -1))

    def drop_bytes(self, ino: int, offset: int, size: int) -> None:
        """Make the kernel forget some bytes of an inode, in a thread, soon."""
        self._tell(protocol.forget_inode(ino, offset, size))

    def _tell(self, notice: bytes) -> None:
        if self._telling is None:
            self._telling = threading.Thread(target=self._tell_all, daemon=True)
            self._telling.start()
        self._notices.put(notice)

    def _tell_all(self) -> None:
        while True:
            notice = self._notices.get()
            with contextlib.suppress(OSError):  # it does not know it, or the mount is over
                self._notify(notice)
