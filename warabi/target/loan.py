"""Bytes of a region lent where they are, for system calls that move them.

Calls ``RegionLocks`` and the storage.  Called by ``Target`` for its callers.
"""

from __future__ import annotations

from warabi.errors import Exception, WouldBlock
from warabi.metadata.inode import FIXED, Inode
from warabi.region import RegionID
from warabi.target.region_locks import RegionLocks
from warabi.target.state import TargetState


class RegionLoan:
    """Data of a region in place, for a block that passes them to system calls.

    The region is not resized or freed before the end of the block, which must not wait.

    Attributes:
        place: the data; None, without a reason, if that is not possible now, or at all: use the
            normal calls then.  Use system calls only: a load or store could kill the process if
            a guest had truncated the region's memory, while a system call fails.
    """

    __slots__ = ("_inode", "_locks", "_state", "_wanted", "place")

    def __init__(
        self, state: TargetState, locks: RegionLocks, region: RegionID, offset: int, size: int,
        *, writable: bool,
    ) -> None:  # fmt: skip
        self._state = state
        self._locks = locks
        self._wanted = (region, offset, size, writable)
        self._inode: Inode | None = None
        self.place: memoryview | None = None

    def __enter__(self) -> RegionLoan:
        region, offset, size, writable = self._wanted
        if self._state.occupied:
            return self
        try:
            self._inode = self._locks.enter(region, "lend", False)
        except (Exception, WouldBlock):
            return self
        try:
            if writable and self._inode.flags & FIXED:
                return self
            if offset >= 0 and offset + size <= self._inode.size:
                self.place = self._state.storage.view(region, offset, size, writable=writable)
        except BaseException:
            self._locks.leave(self._inode)
            raise
        return self

    def load(self, offset: int, out: memoryview) -> None:
        """Fill *out* from *offset* of the region, within the lent range."""
        self._state.storage.read_into(self._wanted[0], offset, out)

    def store(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset* of the region, within the lent range."""
        self._state.storage.write(self._wanted[0], offset, data)

    def __exit__(self, *_: object) -> None:
        wrote = self._wanted[3] and self.place is not None
        self.place = None
        if self._inode is not None:
            self._locks.leave(self._inode, wrote=wrote)
