"""Complete reads and writes at an offset, copying, and holes."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os

from warabi._core import syscalls
from warabi._core.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

_NOT_COPIED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
"""Errors of copy_file_range(2) on file systems that do not support it."""
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""ioctl_iflags(2) requests on most architectures; on others the kernel rejects them."""
_TOP_DIRECTORY = 0x20000  # FS_TOPDIR_FL
_PIECE = 1 << 20
_ZEROS = memoryview(bytes(_PIECE))


def pread_full(fd: int, out: memoryview, offset: int, flags: int = 0) -> int:
    """Read at *offset* of *fd* until *out* is full; returns the count, smaller only at end of
    file."""
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


def data_from(fd: int, offset: int, end: int) -> int:
    """The first offset from *offset* on, before *end*, at which *fd* has data; *end* if none."""
    return _seek(fd, offset, end, os.SEEK_DATA)


def hole_from(fd: int, offset: int, end: int) -> int:
    """As :func:`data_from`, for a hole."""
    return _seek(fd, offset, end, os.SEEK_HOLE)


def _seek(fd: int, offset: int, end: int, what: int) -> int:
    if offset >= end:
        return end
    try:
        return min(end, os.lseek(fd, offset, what))
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole follows
            return end
        raise


def copy_file(source: int, target: int, size: int, start: int = 0, to: int = 0) -> None:
    """Copy *size* bytes at *start* of a file to offset *to* of another file, or of the same file if
    the ranges do not overlap.

    Holes are preserved; blocks are shared if the file system supports it.
    """
    offset, end, shift = start, start + size, to - start
    while offset < end:
        data = data_from(source, offset, end)
        if data_from(target, offset + shift, data + shift) < data + shift:
            punch(target, offset + shift, data - offset)
        offset = data
        end_of_data = hole_from(source, offset, end)
        while offset < end_of_data:
            try:
                count = os.copy_file_range(
                    source, target, end_of_data - offset, offset, offset + shift
                )
            except OSError as error:
                if error.errno not in _NOT_COPIED:
                    raise
                piece = os.pread(source, min(end_of_data - offset, _PIECE), offset)
                pwrite_full(target, memoryview(piece), offset + shift)
                count = len(piece)
            if not count:
                raise OSError(errno.EIO, "the file was truncated while it was read")
            offset += count


def allocate(fd: int, offset: int, size: int) -> None:
    """Allocate the blocks of *size* bytes at *offset* of *fd*, also beyond its end; the file's size
    stays the same.  Raises ``EOPNOTSUPP`` if the file system does not support it."""
    syscalls.fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, size)


def punch(fd: int, offset: int, size: int) -> None:
    """Zero *size* bytes at *offset* of *fd*, and free their blocks where possible."""
    _zero(fd, FALLOC_FL_PUNCH_HOLE, offset, size)


def zero(fd: int, offset: int, size: int) -> None:
    """Zero *size* bytes at *offset* of *fd*, and allocate their blocks."""
    _zero(fd, FALLOC_FL_ZERO_RANGE, offset, size)


def _zero(fd: int, mode: int, offset: int, size: int) -> None:
    try:
        syscalls.fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        for start in range(0, size, _PIECE):
            pwrite_full(fd, _ZEROS[: size - start], offset + start)


def set_apart(fd: int) -> None:
    """Set the top-directory attribute: the subdirectories of this directory are unrelated.

    ext2 to ext4 then spread the subdirectories, and so their files, over block groups.  Otherwise
    all are in one or two groups, where the kernel, without a journal, examines every recently
    deleted inode before it creates a file.  Other file systems ignore the attribute.
    """
    with contextlib.suppress(OSError):
        flags = array.array("i", [0])
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        if not flags[0] & _TOP_DIRECTORY:
            flags[0] |= _TOP_DIRECTORY
            fcntl.ioctl(fd, _SET_FLAGS, flags)
