"""How a catalogue's changes get into SQLite's WAL, and from there on the medium.

Changes gather in one open transaction, which is also kept here as a list: whenever SQLite had to
roll it back, because the disk was full or could not be read, it is done again.  What was
promised to nobody yet is so not lost either, and nobody sees it missing.

``commit`` does not wait for the medium and is called with the target's lock held; ``sync``
waits, **without** the lock.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

from warabi import errors
from warabi.errors import CorruptTarget, StorageError, StorageFull

Row = Sequence[int | str | bytes | None]

_AHEAD = bytes(256 * 1024)
_CHECKPOINT = 4000
"""Pages in the WAL that are put into the database, 16 MiB."""
_MOST = 4 * _CHECKPOINT  # then SQLite does it, if it comes to that
_PAGES = 8  # that a row changes, at most and about: in a table and its indexes
_MANY = 8192  # rows that take long to commit
_WAL_HEADER = 32  # bytes, before the pages, each of which has a header of its own
_PAGE_HEADER = 24
_SALT = 8  # bytes, in both headers: those of pages that were written since the WAL was begun anew


_OF_THE_ROW = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)
"""Errors of SQLite that are about what is to be written, not about the database or its medium."""


_whole: dict[Path, tuple[int, int]] = {}
"""Size and time of databases that could be read to their end when SQLite called them damaged."""


def read_error(path: Path) -> str:
    """Why a database, or its WAL, cannot be read to its end; empty when it can.

    SQLite calls a database malformed also when the kernel fails a read of it (EIO, ENXIO).
    """
    buffer = bytearray(1 << 20)
    try:
        info = path.stat()
        state = (info.st_size, info.st_mtime_ns)
        with open(path, "rb", buffering=0) as file:
            if _whole.get(path) == state:
                return ""  # known to be damaged, and not to be read for each statement
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
    """The library's exception for a failed catalogue statement."""
    name = getattr(error, "sqlite_errorname", "")
    text = f"catalogue {path or 'in memory'}: {error}"
    if name.startswith("SQLITE_FULL"):
        return StorageFull(text)
    not_utf8 = not name and "Could not decode" in text  # said by Python's module
    if not_utf8 or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        if path is not None and (why := read_error(path)):
            return StorageError(f"catalogue {path}: {why}")
        return CorruptTarget(text)
    return StorageError(text)


