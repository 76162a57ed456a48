"""A socket by which umount(8) waits until a mount process has persisted everything.

umount2(2) returns when the kernel has detached the mount; the process may still be persisting.
So ``umount`` connects to a Unix socket of the process first, unmounts, and then waits for the
process's report.

The socket is in a directory that only the mount's user can enter
(``warabi/protocol/socket_directories.py``), so no other user can take its name or fill its queue,
and each side checks the credentials of the other.  Its name contains the mount's device number, the
identity of the file system, since the kernel may reuse the number for another mount after the
unmount, and the process ID.  The process then closes the socket, and reports to the clients that
had connected before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from warabi._core.mountinfo import Mounted, identity, is_gone, mounted_on
from warabi._core.tuning import SHUTDOWN_CONNECT
from warabi.protocol import socket_directories
from warabi.protocol.address import peer, set_send_timeout

_PREFIX = "umount."
_QUEUE = 4096
_DONE = b"persisted"
_NO_REPORT = "the mount process exited without a report, see its log"


class ShutdownSocket:
    """The side of the mount process."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._path = Path()
        self._waiting: list[socket.socket] = []

    def announce(self, path: str) -> None:
        """Open the socket of the mount on *path*.

        Raises:
            OSError: that is not possible; then ``umount`` cannot wait for this process.
            PermissionDenied: there is no directory for it.
        """
        mount = mounted_on(path)
        if mount is None:
            raise FileNotFoundError(errno.ENOENT, f"{path}: not in the list of mounts")
        directory = socket_directories.made(os.getuid())
        _remove_stale(directory)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            number = identity(mount.device)
            self._path = directory / f"{_PREFIX}{mount.device}.{number}.{os.getpid()}"
            hidden = directory / f"new.{os.getpid()}"
            hidden.unlink(missing_ok=True)  # of an earlier process with this number
            listener.bind(str(hidden))
            listener.listen(_QUEUE)
            listener.setblocking(False)
            hidden.rename(self._path)  # a socket of this name listens, or its process has ended
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    @property
    def fd(self) -> int:
        """The socket's descriptor, readable when a client has connected; -1 if it is not open."""
        return -1 if self._listener is None else self._listener.fileno()

    def accept(self) -> None:
        """Accept pending connections, and close those whose client has exited, such as an
        ``umount`` that failed; otherwise they would fill the queue in time."""
        assert self._listener is not None
        gone = [connection for connection in self._waiting if _is_closed(connection)]
        for connection in gone:
            self._waiting.remove(connection)
            connection.close()
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                # The directory's mode lets only these users connect.
                if peer(connection)[1] in (os.getuid(), 0) and not _is_closed(connection):
                    self._waiting.append(connection)
                else:
                    connection.close()

    def gather(self) -> None:
        """Remove the socket after the unmount, and keep the connections that exist."""
        if self._listener is None:
            return
        self.accept()
        self._listener.close()
        self._listener = None
        self._path.unlink(missing_ok=True)

    def report(self, failure: str) -> None:
        """Send the error to all clients, or that everything was persisted if *failure* is empty."""
        self.gather()
        for waiting in self._waiting:
            with contextlib.suppress(OSError), waiting:
                waiting.send(failure.encode(errors="replace")[:1000] or _DONE)
        self._waiting.clear()


def _remove_stale(directory: Path) -> None:
    """Remove the sockets of killed processes, once their file systems are unmounted: until then a
    socket tells ``umount`` that the process was killed."""
    for path in directory.glob(f"{_PREFIX}*"):
        device, number = _file_system(path)
        if number and not is_gone(device, number):
            continue
        try:
            _connected(path).close()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def _is_closed(connection: socket.socket) -> bool:
    """Whether the peer of a non-blocking connection, which sends nothing, has closed it."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _file_system(path: Path) -> tuple[str, int]:
    """Return the device number and the identity in the name of a socket; 0 if it has none."""
    device, *numbers = path.name.removeprefix(_PREFIX).split(".")
    return device, int(numbers[0]) if len(numbers) > 1 and numbers[0].isdecimal() else 0


def _connected(path: Path) -> socket.socket:
    """Connect to the socket *path*; raises ``OSError``."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not by settimeout(), which makes a full queue fail at once.
        set_send_timeout(connection, SHUTDOWN_CONNECT)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class Waiting:
    """The side of ``umount``; created before the unmount.

    Args:
        mount: what is about to be unmounted.
        number: the identity of its file system, or 0 when that is not known.

    Attributes:
        pid: ID of the mount process; 0 if it is unknown or not visible here.
        reason: why the process cannot report; empty if it can.
        killed: whether the process has exited, so that no later unmount will report more.
    """

    def __init__(self, mount: Mounted, number: int) -> None:
        self.pid = 0
        self.reason = "the mount process was not found: it was killed, or is in a container"
        self.killed = False
        self._socket: socket.socket | None = None
        found = [
            path
            for place in socket_directories.existing(mount.owner)
            for path in place.glob(f"{_PREFIX}{mount.device}.*")
            if 0 in (number, of := _file_system(path)[1]) or of == number
        ]
        # Newest first: without an identity, the process of an earlier mount may still be exiting.
        for path in sorted(found, key=_made_at, reverse=True):
            try:
                connection = _connected(path)
            except ConnectionRefusedError:
                self.reason = _NO_REPORT
                self.killed = bool(number) and _file_system(path)[1] == number
                continue
            except OSError as error:
                self.reason = f"the mount process does not listen: {error.strerror}"
                continue
            self.pid, uid = peer(connection)
            if uid == mount.owner:
                self._socket = connection
                self.reason, self.killed = "", False
                return
            connection.close()
            self.reason = f"process {self.pid} of user {uid} listens instead of the mount process"

    def wait_report(self, seconds: float) -> str | None:
        """Wait up to *seconds* for the report.

        Returns:
            what was not persisted, empty if everything was; None on timeout.

        Must not be called if there is a ``reason``.
        """
        assert self._socket is not None
        self._socket.settimeout(max(seconds, 0.001))
        try:
            report = self._socket.recv(1000)
        except TimeoutError:
            return None
        except OSError:
            report = b""
        if report == _DONE:
            return ""
        return report.decode(errors="replace") or _NO_REPORT

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _made_at(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0
