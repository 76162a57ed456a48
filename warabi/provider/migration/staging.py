"""Receiving a target: first rows, then the data of each region, then its installation."""

from __future__ import annotations

import logging
import sqlite3
import stat
from pathlib import Path
from typing import Any

from warabi._core.attributes import ROOT
from warabi._core.log_limit import RateLimit
from warabi.errors import ConfigError, ProtocolError, StorageFull
from warabi.provider.migration.options import MigrationPlan
from warabi.provider.migration.records import TABLES, pieces, rows
from warabi.provider.migration.staged import (
    StagedFileTarget,
    StagedTarget,
    StagedVolatileTarget,
    damaged,
    quota_of,
)
from warabi.region import RegionID
from warabi.target.target import Target

log = logging.getLogger(__name__)
log.addFilter(RateLimit())

_CHECKPOINT = 16384
"""Regions after which their data are flushed, which bounds the list of dirty regions."""
_REGULAR = f"mode & {0o170000} = {stat.S_IFREG}"


class Staging:
    """The received part of a target.  For one thread at a time; calls may wait for stable storage.

    All methods raise ``ProtocolError`` for data that no source would send, ``StorageFull`` and
    ``StorageError`` for storage errors; then only :meth:`discard` may be called.

    Args:
        plan: the source's announcement; its target's path is final.
    """

    def __init__(self, plan: MigrationPlan) -> None:
        target = plan.target
        if target.backend.remote is not None:
            raise ConfigError("migrate: targets cannot be received into a pool; export and import")
        self._plan = plan
        self._quota = quota_of(target)
        self._place: StagedTarget
        if target.path is None:
            self._place = StagedVolatileTarget(target)
        else:
            self._place = StagedFileTarget(target, Path(target.path))
        self._db = self._place.db
        self._region = RegionID()  # the region being received
        self._size = 0
        self._next = 0
        self._regions = 0
        self._used = 0  # bytes that count for the quota, of regions that are complete
        self._since = 0  # regions since the last checkpoint
        self._sealed = False
        try:
            self._begin()
        except sqlite3.Error as error:
            self._place.discard()
            raise damaged(error, self._place.database) from error

    def _begin(self) -> None:
        self._db.execute("BEGIN")
        self._db.execute("DELETE FROM inode")
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'uuid'", (self._plan.uuid,))

    def _check_quota(self) -> None:
        """Count what the region that was received uses."""
        if self._quota is None or not self._regions:
            return
        self._used += min(self._size, self._place.storage.space(self._region, self._size))
        if self._used > self._quota:
            raise StorageFull(
                f"migrate: the target's bytes exceed the {self._quota} bytes that it may use at the"
                " destination"
            )

    def add_rows(self, table: str, payload: memoryview) -> None:
        """Add rows of a table of the catalogue."""
        found = rows(table, payload)
        marks = ", ".join("?" * len(TABLES[table]))
        sql = f"INSERT INTO {table}({', '.join(TABLES[table])}) VALUES({marks})"
        try:
            self._db.executemany(sql, found)
        except sqlite3.Error as error:
            raise damaged(error, self._place.database) from error

    def add_data(self, payload: memoryview) -> None:
        """Add data of regions, whose rows exist: one region after the other, by slot."""
        for region, offset, length, data in pieces(payload):
            if self._next == self._size and (region != self._region or not self._regions):
                self._start(region)
            if region != self._region or offset != self._next or offset + length > self._size:
                raise ProtocolError(
                    f"receive_data: {length} bytes at {offset} of {region!r}, expected those at"
                    f" {self._next} of {self._region!r} of {self._size} bytes"
                )
            if data:
                self._place.storage.write(region, offset, data)
            self._next += length

    def _start(self, region: RegionID) -> None:
        if region.slot <= self._region.slot or region.slot >= 1 << 63:
            raise ProtocolError(f"receive_data: {region!r} after {self._region!r}")
        if self._since == _CHECKPOINT:
            self._place.checkpoint()
            self._since = 0
        found = self._one(
            f"SELECT generation, size FROM inode WHERE ino = ? AND {_REGULAR}", region.slot
        )
        if found is None or found[0] != region.generation:
            raise ProtocolError(f"receive_data: {region!r} is in no row")
        self._check_quota()
        self._place.storage.create(region, found[1])
        self._region, self._size, self._next = region, found[1], 0
        self._regions += 1
        self._since += 1

    def _one(self, sql: str, *values: Any) -> Any:
        try:
            return self._db.execute(sql, values).fetchone()
        except sqlite3.Error as error:
            raise damaged(error, self._place.database) from error

    def finish(self, expected: int) -> None:
        """Check that all *expected* regions are present and consistent; flush everything."""
        (regions,) = self._one(f"SELECT count(*) FROM inode WHERE {_REGULAR}")
        if regions != self._regions or self._next != self._size or regions != expected:
            raise ProtocolError(
                f"receive_finish: {self._regions} regions and {regions} rows of {expected} arrived"
            )
        self._check_quota()
        dangling = self._one(
            "SELECT count(*) FROM dentry d LEFT JOIN inode i ON i.ino = d.ino"
            " LEFT JOIN inode p ON p.ino = d.parent"
            f" WHERE i.ino IS NULL OR p.ino IS NULL OR p.mode & {0o170000} != {stat.S_IFDIR}"
        )[0]
        root = self._one("SELECT mode FROM inode WHERE ino = ?", ROOT)
        if dangling or root is None or not stat.S_ISDIR(root[0]):
            raise ProtocolError(
                f"receive_finish: {dangling} names refer to no inode, or there is no root directory"
            )
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise damaged(error, self._place.database) from error
        self._place.seal()
        self._sealed = True

    def commit(self) -> Target:
        """Install and open the target.  On failure there is none."""
        if not self._sealed:
            raise ProtocolError("receive_commit: before receive_finish")
        return self._place.install()

    def discard(self) -> None:
        """Remove everything."""
        self._place.discard()
