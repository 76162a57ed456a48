"""Region files in the page cache, mapped for system calls that send data from there.

This saves a copy compared to a buffer.  Reading such a mapping directly could kill the process if
the file was truncated or the device fails; a system call just fails (EFAULT).  But it would block
at a page that is not in the page cache.  So a view is returned only if mincore(2) reports all its
pages as cached; a page that is evicted before the call, a moment later, is read again.
"""

from __future__ import annotations

import mmap
import os

from warabi._core import forks, syscalls
from warabi.backends.memfd import Populated
from warabi.shm.memory import address

LEAST = 128 * 1024
"""From this size in bytes on, checking the pages is cheaper than copying."""
_MOST = 1024  # mapped files; each uses a descriptor


class CachedFile(Populated):
    """A mapping of a file with its current size."""

    __slots__ = ("_address",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd, 0, writable=False)
        self._address = address(self._view)

    def show(self, offset: int, end: int) -> memoryview | None:
        """Return the bytes from *offset* to *end*, or None if some are not in the page cache."""
        start = offset - offset % mmap.PAGESIZE
        try:
            resident = syscalls.mincore(self._address + start, end - start)
        except OSError:
            return None
        return None if b"\0" in resident else self.view(offset, end)


class CachedFiles:
    """Mappings of open files, by their descriptors.  Thread-safe; the lock is innermost.

    Args:
        most: how many to keep; the oldest is dropped first.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, _MOST)
        self._lock = forks.lock()
        self._files: dict[int, CachedFile] = {}

    def show(self, fd: int, offset: int, size: int) -> memoryview | None:
        """Return *size* bytes at *offset*, or None if that is not possible."""
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
        # A large page of the cache may extend beyond the end of a truncated file.
        if end > len(pages) or end > os.lseek(fd, 0, os.SEEK_END):
            return None
        return pages.show(offset, end)

    def drop(self, fd: int) -> None:
        """Drop the mapping of a file that is about to be closed."""
        with self._lock:
            self._files.pop(fd, None)
