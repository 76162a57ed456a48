"""Operations of a target for an import: regions of given IDs, and creating all names at once.

An adopted region has no name and is pinned for its connection: if the import does not complete,
for whatever reason, it is erased.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import IO

from warabi import errors
from warabi._core.attributes import IMMUTABLE, ROOT, Attributes
from warabi._core.buffers import checked_size
from warabi._core.tuning import STEP_PAUSE
from warabi.errors import BadArchive, TargetBusy, path_error
from warabi.metadata import domain
from warabi.metadata.dentries import ANONYMOUS, staged
from warabi.metadata.inode import Inode, check_unfixed
from warabi.metadata.tree import region_of_name
from warabi.region import RegionID
from warabi.target.entries import CHUNK, ArchiveEntry, unpack_again, unpack_all
from warabi.target.target import Target

log = logging.getLogger(__name__)

_NOTHING = RegionID()
_STEP = 200
"""Entries per step, which holds the target's lock for some milliseconds."""


def adopt(target: Target, region: RegionID, size: int) -> Attributes:
    """Create a region of *size* zero bytes without a name, with the ID *region*, or a new one if
    zero.

    It is pinned for the caller, and erased when that disconnects, unless ``graft`` gave it a name.

    Raises:
        InvalidRegion: the target has the region, or something else in its slot.
        TargetBusy: the target had the region, and a running export may still need its data.
        StorageFull: as for ``create``.
    """
    size = checked_size(size, "adopt: size")
    if target.erasure.pending:
        target.commit()  # data of a failed import may still be present
    with target.state.guard.lock, target.state.guard.checked:
        wanted = None if region == _NOTHING else region
        if wanted is not None and target.erasure.is_pending(wanted):
            raise TargetBusy(f"adopt: the bytes of {region!r} are still in use by an export")
        inode = target.creation.new_region(0o600, None, None, size, rid=wanted, space=0)
        inode.pins = 1
        return inode.attributes()


def graft(target: Target, listing: RegionID) -> int:
    """Add the entries in the region *listing* to the tree, atomically; return their number.

    Regions among them were adopted.  A directory that exists is left as it is, and may get more
    entries; the root directory's attributes are taken over if it is empty.  Other calls are served
    meanwhile.  Regions without names appear in the root directory one after the other, just after
    the names.

    Raises:
        PathError: EEXIST for a name that exists, ENOENT if a directory was removed during the
            graft, or another reason why a name cannot be created.
        BadArchive: the entries are inconsistent.
        TargetNotFound: the target was closed during the graft.
    """
    with tempfile.SpooledTemporaryFile(CHUNK) as spool:
        # Only entries use memory: a listing may be a hole of any size.
        for entry in unpack_all(_Listing(target, listing)):
            spool.write(entry.pack())
        spool.seek(0)
        with target.state.grafting, target.locks.kept_open("graft"):
            return _Graft(target).run(spool)


class _Listing:
    """Sequential reader of a region."""

    def __init__(self, target: Target, region: RegionID) -> None:
        self._target = target
        self._region = region
        self._offset = 0
        self._size = target.size(region)

    def read(self, size: int) -> bytes:
        """Return up to *size* more bytes; empty at the end."""
        data = self._target.read(self._region, self._offset, min(size, self._size - self._offset))
        self._offset += len(data)
        return data


