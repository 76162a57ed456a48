"""Keeping the kernel from believing what others have changed.

* Who tells the kernel to forget something has to wait: for pages that are being read or written,
  and for what is being done in a directory.  All of that is served by this process's event loop,
  so a thread tells it, and nothing that the kernel asks for ever waits for that thread.
* What comes while the thread is at it is gathered by the provider, within its bounds.
* Nobody serves the kernel any more when the session is being closed, so the thread has to be out
  of the kernel by then: see :meth:`Follower.stop`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncGenerator, Callable

import trio

from warabi import errors
from warabi._core.changes import Changes
from warabi.aio import Target
from warabifs.fs.filesystem import FileSystem
from warabifs.fs.handles import Outdated

log = logging.getLogger(__name__)

_EVERYTHING = Changes(0, True, {}, {})
_PAUSE = 1.0  # seconds after the provider did not answer
_PATIENCE = 2.0  # seconds for the thread to come out of the kernel
_OVER = (errno.ENOTCONN, errno.ENODEV, errno.EBADF, errno.EINVAL)


class Follower:
    """Has a kernel forget what others change in a target.

    Args:
        target: which one.
        files: the mount's.
        forget_inode: has the kernel forget attributes and, unless told, the bytes of an inode.
        forget_name: has it forget what a name in a directory means.
        new_names: whether the kernel believes that names mean nothing.
    """

    def __init__(
        self,
        target: Target,
        files: FileSystem,
        *,
        forget_inode: Callable[[int, bool], None],
        forget_name: Callable[[int, bytes], None],
        new_names: bool,
    ) -> None:
        self._target = target
        self._files = files
        self._forget_inode = forget_inode
        self._forget_name = forget_name
        self._new_names = new_names
        self._out = trio.Event()  # the thread is out of the kernel
        self._out.set()
        self._stopping = False

    async def run(self) -> None:
        """Follow until cancelled, or for as long as the provider tells what changes."""
        token = trio.lowlevel.current_trio_token()
        try:
            async with contextlib.aclosing(self._changes()) as followed:
                async for changes in followed:
                    outdated = self._files.outdated(changes)
                    if changes.everything:
                        outdated = outdated._replace(names=await self._changed(outdated.names))
                    if self._stopping:
                        return
                    if outdated.inodes or outdated.names:
                        self._out = trio.Event()
                        # Left alone when the mount ends: it may wait for what nobody serves then.
                        await trio.to_thread.run_sync(
                            self._tell, outdated, self._out, token, abandon_on_cancel=True
                        )
        except errors.ProtocolError as error:
            log.warning("what others change is seen when timeouts end: %s", error)

    async def _changes(self) -> AsyncGenerator[Changes, None]:
        """What others change; never ends but by a provider that does not know of it.

        When nothing is told any more, everything may have changed.
        """
        told = True
        while True:
            try:
                async with contextlib.aclosing(
                    self._target.changes(new_names=self._new_names)
                ) as found:
                    async for changes in found:
                        told = True
                        yield changes
            except errors.ProtocolError:
                raise
            except errors.Exception as error:
                if told:
                    log.info("nobody tells what others change: %s", error)
            if told:
                told = False
                yield _EVERYTHING
            await trio.sleep(_PAUSE)

    async def _changed(self, names: dict[tuple[int, bytes], int]) -> dict[tuple[int, bytes], int]:
        """Those of *names* that mean something else by now, or are no directories.

        A directory that programs work in would look as if it had been removed.
        """
        changed = {}
        for (parent, name), ino in names.items():
            try:
                if ino and self._files.is_directory(ino):
                    found = await self._target.call("lookup", parent, name)
                    if found.ino == ino:
                        continue
            except errors.Exception:
                pass  # it is gone, or nobody knows
            changed[parent, name] = ino
        return changed

    def _tell(self, outdated: Outdated, out: trio.Event, token: trio.lowlevel.TrioToken) -> None:
        try:
            for parent, name in outdated.names:
                self._one(self._forget_name, parent, name)
            for ino, attributes_only in outdated.inodes.items():
                self._one(self._forget_inode, ino, attributes_only)
        except OSError as error:
            if error.errno not in _OVER:
                log.error("the kernel did not forget what others changed: %s", error)
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(out.set)

    def _one(self, forget: Callable[..., None], *arguments: object) -> None:
        if not self._stopping:
            with contextlib.suppress(FileNotFoundError):  # it does not know it
                forget(*arguments)

    async def stop(self) -> None:
        """Tell the kernel nothing any more; returns when the thread is out of it, or when it does
        not come out within a moment."""
        self._stopping = True
        with trio.move_on_after(_PATIENCE, shield=True):
            await self._out.wait()
