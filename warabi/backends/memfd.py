"""Shared file mappings whose pages are mapped many at once."""

from __future__ import annotations

import contextlib
import mmap

from warabi._core import syscalls


class Populated:
    """A file mapped into this process, kept as long as there are views of it.

    Args:
        fd: the file.
        size: bytes from its start on; 0 for its current size.
        writable: whether views are writable.

    Attributes:
        memory: the mapping.

    Raises:
        OSError, ValueError: it cannot be mapped, or is empty.
    """

    __slots__ = ("_ready", "_view", "memory")

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(fd, size, mmap.MAP_SHARED, access)
        self._view = memoryview(self.memory)
        self._ready = 0  # bytes that can be accessed without a page fault

    def __len__(self) -> int:
        return len(self._view)

    def view(self, offset: int, end: int) -> memoryview:
        """Return the bytes from *offset* to *end*."""
        if end > self._ready:
            self._prepare(max(offset, self._ready), end)
            if offset <= self._ready:
                self._ready = end
        return self._view[offset:end]

    def _prepare(self, start: int, end: int) -> None:
        """Map all pages at once.  Otherwise the first write to each would cause a fault, which
        takes longer than writing the page.  For reading, since read faults map many pages."""
        start -= start % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # older kernels map them one by one
            self.memory.madvise(syscalls.MADV_POPULATE_READ, start, end - start)
