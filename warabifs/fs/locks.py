"""Locks of a mount's programs that the provider keeps, so that other mounts see them.

The kernel passes on each request for a lock, and the end of what may hold one: FLUSH when a process
closes a descriptor of a file, which ends its locks of fcntl(2) on it, and RELEASE when an open file
is closed for the last time, which ends what was locked by it otherwise.  Only what may have locks
is unlocked then, so closing other files costs no message.

A program that gets a lock relies on what the previous holder has written.  So before the kernel is
told of it, it drops its pages and attributes of the file, as NFS clients do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from warabi._core.lock_ranges import END, UNLOCK, FileLock
from warabi.aio import Target
from warabi.region import RegionID

_Owner = tuple[bool, int]
"""Whether locks of flock(2), and the kernel's number for the owner."""


class Locks:
    """The locks of a mount's programs.

    Args:
        target: the target.
        refresh: makes the kernel drop what it has cached of an inode's data and attributes.
    """

    def __init__(self, target: Target, refresh: Callable[[int], Awaitable[None]]) -> None:
        self._target = target
        self._refresh = refresh
        self._by_handle: dict[int, set[_Owner]] = {}  # open files by which was locked
        self._by_inode: dict[int, dict[int, set[int]]] = {}  # owners of ranges, and their handles

    async def lock(
        self, ino: int, region: RegionID, handle: int, flock: bool, owner: int, kind: int,
        start: int, end: int, pid: int, wait: int,
    ) -> None:  # fmt: skip
        """Lock or unlock, see ``FileLocks.request``; *wait* is a number for :meth:`cancel`, or 0.

        Raises:
            PathError: as there.
        """
        if kind != UNLOCK:
            self._note(ino, handle, flock, owner)
        await self._target.call("lock", region, flock, owner, kind, start, end, pid, wait)
        if kind != UNLOCK:
            await self._refresh(ino)
        elif flock or (start == 0 and end == END):
            self._forget(ino, handle, flock, owner)

    async def cancel(self, wait: int) -> None:
        """End a request that waits."""
        await self._target.call("cancel_lock", wait)

    async def test(
        self, region: RegionID, flock: bool, owner: int, kind: int, start: int, end: int
    ) -> FileLock | None:
        """Return a lock that conflicts."""
        found: FileLock | None = await self._target.call(
            "test_lock", region, flock, owner, kind, start, end
        )
        return found

    def has(self, ino: int, owner: int) -> bool:
        """Whether an owner may have locked ranges of a file."""
        return owner in self._by_inode.get(ino, ())

    def of(self, handle: int) -> bool:
        """Whether something may be locked by an open file."""
        return handle in self._by_handle

    async def flush(self, ino: int, region: RegionID, owner: int) -> None:
        """A process closes a descriptor of the file."""
        await self._unlock(region, False, owner)
        self._forget(ino, 0, False, owner)

    async def release(self, ino: int, region: RegionID, handle: int) -> None:
        """An open file was closed."""
        for flock, owner in list(self._by_handle.get(handle, ())):
            try:
                await self._unlock(region, flock, owner)
            finally:  # also if the provider is gone: the link unlocks what it may still have
                self._forget(ino, handle, flock, owner)

    async def _unlock(self, region: RegionID, flock: bool, owner: int) -> None:
        await self._target.call("lock", region, flock, owner, UNLOCK, 0, END, 0, 0)

    def _note(self, ino: int, handle: int, flock: bool, owner: int) -> None:
        self._by_handle.setdefault(handle, set()).add((flock, owner))
        if not flock:
            self._by_inode.setdefault(ino, {}).setdefault(owner, set()).add(handle)

    def _forget(self, ino: int, handle: int, flock: bool, owner: int) -> None:
        """Record that an owner has no locks any more."""
        if flock:
            self._drop(handle, (True, owner))
            return
        owners = self._by_inode.get(ino, {})
        for one in owners.pop(owner, ()):
            self._drop(one, (False, owner))
        if not owners:
            self._by_inode.pop(ino, None)

    def _drop(self, handle: int, owner: _Owner) -> None:
        owners = self._by_handle.get(handle, set())
        owners.discard(owner)
        if not owners:
            self._by_handle.pop(handle, None)
