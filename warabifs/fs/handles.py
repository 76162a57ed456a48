"""State of a mount: inodes that the kernel knows, open files and directory listings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from warabi._core.attributes import Attributes
from warabi.region import RegionID

_EXTENT = 512 * 1024
_TOLD_APART = 8192
_BEYOND = 1 << _TOLD_APART
"""The bit for everything after the first ``_TOLD_APART`` extents."""


def _extents(offset: int, size: int) -> int:
    """Return the bit mask of the extents that contain some of these bytes."""
    first = min(offset // _EXTENT, _TOLD_APART)
    last = min((offset + max(size, 1) - 1) // _EXTENT, _TOLD_APART)
    return (2 << last) - (1 << first)


@dataclass(slots=True)
class Known:
    """An inode that the kernel knows."""

    region: RegionID
    directory: bool
    count: int = 0
    held: int = 0  # pins that end when the kernel forgets the inode
    aliased: bool = False  # the kernel knows it by its ID name
    # Until when (monotonic clock) it is known to have no CAPABILITY, and no set-ID bits.
    incapable: float = 0.0
    harmless: float = 0.0
    # Where the kernel may have cached pages: one bit per extent of ``_EXTENT`` bytes.
    pages: int = 0
    # The size that the kernel has cached: from the last reply, or extended by its writes since.
    size: int = 0
    # The kernel received attributes since its last O_DIRECT write ended.
    believed: bool = False

    def note_attributes(self, attributes: Attributes) -> None:
        """Record that the kernel receives these attributes."""
        self.size = attributes.size
        self.believed = True

    def fill_pages(self, offset: int, size: int) -> None:
        """Record that the kernel reads or writes these bytes through its page cache."""
        self.pages |= _extents(offset, size)

    def may_have_pages(self, offset: int, size: int) -> bool:
        """Whether the kernel may have cached pages in the extents of these bytes."""
        return bool(self.pages & _extents(offset, size))

    def drop_pages(self, offset: int, size: int) -> tuple[int, int]:
        """Record that the kernel is about to drop the pages with these bytes.

        Returns:
            offset and size of the range to drop, so that it covers whole extents.
        """
        extents = _extents(offset, size)
        if extents & _BEYOND:
            return offset, size
        self.pages &= ~extents
        start = offset // _EXTENT * _EXTENT
        return start, (offset + size - start + _EXTENT - 1) // _EXTENT * _EXTENT


@dataclass(slots=True)
class File:
    """An open file.

    Attributes:
        version: the version of the bytes that the page cache will hold once the kernel has
            processed the reply to the open, which the first use of the file proves; then None.
        failed_end: the largest end offset of failed ``O_DIRECT`` writes for which the kernel has
            not yet truncated the file; 0 if there were none.
        pinned: whether the open file pins the inode; otherwise that the kernel knows it does.
    """

    ino: int
    region: RegionID
    version: int | None = None
    failed_end: int = 0
    pinned: bool = True


class Listing:
    """The positions of a directory's names, and what the kernel may have read of them.

    The cookie of position *i* is *base* + *i* + 3, after the dots.

    A cookie refers to one name for as long as the listing lives, in every open directory that uses
    it.  Names get positions in the order in which they are first read.  While the directory does
    not change, that is the order of the names, and a list is enough.  From the first change on a
    dictionary maps names to positions, so that neither case becomes slower in a larger directory.

    The kernel may keep the entries that it reads.  Once it has read the end, it returns them again
    for as long as it makes no change to the directory itself.  When another client changes a
    directory whose listing is *complete*, the kernel is made to drop the entries.  Before that, it
    may get entries from before the change after that notification; so it drops them at the end.

    Attributes:
        base: number of positions of the listings that this one replaces, so that the kernel does
            not take a cookie of theirs for one of this listing.
        names: by position; removed names keep theirs.
        openings: number of open directories that use it.
        length: the largest number of entries read in one pass over the directory.
        version: number of changes of the directory by other clients.
        read: the version of which the kernel may have the first entries; None if it has none.
        complete: whether the kernel may have all entries.
        kept_until: until when (monotonic clock) it may keep them.
    """

    __slots__ = (
        "_positions", "base", "complete", "kept_until", "length", "names", "openings", "read",
        "version",
    )  # fmt: skip

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.version = 0
        self.read: int | None = None
        self.complete = False
        self.kept_until = 0.0
        self.names: list[bytes] = []
        self._positions: dict[bytes, int] | None = None
        self.openings = 0
        self.length = 0

    @property
    def in_order(self) -> bool:
        """Whether the positions are in the order of the names: no name was added later."""
        return self._positions is None

    def change(self) -> bool:
        """Record that another client has changed the directory; returns whether the kernel has to
        drop its entries now."""
        self.version += 1
        dropped, self.complete = self.complete, False
        if dropped and not self.openings:
            self.read = None
        return dropped

    def end(self) -> bool:
        """Record that the kernel gets to the end; returns whether it may keep the entries."""
        self.complete = self.read == self.version
        if not self.complete:
            self.read = None
        return self.complete

    def place(self, names: list[bytes], start: int) -> list[int]:
        """Return the positions of *names*, which follow the name at position *start* - 1."""
        if self._positions is None:
            known = self.names[start : start + len(names)]
            if known == names[: len(known)]:
                self.names += names[len(known) :]
                return list(range(start, start + len(names)))
            self._positions = {name: position for position, name in enumerate(self.names)}
        found = []
        for name in names:
            position = self._positions.get(name)
            if position is None:
                position = self._positions[name] = len(self.names)
                self.names.append(name)
            found.append(position)
        return found


class Listings:
    """The listings of open directories, and of some closed ones: an NFS server opens a directory
    again for each part of a listing.

    Args:
        spare: most names, removed ones included, to keep for closed directories.
    """

    def __init__(self, spare: int) -> None:
        self._spare = spare
        self._listings: dict[int, Listing] = {}  # by inode
        self._closed: dict[int, Listing] = {}  # of directories that are not open, oldest first
        self._closed_names = 0

    def get(self, ino: int) -> Listing | None:
        """Return the listing of a directory, if the kernel has opened it lately."""
        return self._listings.get(ino)

    def open(self, ino: int) -> Listing:
        """Return the listing for a directory that is being opened."""
        listing = self._listings.get(ino)
        if listing is None:
            listing = self._listings[ino] = Listing()
        if self._closed.pop(ino, None) is not None:
            self._closed_names -= len(listing.names)
        listing.openings += 1
        return listing

    def close(self, ino: int, listing: Listing) -> None:
        """Record that an open directory was closed."""
        listing.openings -= 1
        if listing.openings or self._listings.get(ino) is not listing:
            return
        self._closed[ino] = listing
        self._closed_names += len(listing.names)
        while self._closed_names > self._spare:
            self.forget(next(iter(self._closed)))

    def begin(self, ino: int, listing: Listing) -> Listing:
        """Return the listing for reading a directory from its start: a new one if most names of the
        old one were removed."""
        if len(listing.names) <= 2 * listing.length + self._spare:
            return listing
        self.close(ino, listing)
        if self._listings.get(ino) in (listing, None):
            self.forget(ino)
            self._listings[ino] = Listing(listing.base + len(listing.names))
        return self.open(ino)

    def forget(self, ino: int) -> None:
        """Drop a listing: the directory was removed, or has not been used for long."""
        self._listings.pop(ino, None)
        closed = self._closed.pop(ino, None)
        if closed is not None:
            self._closed_names -= len(closed.names)


@dataclass(slots=True)
class Directory:
    """An open directory.

    Attributes:
        listing: the positions of its entries.
        met: number of entries read since its start.
    """

    ino: int
    listing: Listing
    met: int = 0


class ListedEntry(NamedTuple):
    """A directory entry; *next_cookie* continues after it.  The dots do not count as lookups."""

    name: bytes
    attributes: Attributes
    next_cookie: int

    @property
    def dot(self) -> bool:
        return self.name in (b".", b"..")


class Outdated(NamedTuple):
    """What the kernel must drop from its caches.

    Attributes:
        inodes: inode numbers, and whether only their attributes are outdated.
        names: directory and name, and the inode that the kernel has cached for it (0: unknown).
    """

    inodes: dict[int, bool]
    names: dict[tuple[int, bytes], int]
