"""The journal of a catalogue: how changes get into SQLite's WAL, and to stable storage.

Changes are collected in one open transaction, and also kept here as a list: if SQLite had to roll
it back, because the disk was full or could not be read, it is repeated.  So changes that were not
yet promised to be durable are not lost either, and readers never miss them.

``commit`` does not wait for stable storage and is called with the target's lock held; ``sync``
waits, **without** the lock.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from warabi import errors
from warabi._core import forks
from warabi.errors import CorruptTarget, StorageError, StorageFull

if TYPE_CHECKING:
    from warabi.metadata.replica import Replica

Row = Sequence[int | str | bytes | None]

_AHEAD = bytes(256 * 1024)
_CHECKPOINT = 4000
"""Pages in the WAL that trigger a checkpoint, 16 MiB."""
_MOST = 4 * _CHECKPOINT  # at this size SQLite itself checkpoints
_PAGES = 8  # approximate maximum of pages that a row changes: in a table and its indexes
_MANY = 8192  # rows that take long to commit
_WAL_HEADER = 32  # bytes before the pages, each of which has its own header
_PAGE_HEADER = 24
_SALT = 8  # bytes in both headers; differs in pages from before the WAL was restarted


_OF_THE_ROW = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)
"""Errors of SQLite that concern a row, not the database or its device."""


_whole: dict[Path, tuple[int, int]] = {}
"""Size and time of databases that were readable to their end when SQLite found them damaged."""


def read_error(path: Path) -> str:
    """Return why a database or its WAL cannot be read to its end; empty if it can.

    SQLite also reports a malformed database when a read of it fails (EIO, ENXIO).
    """
    buffer = bytearray(1 << 20)
    try:
        info = path.stat()
        state = (info.st_size, info.st_mtime_ns)
        with open(path, "rb", buffering=0) as file:
            if _whole.get(path) == state:
                return ""  # known to be damaged: do not read it for each statement
            while file.readinto(buffer):
                pass
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"{path}-wal", "rb", buffering=0) as file,
        ):
            while file.readinto(buffer):
                pass
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    _whole[path] = state
    return ""


def translate(error: sqlite3.Error, path: Path | None) -> errors.Exception:
    """Return the library's exception for a failed statement of the catalogue."""
    name = getattr(error, "sqlite_errorname", "")
    text = f"catalogue {path or 'in memory'}: {error}"
    if name.startswith("SQLITE_FULL"):
        return StorageFull(text)
    not_utf8 = not name and "Could not decode" in text  # raised by Python's module
    if not_utf8 or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        if path is not None and (why := read_error(path)):
            return StorageError(f"catalogue {path}: {why}")
        return CorruptTarget(text)
    return StorageError(text)


