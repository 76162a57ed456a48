"""Reading and writing at an offset, all of it, and copying."""

from __future__ import annotations

import errno
import os

_NOT_COPIED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
"""Errors of file systems where the kernel does not copy from file to file."""


def pread_full(fd: int, out: memoryview, offset: int, flags: int = 0) -> int:
    """Fill *out* from *offset* of *fd*; returns how many bytes, fewer only at the file's end."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:] if done else out], offset + done, flags)
        if count == 0:
            break
        done += count
    return done


def pwrite_full(fd: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset* of *fd*."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def copy_file(source: int, target: int, size: int) -> None:
    """Copy *size* bytes from file to file, but for holes; blocks are shared where the file system
    can share them."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = min(size, os.lseek(source, offset, os.SEEK_HOLE))
        while offset < end:
            try:
                count = os.copy_file_range(source, target, end - offset, offset, offset)
            except OSError as error:
                if error.errno not in _NOT_COPIED:
                    raise
                piece = os.pread(source, min(end - offset, 1 << 20), offset)
                pwrite_full(target, memoryview(piece), offset)
                count = len(piece)
            if not count:
                raise OSError(errno.EIO, "the file became shorter")
            offset += count
