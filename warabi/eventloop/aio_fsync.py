"""Flushing a file from a Trio task without a thread: the kernel's asynchronous ``fsync``.

It costs a third of what a thread does, whose two wake-ups each have the interpreter change hands
as well.  See io_submit(2); libaio is not needed.  Where the system has no such calls, or no more
of them at a time, threads do it.
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
from warabi.eventloop.inline_wait import Lull
from warabi.eventloop.threads import in_thread, signals

_FSYNC, _FDSYNC = 2, 3
_RESFD = 1  # a flag: a descriptor is to be told
_REQUEST = struct.Struct("=QIIHhIQQqQII")
_EVENT = struct.Struct("=QQqq")
_MOST = 128
"""Flushes under way; there are more in threads."""


class Flushes:
    """Flushes that the kernel carries out beside the caller, who is told by a descriptor.

    Raises:
        OSError: the system does not offer it.
    """

    def __init__(self) -> None:
        if sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "the layout of asynchronous requests is not known here")
        self._context = syscalls.io_setup(_MOST)
        self._next = itertools.count(1)
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._events = ctypes.create_string_buffer(_EVENT.size * _MOST)

    def begin(self, flush: Flush, signal: int) -> int:
        """Begin a flush, at whose end the eventfd *signal* is written to; returns its number.

        Raises:
            OSError: it did not begin, because there are too many or the file has no such thing.
        """
        number = next(self._next)
        kind = _FDSYNC if flush.data else _FSYNC
        _REQUEST.pack_into(
            self._request, 0, number, 0, 0, kind, 0, flush.fd, 0, 0, 0, 0, _RESFD, signal
        )  # fmt: skip
        syscalls.io_submit(self._context, self._requests)
        return number

    def ended(self) -> Iterator[tuple[int, int]]:
        """Number of each flush that has ended since the last call, and its errno, 0 for none."""
        count = syscalls.io_getevents(self._context, self._events, _MOST)
        for number, _, result, _ in _EVENT.iter_unpack(self._events.raw[: count * _EVENT.size]):
            yield number, -result

    def close(self) -> None:
        """Wait for those that are under way, and end."""
        syscalls.io_destroy(self._context)


class Flusher:
    """Flushes of one run of Trio; raises as :class:`Flushes`."""

    def __init__(self) -> None:
        self._flushes = Flushes()
        self._results: dict[int, int] = {}
        self._under_way = 0
        self._lulls: dict[int, Lull] = {}  # by the descriptors that are told
        trio.lowlevel.spawn_system_task(self._end)

    async def _end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._flushes.close()

    def _ends_in_lull(self, fd: int) -> bool:
        """Whether the only flush ends before there is anything else to do for the loop."""
        lull = self._lulls.get(fd)
        if lull is None:
            lull = self._lulls[fd] = Lull(fd)
        lull.begin()
        return lull.wait()

    async def flush(self, flush: Flush) -> bool:
        """Return when that is on the medium; False, at once, where a thread has to do it.

        Raises:
            OSError: the medium refused.
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
            if self._under_way == 1 and self._ends_in_lull(fd):
                ours.end(fd)
            else:
                await ours.wait(fd)
        finally:
            self._under_way -= 1
        while number not in self._results:  # who else waits may have fetched it
            self._results.update(self._flushes.ended())
        result = self._results.pop(number)
        if result:
            raise OSError(result, os.strerror(result))
        return True


_flusher: trio.lowlevel.RunVar[Flusher | None] = trio.lowlevel.RunVar("warabi-flusher")


async def flushed(flush: Flush) -> None:
    """Return when *flush* is on the medium; one that was begun is waited for in any case.

    Raises:
        OSError: the medium refused.
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
