"""The FUSE protocol of the kernel, without I/O: decoding of requests, encoding of replies.

The layouts are those of Linux's ``include/uapi/linux/fuse.h``, version 7.31 and additions of later
versions that are enabled by flags.  All numbers are in native byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from warabifs.fs.request_size import MAX_WRITE

MAJOR = 7
OLDEST_MINOR = 31
"""Of Linux 5.4; since then the structures that are used here have not changed."""
MINOR = 38
_TELLING_MINOR = 42
"""Of Linux 6.14; since 6.13 the times of files tell each write from what was seen before it."""
BUFFER = MAX_WRITE + 4096
"""Size in bytes of a buffer for any request."""
_PAGES = MAX_WRITE // 4096
MAX_BACKGROUND = 128
"""Most pending requests that programs do not wait for, such as readahead and asynchronous writes
with ``O_DIRECT``; further ones wait."""


class Opcode(IntEnum):
    """The operation of a request."""

    LOOKUP = 1
    FORGET = 2  # is not answered
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33  # waits
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    NOTIFY_REPLY = 41  # is not answered
    BATCH_FORGET = 42  # is not answered
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Feature:
    """Features that are negotiated when a mount begins."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1  # those of fcntl(2) are requests
    ATOMIC_O_TRUNC = 1 << 3  # open truncates
    EXPORT_SUPPORT = 1 << 4  # "." and ".." can be looked up
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6  # the file system applies the umask
    FLOCK_LOCKS = 1 << 10  # those of flock(2) are
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29  # a longer SETXATTR
    INIT_EXT = 1 << 30  # more than 32 flags
    DIRECT_IO_ALLOW_MMAP = 1 << 36  # shared mappings of files that are opened with DIRECT_IO
    PASSTHROUGH = 1 << 37  # a descriptor may back an open file
    ALLOW_IDMAP = 1 << 40  # mounts may map owners; requests that need none have no user and group


class Open:
    """Flags of an open file for the kernel."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class Valid:
    """Which attributes a SETATTR sets."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


WRITE_CACHE = 1 << 0
"""Flag of a WRITE: writeback of locked pages by the kernel, on behalf of no thread."""
WRITE_LOCKOWNER = 1 << 1
"""Flag of a WRITE: has a lock owner, as only writes that bypass the page cache do."""
READ_LOCKOWNER = 1 << 1
"""The same flag of a READ: the data are not cached."""
WRITE_KILL_SUIDGID = 1 << 2
"""Flag of a WRITE: the writer may not keep set-ID bits."""
OPEN_KILL_SUIDGID = 1 << 0
"""The same flag of an OPEN that truncates."""
SETXATTR_ACL_KILL_SGID = 1 << 0
"""Flag of a SETXATTR_EXT: the caller may not keep the set-group-ID bit."""
FSYNC_DATA = 1 << 0
"""Flag of a FSYNC: fdatasync(2) was called."""


class Header(NamedTuple):
    """The header of every request."""

    length: int
    opcode: int
    unique: int  # identifies the reply
    node: int  # the inode
    uid: int
    gid: int
    pid: int  # of the calling thread; 0: in another PID namespace
    extensions: int


HEADER = struct.Struct("=IIQQIIII")
_ANSWER = struct.Struct("=IiQ")  # length, negative errno, unique

_INIT = struct.Struct("=IIIII")  # major, minor, readahead, features, and their upper half
_INIT_ANSWER = struct.Struct("=IIIIHHIIHHII24x")
_OLD_INIT = struct.Struct("=II")

