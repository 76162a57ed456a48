"""Growing and shrinking regions: the quota, with other processes' direct access revoked.

Calls ``Sharing``, the catalogue and the storage.  Called by ``Creation`` and ``Target``, by callers
that have closed the region to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from warabi.errors import PathError, StorageFull
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.target.sharing import Sharing
from warabi.target.state import TargetState, not_in_a_loop


class Sizes:
    """Sizes of the regions of one target.

    Args:
        state: the target's.
        sharing: what guests know of sizes.
        capacity: quota on the space that regions use, in bytes; None for none.
    """

    def __init__(self, state: TargetState, sharing: Sharing, capacity: int | None) -> None:
        self._state = state
        self._sharing = sharing
        self.capacity = capacity
        if capacity is not None:
            state.catalogue.count_all_holes()

    # The quota counts the size of each region, less its holes where these are known to be
    # (Catalogue.holes).  Such regions are not granted to guests for writing, and are written by
    # one call at a time, so that what they use is known before and after.

    @property
    def used(self) -> int:
        """Bytes that count for the quota."""
        catalogue = self._state.catalogue
        used: int = catalogue.used - catalogue.spared
        return used

    def reserve(self, extra: int, what: str) -> None:
        """Check the quota; the lock is held."""
        used = self.used
        if self.capacity is not None and used + extra > self.capacity:
            raise StorageFull(
                f"{what}: {extra} more bytes do not fit, {used} of {self.capacity} bytes are used"
            )

    def make_room(
        self, inode: Inode, offset: int, end: int, what: str, data: int | None = None
    ) -> None:
        """Check the quota before the bytes from *offset* to *end* of a region are written that this
        call has closed, or only *data* bytes of them; with *offset* as *end* before it grows.

        Raises:
            StorageFull: the quota is exceeded.
        """
        catalogue, storage, size = self._state.catalogue, self._state.storage, inode.size
        if self.capacity is None:
            return
        grown = max(0, end - (max(size, offset) if storage.leaves_holes(end) else size))
        inside = max(0, min(size, end) - offset) if inode.rid in catalogue.holes else 0
        if data is not None and not storage.leaves_holes(end):
            data = None
        try:
            if need := inside + grown if data is None else min(inside + grown, data):
                with self._state.lock:
                    self.reserve(need, what)
        except StorageFull:
            if data is not None or not inside:
                raise
            not_in_a_loop()
            self._fill_holes(inode, offset, offset + inside, grown, what)

    def _fill_holes(self, inode: Inode, offset: int, end: int, grown: int, what: str) -> None:
        """The same where it matters how much of the extent, which is within the region, and before
        *grown* bytes, is allocated."""
        storage, rid = self._state.storage, inode.rid
        holes = list(self.holes(rid, offset, end))
        try:
            with self._state.lock:
                self.reserve(sum(size for _, size in holes) + grown, what)
        except StorageFull as full:
            # Files seem to have holes where space was allocated in advance.
            try:
                for start, size in holes:
                    storage.allocate(rid, start, size)
                self.account(inode)
                with self._state.lock:
                    self.reserve(grown, what)
            except (StorageFull, PathError):
                for start, size in holes:
                    storage.zero(rid, start, size, free=True)
                self.account(inode)
                raise full from None

    def holes(self, rid: RegionID, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Offsets and sizes of the holes from *offset* to *end*."""
        seek = self._state.storage.seek
        while (start := seek(rid, offset, end, hole=True)) < end:
            offset = seek(rid, start, end, hole=False)
            yield start, offset - start

    def account(self, inode: Inode) -> None:
        """Find out what a region uses whose space may have changed."""
        if self.capacity is not None:
            with self._state.lock:
                self._account(inode)

    def _account(self, inode: Inode) -> None:
        catalogue = self._state.catalogue
        if self.capacity is not None and not inode.dead:
            had = inode.rid in catalogue.holes
            if catalogue.count_holes(inode) and not had:
                self._sharing.revoke(inode)

    def set(self, inode: Inode, size: int) -> None:
        """Have it known that the region has *size* bytes."""
        with self._state.lock:
            if not inode.dead:
                self._state.catalogue.resize(inode, size)
                self._account(inode)
                self._sharing.resized(inode)

    def fill(self, inode: Inode, what: str, offset: int, view: memoryview) -> None:
        """Store *view* in a region that this call has closed, and that ends behind it."""
        self.make_room(inode, offset, offset + len(view), what)
        try:
            self._state.storage.write(inode.rid, offset, view)
        finally:
            self.account(inode)

    def resize(self, inode: Inode, size: int) -> None:
        """Have the storage resize the region's bytes."""
        storage, rid, drained = self._state.storage, inode.rid, True
        if size > inode.size:
            self._state.catalogue.may_have_holes(inode)
        if size < inode.size or storage.moves(rid, size):
            with self._state.lock:
                drained = self._sharing.revoke(inode)
        if drained:
            storage.resize(rid, size)
        else:  # a guest may still write where the bytes are now
            self.free_later(inode, storage.replace(rid, size))

    def free_later(self, inode: Inode, free: Callable[[], None]) -> None:
        """Have *free* free the place where the bytes were, when no guest touches it any more."""
        with self._state.lock:
            if inode.share is not None and self._sharing.later(inode.share, free):
                return
        free()

    def grow_and_fill(self, inode: Inode, what: str, offset: int, view: memoryview) -> None:
        """Store *view*, which ends beyond the region's end."""
        storage, region, end = self._state.storage, inode.rid, offset + len(view)
        self.make_room(inode, offset, end, what)

        def fill() -> None:
            if offset > inode.size:
                self._state.catalogue.may_have_holes(inode)
            if storage.moves(region, end) and inode.share is not None:
                self.resize(inode, end)
                storage.write(region, offset, view)
            else:
                storage.write_beyond(region, offset, view)

        self.grow(inode, end, fill)

    def grow(self, inode: Inode, end: int, fill: Callable[[], None]) -> None:
        """Make the region end at *end*, which is beyond its end; *fill* makes the storage do so."""
        self._state.storage.check(inode.rid, inode.size)
        try:
            fill()
        except BaseException:
            # It may have grown without being filled: remove everything beyond the old end.
            self._state.storage.resize(inode.rid, inode.size)
            self.account(inode)
            raise
        self.set(inode, end)
