"""Region files read and written with ``O_DIRECT``, bypassing the page cache.

The kernel then requires aligned offsets, sizes and memory.  The aligned part of a transfer uses an
aligned bounce buffer and a direct descriptor; the unaligned head and tail use the ordinary
descriptor.  The kernel keeps both views of a file coherent: a direct write drops cached pages of
its range, a direct read first writes dirty ones.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from warabi._core.fileio import pread_full, pwrite_full
from warabi.backends.base import STRANGERS, Location, Storage
from warabi.backends.fd_cache import OpenFile
from warabi.backends.file import FileStorage
from warabi.errors import CorruptTarget, WouldBlock
from warabi.metadata.journal import close_quietly
from warabi.region import RegionID

log = logging.getLogger(__name__)

_BLOCK = 4096  # the largest alignment that Linux file systems require
_BOUNCE = 1024 * 1024  # bytes of a bounce buffer, a multiple of every supported alignment
_LARGEST_ALIGNMENT = _BOUNCE


def supports_direct_io(root: Path) -> bool:
    """Whether files in the directory *root* can be opened with ``O_DIRECT``."""
    probe = root / ".direct-io"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


class DirectFileStorage(FileStorage):
    """A :class:`FileStorage` that bypasses the page cache.

    Args:
        root: a directory that belongs to the target.
        sync: whether each write waits until it is on stable storage.
        alignment: of offsets and sizes, in bytes; increased to what file systems require.
    """

    write_waits = True

    def __init__(self, root: Path, *, sync: bool = False, alignment: int = 8) -> None:
        super().__init__(root, sync=sync)
        wanted = math.lcm(alignment, _BLOCK)
        self._alignment = wanted if wanted <= _LARGEST_ALIGNMENT else _BLOCK
        self._bounce: list[mmap.mmap] = []  # idle buffers
        self._direct: dict[
            int, int
        ] = {}  # direct descriptors by the ordinary ones; protected by `_lock`

    def _close(self, rid: bytes, held: OpenFile) -> None:
        direct = self._direct.pop(held.fd, None)
        if direct is not None:
            close_quietly(direct)
        super()._close(rid, held)

    def _direct_descriptor(self, rid: bytes, fd: int) -> int:
        with self._lock:
            direct = self._direct.get(fd)
            if direct is None:
                direct = self.open(self.path(rid), self._flags | os.O_DIRECT, locked=True)
                self._direct[fd] = direct
            return direct

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        with self._lock:
            buffer = self._bounce.pop() if self._bounce else mmap.mmap(-1, _BOUNCE)
        try:
            with memoryview(buffer) as view:
                yield view
        finally:
            with self._lock:
                self._bounce.append(buffer)

    def _middle(self, offset: int, size: int) -> tuple[int, int]:
        """Return start and end, relative to *offset*, of the aligned part; equal if it is empty."""
        start = -offset % self._alignment
        end = (offset + size) // self._alignment * self._alignment - offset
        return (start, end) if start < end else (size, size)

    def _read(self, rid: bytes, offset: int, out: memoryview, flags: int) -> None:
        start, end = self._middle(offset, len(out))
        if flags and start < end:
            raise WouldBlock
        super()._read(rid, offset, out[:start], flags)
        if start < end:
            self._read_direct(rid, offset + start, out[start:end])
            super()._read(rid, offset + end, out[end:], flags)

    def _read_direct(self, rid: bytes, offset: int, out: memoryview) -> None:
        with self.translated(rid, "read"), self.borrow(rid) as fd, self._buffer() as bounce:
            direct = self._direct_descriptor(rid, fd)
            for start in range(0, len(out), _BOUNCE):
                piece = out[start : start + _BOUNCE]
                if pread_full(direct, bounce[: len(piece)], offset + start) < len(piece):
                    raise CorruptTarget(
                        f"read region {rid.hex()}: its file ends within the {len(piece)} bytes at"
                        f" {offset + start}"
                    )
                piece[:] = bounce[: len(piece)]

    def _write(self, rid: bytes, offset: int, data: memoryview, *, within: bool) -> None:
        if within:
            with self.translated(rid, "write"), self.borrow(rid) as fd:
                self._check_end(rid, fd, "write", offset + len(data))
        start, end = self._middle(offset, len(data))
        super()._write(rid, offset, data[:start], within=False)
        if start < end:
            self._write_direct(rid, offset + start, data[start:end])
            super()._write(rid, offset + end, data[end:], within=False)

    def _write_direct(self, rid: bytes, offset: int, data: memoryview) -> None:
        with self.translated(rid, "write"), self.borrow(rid) as fd, self._buffer() as bounce:
            try:
                direct = self._direct_descriptor(rid, fd)
                for start in range(0, len(data), _BOUNCE):
                    piece = data[start : start + _BOUNCE]
                    bounce[: len(piece)] = piece
                    pwrite_full(direct, bounce[: len(piece)], offset + start)
            finally:
                self._dirty.add(rid)

    view = Storage.view  # not supported

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        return None  # another process would use the page cache

    def close(self) -> None:
        super().close()
        with self._lock:
            self._bounce.clear()  # the traceback of an error may still refer to one


def open_storage(root: Path, *, direct: bool, sync: bool, alignment: int) -> FileStorage:
    """Open the storage according to the settings of ``abtio``."""
    if direct and supports_direct_io(root):
        return DirectFileStorage(root, sync=sync, alignment=alignment)
    storage = FileStorage(root, sync=sync)
    if direct:
        log.warning("%s: the file system does not support direct I/O; using the page cache", root)
        storage.instead = {"directio": False}
    return storage
