"""A target: catalogue and storage combined, with all checks of arguments.

A method checks its arguments, enters the region, has the storage or a part of the target do the
work, and leaves.  Each part owns its state, is constructed from parts above it in this list, and
calls only those:

* ``TargetState``: catalogue, storage and the lock, which all share (``state.py``)
* ``Sharing``: grants of direct access to other processes (``sharing.py``)
* ``KernelBacked``: regions whose files a kernel uses (``kernel_backed.py``)
* ``Sizes``: quota, and growing and shrinking (``sizes.py``)
* ``Erasure``: when bytes of erased regions are freed (``erasure.py``)
* ``RegionLocks``: which calls are inside which region (``region_locks.py``)
* ``FileLocks``: what programs have locked, by flock(2) and fcntl(2) (``file_locks.py``)
* ``Committer``: what is durable when (``commit.py``)
* ``Creation``: new regions (``creation.py``)
"""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from types import MappingProxyType
from typing import Any

from warabi._core import forks
from warabi._core.attributes import IMMUTABLE, Attributes
from warabi._core.buffers import MAX_SIZE, checked_size, filled_bytes, readable, writable
from warabi._core.extents import Extent, beyond_end, check_total, checked_extents, views
from warabi._core.results import RegionStat
from warabi.backends import Storage
from warabi.backends.base import Fresh
from warabi.errors import Lengthy, WouldBlock, path_error
from warabi.metadata import domain
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import FIXED, Inode, check_unfixed
from warabi.metadata.namespace import Namespace
from warabi.metadata.tree import Regions
from warabi.region import RegionID
from warabi.target.commit import Committer
from warabi.target.creation import Creation
from warabi.target.erasure import Erasure
from warabi.target.file_locks import FileLocks
from warabi.target.kernel_backed import KernelBacked
from warabi.target.loan import RegionLoan
from warabi.target.recovery import recover
from warabi.target.region_locks import RegionLocks
from warabi.target.sharing import Granted, Sharing
from warabi.target.sizes import Sizes
from warabi.target.state import LONG, TargetState, not_in_a_loop
from warabi.target.write_throttle import Pace

_MANY = 1024
"""Number of extents that take long to process."""


