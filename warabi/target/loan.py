"""Bytes of a region lent where they are, for system calls that move them.

Calls ``RegionLocks`` and the storage.  Called by ``Target`` for its callers.
"""

from __future__ import annotations

from warabi.errors import Exception, WouldBlock
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.target.region_locks import RegionLocks
from warabi.target.state import TargetState


class RegionLoan:
    """Bytes of a region where they are, for a block that hands them to system calls.

    The region is not resized, and its bytes are not freed, before the end of the block, which must
    not wait.

    Attributes:
        place: the bytes; None, without a reason, where that cannot be, now or at all: reading or
            writing the usual way tells why.  A load or store here would be killed if a process
            that was granted the region had cut off its memory; a system call fails.
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
            if offset >= 0 and offset + size <= self._inode.size:
                self.place = self._state.storage.view(region, offset, size, writable=writable)
        except BaseException:
            self._locks.leave(self._inode)
            raise
        return self

    def load(self, offset: int, out: memoryview) -> None:
        """Fill *out* from *offset* of the region, within what was lent."""
        self._state.storage.read_into(self._wanted[0], offset, out)

    def store(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset* of the region, within what was lent."""
        self._state.storage.write(self._wanted[0], offset, data)

    def __exit__(self, *_: object) -> None:
        wrote = self._wanted[3] and self.place is not None
        self.place = None
        if self._inode is not None:
            self._locks.leave(self._inode, wrote=wrote)
