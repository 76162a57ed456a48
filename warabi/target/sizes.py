"""Growing and shrinking regions: the quota, with other processes' direct access revoked.

Calls ``Sharing``, the catalogue and the storage.  Called by ``Creation`` and ``Target``, by callers
that have closed the region to others.
"""

from __future__ import annotations

from collections.abc import Callable

from warabi.errors import StorageFull
from warabi.metadata.inode import Inode
from warabi.target.sharing import Sharing
from warabi.target.state import TargetState


class Sizes:
    """Sizes of the regions of one target.

    Args:
        state: the target's.
        sharing: what guests know of sizes.
        capacity: quota on the sum of region sizes, in bytes; None for none.
    """

    def __init__(self, state: TargetState, sharing: Sharing, capacity: int | None) -> None:
        self._state = state
        self._sharing = sharing
        self.capacity = capacity

    def reserve(self, extra: int, what: str) -> None:
        """Check the quota; the lock is held."""
        used = self._state.catalogue.used
        if self.capacity is not None and used + extra > self.capacity:
            raise StorageFull(
                f"{what}: {extra} more bytes do not fit, {used} of {self.capacity} bytes are used"
            )

    def set(self, inode: Inode, size: int) -> None:
        """Have it known that the region has *size* bytes."""
        with self._state.lock:
            if not inode.dead:
                self._state.catalogue.resize(inode, size)
                self._sharing.resized(inode)

    def resize(self, inode: Inode, size: int) -> None:
        """Have the storage resize the region's bytes."""
        storage, rid, drained = self._state.storage, inode.rid, True
        if size > inode.size:
            self._state.catalogue.may_have_holes(inode)
        if size < inode.size or storage.moves(rid, size):
            with self._state.lock:
                drained = self._sharing.revoke(inode)
        if drained:
            storage.resize(rid, size)
        else:  # a guest may still write where the bytes are now
            self.free_later(inode, storage.replace(rid, size))

    def free_later(self, inode: Inode, free: Callable[[], None]) -> None:
        """Have *free* free the place where the bytes were, when no guest touches it any more."""
        with self._state.lock:
            if inode.share is not None and self._sharing.later(inode.share, free):
                return
        free()

    def grow_and_fill(self, inode: Inode, what: str, offset: int, view: memoryview) -> None:
        """Store *view*, which ends beyond the region's end."""
        storage, region, end = self._state.storage, inode.rid, offset + len(view)

        def fill() -> None:
            if offset > inode.size:
                self._state.catalogue.may_have_holes(inode)
            if storage.moves(region, end) and inode.share is not None:
                self.resize(inode, end)
                storage.write(region, offset, view)
            else:
                storage.write_beyond(region, offset, view)

        self.grow(inode, what, end, fill)

    def grow(self, inode: Inode, what: str, end: int, fill: Callable[[], None]) -> None:
        """Make the region end at *end*, which is beyond its end; *fill* makes the storage do so."""
        with self._state.lock:
            self.reserve(end - inode.size, what)
        self._state.storage.check(inode.rid, inode.size)
        try:
            fill()
        except BaseException:
            # It may have grown without being filled: remove everything beyond the old end.
            self._state.storage.resize(inode.rid, inode.size)
            raise
        self.set(inode, end)
