"""Inodes: rows of the catalogue as objects in memory, and their attributes."""

from __future__ import annotations

import errno
from operator import attrgetter
from typing import TYPE_CHECKING

from warabi._core.attributes import APPEND_ONLY, IMMUTABLE, Attributes
from warabi.errors import path_error
from warabi.metadata.domain import Row
from warabi.region import RegionID

if TYPE_CHECKING:
    from collections.abc import Callable

    from warabi._core.changes import Origin
    from warabi.target.kernel_backed import Exposed
    from warabi.target.leases import Share

FIXED = IMMUTABLE | APPEND_ONLY
OWN, PACKED, MOVED = 0, 1, 2
"""Location of a region's data in a target of files: in its own file, in a pack, or in its own file
after it was in a pack, where its place stays reserved."""
_values = attrgetter(*Row._fields)
_tuple = tuple.__new__  # the constructor of a named tuple takes twice as long


def check_unfixed(inode: Inode, what: str, flags: int = FIXED) -> None:
    """PathError EPERM if the inode has one of *flags*, which do not permit the operation *what*."""
    if inode.flags & flags:
        kind = "immutable" if inode.flags & IMMUTABLE else "append-only"
        raise path_error(errno.EPERM, f"{what}: inode {inode.ino} is {kind}, see chattr(1)")


class Inode:
    """A row of the catalogue in memory, with state of the target."""

    __slots__ = (
        *Row._fields, "before", "changed", "dead", "exclusive", "exposed", "kept", "linkable",
        "measure", "pins", "rid", "seen", "share", "stored", "users", "writer",
    )  # fmt: skip

    def __init__(self, row: Row) -> None:
        (
            self.ino, self.generation, self.mode, self.nlink, self.uid, self.gid, self.rdev,
            self.size, self.atime, self.mtime, self.ctime, self.anonymous, self.target,
            self.btime, self.flags, self.packed,
        ) = row  # fmt: skip
        self.rid = RegionID.from_parts(self.ino, self.generation)
        self.measure: Callable[[Inode], int] | None = None  # None: it has no holes
        self.stored = False  # whether there is a row, perhaps an outdated one
        self.changed = 0  # number of the change that a persist must make durable
        self.kept = -1  # the change time that is durable, or will be with the next sync of the data
        self.seen = self.ctime  # the change time that was last reported to a client
        self.writer: Origin | None = None  # the connection that changed the data last, if known
        self.before = 0  # change time when its changes began; 0: it created the region
        # State of the target: current users of the region, and whether it is being erased.
        self.users = 0
        self.exclusive = False
        self.pins = 0
        self.linkable = False  # it has no name yet, and may get one
        self.dead = False
        self.share: Share | None = None  # while other processes have direct access
        self.exposed: Exposed | None = None  # while the kernel uses its file directly

    def row(self) -> tuple[int | bytes | None, ...]:
        values: tuple[int | bytes | None, ...] = _values(self)  # half the time of a Row
        return values

    def changed_at(self, now: int) -> None:
        """Set the change time, which never goes back."""
        self.ctime = now if now > self.ctime else self.ctime + 1

    def written_by(self, origin: Origin | None) -> None:
        """Record a write on behalf of *origin*; called before the change time is updated."""
        if origin is not self.writer:
            self.before, self.writer = self.ctime, origin

    def version(self, origin: Origin) -> int:
        """Return the version of the data for *origin*: it changes only when others change the data,
        and is 0 if no other ever has.  The caller must report the attributes just before, or a
        later change might get the same change time."""
        began = self.before if origin is self.writer else self.ctime
        return began ^ origin.salt if began else 0

    def attributes(self) -> Attributes:
        if self.share is not None:
            self.share.merge_writes(self)
        if self.exposed is not None:
            self.exposed.merge_writes()
        while True:
            seen = self.seen = self.ctime
            attributes = _tuple(Attributes, (
                self.ino, self.generation, self.mode, 1 if self.anonymous else self.nlink,
                self.uid, self.gid, self.rdev, self.size, self.atime, self.mtime, self.ctime,
                -1 if self.measure is None else self.measure(self), self.btime, self.flags,
            ))  # fmt: skip
            if self.ctime == seen:  # not every caller holds the lock
                return attributes