class _Graft:
    """One graft: names are staged, joined with the tree atomically, and then moved there.

    The lock is held for ``_STEP`` names at a time; no ``Inode`` may be kept from one step to the
    next.  If this process ends before, opening the target completes the graft or removes it.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._guard = target.state.guard
        self._names = target.namespace
        self._catalogue = target.state.catalogue
        # The parent of the entries of each directory, by path: the inode if the graft created it,
        # `staged` of the inode if it existed.
        self._parents: dict[bytes, int] = {}
        self._places: Counter[int] = Counter()
        """The number of directories staged for each existing directory, which is pinned."""
        # Inodes with several names, by whether they are regions (whose slot may be new) and slot.
        self._linked: dict[tuple[bool, int], int] = {}
        self._root: ArchiveEntry | None = None
        self._count = 0

    def run(self, file: IO[bytes]) -> int:
        if self._catalogue.staging:
            self._end()  # of a graft that could not finish
        entries = unpack_again(file)
        with self._guard.lock, self._guard.checked:
            self._catalogue.begin_staging()
            empty = not self._catalogue.has_entries(ROOT)
        try:
            self._in_steps(lambda: self._stage(list(itertools.islice(entries, _STEP))))
            with self._guard.lock, self._guard.checked:
                self._join(empty)
        except BaseException:
            self._end_or_warn()
            raise
        else:
            self._end_or_warn()
        finally:
            for place in self._places:
                self._names.unpin(place)
        return self._count

    def _in_steps(self, step: Callable[[], bool]) -> None:
        """Call *step* until it returns false, each time with the lock held."""
        going_on = True
        while going_on:
            with self._guard.lock, self._guard.checked:
                going_on = step()
            time.sleep(STEP_PAUSE)

    # Staging

    def _stage(self, entries: list[ArchiveEntry]) -> bool:
        for entry in entries:
            if entry.path:
                self._add(entry)
            else:
                self._parents[b""] = self._place(self._names.get(ROOT))
                self._root = entry
        self._check()
        return bool(entries)

    def _check(self) -> None:
        """Raise if the graft cannot succeed any more."""
        self._catalogue.check_stored()
        self._target.state.check_open("graft")
        if (conflict := self._catalogue.conflict()) is not None:
            raise path_error(
                errno.EEXIST,
                f"{os.fsdecode(conflict[1])}: another client created the name during the graft",
            )

    def _place(self, directory: Inode) -> int:
        """Return the parent of names that are staged for an existing directory."""
        if directory.ino not in self._places:
            self._places[directory.ino] = 0
            directory.pins += 1
        return staged(directory.ino)

    def _add(self, entry: ArchiveEntry) -> None:
        above, _, name = entry.path.rpartition(b"/")
        parent = self._parents.get(above)
        if parent is None or entry.path.startswith(b"/"):
            raise BadArchive(f"{entry.shown}: its parent directory is not in the archive")
        if entry.row.anonymous and not stat.S_ISDIR(entry.row.mode):
            inode = self._region(entry)
            self._name(ANONYMOUS, inode.rid.hex().encode(), inode)
            self._dress(inode, entry)
            return
        if parent > 0:  # a new directory, which may be immutable once it is complete
            domain.name(name)
            directory = self._names.get(parent)
        else:
            directory = self._names.destination(abs(parent), name)
        found = self._names.find(directory, name)
        inside = found is None and parent < 0
        if inside and (ino := self._catalogue.lookup(parent, name)) is not None:
            found = self._names.get(ino)
        if not stat.S_ISDIR(entry.row.mode):
            if directory.ino == ROOT and region_of_name(name) == entry.region:
                raise BadArchive(f"{entry.shown}: the name is the region's own ID")
            if found is not None:
                raise path_error(errno.EEXIST, f"{entry.shown}: the name exists in the target")
            self._file(parent, name, entry)
        elif found is None:
            self._parents[entry.path] = self._directory(parent, name, entry)
        elif not stat.S_ISDIR(found.mode):
            raise path_error(errno.EEXIST, f"{entry.shown}: the name exists in the target")
        elif inside or parent > 0:
            self._parents[entry.path] = found.ino  # the archive has it twice
        else:
            self._parents[entry.path] = self._place(found)

    def _directory(self, parent: int, name: bytes, entry: ArchiveEntry) -> int:
        mode = stat.S_IFDIR | stat.S_IMODE(entry.row.mode)
        inode = self._catalogue.add(mode, entry.row.uid, entry.row.gid)
        self._name(parent, name, inode)
        self._dress(inode, entry)
        return inode.ino

    def _file(self, parent: int, name: bytes, entry: ArchiveEntry) -> None:
        known = self._linked.get((entry.is_region, entry.row.ino))
        if known is not None:
            self._name(parent, name, self._names.get(known))
            return
        inode = self._region(entry) if entry.is_region else self._special(entry)
        if entry.row.nlink > 1:
            self._linked[entry.is_region, entry.row.ino] = inode.ino
        self._name(parent, name, inode)
        self._dress(inode, entry)

    def _region(self, entry: ArchiveEntry) -> Inode:
        inode = self._catalogue.region(entry.region)
        if inode is None or inode.dead or inode.nlink or inode.anonymous or not inode.pins:
            raise BadArchive(f"{entry.shown}: region {entry.region.hex()} was not adopted")
        return inode

    def _special(self, entry: ArchiveEntry) -> Inode:
        row = entry.row
        kind = stat.S_IFMT(row.mode)
        if kind not in (
            stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK
        ):  # fmt: skip
            raise BadArchive(f"{entry.shown}: unknown file type, mode {row.mode:#o}")
        target = row.target if kind == stat.S_IFLNK else None
        mode = kind | stat.S_IMODE(row.mode)
        return self._catalogue.add(
            mode,
            row.uid,
            row.gid,
            size=len(target or b""),
            rdev=row.rdev,
            target=target,
        )

    def _name(self, parent: int, name: bytes, inode: Inode) -> None:
        if stat.S_ISDIR(inode.mode):
            self._add_link(parent)
        else:
            self._check_links(inode, name)
            inode.nlink += 1
        self._catalogue.stage(parent, name, inode)
        self._count += 1

    def _add_link(self, parent: int) -> None:
        """Count a directory in *parent*; if that existed, its link count changes at the join."""
        if parent < 0:
            self._places[staged(parent)] += 1
            return
        directory = self._names.get(parent)
        directory.nlink += 1
        self._catalogue.touch(directory, durable=True, tell=False)

    @staticmethod
    def _check_links(inode: Inode, name: bytes, more: int = 1) -> None:
        if inode.nlink + more > domain.LINKS_MAX:
            raise path_error(errno.EMLINK, f"{os.fsdecode(name)}: too many links")

    def _dress(self, inode: Inode, entry: ArchiveEntry) -> None:
        # Not earlier than times stored with its data during the import.
        row = entry.row
        ctime = max(row.ctime, inode.kept + 1) if inode.kept >= 0 else row.ctime
        self._catalogue.set_attributes(
            inode,
            row.mode,
            row.uid,
            row.gid,
            row.atime,
            row.mtime,
            ctime,
        )
        inode.btime, inode.flags = row.btime, row.flags
        for name, value in entry.xattrs:
            self._catalogue.charge(len(value))
            self._catalogue.set_xattr(inode, name, value)
        self._catalogue.touch(inode, durable=True, tell=inode.ino == ROOT)

    # Joining, and the end

    def _join(self, empty: bool) -> None:
        self._check()
        growing: list[tuple[Inode, int]] = []
        for place, directories in self._places.items():
            inode = self._catalogue.get_cached(place)
            if inode is None or inode.dead or not inode.nlink:
                raise path_error(
                    errno.ENOENT, "another client removed a directory during the graft"
                )
            check_unfixed(inode, "graft", IMMUTABLE)
            if directories:
                self._check_links(inode, b"a directory", directories)
                growing.append((inode, directories))
        if empty and self._root is not None and stat.S_ISDIR(self._root.row.mode):
            self._dress(self._names.get(ROOT), self._root)
        else:
            self._root = None
        self._catalogue.join()  # what follows cannot fail
        for inode, directories in growing:
            inode.nlink += directories
            self._catalogue.touch(inode, durable=True)
        self._target.sharing.clear_all_metadata_durable()

    def _end_or_warn(self) -> None:
        """Move joined names, or remove staged ones.  A failure does not change the outcome of the
        graft, so it is only logged."""
        try:
            self._end()
        except errors.Exception as error:
            log.warning(
                "names of a graft stay staged until the next graft or opening of the target: %s",
                error,
            )

    def _end(self) -> None:
        if self._catalogue.joined:
            self._in_steps(self._move)
        else:
            self._in_steps(partial(self._remove, []))
        with self._guard.lock, self._guard.checked:
            self._catalogue.check_stored()  # or there may still be names
            self._catalogue.end_staging()

    def _move(self) -> bool:
        """Move some names from where they are staged to their directory."""
        self._catalogue.check_stored()
        parent = self._catalogue.staged_parent()
        if parent is None:
            return False
        names = self._catalogue.page(parent, _STEP)
        for name, ino in names:
            inode = self._names.get(ino)
            self._catalogue.unstage(parent, name)
            if parent == ANONYMOUS:
                inode.nlink -= 1
                inode.anonymous = int(not inode.nlink)
                self._catalogue.touch(inode, durable=True, tell=False)
            else:
                self._catalogue.link(staged(parent), name, inode, new=True)
        if parent != ANONYMOUS and not (staged(parent) == ROOT and self._root is not None):
            self._names.changed(self._names.get(staged(parent)))
        return True

    def _remove(self, path: list[tuple[int, bytes, int]]) -> bool:
        """Remove some names that are staged, those within a directory first.

        *path* has the directories that are being emptied: parent, name and inode of each.
        """
        self._catalogue.check_stored()
        parent = path[-1][2] if path else self._catalogue.staged_parent()
        if parent is None:
            return False
        names = self._catalogue.page(parent, _STEP)
        if not names:
            self._unname(*path.pop())
        for name, ino in names:
            inode = self._catalogue.get(ino)
            if inode is not None and stat.S_ISDIR(inode.mode):
                path.append((parent, name, ino))
                break
            self._unname(parent, name, ino)
        return True

    def _unname(self, parent: int, name: bytes, ino: int) -> None:
        self._catalogue.unstage(parent, name)
        inode = self._catalogue.get(ino)
        if inode is None:
            return
        inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        self._catalogue.touch(inode, durable=True, tell=False)
        if not (inode.nlink or inode.pins):  # an adopted region keeps its pin
            self._target.erasure.discard(inode)
