"""The interface that every storage implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple

from warabi import errors
from warabi.backends.xattr_times import Times
from warabi.metadata.inode import Inode
from warabi.region import RegionID

_PIECE = 1 << 20
_ZEROS = memoryview(bytes(_PIECE))
THIS_PROCESS: Final = 0
STRANGERS: Final = -1
KERNEL: Final = -2
"""Holders of shared memory or files other than guests, which are identified by numbers: this
process itself, processes whose end is not reported, and the kernel, which accesses the data of a
region that is exposed to a mount and needs a file that ends where the region does."""


class Location(NamedTuple):
    """Where a region's data are, for another process with direct access.

    Attributes:
        fd: a descriptor; the caller closes it.
        offset: of the region's first byte in it.
        room: bytes from there on that belong to the region, also when it grows; None if the
            descriptor belongs to the region alone, and grows with it.
        segment: a number that identifies a descriptor shared by several regions; 0 for the region's
            own, and negative for one that is sent each time, to be used by system calls.
        mapped: whether to map it; otherwise it is used by system calls.
    """

    fd: int
    offset: int
    room: int | None
    segment: int
    mapped: bool


class Fresh(ABC):
    """The data of a region that is about to be created."""

    @abstractmethod
    def become(self, rid: RegionID) -> None:
        """Create region *rid* with these data, as :meth:`Storage.create`."""

    @abstractmethod
    def discard(self) -> None:
        """Free the memory, unless it became a region."""


class Storage(ABC):
    """Stores the data of regions, by ID.  Synchronous and thread-safe, without policy.

    The caller (:class:`warabi.target.target.Target`) has checked every ID and every extent, runs
    reads and writes of a region concurrently, but never ``resize``, ``erase`` or ``write_beyond``
    concurrently with any other call for that region.

    New bytes, of a new region or of one that grew, read as zero.

    I/O errors are raised as ``StorageError``, lack of space as ``StorageFull``, missing data as
    ``CorruptTarget``.
    """

    instead: Mapping[str, Any] = MappingProxyType({})
    """Settings in effect that differ from those with which it was opened."""

    blocking: ClassVar[bool]
    """Whether calls may wait for a device slower than memory, so that an event loop must not
    call."""

    write_waits: bool = False
    """Whether ``write`` itself waits for stable storage, and not only ``persist``."""

    shares_writes: bool = True
    """Whether another process may write to the location that ``share`` returns."""

    @abstractmethod
    def create(self, rid: RegionID, size: int) -> None:
        """Create a region of *size* zero bytes."""

    def packs(self, size: int) -> bool:
        """Whether to create a region of *size* bytes, not yet visible to clients, in a pack."""
        return False

    def written(self, data: memoryview) -> Fresh | None:
        """Return *data* as the contents of a new region, if that is faster than creating a region
        and writing; otherwise None."""
        return None

    def cleared(self, size: int, holder: int) -> Fresh | None:
        """Return *size* zero bytes for a new region in memory that *holder*, which will access it
        directly, can fill faster than other memory; None if there is none."""
        return None

    def retire(self, inode: Inode) -> None:  # noqa: B027  # most find data without the catalogue
        """Called before the catalogue drops a region whose data remain until :meth:`erase`."""

    @abstractmethod
    def erase(self, rid: RegionID) -> None:
        """Free a region's data."""

    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]:
        """Call :meth:`erase` for each; yields those for which it must be retried, with the
        error."""
        for rid in rids:
            try:
                self.erase(rid)
            except errors.Exception as error:
                yield rid, error

    @abstractmethod
    def resize(self, rid: RegionID, size: int) -> None:
        """Grow or shrink to *size* bytes."""

    @abstractmethod
    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        """Fill *out* from *offset*."""

    @abstractmethod
    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        """The same as ``read_into``, but raises ``WouldBlock`` instead of waiting; *out* is
        undefined then."""

    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None:
        """Return *size* bytes at *offset* in place, valid until the region is resized or erased.

        None if they are not in memory of this process, or would have to be allocated.  Use system
        calls to write to a writable view: they fail where a store would kill the process.
        """
        return None

    @abstractmethod
    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*."""

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """The same as ``write`` for data that end beyond the region, which grows to hold them."""
        self.resize(rid, offset + len(data))
        self.write(rid, offset, data)

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:  # noqa: B027
        """Allocate the space of *size* bytes at *offset*, so that writes there cannot fail for lack
        of it; no byte changes.  The extent may end beyond the region, whose size stays the same,
        unless :meth:`moves` is true of that end.

        The default does nothing, for storages that allocate all of a region when it is made.

        Raises:
            StorageFull: there is not enough space.
            PathError: ``EOPNOTSUPP``, the file system cannot allocate in advance.
        """

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        """Zero *size* bytes at *offset*, and free their space where possible; without *free* their
        space is allocated, as by :meth:`allocate`."""
        for start in range(offset, offset + size, _PIECE):
            self.write(rid, start, _ZEROS[: offset + size - start])

    def space(self, rid: RegionID, size: int) -> int:
        """Bytes of storage that a region of *size* bytes uses.  Quick: an event loop calls it."""
        return size

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        """The first offset from *offset* on, before *end*, at which there is data, or with *hole* a
        hole; *end* if there is none.  Data may be reported where there is a hole, but not the
        reverse."""
        return end if hole else offset

    def leaves_holes(self, size: int) -> bool:
        """Whether a region of *size* bytes uses no space for those that were never written."""
        return False

    def moves(self, rid: RegionID, size: int) -> bool:
        """Whether growing to *size* bytes would move the region's data."""
        return False

    @abstractmethod
    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        """Resize to a new location, whatever the size.

        The old location stays unchanged, and is not reused, until the returned function is called.
        """

    def check(self, rid: RegionID, size: int) -> None:  # noqa: B027  # not every device can lose data
        """Raise ``CorruptTarget`` if less than *size* bytes of the region exist.

        Called before the region is resized, which would replace missing data by zeros.
        """

    def clone(self, rid: RegionID, copy: RegionID, size: int) -> None:
        """Create *copy* from the first *size* bytes of a region that is not being written."""
        self.create(copy, size)
        self.copy_range(rid, 0, copy, 0, size)

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        """Copy *size* bytes at *start* of the region *source* to *offset* of *rid*.

        *source* is not written meanwhile.  *rid* is another region, or the same one if the extents
        do not overlap.  Holes are preserved.
        """
        buffer = memoryview(bytearray(min(size, _PIECE)))
        at, end, shift = start, start + size, offset - start
        while at < end:
            data = self.seek(source, at, end, hole=False)
            if data > at:
                self.zero(rid, at + shift, data - at, free=True)
            at = data
            end_of_data = self.seek(source, at, end, hole=True)
            while at < end_of_data:
                piece = buffer[: end_of_data - at]
                self.read_into(source, at, piece)
                self.write(rid, at + shift, piece)
                at += len(piece)

    def attests(self, inode: Inode, size: int) -> bool:
        """Whether it is known that more than *size* bytes of a region were on stable storage."""
        return False

    def run_deferred(self) -> None:  # noqa: B027  # most have no deferred work
        """Do deferred work; called periodically, before a commit."""

    def keep_times(self, rid: RegionID, times: Times) -> bool:
        """Store a region's times where ``persist`` with *times* makes them durable.

        Returns:
            False, without effect, if that is not supported.
        """
        return False

    def kept_times(self, rid: RegionID) -> Times | None:
        """Return the times that ``keep_times`` stored last, if known."""
        return None

    @abstractmethod
    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        """Return when the extent, and the region's existence, are on stable storage; with *times*,
        for a whole region, also its stored times."""

    @abstractmethod
    def persist_all(self) -> None:
        """Return when everything written before the call is on stable storage."""

    def vacate(self, rid: RegionID) -> None:
        """Free the data of a region that is about to be erased, even if other processes hold a
        descriptor of its location."""
        self.resize(rid, 0)

    @abstractmethod
    def persist_names(self) -> None:
        """Return when the existence of every region is on stable storage, whatever its contents."""

    @abstractmethod
    def oldest_fresh(self) -> RegionID | None:
        """Return the oldest of the regions that may cease to exist after a power failure."""

    @abstractmethod
    def sync_found(self) -> None:
        """After a crash: return when everything found is on stable storage."""

    def found(self, inode: Inode) -> bool:
        """After a crash: whether data of a region that :meth:`scan` did not yield exist."""
        return False

    def tidy(self, attests: Callable[[Inode, int], bool]) -> bool:
        """After a crash, when the regions are known: remove unused data that :meth:`scan` did not
        yield, and accept the rest except where *attests* disproves it.

        Returns:
            whether there was any.
        """
        return False

    @abstractmethod
    def wrote(self, rid: bytes) -> None:
        """Record that another process wrote to the location that :meth:`share` returned."""

    def grew(self, rid: bytes, size: int) -> None:  # noqa: B027  # most query the size each time
        """Record that another process made the region grow within its shared location."""

    @abstractmethod
    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        """Return the location of the region's data for another process; None: no direct access.

        *holder* is the guest, or one of the constants above.  No process that gets a location can
        truncate memory that another one has mapped.
        """

    def left(self, holder: int) -> None:  # noqa: B027  # most do not track guests
        """Record that a guest creates no more regions, though it may still access some."""

    def metadata_durable(self, rid: RegionID) -> bool:
        """Whether syncing the descriptor that :meth:`share` returned persists the region, and this
        storage notices by itself if that fails."""
        return False

    def charge(self, count: int) -> None:  # noqa: B027  # most keep nothing in memory
        """Reserve *count* bytes of memory for another user of it, such as the catalogue.

        Raises:
            StorageFull: there is too little memory.
        """

    def statistics(self) -> dict[str, int]:
        """Return numbers for monitoring: ``open_files``, cached descriptors, and ``file_opens``,
        how many were opened so far, if it caches descriptors."""
        return {}

    @abstractmethod
    def room(self) -> tuple[int, int]:
        """Return total and available bytes of the storage."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[RegionID, int]]:
        """Yield ID and size in bytes of everything stored, catalogued or not."""

    @abstractmethod
    def close(self) -> None:
        """Close descriptors and mappings.  Never deletes anything persistent."""

    @abstractmethod
    def destroy(self) -> None:
        """Delete everything stored, and close."""
