"""The target that a migration builds at its destination, and its installation by a rename.

A staged target has a database for the catalogue and a storage for the data, and is then installed
or discarded.  It cannot be opened before it is installed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path

from warabi import errors
from warabi.backends import Storage
from warabi.errors import ConfigError
from warabi.metadata import schema
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.dentries import Dentries
from warabi.metadata.journal import Journal, sync_directory, translate
from warabi.target import opening
from warabi.target.config import TargetConfig
from warabi.target.target import Target


class StagedTarget(ABC):
    """A target being built.

    Attributes: ``db``, with the catalogue's schema and initial rows, ``database``, the path of its
    file or None, and ``storage``."""

    db: sqlite3.Connection
    database: Path | None = None
    storage: Storage

    @abstractmethod
    def checkpoint(self) -> None:
        """Flush the data stored so far, and forget the list of dirty regions."""

    @abstractmethod
    def seal(self) -> None:
        """Flush everything to stable storage; nothing may be added later."""

    @abstractmethod
    def install(self) -> Target:
        """Install and open the target, permanently.  On failure nothing has changed."""

    @abstractmethod
    def discard(self) -> None:
        """Remove everything."""


class _Received(Catalogue):
    """A catalogue in memory that already has its rows."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._received = db
        super().__init__(None)

    def _configure(self, path: Path | None) -> None:
        self._db.close()
        self._db = self._received
        self._journal = Journal(self._db, None)
        self._dentries = Dentries(self._db, self._journal)


class StagedVolatileTarget(StagedTarget):
    """A target without a path."""

    def __init__(self, target: TargetConfig) -> None:
        self._capacity = quota_of(target)
        self.storage = target.backend.open(target.config, Path())
        self.db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        schema.make(self.db)
        schema.populate(self.db)

    def checkpoint(self) -> None:
        """No effect: it is not persistent."""

    seal = checkpoint

    def install(self) -> Target:
        return opening.volatile(_Received(self.db), self.storage, self._capacity)

    def discard(self) -> None:
        self.db.close()
        self.storage.close()


class StagedFileTarget(StagedTarget):
    """A target on a file system, whose path and lock are taken at once.

    Args:
        target: its configuration.
        path: where its catalogue will be, an absolute path without symbolic links.

    Raises:
        ConfigError: the path exists, or there can be no target.
        TargetBusy: another process has locked the path.
        StorageFull, StorageError, PermissionDenied: storage errors.
    """

    def __init__(self, target: TargetConfig, path: Path) -> None:
        self._path = path
        self._staged = self.database = opening.staged(path)
        self._opening = opening.opening_of(target.backend, target.config)._replace(path=str(path))
        self._made: list[Path] = []  # created directories, outermost first
        self._sealed = False
        try:
            self._claim()
        except OSError as error:
            if isinstance(error, errors.Exception):
                raise
            raise errors.from_os(error, f"target {path}") from error

    def _claim(self) -> None:
        self._check_free()
        missing = [above for above in self._path.parents if not above.exists()]
        try:
            for above in reversed(missing):
                above.mkdir(exist_ok=True)
                self._made.append(above)
            self._regions, self._lock, made = opening.lock_regions(self._path, 0.0)
        except BaseException:
            self._remove_made()
            raise
        if made:
            self._made.append(self._regions)
        try:
            self._check_free()  # again, now that no other process can change it
            opening.clear(self._path, self._regions, self._opening.backend)
            self.storage = self._opening.storage(self._regions)
            schema.create(self._staged, self._opening.backend.name, self._opening.plan.pool)
            self.db = sqlite3.connect(self._staged, isolation_level=None, check_same_thread=False)
            # Nothing needs to survive a crash before it is sealed.
            self.db.execute("PRAGMA journal_mode = OFF")
            self.db.execute("PRAGMA synchronous = OFF")
        except BaseException:
            self._remove_leftovers()
            raise

    def _check_free(self) -> None:
        if opening.inspect(self._path) == "target":
            raise ConfigError(f"target {self._path}: exists; a migration never replaces a target")

    def checkpoint(self) -> None:
        self.storage.persist_all()
        self.storage.close()
        self.storage = self._opening.storage(self._regions)

    def seal(self) -> None:
        self.db.close()
        self.storage.persist_all()
        self.storage.close()
        with open(self._staged, "rb") as file:
            os.fsync(file.fileno())
        self._sealed = True

    def install(self) -> Target:
        self._staged.replace(self._path)
        try:
            for directory in (*(made.parent for made in self._made), self._path.parent):
                sync_directory(directory)
            return opening.open_holding(self._path, self._opening, self._regions, self._lock)
        except BaseException:
            self._path.replace(self._staged)
            raise

    def discard(self) -> None:
        if not self._sealed:
            self.db.close()
            self.storage.close()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        with contextlib.suppress(OSError):  # the next target here removes leftovers
            opening.clear(self._path, self._regions, self._opening.backend)
            if self._regions in self._made:
                self._lock.remove()
        self._lock.release()
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # other files may have been created there
            for directory in reversed(self._made):
                directory.rmdir()


def quota_of(target: TargetConfig) -> int | None:
    """Return the quota in bytes of a target at its destination."""
    plan = target.backend.plan(target.config)
    return plan.pool if plan.capacity is None else plan.capacity


def damaged(error: sqlite3.Error, path: Path | None = None) -> errors.Exception:
    """The library's exception for a failed statement of a catalogue being built."""
    if isinstance(error, sqlite3.IntegrityError):
        return errors.ProtocolError(f"receive_rows: duplicate row: {error}")
    return translate(error, path)
