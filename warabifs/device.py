"""Mounting with mount(2) where that is allowed, instead of by libfuse.

It gives what libfuse and pyfuse3 have no option for: with ``MS_POSIXACL`` the kernel leaves the
umask to the file system, which alone knows the default access control list that comes before it
(umask(2), acl(5)).  An unprivileged mount, which ``fusermount3`` makes, goes without: there the
umask limits also what a default list would give.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select

import pyfuse3

from warabifs.ending import mounted_on

_FLAGS = {
    "ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "sync": 0x10, "dirsync": 0x80,
    "noatime": 0x400, "nodiratime": 0x800,
}  # fmt: skip
_POSIXACL = 0x10000
_DETACH = 2
_READ_AHEAD = 512
"""KiB; the kernel's own value is 128, four requests in the place of one."""
_DEFAULT = frozenset(("nosuid", "nodev"))  # as libfuse and fusermount3 have it
_FOR_KERNEL = ("default_permissions", "allow_other")


class Device:
    """The kernel's end of a mount that is served by pyfuse3.

    Args:
        operations: what serves it.
        mountpoint: an existing directory, absolute.
        name: the source that mount(8) and df show.
        options: of libfuse, but for the names of source and type.

    Raises:
        RuntimeError: libfuse could not mount, and said why on stderr.
        OSError: mount(2) failed, not for want of rights.
    """

    def __init__(
        self, operations: pyfuse3.Operations, mountpoint: str, name: str, options: set[str]
    ) -> None:
        self._mountpoint = mountpoint
        self._fd = _mount(mountpoint, name, options)
        place = mountpoint if self._fd is None else f"/dev/fd/{self._fd}"
        escaped = name.encode("ascii", "replace").decode()
        for special in "\\,":
            escaped = escaped.replace(special, "\\" + special)
        try:
            pyfuse3.init(operations, place, {f"fsname={escaped}", "subtype=warabifs", *options})
        except BaseException:
            if self._fd is not None:
                os.close(self._fd)
                self._unmount()
            raise

    def read_ahead(self) -> None:
        """Have the kernel read ahead in larger requests, where this user may set that.

        To be called once the kernel has been answered for the first time, which sets it too.
        """
        mount = mounted_on(self._mountpoint)
        path = f"/sys/class/bdi/{mount.device if mount else None}/read_ahead_kb"
        with contextlib.suppress(OSError), open(path, "r+", encoding="ascii") as file:
            if int(file.read()) < _READ_AHEAD:
                file.write(str(_READ_AHEAD))

    def close(self, *, unmount: bool) -> None:
        """End the session; with *unmount* the mount too, if it is still there."""
        ours = unmount and self._fd is not None and not _ended(self._fd)
        # First of all the descriptor: unmounting would wait for somebody to read from it.
        pyfuse3.close(unmount=unmount)
        if ours:
            self._unmount()

    def _unmount(self) -> None:
        with contextlib.suppress(OSError):
            _check(_libc().umount2(os.fsencode(self._mountpoint), _DETACH))


def _ended(fd: int) -> bool:
    """Whether the kernel ended the session: what is mounted there now is another's."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(mountpoint: str, name: str, options: set[str]) -> int | None:
    """Mount; the descriptor that libfuse is to serve, or None where mount(2) is not allowed."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # libfuse says more
    wanted = (_DEFAULT | options) - {"no" + option for option in options}
    flags = _POSIXACL | sum(flag for option, flag in _FLAGS.items() if option in wanted)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    data += "".join("," + option for option in _FOR_KERNEL if option in options)
    for option in options:  # labels, with commas and backslashes escaped for libfuse
        key, has_value, value = option.partition("=")
        if has_value:
            plain = re.sub(r"\\(.)", r"\1", value)
            data += f',{key}="{plain}"'
    arguments = (os.fsencode(name), os.fsencode(mountpoint), b"fuse.warabifs")
    try:
        _check(_libc().mount(*arguments, ctypes.c_ulong(flags), data.encode()))
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EPERM, errno.EACCES):
            return None
        raise
    return fd
