"""Operations of a target for an import: regions of given IDs, and all their names at once.

A region that is adopted has no name and is pinned for its connection: if the import does not come
to its end, however that happens, it goes.
"""

from __future__ import annotations

import errno
import stat
import tempfile
from collections.abc import Callable
from typing import IO

from warabi._core.attributes import ROOT, Attributes
from warabi._core.buffers import checked_size
from warabi.errors import BadArchive, TargetBusy, path_error
from warabi.metadata.inode import Inode
from warabi.metadata.tree import region_of_name
from warabi.region import RegionID
from warabi.target.entries import CHUNK, ArchiveEntry, unpack_again, unpack_all
from warabi.target.target import Target

_NOTHING = RegionID()


def adopt(target: Target, region: RegionID, size: int) -> Attributes:
    """Make a region of *size* zero bytes and no name, with the ID *region*, or any for all zero.

    It is pinned for the caller, and gone when that ends, unless ``graft`` named it before.

    Raises:
        InvalidRegion: the target has the region, or something else in its slot.
        TargetBusy: the target had the region, and an export that goes on may still want it.
        StorageFull: as for ``create``.
    """
    size = checked_size(size, "adopt: size")
    if target._freed:
        target.commit()  # the bytes of an import that failed may still be in the way
    with target._guard.lock, target._guard.checked:
        wanted = None if region == _NOTHING else region
        if any(wanted == freed for _, freed, _ in target._freed):
            raise TargetBusy(f"adopt: the bytes of {region!r} are still in use by an export")
        inode = target.new_region(0o600, None, None, size, rid=wanted)
        inode.pins = 1
        return inode.attributes()


def graft(target: Target, listing: RegionID) -> int:
    """Give the tree the entries that the region *listing* has, all of them or none.

    Regions among them were adopted.  A directory that exists already is left as it is, and may
    get more entries; the root directory's attributes are taken over if it is empty.  Returns how
    many names were made.

    Raises:
        PathError: EEXIST for a name that is taken, or what else keeps a name from being made.
        BadArchive: the entries make no sense.
    """
    with tempfile.SpooledTemporaryFile(CHUNK) as spool:
        # Only what is an entry takes room: a listing may be a hole of any size.
        for entry in unpack_all(_Listing(target, listing)):
            spool.write(entry.pack())
        spool.seek(0)
        with target._long:
            target._announce()
            with target._guard.lock, target._guard.checked:
                return _Graft(target).run(spool)


class _Listing:
    """The bytes of a region, to be read one after the other."""

    def __init__(self, target: Target, region: RegionID) -> None:
        self._target = target
        self._region = region
        self._offset = 0
        self._size = target.size(region)

    def read(self, size: int) -> bytes:
        """The next bytes, up to *size*; none at the end."""
        data = self._target.read(self._region, self._offset, min(size, self._size - self._offset))
        self._offset += len(data)
        return data


