"""Flushing a file from a Trio task without a thread: the kernel's asynchronous ``fsync``.

It costs a third of a worker thread, whose two wake-ups each include a switch of the interpreter
lock.  See io_submit(2); libaio is not needed.  If the system does not offer these calls, or too
many are pending, threads are used.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
import sys
from collections.abc import Iterator

import trio

from warabi._core import syscalls
from warabi.backends.base import Flush
from warabi.eventloop.inline_wait import InlineWait
from warabi.eventloop.threads import in_thread, signals

_FSYNC, _FDSYNC = 2, 3
_RESFD = 1  # IOCB_FLAG_RESFD: signal an eventfd on completion
_REQUEST = struct.Struct("=QIIHhIQQqQII")
_EVENT = struct.Struct("=QQqq")
_MOST = 128
"""Most pending flushes; further ones use threads."""


class Flushes:
    """Flushes that the kernel carries out asynchronously; an eventfd signals their completion.

    Raises:
        OSError: the system does not offer it.
    """

    def __init__(self) -> None:
        if sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "asynchronous fsync is not supported on this architecture")
        self._context = syscalls.io_setup(_MOST)
        self._next = itertools.count(1)
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._events = ctypes.create_string_buffer(_EVENT.size * _MOST)

    def begin(self, flush: Flush, signal: int) -> int:
        """Begin a flush, at whose end the eventfd *signal* is written to; returns its number.

        Raises:
            OSError: it did not begin: too many are pending, or the file does not support it.
        """
        number = next(self._next)
        kind = _FDSYNC if flush.data else _FSYNC
        _REQUEST.pack_into(
            self._request, 0, number, 0, 0, kind, 0, flush.fd, 0, 0, 0, 0, _RESFD, signal
        )  # fmt: skip
        syscalls.io_submit(self._context, self._requests)
        return number

    def ended(self) -> Iterator[tuple[int, int]]:
        """Yield the number and errno (0: success) of each flush that ended since the last call."""
        count = syscalls.io_getevents(self._context, self._events, _MOST)
        for number, _, result, _ in _EVENT.iter_unpack(self._events.raw[: count * _EVENT.size]):
            yield number, -result

    def close(self) -> None:
        """Wait for pending flushes, and release the kernel's context."""
        syscalls.io_destroy(self._context)


class Flusher:
    """The flushes of one run of Trio; raises as :class:`Flushes`."""

    def __init__(self) -> None:
        self._flushes = Flushes()
        self._results: dict[int, int] = {}
        self._under_way = 0
        self._inline_waits: dict[int, InlineWait] = {}  # by eventfd
        trio.lowlevel.spawn_system_task(self._end)

    async def _end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._flushes.close()

    def _ends_inline(self, fd: int) -> bool:
        """Whether the only pending flush ends before the event loop has anything else to do."""
        inline = self._inline_waits.get(fd)
        if inline is None:
            inline = self._inline_waits[fd] = InlineWait(fd)
        inline.begin()
        return inline.wait()

    async def flush(self, flush: Flush) -> bool:
        """Return when the data are on stable storage; False at once if a thread must do it.

        Raises:
            OSError: the flush failed.
        """
        ours = signals()
        fd = ours.take()
        try:
            number = self._flushes.begin(flush, fd)
        except OSError:
            ours.put_back(fd)
            return False
        self._under_way += 1
        try:
            if self._under_way == 1 and self._ends_inline(fd):
                ours.end(fd)
            else:
                await ours.wait(fd)
        finally:
            self._under_way -= 1
        while number not in self._results:  # another waiting task may have fetched it
            self._results.update(self._flushes.ended())
        result = self._results.pop(number)
        if result:
            raise OSError(result, os.strerror(result))
        return True


_flusher: trio.lowlevel.RunVar[Flusher | None] = trio.lowlevel.RunVar("warabi-flusher")


async def flushed(flush: Flush) -> None:
    """Return when *flush* has ended; once begun, it is waited for even if the task is cancelled.

    Raises:
        OSError: the flush failed.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        flusher = _flusher.get()
    except LookupError:
        try:
            flusher = Flusher()
        except OSError:
            flusher = None
        _flusher.set(flusher)
    if flusher is None or not await flusher.flush(flush):
        await in_thread(flush.wait)
