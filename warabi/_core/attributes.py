"""Attributes of an inode, as ``stat`` reports them."""

from __future__ import annotations

import stat
from typing import NamedTuple

from warabi.region import RegionID

ROOT = 1
"""The inode number of the root directory, also in FUSE."""
LOCATION_XATTR = b"user.warabi.location"
"""The attribute of every file on a mount that says what is mounted, see :mod:`warabi.mounted`."""
REGION_XATTR = b"user.warabi.region"
TARGET_XATTR = b"user.warabi.target"
VIRTUAL_XATTRS = (REGION_XATTR, TARGET_XATTR, LOCATION_XATTR)
"""Attributes that are not stored, and not listed."""
FIRST_REPORT = 1 << 62
"""The lowest inode number of what a mount adds to a target; a target's own are lower."""


LINKS = 40
"""Most symbolic links that are followed in one path, as in Linux."""


FETCHED = 64 * 1024
"""Most bytes of a file that are sent together with its attributes."""


IMMUTABLE, APPEND_ONLY, NO_DUMP = 0x10, 0x20, 0x40
"""Flags of inodes, with the values of ``FS_IMMUTABLE_FL``, ``FS_APPEND_FL`` and ``FS_NODUMP_FL``.
Nothing can change an immutable inode, and data can only be appended to one that is append-only;
backup programs may leave out the last kind."""


class Attributes(NamedTuple):
    """The attributes of a region or another inode; times in ns since the epoch."""

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    space: int = -1  # bytes of storage that a region uses; -1: as many as its size
    btime_ns: int = 0  # when it was made; 0: not known, it is of a target of an old version
    flags: int = 0  # of chattr(1): the sum of ``IMMUTABLE``, ``APPEND_ONLY`` and ``NO_DUMP``

    @property
    def blocks(self) -> int:
        """The blocks of 512 bytes that a regular file uses; 0 of other inodes."""
        if not stat.S_ISREG(self.mode):
            return 0
        return -(-(self.size if self.space < 0 else self.space) // 512)

    @property
    def region(self) -> RegionID:
        """The ID of the region; meaningful only if the inode is a regular file."""
        return RegionID.from_parts(self.ino, self.generation)


class DirectoryEntry(NamedTuple):
    """A name in a directory, and the attributes of what has it."""

    name: str
    attributes: Attributes

    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attributes.mode)

    def is_file(self) -> bool:
        """Whether it is a region."""
        return stat.S_ISREG(self.attributes.mode)

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link, which is not followed."""
        return stat.S_ISLNK(self.attributes.mode)


def without_setid(mode: int) -> int:
    """Return *mode* without set-ID bits; set-group-ID is kept without group execute permission."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode
