"""The last word of a mount's process, for those who unmount.

The kernel's unmounting returns when the kernel has let go; the process may still be persisting.
So whoever unmounts connects to it first, and then waits for its word.  The meeting place is a
Unix socket without a file, named after the mount's device number.  Nothing is done about it
while the mount serves: who connects waits in the socket's queue.

The number is free for another mount when the kernel lets go, so the process closes the meeting
place then, and says its word to those who came before.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_QUEUE = 64
_PATIENCE = 2.0  # seconds for the mount that had the number before to close its place
_DONE = b"persisted"


@dataclass(frozen=True)
class Mounted:
    """A line of the list of mounts."""

    path: str
    device: str  # major:minor
    kind: str
    source: str
    options: dict[str, str]  # of the file system: user_id and the like

    @property
    def owner(self) -> int:
        """The user who mounted it."""
        return int(self.options.get("user_id") or -1)


def mounts() -> list[Mounted]:
    """What is mounted, without asking any of it; of several on one place the last is seen."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        kind, source, settings = [*right.split(" "), "", ""][:3]
        words = left.split(" ")
        pairs = (setting.partition("=")[::2] for setting in settings.split(","))
        found.append(Mounted(_text(words[4]), words[2], kind, _text(source), dict(pairs)))
    return found


def _text(field: str) -> str:
    """A field of the list, whose special characters are written in octal."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def mounted_on(path: str) -> Mounted | None:
    """What is seen at the mount point *path*, an absolute one."""
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def device_number(path: str) -> str:
    """``major:minor`` of what is mounted on *path*; empty when it is gone already."""
    mount = mounted_on(path)
    return mount.device if mount else ""


def _place(mount: Mounted) -> str:
    return f"\0warabifs/{mount.device}"


class Ending:
    """The side of the mount's process."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._waiting: list[socket.socket] = []

    def announce(self, path: str) -> bool:
        """Open the meeting place of the mount on *path*; whether that was possible."""
        mount = mounted_on(path)
        if mount is None:
            return False
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                listener.bind(_place(mount))
                break
            except OSError:
                if time.monotonic() > deadline:
                    listener.close()
                    return False
                time.sleep(0.02)
        listener.listen(_QUEUE)
        listener.setblocking(False)
        self._listener = listener
        return True

    def gather(self) -> None:
        """The kernel has let go: give the place free, keep those who came."""
        if self._listener is None:
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                self._waiting.append(self._listener.accept()[0])
        self._listener.close()
        self._listener = None

    def say(self, failure: str) -> None:
        """The last word: what was not persisted, or nothing."""
        self.gather()
        for waiting in self._waiting:
            waiting.setblocking(False)
            with contextlib.suppress(OSError), waiting:
                waiting.send(failure.encode(errors="replace")[:1000] or _DONE)
        self._waiting.clear()


class Waiting:
    """The side of who unmounts; made before the unmounting."""

    def __init__(self, mount: Mounted) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(1.0)
        self.pid = 0
        """The mount's process, or 0 when there is none to wait for."""
        try:
            self._socket.connect(_place(mount))
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("3i", credentials)
            if uid in (mount.owner, 0):  # anybody may take a place before a mount does
                self.pid = pid
        except OSError:
            return

    def word(self, seconds: float) -> str | None:
        """What was not persisted, empty when everything was; None when there is no word so far."""
        if not self.pid:
            return ""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            said = self._socket.recv(1000)
        except TimeoutError:
            return None
        except OSError:
            said = b""
        if said == _DONE:
            return ""
        return said.decode(errors="replace") or "its process ended without a word, see its log"

    def close(self) -> None:
        self._socket.close()
