"""Complete reads and writes at an offset, and copying."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os

from warabi._core import syscalls

_NOT_COPIED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
"""Errors of copy_file_range(2) on file systems that do not support it."""
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""ioctl_iflags(2) requests on most architectures; on others the kernel rejects them."""
_TOP_DIRECTORY = 0x20000  # FS_TOPDIR_FL


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


def copy_file(source: int, target: int, size: int) -> None:
    """Copy *size* bytes from file to file, preserving holes; blocks are shared if the file system
    supports it."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
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
                raise OSError(errno.EIO, "the file was truncated while it was read")
            offset += count


def punch(fd: int, offset: int, size: int) -> None:
    """Zero *size* bytes at *offset* of *fd*, and free their blocks where possible."""
    try:
        syscalls.punch_hole(fd, offset, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pwrite_full(fd, memoryview(bytes(size)), offset)


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
