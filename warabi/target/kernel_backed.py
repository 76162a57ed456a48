"""Regions whose files the kernel reads and writes without requests to the target (passthrough).

Their sizes and times are looked up in the file when they are asked for and before each commit.
Calls the storage, and ``Sharing``, since guests and exposed regions exclude each other.  Called by
``Target`` and by ``Committer``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from warabi._core import descriptors
from warabi._core.attributes import without_setid
from warabi.backends.base import KERNEL
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.target.sharing import Sharing
from warabi.target.state import TargetState

_PART = 4
"""No more of the descriptors are for exposed regions than that part: everything else needs some."""


class Exposed:
    """An exposed region: its descriptor, and its size and time at the last look.

    A kernel reads and writes through the descriptor; writes beyond the region's end extend it.
    Only the target truncates it.

    Args:
        inode: the region's.
        fd: a descriptor of its own file, whose end is the region's.
        catalogue: where the region is noted.
        grew: called with the ID and the new size of a region that has grown.
        wrote: called with the ID of a region that may have been written.
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

    def merge_writes(self, *, thorough: bool = False) -> None:
        """Update size and times from the file; with *thorough* treat the data as written even
        if no time changed.  The target's lock is held."""
        inode = self._inode
        info = os.fstat(self.fd)
        if info.st_size > inode.size:
            self._grew(inode.rid, info.st_size)
            self._catalogue.resize(inode, info.st_size)
            self._catalogue.may_have_holes(inode)
        if info.st_mtime_ns != self._mtime:
            self._mtime = info.st_mtime_ns
            inode.written_by(None)
            self._catalogue.clock.file_wrote_at(inode, info.st_mtime_ns)
            # The writing user is not known.
            mode, inode.mode = inode.mode, without_setid(inode.mode)
            self._catalogue.touch(inode, durable=mode != inode.mode)
            thorough = True
        if thorough:
            self._wrote(inode.rid)

    def skip(self) -> None:
        """The last change of the file's bytes or size was the target's own."""
        self._mtime = os.fstat(self.fd).st_mtime_ns

    def end(self) -> None:
        """As :meth:`merge_writes`, thoroughly, for the last time; the descriptor is closed."""
        self._inode.exposed = None
        try:
            self.merge_writes(thorough=True)
        finally:
            os.close(self.fd)


class KernelBacked:
    """The exposed regions of one target."""

    def __init__(self, state: TargetState, sharing: Sharing) -> None:
        self._state = state
        self._sharing = sharing
        self._exposed: dict[RegionID, Exposed] = {}
        self._were_exposed = False

    def expose(self, inode: Inode) -> int | None:
        """As ``Target.expose``, of a region that the caller is inside."""
        storage = self._state.storage
        if not storage.shares_writes or storage.write_waits:
            return None
        with self._state.lock:
            if self._sharing.excluded or inode.exposed is not None:
                return None
        if len(self._exposed) >= descriptors.limit() // _PART:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        place = storage.share(inode.rid, writable=True, holder=KERNEL)
        if place is None:
            return None
        if place.segment or place.offset or place.room is not None:
            os.close(place.fd)
            return None
        with self._state.lock:
            exposed = Exposed(inode, place.fd, self._state.catalogue, storage.grew, storage.wrote)
            inode.exposed = self._exposed[inode.rid] = exposed
            self._were_exposed = True
            self._sharing.exclude(True)
        return place.fd

    def conceal(self, region: RegionID) -> None:
        """Nothing uses an exposed region's descriptor any more; it is closed.

        Programs that have mapped its file meanwhile may go on writing there.
        """
        with self._state.lock:
            exposed = self._exposed.pop(region, None)
            self._sharing.exclude(bool(self._exposed))
            if exposed is not None:
                exposed.end()

    def merge_all_writes(self, *, thorough: bool = False) -> None:
        """Take over what became of all exposed regions; the lock is held."""
        for exposed in self._exposed.values():
            exposed.merge_writes(thorough=thorough)

    def sync(self) -> None:
        """Persist what was written to exposed regions, also by mappings of their files."""
        if self._were_exposed:
            self._state.storage.sync_found()

    def close(self) -> None:
        """Close the descriptors."""
        for exposed in self._exposed.values():
            os.close(exposed.fd)
        self._exposed.clear()
