"""Import of an archive of ``export`` into a target, atomically."""

from __future__ import annotations

import base64
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, cast

from warabi._core.extents import Extent
from warabi.errors import BadArchive
from warabi.in_process.link import Link
from warabi.region import RegionID
from warabi.target.entries import CHUNK, ArchiveEntry, unpack
from warabi.tools.archive.export import ENTRY, FORMAT, HEAD, TAIL, Digest, extents_text

_TAIL_SIZE = 4096  # most bytes of the last member
_FORMATS = (1, 2, FORMAT)
_ENDS = 100  # reads at the end of an archive after which it is taken for truncated


def restore(
    link: Link, source: IO[bytes], *, new_ids: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> int:  # fmt: skip
    """Import the archive *source* into the target; returns the number of names.

    Names are created only when all data are on stable storage; if the import fails, nothing
    remains once the link is closed.  With *new_ids* regions get new IDs of the target.

    Raises:
        BadArchive: it is damaged, truncated, or not such an archive.
        InvalidRegion: the target has one of its IDs.
        PathError: EEXIST, the target has one of its names.
        StorageFull, StorageError: writing failed.
    """
    with tempfile.TemporaryFile() as listing:
        importer = _Importer(link, listing, new_ids, advance)
        try:
            importer.read(source)
        except BadArchive:
            raise
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadArchive(f"the archive is damaged or truncated: {error}") from error
        place = link.call("adopt", RegionID(), 0)
        listing.seek(0)
        offset = 0
        while piece := listing.read(CHUNK):
            link.write(place.region, offset, memoryview(piece), False, True)
            offset += len(piece)
        link.call("sync")
        names = link.call("graft", place.region)
        link.call("unpin", place.ino, 1)
        link.call("commit")
        return int(names)


class _Importer:
    def __init__(
        self, link: Link, listing: IO[bytes], new_ids: bool, advance: Callable[[int], None]
    ) -> None:
        self._link = link
        self._listing = listing
        self._new_ids = new_ids
        self._advance = advance
        self._digest = Digest()
        self._regions: dict[int, RegionID] = {}  # by slot, if there are several names
        self._buffer = memoryview(bytearray(CHUNK))

    def read(self, source: IO[bytes]) -> None:
        try:
            opened = tarfile.open(  # noqa: SIM115 - closed below
                fileobj=cast(IO[bytes], _Ending(source)), mode="r|", bufsize=1 << 20,
                encoding="utf-8", errors="surrogateescape",
            )  # fmt: skip
        except tarfile.ReadError as error:
            raise BadArchive(
                f"not a tar archive, or its first header is damaged ({error}); if it is compressed,"
                " decompress it first"
            ) from error
        with opened as tar:
            ended = False
            for member in _members(tar):
                if ended:
                    raise BadArchive("the archive has data after its end record")
                if self._digest.members == 0:
                    self._check_head(tar.pax_headers)
                ended = TAIL in member.pax_headers
                if ended:
                    self._check_tail(tar, member)
                else:
                    self._member(tar, member)
            if not ended:
                raise BadArchive("the archive is truncated: its end record is missing")

    @staticmethod
    def _check_head(headers: Mapping[str, str]) -> None:
        try:
            version = json.loads(headers[HEAD])["format"]
        except (KeyError, ValueError, TypeError):
            raise BadArchive("not an archive of warabi export") from None
        if version not in _FORMATS:
            raise BadArchive(
                f"the archive has format {version}, this version reads formats up to {FORMAT}"
            )

    def _check_tail(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.pax_headers[TAIL] != self._digest.tail():
            raise BadArchive("the archive is damaged: it does not match its end record")
        if member.size > _TAIL_SIZE or len(_content(tar, member).read()) != member.size:
            raise BadArchive("the archive is truncated within its end record")

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        try:
            packed = base64.b64decode(member.pax_headers[ENTRY], validate=True)
        except (KeyError, ValueError):
            raise BadArchive(f"{member.name!r}: not written by warabi export") from None
        entry = unpack(packed)
        size = member.size if member.isreg() else 0
        self._digest.entry(packed, size)
        if entry.is_region:
            entry = self._region(tar, member, entry, size)
        self._listing.write(entry.pack())

    def _region(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, entry: ArchiveEntry, size: int
    ) -> ArchiveEntry:
        region = self._regions.get(entry.row.ino)
        if region is None:
            if size != entry.row.size or not member.isreg():
                raise BadArchive(f"{entry.shown}: {size} bytes instead of {entry.row.size}")
            wanted = RegionID() if self._new_ids else entry.region
            region = self._link.call("adopt", wanted, size).region
            content = cast(IO[bytes], tar.fileobj)
            content.seek(member.offset_data)
            for extent in self._data_extents(member, entry):
                self._fill(region, extent, entry, content)
            if entry.row.nlink > 1:
                self._regions[entry.row.ino] = region
        return entry.changed(ino=region.slot, generation=region.generation)

    def _data_extents(self, member: tarfile.TarInfo, entry: ArchiveEntry) -> list[Extent]:
        """Return the extents whose data the archive has, one after another."""
        size = entry.row.size
        listed: list[Extent] | None = getattr(member, "sparse", None)  # not in typeshed as it is
        if listed is None:
            return [(0, size)]
        end = 0
        for offset, count in listed:
            if offset < end or count < 0 or offset + count > size:
                raise BadArchive(f"{entry.shown}: its list of extents is damaged")
            end = offset + count
        self._digest.data(memoryview(extents_text(listed)))
        return listed

    def _fill(
        self, region: RegionID, extent: Extent, entry: ArchiveEntry, source: IO[bytes]
    ) -> None:
        offset, left = extent
        while left:
            piece = self._buffer[: min(CHUNK, left)]
            have = 0
            while have < len(piece) and (read := source.read(len(piece) - have)):
                piece[have : have + len(read)] = read
                have += len(read)
            if have < len(piece):
                raise BadArchive(f"the archive is truncated within {entry.shown}")
            self._digest.data(piece)
            self._link.write(region, offset, piece, False, False)
            self._advance(len(piece))
            offset += len(piece)
            left -= len(piece)


class _Ending:
    """An archive that cannot be read for ever at its end, as tarfile does within a list of extents
    that is cut off."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._ends = 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._ends += not data
        if self._ends > _ENDS:
            raise EOFError("its end is missing")
        return data


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    if content is None:
        raise BadArchive(f"{member.name!r}: has no content")
    return content


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield every member without keeping it in memory: an archive may have millions."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # undocumented but stable for years