INTERRUPTED = struct.Struct("=Q")  # the request's unique number
FORGET = struct.Struct("=Q")  # lookup count
FORGET_COUNT = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")  # inode, lookup count
SETATTR = struct.Struct("=I4xQQQqqqIIIIIIII")
"""Valid, handle, size, lock owner, times in s, times in ns, mode, (none), uid, gid, (none)."""
MKNOD = struct.Struct("=IIII")  # mode, device, umask
MKDIR = struct.Struct("=II")  # mode, umask
RENAME = struct.Struct("=Q")  # the new directory
RENAME2 = struct.Struct("=QII")  # the new directory, flags
LINK = struct.Struct("=Q")  # the inode
OPEN = struct.Struct("=II")  # flags of open(2), OPEN_...
CREATE = struct.Struct("=IIII")  # flags of open(2), mode, umask, OPEN_...
READ = struct.Struct("=QQII")  # handle, offset, size, READ_..., and unused fields
WRITE = struct.Struct("=QQIIQII")
"""Handle, offset, size, WRITE_..., lock owner, flags of the open file as open(2) takes them."""
HANDLE = struct.Struct("=QI")  # handle, flags
FALLOCATE = struct.Struct("=QQQI")  # handle, offset, size, mode of fallocate(2)
LSEEK = struct.Struct("=QQI")  # handle, offset, SEEK_DATA or SEEK_HOLE
COPY_FILE_RANGE = struct.Struct("=QQQQQQ")
"""Handle and offset to copy from; inode, handle and offset to copy to; size; flags follow."""
LOCK = struct.Struct("=QqQQIII")
"""Handle, lock owner; first and last byte, type as of fcntl(2), process; LOCK_FLOCK."""
LOCK_FLOCK = 1 << 0
"""Flag of a lock: one of flock(2)."""
IOCTL = struct.Struct("=Q4xI8xII")  # handle, command, sizes of what follows and of the answer
IOCTL_DONE = bytes(16)
"""The start of the answer to an IOCTL that succeeded."""
INODE_FLAGS = struct.Struct("=I")  # of FS_IOC_GETFLAGS and FS_IOC_SETFLAGS
EXTENDED_FLAGS = struct.Struct("=I24x")  # of FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR
FLUSH = struct.Struct("=Q8xq")  # handle, lock owner
_LOCKED = struct.Struct("=QQII")
pack_lock = _LOCKED.pack
"""The answer to a GETLK: first and last byte, type, process."""
NUMBER = struct.Struct("=Q")
"""The answer to a LSEEK, an offset, and to a COPY_FILE_RANGE_64, a size."""
SETXATTR = struct.Struct("=II")  # size, flags of setxattr(2)
SETXATTR_EXT = struct.Struct("=III4x")  # the same, SETXATTR_...
SIZE = struct.Struct("=II")

_ENTRY = struct.Struct("=QQQQII")
_VALIDITY = struct.Struct("=QI4x")
_ATTRIBUTES = struct.Struct("=QQQqqqIIIIIIIIII")
_STATX_VALIDITY = struct.Struct("=QI20x")
_STATX = struct.Struct("=IIQIIIH2xQQQQqI4xqI4xqI4xqI4xII8x112x")
_OPENED = struct.Struct("=QII")
_STATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_INVAL_INODE = struct.Struct("=Qqq")
_INVAL_ENTRY = struct.Struct("=QII")
_BACKING = struct.Struct("=iIQ")  # descriptor, (none)
_BACKING_ID = struct.Struct("=I")
BACKING_OPEN, BACKING_CLOSE = 0x4010E501, 0x4004E502
"""ioctl(2) requests of ``/dev/fuse``, for what the two functions here pack."""
_NOTIFY_INVAL_INODE, _NOTIFY_INVAL_ENTRY = 2, 3

pack_entry = _ENTRY.pack
"""Inode and generation; cache timeouts of name and attributes, in s and the rest in ns.  Attributes
follow."""
pack_validity = _VALIDITY.pack
"""Cache timeout of the attributes that follow, in s and the rest in ns."""
pack_attributes = _ATTRIBUTES.pack
"""Inode, size, blocks of 512 bytes; atime, mtime, ctime in s, and the rest in ns; mode, links,
owner, group, device, block size, flags."""
pack_statx_validity = _STATX_VALIDITY.pack
"""The same before the answer to a STATX."""
pack_statx = _STATX.pack
"""The answer to a STATX: which fields are valid, block size, 0; links, owner, group, mode; inode,
size, blocks of 512 bytes, 0; atime, btime, ctime, mtime, each in s and the rest in ns; device,
major and minor."""
pack_statfs = _STATFS.pack
"""Blocks, of which free, of which available; inodes, of which free; block size, longest name,
fragment size, 0."""
ATTRIBUTES_SIZE = _ATTRIBUTES.size
ENTRY_SIZE = _ENTRY.size + ATTRIBUTES_SIZE
_DIRENT_SIZE = _DIRENT.size


def answer(unique: int, size: int) -> bytes:
    """Return the header of a reply with *size* bytes."""
    return _ANSWER.pack(_ANSWER.size + size, 0, unique)


def refusal(unique: int, number: int) -> bytes:
    """Return an error reply."""
    return _ANSWER.pack(_ANSWER.size, -number, unique)


