"""Helpers for serving processes: signals, readiness notification, address file."""

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
    """Waits for SIGTERM, SIGINT or :meth:`come`; for the main thread.

    Signals are handled from ``with`` on.  They arrive through a socket, because a signal that
    another thread receives does not interrupt a wait in the main thread.  Data in the socket only
    wake the waiter: they may stem from another signal that the program handles.

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
        """Return when a shutdown was requested."""
        while not self._came:
            self._reader.recv(1)

    def come(self) -> None:
        """Request a shutdown; from any thread."""
        self._came = True
        with contextlib.suppress(OSError):  # already requested
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
    """Notify the service manager, if there is one, like sd_notify(3): ``READY=1``."""
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
    """Keep a file with *address* for the duration of the block; it is created atomically.

    Anything other than a regular file is written to, and kept at the end.
    """
    if path is None:
        yield
        return
    text = f"{address}\n".encode()
    if path.is_fifo():
        # In a thread: opening a FIFO waits for a reader, which must not delay signals.
        threading.Thread(target=_tell, args=(path, text), daemon=True).start()
        yield
        return
    written = write_file(path, text)
    try:
        yield
    finally:
        if written is not None:
            with contextlib.suppress(OSError):
                # Another service may have replaced the file.
                if not written.is_fifo() and written.read_bytes() == text:
                    written.unlink()


def _tell(path: Path, text: bytes) -> None:
    try:
        write_file(path, text)
    except (OSError, Exception) as error:
        log.warning("address file: %s", error)
