"""Creation of regions: the row of the catalogue, and the bytes in the storage.

Calls ``Sizes`` for the quota.  Called by ``Target``, and by the tree of names.
"""

from __future__ import annotations

import stat

from warabi.backends.base import Fresh
from warabi.errors import StorageFull
from warabi.metadata.inode import OWN, PACKED, Inode
from warabi.region import RegionID
from warabi.target.sizes import Sizes
from warabi.target.state import TargetState


class Creation:
    """Makes regions of one target."""

    def __init__(self, state: TargetState, sizes: Sizes) -> None:
        self._state = state
        self._catalogue = state.catalogue
        self._storage = state.storage
        self._sizes = sizes
        self._largest = state.storage.room()[0]

    def check_fits(self, size: int) -> None:
        """Refuse a new region of *size* bytes that the storage could never hold.

        Not for copies of regions with holes, whose size says nothing about the space they need.
        """
        if size > self._largest:
            raise StorageFull(
                f"create: {size} bytes exceed the capacity of the storage, {self._largest} bytes"
            )

    def new_region(
        self, mode: int, uid: int | None, gid: int | None, size: int = 0, *,
        anonymous: bool = False, complete: bool = False, rid: RegionID | None = None,
        fresh: Fresh | None = None, space: int | None = None,
    ) -> Inode:  # fmt: skip
        """As ``Target.create``, for callers that hold the guard and are about to name the region.

        Where small regions share files it is one of them if it is *anonymous* or *complete*, and
        so is not expected to grow.
        With *rid* it gets that ID; raises as ``Catalogue.add``.  With *fresh* it gets these data;
        on failure they stay the caller's.  With *space* it counts only so many bytes for the quota,
        if it can have holes, until more of it is written.
        """
        self._state.check_open("create")
        if space is None or not self._storage.leaves_holes(size):
            space = size
        self._sizes.reserve(space, "create")
        packs = (anonymous or complete) and rid is None and self._storage.packs(size)
        root = self._catalogue.get(1)
        owner = (0, 0) if root is None else (root.uid, root.gid)
        inode = self._catalogue.add(
            stat.S_IFREG | stat.S_IMODE(mode),
            owner[0] if uid is None else uid,
            owner[1] if gid is None else gid,
            size=size,
            anonymous=anonymous,
            rid=rid,
            packed=PACKED if packs else OWN,
        )
        try:
            if fresh is None:
                self._storage.create(inode.rid, size)
            else:
                fresh.become(inode.rid)
        except BaseException:
            self._catalogue.remove(inode)
            raise
        if space < size:
            self._catalogue.set_holes(inode, size - space)
        return inode
