"""The order of a check: the database, its rows, the files of the regions, and completion."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from warabi.backends import registry
from warabi.backends.pack_format import SLOTS
from warabi.errors import ConfigError, StorageError
from warabi.metadata.dentries import finish_graft
from warabi.metadata.domain import SEQUENCE
from warabi.metadata.journal import read_error, sync_directory, translate
from warabi.metadata.schema import APPLICATION_ID, SCHEMA_VERSION, migrate, show_as_new
from warabi.target import opening
from warabi.tools.fsck.files import FileCheck, region_files
from warabi.tools.fsck.report import LostFound, Report
from warabi.tools.fsck.salvage import salvage
from warabi.tools.fsck.tree import TreeCheck

_INDEX_ONLY = re.compile(
    r"row \d+ missing from index \w+|wrong # of entries in index (anonymous|dentry_ino)"
)
"""Messages of SQLite about indexes, which can be rebuilt from the tables."""
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_FORMAT")
"""Errors of SQLite about the database, not about reading it now."""


def check(path: Path, *, repair: bool, say: Callable[[str], None], backend: str = "") -> Report:
    """Check the target at *path*, calling *say* with what is found and, with *repair*, repaired.

    *backend* is the type of the target, in case it cannot be read from the catalogue.

    Raises:
        ConfigError: it is not a target, or was written by a newer version.
        TargetBusy: it is open.
        StorageError, StorageFull, CorruptTarget, OSError: the check could not be done, or a
            repair not be finished; files that it moved are in ``lost+found``.
    """
    with opening.owned(path) as (found, regions):
        lost = LostFound(found)
        report = Report(lost, repair=repair, say=say)
        try:
            _check(found, regions, report, lost, repair, backend)
        except sqlite3.Error as error:
            raise translate(error, found) from error
        return report


def _check(
    path: Path, regions: Path, report: Report, lost: LostFound, repair: bool, backend: str
) -> None:
    if _is_unfinished(path, regions):
        report.note("the process was killed while it created the target")
        return
    name = opening.recorded_backend(path)
    if name is not None and (known := registry.find(name)) is not None and not known.fsck:
        raise ConfigError(f"target {path}: is of type {name!r}, whose regions cannot be checked")
    trouble = _trouble_with_header(path) or _trouble_inside(path, report)
    for line in trouble:
        report.note(line)
    salvaged = bool(trouble)
    if salvaged:
        if not report.problem("the catalogue is damaged", "rebuilt from what can be read"):
            return  # its rows cannot be trusted
        salvage(path, regions, report, lost, backend)
    with _database(path) as db:
        if repair:
            migrate(db, path)
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
        else:
            show_as_new(db)
            db.execute("PRAGMA cache_spill = OFF")
            db.execute("BEGIN")  # of what is never committed
        sums = db.execute("PRAGMA user_version").fetchone()[0] >= 2
        row = db.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone()
        clean = salvaged or (row is not None and row[0] == 1)
        if not clean:
            report.note("the target was not closed cleanly")
            finish_graft(db)  # as opening it does
        tree = TreeCheck(db, report, clean=clean, sums=sums)
        tree.run()
        FileCheck(db, regions, report, lost, tree, clean=clean, sums=sums).run()
        tree.link_counts()
        if repair:
            orphans = "SELECT 1 FROM inode WHERE nlink = 0 AND anonymous = 0"
            if not report.left and db.execute(orphans).fetchone() is None:
                db.execute("UPDATE meta SET value = 1 WHERE key = 'clean'")
            if salvaged or not clean:
                # As opening it does: do not reuse slots of a pack that others may still write to.
                db.execute(
                    "INSERT OR REPLACE INTO meta SELECT 'last', max(ino) | ? FROM inode"
                    f" WHERE ino < {SEQUENCE} AND EXISTS(SELECT 1 FROM inode WHERE packed != 0)"
                    " HAVING max(ino) IS NOT NULL AND max(ino) | ? >"
                    " coalesce((SELECT value FROM meta WHERE key = 'last'), 0)",
                    (SLOTS - 1, SLOTS - 1),
                )
            if row is None or row[0] != 1:  # volatile changes may be lost: a new epoch
                db.execute("DELETE FROM meta WHERE key = 'epoch'")
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sync_directory(path.parent)


def _is_unfinished(path: Path, regions: Path) -> bool:
    """Whether opening the target would create it: there is only a directory for regions, or an
    unfinished migration, whose source still has the regions."""
    if path.exists() and path.stat().st_size:
        return False
    return opening.staged(path).exists() or next(region_files(regions), None) is None


def _trouble_with_header(path: Path) -> list[str]:
    """Return why the file cannot be a catalogue."""
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return [f"the catalogue {path} is missing"]
    if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
        return [f"the catalogue {path} is {'not a database' if header else 'empty'}"]
    version, application = struct.unpack(">I4xI", header[60:72])
    if application != APPLICATION_ID:
        return [f"the catalogue {path} is not a target's"]
    if version > SCHEMA_VERSION:
        raise ConfigError(f"target {path}: written by a newer version (schema {version})")
    return []


def _trouble_inside(path: Path, report: Report) -> list[str]:
    """Return errors of SQLite's integrity check, except those repaired by rebuilding an index."""
    try:
        with _database(path) as db:
            lines = _integrity(db)
            indexes = [line for line in lines if _INDEX_ONLY.fullmatch(line)]
            if lines and len(indexes) == len(lines):
                if report.problem(f"catalogue: {lines[0]}, {len(lines)} such", "rebuilt"):
                    db.execute("REINDEX")
                    lines = _integrity(db)
                else:
                    lines = []
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema")}
            gone = {"meta", "inode", "dentry", "xattr", "anonymous", "dentry_ino"} - tables
            lines += [f"there is no {name}" for name in sorted(gone)]
            lines += _undecodable(db)
    except sqlite3.DatabaseError as error:
        if not error.sqlite_errorname.startswith(_DAMAGE):
            raise
        lines = [str(error)]
    if lines and (why := read_error(path)):
        raise StorageError(
            f"catalogue {path}: {why}; first copy the target to a device without read errors"
        )
    return [f"catalogue: {' '.join(line.split())}" for line in lines]


def _undecodable(db: sqlite3.Connection) -> Iterator[str]:
    """Yield tables with text that is not UTF-8: no statement can read, or refer to, such a row."""
    for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        texts = " OR ".join(f"typeof({column}) = 'text'" for column in columns)
        try:
            db.execute(f"SELECT * FROM {table} WHERE {texts or 0}").fetchall()
        except sqlite3.OperationalError as error:
            if hasattr(error, "sqlite_errorname"):
                raise
            yield f"table {table}: {error}"


def _integrity(db: sqlite3.Connection) -> list[str]:
    rows = [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")]
    return [] if rows == ["ok"] else rows


@contextlib.contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    uri = f"file:{quote(os.fsencode(path))}?mode=rw"  # otherwise SQLite would create a missing file
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=1.0)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        yield db
    finally:
        db.close()
