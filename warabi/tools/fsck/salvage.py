"""Building a new catalogue from the readable rows of a damaged one, and the files of the regions.

Every table is read from both ends and by key, as far as SQLite gets; so damaged pages hide only
their own rows.  Regions without a row are found by their files, whose names are the IDs.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from warabi.backends import registry
from warabi.backends.pack_format import is_pack, recorded
from warabi.metadata import domain
from warabi.metadata.inode import OWN, PACKED
from warabi.metadata.journal import sync_directory
from warabi.metadata.schema import COLUMNS, UPSERT, connect_new, make, populate, show_as_new
from warabi.region import RegionID
from warabi.tools.fsck.files import region_files
from warabi.tools.fsck.report import LostFound, Report

_INSERT = UPSERT.replace("OR REPLACE", "OR IGNORE")  # a row that could be read has priority


def salvage(path: Path, regions: Path, report: Report, lost: LostFound, backend: str) -> None:
    """Replace the catalogue at *path*; the old one is kept in ``lost+found``."""
    fresh = Path(f"{path}.new")
    for leftover in (fresh, Path(f"{fresh}-journal")):
        leftover.unlink(missing_ok=True)
    with closing(connect_new(fresh)) as db:
        db.execute("PRAGMA synchronous = FULL")
        make(db)
        db.execute("BEGIN")
        populate(db)
        if path.is_file():
            _Reader(path, db).read()
        # Checksums from a possibly older state of the rows prove nothing.
        db.execute("DELETE FROM checksum")
        db.execute("DELETE FROM unsettled")
        found = _regions(db, regions)
        directories = _directories(db)
        _set_meta(db, backend)
        rows = db.execute("SELECT count(*) FROM inode").fetchone()[0]
        names = db.execute("SELECT count(*) FROM dentry").fetchone()[0]
        db.execute("COMMIT")
    wal = Path(f"{path}-wal")
    kept = [lost.copy(file, f"catalogue{suffix}")
            for file, suffix in ((path, ""), (wal, "-wal")) if file.exists()]  # fmt: skip
    wal.unlink(missing_ok=True)  # it would be applied to the new catalogue
    fresh.replace(path)
    sync_directory(path.parent)
    report.note(
        f"the new catalogue has {rows} inodes and {names} names; {found} regions are known from"
        f" their files alone, {directories} directories from their entries",
        f"the old catalogue is {kept[0]}" if kept else "there was no old catalogue",
    )


class _Reader:
    """Copies readable rows of the catalogue at *path* to *db*."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self._path = path
        self._db = db
        self._whole = True  # so far

    def read(self) -> None:
        self._old = sqlite3.connect(self._path, isolation_level=None)
        try:
            self._old.execute("PRAGMA locking_mode = EXCLUSIVE")
            show_as_new(self._old)
            self._read()
        except sqlite3.DatabaseError:
            return  # not a database at all
        finally:
            self._old.close()

    def _read(self) -> None:
        self._table("meta", "key, value", "key", "")
        self._table("inode", COLUMNS, "ino", "")
        self._table("dentry", "parent, name, ino", "parent, name", "")
        self._table("dentry", "parent, name, ino", "ino", "INDEXED BY dentry_ino")
        self._table("xattr", "ino, name, value", "ino, name", "")
        if self._whole:
            return
        inos = self._known()
        self._one_by_one("inode", COLUMNS, "ino", inos)
        self._one_by_one("dentry", "parent, name, ino", "parent", inos)
        self._one_by_one("dentry", "parent, name, ino", "ino", inos)
        self._one_by_one("xattr", "ino, name, value", "ino", inos)

    def _known(self) -> list[int]:
        sql = "SELECT ino FROM inode UNION SELECT ino FROM dentry UNION SELECT parent FROM dentry"
        return [row[0] for row in self._db.execute(sql) if isinstance(row[0], int)]

    def _table(self, table: str, columns: str, order: str, index: str) -> None:
        ends = [order, ", ".join(f"{name} DESC" for name in order.split(", "))]
        for direction in ends:
            if self._put(table, f"SELECT {columns} FROM {table} {index} ORDER BY {direction}", ()):
                return
            self._whole = False

    def _one_by_one(self, table: str, columns: str, key: str, values: list[int]) -> None:
        for value in values:
            self._put(table, f"SELECT {columns} FROM {table} WHERE {key} = ?", (value,))

    def _put(self, table: str, sql: str, values: tuple[int, ...]) -> bool:
        """Copy the rows of a query until an error; returns whether there was none."""
        try:
            rows = self._old.execute(sql, values)
            while (row := rows.fetchone()) is not None:
                marks = ", ".join("?" * len(row))
                verb = "REPLACE" if table == "meta" or row[0] == 1 else "IGNORE"
                try:
                    into = f"{table}({COLUMNS})" if table == "inode" else table
                    self._db.execute(f"INSERT OR {verb} INTO {into} VALUES({marks})", row)
                except sqlite3.IntegrityError:
                    continue  # a NOT NULL column is empty
        except sqlite3.DatabaseError:
            return False
        return True


def _regions(db: sqlite3.Connection, regions: Path) -> int:
    """Add rows for regions in files and packs that have none; returns their number."""
    count = 0
    for rid, size, mode, packed, info in _stored(regions):
        row = domain.Row(
            rid.slot, rid.generation, stat.S_IFREG | mode, 1, info.st_uid, info.st_gid, 0,
            size, domain.clamped(info.st_atime_ns), domain.clamped(info.st_mtime_ns),
            domain.clamped_change(info.st_ctime_ns), 0, None, packed=packed,
        )  # fmt: skip
        count += db.execute(_INSERT, row).rowcount
    return count


def _stored(regions: Path) -> Iterator[tuple[RegionID, int, int, int, os.stat_result]]:
    """Yield ID, size, permissions, location and file of each region; those with their own file
    first, which has priority over a pack."""
    packs = []
    for file in region_files(regions):
        rid = file.rid
        if is_pack(rid):
            packs.append(file)
        elif domain.is_region_id(rid.slot, rid.generation):
            yield rid, file.info.st_size, 0o600, OWN, file.info
    for pack in packs:
        with open(pack.path, "rb") as opened:
            sizes = recorded(opened.fileno(), pack.rid)
        for rid, size in sizes.items():
            yield rid, size, 0o644, PACKED, pack.info


def _directories(db: sqlite3.Connection) -> int:
    """Add rows for inodes without one that have entries, and so were directories."""
    rows = db.execute(
        "SELECT DISTINCT parent FROM dentry WHERE parent NOT IN (SELECT ino FROM inode)"
        " AND typeof(parent) = 'integer' AND parent > 1"
    ).fetchall()
    for (ino,) in rows:
        row = domain.Row(
            ino, 1, stat.S_IFDIR | 0o700, 2, os.getuid(), os.getgid(), 0, 0, 0, 0, 0, 0, None
        )
        db.execute(UPSERT, row)
    return len(rows)


def _set_meta(db: sqlite3.Connection, backend: str) -> None:
    """Set the catalogue's required metadata."""
    row = db.execute("SELECT value FROM meta WHERE key = 'backend'").fetchone()
    if backend or row is None or row[0] not in registry.checked_by_fsck():
        kind = backend or "file"
        db.execute("INSERT OR REPLACE INTO meta VALUES('backend', ?)", (kind,))
    db.execute("INSERT OR REPLACE INTO meta VALUES('clean', 0)")
