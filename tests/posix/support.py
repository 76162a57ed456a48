"""What the tests of system calls share: users, inodes of every kind, and times that move."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

NOBODY = 65534
KINDS = ("file", "directory", "link", "fifo", "socket", "character", "block")
SPECIAL = ("fifo", "socket", "character", "block")
OLD = 1_000_000_000_123_456_789  # a time, in ns, that no change leaves as it is
AT_FDCWD = -100
AT_EACCESS = 0x200
AT_SYMLINK_NOFOLLOW, AT_SYMLINK_FOLLOW = 0x100, 0x400
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
_TYPES = {
    "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "character": stat.S_IFCHR,
    "block": stat.S_IFBLK, "file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK,
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def birth_ns(path: Path) -> int | None:
    """When a file was made, in ns since the epoch, as statx(2) tells it; None if it does not."""
    buffer = ctypes.create_string_buffer(256)
    basic, birth, no_follow = 0x7FF, 0x800, 0x100
    check(libc.statx(AT_FDCWD, os.fsencode(path), no_follow, basic | birth, buffer))
    assert struct.unpack_from("I", buffer)[0] & basic == basic
    if not struct.unpack_from("I", buffer)[0] & birth:
        return None
    seconds, rest = struct.unpack_from("qI", buffer, 80)
    return int(seconds * 10**9 + rest)


def check(result: int) -> int:
    """The result of a call of ``libc``, or its error."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextlib.contextmanager
def user(uid: int = NOBODY, gid: int = NOBODY, groups: Iterable[int] = ()) -> Iterator[None]:
    """Be somebody else while the block runs."""
    before = os.getgroups()
    os.setgroups(list(groups))
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def opened(
    path: Path | str, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644
) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def file(path: Path, data: bytes = b"") -> Path:
    path.write_bytes(data)
    return path


def directory(path: Path, mode: int = 0o755, owner: int = 0) -> Path:
    """A directory of just this mode and owner."""
    path.mkdir()
    os.chown(path, owner, owner)
    path.chmod(mode)
    return path


def make(kind: str, path: Path, mode: int = 0o644, owner: int = 0) -> Path:
    """An inode of one of ``KINDS``, of just this mode and owner; a link leads nowhere."""
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)  # a whole path could be too long
    else:
        os.mknod(
            path, _TYPES[kind] | mode, os.makedev(1, 3) if kind in ("character", "block") else 0
        )
    os.lchown(path, owner, owner)
    if kind != "link":
        path.chmod(mode)
    return path


def kind_of(path: Path) -> str:
    """Which of ``KINDS`` is there."""
    found = stat.S_IFMT(path.lstat().st_mode)
    return next(kind for kind, number in _TYPES.items() if number == found)


def remove(path: Path) -> None:
    (path.rmdir if kind_of(path) == "directory" else path.unlink)()


def mode_of(path: Path | int) -> int:
    """The permission and set-ID bits."""
    found = os.stat(path) if isinstance(path, int) else path.lstat()
    return stat.S_IMODE(found.st_mode)


def old(path: Path) -> Path:
    os.utime(path, ns=(OLD, OLD))
    return path


def tick() -> None:
    """Let the clock that stamps files go on."""
    time.sleep(0.012)


def updated(call: Callable[[], object], *places: Path | int) -> list[str]:
    """Which times *call* moved forward of each path or descriptor: "m", "c", "mc" or "".

    A place must be there before and after.
    """

    def times() -> list[tuple[int, int]]:
        found = [os.stat(p) if isinstance(p, int) else p.lstat() for p in places]
        return [(f.st_mtime_ns, f.st_ctime_ns) for f in found]

    before = times()
    tick()
    call()
    moved = zip(before, times(), strict=True)
    return ["m" * (b[0] < a[0]) + "c" * (b[1] < a[1]) for b, a in moved]


def renameat2(old_path: Path | str, new_path: Path | str, flags: int) -> None:
    paths = os.fsencode(old_path), os.fsencode(new_path)
    check(libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], flags))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Set times, each as seconds and nanoseconds, or ``UTIME_NOW`` or ``UTIME_OMIT`` there."""
    times = struct.pack("4q", *atime, *mtime)
    check(libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags))


UTIME_NOW, UTIME_OMIT = (0, (1 << 30) - 1), (0, (1 << 30) - 2)