def init_answer(body: memoryview, wanted: int) -> tuple[int, bytes]:
    """Return the agreed features, and the reply.

    Raises:
        ValueError: the kernel is too old; the message has its version.
    """
    major, minor = _OLD_INIT.unpack_from(body)
    if (major, minor) < (MAJOR, OLDEST_MINOR):
        raise ValueError(f"FUSE {major}.{minor}; at least {MAJOR}.{OLDEST_MINOR} (Linux 5.4)")
    if major > MAJOR:  # it sends the request again, in this version
        return 0, _OLD_INIT.pack(MAJOR, MINOR) + bytes(_INIT_ANSWER.size - _OLD_INIT.size)
    _, _, readahead, lower, upper = _INIT.unpack_from(bytes(body).ljust(_INIT.size, b"\0"))
    offered = lower | (upper << 32 if lower & Feature.INIT_EXT else 0)
    if minor < _TELLING_MINOR:
        offered &= ~Feature.PASSTHROUGH
    agreed = wanted & offered
    return agreed, _INIT_ANSWER.pack(
        MAJOR, MINOR, readahead, agreed & 0xFFFFFFFF, MAX_BACKGROUND, MAX_BACKGROUND,
        MAX_WRITE, 1, _PAGES, 0, agreed >> 32,
        1 if agreed & Feature.PASSTHROUGH else 0,  # stacking depth
    )  # fmt: skip


def opened(handle: int, flags: int, backing: int = 0) -> bytes:
    """Return the reply to an OPEN, also the end of that to a CREATE; *backing* with
    ``PASSTHROUGH``."""
    return _OPENED.pack(handle, flags, backing)


def backing(fd: int) -> bytearray:
    """Return the argument of ``BACKING_OPEN``, which returns an ID for the descriptor."""
    return bytearray(_BACKING.pack(fd, 0, 0))  # for bytes, fcntl.ioctl would return a copy


def backing_id(number: int) -> bytearray:
    """Return the argument of ``BACKING_CLOSE``."""
    return bytearray(_BACKING_ID.pack(number))


def written(size: int) -> bytes:
    """Return the reply to a WRITE; also the reply to a query of a size."""
    return SIZE.pack(size, 0)


def direntry_size(name: bytes) -> int:
    """Return the size of a directory entry in bytes."""
    return (_DIRENT_SIZE + len(name) + 7) & ~7


def inodes_of(opcode: int, answer: bytes | memoryview) -> Iterator[int]:
    """Yield the inodes that become known to the kernel by a reply with entries."""
    position = 0
    while position + _ENTRY.size <= len(answer):
        (ino,) = FORGET.unpack_from(answer, position)
        if ino:
            yield ino
        if opcode != Opcode.READDIRPLUS:
            return
        position += ENTRY_SIZE
        _, _, length, _ = _DIRENT.unpack_from(answer, position)
        position += (_DIRENT_SIZE + length + 7) & ~7


class Changed(NamedTuple):
    """Cached objects of the kernel that a request changes."""

    names: list[tuple[int, bytes]]  # with their directories
    inodes: list[int]  # with changed attributes


_NAMES_AT: dict[int, int] = {
    Opcode.SYMLINK: 0, Opcode.UNLINK: 0, Opcode.RMDIR: 0, Opcode.MKNOD: MKNOD.size,
    Opcode.MKDIR: MKDIR.size, Opcode.LINK: LINK.size, Opcode.CREATE: CREATE.size,
    Opcode.RENAME: RENAME.size, Opcode.RENAME2: RENAME2.size,
}  # fmt: skip
"""Offsets of names in the bodies of requests that change names."""


def changed_by(header: Header, body: memoryview) -> Changed:
    """Return what a request changes if it takes effect, without data and derived attributes."""
    opcode = header.opcode
    start = _NAMES_AT.get(opcode)
    if start is None:
        return Changed([], [header.node] if opcode == Opcode.SETATTR else [])
    name, _, rest = bytes(body[start:]).partition(b"\0")
    names, inodes = [(header.node, name)], [header.node]
    if opcode in (Opcode.RENAME, Opcode.RENAME2):
        (directory,) = RENAME.unpack_from(body)
        names.append((directory, rest.partition(b"\0")[0]))
        inodes.append(directory)
    elif opcode == Opcode.LINK:
        inodes.append(LINK.unpack_from(body)[0])
    return Changed(names, inodes)


def pack_direntry(ino: int, cookie: int, mode: int, name: bytes) -> bytes:
    """Encode a directory entry; *cookie* continues after it."""
    padding = -(_DIRENT_SIZE + len(name)) & 7
    return _DIRENT.pack(ino, cookie, len(name), mode >> 12) + name + bytes(padding)


def forget_inode(ino: int, offset: int, size: int = 0) -> bytes:
    """Encode a notification to drop attributes and, unless *offset* is negative, the pages after
    it: all, or *size* bytes."""
    body = _INVAL_INODE.pack(ino, offset, size)
    return _ANSWER.pack(_ANSWER.size + len(body), _NOTIFY_INVAL_INODE, 0) + body


def forget_name(directory: int, name: bytes) -> bytes:
    """Encode a notification to drop the dentry of a name."""
    body = _INVAL_ENTRY.pack(directory, len(name), 0) + name + b"\0"
    return _ANSWER.pack(_ANSWER.size + len(body), _NOTIFY_INVAL_ENTRY, 0) + body
