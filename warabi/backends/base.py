"""The one interface that every storage implements."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol

from warabi import errors
from warabi.backends.xattr_times import Times
from warabi.errors import WouldBlock
from warabi.metadata.inode import Inode
from warabi.region import RegionID

if TYPE_CHECKING:
    from warabi.target.region_locks import Guard

THIS_PROCESS: Final = 0
STRANGERS: Final = -1
KERNEL: Final = -2
"""Holders of places, which otherwise are guests, by their numbers: this process itself, processes
whose end is not reported, and the kernel, which moves bytes of a region that is exposed to a mount
and needs a file that ends where the region does."""


class Location(NamedTuple):
    """Where a region's bytes are, for another process that may touch them itself.

    Attributes:
        fd: a descriptor; the caller closes it.
        offset: of the region's first byte in it.
        room: bytes from there on that belong to the region, also when it grows; None when the
            descriptor is the region's alone, which grows with it.
        segment: a number that names a descriptor shared by several regions; 0 for the region's own,
            and negative for one that is given each time, to be read and written by system calls.
        mapped: whether to map it; otherwise it is read and written by system calls.  Guests that do
            not know negative numbers map that, too.
        waits: whether writing waits for the medium.
    """

    fd: int
    offset: int
    room: int | None
    segment: int
    mapped: bool
    waits: bool = False


class Fresh(ABC):
    """The bytes of a region that is about to be made."""

    @abstractmethod
    def become(self, rid: RegionID) -> None:
        """As :meth:`Storage.create`, of these bytes."""

    @abstractmethod
    def discard(self) -> None:
        """Give them back, unless they became a region's."""


class StorageOwner(Protocol):
    """What a storage asks of the target that it belongs to."""

    @property
    def _storage_guard(self) -> Guard:
        """The target's lock, also while the target closes."""


class Flush(NamedTuple):
    """What is to be put on the medium: a file, or only its *data* as by fdatasync(2)."""

    fd: int
    data: bool

    def wait(self) -> None:
        """Return when it is there."""
        if self.data:
            os.fdatasync(self.fd)
        else:
            os.fsync(self.fd)


