"""The front end on pyfuse3 and libfuse: the session and its main loop.

pyfuse3 keeps its session in a global variable, so a process has one such mount at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Callable
from typing import ClassVar

import pyfuse3
import trio

from warabi._core import forks
from warabi._core.tuning import IN_KERNEL
from warabifs.frontends.base import Ability, FrontEnd, Settings
from warabifs.frontends.device import Device
from warabifs.frontends.pyfuse3.adapter import Adapter
from warabifs.fs.filesystem import FileSystem

_TASKS = 1000
"""Requests that may be under way; pyfuse3 has a task for each."""


class Pyfuse3FrontEnd(FrontEnd):
    """pyfuse3 takes the requests, and :class:`Adapter` hands them on."""

    _serves: ClassVar[bool] = False  # pyfuse3 has a session

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._fd = -1
        self._notices: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._notifying = forks.lock()
        self._silent = False

    def begin(self, files: FileSystem, settings: Settings) -> frozenset[Ability]:
        if Pyfuse3FrontEnd._serves:
            raise ValueError("pyfuse3 serves one mount of a process at a time, and has one")
        token = trio.lowlevel.current_trio_token()

        def began() -> None:
            # After libfuse's answer, with which the kernel sets it.
            token.run_sync_soon(self._device.read_ahead, settings.read_ahead)

        adapter = Adapter(files, settings, began, self._notified)
        # Mounted is it already.  libfuse closes the descriptor that it gets.
        fd = os.dup(self._device.fd)
        try:
            pyfuse3.init(adapter, f"/dev/fd/{fd}", set())
        except RuntimeError as error:
            os.close(fd)
            raise ValueError(f"libfuse refuses it: {error}") from error
        self._fd = fd
        Pyfuse3FrontEnd._serves = True
        wanted = {Ability.DIRECT_IO: settings.direct_io, Ability.WRITEBACK: settings.writeback}
        return frozenset(ability for ability, used in wanted.items() if used)

    async def serve(self) -> None:
        await pyfuse3.main(max_tasks=_TASKS)

    def stop(self) -> None:
        pyfuse3.terminate()

    def close(self) -> None:
        self._silent = True
        if self._fd < 0:
            return
        if self._notifying.acquire(timeout=IN_KERNEL):
            self._notifying.release()
            pyfuse3.close(unmount=False)
            Pyfuse3FrontEnd._serves = False
        else:  # the session is in use there, and ends with the process
            os.close(self._fd)
        self._fd = -1

    # Notifications

    def forget_inode(self, ino: int, attributes_only: bool) -> None:
        self._notify(lambda: pyfuse3.invalidate_inode(ino, attributes_only))

    def forget_bytes(self, ino: int, offset: int, size: int) -> None:
        self.forget_inode(ino, False)

    def forget_name(self, directory: int, name: bytes) -> None:
        self._notify(lambda: pyfuse3.invalidate_entry(directory, name))

    def drop_name(self, directory: int, name: bytes) -> None:
        self._soon(lambda: self.forget_name(directory, name))

    def drop_attributes(self, ino: int) -> None:
        self._soon(lambda: self.forget_inode(ino, True))

    def drop_bytes(self, ino: int, offset: int, size: int) -> None:
        self._soon(lambda: self.forget_inode(ino, False))

    def _notify(self, tell: Callable[[], None]) -> None:
        with self._notifying:
            if self._silent:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            tell()

    def _soon(self, call: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._tell_all, daemon=True)
            self._thread.start()
        self._notices.put(call)

    def _tell_all(self) -> None:
        while True:
            call = self._notices.get()
            with contextlib.suppress(OSError):  # not cached, or the mount has ended
                call()

    async def _notified(self) -> None:
        told, token = trio.Event(), trio.lowlevel.current_trio_token()

        def tell() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(told.set)

        self._soon(tell)
        await told.wait()
