"""Sends notifications to the kernel: one at a time, from any thread, until the mount ends."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Callable

from warabi._core import forks
from warabi._core.tuning import IN_KERNEL


class Notifier:
    """A lock that notifications take, and a thread for those that nothing waits for."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._sending = forks.lock()
        self._silent = False

    @property
    def pending(self) -> int:
        """The number of calls that the thread has not begun."""
        return self._calls.qsize()

    def send(self, notify: Callable[[], object]) -> None:
        """Call *notify*, which notifies the kernel; raises ``OSError`` if the mount is over."""
        with self._sending:
            if self._silent:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            notify()

    def soon(self, call: Callable[[], object]) -> None:
        """Have the thread make *call*, after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._call_all, daemon=True)
            self._thread.start()
        self._calls.put(call)

    def _call_all(self) -> None:
        while True:
            call = self._calls.get()
            with contextlib.suppress(OSError):  # not cached, or the mount has ended
                call()

    def silence(self) -> bool:
        """Send no more notifications, since the connection is about to be closed; returns whether
        no thread is still in the kernel for one, after waiting briefly."""
        self._silent = True
        ended = self._sending.acquire(timeout=IN_KERNEL)
        if ended:
            self._sending.release()
        return ended