class Storage(ABC):
    """Bytes of regions, by ID.  Synchronous and thread-safe, without policy.

    The caller (:class:`warabi.target.target.Target`) has checked every ID and every extent, lets
    reads and writes of a region run side by side, and never runs ``resize``, ``erase``
    or ``write_beyond`` beside anything else on that region.

    Fresh bytes, of a new region or of one that grew, read as zero.

    Failures of the medium are raised as ``StorageError``, no room as ``StorageFull``, bytes that
    should exist and do not as ``CorruptTarget``.
    """

    instead: Mapping[str, Any] = MappingProxyType({})
    """Settings that it has instead of those that it was opened with."""

    blocking: ClassVar[bool]
    """Whether a call may wait for a medium slower than memory, so that an event loop must not."""

    write_waits: bool = False
    """Whether ``write`` itself waits for the medium, and not only ``persist``."""

    shares_writes: bool = True
    """Whether another process may write to the place that ``share`` gives."""

    @abstractmethod
    def create(self, rid: RegionID, size: int) -> None:
        """Make a region of *size* zero bytes."""

    def packs(self, size: int) -> bool:
        """Whether a new region of *size* bytes, that nobody knows yet, shall share a file."""
        return False

    def written(self, data: memoryview) -> Fresh | None:
        """*data* as the bytes of a new region, where that is quicker than to make one and to
        write; None where it is not."""
        return None

    def cleared(self, size: int, holder: int) -> Fresh | None:
        """*size* zero bytes of a new region, where *holder*, who is to be given their place, fills
        them more quickly than those of another one; None where that is not so."""
        return None

    def retire(self, inode: Inode) -> None:  # noqa: B027  # most need no row to find bytes by
        """The catalogue is about to forget a region whose bytes stay until :meth:`erase`."""

    @abstractmethod
    def erase(self, rid: RegionID) -> None:
        """Free a region's bytes."""

    def erase_all(self, rids: list[RegionID]) -> Iterator[tuple[RegionID, errors.Exception]]:
        """As :meth:`erase` of each; gives those that are to be erased again, and why."""
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
        """As ``read_into``; raises ``WouldBlock`` rather than wait, *out* then being undefined."""

    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None:
        """*size* bytes at *offset* where they are, until the region is resized or erased.

        None where they are in no memory that the process may touch, or it would have to be made.
        Who is to write there hands it to a system call, which fails where a store would kill.
        """
        return None

    @abstractmethod
    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """Store *data* at *offset*."""

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """As ``write``, of data that end beyond the region, which grows to hold them."""
        self.resize(rid, offset + len(data))
        self.write(rid, offset, data)

    def moves(self, rid: RegionID, size: int) -> bool:
        """Whether growing to *size* bytes would bring the region's bytes to another place."""
        return False

    @abstractmethod
    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        """As ``resize``, to another place, whatever the size.

        The place that the bytes had stays as it is, and is used for nothing else, until the
        returned function is called.
        """

    def check(self, rid: RegionID, size: int) -> None:  # noqa: B027  # not every medium can lose bytes
        """Raise ``CorruptTarget`` when less than *size* bytes, which the region has, are there.

        Called before the region changes its size, which would fill what is missing with zeros.
        """

    def clone(self, rid: RegionID, copy: RegionID, size: int) -> None:
        """Make *copy* of the first *size* bytes of a region that nobody writes."""
        self.create(copy, size)
        buffer = memoryview(bytearray(min(size, 1 << 20)))
        for offset in range(0, size, 1 << 20):
            piece = buffer[: size - offset]
            self.read_into(rid, offset, piece)
            self.write(copy, offset, piece)

    def attests(self, inode: Inode, size: int) -> bool:
        """Whether it is known that more than *size* bytes of a region were on the medium."""
        return False

    def settle(self) -> None:  # noqa: B027  # most put nothing off
        """Called from time to time, before a commit: do what was put off."""

    def keep_times(self, rid: RegionID, times: Times) -> bool:
        """Put a region's times where ``persist`` with *times* makes them durable, instead of what
        was there; False, and nothing done, where there is no such place."""
        return False

    def kept_times(self, rid: RegionID) -> Times | None:
        """What ``keep_times`` was told last, as far as it is known."""
        return None

    @abstractmethod
    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        """Return when the extent, and the region's existence, are on the medium; with *times*,
        for a whole region, what was kept of its times as well."""

    def flushing(self, rid: RegionID, *, times: bool) -> AbstractContextManager[Flush]:
        """As ``persist`` of the whole region, where one flush of a file is all that it takes: that
        is given, to be waited for within the block, which raises what comes of it.

        Raises:
            WouldBlock: it takes something else, too; nothing was done.
        """
        raise WouldBlock

    @abstractmethod
    def persist_all(self) -> None:
        """Return when everything written before the call is on the medium."""

    def vacate(self, rid: RegionID) -> None:
        """Give back what the bytes take of a region that is about to be erased, although others
        may hold a descriptor of their place."""
        self.resize(rid, 0)

    @abstractmethod
    def persist_names(self) -> None:
        """Return when the existence of every region is on the medium, whatever is in it."""

    @abstractmethod
    def oldest_fresh(self) -> RegionID | None:
        """The region created first of those that may cease to exist when the power fails."""

    @abstractmethod
    def sync_found(self) -> None:
        """After a crash: return when all that was found, whoever wrote it, is on the medium."""

    def found(self, inode: Inode) -> bool:
        """After a crash: whether bytes of a region that :meth:`scan` did not give are there."""
        return False

    def tidy(self, attests: Callable[[Inode, int], bool]) -> bool:
        """After a crash, when it is known which regions there are: remove what nobody has of what
        :meth:`scan` did not give, and believe the rest but for what *attests*, as :meth:`attests`,
        disproves; whether there was such a thing."""
        return False

    @abstractmethod
    def wrote(self, rid: bytes) -> None:
        """Another process wrote to the place that :meth:`share` gave."""

    def grew(self, rid: bytes, size: int) -> None:  # noqa: B027  # most ask the medium each time
        """Another process made the region grow by the place that :meth:`share` gave."""

    @abstractmethod
    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        """Where the region's bytes are, for another process; None when it may not touch them.

        *holder* is the guest, or one of the constants above.  No process that gets a place can make
        memory shorter that another one has mapped.
        """

    def left(self, holder: int) -> None:  # noqa: B027  # most do not care who it was
        """A guest makes no regions any more, whatever it may still touch."""

    def firm(self, rid: RegionID) -> bool:
        """Whether who syncs the descriptor that :meth:`share` gave has persisted the region, and
        this storage hears of it by itself when that fails."""
        return False

    def charge(self, count: int) -> None:  # noqa: B027  # most keep nothing in memory
        """Something else, such as the catalogue, is about to take *count* bytes of memory, which
        the storage shares with it.

        Raises:
            StorageFull: they do not fit.
        """

    @abstractmethod
    def room(self) -> tuple[int, int]:
        """Total and available bytes of the medium."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[RegionID, int]]:
        """ID and size in bytes of everything stored, catalogued or not."""

    @abstractmethod
    def close(self) -> None:
        """Let go of descriptors and mappings.  Never deletes what outlives a process."""

    @abstractmethod
    def destroy(self) -> None:
        """Delete everything stored, and close."""
