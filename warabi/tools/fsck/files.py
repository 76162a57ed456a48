"""Consistency of the files of regions with the rows of the catalogue."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from warabi.backends import xattr_times as filetimes
from warabi.backends.pack_format import (
    PACK,
    RECORD,
    RECORDS,
    SLOT,
    SLOTS,
    forget,
    is_pack,
    recorded,
    slots_of,
)
from warabi.metadata.checksums import BLOCK
from warabi.metadata.domain import SEQUENCE, Row
from warabi.metadata.inode import MOVED, OWN, PACKED
from warabi.metadata.journal import sync_directory
from warabi.metadata.schema import COLUMNS
from warabi.region import RegionID
from warabi.tools.fsck.report import LostFound, Report
from warabi.tools.fsck.tree import TreeCheck

_SHARD = re.compile("[0-9a-f]{2}")
_NAME = re.compile("[0-9a-f]{32}")
_IS_REGION = f"mode & {0o170000} = {stat.S_IFREG}"


class RegionFile(NamedTuple):
    """A file with the name of a region."""

    rid: RegionID
    path: Path
    info: os.stat_result


def region_files(regions: Path) -> Iterator[RegionFile]:
    """Yield every file below *regions* with the name of a region."""
    for shard in sorted(regions.iterdir()):
        if not _SHARD.fullmatch(shard.name) or not shard.is_dir():
            continue
        for file in sorted(shard.iterdir()):
            if _NAME.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                yield RegionFile(RegionID(bytes.fromhex(file.name)), file, file.stat())


def place(regions: Path, rid: RegionID) -> Path:
    """Return the path of a region's file."""
    name = rid.hex()
    return regions / name[-2:] / name


