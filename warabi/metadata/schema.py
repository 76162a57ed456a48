"""The tables of a catalogue, their versions, and upgrades from older versions.

A change of the tables is a new version: ``SCHEMA`` creates it, ``_STEPS`` has the statements that
upgrade the previous version, and a target of that version is added to ``tests/data``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import time
import uuid
from pathlib import Path

from warabi._core.attributes import ROOT
from warabi.metadata import domain
from warabi.metadata.journal import sync_directory, translate

log = logging.getLogger(__name__)

APPLICATION_ID = 0x57617261
SCHEMA_VERSION = 5

_CHECKSUMS = (
    """
CREATE TABLE checksum(
    ino INTEGER NOT NULL,
    block INTEGER NOT NULL,       -- number of the block in the region
    sum INTEGER NOT NULL,         -- of its bytes when they were persisted
    PRIMARY KEY(ino, block)
) WITHOUT ROWID
""",
    """
CREATE TABLE unsettled(
    ino INTEGER PRIMARY KEY       -- a region that may have been written since its sums were made
)
""",
)
SCHEMA = f"""
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE inode(
    ino INTEGER PRIMARY KEY,      -- the slot of a region's ID
    generation INTEGER NOT NULL,  -- random, 63 bits
    mode INTEGER NOT NULL,        -- file type and permissions
    nlink INTEGER NOT NULL,       -- names; for a directory 2 + subdirectories
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    rdev INTEGER NOT NULL,
    size INTEGER NOT NULL,        -- bytes
    atime INTEGER NOT NULL,       -- nanoseconds since the epoch
    mtime INTEGER NOT NULL,
    ctime INTEGER NOT NULL,
    anonymous INTEGER NOT NULL,   -- 1: never had a name, shown by its ID
    target BLOB,                  -- of a symlink
    packed INTEGER NOT NULL DEFAULT 0, -- 1: a region in a pack, 2: in a file of its own since
    btime INTEGER NOT NULL DEFAULT 0,  -- when it was made; 0: not known
    flags INTEGER NOT NULL DEFAULT 0   -- of chattr(1)
);
CREATE INDEX anonymous ON inode(ino) WHERE anonymous = 1;
CREATE TABLE dentry(
    parent INTEGER NOT NULL, name BLOB NOT NULL, ino INTEGER NOT NULL,
    PRIMARY KEY(parent, name)
) WITHOUT ROWID;
CREATE INDEX dentry_ino ON dentry(ino);
CREATE TABLE xattr(
    ino INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY(ino, name)
) WITHOUT ROWID;
{";".join(_CHECKSUMS)};
"""
COLUMNS = ", ".join(domain.Row._fields)
OUTSIDE = " OR ".join(
    [
        *(
            f"{column} NOT BETWEEN {least} AND {most}"
            for column, (least, most) in domain.RANGES.items()
        ),
        "typeof(generation) != 'integer' OR typeof(size) != 'integer'",
        # Values of other types are larger than any number; but REAL makes such a sum REAL.
        "anonymous NOT BETWEEN 0 AND 1",
        "packed NOT BETWEEN 0 AND 2",
        "typeof(mode + nlink + uid + gid + rdev + anonymous + packed"
        " + flags + atime / 8 + mtime / 8 + ctime / 8 + btime / 8) != 'integer'",
        f"(target IS NOT NULL AND mode & {0o170000} = {stat.S_IFLNK} AND (typeof(target) != 'blob'"
        f" OR length(target) NOT BETWEEN 1 AND {domain.TARGET_MAX} OR instr(target, X'00')))",
    ]
)
"""The condition for inodes with invalid values."""
_PLACES = ", ".join("?" for _ in domain.Row._fields)
UPSERT = f"INSERT OR REPLACE INTO inode({COLUMNS}) VALUES({_PLACES})"
_STEPS: dict[int, tuple[str, ...]] = {
    1: _CHECKSUMS,
    2: ("ALTER TABLE inode ADD COLUMN packed INTEGER NOT NULL DEFAULT 0",),
    # Names may be staged: see ``dentries.py``.  A program that does not know that would neither
    # join nor remove those that a killed process left.
    3: (),
    4: (
        "ALTER TABLE inode ADD COLUMN btime INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE inode ADD COLUMN flags INTEGER NOT NULL DEFAULT 0",
    ),
}
"""Statements that upgrade each version to the next."""


def migrate(db: sqlite3.Connection, path: Path, *, replicated: bool = False) -> None:
    """Upgrade the tables of the catalogue at *path* to this version, atomically.

    When this returns the database itself has the new version, not only its WAL, so that an older
    program refuses to open it.  One that is *replicated* has it in its WAL,
    which is not checkpointed before the store has it.
    """
    found = version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in _STEPS:
        return
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN IMMEDIATE")
    try:
        while version in _STEPS:
            for statement in _STEPS[version]:
                db.execute(statement)
            version += 1
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    if not replicated:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute("PRAGMA synchronous = NORMAL")
    log.info("%s: upgraded from schema %d to schema %d", path, found, version)


def show_as_new(db: sqlite3.Connection) -> None:
    """Let queries see the rows of a catalogue of any version in the current format."""
    there = {row[1] for row in db.execute("PRAGMA main.table_info(inode)")}
    later = [f"0 AS {column}" for column in ("packed", "btime", "flags") if column not in there]
    if later:
        db.execute(f"CREATE TEMP VIEW inode AS SELECT *, {', '.join(later)} FROM main.inode")


def populate(db: sqlite3.Connection, **meta: str | int | None) -> None:
    """Fill empty tables: the root directory, the target's UUID, and *meta*."""
    now = time.time_ns()
    mode = stat.S_IFDIR | 0o755
    owner = os.getuid(), os.getgid()
    root = domain.Row(ROOT, 1, mode, 2, *owner, 0, 0, now, now, now, 0, None, btime=now)
    db.execute(UPSERT, root)
    rows = {"uuid": str(uuid.uuid4()), "clean": 1, **meta}
    db.executemany("INSERT INTO meta VALUES(?, ?)", rows.items())


