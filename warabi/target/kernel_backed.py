"""Regions whose bytes somebody uses by a descriptor of their own, and says nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from warabi._core import descriptors
from warabi._core.attributes import without_setid
from warabi.backends.base import KERNEL
from warabi.errors import TargetBusy
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.target.leases import GrantHolder, Grants
from warabi.target.sharing import SharedRegions

_PART = 4
"""No more of the descriptors are for exposed regions than that part: everything else needs some."""


class Exposed:
    """What is known of an exposed region: its descriptor, and what it was like the last time.

    Others read and write by it, also behind the region's end, which grows then; nobody but the
    target makes it shorter.

    Args:
        inode: the region's.
        fd: a descriptor of its own file, whose end is the region's.
        catalogue: where the region is noted.
        grew: told the size of one that has grown.
        wrote: told of a region that may have been written.
    """

    __slots__ = ("_catalogue", "_grew", "_inode", "_mtime", "_wrote", "fd")

    def __init__(
        self,
        inode: Inode,
        fd: int,
        catalogue: Catalogue,
        grew: Callable[[bytes, int], None],
        wrote: Callable[[bytes], None],
    ) -> None:
        self._inode = inode
        self.fd = fd
        self._catalogue = catalogue
        self._grew = grew
        self._wrote = wrote
        self._mtime = os.fstat(fd).st_mtime_ns

    def settle(self, *, thorough: bool = False) -> None:
        """Take over what became of the region, with *thorough* also if no time tells of it; the
        target's lock is held."""
        inode = self._inode
        info = os.fstat(self.fd)
        if info.st_size > inode.size:
            self._grew(inode.rid, info.st_size)
            self._catalogue.resize(inode, info.st_size)
        if info.st_mtime_ns != self._mtime:
            self._mtime = info.st_mtime_ns
            inode.written_by(None)
            self._catalogue.clock.file_wrote_at(inode, info.st_mtime_ns)
            mode, inode.mode = inode.mode, without_setid(inode.mode)  # who wrote is not known
            self._catalogue.touch(inode, durable=mode != inode.mode)
            thorough = True
        if thorough:
            self._wrote(inode.rid)

    def skip(self) -> None:
        """The last change of the file's bytes or size was the target's own."""
        self._mtime = os.fstat(self.fd).st_mtime_ns

    def end(self) -> None:
        """As :meth:`settle`, thoroughly, for the last time; the descriptor is closed."""
        self._inode.exposed = None
        try:
            self.settle(thorough=True)
        finally:
            os.close(self.fd)


class ExposedRegions(SharedRegions):
    """Exposes regions to those who use their descriptors without asking."""

    _capacity: int | None = None

    def __init__(self, *args: Any) -> None:
        self._exposed: dict[RegionID, Exposed] = {}
        self._were_exposed = False
        super().__init__(*args)

    def expose(self, region: RegionID) -> int | None:
        """A descriptor by which somebody may read and write the region, also beyond its end, until
        :meth:`conceal`; the caller keeps the region from being erased meanwhile, and does not
        close it.  None where the region has no file of its own, or somebody has to see to what
        is written.

        Raises:
            InvalidRegion: unknown or erased.
            StorageError: the medium.
            OSError: there are too many descriptors.
        """
        inode = self._enter(region, "expose", True)
        try:
            storage = self._storage
            if self._capacity is not None or not storage.shares_writes or storage.write_waits:
                return None
            with self._lock:
                if self._paused or self._grants is not None or inode.exposed is not None:
                    return None
            if len(self._exposed) >= descriptors.limit() // _PART:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            place = storage.share(region, writable=True, holder=KERNEL)
            if place is None:
                return None
            if place.segment or place.offset or place.room is not None:
                os.close(place.fd)
                return None
            with self._lock:
                exposed = Exposed(inode, place.fd, self._catalogue, storage.grew, storage.wrote)
                inode.exposed = self._exposed[region] = exposed
                self._were_exposed = True
            return place.fd
        finally:
            self._leave(inode)

    def conceal(self, region: RegionID) -> None:
        """Nobody uses an exposed region's descriptor any more; it is closed.

        Who has mapped its file meanwhile may go on writing there.
        """
        with self._lock:
            exposed = self._exposed.pop(region, None)
            if exposed is not None:
                exposed.end()

    def _settle_all(self, *, thorough: bool = False) -> None:
        super()._settle_all(thorough=thorough)
        for exposed in self._exposed.values():
            exposed.settle(thorough=thorough)

    def join(self) -> tuple[GrantHolder, Grants] | None:
        # A guest could not be told how large an exposed region is.
        return None if self._exposed else super().join()

    def pause_sharing(self) -> None:
        if self._exposed:
            raise TargetBusy(
                "files are open for passthrough, so the target does not see their writes"
            )
        super().pause_sharing()

    def close(self) -> None:
        try:
            if self._were_exposed and not self._closed:
                self._storage.sync_found()  # what was written to mappings, too
        finally:
            super().close()
        if self._closed:
            for exposed in self._exposed.values():
                os.close(exposed.fd)
            self._exposed.clear()