class FileCheck:
    """Checks, and if the report allows it repairs, consistency of rows and files of regions."""

    def __init__(
        self, db: sqlite3.Connection, regions: Path, report: Report, lost: LostFound,
        tree: TreeCheck, *, clean: bool, sums: bool,
    ) -> None:  # fmt: skip
        self._db = db
        self._regions = regions
        self._report = report
        self._lost = lost
        self._tree = tree
        self._clean = clean
        self._sums = sums

    def run(self) -> None:
        self._db.execute("CREATE TEMP TABLE present(ino INTEGER PRIMARY KEY)")
        moved = set()
        for found in region_files(self._regions):
            file = self._at_its_place(found)
            if file is None or file.path in moved:
                continue
            if file is not found:
                moved.add(file.path)  # the iteration may yield it once more
            if is_pack(file.rid):
                self._pack(file)
                continue
            row = self._db.execute(
                f"SELECT size, packed FROM inode WHERE ino = ? AND generation = ? AND {_IS_REGION}",
                _parts(file.rid),
            ).fetchone()
            if row is None:
                self._without_row(file)
                continue
            self._db.execute("INSERT OR IGNORE INTO present VALUES(?)", (file.rid.slot,))
            if row[1] == PACKED:
                self._moved(file.rid)
            if row[0] != file.info.st_size:
                self._size(file, row[0])
            if not self._clean and (times := filetimes.get(str(file.path))) is not None:
                self._times(file.rid, *times)
        self._missing()

    def _pack(self, file: RegionFile) -> None:
        """Check that regions in a pack have their data, and match its records."""
        slots, end = slots_of(file.rid), file.info.st_size
        rows = self._db.execute(
            f"SELECT ino, generation, size, packed FROM inode WHERE {_IS_REGION}"
            f" AND packed != {OWN} AND ino BETWEEN ? AND ?",
            (slots[0], slots[-1]),
        ).fetchall()
        with open(file.path, "r+b" if self._report.repairing else "rb", buffering=0) as pack:
            fd = pack.fileno()
            sizes = recorded(fd, file.rid)
            whole = True  # as far as known
            for ino, generation, size, packed in rows:
                if packed != PACKED:
                    continue
                rid = RegionID.from_parts(ino, generation)
                number = ino - slots[0]
                cut = max(0, end - number * SLOT) if end < (number + 1) * SLOT else SLOT
                said = min(sizes.get(rid, size), cut)
                lost = said < size and self._attests(ino, said)
                if cut < SLOT and (self._clean or lost):
                    whole = False
                    continue  # missing
                self._db.execute("INSERT OR IGNORE INTO present VALUES(?)", (ino,))
                if lost:
                    self._resaid(fd, rid, number, size, said)
                elif said != size:
                    self._sizes(ino, rid, size, said)
            if self._strays(file, {row[0] - slots[0] for row in rows}, fd) and end != PACK:
                self._length(file, fd, whole=whole)

    def _length(self, file: RegionFile, fd: int, *, whole: bool) -> None:
        """Handle a pack of the wrong length."""
        end = file.info.st_size
        text = f"the pack {file.rid.hex()} has {end} bytes, not {PACK}"
        remedy = f"padded with zeros; a copy is in {self._lost.directory}"
        if not self._clean and whole and end < PACK:
            wanted = self._report.note(text, "padded with zeros, as opening the target does")
        elif wanted := self._report.problem(text, remedy):
            self._lost.copy(file.path, file.path.name)
            if end < RECORDS:
                os.truncate(fd, end // SLOT * SLOT)  # a region in a truncated slot is missing, too
        if wanted:
            os.truncate(fd, PACK)

    def _resaid(self, fd: int, rid: RegionID, number: int, size: int, said: int) -> None:
        text = f"region {rid.hex()}: its pack says {said} bytes, checksums {size}, as its row"
        if self._report.problem(text, "took the size from the checksums"):
            record = RECORD.pack(rid.generation, size)
            os.pwrite(fd, record, RECORDS + number * RECORD.size)

    def _sizes(self, ino: int, rid: RegionID, size: int, have: int) -> None:
        text = f"region {rid.hex()}: its pack says {have} bytes, its row {size}"
        if self._believes(text, "pack"):
            self._set_size(ino, have)

    def _strays(self, file: RegionFile, known: set[int], fd: int) -> bool:
        """Handle data in a pack that belong to no region; returns whether the pack stays."""
        strays = [
            number
            for number in set(range(SLOTS)) - known
            if any(os.pread(fd, RECORD.size, RECORDS + number * RECORD.size))
            or any(os.pread(fd, SLOT, number * SLOT))
        ]
        if not strays:
            return True
        text = f"the pack {file.rid.hex()} has {len(strays)} regions without a row"
        remedy = f"removed from it; a copy is in {self._lost.directory}"
        if not known:
            remedy = f"moved to {self._lost.directory}"
        wanted = self._removes(text, remedy)
        if wanted and not known:
            self._lost.move(file.path)
            return False
        if wanted:
            self._lost.copy(file.path, file.path.name)
            forget(fd, strays)
        return True

    def _moved(self, rid: RegionID) -> None:
        text = f"region {rid.hex()} has a file, its row says that it is in a pack"
        if self._believes(text, "file"):
            self._db.execute("UPDATE inode SET packed = ? WHERE ino = ?", (MOVED, rid.slot))

    def _believes(self, text: str, what: str) -> bool:
        """Whether to trust a file or pack rather than a row, as opening the target after a crash
        does; then it is not a problem."""
        if self._clean:
            return self._report.problem(text, f"took the {what}")
        return self._report.note(text, f"took the {what}, as opening the target does")

    def _removes(self, text: str, remedy: str) -> bool:
        """Whether to apply *remedy* to something that opening the target after a crash would
        remove; then it is not a problem."""
        if self._clean:
            return self._report.problem(text, remedy)
        return self._report.note(f"{text}, which opening the target removes", remedy)

    def _at_its_place(self, file: RegionFile) -> RegionFile | None:
        right = place(self._regions, file.rid)
        if file.path == right:
            return file
        text = f"the file of region {file.rid.hex()} is in {file.path.parent}"
        if right.exists():
            if self._report.problem(
                f"{text}, and there is another one in the right place", "moved"
            ):
                self._lost.move(file.path)
            return None
        if not self._report.problem(text, f"moved to {right.parent}"):
            return None
        right.parent.mkdir(mode=0o700, exist_ok=True)
        file.path.rename(right)
        sync_directory(right.parent)
        return file._replace(path=right)

    def _without_row(self, file: RegionFile) -> None:
        text = f"region {file.rid.hex()} has a file but no row"
        remedy = f"moved to {self._lost.directory}"
        if self._removes(text, remedy):
            self._lost.move(file.path)

    def _size(self, file: RegionFile, size: int) -> None:
        have = file.info.st_size
        text = f"region {file.rid.hex()}: its file has {have} bytes, its row says {size}"
        ino = file.rid.slot
        if have < size and (self._clean or self._attests(ino, have)):
            remedy = f"the remaining bytes are in /lost+found/{file.rid.hex()}"
            names = self._names(ino)
            if self._report.problem(f"{text}{names}", remedy):
                self._tree.take_names(ino)
                self._tree.rescue(ino, file.rid.hex())
                self._set_size(ino, have)
            return
        if self._believes(text, "file"):
            self._set_size(ino, have)

    def _times(self, rid: RegionID, mtime: int, ctime: int) -> None:
        ino = rid.slot
        row = self._db.execute("SELECT ctime FROM inode WHERE ino = ?", (ino,)).fetchone()
        if ctime > row[0] and self._report.note(
            f"region {rid.hex()}: its times were kept in its file",
            "copied to the catalogue, as opening the target does",
        ):
            self._db.execute(
                "UPDATE inode SET mtime = ?, ctime = ? WHERE ino = ?", (mtime, ctime, ino)
            )

    def _names(self, ino: int) -> str:
        paths = self._tree.paths(ino)
        return f" ({', '.join(paths)})" if paths else ""

    def _attests(self, ino: int, size: int) -> bool:
        """Whether checksums prove that the region had more than *size* bytes on stable storage."""
        if not self._sums:
            return False
        row = self._db.execute(
            "SELECT EXISTS(SELECT 1 FROM checksum WHERE ino = ? AND block >= ?)"
            " AND NOT EXISTS(SELECT 1 FROM unsettled WHERE ino = ?)",
            (ino, size // BLOCK, ino),
        ).fetchone()
        return bool(row[0])

    def _set_size(self, ino: int, size: int) -> None:
        self._db.execute("UPDATE inode SET size = ? WHERE ino = ?", (size, ino))
        if self._sums:
            self._db.execute(
                "DELETE FROM checksum WHERE ino = ? AND block >= ?", (ino, size // BLOCK)
            )

    def _missing(self) -> None:
        """Handle regions without a file."""
        rows: list[Any] = self._db.execute(
            f"SELECT {COLUMNS} FROM inode WHERE {_IS_REGION} AND ino NOT IN present"
            " AND NOT (nlink = 0 AND anonymous = 0 AND ino NOT IN (SELECT ino FROM dentry))"
        ).fetchall()
        fresh = SEQUENCE
        if not self._clean:
            settled = self._db.execute("SELECT value FROM meta WHERE key = 'settled'").fetchone()
            fresh = settled[0] if settled and isinstance(settled[0], int) else SEQUENCE
        for row in map(Row._make, rows):
            rid = RegionID.from_parts(row.ino, row.generation)
            if fresh <= row.ino < SEQUENCE:
                self._never_persisted(rid, named=not row.anonymous)
                continue
            what = "pack" if row.packed == PACKED else "file"
            text = f"the {what} of region {rid.hex()}{self._names(row.ino)} is missing"
            if row.size == 0:
                if self._report.problem(f"{text}, which was empty", "created again"):
                    self._make_empty(rid)
                continue
            xattrs = self._db.execute("SELECT name, value FROM xattr WHERE ino = ?", (row.ino,))
            details = f"{tuple(row)!r} {dict(xattrs)!r}"
            if self._report.problem(f"{text}: {row.size} bytes", "removed", details=details):
                self._tree.take_names(row.ino)
                self._drop(row.ino)

    def _make_empty(self, rid: RegionID) -> None:
        """Create an empty file for a region."""
        file = place(self._regions, rid)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        sync_directory(file.parent)
        self._db.execute(f"UPDATE inode SET packed = {OWN} WHERE ino = ?", (rid.slot,))

    def _drop(self, ino: int) -> None:
        """Remove the rows of a lost region."""
        for table in ("inode", "xattr", *(("checksum", "unsettled") if self._sums else ())):
            self._db.execute(f"DELETE FROM {table} WHERE ino = ?", (ino,))

    def _never_persisted(self, rid: RegionID, *, named: bool) -> None:
        """Handle a region without data that was never persisted; see ``Catalogue.fresh``."""
        text = f"region {rid.hex()} was not persisted before the target was last used"
        remedy = f"{'created an empty file' if named else 'removed'}, as opening the target does"
        if not self._report.note(f"{text}, and its bytes are lost", remedy):
            return
        if named:
            self._make_empty(rid)
            self._set_size(rid.slot, 0)
        else:
            self._drop(rid.slot)


def _parts(rid: RegionID) -> tuple[int, int]:
    """Return slot and generation as in the catalogue; -1 for invalid ones."""
    return (
        rid.slot if rid.slot < 1 << 63 else -1,
        rid.generation if rid.generation < 1 << 63 else -1,
    )
