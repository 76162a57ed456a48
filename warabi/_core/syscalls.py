"""System calls and functions of the C library that Python does not offer.

All raise ``OSError`` when the call fails, and release the interpreter's lock (GIL) while it runs.
Addresses and sizes are in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
MEMBARRIER_GLOBAL_EXPEDITED, MEMBARRIER_REGISTER_GLOBAL_EXPEDITED = 1 << 1, 1 << 2
MOUNT_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "remount": 32, "dirsync": 128,
    "noatime": 1 << 10, "nodiratime": 1 << 11, "relatime": 1 << 21, "strictatime": 1 << 24,
}  # fmt: skip
"""Flags of mount(2), by the names that mount(8) has for them."""
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

_IN_MEMORY = (0x01021994, 0x858458F6)  # f_type of tmpfs and ramfs
_MS_SYNC = 4
_PR_SET_PDEATHSIG = 1
_PTHREAD_PROCESS_SHARED = _PTHREAD_MUTEX_ROBUST = 1
_MEMBARRIER = {
    "x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356
}.get(os.uname().machine)  # fmt: skip
"""The number of the system call, which the C library does not wrap."""

_pointer, _size_t, _int, _text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p
_libc = ctypes.CDLL(None, use_errno=True)
_FAILURES = (-1, ctypes.c_void_p(-1).value)  # the second is MAP_FAILED


def _checked(result: Any, function: Any, arguments: Any) -> Any:
    if result in _FAILURES:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _declared(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_libc, name)
    function.restype, function.argtypes, function.errcheck = result, arguments, _checked
    return function  # type: ignore[no-any-return]


_mmap = _declared("mmap", _pointer, _pointer, _size_t, _int, _int, _int, ctypes.c_long)
_msync = _declared("msync", _int, _pointer, _size_t, _int)
_mincore = _declared("mincore", _int, _pointer, _size_t, _text)
_fallocate = _declared("fallocate", _int, _int, _int, ctypes.c_int64, ctypes.c_int64)
_syncfs = _declared("syncfs", _int, _int)
_fstatfs = _declared("fstatfs", _int, _int, _pointer)
_mount = _declared("mount", _int, _text, _text, _text, ctypes.c_ulong, _text)
_umount2 = _declared("umount2", _int, _text, _int)
_prctl = _declared("prctl", _int, _int, ctypes.c_ulong)
_syscall = _declared("syscall", ctypes.c_long, ctypes.c_long)  # more arguments may follow

munmap: Callable[[int, int], int] = _declared("munmap", _int, _pointer, _size_t)
"""Unmap so many bytes from an address on."""
madvise: Callable[[int, int, int], int] = _declared("madvise", _int, _pointer, _size_t, _int)
"""Advise on so many bytes from an address on."""
memcpy: Callable[[int, int, int], int] = _declared("memcpy", _pointer, _pointer, _pointer, _size_t)
"""Copy to an address, from an address, so many bytes."""


def _uninterrupted(call: Callable[..., Any], *arguments: int) -> None:
    """Call again after signals, whose handlers run in between."""
    while True:
        try:
            call(*arguments)
            return
        except InterruptedError:
            continue


def map_shared(fd: int, size: int, protection: int) -> int:
    """Map the first *size* bytes of a file, which needs no descriptor afterwards; the address."""
    address: int = _mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
    return address


def msync(address: int, size: int) -> None:
    """Write whole pages of a mapped file to stable storage."""
    _uninterrupted(_msync, address, size, _MS_SYNC)


def mincore(address: int, size: int) -> bytes:
    """A byte for each page of *size* bytes, 0 where it is not in the page cache."""
    resident = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    _mincore(address, size, resident)
    return resident.raw


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Allocate, deallocate or zero a range of a file; *mode* is of ``FALLOC_FL_...``."""
    _uninterrupted(_fallocate, fd, mode, offset, size)


def syncfs(fd: int) -> None:
    """Write the whole file system that *fd* is in to stable storage."""
    _uninterrupted(_syncfs, fd)


def is_in_memory(fd: int) -> bool:
    """Whether the file system that *fd* is in keeps its files in memory (tmpfs, ramfs)."""
    found = (ctypes.c_long * 64)()  # a struct statfs, which begins with the type
    _fstatfs(fd, ctypes.addressof(found))
    return found[0] in _IN_MEMORY


def membarrier(command: int) -> None:
    if _MEMBARRIER is None:
        raise OSError(errno.ENOSYS, f"membarrier: not known for {os.uname().machine} processors")
    _syscall(_MEMBARRIER, command, 0, 0)


def mutex_lock(address: int) -> None:
    """Make a robust mutex at *address*, which other processes may read, and lock it."""
    attributes = ctypes.create_string_buffer(128)
    mutex = ctypes.c_void_p(address)
    for number in (
        _libc.pthread_mutexattr_init(attributes),
        _libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED),
        _libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST),
        _libc.pthread_mutex_init(mutex, attributes),
        _libc.pthread_mutex_lock(mutex),
    ):
        if number:
            raise OSError(number, os.strerror(number))


def mutex_unlock(address: int) -> None:
    """Unlock what :func:`mutex_lock` locked, by the thread that did."""
    _libc.pthread_mutex_unlock(ctypes.c_void_p(address))


def mount(source: str, path: str, flags: int, kind: str = "", data: str = "") -> None:
    """mount(2) of a file system of that kind; *flags* are a sum of values of ``MOUNT_FLAGS``."""
    texts = (os.fsencode(text) or None for text in (source, path, kind))
    _mount(*texts, flags, os.fsencode(data) or None)


def umount2(path: str, flags: int) -> None:
    _umount2(os.fsencode(path), flags)


def signal_when_parent_ends(number: int) -> None:
    """Have this process get a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)
