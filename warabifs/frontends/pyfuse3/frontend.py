"""The front end on pyfuse3 and libfuse: the session and its main loop.

pyfuse3 keeps its session in a global variable, so a process has one such mount at a time.
"""

from __future__ import annotations

import contextlib
import os
from typing import ClassVar

import pyfuse3
import trio

from warabifs.frontends.base import Ability, FrontEnd, Settings
from warabifs.frontends.device import Device
from warabifs.frontends.pyfuse3.adapter import Adapter
from warabifs.fs.filesystem import FileSystem

_TASKS = 1000
"""Requests that may be under way; pyfuse3 has a task for each."""


class Pyfuse3FrontEnd(FrontEnd):
    """A mount served by pyfuse3, whose operations :class:`Adapter` implements."""

    _serves: ClassVar[bool] = False  # pyfuse3 has a session

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._fd = -1

    def begin(self, files: FileSystem, settings: Settings) -> frozenset[Ability]:
        if Pyfuse3FrontEnd._serves:
            raise ValueError(
                "pyfuse3 serves one mount at a time in a process, and this process has one already"
            )
        token = trio.lowlevel.current_trio_token()

        def began() -> None:
            # After libfuse's answer, with which the kernel sets it.
            token.run_sync_soon(self._device.read_ahead, settings.read_ahead)

        adapter = Adapter(files, settings, began, self._notified, self.counters)
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
        ended = self._notifier.silence()
        if self._fd < 0:
            return
        if ended:
            pyfuse3.close(unmount=False)
            Pyfuse3FrontEnd._serves = False
        else:  # the session is in use there, and ends with the process
            os.close(self._fd)
        self._fd = -1

    # Notifications

    def forget_inode(self, ino: int, attributes_only: bool) -> None:
        self._notifier.send(lambda: pyfuse3.invalidate_inode(ino, attributes_only))

    def forget_bytes(self, ino: int, offset: int, size: int) -> None:
        self.forget_inode(ino, False)

    def forget_name(self, directory: int, name: bytes) -> None:
        self._notifier.send(lambda: pyfuse3.invalidate_entry(directory, name))

    async def _notified(self) -> None:
        told, token = trio.Event(), trio.lowlevel.current_trio_token()

        def tell() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(told.set)

        self._notifier.soon(tell)
        await told.wait()
