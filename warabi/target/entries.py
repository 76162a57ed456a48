"""Entries of archives: an inode under one of its names, and their encoding.

A list of entries is a sequence of msgpack arrays.  It is transferred as the contents of a region
without a name, so no message limit applies, and it is removed with the requesting connection.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import msgpack

from warabi._core.attributes import Attributes
from warabi._core.log_limit import RateLimit
from warabi.errors import BadArchive
from warabi.metadata import domain
from warabi.region import RegionID

log = logging.getLogger(__name__)
log.addFilter(RateLimit())  # an archive may have millions of entries

CHUNK = 8 * 1024 * 1024
"""Bytes that are read or written at once."""


_LARGEST = 64 * 1024 * 1024  # most bytes of an entry, mostly extended attributes


class Readable(Protocol):
    """A source of entries."""

    def read(self, size: int, /) -> bytes: ...


class ArchiveEntry(NamedTuple):
    """One name of an inode; for a region without a name, its ID in hex.

    The root directory's path is empty, others are relative to it.  Names with the same slot refer
    to one inode; slot and generation are a region's ID.  Times in ns since the epoch.
    """

    path: bytes
    slot: int
    generation: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    anonymous: bool
    links: int
    target: bytes | None
    xattrs: list[tuple[bytes, bytes]]

    @property
    def region(self) -> RegionID:
        """The ID, if it is a region."""
        return RegionID.from_parts(self.slot, self.generation)

    @property
    def is_region(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def shown(self) -> str:
        """The path for a message."""
        return os.fsdecode(b"/" + self.path)

    @classmethod
    def of(
        cls, path: bytes, a: Attributes, *, anonymous: bool = False, target: bytes | None = None,
        xattrs: list[tuple[bytes, bytes]] | None = None,
    ) -> ArchiveEntry:  # fmt: skip
        """The entry of an inode with attributes *a*."""
        return cls(
            path, a.ino, a.generation, a.mode, a.uid, a.gid, a.rdev, a.size, a.atime_ns,
            a.mtime_ns, a.ctime_ns, anonymous, a.nlink, target, xattrs or [],
        )  # fmt: skip

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(tuple(self))
        return packed


_TYPES: tuple[Any, ...] = (bytes, *[int] * 10, bool, int, (bytes, type(None)), list)


def _log(text: str) -> None:
    log.warning("%s", text)


def _checked(item: Any, tell: Callable[[str], None]) -> ArchiveEntry:
    if not (
        isinstance(item, list)
        and len(item) == len(_TYPES)
        and all(isinstance(value, kind) for value, kind in zip(item, _TYPES, strict=True))
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(part, bytes) for part in pair)
            for pair in item[-1]
        )
    ):
        raise BadArchive(f"not an entry: {item!r:.100}")
    found = ArchiveEntry._make([*item[:-1], [(name, value) for name, value in item[-1]]])
    found = found._replace(
        atime_ns=domain.clamped(found.atime_ns),
        mtime_ns=domain.clamped(found.mtime_ns),
        ctime_ns=domain.clamped_change(found.ctime_ns),
    )
    row = domain.Row(
        found.slot, found.generation, found.mode, found.links, found.uid, found.gid, found.rdev,
        found.size, found.atime_ns, found.mtime_ns, found.ctime_ns, int(found.anonymous),
        found.target,
    )  # fmt: skip
    why = domain.fault(row)
    if why:
        row = domain.mended(row)
        if domain.fault(row):
            raise BadArchive(f"{found.shown}: invalid entry: {why}")
    mode, xattrs, faults = domain.mended_xattrs(row.mode, found.xattrs)
    if why or faults:
        faults = [why, *faults] if why else faults
        tell(
            f"{found.shown!a} has invalid values, which are replaced by the nearest valid ones:"
            f" {'; '.join(faults)!a}"
        )
        found = found._replace(
            mode=mode, uid=row.uid, gid=row.gid, rdev=row.rdev, size=row.size, links=row.nlink,
            target=row.target, xattrs=xattrs,
        )  # fmt: skip
    return found


def unpack(data: bytes, tell: Callable[[str], None] = _log) -> ArchiveEntry:
    """Decode an entry; raises ``BadArchive``.

    *tell* is called with a message if the entry had invalid values, which older versions accepted.
    """
    try:
        return _checked(msgpack.unpackb(data), tell)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadArchive(f"not an entry: {error}") from None


def unpack_all(file: Readable) -> Iterator[ArchiveEntry]:
    """Yield every entry in *file*; raises ``BadArchive``."""
    unpacker = msgpack.Unpacker(file, max_buffer_size=_LARGEST)
    try:
        for item in unpacker:
            yield _checked(item, _log)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadArchive(f"not a list of entries: {error}") from None


def unpack_again(file: Readable) -> Iterator[ArchiveEntry]:
    """Yield every entry in *file*, which contains only validated entries."""
    for item in msgpack.Unpacker(file, max_buffer_size=_LARGEST):
        yield ArchiveEntry._make([*item[:-1], [(name, value) for name, value in item[-1]]])
