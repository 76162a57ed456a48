"""Reading and writing at an offset, all of it, and copying."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os

from warabi._core import syscalls

_NOT_COPIED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
"""Errors of file systems where the kernel does not copy from file to file."""
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""Requests of ioctl_iflags(2), as most machines have them; elsewhere they are unknown."""
_TOP_DIRECTORY = 0x20000  # FS_TOPDIR_FL


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


def punch(fd: int, offset: int, size: int) -> None:
    """Make *size* bytes at *offset* of *fd* zero, and take no room where that can be."""
    try:
        syscalls.punch_hole(fd, offset, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pwrite_full(fd, memoryview(bytes(size)), offset)


def set_apart(fd: int) -> None:
    """Tell the file system that the directories in this one have nothing to do with each other.

    ext2 to ext4 put them, and so the files in them, into block groups of their own then.  Else all
    are in one or two, where without a journal the kernel looks at every inode that was deleted in
    the last minutes before it makes a file.  Others do not know the attribute.
    """
    with contextlib.suppress(OSError):
        flags = array.array("i", [0])
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        if not flags[0] & _TOP_DIRECTORY:
            flags[0] |= _TOP_DIRECTORY
            fcntl.ioctl(fd, _SET_FLAGS, flags)
