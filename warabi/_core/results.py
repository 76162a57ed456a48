"""What operations answer, as both sides of the wire know it."""

from __future__ import annotations

from typing import NamedTuple

from warabi._core.attributes import Attributes


class RegionStat(NamedTuple):
    """What ``stat`` tells of a region: bytes, times in ns since the epoch, and paths."""

    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    names: list[str]


class OpenedInode(NamedTuple):
    """What an inode is like that was pinned, and the version of its bytes: the same number the next
    time if nobody has changed them but who asks, over the same connection; 0 if nobody else ever
    has."""

    attributes: Attributes
    version: int


class Verified(NamedTuple):
    """What is known of some blocks of a region: how many are as they were persisted, how many
    have no sum to compare with or were written since, and the numbers of those that differ."""

    verified: int
    unverified: int
    rotten: list[int]
