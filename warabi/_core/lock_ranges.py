"""The byte ranges that one owner has locked, shared or exclusively, in one file.

Ranges are disjoint, in order, and as few as possible: what touches and is locked alike is one
range, as fcntl(2) says.  Ends are inclusive, so that ``END`` is a lock up to the end of any file.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

from warabi._core.buffers import checked_size
from warabi.errors import OutOfBounds
from warabi.region import RegionID

SHARED, EXCLUSIVE, UNLOCK = 0, 1, 2
"""Kinds of a request, numbered as ``F_RDLCK``, ``F_WRLCK`` and ``F_UNLCK`` of Linux."""
END = (1 << 63) - 1
"""The last byte of the largest file."""


class FileLock(NamedTuple):
    """A locked range.

    Attributes:
        exclusive: locked for writing; else shared, for reading.
        start: offset of its first byte.
        end: offset of its last byte, :data:`END` if it extends to the end of the file.
        pid: the process that locked it, as its client names it; 0 if it is another client's.
    """

    exclusive: bool
    start: int
    end: int
    pid: int


def _start(item: FileLock) -> int:
    return item.start


def _end(item: FileLock) -> int:
    return item.end


class LockRanges:
    """The ranges of one owner in one file."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[FileLock] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[FileLock]:
        return iter(self._items)

    def conflict(self, start: int, end: int, exclusive: bool) -> FileLock | None:
        """Return the first range that keeps another owner from locking *start* to *end*."""
        items = self._items
        for at in range(bisect_left(items, start, key=_end), len(items)):
            item = items[at]
            if item.start > end:
                return None
            if exclusive or item.exclusive:
                return item
        return None

    def covers(self, start: int, end: int, exclusive: bool) -> bool:
        """Whether all bytes from *start* to *end* are locked, and exclusively, or all not so."""
        at = bisect_left(self._items, start, key=_end)
        if at == len(self._items):
            return False
        item = self._items[at]
        return item.start <= start and end <= item.end and item.exclusive == exclusive

    def splits(self, start: int, end: int) -> bool:
        """Whether unlocking *start* to *end* makes two ranges of one."""
        at = bisect_left(self._items, start, key=_end)
        return at < len(self._items) and (
            self._items[at].start < start and end < self._items[at].end
        )

    def lock(self, start: int, end: int, exclusive: bool, pid: int) -> None:
        """Lock the bytes from *start* to *end*, however they were locked before."""
        self._replace(FileLock(exclusive, start, end, pid))

    def unlock(self, start: int, end: int) -> bool:
        """Unlock the bytes from *start* to *end*; whether some were locked."""
        return self._replace(FileLock(False, start, end, -1), keep=False)

    def _replace(self, new: FileLock, *, keep: bool = True) -> bool:
        items = self._items
        first = bisect_left(items, new.start, key=_end)
        last = bisect_right(items, new.end, key=_start)
        overlapping = items[first:last]
        before = after = None
        if overlapping:
            if overlapping[0].start < new.start:
                before = overlapping[0]._replace(end=new.start - 1)
            if overlapping[-1].end > new.end:
                after = overlapping[-1]._replace(start=new.end + 1)
        if keep:
            if before is None and first > 0 and items[first - 1].end + 1 == new.start:
                first -= 1
                before = items[first]
            if after is None and last < len(items) and items[last].start == new.end + 1:
                after = items[last]
                last += 1
            if before is not None and before.exclusive == new.exclusive:
                new, before = new._replace(start=before.start), None
            if after is not None and after.exclusive == new.exclusive:
                new, after = new._replace(end=after.end), None
        middle = new if keep else None
        items[first:last] = [item for item in (before, middle, after) if item is not None]
        return bool(overlapping)


lock_numbers = itertools.count(1)
"""Numbers of requests that wait, by which they may be cancelled."""


def lock_arguments(
    what: str, region: Any, flock: bool, owner: int, kind: int, start: int, size: int | None
) -> tuple[RegionID, bool, int, int, int, int]:
    """Return the first arguments of the operations ``lock`` and ``test_lock``; *what* names the
    caller.

    Raises:
        InvalidRegion: *region* is no region ID.
        OutOfBounds: no number, or no range of a file.
    """
    start = checked_size(start, f"{what}: start")
    end = END if size is None else start + checked_size(size, f"{what}: size") - 1
    if not start <= end <= END:
        raise OutOfBounds(f"{what}: {size} bytes at offset {start} are no range of a file")
    checked = region if type(region) is RegionID else RegionID(region)
    return checked, bool(flock), checked_size(owner, f"{what}: owner"), kind, start, end
