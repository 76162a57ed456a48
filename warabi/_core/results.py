"""Result types of operations, for both sides of the wire."""

from __future__ import annotations

from typing import NamedTuple

from warabi._core.attributes import Attributes


class RegionStat(NamedTuple):
    """Size in bytes, times in ns since the epoch, and paths of a region."""

    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    names: list[str]


class OpenedInode(NamedTuple):
    """Attributes of an inode that was pinned, and the version of its data.  The version stays the
    same as long as only the requesting connection changes them; it is 0 if no other connection ever
    has."""

    attributes: Attributes
    version: int


class Verified(NamedTuple):
    """Result of verifying blocks of a region: number of blocks that match their checksums, number
    without a checksum or written since, and the numbers of blocks that do not match."""

    verified: int
    unverified: int
    rotten: list[int]
