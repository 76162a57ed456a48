"""Mapped files, for flushing a range: by ``msync``, or by libpmem on persistent memory.

Region data are never accessed through a mapping, so no access can fault: ``msync`` touches no
byte, and before ``pmem_persist`` does the pages are mapped by a call that fails where a plain
access would raise SIGBUS.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from abc import ABC, abstractmethod

from warabi._core import syscalls

_PAGE = mmap.PAGESIZE

_pointer, _size_t, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class FlushMapping(ABC):
    """A mapping of a file's first *size* bytes."""

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self.size = size

    @abstractmethod
    def flush(self, offset: int, size: int, *, shared: bool = False) -> None:
        """Return when the bytes are on stable storage; raises ``OSError``.

        *shared*: another process has the file, and may truncate it at any moment.
        """

    @abstractmethod
    def close(self) -> None:
        """Unmap; must be called once."""

    def _pages(self, offset: int, size: int) -> tuple[int, int]:
        """Return address and length of the pages that contain the bytes."""
        start = self._address + offset
        first = start - start % _PAGE
        length = start + size - first
        return first, length + -length % _PAGE

    def _msync(self, offset: int, size: int) -> None:
        syscalls.msync(*self._pages(offset, size))  # mmap.flush() would hold the GIL


class PageCacheMapping(FlushMapping):
    """A file on any file system.  Metadata needed to find the data are flushed with them."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(syscalls.map_shared(fd, size, mmap.PROT_READ), size)

    def flush(self, offset: int, size: int, *, shared: bool = False) -> None:
        self._msync(offset, size)

    def close(self) -> None:
        syscalls.munmap(self._address, self.size)


class PersistentMapping(FlushMapping):
    """A file on persistent memory; ``flush`` calls the kernel only for safety."""

    def flush(self, offset: int, size: int, *, shared: bool = False) -> None:
        if shared:
            self._msync(offset, size)  # pmem_persist would raise SIGBUS at a truncated page
            return
        # Data are written by pwrite, which leaves the allocation of their blocks in the journal.
        # Making the pages writable in a MAP_SYNC mapping flushes it; for pages that are already
        # writable this only walks the page table.
        try:
            syscalls.madvise(*self._pages(offset, size), syscalls.MADV_POPULATE_WRITE)
        except OSError:  # an old kernel, or a page that cannot be allocated
            self._msync(offset, size)
            return
        library = libpmem()
        assert library is not None
        library.pmem_persist(self._address + offset, size)

    def close(self) -> None:
        library = libpmem()
        assert library is not None
        library.pmem_unmap(self._address, self.size)


@functools.cache
def libpmem() -> ctypes.CDLL | None:
    """Load the library; None if it is not installed."""
    try:
        library = ctypes.CDLL("libpmem.so.1", use_errno=True)
    except OSError:
        return None
    library.pmem_map_file.argtypes = [
        ctypes.c_char_p, _size_t, _int, ctypes.c_uint,
        ctypes.POINTER(_size_t), ctypes.POINTER(_int),
    ]  # fmt: skip
    library.pmem_map_file.restype = _pointer
    library.pmem_unmap.argtypes = [_pointer, _size_t]
    library.pmem_persist.argtypes = [_pointer, _size_t]
    library.pmem_persist.restype = None
    return library


def map_persistent(fd: int) -> PersistentMapping | None:
    """Map an open, non-empty file by libpmem; None if that is not installed, or reports that the
    file is not on persistent memory (``PMEM_IS_PMEM_FORCE=1`` overrides that)."""
    library = libpmem()
    if library is None:
        return None
    size, is_pmem = _size_t(), _int()
    # Only the library knows which of its own mappings are persistent memory, so it must map.
    path = f"/proc/self/fd/{fd}".encode()
    address = library.pmem_map_file(path, 0, 0, 0, ctypes.byref(size), ctypes.byref(is_pmem))
    if address is None:
        return None
    mapping = PersistentMapping(address, size.value)
    if not is_pmem.value:
        mapping.close()
        return None
    return mapping
