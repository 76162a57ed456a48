"""A catalogue that is kept on another system, while it is open in temporary local files.

The store has the same two files as SQLite: the database, as of the last checkpoint, and the WAL
since then.  ``sync`` appends to the stored WAL what was committed; a checkpoint writes the changed
pages into the stored database, and then the WAL begins again.  The order is SQLite's own, so a
crash at any moment leaves a pair that SQLite recovers: pages are written again from the WAL, and
what of the WAL is incomplete or older is recognized by its checksums and salt.

The local files have no names while they are in use, so a killed process leaves none.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from warabi.errors import ConfigError, CorruptTarget
from warabi.metadata.journal import close_quietly

_DATABASE, _WAL = "catalogue", "wal"
_HEADER = 32  # bytes of the WAL before its frames
_FRAME = struct.Struct(">II8s8s")  # page, pages of the database if it commits, salt, checksum
_MOST = 16 * 1024 * 1024
"""Bytes of pages to read and write at a time."""


class Store(ABC):
    """Keeps a target's two files; every change is on stable storage when the call returns.

    Errors are raised as ``StorageError``, lack of space as ``StorageFull``.
    """

    @abstractmethod
    def write(self, name: str, extents: Sequence[tuple[int, bytes]]) -> None:
        """Write bytes at offsets of the file *name*."""

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """Return *size* bytes at *offset*, zeros where there are none; None without that file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes; 0 if there is none."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""


class Replica:
    """The local files of a catalogue, and what of them the store lacks.

    Its methods are called with the journal's sync lock held, ``committed`` also with the target's.

    Args:
        store: where it is kept.
        file: the local database, in a directory that exists.
        label: the target, for messages.
    """

    def __init__(self, store: Store, file: Path, label: str) -> None:
        self.file = file
        self._store = store
        self.label = label
        self._database = self._wal = -1
        self._page = 0  # bytes
        self._salt = b""
        self._end = 0  # of the last commit in the WAL
        self._stored = 0  # end of what the store has of the WAL
        self._changed: set[int] = set()  # pages in the WAL
        self._checkpointed: set[int] = set()  # pages that the stored database lacks

    def close(self) -> None:
        """Close the local files."""
        for fd in (self._database, self._wal):
            if fd >= 0:
                close_quietly(fd)
        self._database = self._wal = -1

    # Before it is opened

    def fetch(self, application: int, version: int) -> bool:
        """Copy the stored database, with its WAL applied, to the local file; False if there is
        none.

        Raises:
            ConfigError: it is not of this application, or of a newer version.
            CorruptTarget: it is damaged.
        """
        header = self._store.read(_DATABASE, 0, 100)
        if header is None:
            return False
        page, pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
        if (
            not header.startswith(b"SQLite format 3\0")
            or int.from_bytes(header[68:72]) != application
        ):
            raise ConfigError(f"target {self.label}: is not a warabi target; it was not modified")
        self._page = 65536 if page == 1 else page
        self._copy(_DATABASE, self._page * pages, self.file)
        wal = Path(f"{self.file}-wal")
        if self._copy(_WAL, self._store.size(_WAL), wal):
            changed = self._pages_of(wal)
            try:
                with contextlib.closing(sqlite3.connect(self.file, isolation_level=None)) as db:
                    db.execute("PRAGMA locking_mode = EXCLUSIVE")
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.Error as error:
                raise CorruptTarget(f"catalogue {self.label}: {error}") from error
            self._open_database()
            self._write_pages(changed)
            self._store.remove(_WAL)
        with open(self.file, "rb") as file:
            found = int.from_bytes(file.read(64)[60:])
        if found > version:
            raise ConfigError(
                f"target {self.label}: written by a newer version (schema {found}, this one reads"
                f" up to {version})"
            )
        return True

    def _copy(self, name: str, size: int, file: Path) -> int:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb", buffering=0) as local:
            for start in range(0, size, _MOST):
                local.write(self._store.read(name, start, min(_MOST, size - start)) or b"")
        return size

    def _pages_of(self, wal: Path) -> set[int]:
        """The pages in a WAL, whether they are valid or not."""
        found = set()
        with open(wal, "rb") as file:
            file.seek(_HEADER)
            while len(frame := file.read(_FRAME.size + self._page)) > _FRAME.size:
                found.add(_FRAME.unpack_from(frame)[0])
        return found

    def publish(self) -> None:
        """Store a new local database, which nothing has opened."""
        with open(self.file, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            self._store.remove(_WAL)
            # The beginning last: without it there is no database.
            for start in reversed(range(0, size, _MOST)):
                self._store.write(_DATABASE, [(start, os.pread(file.fileno(), _MOST, start))])

    # While it is open

    def _open_database(self) -> None:
        if self._database < 0:
            self._database = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)

    def attach(self, page: int) -> None:
        """The WAL, which has pages of *page* bytes, exists, and was not checkpointed."""
        self._page = page
        self._open_database()
        self._wal = os.open(f"{self.file}-wal", os.O_RDONLY | os.O_CLOEXEC)
        self._checkpointed.add(1)  # which says that there is a WAL
        self.committed()

    def committed(self) -> None:
        """A transaction was committed."""
        salt = os.pread(self._wal, _HEADER, 0)[16:24]
        if salt != self._salt:
            self._salt, self._end = salt, 0
        while self._advance():
            pass

    def _advance(self) -> bool:
        """Go to the end of the next transaction in the WAL, if there is one."""
        pages, at = [], max(self._end, _HEADER)
        while True:
            frame = os.pread(self._wal, _FRAME.size, at)
            if len(frame) < _FRAME.size:
                return False
            page, commits, salt, _ = _FRAME.unpack(frame)
            if salt != self._salt:
                return False
            pages.append(page)
            at += _FRAME.size + self._page
            if commits:
                break
        self._changed.update(pages)
        self._end = at
        return True

    @property
    def pages(self) -> int:
        """Pages in the WAL."""
        return self._end // (_FRAME.size + self._page)

    def sync(self) -> None:
        """Store what was committed before the call."""
        end = self._end
        if self._checkpointed:
            self._write_pages(self._checkpointed)
            self._checkpointed = set()
        while self._stored < end:
            data = os.pread(self._wal, min(_MOST, end - self._stored), self._stored)
            self._store.write(_WAL, [(self._stored, data)])
            self._stored += len(data)

    def checkpoint(self, db: sqlite3.Connection) -> None:
        """Apply the WAL to both databases; nothing is uncommitted."""
        self.sync()
        busy, pages, done = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or pages != done:
            return
        self._checkpointed, self._changed = self._changed, set()
        self._stored = self._end = 0
        self.sync()

    def seal(self, db: sqlite3.Connection) -> None:
        """Checkpoint, and remove the stored WAL."""
        self.checkpoint(db)
        self._store.remove(_WAL)

    def _write_pages(self, pages: set[int]) -> None:
        """Write pages of the local database into the stored one."""
        extents: list[tuple[int, bytes]] = []
        total = 0
        for first, count in _runs(sorted(pages), _MOST // self._page):
            start = (first - 1) * self._page
            data = os.pread(self._database, count * self._page, start)
            if data:  # unless the page was in an invalid frame
                extents.append((start, data))
            total += len(data)
            if total >= _MOST:
                self._store.write(_DATABASE, extents)
                extents, total = [], 0
        if extents:
            self._store.write(_DATABASE, extents)


def _runs(pages: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the first page and the number of pages of each run of at most *most*."""
    first, count = 0, 0
    for page in pages:
        if count and page == first + count and count < most:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count
