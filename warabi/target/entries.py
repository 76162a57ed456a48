"""Entries of archives: an inode under one of its names, and their encoding.

A list of entries is a sequence of msgpack arrays.  It is transferred as the contents of a region
without a name, so no message limit applies, and it is removed with the requesting connection.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import msgpack

from warabi.errors import BadArchive
from warabi.metadata import domain
from warabi.region import RegionID

CHUNK = 8 * 1024 * 1024
"""Bytes that are read or written at once."""


_LARGEST = 64 * 1024 * 1024  # most bytes of an entry, mostly extended attributes


class Readable(Protocol):
    """A source of entries."""

    def read(self, size: int, /) -> bytes: ...


class ArchiveEntry(NamedTuple):
    """One name of an inode; for a region without a name, its ID in hex.

    The root directory's path is empty, others are relative to it.  Names with the same slot, which
    is ``ino`` of the row, refer to one inode; slot and generation are a region's ID.
    """

    path: bytes
    row: domain.Row
    xattrs: list[tuple[bytes, bytes]]

    @property
    def region(self) -> RegionID:
        """The ID, if it is a region."""
        return RegionID.from_parts(self.row.ino, self.row.generation)

    @property
    def is_region(self) -> bool:
        return stat.S_ISREG(self.row.mode)

    @property
    def shown(self) -> str:
        """The path for a message."""
        return os.fsdecode(b"/" + self.path)

    def changed(self, **values: Any) -> ArchiveEntry:
        """The entry with other *values* in its row."""
        return self._replace(row=self.row._replace(**values))

    def pack(self) -> bytes:
        row = self.row
        packed: bytes = msgpack.packb((
            self.path, row.ino, row.generation, row.mode, *row[4:11], bool(row.anonymous),
            row.nlink, row.target, self.xattrs, row.btime, row.flags,
        ))  # fmt: skip
        return packed


_TYPES: tuple[Any, ...] = (bytes, *[int] * 10, bool, int, (bytes, type(None)), list, int, int)
"""The values that :meth:`ArchiveEntry.pack` packs."""


def _unpacked(item: Any) -> ArchiveEntry:
    path, ino, generation, mode, *numbers, anonymous, nlink, target, xattrs, btime, flags = item
    row = domain.Row._make(
        (ino, generation, mode, nlink, *numbers, int(anonymous), target, btime, flags, 0)
    )
    return ArchiveEntry(path, row, [(name, value) for name, value in xattrs])


def _checked(item: Any) -> ArchiveEntry:
    if isinstance(item, list) and len(item) == len(_TYPES) - 2:  # of a target up to schema 4
        item += [0, 0]
    if not (
        isinstance(item, list)
        and len(item) == len(_TYPES)
        and all(isinstance(value, kind) for value, kind in zip(item, _TYPES, strict=True))
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(part, bytes) for part in pair)
            for pair in item[-3]
        )
    ):
        raise BadArchive(f"not an entry: {item!r:.100}")
    found = _unpacked(item)
    row = found.row._replace(
        atime=domain.clamped(found.row.atime),
        mtime=domain.clamped(found.row.mtime),
        ctime=domain.clamped_change(found.row.ctime),
        btime=domain.clamped(found.row.btime),
    )
    for why in (domain.fault(row), *(domain.xattr_fault(*pair) for pair in found.xattrs)):
        if why:
            raise BadArchive(f"{found.shown!a}: invalid entry: {why!a}")
    return found._replace(row=row)


def unpack(data: bytes) -> ArchiveEntry:
    """Decode an entry; raises ``BadArchive``."""
    try:
        return _checked(msgpack.unpackb(data))
    except (ValueError, msgpack.UnpackException) as error:
        raise BadArchive(f"not an entry: {error}") from None


def unpack_all(file: Readable) -> Iterator[ArchiveEntry]:
    """Yield every entry in *file*; raises ``BadArchive``."""
    unpacker = msgpack.Unpacker(file, max_buffer_size=_LARGEST)
    try:
        for item in unpacker:
            yield _checked(item)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadArchive(f"not a list of entries: {error}") from None


def unpack_again(file: Readable) -> Iterator[ArchiveEntry]:
    """Yield every entry in *file*, which contains only validated entries."""
    for item in msgpack.Unpacker(file, max_buffer_size=_LARGEST):
        yield _unpacked(item)
