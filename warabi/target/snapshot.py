"""Operations of a target for an export: a snapshot of all names, and copies of regions.

While a survey's region exists, the data of erased regions are kept, so that every region of the
survey can still be copied.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing

from warabi._core.attributes import ROOT, Attributes
from warabi.errors import InvalidRegion
from warabi.metadata.dentries import finish_graft
from warabi.metadata.domain import Row
from warabi.metadata.inode import Inode
from warabi.metadata.journal import translate
from warabi.region import RegionID
from warabi.target.entries import CHUNK, ArchiveEntry
from warabi.target.target import Target

_IN_MEMORY = 16 * 1024 * 1024  # bytes of a list of entries that are kept in memory


def survey(target: Target) -> Attributes:
    """Create a region without a name that lists every entry of the target, as a snapshot.

    It is pinned for the caller.  ``unpin`` releases it, and the kept data of erased regions.
    Other calls wait while the catalogue is copied, and continue while the copy is read.
    """
    state = target.state
    with state.long:
        state.announce()
        with state.guard.lock, state.guard.checked:
            target.committer.write_commit()
            state.catalogue.check_stored()  # otherwise it would be missing
            snapshot = state.catalogue.snapshot()
            try:
                inode = target.creation.new_region(0o600, None, None)
            except BaseException:
                snapshot.close()
                raise
            inode.pins = 1
            target.erasure.hold(inode.rid)
    try:
        with closing(snapshot), tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
            try:
                finish_graft(snapshot)
                for entry in _entries(snapshot):
                    spool.write(entry.pack())
            except sqlite3.Error as error:
                raise translate(error, None) from error
            spool.seek(0)
            offset = 0
            while piece := spool.read(CHUNK):
                target.write(inode.rid, offset, piece, extend=True)
                offset += len(piece)
    except BaseException:
        target.namespace.unpin(inode.ino)
        raise
    return target.namespace.getattr(inode.ino)


def _entries(db: sqlite3.Connection) -> Iterator[ArchiveEntry]:
    """Yield every entry of a catalogue: directories before their entries."""
    columns = ", ".join(f"i.{column}" for column in Row._fields)
    row = db.execute(f"SELECT {columns} FROM inode i WHERE ino = ?", (ROOT,)).fetchone()
    pending = [(b"", Row(*row))]
    while pending:
        path, directory = pending.pop()
        yield _entry(db, path, directory)
        prefix = path + b"/" if path else b""
        rows = db.execute(
            f"SELECT name, {columns} FROM dentry d JOIN inode i ON i.ino = d.ino"
            " WHERE parent = ? ORDER BY name",
            (directory.ino,),
        )
        for name, *values in rows:
            row = Row(*values)
            if stat.S_ISDIR(row.mode):
                pending.append((prefix + name, row))
            else:
                yield _entry(db, prefix + name, row)
    rows = db.execute(
        f"SELECT {columns} FROM inode i WHERE anonymous = 1"
        f" AND mode & {0o170000} = {stat.S_IFREG} ORDER BY ino"
    )
    for values in rows:
        row = Row(*values)._replace(nlink=1)
        yield _entry(db, RegionID.from_parts(row.ino, row.generation).hex().encode(), row)


def _entry(db: sqlite3.Connection, path: bytes, row: Row) -> ArchiveEntry:
    # Where a region's bytes are in this target does not matter to another one.
    return ArchiveEntry(path, row._replace(packed=0), _xattrs(db, row.ino))


def _xattrs(db: sqlite3.Connection, ino: int) -> list[tuple[bytes, bytes]]:
    sql = "SELECT name, value FROM xattr WHERE ino = ? ORDER BY name"
    return db.execute(sql, (ino,)).fetchall()


def copy(target: Target, region: RegionID) -> Attributes:
    """Create a region without a name, with a snapshot of the data and times of *region*.

    Writers of the region wait while its file is copied, which takes no time if the file system can
    share blocks.  During a survey, regions that were erased since can be copied, too.  The copy is
    pinned for the caller, and no quota applies.

    Raises:
        InvalidRegion: unknown, and in no running survey.
        StorageFull, StorageError, CorruptTarget: storage errors; there is no copy then.
    """
    try:
        source = target.locks.enter_exclusive(region, "copy", True)
    except InvalidRegion:
        size = _kept(target, region)
        if size is None:
            raise
        return _copied(target, region, size, None)
    try:
        target.sharing.drain(source)
        return _copied(target, region, source.size, source)
    finally:
        target.locks.leave_exclusive(source)


def _kept(target: Target, region: RegionID) -> int | None:
    """Return the size of an erased region whose data are kept for a survey, after calls in it have
    ended."""
    with target.state.lock:
        while target.erasure.is_ending(region):
            target.locks.wait(True)
        return target.erasure.kept(region)


def _copied(target: Target, region: RegionID, size: int, source: Inode | None) -> Attributes:
    catalogue, storage, guard = target.state.catalogue, target.state.storage, target.state.guard
    with guard.lock, guard.checked:
        inode = catalogue.add(stat.S_IFREG | 0o600, os.getuid(), os.getgid(), size=size)
        inode.pins = 1
    try:
        storage.clone(region, inode.rid, size)
    except BaseException:
        with guard.lock, guard.checked:
            catalogue.remove(inode)
            inode.dead = True
        with contextlib.suppress(KeyError):  # it was not created
            storage.erase(inode.rid)
        raise
    with guard.lock, guard.checked:
        if source is not None:
            catalogue.set_attributes(
                inode, atime=source.atime, mtime=source.mtime, ctime=source.ctime
            )
        return inode.attributes()