class Journal:
    """The transactions of a database.

    Args:
        db: the database, in WAL mode when it has a path.
        path: of the database, or None when it is in memory: nothing has to be kept then.
    """

    def __init__(self, db: sqlite3.Connection, path: Path | None) -> None:
        self._db = db
        self._path = path
        self._open: list[tuple[str, Sequence[Row]]] = []  # the transaction
        self.committed = 0
        """The newest change that is in the WAL."""
        self._synced = 0  # the newest that is on the medium
        self._sync_lock = threading.Lock()  # taken without the target's lock, never before it
        self._failed = ""  # why nothing can be promised any more
        self._wal = -1
        self._wal_size = 0
        self._rows = 0  # in the transaction
        self._look_after = _CHECKPOINT // _PAGES  # rows until the WAL may be long
        self._page = 0  # bytes of one in the WAL

    def open_wal(self) -> None:
        """From now on ``sync`` waits for the WAL, which a first commit has made."""
        self._page = _PAGE_HEADER + self._db.execute("PRAGMA page_size").fetchone()[0]
        self._db.execute(f"PRAGMA wal_autocheckpoint = {_MOST}")
        self._wal = os.open(f"{self._path}-wal", os.O_RDWR | os.O_CLOEXEC)
        self._go_ahead()
        os.fdatasync(self._wal)

    def _go_ahead(self) -> None:
        """When the WAL has grown, have it grow further, by zeros, which mean its end to SQLite.

        A sync of what does not grow is one flush; else the file system commits its own journal.
        SQLite begins the WAL anew, and lets it have its size, after a checkpoint.
        """
        with contextlib.suppress(OSError):
            size = os.lseek(self._wal, 0, os.SEEK_END)
            if size > self._wal_size:
                self._wal_size = size
                self._wal_size += os.pwrite(self._wal, _AHEAD, size)

    def write(self, sql: str, rows: Sequence[Row]) -> None:
        """Do *sql* for each of *rows*, in the open transaction."""
        if self._path is None:
            self._db.executemany(sql, rows)
            return
        self._begin()
        try:
            self._db.executemany(sql, rows)
        except BaseException:
            if not self._open:
                self.roll_back()  # a part of *rows*: there is nothing to commit
            raise
        self._open.append((sql, rows))
        self._rows += len(rows)

    def write_each(self, sql: str, rows: Sequence[Row]) -> dict[int, Exception]:
        """As :meth:`write`; but rows that cannot be stored do not keep the others from being so.

        Returns by their positions why some were not written.  Raises what is no row's fault.
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
        """Take back what is in the database of the open transaction, to be done again."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def restore(self) -> None:
        """Do again what SQLite has rolled back, if it lets us now; else a later call does."""
        if self._open:
            with contextlib.suppress(Exception):
                self._begin()

    @property
    def uncommitted(self) -> bool:
        return bool(self._open)

    def is_synced(self, change: int) -> bool:
        """Whether *change* is on the medium (a database in memory has none to wait for)."""
        return self._path is None or change <= self._synced

    def commit(self, change: int) -> int:
        """End the transaction; *change*, the newest in it, now survives a crash of the process.

        Returns it.  When it fails, the transaction stays open.
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
            if self._wal >= 0:
                self._go_ahead()
        self.committed = change
        return change

    @property
    def is_long(self) -> bool:
        """Whether to commit the transaction takes long."""
        return self._rows > _MANY

    @property
    def checkpoint_due(self) -> bool:
        """Whether the WAL is so long that who commits is to call :meth:`checkpoint`."""
        if self._look_after > 0 or self._wal < 0:
            return False
        try:
            left = _CHECKPOINT - self._pages()
        except OSError:
            left = 0  # what keeps it from being read, the checkpoint will tell
        self._look_after = max(left, _CHECKPOINT // _PAGES) // _PAGES
        return left <= 0

    def _pages(self) -> int:
        """How many pages the WAL has.  SQLite begins it anew, with another salt, and does not cut
        it off: what follows is of before, or zero."""
        salt = os.pread(self._wal, _SALT, _WAL_HEADER - _SALT - _SALT)

        def old(page: int) -> bool:
            header = _WAL_HEADER + page * self._page
            return os.pread(self._wal, _SALT, header + _SALT) != salt

        size = os.lseek(self._wal, 0, os.SEEK_END)
        return bisect_left(range((size - _WAL_HEADER) // self._page), True, key=old)

    def checkpoint(self) -> None:
        """Put what the WAL has into the database, and that on the medium, so that SQLite begins the
        WAL anew.  Nothing else can be done with the database meanwhile; nothing is uncommitted."""
        self._look_after = _CHECKPOINT // _PAGES
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def check(self) -> None:
        """Raise ``StorageError`` when a sync has failed."""
        if self._failed:
            raise StorageError(self._failed)

    def sync(self, change: int) -> None:
        """Wait until the committed *change* is on the medium.

        Raises:
            StorageError: the medium refused, now or before; the kernel reports such a failure
                only once, so no later sync may claim success.
        """
        if self.is_synced(change):
            return
        with self._sync_lock:
            if self.is_synced(change):
                return  # another's sync covered ours
            self.check()
            latest = self.committed
            try:
                os.fdatasync(self._wal)
            except OSError as error:
                self._failed = (
                    f"catalogue {self._path}: a sync failed ({error.strerror}); what was"
                    " written since the last persist may be lost. Close the target, check the"
                    " medium, reopen it"
                )
                raise StorageError(self._failed) from error
            self._synced = max(self._synced, latest)

    def close(self) -> None:
        """Let go of the WAL."""
        if self._wal >= 0:
            let_go(self._wal)
            self._wal = -1


def let_go(fd: int) -> None:
    """Close a descriptor.  A failure is no news: what is to be durable was synced before."""
    with contextlib.suppress(OSError):
        os.close(fd)


def sync_directory(path: Path | str, opened: Callable[[str, int], int] = os.open) -> None:
    """Put a directory's entries on the medium; *opened* opens it."""
    fd = opened(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
