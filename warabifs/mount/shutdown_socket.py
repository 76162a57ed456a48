"""How umount(8) learns that a mount's process has persisted everything, or what it has not.

The kernel's unmounting returns when the kernel has let go; the process may still be persisting.
So ``umount`` connects to a Unix socket of the process first, unmounts, and then waits for the
process's report.

The socket is in a directory that only the mount's user can enter
(``warabi/protocol/socket_directories.py``), so no other user can take its name or fill its queue,
and each side checks the credentials of the other. Its name has the mount's device number, and the
process, for the number is free for another mount as soon as the kernel has let go.  The process
closes the socket then, and reports to those that had connected before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from warabi.protocol import socket_directories
from warabi.protocol.address import peer, set_send_timeout
from warabifs.frontends.mountinfo import Mounted, mounted_on

_PREFIX = "umount."
_QUEUE = 4096
_CONNECT = 2.0  # seconds for a connection to find room in the queue
_DONE = b"persisted"


def identity(device: str) -> int:
    """A number that the file system of this device number has, and none that has it later; 0 when
    it is gone, or sysfs is not mounted."""
    try:
        return os.stat(f"/sys/class/bdi/{device}").st_ino
    except OSError:
        return 0


class ShutdownSocket:
    """The side of the mount's process."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._path = Path()
        self._waiting: list[socket.socket] = []

    def announce(self, path: str) -> None:
        """Open the socket of the mount on *path*.

        Raises:
            OSError: that is not possible; ``umount`` cannot wait for this process then.
            PermissionDenied: there is no directory for it.
        """
        mount = mounted_on(path)
        if mount is None:
            raise FileNotFoundError(errno.ENOENT, f"{path}: not in the list of mounts")
        directory = socket_directories.made(os.getuid())
        _remove_stale(directory)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path = directory / f"{_PREFIX}{mount.device}.{os.getpid()}"
            hidden = directory / f"new.{os.getpid()}"
            hidden.unlink(missing_ok=True)  # of an earlier process with this number
            listener.bind(str(hidden))
            listener.listen(_QUEUE)
            listener.setblocking(False)
            hidden.rename(self._path)  # what has this name listens, or its process has ended
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    @property
    def fd(self) -> int:
        """The socket's descriptor, readable when a process has connected; -1 when there is none."""
        return -1 if self._listener is None else self._listener.fileno()

    def accept(self) -> None:
        """Take the connections that have come, and let go of those whose processes have gone, such
        as a ``umount`` that was refused.  They would fill the queue in the course of time."""
        assert self._listener is not None
        gone = [connection for connection in self._waiting if _is_closed(connection)]
        for connection in gone:
            self._waiting.remove(connection)
            connection.close()
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                # Nobody else can be there, in such a directory.
                if peer(connection)[1] in (os.getuid(), 0) and not _is_closed(connection):
                    self._waiting.append(connection)
                else:
                    connection.close()

    def gather(self) -> None:
        """The kernel has let go: remove the socket, keep those that have connected."""
        if self._listener is None:
            return
        self.accept()
        self._listener.close()
        self._listener = None
        self._path.unlink(missing_ok=True)

    def say(self, failure: str) -> None:
        """Report what was not persisted, or that everything was."""
        self.gather()
        for waiting in self._waiting:
            with contextlib.suppress(OSError), waiting:
                waiting.send(failure.encode(errors="replace")[:1000] or _DONE)
        self._waiting.clear()


def _remove_stale(directory: Path) -> None:
    """Remove the sockets of processes that were killed."""
    for path in directory.glob(f"{_PREFIX}*"):
        try:
            _connected(path).close()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side of a non-blocking connection has closed it; it sends nothing."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def live_devices(uid: int) -> set[str]:
    """The device numbers of all mounts of user *uid* whose processes live, in whatever mount and
    PID namespaces they are; of those with a socket that is seen from here."""
    found = set()
    for directory in socket_directories.existing(uid):
        for path in directory.glob(f"{_PREFIX}*"):
            try:
                _connected(path).close()
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            except OSError:
                pass  # it is there, but cannot be asked
            found.add(path.name.removeprefix(_PREFIX).partition(".")[0])
    return found


def _connected(path: Path) -> socket.socket:
    """A connection to the socket *path*; raises ``OSError``."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not by settimeout(): a full queue is an error at once then.
        set_send_timeout(connection, _CONNECT)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class Waiting:
    """The side of ``umount``; made before the unmounting.

    Attributes:
        pid: the mount's process; 0 when it cannot be asked, or cannot be seen from here.
        reason: why the process cannot be asked; empty when it can.
    """

    def __init__(self, mount: Mounted) -> None:
        self.pid = 0
        self.reason = "no process of the mount is found, so it was killed, or is in a container"
        self._socket: socket.socket | None = None
        name = f"{_PREFIX}{mount.device}."
        found = [
            p for place in socket_directories.existing(mount.owner) for p in place.glob(f"{name}*")
        ]
        # The newest first: the process of an earlier mount of that number may not have ended yet.
        for path in sorted(found, key=_made_at, reverse=True):
            try:
                connection = _connected(path)
            except ConnectionRefusedError:
                self.reason = "the mount's process has ended without a report, see its log"
                continue
            except OSError as error:
                self.reason = f"the mount's process does not listen: {error.strerror}"
                continue
            self.pid, uid = peer(connection)
            if uid == mount.owner:
                self._socket = connection
                self.reason = ""
                return
            connection.close()
            self.reason = f"process {self.pid} of user {uid} has taken the place of the mount's"

    def word(self, seconds: float) -> str | None:
        """What was not persisted, empty when everything was; None when there is no report so far.

        Not to be called where there is a ``reason``.
        """
        assert self._socket is not None
        self._socket.settimeout(max(seconds, 0.001))
        try:
            said = self._socket.recv(1000)
        except TimeoutError:
            return None
        except OSError:
            said = b""
        if said == _DONE:
            return ""
        return said.decode(errors="replace") or "its process ended without a report, see its log"

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _made_at(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0
