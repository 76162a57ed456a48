"""The one interface that every storage implements."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from warabi.region import RegionID


class Storage(ABC):
    """Bytes of regions, by ID.  Synchronous and thread-safe, without policy.

    The caller (:class:`warabi.target.Target`) has checked every ID and every extent, lets reads
    and writes of a region run side by side, and never runs ``resize``, ``erase``
    or ``write_beyond`` beside anything else on that region.

    Fresh bytes, of a new region or of one that grew, read as zero.

    Failures of the medium are raised as ``StorageError``, no room as ``StorageFull``, bytes that
    should exist and do not as ``CorruptTarget``.
    """

    blocking: ClassVar[bool]
    """Whether a call may wait for a medium slower than memory, so that an event loop must not."""

    write_waits: bool = False
    """Whether ``write`` itself waits for the medium, and not only ``persist``."""

    @abstractmethod
    def create(self, rid: RegionID, size: int) -> None:
        """Make a region of *size* zero bytes."""

    @abstractmethod
    def erase(self, rid: RegionID) -> None:
        """Free a region's bytes."""

    @abstractmethod
    def resize(self, rid: RegionID, size: int) -> None:
        """Grow or shrink to *size* bytes."""

    @abstractmethod
    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        """Fill *out* from *offset*."""

    @abstractmethod
    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        """As ``read_into``; raises ``WouldBlock`` rather than wait, *out* then being undefined."""

    @abstractmethod
    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """Store *data* at *offset*."""

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        """As ``write``, of data that end beyond the region, which grows to hold them."""
        self.resize(rid, offset + len(data))
        self.write(rid, offset, data)

    @abstractmethod
    def persist(self, rid: RegionID, offset: int, size: int) -> None:
        """Return when the extent, and the region's existence, are on the medium."""

    @abstractmethod
    def persist_all(self) -> None:
        """Return when everything written before the call is on the medium."""

    @abstractmethod
    def view(self, rid: RegionID) -> memoryview | None:
        """The region's bytes themselves, where the storage is byte-addressable, else None."""

    @abstractmethod
    def share(self, rid: RegionID) -> int | None:
        """A descriptor, owned by the storage, that another process may map, or None."""

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


def pread_full(fd: int, out: memoryview, offset: int, flags: int = 0) -> int:
    """Fill *out* from *offset* of *fd*; returns how many bytes, fewer only at the file's end."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:] if done else out], offset + done, flags)
        if count == 0:
            break
        done += count
    return done


def pwrite_full(fd: int, data: memoryview, offset: int) -> None:
    """Write all of *data* at *offset* of *fd*."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
