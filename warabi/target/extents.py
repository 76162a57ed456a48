"""Operations of a target that allocate, zero, free, find and copy extents of regions.

Each change here excludes all other calls from the region, as a change of its size does.  A change
of bytes first revokes the region's grants: a guest in the middle of an access notices that, and
repeats it by a request to the provider, which waits for the change.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from warabi._core.attributes import IMMUTABLE
from warabi._core.buffers import checked_size
from warabi.errors import OutOfBounds, path_error
from warabi.metadata.inode import FIXED, Inode, check_unfixed
from warabi.region import RegionID
from warabi.target.state import LONG, not_in_a_loop
from warabi.target.target import Target

_MOST_COPIED = 256 * 1024 * 1024
"""Bytes that are copied while other calls wait for the region."""


def allocate(
    target: Target, region: RegionID, offset: int, size: int, keep_size: bool = False
) -> None:
    """Allocate the space of *size* bytes at *offset*, so that writes there cannot fail for lack of
    it.

    The region grows if the extent ends beyond it.  With *keep_size* its size stays the same, and
    the space is kept for later growth.

    Raises:
        InvalidRegion, OutOfBounds: the arguments.
        StorageFull: there is not enough space, or the quota is exceeded; the size is unchanged.
        PathError: EOPNOTSUPP, the file system of the target cannot allocate in advance, or the
            target has a quota, which counts no space beyond the end, where it would be.
    """
    end = _end(offset, size, "allocate")
    with _closed(target, region, "allocate", size) as change:
        if not size:
            return
        if end > change.size:
            if keep_size and target.sizes.capacity is not None:
                raise path_error(
                    errno.EOPNOTSUPP,
                    "allocate: space beyond the end of a region does not count for the quota, so"
                    " none is allocated there",
                )
            change.allocate_beyond(offset, end, keep_size)
        if offset < change.size:
            change.make_room(offset, min(end, change.size))
            change.began = True
            target.state.storage.allocate(region, offset, min(end, change.size) - offset)


def zero_range(
    target: Target, region: RegionID, offset: int, size: int, keep_size: bool = False
) -> None:
    """Zero *size* bytes at *offset*, and allocate their space as :func:`allocate` does; but in a
    target with a quota none beyond a size that is kept."""
    end = _end(offset, size, "zero_range")
    with _closed(target, region, "zero_range", size) as change:
        if not size:
            return
        if end > change.size and not (keep_size and target.sizes.capacity is not None):
            change.allocate_beyond(offset, end, keep_size)
        change.make_room(offset, min(end, change.size))
        change.zero(offset, min(end, change.size), free=False)


def punch_hole(target: Target, region: RegionID, offset: int, size: int) -> None:
    """Zero *size* bytes at *offset*, and free their space where possible; the part of the extent
    beyond the region's end is ignored.

    Raises:
        InvalidRegion, OutOfBounds: the arguments.
        StorageError: the storage failed.
    """
    end = _end(offset, size, "punch_hole")
    with _closed(target, region, "punch_hole", size) as change:
        change.zero(offset, min(end, change.size), free=True)


def seek(target: Target, region: RegionID, offset: int, hole: bool) -> int | None:
    """The first offset from *offset* on at which there is data, or with *hole* a hole; the end of
    the region counts as one.  None if there is none, or *offset* is not before the end.

    Raises:
        InvalidRegion, OutOfBounds: the arguments.
        StorageError, CorruptTarget: the storage failed or is damaged.
    """
    offset = checked_size(offset, "seek: offset")
    with target.locks.entered(region, "seek") as inode:
        end = inode.size
        if offset >= end:
            return None
        if end - offset > LONG and not target.blocking:  # every page is looked at
            not_in_a_loop()
        found = target.state.storage.seek(region, offset, end, hole=hole)
        return found if hole or found < end else None


def copy_range(
    target: Target, region: RegionID, offset: int, source: RegionID, source_offset: int, size: int
) -> int:
    """Copy *size* bytes at *source_offset* of the region *source* to *offset* of *region*, which
    grows if they end beyond it; returns how many bytes were copied.

    They are fewer if *source* ends before, or if it were so many that other calls would have to
    wait for long.  Holes are preserved; blocks are shared if the file system supports it.

    Raises:
        InvalidRegion, OutOfBounds: the arguments; among them extents of one region that overlap.
        StorageFull, StorageError, CorruptTarget: the storage; the bytes at *offset* are undefined
            then, the size is unchanged.
    """
    source_offset = checked_size(source_offset, "copy_range: source offset")
    end = _end(offset, size, "copy_range")
    if region == source and offset < source_offset + size and source_offset < end:
        raise OutOfBounds(f"copy_range: the extents of {region!r} overlap")
    with _copying(target, region, source) as (change, original):
        size = min(size, _MOST_COPIED, max(0, original.size - source_offset))
        if size:
            change.copy(original, source_offset, offset, size)
        return size


def clone(target: Target, region: RegionID, persist: bool = False) -> RegionID:
    """A new region without a name that has the bytes that *region* has at one instant.

    Writers of *region* wait until it is copied, which takes no time if the file system can share
    blocks, and with *persist* until the copy is durable.  Holes are preserved.

    Raises:
        InvalidRegion: unknown or erased.
        StorageFull, StorageError, CorruptTarget: the storage or the quota; there is no copy then.
    """
    source = target.locks.enter_exclusive(region, "clone", True)
    try:
        target.sharing.drain(source)
        holes = target.state.catalogue.holes.get(region, 0)
        with target.filling(source.size, source.size - holes) as copy:
            target.state.storage.copy_range(region, 0, copy.rid, 0, source.size)
            if persist:
                target.committer.persist(copy, 0, copy.size)
        return copy.rid
    finally:
        target.locks.leave_exclusive(source)


def _end(offset: int, size: int, what: str) -> int:
    offset = checked_size(offset, f"{what}: offset")
    return checked_size(offset + checked_size(size, f"{what}: size"), f"{what}: the end")


@dataclass(slots=True)
class _Change:
    """A change of a region from which other calls are excluded.

    Attributes:
        began: something may have changed.
    """

    target: Target
    inode: Inode
    what: str
    began: bool = False

    @property
    def size(self) -> int:
        return self.inode.size

    def make_room(self, offset: int, end: int) -> None:
        self.target.sizes.make_room(self.inode, offset, end, self.what)

    def allocate_beyond(self, offset: int, end: int, keep_size: bool) -> None:
        """Allocate the bytes from *offset* to *end* that are beyond the region's end, and then move
        that to *end* unless *keep_size*."""
        target, inode, first = self.target, self.inode, max(offset, self.inode.size)
        if not keep_size:
            self.make_room(first, end)
            target.state.storage.check(inode.rid, inode.size)
        self._move_if_needed(end)
        target.state.storage.allocate(inode.rid, first, end - first)
        self.began = True
        if not keep_size:
            target.sizes.resize(inode, end)
            target.sizes.set(inode, end)

    def _move_if_needed(self, end: int) -> None:
        """Move the bytes to a place where the region can grow to *end* bytes."""
        inode, storage = self.inode, self.target.state.storage
        if not storage.moves(inode.rid, end):
            return
        self.revoke_grants()
        free = storage.replace(inode.rid, inode.size)
        if storage.moves(inode.rid, end):  # no other process knows this place
            storage.resize(inode.rid, end)
            storage.resize(inode.rid, inode.size)
        self.target.sizes.free_later(inode, free)

    def revoke_grants(self) -> None:
        with self.target.state.lock:
            self.target.sharing.revoke(self.inode)

    def zero(self, start: int, end: int, *, free: bool) -> None:
        """Zero the bytes from *start* to *end*, which is not beyond the region's end."""
        if start < end:
            self.revoke_grants()
            self.began = True
            self.target.state.storage.zero(self.inode.rid, start, end - start, free=free)

    def copy(self, source: Inode, source_offset: int, offset: int, size: int) -> None:
        """Copy *size* bytes of *source*, which the caller has entered, to *offset*."""
        inode, sizes, end = self.inode, self.target.sizes, offset + size

        def fill() -> None:
            self.revoke_grants()
            self.began = True
            if end > inode.size:
                sizes.resize(inode, end)
            self.target.state.storage.copy_range(source.rid, source_offset, inode.rid, offset, size)

        data = None
        if sizes.capacity is not None and source.measure is not None:
            holes = sizes.holes(source.rid, source_offset, source_offset + size)
            data = size - sum(hole for _, hole in holes)
        sizes.make_room(inode, offset, end, self.what, None if data == size else data)
        if end > inode.size:
            sizes.grow(inode, end, fill)
        else:
            fill()