def make(db: sqlite3.Connection) -> None:
    """Create the tables in an empty database."""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.executescript(SCHEMA)


def connect_new(path: Path) -> sqlite3.Connection:
    """Create an empty database at *path*, readable only by its owner; SQLite gives its WAL and
    journal the same permissions."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)  # regardless of the umask
    finally:
        os.close(fd)
    return sqlite3.connect(path, isolation_level=None)


def create(path: Path, backend: str = "file", capacity: int | None = None) -> None:
    """Create an empty catalogue at *path*, atomically replacing an existing one.

    *backend* and *capacity*, a quota in bytes, are stored in it.  It is not marked as closed, so
    leftover region files are removed when it is opened.
    """
    fresh = Path(f"{path}.new")
    for leftover in (fresh, Path(f"{fresh}-journal")):
        leftover.unlink(missing_ok=True)
    # Checkpoint the old database: a crash leaves either it, without a WAL, or the new one.
    there = f"{path.absolute().as_uri()}?mode=rw"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(there, uri=True)) as old,
    ):
        old.execute("PRAGMA locking_mode = EXCLUSIVE")
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    try:
        db = connect_new(fresh)
        try:
            # Not used before it is renamed, and flushed to stable storage as a whole.
            db.execute("PRAGMA journal_mode = OFF")
            db.execute("PRAGMA synchronous = OFF")
            make(db)
            populate(db, backend=backend, capacity=capacity, clean=None)
        finally:
            db.close()
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        # SQLite would apply another database's leftover WAL or journal to this one.
        for leftover in (Path(f"{path}-wal"), Path(f"{path}-journal")):
            leftover.unlink(missing_ok=True)
        sync_directory(path.parent)
        fresh.replace(path)
        sync_directory(path.parent)
    except sqlite3.Error as error:
        fresh.unlink(missing_ok=True)
        raise translate(error, path) from error
