"""Region files where the page cache has them, mapped for system calls that send bytes from there.

That is a copy less than by way of a buffer.  Who read such bytes himself could be killed: the file
may have been cut off, or its medium may fail.  A system call fails then (EFAULT).  But at a page
that the page cache does not have it would wait for the medium.  So bytes are shown only where
mincore(2) says that it has all of them; what it gives up before the call, a moment later, is read
again.
"""

from __future__ import annotations

import mmap
import os
import threading

from warabi._core import syscalls
from warabi.backends.memfd import Populated
from warabi.shm.memory import address

LEAST = 128 * 1024
"""Bytes from which on asking for the pages takes less than a copy."""
_MOST = 1024  # mapped files; each takes a descriptor


class CachedFile(Populated):
    """A file as it is now."""

    __slots__ = ("_address",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd, 0, writable=False)
        self._address = address(self._view)

    def show(self, offset: int, end: int) -> memoryview | None:
        """The bytes from *offset* to *end*, unless some of them are not in the page cache."""
        start = offset - offset % mmap.PAGESIZE
        try:
            resident = syscalls.mincore(self._address + start, end - start)
        except OSError:
            return None
        return None if b"\0" in resident else self.view(offset, end)


class CachedFiles:
    """Open files that are mapped, by their descriptors.  Thread-safe; the lock is innermost.

    Args:
        most: how many at once; then the one goes that was mapped first.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, _MOST)
        self._lock = threading.Lock()
        self._files: dict[int, CachedFile] = {}

    def show(self, fd: int, offset: int, size: int) -> memoryview | None:
        """*size* bytes at *offset*, or None where that cannot be."""
        end = offset + size
        pages = self._files.get(fd)
        if pages is None or len(pages) < end:
            try:
                pages = CachedFile(fd)
            except (OSError, ValueError):
                return None
            with self._lock:
                self._files[fd] = pages
                if len(self._files) > self._most:
                    del self._files[next(iter(self._files))]
        # A large page of the cache may reach beyond the end of a file that was cut off.
        if end > len(pages) or end > os.lseek(fd, 0, os.SEEK_END):
            return None
        return pages.show(offset, end)

    def drop(self, fd: int) -> None:
        """Do not keep the mapping of a file that is about to be closed."""
        with self._lock:
            self._files.pop(fd, None)
