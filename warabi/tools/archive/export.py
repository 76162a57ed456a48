"""Export of a target to a tar archive, streamed.

Every name is a member, in pax format, that any tar can extract; the record ``WARABI.entry`` of its
header has the complete entry (:class:`warabi.target.entries.ArchiveEntry`).  Regions with holes are
members in GNU tar's sparse format 1.0, whose data begin with a list of extents.  The last member
has the number of members and the SHA-256 of their entries and data, so that truncation and damage
are detected.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable
from typing import IO, Protocol

from warabi._core import extents
from warabi._core.extents import Extent
from warabi.in_process.link import Link
from warabi.region import RegionID
from warabi.target.entries import CHUNK, ArchiveEntry, unpack_all

FORMAT = 3
"""Of archives that are written; 1, without holes, can be read."""
ENTRY, HEAD, TAIL = "WARABI.entry", "WARABI.archive", "WARABI.end"
_BLOCK = 512
_RECORD = 10_240  # tar pads archives to a multiple of this
_HOLES = 64 * 1024
"""Bytes of holes from which on a region is stored without them."""
_MOST_EXTENTS = 1 << 18
"""Extents of data of a region that are looked for; the rest is taken for data."""
_KINDS = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}  # sockets, which tar does not support, become empty files


class Sink(Protocol):
    def write(self, data: bytes | memoryview, /) -> object: ...


class Digest:
    """The number of members, and the SHA-256 of an archive."""

    def __init__(self) -> None:
        self.members = 0
        self._hash = hashlib.sha256()

    def entry(self, packed: bytes, size: int) -> None:
        """Add a member: its entry, and the size of its data."""
        self.members += 1
        self._hash.update(b"%d %d " % (len(packed), size) + packed)

    def data(self, piece: memoryview) -> None:
        self._hash.update(piece)

    def tail(self) -> str:
        """Return the contents of the last member."""
        return json.dumps({"members": self.members, "sha256": self._hash.hexdigest()})


def export(
    link: Link, out: Sink, *, copying: bool, advance: Callable[[int], None] = lambda count: None
) -> int:
    """Write the whole target to *out*; returns the number of members.

    The names and the set of regions are a snapshot.  With *copying*, which is needed while other
    clients may write, each region's data are a later snapshot.  *advance* is called with the number
    of bytes written.
    """
    listing = link.call("survey")
    try:
        with tempfile.TemporaryFile() as spool:
            _fetch(link, listing.region, (0, listing.size), spool.write)
            spool.seek(0)
            return _Writer(link, out, copying, advance).run(spool)
    finally:
        link.call("unpin", listing.ino, 1)


def _fetch(
    link: Link, region: RegionID, extent: Extent, write: Callable[[memoryview], object]
) -> None:
    start, size = extent
    buffer = memoryview(bytearray(min(size, CHUNK)))
    for offset in range(0, size, CHUNK):
        piece = buffer[: size - offset]
        link.read_into(region, start + offset, piece)
        write(piece)


def extents_text(listed: list[Extent]) -> bytes:
    """Return the list of extents with which the data of a sparse member begin."""
    numbers = [len(listed), *(number for extent in listed for number in extent)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + bytes(-len(text) % _BLOCK)


def _data_extents(link: Link, region: RegionID, size: int) -> list[Extent] | None:
    """Return the extents of data of a region; None if its holes are not worth leaving out."""
    found: list[Extent] = []
    end = 0
    while size >= _HOLES and end < size and len(found) < _MOST_EXTENTS:
        start = link.call("seek", region, end, False)
        if start is None:
            break
        end = link.call("seek", region, start, True) or size
        found.append((start, end - start))
    else:
        if end < size:
            found.append((end, size - end))
    return found if size - extents.total(found) >= _HOLES else None


class _Writer:
    def __init__(
        self, link: Link, out: Sink, copying: bool, advance: Callable[[int], None]
    ) -> None:
        self._link = link
        self._out = out
        self._copying = copying
        self._advance = advance
        self._written = 0
        self._digest = Digest()
        self._first: dict[int, str] = {}  # the first name of each inode with several names

    def run(self, listing: IO[bytes]) -> int:
        uuid = str(self._link.call("uuid"))
        head = {"format": FORMAT, "uuid": uuid}
        self._write(tarfile.TarInfo.create_pax_global_header({HEAD: json.dumps(head)}))
        for entry in unpack_all(listing):
            self._member(entry)
        tail = self._digest.tail()
        text = f"The end of an archive that warabi export made: {tail}\n".encode()
        info = tarfile.TarInfo(f".warabi-export-{uuid}")
        info.size = len(text)
        info.pax_headers = {TAIL: tail}
        self._header(info)
        self._data(memoryview(text))
        self._pad(_BLOCK)
        self._write(bytes(2 * _BLOCK))
        self._pad(_RECORD)
        return self._digest.members

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._written += len(data)

    def _header(self, info: tarfile.TarInfo) -> None:
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _data(self, piece: memoryview) -> None:
        self._write(piece)
        self._digest.data(piece)

    def _pad(self, block: int) -> None:
        self._write(bytes(-self._written % block))

    def _member(self, entry: ArchiveEntry) -> None:
        if not entry.is_region or entry.row.ino in self._first:
            self._begin(entry.changed(size=0) if entry.is_region else entry)
            return
        if not self._copying:
            self._region(entry, entry.region)
            return
        copy = self._link.call("copy", entry.region)
        try:
            times = {"atime": copy.atime_ns, "mtime": copy.mtime_ns, "ctime": copy.ctime_ns}
            self._region(entry.changed(size=copy.size, **times), copy.region)
        finally:
            self._link.call("unpin", copy.ino, 1)

    def _region(self, entry: ArchiveEntry, place: RegionID) -> None:
        size = entry.row.size
        found = _data_extents(self._link, place, size)
        if found is None:
            self._begin(entry)
            _fetch(self._link, place, (0, size), self._region_data)
        else:
            if not found or sum(found[-1]) < size:
                found.append((size, 0))  # as GNU tar has it where a hole is at the end
            text = extents_text(found)
            self._begin(entry, len(text) + extents.total(found))
            self._data(memoryview(text))
            for extent in found:
                _fetch(self._link, place, extent, self._region_data)
        self._pad(_BLOCK)

    def _region_data(self, piece: memoryview) -> None:
        self._data(piece)
        self._advance(len(piece))

    def _begin(self, entry: ArchiveEntry, stored: int | None = None) -> None:
        """Write the header of a member; *stored*: the bytes of a region without its holes."""
        packed = entry.pack()
        size = entry.row.size if entry.is_region else 0
        self._digest.entry(packed, size)
        name = os.fsdecode(entry.path) or "."
        info = tarfile.TarInfo(name)
        info.type = _KINDS.get(stat.S_IFMT(entry.row.mode), tarfile.REGTYPE)
        info.mode = stat.S_IMODE(entry.row.mode)
        info.uid, info.gid = entry.row.uid, entry.row.gid
        info.mtime = entry.row.mtime // 10**9
        info.size = size
        info.devmajor, info.devminor = os.major(entry.row.rdev), os.minor(entry.row.rdev)
        if entry.row.target is not None:
            info.linkname = os.fsdecode(entry.row.target)
        if entry.row.nlink > 1 and not stat.S_ISDIR(entry.row.mode):
            if entry.row.ino in self._first:
                info.type, info.linkname = tarfile.LNKTYPE, self._first[entry.row.ino]
            else:
                self._first[entry.row.ino] = name
        info.pax_headers = {
            "mtime": _seconds(entry.row.mtime),
            "atime": _seconds(entry.row.atime),
            **_schily(entry),
            ENTRY: base64.b64encode(packed).decode(),
        }
        if stored is not None:
            info.name, info.size = f"GNUSparseFile.0/{entry.row.ino}", stored
            info.pax_headers |= {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": name,
                "GNU.sparse.realsize": str(size),
            }
        self._header(info)


def _seconds(ns: int) -> str:
    whole, rest = divmod(abs(ns), 10**9)
    return f"{'-' if ns < 0 else ''}{whole}.{rest:09}"


def _schily(entry: ArchiveEntry) -> dict[str, str]:
    """Return extended attributes in the format of GNU tar, if it can express their names."""
    found = {}
    for name, value in entry.xattrs:
        if b"=" not in name and name.isascii():
            found[f"SCHILY.xattr.{name.decode()}"] = value.decode("utf-8", "surrogateescape")
    return found
