"""Which regions exist: sizes, attributes and names, in SQLite.

Rules of this module:

* Nothing here locks.  Every call is made with the target's lock held (see ``target.py``), so
  a method may rely on nothing changing while it runs.
* An ``Inode`` object is the truth about its row while it is cached; the row follows at the
  next ``flush``.  There is one object per inode: only ``trim`` drops objects, and it is called
  only where nobody holds one.
* Volatile changes gather in one open transaction.  ``commit`` writes it to the WAL without
  waiting for the medium; ``sync`` waits, **without** the target's lock, so that a slow medium
  delays only those who asked for durability, and concurrent persists share one wait.
* Where the bytes of a region live is not known here.
"""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from warabi.errors import ConfigError, CorruptTarget, Exception, StorageError, StorageFull
from warabi.inode import ROOT, Attributes, Inode
from warabi.region import RegionID

APPLICATION_ID = 0x57617261
SCHEMA_VERSION = 1

_SCHEMA = """
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
    target BLOB                   -- of a symlink
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
"""
_COLUMNS = (
    "ino, generation, mode, nlink, uid, gid, rdev, size, atime, mtime, ctime, anonymous, target"
)
_UPSERT = f"INSERT OR REPLACE INTO inode({_COLUMNS}) VALUES({', '.join('?' * 13)})"
_CACHED = 65536
_FLUSH_AT = 16384


def translate(error: sqlite3.Error, path: Path | None) -> Exception:
    """The library's exception for a failed catalogue statement."""
    name = getattr(error, "sqlite_errorname", "")
    text = f"catalogue {path or 'in memory'}: {error}"
    if name.startswith("SQLITE_FULL"):
        return StorageFull(text)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return CorruptTarget(text)
    return StorageError(text)


