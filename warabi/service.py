"""What a process that serves owes to the one that started it: signals, readiness, its address."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warabi._core import forks
from warabi._core.output import write_file
from warabi.errors import Exception

log = logging.getLogger(__name__)


class ShutdownSignals:
    """Waits for the end of the process: SIGTERM, SIGINT or :meth:`come`; for the main thread.

    Signals count from ``with`` on.  They arrive through a socket, because a signal that another
    thread happens to take interrupts no wait in the main thread.  What comes through the socket
    only wakes: it may stem from another signal that the program handles.

    A child that another thread forks has the program's own handlers, and does not wake its parent.
    """

    def __init__(self) -> None:
        self._came = False
        self._handlers: list[tuple[int, Any]] = []  # the program's
        self._wakeup = -1  # the program's
        forks.register(self)

    def __enter__(self) -> ShutdownSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # SIGINT first, and last at the end: in between its handler raises nothing.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers.append((number, signal.signal(number, self._note)))
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def _note(self, number: int, frame: object) -> None:
        self._came = True

    def wait(self) -> None:
        """Return when the end has come."""
        while not self._came:
            self._reader.recv(1)

    def come(self) -> None:
        """Let the end come; from any thread."""
        self._came = True
        with contextlib.suppress(OSError):  # it is here already
            self._writer.send(b"\0")

    def __exit__(self, *exc: object) -> None:
        self._restore()
        self._reader.close()
        self._writer.close()

    def _restore(self) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        while self._handlers:
            number, handler = self._handlers.pop()
            signal.signal(number, handler)

    def _forked(self) -> None:
        if self._handlers:
            self._restore()
            forks.disconnect([self._reader.fileno(), self._writer.fileno()])


def notify(state: str) -> None:
    """Tell the service manager, if there is one, as sd_notify(3) does: ``READY=1``."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):  # Linux's abstract sockets
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(1.0)
            manager.sendto(state.encode(), path)
    except OSError as error:
        log.warning("NOTIFY_SOCKET: %s was not sent: %s", state, error.strerror or error)


@contextlib.contextmanager
def address_file(path: Path | None, address: str) -> Iterator[None]:
    """A file with *address* while the block runs; readers see all of it or no file.

    What is no regular file is written to, and left as it is at the end.
    """
    if path is None:
        yield
        return
    text = f"{address}\n".encode()
    if path.is_fifo():
        # In a thread: to open one waits for a reader, for which signals cannot wait.
        threading.Thread(target=_tell, args=(path, text), daemon=True).start()
        yield
        return
    written = write_file(path, text)
    try:
        yield
    finally:
        if written is not None:
            with contextlib.suppress(OSError):
                # Another service may have taken the place.
                if not written.is_fifo() and written.read_bytes() == text:
                    written.unlink()


def _tell(path: Path, text: bytes) -> None:
    try:
        write_file(path, text)
    except (OSError, Exception) as error:
        log.warning("address file: %s", error)