class Target:
    """Regions and their names, in one catalogue and one storage.

    Thread-safe.  A call with ``wait=False`` raises :class:`warabi.errors.WouldBlock`, without
    effect, if it would have to wait for another call or for stable storage.

    Args:
        catalogue: which regions exist; recovered if it was not closed.
        storage: where their bytes are.
        capacity: quota on the space that regions use, in bytes; None for none.
        threads: most calls of Trio programs that wait for stable storage concurrently; None for
            Trio's own limit.
        instead: settings of the storage in effect that differ from the configuration.
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
        if not catalogue.clean:
            recover(catalogue, storage)
        catalogue.space_of = storage.space
        state = self.state = TargetState(catalogue, storage)
        self.sharing = Sharing(state)
        self.kernel_backed = KernelBacked(state, self.sharing)
        self.erasure = Erasure(state, self.sharing)
        self.locks = RegionLocks(state, self.erasure)
        self.file_locks = FileLocks(self.size)
        self.sizes = Sizes(state, self.sharing, capacity)
        self.creation = Creation(state, self.sizes)
        self.namespace = Namespace(
            catalogue,
            state.guard,
            Regions(
                self.creation.new_region, self.erasure.discard, self.erasure.reap, state.patiently
            ),
        )
        self.committer = Committer(
            state, self.locks, self.erasure, self.sharing, self.kernel_backed
        )
        self.feed = catalogue.feed
        self.blocking = storage.blocking
        self.threads = threads
        self.instead = instead
        self._on_closing = on_closing
        self._on_close = on_close
        self._catalogue = catalogue
        self._storage = storage
        self._pace = Pace()
        # Bound once, for the calls that are frequent.
        self._enter = self.locks.enter
        self._leave = self.locks.leave
        forks.register(self)

    def _forked(self) -> None:
        self.state.forked()
        self.locks.forked()
        self.file_locks.forked()
        self.sharing.forked()

    @property
    def occupied(self) -> bool:
        """Whether a thread holds the lock for long, or is about to; event loops, where every task
        would wait for it, leave the target alone meanwhile."""
        return self.state.occupied

    @property
    def write_waits(self) -> bool:
        """Whether a write waits for stable storage, and not only a persist, or is likely to."""
        return self._storage.write_waits or self._pace.slow(perf_counter_ns())

    @property
    def shares_writes(self) -> bool:
        """Whether guests may write to regions."""
        return self._storage.shares_writes

    @property
    def uuid(self) -> str:
        """The target's unique ID, for as long as it exists."""
        return self._catalogue.uuid

    @property
    def epoch(self) -> str:
        """Changes when volatile changes may have been lost because the target was not closed
        cleanly."""
        return self._catalogue.epoch

    @property
    def used(self) -> int:
        """The sum of the sizes of all regions, in bytes, or 2**63 - 1 if it is more."""
        return min(int(self._catalogue.used), MAX_SIZE)

    def _bounds(self, inode: Inode, what: str, offset: int, size: int) -> None:
        if offset + size > inode.size:
            raise beyond_end(what, inode.rid, offset, size, inode.size)

    # Regions

    def create(self, size: int) -> RegionID:
        """Create a region of *size* zero bytes, without a name.

        Raises:
            OutOfBounds: *size* is not an integer of at least 0.
            StorageFull: it exceeds the quota, or the capacity of the storage.
        """
        size = checked_size(size, "create: size")
        self.creation.check_fits(size)
        return self._new(size, None).rid

    def make(self, size: int, guest: int, *, linkable: bool = False) -> RegionID:
        """The same as :meth:`create`, for a writable guest that is granted the region next, and
        fills it.  A *linkable* one is like ``Tree.tmpfile`` without a directory."""
        size = checked_size(size, "create: size")
        self.creation.check_fits(size)
        return self._new(size, self._storage.cleared(size, guest), linkable=linkable).rid

    def _new(
        self, size: int, fresh: Fresh | None, *, entered: bool = False, linkable: bool = False,
        space: int | None = None,
    ) -> Inode:  # fmt: skip
        """Create a region without a name, from *fresh* if given; with *entered* the caller has
        entered it from the start, so that the target does not close meanwhile.  A *linkable* one is
        pinned, and not shown."""
        try:
            with self.state.guard.lock, self.state.guard.checked:
                inode = self.creation.new_region(
                    0o644, None, None, size, anonymous=not linkable, complete=True, fresh=fresh,
                    space=space,
                )  # fmt: skip
                inode.pins, inode.linkable = int(linkable), linkable
                if entered:
                    self.locks.enter_new(inode)
                return inode
        except BaseException:
            if fresh is not None:
                fresh.discard()
            raise

    def create_and_write(self, data: Any, persist: bool = False) -> RegionID:
        """Create a region with *data*; on failure no region remains."""
        view = readable(data, "create_and_write: data")
        fresh = self._storage.written(view)
        inode = self._new(len(view), fresh, entered=True)
        try:
            if view and fresh is None:
                self._storage.write(inode.rid, 0, view)
            inode.measure = None
            if persist:
                self.committer.persist(inode, 0, len(view))
        except BaseException:
            self.discard_new(inode)
            raise
        finally:
            self._leave(inode, wrote=bool(view))
        return inode.rid

    @contextmanager
    def filling(self, size: int, space: int) -> Iterator[Inode]:
        """A new region of *size* bytes, which the block writes, and which uses *space* bytes then;
        when that fails, none remains."""
        inode = self._new(size, None, entered=True, space=space)
        try:
            yield inode
            self.sizes.account(inode)
        except BaseException:
            self.discard_new(inode)
            raise
        finally:
            self._leave(inode, wrote=bool(size))

    def discard_new(self, inode: Inode) -> None:
        """Erase a region that is being filled; :meth:`erase` fails while the target closes."""
        with self.state.guard.lock, self.state.guard.checked:
            if not inode.dead:
                self.namespace.forget_names(inode)
                self.erasure.discard(inode)

    def write(
        self, region: RegionID, offset: int, data: Any, persist: bool = False,
        *, extend: bool = False, wait: bool = True,
    ) -> None:  # fmt: skip
        """Write *data*, any contiguous buffer, at *offset* bytes.

        With *extend* a write beyond the end grows the region; a gap reads as zero.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: invalid arguments, before anything is
            written.
            StorageFull, StorageError: writing failed; the extent's contents are then undefined.
        """
        if not wait and self.write_waits:
            raise WouldBlock
        view = readable(data, "write: data")
        offset = checked_size(offset, "write: offset")
        inode = self._enter(region, "write", wait)
        began, wrote = perf_counter_ns(), False
        try:
            growing = extend and offset + len(view) > inode.size
            self._check_unfixed(inode, "write", offset)
            if not growing:
                self._bounds(inode, "write", offset, len(view))
                if region in self._catalogue.holes:
                    growing = bool(view)  # in space
                elif view:
                    self._storage.write(region, offset, view)
                    wrote = True
        finally:
            self._leave(inode, wrote=wrote)
        if growing:
            self._write_growing(region, offset, view, wait, extend=extend)
        if not wait:
            self._pace.wrote(len(view), began, perf_counter_ns())
        if persist:
            self.persist(region, offset, len(view))

    def append(
        self, region: RegionID, data: Any, persist: bool = False, *, wait: bool = True
    ) -> int:
        """Write *data* at the end of the region, which grows; returns the offset of its first byte.

        The end is determined, and moved, while no other call is inside the region, so that appends
        never overlap each other or writes that make the region grow.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: invalid arguments, before anything is
            written.
            StorageFull, StorageError: writing failed; nothing was appended, unless only the persist
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
        self, region: RegionID, offset: int | None, view: memoryview, wait: bool,
        *, extend: bool = True,
    ) -> int:  # fmt: skip
        """Write *view* at *offset*, or at the region's end; returns the offset."""
        what = "append" if offset is None else "write"
        inode = self.locks.enter_exclusive(region, what, wait)
        wrote = False
        try:
            if offset is None:
                offset = inode.size
            self._check_unfixed(inode, what, offset)
            end = checked_size(offset + len(view), f"{what}: the end")
            if not extend:
                self._bounds(inode, what, offset, len(view))
            if end > inode.size:
                self.sizes.grow_and_fill(inode, what, offset, view)
            else:  # there may be holes, or another call made it grow concurrently
                self.sizes.fill(inode, what, offset, view)
            wrote = True
        finally:
            self.locks.leave_exclusive(inode, wrote=wrote)
        return offset

    def read_into(
        self, region: RegionID, offset: int, buffer: Any, *, short: bool = False, wait: bool = True
    ) -> int:
        """Fill *buffer*, any writable contiguous buffer, from *offset* bytes.

        With *short* the region may end before the buffer does.  Returns the number of bytes read.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: invalid arguments, before anything is read.
            StorageError, CorruptTarget: reading failed.
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
        """Return up to *size* bytes at *offset* in place, fewer at the region's end; None if they
        are not in memory, or partly a hole.

        An access after the region was shrunk or erased kills the process: only for a caller that
        owns the whole target, and passes the view to a system call at once, which fails then.

        Raises:
            InvalidRegion, OutOfBounds: invalid arguments.
        """
        offset = checked_size(offset, "view: offset")
        with self.state.lock:
            inode = self.locks.find(region, "view")
            size = min(checked_size(size, "view: size"), inode.size - offset)
            return self._storage.view(region, offset, size) if size > 0 else None

    def lend(
        self, region: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> RegionLoan:
        """Return a context manager for *size* bytes at *offset* in place: ``with target.lend(...)
        as loan``."""
        return RegionLoan(self.state, self.locks, region, offset, size, writable=writable)

    def begin_write(
        self, region: RegionID, offset: int, data: memoryview
    ) -> Callable[[], None] | None:
        """Return a function that writes *data*, which must be called, and soon; None if that might
        wait or fail, or be visible to other processes: use :meth:`write` then.

        So it is only for allocated memory that no other process can truncate.
        """
        if self.blocking or self.sharing.active:
            return None
        loan = self.lend(region, offset, len(data), writable=True)
        place = loan.__enter__().place
        if place is None:
            loan.__exit__()
            return None

        def write() -> None:
            place[:] = data
            loan.__exit__()

        return write

    def read(self, region: RegionID, offset: int, size: int) -> bytes:
        """Exactly *size* bytes from *offset*; raises as :meth:`read_into`."""
        offset = checked_size(offset, "read: offset")
        size = checked_size(size, "read: size")
        with self.state.lock:  # check before allocating memory of an absurd size
            self._bounds(self.locks.find(region, "read"), "read", offset, size)

        def fill(view: memoryview) -> None:
            self.read_into(region, offset, view)

        return filled_bytes(size, fill)

    def persist(self, region: RegionID, offset: int, size: int) -> None:
        """Return when the extent and all metadata needed to find it are on stable storage.

        Raises:
            InvalidRegion, OutOfBounds: invalid arguments.
            StorageError: this or an earlier persist failed; the kernel reports a failure only once.
        """
        offset = checked_size(offset, "persist: offset")
        size = checked_size(size, "persist: size")
        inode = self._enter(region, "persist", True)
        try:
            self._bounds(inode, "persist", offset, size)
            self.committer.persist(inode, offset, size)
        finally:
            self._leave(inode)

    def fsync(self, region: RegionID, times: bool = True) -> None:
        """Persist the whole region; with *times* also its timestamps, like fsync(2) and unlike
        fdatasync(2).  Raises as :meth:`persist`."""
        inode = self._enter(region, "fsync", True)
        try:
            self.committer.persist(inode, 0, inode.size, times=times)
        finally:
            self._leave(inode)

    def write_vector(
        self, region: RegionID, extents: Sequence[Extent], data: Any, persist: bool = False
    ) -> None:
        """Write *data* to several extents, one after the other.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: invalid arguments, before anything is
            written.
            StorageFull, StorageError: writing failed; the extents' contents are then undefined.
        """
        view = readable(data, "write_vector: data")
        checked = checked_extents(extents, "write_vector")
        check_total(checked, len(view), "write_vector")
        if len(checked) > _MANY:
            not_in_a_loop()
        inode = self._enter(region, "write_vector", True)
        wrote = False
        try:
            check_unfixed(inode, "write_vector")
            self._check_all(inode, "write_vector", checked)
            holes = region in self._catalogue.holes
            for offset, piece in () if holes else views(checked, view):
                wrote = True
                self._storage.write(region, offset, piece)
            if persist and not holes:
                self._persist_all_inside(inode, checked)
        finally:
            self._leave(inode, wrote=wrote)
        if holes:
            for offset, piece in views(checked, view):
                if piece:
                    self._write_growing(region, offset, piece, True, extend=False)
            if persist:
                self.persist_vector(region, checked)

    def read_vector(self, region: RegionID, extents: Sequence[Extent], buffer: Any) -> None:
        """Fill *buffer* from several extents, one after the other.

        Raises:
            InvalidRegion, OutOfBounds, InvalidBuffer: invalid arguments, before anything is read.
            StorageError, CorruptTarget: reading failed.
        """
        view = writable(buffer, "read_vector: buffer")
        checked = checked_extents(extents, "read_vector")
        check_total(checked, len(view), "read_vector")
        if len(checked) > _MANY:
            not_in_a_loop()
        inode = self._enter(region, "read_vector", True)
        try:
            self._check_all(inode, "read_vector", checked)
            for offset, piece in views(checked, view):
                self._storage.read_into(region, offset, piece)
        finally:
            self._leave(inode)

    def persist_vector(self, region: RegionID, extents: Sequence[Extent]) -> None:
        """The same as :meth:`persist`, for several extents."""
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
        # One range: flushing the gaps is cheaper than a flush for each extent.
        start = min((offset for offset, _ in extents), default=0)
        end = max((offset + size for offset, size in extents), default=0)
        self.committer.persist(inode, start, end - start)

    def erase(self, region: RegionID) -> None:
        """Remove a region and all its names.  Pending calls in it still succeed."""
        self.state.patiently(partial(self._erase, region))
        self.erasure.reap()

    def _erase(self, region: RegionID, steps: float) -> None:
        with self.state.guard.lock, self.state.guard.checked:
            inode = self.locks.find(region, "erase")
            if inode.nlink > steps:
                raise Lengthy
            check_unfixed(inode, "erase")
            self.namespace.forget_names(inode)
            self.erasure.discard(inode)

    def resize(self, region: RegionID, size: int, *, wait: bool = True) -> None:
        """Grow or shrink to *size* bytes; the ID stays, new bytes read as zero.

        Space is not reserved: a region may grow beyond what the storage can hold.

        Raises:
            InvalidRegion, OutOfBounds: the arguments; *size* exceeds what any storage can address.
            StorageFull: it exceeds the quota.
        """
        size = checked_size(size, "resize: size")
        inode = self.locks.enter_exclusive(region, "resize", wait)
        resized = False
        try:
            check_unfixed(inode, "resize")
            if inode.size - size > LONG:
                not_in_a_loop()
            if size != inode.size:
                self.sizes.make_room(inode, size, size, "resize")
                self._storage.check(region, inode.size)
                self.sizes.resize(inode, size)
                self.sizes.set(inode, size)
            resized = True
        finally:
            self.locks.leave_exclusive(inode, wrote=resized)

    def set_flags(self, ino: int, flags: int) -> Attributes:
        """Set the flags of an inode: a sum of ``IMMUTABLE``, ``APPEND_ONLY`` and ``NO_DUMP``.

        They hold for every client from when this returns; writes that are under way are finished
        before.

        Raises:
            PathError: with ``errno`` ESTALE, EOPNOTSUPP for other flags, EBUSY while a kernel
                writes the file by itself.
        """
        flags = domain.inode_flags(flags)
        attributes = self.namespace.getattr(ino)
        if not stat.S_ISREG(attributes.mode):
            return self.namespace.set_flags(ino, flags)
        inode = self.locks.enter_exclusive(attributes.region, "set_flags", True)
        try:
            with self.state.lock:
                if inode.exposed is not None and flags & FIXED:
                    raise path_error(
                        errno.EBUSY, f"inode {ino}: it is open on a mount with -o passthrough"
                    )
            self.sharing.drain(inode)
            return self.namespace.set_flags(ino, flags)
        finally:
            self.locks.leave_exclusive(inode)

    @staticmethod
    def _check_unfixed(inode: Inode, what: str, offset: int) -> None:
        """PathError EPERM unless a write at *offset* may change the region."""
        if inode.flags & FIXED:
            check_unfixed(inode, what, IMMUTABLE if offset >= inode.size else FIXED)

    # Bytes that others read and write by themselves

    def grant(
        self, region: RegionID, holder: int, *, writable: bool, wait: bool = True
    ) -> Granted | None:
        """Grant the region to a guest; None if it must use requests.

        The caller must close the descriptor in the result.  *holder* is the user: a guest, by its
        number, or ``THIS_PROCESS``.

        Raises:
            InvalidRegion: unknown or erased.
            TargetBusy: not possible now.
            WouldBlock: without *wait*, while the region is being resized.
        """
        inode = self._enter(region, "share", wait)
        try:
            if inode.flags & FIXED:
                return None
            if writable and region in self._catalogue.holes:
                return None  # its writes have to be accounted for
            return self.sharing.grant(inode, holder, writable=writable)
        finally:
            self._leave(inode)

    def expose(self, region: RegionID) -> int | None:
        """A descriptor by which a kernel may read and write the region, also beyond its end, until
        ``kernel_backed.conceal``; the caller keeps the region from being erased meanwhile, and does
        not close it.  None where the region has no file of its own, or what is written has to be
        checked or accounted for.

        Raises:
            InvalidRegion: unknown or erased.
            StorageError: the storage failed.
            OSError: there are too many descriptors.
        """
        inode = self._enter(region, "expose", True)
        try:
            if self.sizes.capacity is not None or inode.flags & FIXED:
                return None
            return self.kernel_backed.expose(inode)
        finally:
            self._leave(inode)

    # What is known of regions

    def size(self, region: RegionID) -> int:
        """The region's size in bytes."""
        with self.state.lock:
            return self.locks.find(region, "size").size

    def stat(self, region: RegionID, names: int = -1, characters: float = math.inf) -> RegionStat:
        """Size, times and names of a region; *names* of these, or all, and no more once they have
        so many *characters*."""
        return self.state.patiently(partial(self._stat, region, names, characters))

    def _stat(self, region: RegionID, names: int, characters: float, steps: float) -> RegionStat:
        with self.state.guard.lock, self.state.guard.checked:
            inode = self.locks.find(region, "stat")
            found = inode.attributes()
            return RegionStat(
                found.size, found.atime_ns, found.mtime_ns, found.ctime_ns,
                self.namespace.paths(inode, names, characters, steps),
            )  # fmt: skip

    def list(self, after: RegionID | None = None, limit: int = 1000) -> list[RegionID]:
        """Up to *limit* IDs of live regions in slot order, those after *after*."""
        limit = min(checked_size(limit, "list: limit"), 10000)
        with self.state.guard.lock, self.state.guard.checked:
            slot = 0 if after is None else RegionID(after).slot
            return [a.region for a in self._catalogue.regions(slot, limit, anonymous=False)]

    def room(self) -> tuple[int, int, int]:
        """Total and available bytes (limited by quota and storage), and the number of regions."""
        total, available = self._storage.room()
        with self.state.lock:
            if self.sizes.capacity is not None:
                total = min(total, self.sizes.capacity)
                available = min(available, max(0, self.sizes.capacity - self.sizes.used))
            return total, available, self._catalogue.count

    # Everything

    def commit(self) -> None:
        """Make every change of the catalogue durable, and then free what erased regions held."""
        self.committer.commit()

    def sync(self) -> None:
        """Make everything written so far durable: data first, then the catalogue."""
        self.committer.sync()

    def say_closed(self, reason: str) -> None:
        """Set the message of errors after the target is closed."""
        self.state.guard.reason = reason

    def will_close(self) -> None:
        """Announce that :meth:`close` follows soon: a process that wants to open the target waits
        for it."""
        self._on_closing()

    def close(self) -> None:
        """Persist everything and close the storage.  Idempotent; never deletes a region.

        Waits for pending calls.  Later calls raise ``TargetNotFound``.
        """
        if self.state.closed:
            return
        try:
            self.kernel_backed.sync()
        finally:
            if self.locks.close():
                self._close()

    def _close(self) -> None:
        self.file_locks.close()
        self.erasure.close()
        self.will_close()
        self.sharing.close()
        try:
            self.committer.close()
        finally:
            try:
                self._storage.close()
            finally:
                self.kernel_backed.close()
                self._on_close()

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
