"""Memory that several processes map, and memory ordering.

``barrier`` orders the preceding stores of this process with the loads and stores of every
registered process: the rare side of a protocol pays for a system call, the frequent side nothing.
This is membarrier(2), for which each process registers once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
from collections.abc import Callable

from warabi._core import syscalls

_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1, which Python does not name
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
STRONGLY_ORDERED = os.uname().machine in ("x86_64", "s390x")
"""Whether stores become visible in program order, and loads are executed in it.  Python code has no
other means of ordering than :func:`barrier`."""


@functools.cache
def register() -> bool:
    """Register this process and its threads for barriers; returns False if that is not possible."""
    try:
        syscalls.membarrier(syscalls.MEMBARRIER_REGISTER_GLOBAL_EXPEDITED)
    except OSError:
        return False
    return True


os.register_at_fork(after_in_child=register.cache_clear)


def barrier() -> None:
    """Execute a full memory barrier in every registered process.

    Raises:
        OSError: not available, which :func:`register` reports.
    """
    syscalls.membarrier(syscalls.MEMBARRIER_GLOBAL_EXPEDITED)


class SharedMapping:
    """The first *size* bytes of a file, mapped until this object is deallocated.

    Unlike ``mmap.mmap`` it keeps no descriptor.  The caller must not access memory beyond the end
    of the file, which would kill the process (SIGBUS).

    Attributes:
        address: of the first byte.
        view: the bytes; to be used only while this object is referenced.
    """

    __slots__ = ("address", "size", "view")

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.address = syscalls.map_shared(fd, size, protection)
        self.size = size
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")

    def populate(self) -> None:
        """Map all pages for writing at once, which is faster than one page fault each."""
        with contextlib.suppress(OSError):  # older kernels map page by page
            syscalls.madvise(self.address, self.size, syscalls.MADV_POPULATE_WRITE)

    def __del__(self, unmap: Callable[[int, int], int] = syscalls.munmap) -> None:
        # A default argument, since at interpreter exit the module's names may be gone.
        if hasattr(self, "address"):
            unmap(self.address, self.size)


class SharedMemory:
    """Memory of *size* bytes in a descriptor that other processes may map.

    Its size is sealed.  With *mine* other processes can map it only for reading.

    Attributes:
        fd: the descriptor, open until :meth:`close`.
        address: of its first byte.
        view: its bytes; to be used only while this object is referenced.
    """

    def __init__(self, name: str, size: int, *, mine: bool = False) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self._mapping = SharedMapping(self.fd, size, writable=True)
            seals = _SEALS | (_SEAL_FUTURE_WRITE if mine else 0)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = self._mapping.address
        self.view = self._mapping.view

    def close(self, *, discard: bool = False) -> None:
        """Close the descriptor; with *discard* also free the memory, which then reads as zero in
        processes that still map it."""
        if discard:
            with contextlib.suppress(OSError):
                syscalls.madvise(self.address, self._mapping.size, mmap.MADV_REMOVE)
        os.close(self.fd)


class _Buffer(ctypes.Structure):
    """Python's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_Buffer)]
_release_buffer.restype = None


def address(view: memoryview) -> int:
    """Return the address of *view*'s bytes, valid as long as its owner keeps them there."""
    held = _Buffer()
    _get_buffer(view, held, 0)
    _release_buffer(held)
    return held.buf or 0
