"""What a mount keeps of inodes that the kernel knows, and of what programs have open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from warabi.inode import Attributes
from warabi.region import RegionID


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


@dataclass(slots=True)
class File:
    """An open file.

    Attributes:
        version: of the bytes that the page cache has not seen an older one of, once the kernel has
            taken note of the opening, as it has when it uses the file; None after that.
    """

    ino: int
    region: RegionID
    version: int | None = None


@dataclass(slots=True)
class Directory:
    """An open directory; the cookie of entry *i* is *i* + 3, after the two dots.

    A cookie means one name for as long as the directory is open, wherever it is read again from.
    """

    ino: int
    names: list[bytes] = field(default_factory=list)
    positions: dict[bytes, int] = field(default_factory=dict)  # of some names

    def place(self, names: list[bytes], start: int) -> list[int]:
        """The positions of *names*, which were read after the first *start*."""
        if start == len(self.names):
            self.names += names
            return list(range(start, len(self.names)))
        # Read again: what was seen keeps its position, and what was not gets a new one.
        if len(self.positions) < len(self.names):
            self.positions = {name: position for position, name in enumerate(self.names)}
        for name in names:
            if name not in self.positions:
                self.positions[name] = len(self.names)
                self.names.append(name)
        return [self.positions[name] for name in names]


class Entry(NamedTuple):
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
