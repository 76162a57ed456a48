"""Mounting: by mount(2) where that is permitted, otherwise by ``fusermount3``, which any user may
run."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import subprocess

from warabi._core import syscalls
from warabi._core.mountinfo import KIND, mounted_on
from warabi._core.tuning import MOUNT_ANSWER
from warabi.errors import ConfigError

READ_AHEAD = 512
"""KiB; the kernel's default is 128, which causes four times as many requests.  More would be
evicted from the processor's caches before it is copied out."""
READ_AHEAD_REMOTE = 4096
"""Over a network more requests must be pending while earlier data are consumed."""
_DEFAULT = frozenset(("nosuid", "nodev"))  # the defaults of fusermount3
_FOR_KERNEL = ("default_permissions", "allow_other")


class Device:
    """An open ``/dev/fuse``, mounted.

    Args:
        mountpoint: an existing directory, absolute.
        name: the source that mount(8) and df show.
        options: the kernel's options, and those of fuse(4) without a value; labels include their
            value.

    Attributes:
        fd: the descriptor by which the mount is served.

    Raises:
        ConfigError: it cannot be mounted; the message quotes the kernel or fusermount3.
    """

    def __init__(self, mountpoint: str, name: str, options: set[str]) -> None:
        self._mountpoint = mountpoint
        try:
            self.fd = _mount(mountpoint, name, options)
            self._by_us = True
        except PermissionError:
            self.fd = _fusermount(mountpoint, name, options)
            self._by_us = False
        except OSError as error:
            raise _failed(mountpoint, error.strerror or str(error)) from error

    def read_ahead(self, size: int) -> None:
        """Make the kernel read ahead by at least *size* KiB, if this user may set that.

        Must be called after the session has begun, which also sets it.
        """
        mount = mounted_on(self._mountpoint)
        path = f"/sys/class/bdi/{mount.device if mount else None}/read_ahead_kb"
        with contextlib.suppress(OSError), open(path, "r+", encoding="ascii") as file:
            if int(file.read()) < size:
                file.write(str(size))

    @property
    def ended(self) -> bool:
        """Whether the kernel has ended the session: unmounted everywhere, or aborted."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))

    def close(self, *, unmount: bool) -> None:
        """Close the descriptor; with *unmount* also unmount, if still mounted."""
        still_ours = unmount and not self.ended
        # The descriptor first: unmounting would wait for a reader of it.
        os.close(self.fd)
        if not still_ours:
            return
        if self._by_us:
            with contextlib.suppress(OSError):
                syscalls.umount2(self._mountpoint, syscalls.MNT_DETACH)
        else:
            command = ["fusermount3", "-u", "-q", "-z", "--", self._mountpoint]
            subprocess.run(command, capture_output=True, timeout=MOUNT_ANSWER)


def _failed(mountpoint: str, why: str) -> ConfigError:
    return ConfigError(
        f"mount point {mountpoint}: the mount failed ({why}); is /dev/fuse usable, and may this"
        " user mount there?"
    )


def _mount(mountpoint: str, name: str, options: set[str]) -> int:
    """Mount with mount(2); returns the descriptor."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    wanted = (_DEFAULT | options) - {"no" + option for option in options}
    flags = sum(flag for option, flag in syscalls.MOUNT_FLAGS.items() if option in wanted)
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    data += "".join("," + option for option in _FOR_KERNEL if option in options)
    for option in options:  # labels, which may contain commas
        key, has_value, value = option.partition("=")
        if has_value:
            data += f',{key}="{value}"'
    try:
        syscalls.mount(name, mountpoint, flags, KIND, data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _fusermount(mountpoint: str, name: str, options: set[str]) -> int:
    """Mount with ``fusermount3``, which passes the descriptor.

    Raises:
        ConfigError: it failed, or is not installed.
    """
    shown = name.encode("ascii", "replace").decode()
    items = [f"fsname={shown}", "subtype=warabifs", *sorted(options)]
    settings = ",".join(item.replace("\\", "\\\\").replace(",", "\\,") for item in items)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, its:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", settings, "--", mountpoint],
                pass_fds=[its.fileno()],
                env={**os.environ, "_FUSE_COMMFD": str(its.fileno())},
                stdin=subprocess.DEVNULL, capture_output=True, timeout=MOUNT_ANSWER,
            )  # fmt: skip
        except FileNotFoundError:
            raise _failed(mountpoint, "fusermount3 is not in PATH") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _failed(mountpoint, f"fusermount3: {error}") from None
        if done.returncode:
            raise _failed(mountpoint, done.stderr.decode(errors="replace").strip())
        its.close()
        fds = array.array("i")
        size = socket.CMSG_LEN(fds.itemsize)
        _, messages, _, _ = ours.recvmsg(1, size, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in messages:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not fds:
        raise _failed(mountpoint, "fusermount3 handed over no descriptor")
    return fds[0]
