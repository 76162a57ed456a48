"""Inodes: the rows of the catalogue, as objects in memory and as what others get to see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warabi._core.attributes import Attributes
from warabi.region import RegionID

if TYPE_CHECKING:
    from warabi._core.changes import Origin
    from warabi.target.kernel_backed import Exposed
    from warabi.target.leases import Share

OWN, PACKED, MOVED = 0, 1, 2
"""Where a region's bytes are in a target of files: in a file of its own, in one that it shares, or
in one of its own after they were in one that it shared, which keeps their place."""
_tuple = tuple.__new__  # a named tuple's own constructor takes twice as long


class Inode:
    """A row of the catalogue in memory, with the target's book-keeping beside it."""

    __slots__ = (
        "anonymous", "atime", "before", "changed", "ctime", "dead", "exclusive", "exposed",
        "generation", "gid", "ino", "kept", "mode", "mtime", "nlink", "packed", "pins", "rdev",
        "rid", "seen", "share", "size", "stored", "target", "uid", "users", "writer",
    )  # fmt: skip

    def __init__(
        self, ino: int, generation: int, mode: int, nlink: int, uid: int, gid: int, rdev: int,
        size: int, atime: int, mtime: int, ctime: int, anonymous: int, target: bytes | None,
        packed: int = OWN,
    ) -> None:  # fmt: skip
        self.ino = ino
        self.generation = generation
        self.mode = mode
        self.nlink = nlink
        self.uid = uid
        self.gid = gid
        self.rdev = rdev
        self.size = size
        self.atime = atime
        self.mtime = mtime
        self.ctime = ctime
        self.anonymous = anonymous
        self.target = target
        self.packed = packed
        self.rid = RegionID.from_parts(ino, generation)
        self.stored = False  # has a row, perhaps an old one
        self.changed = 0  # the change that a persist must have made durable
        self.kept = -1  # the change time that is durable, or is with the next sync of the bytes
        self.seen = ctime  # the change time when somebody was told last
        self.writer: Origin | None = None  # on whose behalf the bytes changed last, if it is known
        self.before = 0  # the change time when that one began; 0: they were its own from the start
        # The target's: who is inside, and whether the region is going or gone.
        self.users = 0
        self.exclusive = False
        self.pins = 0
        self.dead = False
        self.share: Share | None = None  # while other processes may reach its bytes directly
        self.exposed: Exposed | None = None  # while somebody has its descriptor, and says nothing

    def row(self) -> tuple[int | bytes | None, ...]:
        return (
            self.ino, self.generation, self.mode, self.nlink, self.uid, self.gid, self.rdev,
            self.size, self.atime, self.mtime, self.ctime, self.anonymous, self.target,
            self.packed,
        )  # fmt: skip

    def changed_at(self, now: int) -> None:
        """Set the change time, which never goes back."""
        self.ctime = now if now > self.ctime else self.ctime + 1

    def written_by(self, origin: Origin | None) -> None:
        """The bytes changed on behalf of *origin*; the change time is still the one before."""
        if origin is not self.writer:
            self.before, self.writer = self.ctime, origin

    def version(self, origin: Origin) -> int:
        """Of the bytes, as *origin* tells it: the same for as long as nobody else changes them,
        and another one afterwards; 0 while nobody else ever has.  Somebody has to be told the
        attributes just before, or a later change might have the same change time."""
        began = self.before if origin is self.writer else self.ctime
        return began ^ origin.salt if began else 0

    def attributes(self) -> Attributes:
        if self.share is not None:
            self.share.settle(self)
        if self.exposed is not None:
            self.exposed.settle()
        while True:
            seen = self.seen = self.ctime
            attributes = _tuple(Attributes, (
                self.ino, self.generation, self.mode, 1 if self.anonymous else self.nlink,
                self.uid, self.gid, self.rdev, self.size, self.atime, self.mtime, self.ctime,
            ))  # fmt: skip
            if self.ctime == seen:  # not every caller holds the lock
                return attributes
