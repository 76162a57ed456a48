"""Linux's asynchronous I/O (``io_submit(2)``) for tests: many writes at a time."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
from collections.abc import Iterator

PAGE = mmap.PAGESIZE
_SETUP, _DESTROY, _SUBMIT, _GETEVENTS = (
    (0, 1, 2, 4) if platform.machine() in ("aarch64", "riscv64") else (206, 207, 209, 208)
)
_PWRITE = 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Iocb(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64), ("size", ctypes.c_uint64), ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("eventfd", ctypes.c_uint32),
    )  # fmt: skip


class _Event(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64), ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64), ("more", ctypes.c_int64),
    )  # fmt: skip


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Writer:
    """Writes pages to a file, *depth* of them at a time.

    Attributes:
        free: how many more may be submitted.
    """

    def __init__(self, fd: int, depth: int) -> None:
        self._fd = fd
        self._memory = mmap.mmap(-1, depth * PAGE)
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self._slots = list(range(depth))
        self._iocbs = [_Iocb() for _ in range(depth)]
        self._events = (_Event * depth)()
        self._context = ctypes.c_ulong(0)
        _call(_SETUP, ctypes.c_uint(depth), ctypes.byref(self._context))

    @property
    def free(self) -> int:
        return len(self._slots)

    def submit(self, page: int, data: bytes) -> None:
        """Begin to write *data*, the same again and again, to page number *page*."""
        slot = self._slots.pop()
        start = slot * PAGE
        self._memory[start : start + PAGE] = data * (PAGE // len(data))
        iocb = self._iocbs[slot]
        iocb.data = page << 32 | slot
        iocb.opcode = _PWRITE
        iocb.fd = self._fd
        iocb.buffer = ctypes.addressof(self._anchor) + start
        iocb.size = PAGE
        iocb.offset = page * PAGE
        pointer = ctypes.pointer(iocb)
        assert _call(_SUBMIT, self._context, ctypes.c_long(1), ctypes.byref(pointer)) == 1

    def completed(self) -> list[int]:
        """Wait for at least one write; the pages of those that have ended."""
        count = _call(
            _GETEVENTS, self._context, ctypes.c_long(1), ctypes.c_long(len(self._events)),
            self._events, None,
        )  # fmt: skip
        pages = []
        for event in self._events[:count]:
            assert event.result == PAGE, os.strerror(-event.result)
            self._slots.append(event.data & 0xFFFFFFFF)
            pages.append(event.data >> 32)
        return pages

    def close(self) -> None:
        _call(_DESTROY, self._context)
        del self._anchor
        self._memory.close()


@contextlib.contextmanager
def writing(fd: int, depth: int) -> Iterator[Writer]:
    """A writer, while the block runs."""
    writer = Writer(fd, depth)
    try:
        yield writer
    finally:
        writer.close()
