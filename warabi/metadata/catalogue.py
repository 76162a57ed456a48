"""The catalogue of a target in SQLite: inodes with sizes and attributes, and names.

Rules of this module:

* Nothing here locks.  Every call is made with the target's lock held (see ``target/target.py``), so
  a method may rely on nothing changing while it runs.
* While an ``Inode`` object is cached it is authoritative; its row is updated by the next
  ``flush``.  There is one object per inode: only ``trim`` drops objects, and it is called only
  while no caller holds one.
* Names are cached and written back in the same way (``dentries.py``).  Any query of rows other
  than by their keys flushes first.
* Volatile changes are collected in one open transaction (``journal.py``).  ``commit`` writes it to
  the WAL without waiting for stable storage; ``sync`` waits, **without** the target's lock, so that
  slow storage delays only callers that requested durability, and concurrent persists share one
  wait.
* The location of region data is not known here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import sqlite3
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from warabi._core import forks
from warabi._core.attributes import ROOT, Attributes
from warabi._core.changes import ATTRIBUTES, CONTENT, ORIGIN
from warabi.errors import (
    ConfigError,
    CorruptTarget,
    InvalidRegion,
    StorageError,
    path_error,
)
from warabi.metadata import domain
from warabi.metadata.clock import Clock
from warabi.metadata.dentries import Dentries, finish_graft
from warabi.metadata.inode import OWN, PACKED, Inode
from warabi.metadata.journal import Journal, Row, sync_directory, translate
from warabi.metadata.notifications import Feed
from warabi.metadata.replica import Replica
from warabi.metadata.schema import COLUMNS, OUTSIDE, UPSERT, make, migrate, populate
from warabi.region import RegionID

log = logging.getLogger(__name__)

_CACHED = 65536
_MOST_DENSE = 262_144  # regions that are known to have no holes while they are not in memory
_BLOCK = 4096  # bytes by which a file's space exceeds its size at most, unless it was allocated
_ROW = 1024  # most bytes of memory for an inode or a name, without its variable-length data
_FLUSH_AT = 4096  # dirty entries that may be left for a commit, which also holds the lock
_TOTALS = 4096  # most inodes whose attributes' sizes are kept
_FLUSH = 256  # entries per flush, which bounds how long the lock is held


class Catalogue:
    """The catalogue at *path*, or a temporary one in memory.

    Args:
        path: the database, or None.
        backend: its backend; catalogues without such a record have ``file``.
        replica: its local files, if it is kept elsewhere; *path* is what it is called then.

    Raises:
        ConfigError: it belongs to another backend; nothing was changed.
        CorruptTarget: the database is damaged.
        StorageError: it cannot be opened or written.
    """

    def __init__(
        self, path: Path | None, backend: str = "file", replica: Replica | None = None
    ) -> None:
        self.path = path
        self._replica = replica
        file = self._file = path if replica is None else replica.file
        self._random = random.Random()
        self._cache: dict[int, Inode] = {}
        self.space_of: Callable[[RegionID, int], int] | None = None
        """Tells how many bytes of storage a region of a given size uses; the target sets it."""
        self._dense: set[bytes] = set()
        self._trim_at = _CACHED  # size of the cache above which it is trimmed
        self._removed = 0  # inodes removed since the tables were copied
        self.by_rid: dict[bytes, Inode] = {}
        self._dirty: dict[int, Inode] = {}
        # Dirty inodes that cannot be stored: the error, and whether a persist must fail for it.
        self._unstored: dict[int, tuple[Exception, bool]] = {}
        self.change = 0  # number of the latest change
        self._joined = 0  # number of the change that joined the last graft
        # Bytes of the names and of the values of inodes' attributes, see `xattr_bytes`.
        self._xattr_totals: dict[int, tuple[int, int]] = {}
        self._charge: Callable[[int], None] | None = None
        self.feed = Feed()
        self.clock = Clock()
        try:
            self._db = sqlite3.connect(
                str(file or ":memory:"), isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise translate(error, path) from error
        self._journal = Journal(self._db, path, replica)
        self._dentries = Dentries(self._db, self._journal)
        try:
            self._configure(path)
            self._next_ino = 1 + self._one(
                "SELECT max(coalesce(max(ino), 0), coalesce((SELECT value FROM meta"
                f" WHERE key = 'last'), 0)) FROM inode WHERE ino < {domain.SEQUENCE}"
            )
            self._count_on(0)
            # In halves: with sparse regions the sum of the sizes may exceed 64 bits.
            self.count, high, low = self._db.execute(
                "SELECT count(*), coalesce(sum(size >> 32), 0), coalesce(sum(size & 0xffffffff), 0)"
                f" FROM inode WHERE mode & {0o170000} = {stat.S_IFREG}"
            ).fetchone()
            self.used = (high << 32) + low
            self.holes: dict[RegionID, int] = {}
            """Bytes by which regions use less space than their sizes, counted in a target with a
            quota."""
            self.spared = 0  # their sum
            self._has_xattrs = bool(self._one("SELECT EXISTS(SELECT 1 FROM xattr)"))
            self.uuid = str(self._one("SELECT value FROM meta WHERE key = 'uuid'"))
            self.clean = bool(self._one("SELECT value FROM meta WHERE key = 'clean'"))
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            self.epoch = str(meta.get("epoch", "")) if self.clean else ""
            """Unchanged as long as no volatile change can have been lost."""
            self.epoch = self.epoch or uuid.uuid4().hex
            self.capacity: int | None = meta.get("capacity")
            """The quota in bytes that was set when the target was created."""
            if not isinstance(self.capacity, int | None):
                raise CorruptTarget(f"catalogue {path}: the capacity is {self.capacity!r}")
            if (found := meta.get("backend", "file")) != backend:
                raise ConfigError(f"target {path}: is a target of type {found!r}, not {backend!r}")
            self._settled: int | None = meta.get("settled")
            if not isinstance(self._settled, int | None):
                raise CorruptTarget(
                    f"catalogue {path}: settled is {self._settled!r}; see warabi fsck"
                )
            if path is not None:
                migrate(self._db, path, replicated=self._replica is not None)
                if not self.clean:
                    self._finish_graft()
                self._check_rows(path)
                self._open_wal(path)
            self.summed: str | None = meta.get("checksums")
            """The checksum algorithm of regions, see :mod:`warabi.metadata.checksums`; None: no
            checksums."""
        except BaseException as error:
            self.abandon()
            name = getattr(error, "sqlite_errorname", "")
            if isinstance(error, TypeError) or name == "SQLITE_ERROR":
                # A row, or a table, that every catalogue has, is missing.
                raise CorruptTarget(f"catalogue {path}: incomplete; see warabi fsck") from error
            if isinstance(error, sqlite3.Error):
                raise translate(error, path) from error
            raise

    def _one(self, sql: str) -> int:
        value: int = self._db.execute(sql).fetchone()[0]
        return value

    def _configure(self, path: Path | None) -> None:
        if path is None:
            self._db.execute("PRAGMA journal_mode = OFF")
            make(self._db)
            populate(self._db)
            self._dentries.made(ROOT)
            return
        # Exclusive locking before WAL: no -shm file and no lock calls; the target's own lock
        # already excludes other processes.  NORMAL: a commit does not wait for stable storage,
        # `sync` does.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA cache_size = -65536")
        self._db.execute("PRAGMA cache_spill = OFF")
        if self._replica is not None:
            self._db.execute("PRAGMA wal_autocheckpoint = 0")

    def _finish_graft(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        finish_graft(self._db)  # when this fails, the connection is closed
        self._db.execute("COMMIT")

    def _check_rows(self, path: Path) -> None:
        """Check cheaply that the rows are those of a catalogue; ``warabi fsck`` checks the rest."""
        if self._one(f"SELECT mode & {0o170000} FROM inode WHERE ino = 1") != stat.S_IFDIR:
            raise CorruptTarget(f"catalogue {path}: no root directory; see warabi fsck")
        row = self._db.execute(f"SELECT {COLUMNS} FROM inode WHERE {OUTSIDE} LIMIT 1").fetchone()
        if row is not None:
            raise CorruptTarget(
                f"catalogue {path}: inode {row[0]} has invalid values {row!r:.300}; see warabi fsck"
            )

    def _open_wal(self, path: Path) -> None:
        """Mark the catalogue as open, which makes SQLite create the WAL that ``sync`` flushes."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES('epoch', ?)", (self.epoch,))
        self._db.execute("UPDATE meta SET value = 0 WHERE key = 'clean'")
        self._journal.open_wal()
        if self._replica is None:
            sync_directory(path.parent)

    # Memory

    def limit(self, charge: Callable[[int], None]) -> None:
        """Have *charge* called before rows use memory; it raises StorageFull if there is too
        little."""
        self._charge = charge

    def charge(self, count: int) -> None:
        """Account for a new row with *count* bytes in addition to the fixed size.

        Called before anything is changed: for an inode that is not a region (regions are charged
        with their data), a further name, or an attribute.

        Raises:
            StorageFull: there is no memory for it.
        """
        if self._charge is not None:
            self._charge(count + _ROW)

    def memory(self) -> int:
        """Return the approximate memory use in bytes.  Needs no lock: SQLite has its own."""
        try:
            pages = self._one("PRAGMA page_count") - self._one("PRAGMA freelist_count")
            size = pages * self._one("PRAGMA page_size")
        except sqlite3.ProgrammingError:  # closed
            return 0
        pending = [
            len(inode.target or b"") for inode in [*self._dirty.values()] if not inode.stored
        ]
        return size + sum(pending) + (len(pending) + len(self._dentries.dirty)) * _ROW // 2

    # Inodes

    def add(self, mode: int, uid: int, gid: int, *, size: int = 0, rdev: int = 0,
            anonymous: bool = False, target: bytes | None = None,
            rid: RegionID | None = None, packed: int = OWN) -> Inode:  # fmt: skip
        """Create an inode without names.  A directory starts with two links, its name and its dot.

        With *rid* it gets that ID, which a region of another target had.

        Raises:
            InvalidRegion: *rid* is not a valid region ID, or its slot is in use.
            PathError: EINVAL for an invalid mode, owner or device number, and as
                ``domain.link_target`` for *target*.
            StorageFull: as :meth:`charge`.
        """
        mode, rdev = domain.mode(mode), domain.device(rdev)
        uid, gid = domain.owner(uid), domain.owner(gid, "group ID")
        if stat.S_IFMT(mode) not in domain.KINDS:
            raise path_error(errno.EINVAL, f"mode {mode:#o}: no file type")
        if target is not None:
            domain.link_target(target)
        now = self.clock.exact()
        ino, generation = self._next_ino, self._random.getrandbits(63)
        if rid is not None:
            ino, generation = rid.slot, rid.generation
            if not domain.is_region_id(ino, generation):
                raise InvalidRegion(f"create: {rid!r} is not a valid region ID")
            if (taken := self.get(ino)) is not None:
                kind = "that region" if taken.rid == rid else "another inode"
                raise InvalidRegion(
                    f"create: {rid!r}: slot {ino} of this target is in use by {kind}"
                )
        if not stat.S_ISREG(mode):
            self.charge(len(target or b""))
        self._count_on(ino)
        inode = Inode(domain.Row(
            ino, generation, mode, 2 if stat.S_ISDIR(mode) else 0, uid, gid, rdev,
            size, now, now, now, int(anonymous), target, now, 0, packed,
        ))  # fmt: skip
        inode.writer = ORIGIN.get()
        self._remember(inode)
        if stat.S_ISDIR(mode):
            self._dentries.made(ino)
        if stat.S_ISREG(mode):
            self.count += 1
            self.used += size
            if size:
                self.may_have_holes(inode)
        self.touch(inode, durable=True, tell=False)
        return inode

    def _count_on(self, ino: int) -> None:
        """Make new slots follow *ino*; see ``domain.SEQUENCE``."""
        if ino < domain.SEQUENCE or ino == self._next_ino:
            self._next_ino = max(self._next_ino, ino + 1)
        while self._next_ino >= domain.SEQUENCE and self.get(self._next_ino) is not None:
            self._next_ino += 1  # in use by an imported region

    def set_attributes(
        self, inode: Inode, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, atime: int | None = None, mtime: int | None = None,
        ctime: int | None = None,
    ) -> None:  # fmt: skip
        """Set what is not None; of *mode* only the permission bits.  The caller touches the inode.

        Times are clamped.

        Raises:
            PathError: EINVAL for an invalid mode or owner; nothing is set then.
        """
        if mode is not None:
            mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(domain.mode(mode))
        uid = None if uid is None else domain.owner(uid)
        gid = None if gid is None else domain.owner(gid, "group ID")
        atime = None if atime is None else domain.clamped(atime, "access time")
        mtime = None if mtime is None else domain.clamped(mtime, "modification time")
        inode.mode = inode.mode if mode is None else mode
        inode.uid = inode.uid if uid is None else uid
        inode.gid = inode.gid if gid is None else gid
        inode.atime = inode.atime if atime is None else atime
        inode.mtime = inode.mtime if mtime is None else mtime
        inode.ctime = inode.ctime if ctime is None else domain.clamped_change(ctime)

    def _remember(self, inode: Inode) -> None:
        self._cache[inode.ino] = inode
        if stat.S_ISREG(inode.mode):
            self.by_rid[inode.rid] = inode

    def get(self, ino: int) -> Inode | None:
        """Return the inode *ino*, or None."""
        inode = self._cache.get(ino)
        if inode is None and -(1 << 63) <= ino < 1 << 63:
            row = self._db.execute(f"SELECT {COLUMNS} FROM inode WHERE ino = ?", (ino,)).fetchone()
            if row is not None:
                inode = self._loaded(row)
                inode.stored = True
                self._remember(inode)
        return inode

    # Space

    def _loaded(self, row: tuple[Any, ...]) -> Inode:
        inode = Inode(cast(domain.Row, row))  # a conversion takes longer than all the rest
        if stat.S_ISREG(inode.mode) and inode.rid not in self._dense:
            inode.measure = self._space
        return inode

    def may_have_holes(self, inode: Inode) -> None:
        """Have the storage asked how much space the region uses, until it is as much as its size;
        what is only written and appended to needs no asking."""
        inode.measure = self._space
        self._dense.discard(inode.rid)

    def _space(self, inode: Inode) -> int:
        if inode.packed == PACKED or self.space_of is None:
            space = inode.size
        else:
            space = self.space_of(inode.rid, inode.size)
        if inode.size <= space < inode.size + _BLOCK:
            inode.measure = None
            if len(self._dense) >= _MOST_DENSE:
                self._dense.clear()
            self._dense.add(inode.rid)
            return -1
        return space

    def count_holes(self, inode: Inode) -> int:
        """Find out by how many bytes the region uses less space than its size, and return that."""
        space = -1 if inode.measure is None else inode.measure(inode)
        self.set_holes(inode, max(0, inode.size - space) if space >= 0 else 0)
        return self.holes.get(inode.rid, 0)

    def count_all_holes(self) -> None:
        """The same for all regions."""
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM inode WHERE mode & {0o170000} = {stat.S_IFREG} AND size > 0"
        )
        for row in rows:
            self.count_holes(self._cache.get(row[0]) or self._loaded(row))

    def set_holes(self, inode: Inode, holes: int) -> None:
        self.spared += holes - self.holes.pop(inode.rid, 0)
        if holes:
            self.holes[inode.rid] = holes

    def get_cached(self, ino: int) -> Inode | None:
        """Return the inode *ino* if it is in memory, as every pinned or changed one is."""
        return self._cache.get(ino)

    def region(self, rid: bytes) -> Inode | None:
        """Return the inode of a live region, or None for an ID that is erased, foreign or
        invalid."""
        inode = self.by_rid.get(rid)
        if inode is None and isinstance(rid, RegionID):
            found = self.get(rid.slot)
            if found is not None and found.rid == rid and stat.S_ISREG(found.mode):
                inode = found
        return inode

    def touch(self, inode: Inode, *, durable: bool, tell: bool = True) -> None:
        """Record a change of *inode*.

        Args:
            inode: the inode.
            durable: whether a persist of it must make the change durable.
            tell: whether to notify subscribers; false if the inode is new, or the caller notifies.
        """
        self._dirty[inode.ino] = inode
        if tell and self.feed.watched:
            self.feed.inode(inode.ino, ATTRIBUTES)
        if durable:
            self.change += 1
            inode.changed = self.change
            if inode.share is not None:
                inode.share.clear_metadata_durable()

    def resize(self, inode: Inode, size: int) -> None:
        """Record a region's size; the storage decides what of it is durable."""
        self.used += size - inode.size
        inode.size = size
        self.touch(inode, durable=False)
        if inode.share is not None:
            inode.share.clear_metadata_durable()

    def remove(self, inode: Inode) -> None:
        """Remove *inode* and its xattrs; its names were removed, except those of an erased
        region."""
        self._cache.pop(inode.ino, None)
        self._xattr_totals.pop(inode.ino, None)
        self.by_rid.pop(inode.rid, None)
        self._removed += 1
        if self._removed >= _CACHED:  # a dictionary does not shrink when keys are removed
            self._removed = 0
            self._cache = dict(self._cache)
        self._dirty.pop(inode.ino, None)
        if self._unstored:
            self._unstored.pop(inode.ino, None)
            self._dentries.withheld.discard(inode.ino)
        self._dentries.removed(inode.ino)
        if stat.S_ISREG(inode.mode):
            self.count -= 1
            self.used -= inode.size
            if self.holes:
                self.set_holes(inode, 0)
        if inode.stored:
            self.write("DELETE FROM inode WHERE ino = ?", (inode.ino,))
            self.write("DELETE FROM xattr WHERE ino = ?", (inode.ino,))
            if self.summed:
                self.write("DELETE FROM checksum WHERE ino = ?", (inode.ino,))
                self.write("DELETE FROM unsettled WHERE ino = ?", (inode.ino,))
        self.change += 1
        if self.feed.watched:
            self.feed.inode(inode.ino, CONTENT)
            if stat.S_ISREG(inode.mode):
                self.feed.name(ROOT, inode.rid.hex().encode(), 0)

    def trim(self) -> None:
        """Drop unused inodes when too many are cached.  No caller may hold one."""
        self.flush_some(_FLUSH_AT)
        self._dentries.trim()
        if len(self._cache) <= self._trim_at:
            return
        for inode in list(self._cache.values()):
            if len(self._cache) <= _CACHED // 2:
                break
            used = inode.users or inode.pins or inode.exclusive or inode.share is not None
            if not (used or inode.ino in self._dirty):
                del self._cache[inode.ino]
                self.by_rid.pop(inode.rid, None)
        # Inodes in use stay cached, however many; raise the limit to avoid scanning them again
        # soon.
        self._trim_at = max(_CACHED, len(self._cache) * 3 // 2)

    # Names

    def lookup(self, parent: int, name: bytes) -> int | None:
        return self._dentries.get(parent, name)

    def link(self, parent: int, name: bytes, inode: Inode, *, new: bool = False) -> None:
        """Make *name* refer to *inode*; *new*: it did not exist.  The caller sets link counts."""
        self._dentries.set(parent, name, inode.ino)
        self.touch(inode, durable=True)
        if self.feed.watched:
            self.feed.name(parent, name, inode.ino, new=new)

    def unlink(self, parent: int, name: bytes) -> None:
        self._dentries.set(parent, name, None)
        self.change += 1
        if self.feed.watched and parent > 0:
            self.feed.name(parent, name, 0)

    def names(self, inode: Inode, most: int = -1) -> list[tuple[int, bytes]]:
        """Return the (parent, name) pairs of *inode*, at most *most* if not negative."""
        return [] if inode.anonymous else self._dentries.of(inode.ino, most)

    def has_entries(self, ino: int) -> bool:
        return self._dentries.any_in(ino)

    def entries(self, parent: int, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        """Return up to *limit* entries of a directory that sort after *after*, by name."""
        self.flush()
        sql = (
            f"SELECT name, i.{COLUMNS.replace(', ', ', i.')} FROM dentry d JOIN inode i"
            " ON i.ino = d.ino WHERE parent = ? AND name > ? ORDER BY name LIMIT ?"
        )
        rows: list[tuple[Any, ...]] = []
        parents = self._dentries.parents(parent)
        for each in parents:
            rows += self._db.execute(sql, (each, after, limit))
        if len(parents) > 1:
            rows = sorted(rows)[:limit]
        return [(row[0], self._attributes(row[1:])) for row in rows]

    def regions(self, after: int, limit: int, *, anonymous: bool) -> list[Attributes]:
        """Return up to *limit* regions with slots above *after*, by slot; *anonymous*: without
        names."""
        self.flush()
        after = min(after, (1 << 63) - 1)  # a foreign ID's slot may have 64 bits
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM inode WHERE ino > ? AND mode & {0o170000} = {stat.S_IFREG}"
            f" {'AND anonymous = 1' if anonymous else ''} ORDER BY ino LIMIT ?",
            (after, limit),
        )
        return [self._attributes(row) for row in rows]

    def _attributes(self, row: tuple[int, ...]) -> Attributes:
        cached = self._cache.get(row[0])
        return (cached or self._loaded(row)).attributes()

    # Names that are staged for a graft: see ``dentries.py``

    @property
    def staging(self) -> bool:
        """Whether there may be staged names."""
        return self._dentries.staging

    @property
    def joined(self) -> bool:
        """Whether those are names of their directories."""
        return self._dentries.joined

    def begin_staging(self) -> None:
        """From now on names may be staged; what others do to the same names is noted."""
        self._dentries.staging = True

    def stage(self, parent: int, name: bytes, inode: Inode) -> None:
        """As :meth:`link`, for a name that cannot be looked up yet."""
        self._dentries.set(parent, name, inode.ino)
        self.touch(inode, durable=True, tell=False)

    def unstage(self, parent: int, name: bytes) -> None:
        """Forget a staged name, or one in a directory whose name is staged."""
        self._dentries.set(parent, name, None)
        self.change += 1

    def conflict(self) -> tuple[int, bytes] | None:
        """A name, with its directory, that is staged and was made by others meanwhile."""
        for parent, name in self._dentries.conflicts:
            if self.lookup(parent, name) is not None:
                return parent, name
        self._dentries.conflicts.clear()
        return None

    def join(self) -> None:
        """Make all staged names names of their directories, at once."""
        self.write("INSERT OR REPLACE INTO meta VALUES('joined', 1)", ())
        self._dentries.joined = True
        self.change += 1
        self._joined = self.change

    def staged_parent(self) -> int | None:
        """The parent of some staged names, or None when there are none."""
        return self._dentries.staged_parent()

    def page(self, parent: int, limit: int) -> list[tuple[bytes, int]]:
        """Up to *limit* names that have the parent *parent* in the rows, and their inodes."""
        return self._dentries.page(parent, limit)

    def end_staging(self) -> None:
        """No staged names are left."""
        if self._dentries.joined:
            self.write("DELETE FROM meta WHERE key = 'joined'", ())
            self.change += 1
        self._dentries.staging = self._dentries.joined = False
        self._dentries.conflicts.clear()

    def orphans(self) -> list[Inode]:
        """Return the inodes that lost their last name while open in a target that was not
        closed."""
        self.flush()
        rows = self._db.execute(
            "SELECT ino FROM inode WHERE nlink = 0 AND anonymous = 0"
        ).fetchall()
        return [inode for row in rows if (inode := self.get(row[0])) is not None]

    def is_next(self, slots: range) -> bool:
        """Whether a new inode may get one of *slots*."""
        return self._next_ino < slots.stop

    def leave(self, slots: range) -> None:
        """Give no new inode any of *slots*."""
        if self._next_ino in slots:
            self._next_ino = slots.stop

    def packed(self, first: int, last: int) -> list[int]:
        """Return the regions in slots *first* to *last* that are, or were, in a pack, by slot."""
        self.flush()
        rows = self._db.execute(
            "SELECT ino FROM inode WHERE ino BETWEEN ? AND ? AND packed != 0 ORDER BY ino",
            (first, last),
        )
        return [row[0] for row in rows]

    # Extended attributes

    def xattrs(self, ino: int) -> list[bytes]:
        rows = self._db.execute("SELECT name FROM xattr WHERE ino = ? ORDER BY name", (ino,))
        return [row[0] for row in rows]

    def xattr(self, ino: int, name: bytes) -> bytes | None:
        if not self._has_xattrs:  # the kernel reads security.capability before every write
            return None
        sql = "SELECT value FROM xattr WHERE ino = ? AND name = ?"
        row = self._db.execute(sql, (ino, name)).fetchone()
        return None if row is None else bytes(row[0])

    def xattr_bytes(self, ino: int, but: bytes) -> tuple[int, int]:
        """Return the total bytes of the names, each with a NUL, and of the values of an inode's
        attributes other than *but*."""
        if not self._has_xattrs:
            return 0, 0
        total = self._xattr_totals.get(ino)
        if total is None:
            if len(self._xattr_totals) >= _TOTALS:
                self._xattr_totals.clear()
            total = self._xattr_totals[ino] = self._db.execute(
                "SELECT coalesce(sum(length(name) + 1), 0), coalesce(sum(length(value)), 0)"
                " FROM xattr WHERE ino = ?",
                (ino,),
            ).fetchone()
        names, values = total
        sql = "SELECT length(value) FROM xattr WHERE ino = ? AND name = ?"
        row = self._db.execute(sql, (ino, but)).fetchone()
        return (names, values) if row is None else (names - len(but) - 1, values - row[0])

    def set_xattr(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        """Set, or with None remove, an extended attribute; raises as ``domain.xattr``."""
        if value is not None:
            domain.xattr(name, value)
        names, values = self.xattr_bytes(inode.ino, name)
        if value is None:
            self.write("DELETE FROM xattr WHERE ino = ? AND name = ?", (inode.ino, name))
        else:
            self.write("INSERT OR REPLACE INTO xattr VALUES(?, ?, ?)", (inode.ino, name, value))
            names, values = names + len(name) + 1, values + len(value)
        self._xattr_totals[inode.ino] = names, values
        self._has_xattrs = True
        # The row must exist for the attribute to be found and removed with it.
        inode.stored = True
        self.touch(inode, durable=True)

    # Transactions

    def write(self, sql: str, *rows: Row) -> None:
        """Execute *sql*, a change, for each of *rows*."""
        self._journal.write(sql, rows)

    def rows(self, sql: str, values: Row = ()) -> list[tuple[Any, ...]]:
        """Return the rows that *sql*, a query, selects, as they were last flushed."""
        return self._db.execute(sql, values).fetchall()

    @property
    def backlog(self) -> int:
        """Number of calls of :meth:`flush_some` that a commit needs before it; 0 if few entries are
        dirty.  The lock need not be held."""
        dirty = max(len(self._dirty), len(self._dentries.dirty))
        return dirty // _FLUSH if dirty > _FLUSH_AT else 0

    def flush_some(self, left: int = 0) -> None:
        """As :meth:`flush`, of some inodes and of some names where more than *left* are dirty."""
        if len(self._dirty) > left:
            self._flush_inodes(_FLUSH)
        if len(self._dentries.dirty) > left:
            self._dentries.flush(_FLUSH)

    def flush(self) -> None:
        """Write dirty inodes and names into the open transaction.

        Entries that cannot be stored stay dirty, and do not prevent storing the others; see
        :meth:`check_stored`.
        """
        if self._dirty:
            self._flush_inodes(len(self._dirty))
        self._dentries.flush()

    def _flush_inodes(self, most: int) -> None:
        inodes = list(itertools.islice(self._dirty.values(), most))
        failed = self._journal.write_each(UPSERT, [inode.row() for inode in inodes])
        for inode in inodes:
            inode.stored = True
            del self._dirty[inode.ino]
        if failed or self._unstored:
            self._note_unstored(inodes, failed)

    def _note_unstored(self, inodes: list[Inode], failed: dict[int, Exception]) -> None:
        """After a flush of *inodes* that *failed* for some: note which are to be retried later."""
        for position, inode in enumerate(inodes):
            error = failed.get(position)
            if error is None:
                self._unstored.pop(inode.ino, None)
                self._dentries.withheld.discard(inode.ino)
                continue
            if inode.ino not in self._unstored:
                if not self._unstored:  # others probably fail for the same reason
                    log.error(
                        "inode %d of %s cannot be stored; the write will be retried",
                        inode.ino, self.path, exc_info=error,
                    )  # fmt: skip
                row = self._db.execute("SELECT 1 FROM inode WHERE ino = ?", (inode.ino,)).fetchone()
                if row is None:
                    self._dentries.withheld.add(inode.ino)
            missed = inode.changed > self._journal.committed
            self._unstored[inode.ino] = (error, missed or self._misses(inode.ino))
            self._dirty[inode.ino] = inode

    def _misses(self, ino: int) -> bool:
        return self._unstored.get(ino, (None, False))[1]

    def is_durable(self, inode: Inode) -> bool:
        """Whether the changes of *inode* and its names that must be durable are on stable
        storage."""
        change = max(inode.changed, self._joined)  # a graft may have named a directory above it
        return self._journal.is_synced(change) and not self._why_unstored(inode)

    def _why_unstored(self, inode: Inode | None) -> Exception | None:
        """Return why *inode* (None: any inode), or a name of it, is not stored; None if all are."""
        if not (self._unstored or self._dentries.failed):
            return None
        if inode is not None and self._misses(inode.ino):
            return self._unstored[inode.ino][0]
        causes = [(ino, error) for ino, error in self._dentries.failed.values()]
        if inode is None:
            causes += [(ino, error) for ino, (error, _) in self._unstored.items()]
        return next((error for ino, error in causes if inode is None or ino == inode.ino), None)

    def check_stored(self, inode: Inode | None = None) -> None:
        """Raise ``StorageError`` if *inode*, or without one anything, could not be stored."""
        error = self._why_unstored(inode)
        if error is not None:
            raise StorageError(
                f"catalogue {self.path or 'in memory'}: {error!r} prevented"
                f" {'something' if inode is None else f'inode {inode.ino}'} from being stored; it"
                " is kept in memory and will be retried"
            ) from error

    @property
    def uncommitted(self) -> bool:
        journal = self._journal
        dirty = self._dirty or self._dentries.dirty
        return bool(dirty) or self.change > journal.committed or journal.uncommitted

    def is_synced(self, change: int) -> bool:
        """Whether *change* is on stable storage (always true for a catalogue in memory)."""
        return self._journal.is_synced(change)

    def check(self) -> None:
        """Raise ``StorageError`` if a sync has failed."""
        self._journal.check()

    def commit(self, unsettled: RegionID | None = None) -> int:
        """Commit the transaction, which then survives a crash of the process.

        Args:
            unsettled: the oldest region whose data and file a power failure may remove, to be
                reported by :meth:`fresh`; None if there is none.

        Returns:
            the change number for :meth:`sync`.
        """
        self.flush()
        settled = self._next_ino if unsettled is None else unsettled.slot
        if settled != self._settled and self._journal.uncommitted:
            self.write("INSERT OR REPLACE INTO meta VALUES('settled', ?)", (settled,))
            self._settled = settled
        return self._journal.commit(self.change)

    def snapshot(self) -> sqlite3.Connection:
        """Return a copy of the committed database, for one thread, which closes it.

        It is not flushed to stable storage, and takes a tenth of a second per million names.  The
        caller has committed, and holds the lock since.
        """
        assert not self._db.in_transaction  # the copy would wait for its end
        copy = sqlite3.connect("", isolation_level=None)  # a temporary file, if it is large
        try:
            copy.execute("PRAGMA journal_mode = OFF")
            self._db.backup(copy)
        except BaseException:
            copy.close()
            raise
        return copy

    @property
    def commit_is_long(self) -> bool:
        """Whether :meth:`commit` would take long; the lock need not be held."""
        return self._journal.is_long

    @property
    def checkpoint_due(self) -> bool:
        """Whether :meth:`checkpoint` should be called; the lock need not be held."""
        return self._journal.checkpoint_due

    def checkpoint(self) -> None:
        """Copy the WAL into the database, and flush that to stable storage; the caller has
        committed, and holds the lock since."""
        self._journal.checkpoint()

    def sync(self, change: int) -> None:
        """Wait until the committed *change* is on stable storage.  The target's lock is **not**
        held.

        Raises:
            StorageError: this or an earlier sync failed; no later sync reports success.
        """
        self._journal.sync(change)

    def restore(self) -> None:
        """After an error of SQLite: write the uncommitted changes again."""
        self._journal.restore()

    def fresh(self) -> list[RegionID]:
        """Return the regions that may lack their data if the catalogue was not closed, by slot."""
        after = self._next_ino if self._settled is None else self._settled - 1
        found = []
        while page := self.regions(after, 10000, anonymous=False):
            # Imported regions beyond the sequence were persisted before they got names.
            found += [a.region for a in page if a.ino < domain.SEQUENCE]
            after = page[-1].ino
        return found

    def close(self, *, clean: bool = True, unsettled: RegionID | None = None) -> None:
        """Commit, and checkpoint the WAL into the database.

        Args:
            clean: record that no recovery is needed.
            unsettled: as for :meth:`commit`.
        """
        try:
            if self.path is not None:
                if clean:
                    self.write("UPDATE meta SET value = 1 WHERE key = 'clean'", ())
                    # A process that was stopped while it wrote to an erased region, through a
                    # shared descriptor, must never write to a new region in the same slot.
                    last = (self._next_ino - 1,)
                    self.write("INSERT OR REPLACE INTO meta VALUES('last', ?)", last)
                self.commit(unsettled)
                self._journal.seal()
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        finally:
            self.abandon()

    def give_up(self) -> None:
        """In a forked child: release the database, which belongs to the parent.

        SQLite must not close it, which would checkpoint the WAL and remove it; its files are closed
        without SQLite's knowledge.
        """
        forks.keep_for_ever(self._db)
        if self._file is not None:
            path = os.path.realpath(self._file)
            regions = f"{path}.regions"
            files = {path, f"{path}-wal", f"{path}-journal", regions}
            forks.disconnect(
                forks.descriptors(lambda name: name in files or name.startswith(f"{regions}/"))
            )

    def abandon(self) -> None:
        """Close the files as they are, as a crash would; the next open recovers."""
        self._journal.close()
        self._db.close()