class Catalogue:
    """The catalogue at *path*, or one in memory that dies with its process.

    Args:
        path: the database, or None.
        backend: what :meth:`create` was told; catalogues older than that record have ``file``.

    Raises:
        ConfigError: it is another backend's; nothing was changed.
        CorruptTarget: the database is damaged.
        StorageError: it cannot be opened or written.
    """

    def __init__(self, path: Path | None, backend: str = "file") -> None:
        self.path = path
        self._random = random.Random()
        self._cache: dict[int, Inode] = {}
        self.by_rid: dict[bytes, Inode] = {}
        self._dirty: dict[int, Inode] = {}
        self.change = (
            0  # counts changes; what is <= _committed is in the WAL, <= _synced on the medium
        )
        self._committed = 0
        self._synced = 0
        self._sync_lock = threading.Lock()  # taken without the target's lock, never before it
        self._failed = ""  # why nothing can be promised any more
        self._wal = -1
        try:
            self._db = sqlite3.connect(
                str(path or ":memory:"), isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise translate(error, path) from error
        try:
            self._configure(path)
            self._next_ino = 1 + self._one("SELECT coalesce(max(ino), 0) FROM inode")
            regular = f"FROM inode WHERE mode & {0o170000} = {stat.S_IFREG}"
            self.count, self.used = self._db.execute(
                f"SELECT count(*), coalesce(sum(size), 0) {regular}"
            ).fetchone()
            self._has_xattrs = bool(self._one("SELECT EXISTS(SELECT 1 FROM xattr)"))
            self.uuid = str(self._one("SELECT value FROM meta WHERE key = 'uuid'"))
            self.clean = bool(self._one("SELECT value FROM meta WHERE key = 'clean'"))
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            self.capacity: int | None = meta.get("capacity")
            """The quota in bytes that :meth:`create` was given."""
            if not isinstance(self.capacity, int | None):
                raise CorruptTarget(f"catalogue {path}: the capacity is {self.capacity!r}")
            if (found := meta.get("backend", "file")) != backend:
                raise ConfigError(f"target {path}: is a target of type {found!r}, not {backend!r}")
            if path is not None:
                self._open_wal(path)
        except BaseException as error:
            self.abandon()
            name = getattr(error, "sqlite_errorname", "")
            if isinstance(error, TypeError) or name == "SQLITE_ERROR":
                # A row, or a table, that every catalogue has is missing.
                raise CorruptTarget(f"catalogue {path}: incomplete") from error
            if isinstance(error, sqlite3.Error):
                raise translate(error, path) from error
            raise

    def _one(self, sql: str) -> int:
        value: int = self._db.execute(sql).fetchone()[0]
        return value

    def _configure(self, path: Path | None) -> None:
        if path is None:
            self._db.execute("PRAGMA journal_mode = OFF")
            self._db.executescript(_SCHEMA)
            self._populate(self._db)
            return
        # Exclusive locking before WAL: no -shm file, no lock calls; the target's own lock
        # already keeps others out.  NORMAL: a commit does not wait for the medium, `sync` does.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA wal_autocheckpoint = 4000")
        self._db.execute("PRAGMA cache_size = -65536")
        self._db.execute("PRAGMA cache_spill = OFF")

    def _open_wal(self, path: Path) -> None:
        """Mark the catalogue as open, which makes SQLite create the WAL that ``sync`` waits for."""
        self._db.execute("UPDATE meta SET value = 0 WHERE key = 'clean'")
        self._wal = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        os.fdatasync(self._wal)
        sync_directory(path.parent)

    @staticmethod
    def _populate(db: sqlite3.Connection, **meta: str | int | None) -> None:
        now = time.time_ns()
        root = Inode(
            ROOT, 1, stat.S_IFDIR | 0o755, 2, os.getuid(), os.getgid(), 0, 0, now, now, now, 0, None
        )
        db.execute(_UPSERT, root.row())
        rows = [("uuid", str(uuid.uuid4())), ("clean", 1), *meta.items()]
        db.executemany("INSERT INTO meta VALUES(?, ?)", rows)

    @classmethod
    def create(cls, path: Path, backend: str = "file", capacity: int | None = None) -> None:
        """Make an empty catalogue at *path*, whole or not at all, replacing what is there.

        *backend*, where its regions are, and *capacity*, a quota in bytes, are kept in it.
        """
        fresh = Path(f"{path}.new")
        for leftover in (fresh, Path(f"{fresh}-journal")):
            leftover.unlink(missing_ok=True)
        try:
            db = sqlite3.connect(fresh, isolation_level=None)
            try:
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.executescript(_SCHEMA)
                cls._populate(db, backend=backend, capacity=capacity)
            finally:
                db.close()
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            Path(f"{path}-wal").unlink(missing_ok=True)
            fresh.replace(path)
            sync_directory(path.parent)
        except sqlite3.Error as error:
            fresh.unlink(missing_ok=True)
            raise translate(error, path) from error

    # Inodes

    def add(self, mode: int, uid: int, gid: int, *, size: int = 0, rdev: int = 0,
            anonymous: bool = False, target: bytes | None = None) -> Inode:  # fmt: skip
        """A new inode without names.  A directory starts with two links, its name and its dot."""
        now = time.time_ns()
        ino = self._next_ino
        self._next_ino = ino + 1
        inode = Inode(
            ino, self._random.getrandbits(63), mode, 2 if stat.S_ISDIR(mode) else 0, uid, gid, rdev,
            size, now, now, now, int(anonymous), target,
        )  # fmt: skip
        self._remember(inode)
        if stat.S_ISREG(mode):
            self.count += 1
            self.used += size
        self.touch(inode, durable=True)
        return inode

    def _remember(self, inode: Inode) -> None:
        self._cache[inode.ino] = inode
        if stat.S_ISREG(inode.mode):
            self.by_rid[inode.rid] = inode

    def get(self, ino: int) -> Inode | None:
        """The inode *ino*, or None."""
        inode = self._cache.get(ino)
        if inode is None and -(1 << 63) <= ino < 1 << 63:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM inode WHERE ino = ?", (ino,)).fetchone()
            if row is not None:
                inode = Inode(*row)
                inode.stored = True
                self._remember(inode)
        return inode

    def get_cached(self, ino: int) -> Inode | None:
        """The inode *ino* if it is in memory, as every pinned or changed one is."""
        return self._cache.get(ino)

    def region(self, rid: bytes) -> Inode | None:
        """The inode of a live region, or None for an ID that is erased, foreign or no ID."""
        inode = self.by_rid.get(rid)
        if inode is None and isinstance(rid, RegionID):
            found = self.get(rid.slot)
            if found is not None and found.rid == rid and stat.S_ISREG(found.mode):
                inode = found
        return inode

    def touch(self, inode: Inode, *, durable: bool) -> None:
        """Note that *inode* changed; *durable* when a persist of it has to keep the change."""
        self._dirty[inode.ino] = inode
        if durable:
            self.change += 1
            inode.changed = self.change

    def resize(self, inode: Inode, size: int) -> None:
        self.used += size - inode.size
        inode.size = size
        self.touch(inode, durable=True)

    def remove(self, inode: Inode) -> None:
        """Forget *inode* and its xattrs; its names are gone already, but for an erased region's."""
        self._cache.pop(inode.ino, None)
        self.by_rid.pop(inode.rid, None)
        self._dirty.pop(inode.ino, None)
        if stat.S_ISREG(inode.mode):
            self.count -= 1
            self.used -= inode.size
        if inode.stored:
            self._write("DELETE FROM inode WHERE ino = ?", (inode.ino,))
            self._write("DELETE FROM xattr WHERE ino = ?", (inode.ino,))
        self.change += 1

    def trim(self) -> None:
        """Drop cached inodes that nobody uses, when there are too many.  Nobody may hold one."""
        if len(self._dirty) > _FLUSH_AT:
            self.flush()
        if len(self._cache) <= _CACHED:
            return
        for inode in list(self._cache.values())[: _CACHED // 2]:
            if not (inode.users or inode.pins or inode.exclusive or inode.ino in self._dirty):
                del self._cache[inode.ino]
                self.by_rid.pop(inode.rid, None)

    # Names

    def lookup(self, parent: int, name: bytes) -> int | None:
        row = self._db.execute(
            "SELECT ino FROM dentry WHERE parent = ? AND name = ?", (parent, name)
        ).fetchone()
        return None if row is None else int(row[0])

    def link(self, parent: int, name: bytes, inode: Inode) -> None:
        """Make *name* mean *inode*, instead of what it meant; link counts are the caller's."""
        self._write("INSERT OR REPLACE INTO dentry VALUES(?, ?, ?)", (parent, name, inode.ino))
        self.touch(inode, durable=True)

    def unlink(self, parent: int, name: bytes) -> None:
        self._write("DELETE FROM dentry WHERE parent = ? AND name = ?", (parent, name))
        self.change += 1

    def unlink_all(self, inode: Inode) -> list[int]:
        """Remove every name of *inode*; returns the directories that held one."""
        rows = self._db.execute("SELECT parent FROM dentry WHERE ino = ?", (inode.ino,)).fetchall()
        if rows:
            self._write("DELETE FROM dentry WHERE ino = ?", (inode.ino,))
            self.change += 1
        return [row[0] for row in rows]

    def names(self, inode: Inode) -> list[tuple[int, bytes]]:
        """Every (parent, name) that means *inode*."""
        return self._db.execute(
            "SELECT parent, name FROM dentry WHERE ino = ? ORDER BY parent, name", (inode.ino,)
        ).fetchall()

    def has_entries(self, ino: int) -> bool:
        sql = "SELECT 1 FROM dentry WHERE parent = ? LIMIT 1"
        return self._db.execute(sql, (ino,)).fetchone() is not None

    def entries(self, parent: int, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        """Up to *limit* entries of a directory whose names sort after *after*, by name."""
        self.flush()
        rows = self._db.execute(
            f"SELECT name, i.{_COLUMNS.replace(', ', ', i.')} FROM dentry d JOIN inode i"
            " ON i.ino = d.ino WHERE parent = ? AND name > ? ORDER BY name LIMIT ?",
            (parent, after, limit),
        )
        return [(row[0], self._attributes(row[1:])) for row in rows]

    def regions(self, after: int, limit: int, *, anonymous: bool) -> list[Attributes]:
        """Up to *limit* regions with slots above *after*, by slot; *anonymous*: nameless ones."""
        self.flush()
        after = min(after, (1 << 63) - 1)  # a foreign ID's slot may have 64 bits
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM inode WHERE ino > ? AND mode & {0o170000} = {stat.S_IFREG}"
            f" {'AND anonymous = 1' if anonymous else ''} ORDER BY ino LIMIT ?",
            (after, limit),
        )
        return [self._attributes(row) for row in rows]

    def _attributes(self, row: tuple[int, ...]) -> Attributes:
        cached = self._cache.get(row[0])
        return (cached or Inode(*row)).attributes()  # type: ignore[arg-type]  # the row has the columns' types

    def orphans(self) -> list[Inode]:
        """Inodes that lost their last name while open, when their target was not closed."""
        self.flush()
        rows = self._db.execute(
            "SELECT ino FROM inode WHERE nlink = 0 AND anonymous = 0"
        ).fetchall()
        return [inode for row in rows if (inode := self.get(row[0])) is not None]

    # Extended attributes

    def xattrs(self, ino: int) -> list[bytes]:
        rows = self._db.execute("SELECT name FROM xattr WHERE ino = ? ORDER BY name", (ino,))
        return [row[0] for row in rows]

    def xattr(self, ino: int, name: bytes) -> bytes | None:
        if not self._has_xattrs:  # the kernel asks for security.capability before every write
            return None
        sql = "SELECT value FROM xattr WHERE ino = ? AND name = ?"
        row = self._db.execute(sql, (ino, name)).fetchone()
        return None if row is None else bytes(row[0])

    def set_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Set, or with None remove, an extended attribute."""
        if value is None:
            self._write("DELETE FROM xattr WHERE ino = ? AND name = ?", (inode.ino, name))
        else:
            self._write("INSERT OR REPLACE INTO xattr VALUES(?, ?, ?)", (inode.ino, name, value))
        self._has_xattrs = True
        # The row must exist for the attribute to be found and removed with it.
        inode.stored = True
        self.touch(inode, durable=True)

    # Transactions

    def _write(self, sql: str, values: tuple[int | bytes, ...]) -> None:
        self._begin()
        self._db.execute(sql, values)

    def _begin(self) -> None:
        if self.path is not None and not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def flush(self) -> None:
        """Write dirty inodes into the open transaction."""
        if self._dirty:
            self._begin()
            self._db.executemany(_UPSERT, [inode.row() for inode in self._dirty.values()])
            for inode in self._dirty.values():
                inode.stored = True
            self._dirty.clear()

    @property
    def uncommitted(self) -> bool:
        return bool(self._dirty) or self.change > self._committed or self._db.in_transaction

    def is_synced(self, change: int) -> bool:
        """Whether *change* is on the medium (a catalogue in memory has none to wait for)."""
        return self.path is None or change <= self._synced

    def commit(self) -> int:
        """End the transaction; what it holds survives a crash of the process.

        Returns the change number to give to :meth:`sync`.
        """
        self._check()
        self.flush()
        if self._db.in_transaction:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error:
                # SQLite keeps the transaction for another try, unless it had to roll back: then
                # the database and the inodes in memory no longer agree.
                if not self._db.in_transaction:
                    self._failed = (
                        f"catalogue {self.path}: a commit failed and was rolled back; what changed"
                        " since the last persist is lost. Make room, close the target, reopen it"
                    )
                raise
        self._committed = self.change
        return self._committed

    def _check(self) -> None:
        if self._failed:
            raise StorageError(self._failed)

    def sync(self, change: int) -> None:
        """Wait until the committed *change* is on the medium.  The target's lock is **not** held.

        Raises:
            StorageError: the medium refused, now or before; the kernel reports such a failure
                only once, so no later sync may claim success.
        """
        if self.is_synced(change):
            return
        with self._sync_lock:
            if self.is_synced(change):
                return  # another's sync covered ours
            self._check()
            latest = self._committed
            try:
                os.fdatasync(self._wal)
            except OSError as error:
                self._failed = (
                    f"catalogue {self.path}: a sync failed ({error.strerror}); what was"
                    " written since the last persist may be lost. Close the target, check the"
                    " medium, reopen it"
                )
                raise StorageError(self._failed) from error
            self._synced = max(self._synced, latest)

    def close(self) -> None:
        """Commit, mark as cleanly closed, and fold the WAL into the database."""
        try:
            if self.path is not None:
                self.flush()
                self._write("UPDATE meta SET value = 1 WHERE key = 'clean'", ())
                self.commit()
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files as they are, as a crash would; the next to open them recovers."""
        if self._wal >= 0:
            os.close(self._wal)
            self._wal = -1
        self._db.close()

    def iterate_regions(self) -> Iterator[Attributes]:
        """Every region, by slot."""
        after = 0
        while page := self.regions(after, 10000, anonymous=False):
            yield from page
            after = page[-1].ino


def sync_directory(path: Path) -> None:
    """Put a directory's entries on the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
