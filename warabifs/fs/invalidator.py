"""Invalidation of the kernel's caches for changes by other clients.

* An invalidation blocks while the kernel reads or writes the affected pages, or works in the
  directory.  The process's event loop serves those requests, so a separate thread calls the
  kernel, and no request of the kernel ever waits for that thread.
* The provider collects changes while the thread is busy, up to its limits.
* No request is served while the session is being closed, so the thread must have left the kernel
  by then: see :meth:`Follower.stop`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncGenerator, Callable

import trio

from warabi import errors
from warabi._core.changes import Changes
from warabi._core.tuning import FOLLOW_PATIENCE, FOLLOW_PAUSE
from warabi.aio import Target
from warabifs.fs.filesystem import FileSystem
from warabifs.fs.handles import Outdated

log = logging.getLogger(__name__)

_EVERYTHING = Changes(0, True, {}, {})
_OVER = (errno.ENOTCONN, errno.ENODEV, errno.EBADF, errno.EINVAL)


class Follower:
    """Makes a kernel drop what other clients change in a target.

    Args:
        target: the target.
        files: the mount's file system.
        forget_inode: makes the kernel drop the attributes of an inode, and its pages unless the
            second argument is true.
        forget_name: makes the kernel drop the dentry of a name in a directory.
        new_names: whether the kernel caches that names do not exist.
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
        self._out = trio.Event()  # set while the thread is not in the kernel
        self._out.set()
        self._stopping = False

    async def run(self) -> None:
        """Run until cancelled, or until the provider turns out not to support notifications."""
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
                        # Abandoned when the mount ends: it may wait for requests that are not
                        # served then.
                        await trio.to_thread.run_sync(
                            self._tell, outdated, self._out, token, abandon_on_cancel=True
                        )
        except errors.ProtocolError as error:
            log.warning(
                "no change notifications; other clients' changes appear when timeouts expire: %s",
                error,
            )

    async def _changes(self) -> AsyncGenerator[Changes, None]:
        """Yield changes by other clients; ends only if the provider does not support it.

        When the notifications are interrupted, everything may have changed.
        """
        notified = True
        while True:
            try:
                async with contextlib.aclosing(
                    self._target.changes(new_names=self._new_names)
                ) as found:
                    async for changes in found:
                        notified = True
                        yield changes
            except errors.ProtocolError:
                raise
            except errors.Exception as error:
                if notified:
                    log.info("change notifications are not available: %s", error)
            if notified:
                notified = False
                yield _EVERYTHING
            await trio.sleep(FOLLOW_PAUSE)

    async def _changed(self, names: dict[tuple[int, bytes], int]) -> dict[tuple[int, bytes], int]:
        """Return those of *names* that refer to another inode by now, or are not directories.

        Dropping the dentry of an unchanged directory would make it look removed to programs whose
        working directory is in it.
        """
        changed = {}
        for (parent, name), ino in names.items():
            try:
                if ino and self._files.is_directory(ino):
                    found = await self._target.call("lookup", parent, name)
                    if found.ino == ino:
                        continue
            except errors.Exception:
                pass  # it was removed, or the provider cannot be asked
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
                log.error("invalidating kernel caches failed: %s", error)
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(out.set)

    def _one(self, forget: Callable[..., None], *arguments: object) -> None:
        if not self._stopping:
            with contextlib.suppress(FileNotFoundError):  # the kernel has no such entry
                forget(*arguments)

    async def stop(self) -> None:
        """Stop calling the kernel; returns when the thread has left it, or after a time."""
        self._stopping = True
        with trio.move_on_after(FOLLOW_PATIENCE, shield=True):
            await self._out.wait()
