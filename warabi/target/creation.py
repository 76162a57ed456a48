"""How regions come to be: their quota, their bytes, and who fills them."""

from __future__ import annotations

import stat
from typing import Any

from warabi._core.buffers import checked_size, readable
from warabi.backends.base import Fresh
from warabi.errors import StorageFull, TargetNotFound
from warabi.metadata.inode import OWN, PACKED, Inode
from warabi.metadata.namespace import Namespace
from warabi.region import RegionID
from warabi.target.kernel_backed import ExposedRegions


class MadeRegions(ExposedRegions):
    """Makes regions."""

    _largest: int
    namespace: Namespace

    def _reserve(self, extra: int, what: str) -> None:
        """Refuse growth beyond the quota; the lock is held."""
        if self._capacity is not None and self._catalogue.used + extra > self._capacity:
            raise StorageFull(
                f"{what}: {extra} more bytes do not fit, {self._catalogue.used} of"
                f" {self._capacity} bytes are used"
            )

    def create(self, size: int) -> RegionID:
        """A new region of *size* zero bytes, without a name.

        Raises:
            OutOfBounds: *size* is no integer of at least 0.
            StorageFull: it exceeds the quota, or could never fit on the medium.
        """
        size = checked_size(size, "create: size")
        return self._new(size, None).rid

    def make(self, size: int, guest: int) -> RegionID:
        """As :meth:`create`, for the guest of that number, which may write, is granted the region
        next, and fills it."""
        size = checked_size(size, "create: size")
        return self._new(size, self._storage.cleared(size, guest)).rid

    def _new(self, size: int, fresh: Fresh | None, *, entered: bool = False) -> Inode:
        """A new region without a name, of *fresh* bytes if there are any; with *entered* the
        caller is in it, from the start, so that the target does not close meanwhile."""
        try:
            with self._guard.lock, self._guard.checked:
                inode = self.new_region(0o644, None, None, size, anonymous=True, fresh=fresh)
                if entered:
                    inode.users += 1
                    self._inside += 1
                return inode
        except BaseException:
            if fresh is not None:
                fresh.discard()
            raise

    def new_region(
        self, mode: int, uid: int | None, gid: int | None, size: int = 0, *,
        anonymous: bool = False, rid: RegionID | None = None, fresh: Fresh | None = None,
    ) -> Inode:  # fmt: skip
        """As :meth:`create`, for callers that hold the guard and are about to name the region.

        With *rid* it gets that ID; raises as ``Catalogue.add``.  With *fresh*, which stay the
        caller's if anything fails, it gets these bytes.
        """
        if self._closed:
            raise TargetNotFound(f"create: {self._guard.reason}")
        self._reserve(size, "create")
        if size > self._largest:
            raise StorageFull(
                f"create: {size} bytes exceed the capacity of the storage, {self._largest} bytes"
            )
        root = self._catalogue.get(1)
        owner = (0, 0) if root is None else (root.uid, root.gid)
        inode = self._catalogue.add(
            stat.S_IFREG | stat.S_IMODE(mode),
            owner[0] if uid is None else uid,
            owner[1] if gid is None else gid,
            size=size,
            anonymous=anonymous,
            rid=rid,
            packed=PACKED if anonymous and rid is None and self._storage.packs(size) else OWN,
        )
        try:
            if fresh is None:
                self._storage.create(inode.rid, size)
            else:
                fresh.become(inode.rid)
        except BaseException:
            self._catalogue.remove(inode)
            raise
        return inode

    def create_and_write(self, data: Any, persist: bool = False) -> RegionID:
        """A new region of just *data*; when anything fails, no region remains."""
        view = readable(data, "create_and_write: data")
        fresh = self._storage.written(view)
        inode = self._new(len(view), fresh, entered=True)
        try:
            if view and fresh is None:
                self._storage.write(inode.rid, 0, view)
            if persist:
                self._persist_inside(inode, 0, len(view))
        except BaseException:
            # Not by `erase`, which a target that is about to close refuses.
            with self._guard.lock, self._guard.checked:
                if not inode.dead:
                    self.namespace.forget_names(inode)
                    self.discard(inode)
            raise
        finally:
            self._leave(inode, wrote=bool(view))
        return inode.rid
