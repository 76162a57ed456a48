"""What a mount keeps of inodes that the kernel knows, and of what programs have open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from warabi._core.attributes import Attributes
from warabi.region import RegionID

_EXTENT = 512 * 1024
_TOLD_APART = 8192
_BEYOND = 1 << _TOLD_APART
"""The bit of all that comes after as many extents as are told apart."""


def _extents(offset: int, size: int) -> int:
    """The bits of the extents that have some of these bytes."""
    first = min(offset // _EXTENT, _TOLD_APART)
    last = min((offset + max(size, 1) - 1) // _EXTENT, _TOLD_APART)
    return (2 << last) - (1 << first)


@dataclass(slots=True)
class Known:
    """An inode that the kernel knows."""

    region: RegionID
    directory: bool
    count: int = 0
    held: int = 0  # pins that end when the kernel forgets
    aliased: bool = False  # the kernel has a name for it that spells its ID
    # Until when, on the monotonic clock, it counts as without CAPABILITY, and without set-ID bits.
    incapable: float = 0.0
    harmless: float = 0.0
    # Where the kernel may have pages of it, a bit for each extent of ``_EXTENT`` bytes.
    pages: int = 0
    # The size that the kernel takes it to have: what it was told, or has written since.
    size: int = 0
    # The kernel was told attributes since its last write past the page cache ended.
    believed: bool = False

    def note_attributes(self, attributes: Attributes) -> None:
        """The kernel is told these attributes."""
        self.size = attributes.size
        self.believed = True

    def fill_pages(self, offset: int, size: int) -> None:
        """The kernel reads or writes bytes by way of its page cache."""
        self.pages |= _extents(offset, size)

    def may_have_pages(self, offset: int, size: int) -> bool:
        """Whether the kernel may have pages in the extents of these bytes."""
        return bool(self.pages & _extents(offset, size))

    def drop_pages(self, offset: int, size: int) -> tuple[int, int]:
        """The kernel is about to be told to drop the pages with these bytes: from which byte on and
        how many it is to drop, so as to have none in their extents."""
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
        version: of the bytes that the page cache has not seen an older one of, once the kernel has
            taken note of the opening, as it has when it uses the file; None after that.
        failed_end: where writes past the page cache that failed would have ended at most, until the
            kernel has truncated the file after that; 0 when there were none.
    """

    ino: int
    region: RegionID
    version: int | None = None
    failed_end: int = 0


class Listing:
    """The positions of a directory's names: the cookie of position *i* is *i* + 3, after the dots.

    A cookie means one name for as long as the listing lives, wherever it is read again from, and
    whichever open directory it is given to.  Names get positions in the order in which they are
    met; as long as the directory does not change, that is the order of the names, and a list tells
    all.  From the first change on there is a dictionary, too, so that neither case takes longer in
    a larger directory.

    Attributes:
        names: by position; those that are gone keep theirs.
        openings: of the directory, which use it.
        length: entries that were met at most from the directory's start to its end.
    """

    __slots__ = ("_positions", "length", "names", "openings")

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self._positions: dict[bytes, int] | None = None
        self.openings = 0
        self.length = 0

    @property
    def in_order(self) -> bool:
        """Whether the positions are in the order of the names, none of which came later."""
        return self._positions is None

    def place(self, names: list[bytes], start: int) -> list[int]:
        """The positions of *names*, which follow the name at position *start* - 1."""
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
    """The listings of directories that are open, and of some that were: an NFS server opens a
    directory anew for each part of it.

    Args:
        spare: names, gone ones included, that may be remembered without being needed.
    """

    def __init__(self, spare: int) -> None:
        self._spare = spare
        self._listings: dict[int, Listing] = {}  # by inode
        self._closed: dict[int, Listing] = {}  # those that nobody has open, the oldest first
        self._closed_names = 0

    def open(self, ino: int) -> Listing:
        """The listing for another opening of a directory."""
        listing = self._listings.get(ino)
        if listing is None:
            listing = self._listings[ino] = Listing()
        if self._closed.pop(ino, None) is not None:
            self._closed_names -= len(listing.names)
        listing.openings += 1
        return listing

    def close(self, ino: int, listing: Listing) -> None:
        """An opening of the directory has ended."""
        listing.openings -= 1
        if listing.openings or self._listings.get(ino) is not listing:
            return
        self._closed[ino] = listing
        self._closed_names += len(listing.names)
        while self._closed_names > self._spare:
            self.forget(next(iter(self._closed)))

    def begin(self, ino: int, listing: Listing) -> Listing:
        """The listing to go on with where a directory is read from its start: a new one if the old
        one is mostly of names that are gone."""
        if len(listing.names) <= 2 * listing.length + self._spare:
            return listing
        self.close(ino, listing)
        if self._listings.get(ino) is listing:
            self.forget(ino)
        return self.open(ino)

    def forget(self, ino: int) -> None:
        """The directory is gone, or was not used for long: new openings begin a new listing."""
        self._listings.pop(ino, None)
        closed = self._closed.pop(ino, None)
        if closed is not None:
            self._closed_names -= len(closed.names)


@dataclass(slots=True)
class Directory:
    """An open directory.

    Attributes:
        listing: the positions of its entries.
        met: entries that were read since its start.
    """

    ino: int
    listing: Listing
    met: int = 0


class DirectoryEntry(NamedTuple):
    """A directory entry: *next_cookie* continues after it; dots are not counted as lookups."""

    name: bytes
    attributes: Attributes
    next_cookie: int

    @property
    def dot(self) -> bool:
        return self.name in (b".", b"..")


class Outdated(NamedTuple):
    """What the kernel must not believe any more.

    Attributes:
        inodes: and whether only their attributes are meant.
        names: directory and name, and the inode that the kernel was told, 0 when none is known.
    """

    inodes: dict[int, bool]
    names: dict[tuple[int, bytes], int]
