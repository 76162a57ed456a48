"""Mapped files whose pages are mapped many at once."""

from __future__ import annotations

import contextlib
import mmap

from warabi._core import syscalls


class Populated:
    """A file in this process's memory, shared; who has a view of it keeps it.

    Args:
        fd: of the file.
        size: how many bytes, from its start on; 0 for all that it has now.
        writable: whether views may be written to.

    Attributes:
        memory: what is there until nobody has a view of it.

    Raises:
        OSError, ValueError: it cannot be mapped, or is empty.
    """

    __slots__ = ("_ready", "_view", "memory")

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(fd, size, mmap.MAP_SHARED, access)
        self._view = memoryview(self.memory)
        self._ready = 0  # so many bytes can be touched without a fault

    def __len__(self) -> int:
        return len(self._view)

    def view(self, offset: int, end: int) -> memoryview:
        """The bytes from *offset* to *end*."""
        if end > self._ready:
            self._prepare(max(offset, self._ready), end)
            if offset <= self._ready:
                self._ready = end
        return self._view[offset:end]

    def _prepare(self, start: int, end: int) -> None:
        """Map all pages at once.  The first write to each would be a fault otherwise, which takes
        longer than writing the page; as if for reading, because faults for that map many pages."""
        start -= start % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # older kernels map them one by one
            self.memory.madvise(syscalls.MADV_POPULATE_READ, start, end - start)