class _Graft:
    """One graft; the guard is held for all of it, so that it is one change, and one commit."""

    def __init__(self, target: Target) -> None:
        self._names = target.namespace
        self._catalogue = target._catalogue
        self._directories: dict[bytes, int] = {}
        # What has several names, by whether it is a region, whose slot may be a new one, and slot.
        self._linked: dict[tuple[bool, int], Inode] = {}
        self._last: list[Callable[[], None]] = []  # to do at the end
        self._undo: list[Callable[[], None]] = []  # to do, last one first, after a failure

    def run(self, file: IO[bytes]) -> int:
        empty = not self._catalogue.has_entries(ROOT)
        try:
            for entry in unpack_again(file):
                if entry.path:
                    self._add(entry)
                else:
                    self._root(entry, empty)
            for finish in self._last:
                finish()
        except BaseException:
            for undo in reversed(self._undo):
                undo()
            raise
        return len(self._undo)

    def _root(self, entry: ArchiveEntry, empty: bool) -> None:
        self._directories[b""] = ROOT
        if empty and stat.S_ISDIR(entry.mode):
            root = self._names._get(ROOT)
            self._last.append(lambda: self._dress(root, entry))

    def _add(self, entry: ArchiveEntry) -> None:
        above, _, name = entry.path.rpartition(b"/")
        if above not in self._directories or entry.path.startswith(b"/"):
            raise BadArchive(f"{entry.shown}: its parent directory is not in the archive")
        parent = self._names._get(self._directories[above])
        if stat.S_ISDIR(entry.mode):
            self._directory(parent, name, entry)
        elif entry.anonymous:
            inode = self._region(entry)
            inode.anonymous = 1
            self._undo.append(lambda: setattr(inode, "anonymous", 0))
            self._dress(inode, entry)
        else:
            self._file(parent, name, entry)

    def _directory(self, parent: Inode, name: bytes, entry: ArchiveEntry) -> None:
        found = self._names._find(parent, name)
        if found is not None and stat.S_ISDIR(found.mode):
            self._directories[entry.path] = found.ino
            return
        self._check_free(parent, name, entry)
        mode = stat.S_IFDIR | stat.S_IMODE(entry.mode)
        inode = self._catalogue.add(mode, entry.uid, entry.gid)
        self._name(parent, name, inode)
        self._directories[entry.path] = inode.ino
        # What is made in it changes its times, so they are set when all is made.
        self._last.append(lambda: self._dress(inode, entry))

    def _file(self, parent: Inode, name: bytes, entry: ArchiveEntry) -> None:
        self._check_free(parent, name, entry)
        inode = self._linked.get((entry.is_region, entry.slot))
        known = inode is not None
        if inode is None:
            inode = self._region(entry) if entry.is_region else self._special(entry)
        if entry.links > 1:
            self._linked[entry.is_region, entry.slot] = inode
        self._name(parent, name, inode)
        if not known:
            self._dress(inode, entry)

    def _check_free(self, parent: Inode, name: bytes, entry: ArchiveEntry) -> None:
        self._names._destination(parent.ino, name)
        if parent.ino == ROOT and region_of_name(name) == entry.region:
            raise BadArchive(f"{entry.shown}: the name is the region's own ID")
        if self._names._find(parent, name) is not None:
            raise path_error(errno.EEXIST, f"{entry.shown}: the name exists in the target")

    def _region(self, entry: ArchiveEntry) -> Inode:
        inode = self._catalogue.region(entry.region)
        if inode is None or inode.dead or inode.nlink or inode.anonymous or not inode.pins:
            raise BadArchive(f"{entry.shown}: region {entry.region.hex()} was not adopted")
        return inode

    def _special(self, entry: ArchiveEntry) -> Inode:
        kind = stat.S_IFMT(entry.mode)
        if kind not in (
            stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK
        ):  # fmt: skip
            raise BadArchive(f"{entry.shown}: unknown file type, mode {entry.mode:#o}")
        target = entry.target if kind == stat.S_IFLNK else None
        mode = kind | stat.S_IMODE(entry.mode)
        return self._catalogue.add(
            mode, entry.uid, entry.gid, size=len(target or b""), rdev=entry.rdev, target=target
        )

    def _name(self, parent: Inode, name: bytes, inode: Inode) -> None:
        times = parent.mtime, parent.ctime

        def undo() -> None:
            # An adopted region keeps its pin; others go with their last name.
            self._names._unnamed(parent, name, inode, hold=False)
            parent.mtime, parent.ctime = times

        self._names._named(parent, name, inode)
        self._undo.append(undo)

    def _dress(self, inode: Inode, entry: ArchiveEntry) -> None:
        # Not before times that were kept beside its bytes while it was being brought.
        ctime = max(entry.ctime_ns, inode.kept + 1) if inode.kept >= 0 else entry.ctime_ns
        self._catalogue.set_attributes(
            inode, entry.mode, entry.uid, entry.gid, entry.atime_ns, entry.mtime_ns, ctime
        )
        for name, value in entry.xattrs:
            self._catalogue.charge(len(value))
            self._catalogue.set_xattr(inode, name, value)
        self._catalogue.touch(inode, durable=True)