class Journal:
    """The transactions of a database.

    Args:
        db: the database, in WAL mode if it has a path.
        path: of the database, or None if it is in memory and never durable.
        replica: what makes it durable, if its files are temporary.
    """

    def __init__(
        self, db: sqlite3.Connection, path: Path | None, replica: Replica | None = None
    ) -> None:
        self._db = db
        self._replica = replica
        self._path = path
        self._open: list[tuple[str, Sequence[Row]]] = []  # statements of the open transaction
        self.committed = 0
        """The newest change that is in the WAL."""
        self._synced = 0  # the newest that is on stable storage
        # Acquired without the target's lock, or after it by a checkpoint; never before it.
        self._sync_lock = forks.lock()
        self._failed = ""  # error of a failed sync, after which nothing is durable
        self._wal = -1
        self._wal_size = 0
        self._rows = 0  # in the transaction
        self._look_after = _CHECKPOINT // _PAGES  # rows until the WAL may be long
        self._page = 0  # bytes of a page in the WAL

    def open_wal(self) -> None:
        """Open the WAL, which a first commit has created; from now on ``sync`` flushes it."""
        page = self._db.execute("PRAGMA page_size").fetchone()[0]
        if self._replica is not None:
            self._replica.attach(page)
            self._replica.sync()
            return
        self._page = _PAGE_HEADER + page
        self._db.execute(f"PRAGMA wal_autocheckpoint = {_MOST}")
        self._wal = os.open(f"{self._path}-wal", os.O_RDWR | os.O_CLOEXEC)
        self._go_ahead()
        os.fdatasync(self._wal)

    def _go_ahead(self) -> None:
        """Extend the WAL with zeros when it has grown; SQLite takes zeros for its end.

        A sync of a file whose size does not change is one flush; otherwise the file system also
        commits its journal.  After a checkpoint SQLite restarts the WAL without truncating it.
        """
        with contextlib.suppress(OSError):
            size = os.lseek(self._wal, 0, os.SEEK_END)
            if size > self._wal_size:
                self._wal_size = size
                self._wal_size += os.pwrite(self._wal, _AHEAD, size)

    def write(self, sql: str, rows: Sequence[Row]) -> None:
        """Execute *sql* for each of *rows*, in the open transaction."""
        if self._path is None:
            self._db.executemany(sql, rows)
            return
        self._begin()
        try:
            self._db.executemany(sql, rows)
        except BaseException:
            if not self._open:
                self.roll_back()  # only a part of *rows* was written: do not commit it
            raise
        self._open.append((sql, rows))
        self._rows += len(rows)

    def write_each(self, sql: str, rows: Sequence[Row]) -> dict[int, Exception]:
        """The same as :meth:`write`, except that rows that cannot be stored do not prevent others.

        Returns:
            the errors of rows that were not written, by position.  Raises errors of the database.
        """
        if not rows:
            return {}
        try:
            self.write(sql, rows)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, _OF_THE_ROW):
                raise
            if len(rows) == 1:
                return {0: error}
        else:
            return {}
        return {
            position: error
            for position, row in enumerate(rows)
            for error in self.write_each(sql, (row,)).values()
        }

    def _begin(self) -> None:
        if self._db.in_transaction:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for sql, rows in self._open:
                self._db.executemany(sql, rows)
        except BaseException:
            self.roll_back()
            raise

    def roll_back(self) -> None:
        """Roll back the open transaction in the database, to be repeated later."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def restore(self) -> None:
        """Repeat statements that SQLite has rolled back, now if possible, otherwise in a later
        call."""
        if self._open:
            with contextlib.suppress(Exception):
                self._begin()

    @property
    def uncommitted(self) -> bool:
        return bool(self._open)

    def is_synced(self, change: int) -> bool:
        """Whether *change* is on stable storage (always true for a database in memory)."""
        return self._path is None or change <= self._synced

    def commit(self, change: int) -> int:
        """Commit the transaction; *change*, the newest in it, then survives a crash of the process.

        Returns:
            *change*.  On failure the transaction stays open.
        """
        self.check()
        if self._open:
            self._begin()
            try:
                self._db.execute("COMMIT")
            except BaseException:
                self.restore()
                raise
            self._open.clear()
            self._look_after -= self._rows
            self._rows = 0
            self.committed = change
            if self._replica is not None:
                self._replica.committed()
            elif self._wal >= 0:
                self._go_ahead()
        self.committed = change
        return change

    @property
    def is_long(self) -> bool:
        """Whether committing the transaction takes long."""
        return self._rows > _MANY

    @property
    def checkpoint_due(self) -> bool:
        """Whether the WAL is so long that the caller of commit should call :meth:`checkpoint`."""
        if self._replica is not None:
            return self._replica.pages >= _CHECKPOINT
        if self._look_after > 0 or self._wal < 0:
            return False
        try:
            left = _CHECKPOINT - self._pages()
        except OSError:
            left = 0  # the checkpoint will report the error
        self._look_after = max(left, _CHECKPOINT // _PAGES) // _PAGES
        return left <= 0

    def _pages(self) -> int:
        """Return the number of pages in the WAL.  SQLite restarts it with another salt without
        truncating it: what follows is older, or zero."""
        salt = os.pread(self._wal, _SALT, _WAL_HEADER - _SALT - _SALT)

        def old(page: int) -> bool:
            header = _WAL_HEADER + page * self._page
            return os.pread(self._wal, _SALT, header + _SALT) != salt

        size = os.lseek(self._wal, 0, os.SEEK_END)
        return bisect_left(range((size - _WAL_HEADER) // self._page), True, key=old)

    def checkpoint(self) -> None:
        """Copy the WAL into the database, and flush that to stable storage, so that SQLite restarts
        the WAL.  Requires that nothing is uncommitted, and blocks other use of the database."""
        if self._replica is not None:
            with self._sync_lock:
                self._replica.checkpoint(self._db)
            return
        self._look_after = _CHECKPOINT // _PAGES
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def seal(self) -> None:
        """Checkpoint the whole WAL, and remove it, before the database is closed; nothing is
        uncommitted."""
        if self._replica is not None:
            with self._sync_lock:
                self._replica.seal(self._db)
            return
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> None:
        """Raise ``StorageError`` if a sync has failed."""
        if self._failed:
            raise StorageError(self._failed)

    def sync(self, change: int) -> None:
        """Wait until the committed *change* is on stable storage.

        Raises:
            StorageError: this or an earlier sync failed; the kernel reports such a failure only
                once, so no later sync may report success.
        """
        if self.is_synced(change):
            return
        with self._sync_lock:
            if self.is_synced(change):
                return  # another caller's sync covered it
            self.check()
            latest = self.committed
            if self._replica is not None:
                self._replica.sync()  # which may be repeated when it failed
                self._synced = max(self._synced, latest)
                return
            try:
                os.fdatasync(self._wal)
            except OSError as error:
                self._failed = (
                    f"catalogue {self._path}: a sync failed ({error.strerror}); what was"
                    " written since the last persist may be lost. Close the target, check the"
                    " storage device, reopen it"
                )
                raise StorageError(self._failed) from error
            self._synced = max(self._synced, latest)

    def close(self) -> None:
        """Close the WAL."""
        if self._replica is not None:
            self._replica.close()
        if self._wal >= 0:
            close_quietly(self._wal)
            self._wal = -1


def close_quietly(fd: int) -> None:
    """Close a descriptor, ignoring errors: whatever must be durable was synced before."""
    with contextlib.suppress(OSError):
        os.close(fd)


def sync_directory(path: Path | str, opened: Callable[[str, int], int] = os.open) -> None:
    """Flush a directory's entries to stable storage; *opened* opens it."""
    fd = opened(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