@contextmanager
def _copying(target: Target, region: RegionID, source: RegionID) -> Iterator[tuple[_Change, Inode]]:
    """Enter *source*, and exclude other calls from *region*, while the block copies.

    In the order of their IDs, so that no two copies wait for each other.
    """
    if region == source:
        with _closed(target, region, "copy_range", 0) as change:
            yield change, change.inode
    elif source < region:
        with (
            target.locks.entered(source, "copy_range") as original,
            _closed(target, region, "copy_range", 0) as change,
        ):
            yield change, original
    else:
        with (
            _closed(target, region, "copy_range", 0) as change,
            target.locks.entered(source, "copy_range") as original,
        ):
            yield change, original


@contextmanager
def _closed(target: Target, region: RegionID, what: str, size: int) -> Iterator[_Change]:
    """Exclude other calls from the region while the block changes *size* bytes of it."""
    inode = target.locks.enter_exclusive(region, what, True)
    change = _Change(target, inode, what)
    try:
        check_unfixed(inode, what, IMMUTABLE if what == "allocate" else FIXED)
        if size > LONG:
            not_in_a_loop()
        yield change
    finally:
        if change.began:
            target.state.catalogue.may_have_holes(inode)
            target.sizes.account(inode)
        target.locks.leave_exclusive(inode, wrote=change.began)
