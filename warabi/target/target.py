"""A target: catalogue and storage as one, with every check in one place.

Locks, and who may be where: ``region_locks.py``.  What is on the medium when: ``commit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from types import MappingProxyType
from typing import Any

from warabi._core.buffers import MAX_SIZE, checked_size, filled_bytes, readable, writable
from warabi._core.extents import Extent, check_total, checked_extents, views
from warabi._core.results import RegionStat
from warabi.backends import Storage
from warabi.backends.base import Flush
from warabi.errors import Lengthy, OutOfBounds, WouldBlock
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.metadata.namespace import Namespace
from warabi.region import RegionID
from warabi.target.creation import MadeRegions
from warabi.target.region_locks import LONG
from warabi.target.write_throttle import Pace

_MANY = 1024
"""Extents that take long to go through."""


class Target(MadeRegions):
    """Regions and their names on one catalogue and one storage.

    Thread-safe.  A call with ``wait=False`` raises :class:`warabi.errors.WouldBlock` where it
    would have to wait for another call or for the medium, and has then done nothing.

    Args:
        catalogue: which regions exist.
        storage: where their bytes are.
        capacity: quota on the sum of region sizes, in bytes; None for none.
        threads: how many calls of Trio programs may wait for the medium at once; None for Trio's
            own limit.
        instead: settings that the storage has instead of those that were asked for.
        on_closing: called when the target begins to close, or is about to.
        on_close: called once after the target was closed.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        storage: Storage,
        *,
        capacity: int | None = None,
        threads: int | None = None,
        instead: Mapping[str, Any] = MappingProxyType({}),
        on_closing: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        largest = storage.room()[0]
        super().__init__(catalogue, storage, on_closing, on_close)
        self._capacity = capacity
        self._largest = largest
        self.blocking = storage.blocking
        self.threads = threads
        self.instead = instead
        self._pace = Pace()
        self.namespace = Namespace(catalogue, self._guard, self)

    @property
    def write_waits(self) -> bool:
        """Whether a write waits for the medium, and not only a persist, or is likely to."""
        return self._storage.write_waits or self._pace.slow(perf_counter_ns())

    @property
    def shares_writes(self) -> bool:
        """Whether processes of the host may write to regions by themselves."""
        return self._storage.shares_writes

    @property
    def uuid(self) -> str:
        """The target's own identity, for as long as it exists."""
        return self._catalogue.uuid

    @property
    def epoch(self) -> str:
        """Changes when volatile changes may have been lost: the target was not closed in order."""
        return self._catalogue.epoch

    @property
    def used(self) -> int:
        """The sum of the sizes of all regions, in bytes, or 2**63 - 1 if it is more."""
        return min(int(self._catalogue.used), MAX_SIZE)

    def _bounds(self, inode: Inode, what: str, offset: int, size: int) -> None:
        if offset + size > inode.size:
            raise OutOfBounds(
                f"{what} {inode.rid!r}: {size} bytes at offset {offset} end beyond its"
                f" {inode.size} bytes"
            )

    # Regions

    def write(
        self, region: RegionID, offset: int, data: Any, persist: bool = False,
        *, extend: bool = False, wait: bool = True,
    ) -> None:  # fmt: skip
        """Store *data*, any contiguous buffer, at *offset* bytes.

        With *extend* a write beyond the end grows the region; a gap reads as zero.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: the arguments, before anything is written.
            StorageFull, StorageError: the medium; the extent's content is then undefined.
        """
        if not wait and self.write_waits:
            raise WouldBlock
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        inode = self._enter(region, "write", wait)
        began, wrote = perf_counter_ns(), False
        try:
            growing = extend and offset + len(view) > inode.size
            if not growing:
                self._bounds(inode, "write", offset, len(view))
                if view:
                    self._storage.write(region, offset, view)
                    wrote = True
        finally:
            self._leave(inode, wrote=wrote)
        if growing:
            self._write_growing(region, offset, view, wait)
        if not wait:
            self._pace.wrote(len(view), began, perf_counter_ns())
        if persist:
            self.persist(region, offset, len(view))

    def append(
        self, region: RegionID, data: Any, persist: bool = False, *, wait: bool = True
    ) -> int:
        """Store *data* at the end of the region, which grows; returns the offset of its first byte.

        The end is determined, and moved, while no other call is inside the region, so that appends
        never overlap each other or writes that make the region grow.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: the arguments, before anything is written.
            StorageFull, StorageError: the medium; nothing was appended, unless only the persist
                failed.
        """
        if not wait and self.write_waits:
            raise WouldBlock
        view = readable(data, "append: data")
        began = perf_counter_ns()
        if not view:
            return self.size(region)
        offset = self._write_growing(region, None, view, wait)
        if not wait:
            self._pace.wrote(len(view), began, perf_counter_ns())
        if persist:
            self.persist(region, offset, len(view))
        return offset

    def _write_growing(
        self, region: RegionID, offset: int | None, view: memoryview, wait: bool
    ) -> int:
        """Store *view* at *offset*, or at the region's end; returns where."""
        what = "append" if offset is None else "write"
        inode = self._enter_exclusive(region, what, wait)
        wrote = False
        try:
            if offset is None:
                offset = inode.size
            end = checked_size(offset + len(view), f"{what}: the end")
            if end > inode.size:
                self._grow_and_fill(inode, what, offset, view)
            else:  # another call made it grow meanwhile
                self._storage.write(region, offset, view)
            wrote = True
        finally:
            self._leave_exclusive(inode, wrote=wrote)
        return offset

    def _grow_and_fill(self, inode: Inode, what: str, offset: int, view: memoryview) -> None:
        """Store *view*, which ends beyond the end of a region that this call has closed."""
        region, end = inode.rid, offset + len(view)
        with self._lock:
            self._reserve(end - inode.size, what)
        self._storage.check(region, inode.size)
        try:
            if self._storage.moves(region, end) and inode.share is not None:
                self._resize_storage(inode, end)
                self._storage.write(region, offset, view)
            else:
                self._storage.write_beyond(region, offset, view)
        except BaseException:
            # It may have grown and not been filled: what is beyond the old end goes.
            self._storage.resize(region, inode.size)
            raise
        self._set_size(inode, end)

    def _set_size(self, inode: Inode, size: int) -> None:
        with self._lock:
            if not inode.dead:
                self._catalogue.resize(inode, size)
                if self._grants is not None:
                    self._grants.resized(inode)

    def _resize_storage(self, inode: Inode, size: int) -> None:
        """Resize the bytes of a region that this call has closed to others."""
        rid, quiet = inode.rid, True
        if size < inode.size or self._storage.moves(rid, size):
            with self._lock:
                if inode.share is not None and self._grants is not None:
                    quiet = self._grants.revoke(inode)
        if quiet:
            self._storage.resize(rid, size)
            return
        # A guest may still write where the bytes are now.
        free = self._storage.replace(rid, size)
        with self._lock:
            if inode.share is not None and self._grants is not None:
                self._grants.later(inode.share.index, free)
                return
        free()

    def read_into(
        self, region: RegionID, offset: int, buffer: Any, *, short: bool = False, wait: bool = True
    ) -> int:
        """Fill *buffer*, any writable contiguous buffer, from *offset* bytes.

        With *short* the region may end before the buffer does.  Returns how many bytes were read.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: the arguments, before anything is read.
            StorageError, CorruptTarget: the medium.
        """
        view = writable(buffer, "read: buffer")
        offset = checked_size(offset, "read: offset")
        inode = self._enter(region, "read", wait)
        try:
            if short:
                view = view[: max(0, inode.size - offset)]
            else:
                self._bounds(inode, "read", offset, len(view))
            if view:
                if wait:
                    self._storage.read_into(region, offset, view)
                else:
                    self._storage.read_into_nowait(region, offset, view)
            return len(view)
        finally:
            self._leave(inode)

    def view(self, region: RegionID, offset: int, size: int) -> memoryview | None:
        """Up to *size* bytes at *offset* where they are, fewer at the region's end; None where the
        storage has them in no memory, or some of them were never written.

        What touches them after the region was shrunk or erased is killed: only for who holds the
        whole target, and hands them to a system call at once, which fails then.

        Raises:
            InvalidRegion, OutOfBounds: the arguments.
        """
        offset = checked_size(offset, "view: offset")
        with self._lock:
            inode = self._find(region, "view")
            size = min(checked_size(size, "view: size"), inode.size - offset)
            return self._storage.view(region, offset, size) if size > 0 else None

    def read(self, region: RegionID, offset: int, size: int) -> bytes:
        """Exactly *size* bytes from *offset*; raises as :meth:`read_into`."""
        offset = checked_size(offset, "read: offset")
        size = checked_size(size, "read: size")
        with self._lock:  # refuse before the memory for an absurd size is asked for
            self._bounds(self._find(region, "read"), "read", offset, size)

        def fill(view: memoryview) -> None:
            self.read_into(region, offset, view)

        return filled_bytes(size, fill)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        """Return when the extent and all that is needed to find it again are on the medium.

        Raises:
            InvalidRegion, OutOfBounds: the arguments.
            StorageError: the medium refused now, or an earlier persist met a failure that the
                kernel does not report twice.
        """
        offset = checked_size(offset, "persist: offset")
        size = checked_size(size, "persist: size")
        inode = self._enter(region, "persist", True)
        try:
            self._bounds(inode, "persist", offset, size)
            self._persist_inside(inode, offset, size)
        finally:
            self._leave(inode)

    @contextmanager
    def persisting(
        self, region: RegionID, offset: int, size: int, *, times: bool = False
    ) -> Iterator[Flush]:
        """As :meth:`persist`, and with *times* as :meth:`fsync`, where that is one flush of a file,
        which is to be waited for within the block; raises ``WouldBlock`` where it is more."""
        offset = checked_size(offset, "persist: offset")
        size = checked_size(size, "persist: size")
        inode = self._enter(region, "persist", False)
        try:
            self._bounds(inode, "persist", offset, size)
            with self._flushing_inside(inode, times=times) as flush:
                yield flush
        finally:
            self._leave(inode)

    def fsync(self, region: RegionID, times: bool = True) -> None:
        """Persist the whole region; with *times* its timestamps too, as fsync(2) promises and
        fdatasync(2) does not.  Raises as :meth:`persist`."""
        inode = self._enter(region, "fsync", True)
        try:
            self._persist_inside(inode, 0, inode.size, times=times)
        finally:
            self._leave(inode)

    def write_vector(
        self, region: RegionID, extents: Sequence[Extent], data: Any, persist: bool = False
    ) -> None:
        """Store *data* in several extents, one piece of it after the other.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: the arguments, before anything is written.
            StorageFull, StorageError: the medium; the extents' content is then undefined.
        """
        view = readable(data, "write_vector: data")
        checked = checked_extents(extents, "write_vector")
        check_total(checked, len(view), "write_vector")
        if len(checked) > _MANY:
            self._not_in_a_loop()
        inode = self._enter(region, "write_vector", True)
        wrote = False
        try:
            self._check_all(inode, "write_vector", checked)
            for offset, piece in views(checked, view):
                wrote = True
                self._storage.write(region, offset, piece)
            if persist:
                self._persist_all_inside(inode, checked)
        finally:
            self._leave(inode, wrote=wrote)

    def read_vector(self, region: RegionID, extents: Sequence[Extent], buffer: Any) -> None:
        """Fill *buffer* from several extents, one after the other.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: the arguments, before anything is read.
            StorageError, CorruptTarget: the medium.
        """
        view = writable(buffer, "read_vector: buffer")
        checked = checked_extents(extents, "read_vector")
        check_total(checked, len(view), "read_vector")
        if len(checked) > _MANY:
            self._not_in_a_loop()
        inode = self._enter(region, "read_vector", True)
        try:
            self._check_all(inode, "read_vector", checked)
            for offset, piece in views(checked, view):
                self._storage.read_into(region, offset, piece)
        finally:
            self._leave(inode)

    def persist_vector(self, region: RegionID, extents: Sequence[Extent]) -> None:
        """As :meth:`persist`, of several extents."""
        checked = checked_extents(extents, "persist_vector")
        inode = self._enter(region, "persist_vector", True)
        try:
            self._check_all(inode, "persist_vector", checked)
            self._persist_all_inside(inode, checked)
        finally:
            self._leave(inode)

    def _check_all(self, inode: Inode, what: str, extents: list[Extent]) -> None:
        for offset, size in extents:
            self._bounds(inode, what, offset, size)

    def _persist_all_inside(self, inode: Inode, extents: list[Extent]) -> None:
        # One span: flushing what lies between costs less than a flush for each extent.
        start = min((offset for offset, _ in extents), default=0)
        end = max((offset + size for offset, size in extents), default=0)
        self._persist_inside(inode, start, end - start)

    def erase(self, region: RegionID) -> None:
        """Remove a region and all its names.  Calls inside it still end well.

        Raises:
            InvalidRegion: unknown or erased already.
        """
        self.patiently(partial(self._erase, region))
        self._reap()

    def _erase(self, region: RegionID, steps: float) -> None:
        with self._guard.lock, self._guard.checked:
            inode = self._find(region, "erase")
            if inode.nlink > steps:
                raise Lengthy
            self.namespace.forget_names(inode)
            self.discard(inode)

    def resize(self, region: RegionID, size: int, *, wait: bool = True) -> None:
        """Grow or shrink to *size* bytes; the ID stays, new bytes read as zero.

        Space is not reserved: a region may grow beyond what the medium can fill.

        Raises:
            InvalidRegion, OutOfBounds: the arguments; no medium can address *size*.
            StorageFull: it exceeds the quota.
        """
        size = checked_size(size, "resize: size")
        inode = self._enter_exclusive(region, "resize", wait)
        resized = False
        try:
            if inode.size - size > LONG:
                self._not_in_a_loop()
            if size != inode.size:
                with self._lock:
                    self._reserve(max(0, size - inode.size), "resize")
                self._storage.check(region, inode.size)
                self._resize_storage(inode, size)
                self._set_size(inode, size)
            resized = True
        finally:
            self._leave_exclusive(inode, wrote=resized)

    def size(self, region: RegionID) -> int:
        """The region's size in bytes."""
        with self._lock:
            return self._find(region, "size").size

    def stat(self, region: RegionID, names: int = -1, characters: float = math.inf) -> RegionStat:
        """Size, times and names of a region; *names* of these, or all, and no more once they have
        so many *characters*."""
        return self.patiently(partial(self._stat, region, names, characters))

    def _stat(self, region: RegionID, names: int, characters: float, steps: float) -> RegionStat:
        with self._guard.lock, self._guard.checked:
            inode = self._find(region, "stat")
            found = inode.attributes()
            return RegionStat(
                found.size, found.atime_ns, found.mtime_ns, found.ctime_ns,
                self.namespace.paths(inode, names, characters, steps),
            )  # fmt: skip

    def list(self, after: RegionID | None = None, limit: int = 1000) -> list[RegionID]:
        """Up to *limit* IDs of live regions in slot order, those after *after*."""
        limit = min(checked_size(limit, "list: limit"), 10000)
        with self._guard.lock, self._guard.checked:
            slot = 0 if after is None else RegionID(after).slot
            return [a.region for a in self._catalogue.regions(slot, limit, anonymous=False)]

    def room(self) -> tuple[int, int, int]:
        """Total and available bytes under quota and medium, and the number of regions."""
        total, available = self._storage.room()
        with self._lock:
            if self._capacity is not None:
                total = min(total, self._capacity)
                available = min(available, max(0, self._capacity - self._catalogue.used))
            return total, available, self._catalogue.count

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def regions(self) -> Iterator[RegionID]:
        """Every region, page by page; those created meanwhile may or may not appear."""
        page = self.list()
        while page:
            yield from page
            page = self.list(page[-1])
