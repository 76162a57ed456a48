"""The tree of names over a target's regions, with POSIX semantics.

Every method holds the target's guard for its whole run, so each is atomic for all mounts and
clients of the target, and an ``Inode`` never leaves a method.  Errors are ``PathError`` with the
errno of the system call of the same name; permissions are checked by the kernel, based on the
attributes returned here.

A region that never had a name appears in the root directory under the 32 hex digits of its
ID.  Such a name in the root always refers to the region of that ID, if it exists: also for a region
that was given a name since, which is not listed under its ID and cannot be removed by it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from warabi._core.attributes import IMMUTABLE, ROOT, Attributes
from warabi._core.changes import ORIGIN, Origin
from warabi._core.results import OpenedInode
from warabi.errors import Lengthy, path_error
from warabi.metadata import acl, domain
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.guard import Guard
from warabi.metadata.inode import FIXED, Inode, check_unfixed
from warabi.region import RegionID

_T = TypeVar("_T")

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
_NOBODY = Origin()  # origin of changes within this process
_RENAMES = (
    0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, RENAME_NOREPLACE | RENAME_WHITEOUT,
)  # fmt: skip


class Patiently(Protocol):
    """``TargetState.patiently``."""

    def __call__(self, work: Callable[[float], _T], /) -> _T: ...


class NewRegion(Protocol):
    """``Creation.new_region``."""

    def __call__(
        self, mode: int, uid: int, gid: int, size: int = 0, *, complete: bool = False
    ) -> Inode: ...


@dataclass(frozen=True, slots=True)
class Regions:
    """The target's functions that the tree calls, with the guard held.

    Attributes:
        new_region: a region of that mode, owner, group and size, which the tree is about to name;
            *complete*: all its bytes will be written at once.
        discard: erases a region without names and pins.
        reap: frees what erased regions held; called without the guard, after *discard*.
        patiently: calls with a number of steps that may be taken under the guard.
    """

    new_region: NewRegion
    discard: Callable[[Inode], None]
    reap: Callable[[], None]
    patiently: Patiently


def region_of_name(name: bytes) -> RegionID | None:
    """Return the ID that a name of 32 lower-case hex digits spells, else None."""
    if len(name) != 32 or name.strip(b"0123456789abcdef"):
        return None
    return RegionID(bytes.fromhex(name.decode()))


class Tree:
    """Directories, links, symlinks, special files and extended attributes of one target."""

    def __init__(self, catalogue: Catalogue, guard: Guard, regions: Regions) -> None:
        self._catalogue = catalogue
        self._guard = guard
        self._regions = regions

    # Lookups; the guard is held

    def get(self, ino: int) -> Inode:
        inode = self._catalogue.get(ino)
        if inode is None or inode.dead:
            raise path_error(errno.ESTALE, f"inode {ino}: no longer exists")
        if inode.exposed is not None:
            inode.exposed.merge_writes()
        return inode

    def _directory(self, ino: int) -> Inode:
        inode = self.get(ino)
        if not stat.S_ISDIR(inode.mode):
            raise path_error(errno.ENOTDIR, f"inode {ino}: not a directory")
        return inode

    def find(self, parent: Inode, name: bytes) -> Inode | None:
        if parent.ino == ROOT and (rid := region_of_name(name)) is not None:
            region = self._catalogue.region(rid)
            if region is not None and (region.anonymous or region.nlink):
                return region
        ino = self._catalogue.lookup(parent.ino, name)
        return None if ino is None else self.get(ino)

    def _existing(self, parent: Inode, name: bytes) -> Inode:
        inode = self.find(parent, name)
        if inode is None:
            domain.length(name)
            raise path_error(errno.ENOENT, f"{os.fsdecode(name)}: no such file or directory")
        return inode

    def destination(self, parent: int, name: bytes) -> Inode:
        """Return the directory *parent*, if *name* may be created in it."""
        directory = self._directory(parent)
        domain.name(name)
        if directory.nlink == 0:
            raise path_error(errno.ENOENT, f"{os.fsdecode(name)}: its parent directory was removed")
        check_unfixed(directory, os.fsdecode(name), IMMUTABLE)
        return directory

    def _absent(self, parent: int, name: bytes) -> Inode:
        directory = self.destination(parent, name)
        if self.find(directory, name) is not None:
            raise path_error(errno.EEXIST, f"{os.fsdecode(name)}: exists")
        return directory

    def _hex_alias(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Whether *name* is *inode*'s ID rather than a dentry."""
        return parent.ino == ROOT and region_of_name(name) == inode.rid

    # Changes; the guard is held

    def changed(self, *inodes: Inode) -> None:
        now = self._catalogue.clock.exact()
        for inode in inodes:
            inode.changed_at(now)
            if stat.S_ISDIR(inode.mode):
                inode.mtime = now
            self._catalogue.touch(inode, durable=True)

    def _named(self, parent: Inode, name: bytes, inode: Inode) -> None:
        if max(parent.nlink, inode.nlink) >= domain.LINKS_MAX:
            raise path_error(errno.EMLINK, f"{os.fsdecode(name)}: too many links")
        self._catalogue.link(parent.ino, name, inode, new=True)
        inode.anonymous = 0
        inode.linkable = False
        if stat.S_ISDIR(inode.mode):
            parent.nlink += 1
        else:
            inode.nlink += 1
        self.changed(parent)

    @staticmethod
    def _check_removable(parent: Inode, name: bytes, inode: Inode) -> None:
        for each in (parent, inode):
            check_unfixed(each, os.fsdecode(name))

    def _unnamed(self, parent: Inode, name: bytes, inode: Inode, hold: bool) -> None:
        """Remove one name of *inode*; without names and pins it is erased."""
        self._check_removable(parent, name, inode)
        if self._hex_alias(parent, name, inode):
            if not inode.anonymous:
                raise path_error(
                    errno.EPERM,
                    f"{os.fsdecode(name)}: this is the region's ID name; remove its other name",
                )
            inode.anonymous = 0
        else:
            self._catalogue.unlink(parent.ino, name)
            if stat.S_ISDIR(inode.mode):
                inode.nlink = 0
                parent.nlink -= 1
            else:
                inode.nlink -= 1
        inode.changed_at(self._catalogue.clock.exact())
        self._catalogue.touch(inode, durable=True)
        self.changed(parent)
        if inode.nlink == 0:
            inode.pins += hold
            if not inode.pins:
                self._regions.discard(inode)

    # Access control lists; the guard is held

    def _inherited(self, directory: Inode, mode: int, umask: int) -> tuple[int, dict[bytes, bytes]]:
        """Return the mode and the access control lists, as attributes, of a new entry of
        *directory*.

        If the directory has a default list, that limits *mode* instead of the umask.
        """
        mode, umask = domain.mode(mode), domain.umask(umask)
        value = self._catalogue.xattr(directory.ino, acl.DEFAULT)
        if value is None:
            return mode & ~umask, {}
        entries = acl.unpack(value)
        mode &= ~0o777 | acl.mode_of(entries)
        lists = {acl.DEFAULT: value} if stat.S_ISDIR(mode) else {}
        if acl.extended(entries):
            lists[acl.ACCESS] = acl.pack(acl.with_mode(entries, mode))
        self._catalogue.charge(sum(map(len, lists.values())))
        return mode, lists

    def inherit(
        self, inode: Inode, directory: Inode, mode: int, uid: int | None, gid: int | None
    ) -> None:
        """Set mode, owner and access control lists of a region that becomes an entry of
        *directory*."""
        mode, lists = self._inherited(directory, stat.S_IFREG | stat.S_IMODE(mode), 0)
        gid = directory.gid if directory.mode & stat.S_ISGID else gid
        self._catalogue.set_attributes(inode, mode, uid, gid)
        self._set_xattrs(inode, lists)

    def _list_follows_mode(self, inode: Inode) -> None:
        """Update the entries of an access control list that represent the permission bits."""
        value = self._catalogue.xattr(inode.ino, acl.ACCESS)
        if value is not None:
            entries = acl.with_mode(acl.unpack(value), inode.mode)
            self._catalogue.set_xattr(inode, acl.ACCESS, acl.pack(entries))

    def _set_xattrs(self, inode: Inode, values: dict[bytes, bytes]) -> None:
        for name, value in values.items():
            self._catalogue.set_xattr(inode, name, value)

    def forget_names(self, inode: Inode) -> None:
        """Remove every name of a region that is being erased; the guard is held."""
        names = self._catalogue.names(inode)
        directories = {parent: self._catalogue.get(parent) for parent, _ in names}
        for parent, name in names:
            if (directory := directories[parent]) is not None:
                self._check_removable(directory, name, inode)
        for parent, name in names:
            self._catalogue.unlink(parent, name)
        for directory in directories.values():
            if directory is not None:
                self.changed(directory)

    # Inodes

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Return the inode of *name* in directory *parent*; ENOENT, ENOTDIR, ESTALE.

        "." and ".." are the inode *parent* itself and its parent directory, whatever its type: file
        handles (NFS) are resolved this way.
        """
        with self._guard.lock, self._guard.checked:
            if name == b".":
                return self.get(parent).attributes()
            if name == b"..":
                return self._above(self.get(parent)).attributes()
            return self._existing(self._directory(parent), name).attributes()

    def _above(self, inode: Inode) -> Inode:
        """Return a directory that contains *inode*; the root for itself, and for a nameless
        inode."""
        names = self._catalogue.names(inode, 1)
        return self.get(names[0][0] if names else ROOT)

    def getattr(self, ino: int) -> Attributes:
        """Return an inode's attributes; ESTALE if it was removed."""
        inode = self._catalogue.get_cached(ino)  # a single dict access needs no lock
        if inode is not None and not inode.dead and inode.exposed is None:
            return inode.attributes()
        with self._guard.lock, self._guard.checked:
            return self.get(ino).attributes()

    def setattr(
        self,
        ino: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Attributes:
        """Set what is not None, and the change time; of *mode* only the permission bits.

        Times are clamped to the range that can be stored, as on Linux.  EINVAL for an invalid owner
        or mode; also for -1, which is not an owner and does not mean "unchanged".
        """
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            only_times = mode is None and uid is None and gid is None
            check_unfixed(inode, "setattr", IMMUTABLE if only_times else FIXED)
            self._catalogue.set_attributes(inode, mode, uid, gid, atime_ns, mtime_ns)
            if mode is not None:
                self._list_follows_mode(inode)
            inode.changed_at(self._catalogue.clock.exact())
            self._catalogue.touch(inode, durable=True)
            return inode.attributes()

    def set_flags(self, ino: int, flags: int) -> Attributes:
        """Set the flags of chattr(1), for ``Target.set_flags``, which checks them."""
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            inode.flags = flags
            inode.changed_at(self._catalogue.clock.exact())
            self._catalogue.touch(inode, durable=True)
            return inode.attributes()

    def pin(self, ino: int) -> Attributes:
        """Keep an inode for an open file even if its last name is removed; see :meth:`unpin`."""
        with self._guard.lock, self._guard.checked:
            return self._pinned(self.get(ino))

    def open(self, ino: int) -> OpenedInode:
        """The same as :meth:`pin`; also returns the version of the data, to validate caches."""
        origin = ORIGIN.get() or _NOBODY
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            return OpenedInode(self._pinned(inode), inode.version(origin))

    @staticmethod
    def _pinned(inode: Inode) -> Attributes:
        inode.pins += 1
        return inode.attributes()

    def unpin(self, ino: int, count: int = 1) -> None:
        """End *count* pins; the last one erases a nameless inode.  No effect on a removed inode."""
        count = domain.count(count, "unpin: count")
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.get_cached(ino)
            if inode is None or inode.dead:
                return
            inode.pins = max(0, inode.pins - count)
            if not inode.pins and inode.nlink == 0 and not inode.anonymous:
                self._regions.discard(inode)
        self._regions.reap()

    def is_linkable(self, region: RegionID) -> bool:
        """Whether a region has had no name yet, and may get one."""
        with self._guard.lock, self._guard.checked:
            inode = self._catalogue.region(region)
            return inode is not None and not inode.dead and inode.linkable

    # Directory entries

    def mknod(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        pin: bool = False,
        umask: int = 0,
    ) -> Attributes:
        """Create a regular file (an empty region), FIFO, socket or device node.

        *umask* is applied to *mode*, unless the directory has a default access control list.
        """
        with self._guard.lock, self._guard.checked:
            directory = self._absent(parent, name)
            mode, lists = self._inherited(directory, mode, umask)
            gid = directory.gid if directory.mode & stat.S_ISGID else gid
            if stat.S_IFMT(mode) in (0, stat.S_IFREG):
                inode = self._regions.new_region(mode, uid, gid)
            elif stat.S_IFMT(mode) in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
                inode = self._catalogue.add(mode, uid, gid, rdev=rdev)
            else:
                raise path_error(errno.EINVAL, f"mknod: mode {mode:#o} is not a file type")
            self._named(directory, name, inode)
            self._set_xattrs(inode, lists)
            inode.pins += pin
            return inode.attributes()

    def tmpfile(
        self, parent: int, exclusive: bool, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Attributes:
        """Create an empty region without a name, as ``O_TMPFILE`` does, and pin it once.

        It inherits from the directory *parent* as a new entry would, is erased with its last pin,
        and, unless *exclusive*, may be given a name by :meth:`link` before.
        """
        with self._guard.lock, self._guard.checked:
            inode = self.new_unnamed(parent, mode, uid, gid, umask)
            inode.linkable = not exclusive
            return inode.attributes()

    def new_unnamed(
        self, parent: int, mode: int, uid: int, gid: int, umask: int = 0, size: int = 0, *,
        complete: bool = False,
    ) -> Inode:  # fmt: skip
        """Create what :meth:`tmpfile` does, with *size* bytes; the guard is held.

        With *complete* all its bytes will be written at once.
        """
        directory = self._directory(parent)
        if directory.nlink == 0:
            raise path_error(errno.ENOENT, f"inode {parent}: the directory was removed")
        check_unfixed(directory, "tmpfile", IMMUTABLE)
        mode, lists = self._inherited(directory, mode, umask)
        gid = directory.gid if directory.mode & stat.S_ISGID else gid
        inode = self._regions.new_region(mode, uid, gid, size, complete=complete)
        inode.pins = 1
        inode.linkable = True
        self._set_xattrs(inode, lists)
        return inode

    def mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Attributes:
        """Create an empty directory, which inherits a set-group-ID bit; *umask* as for mknod."""
        with self._guard.lock, self._guard.checked:
            directory = self._absent(parent, name)
            mode = stat.S_IFDIR | stat.S_IMODE(domain.mode(mode))
            mode, lists = self._inherited(directory, mode, umask)
            if directory.mode & stat.S_ISGID:
                mode, gid = mode | stat.S_ISGID, directory.gid
            inode = self._catalogue.add(mode, uid, gid)
            self._named(directory, name, inode)
            self._set_xattrs(inode, lists)
            return inode.attributes()

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attributes:
        """Create a symbolic link to *target*: 1 to 4095 bytes without a NUL."""
        with self._guard.lock, self._guard.checked:
            directory = self._absent(parent, name)
            gid = directory.gid if directory.mode & stat.S_ISGID else gid
            inode = self._catalogue.add(
                stat.S_IFLNK | 0o777, uid, gid, size=len(target), target=target
            )
            self._named(directory, name, inode)
            return inode.attributes()

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link; EINVAL for anything else."""
        with self._guard.lock, self._guard.checked:
            target = self.get(ino).target
            if target is None:
                raise path_error(errno.EINVAL, f"inode {ino}: not a symbolic link")
            return target

    def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """Give an inode, not a directory, one more name."""
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            directory = self._absent(parent, name)
            if stat.S_ISDIR(inode.mode):
                raise path_error(errno.EPERM, f"link: inode {ino} is a directory")
            if inode.nlink == 0 and not (inode.anonymous or inode.linkable):
                raise path_error(errno.ENOENT, f"link: inode {ino} was removed")
            check_unfixed(inode, "link")
            self._catalogue.charge(len(name))
            self._named(directory, name, inode)
            self.changed(inode)
            return inode.attributes()

    def check_free(self, parent: int, name: bytes, exclusive: bool) -> tuple[Inode, Inode | None]:
        """Return the directory *parent* and what has the name *name* in it, if a region may be
        given the name; the guard is held.  EISDIR for a directory, EEXIST with *exclusive*."""
        directory = self.destination(parent, name)
        found = self.find(directory, name)
        if found is not None and exclusive:
            raise path_error(errno.EEXIST, f"{os.fsdecode(name)}: exists")
        if found is not None and stat.S_ISDIR(found.mode):
            raise path_error(errno.EISDIR, f"{os.fsdecode(name)}: is a directory")
        if found is not None:
            self._check_removable(directory, name, found)
        return directory, found

    def give_name(
        self, inode: Inode, parent: int, name: bytes, exclusive: bool = False
    ) -> Attributes:
        """Give a region that has no name the name *name*; the guard is held.

        What has the name, if that is not a directory, loses it in the same step; with *exclusive*
        it is an error.  The caller calls ``Regions.reap`` without the guard.
        """
        directory, replaced = self.check_free(parent, name, exclusive)
        if inode.nlink or not (inode.anonymous or inode.linkable):
            raise path_error(errno.EPERM, f"{os.fsdecode(name)}: the region has another name")
        if replaced is inode:
            raise path_error(errno.EINVAL, f"{os.fsdecode(name)}: the ID of the region itself")
        self._catalogue.charge(len(name))
        if replaced is not None:
            self._unnamed(directory, name, replaced, hold=False)
        self._named(directory, name, inode)
        self.changed(inode)
        return inode.attributes()

    def unlink(self, parent: int, name: bytes, hold: bool = False) -> Attributes:
        """Remove a name, not of a directory.  Removing the last name erases the region.

        With *hold* an inode without names is pinned once for the caller instead, who ends the pin
        with :meth:`unpin`.  Returns the attributes after the removal.
        """
        with self._guard.lock, self._guard.checked:
            directory = self._directory(parent)
            inode = self._existing(directory, name)
            if stat.S_ISDIR(inode.mode):
                raise path_error(errno.EISDIR, f"{os.fsdecode(name)}: is a directory")
            self._unnamed(directory, name, inode, hold)
            attributes = inode.attributes()
        self._regions.reap()
        return attributes

    def rmdir(self, parent: int, name: bytes, hold: bool = False) -> Attributes:
        """Remove an empty directory; *hold* and the result are as for :meth:`unlink`."""
        with self._guard.lock, self._guard.checked:
            directory = self._directory(parent)
            inode = self._existing(directory, name)
            self._check_removable(directory, name, inode)
            self._check_empty(inode, name)
            self._unnamed(directory, name, inode, hold)
            return inode.attributes()

    def _check_empty(self, inode: Inode, name: bytes) -> None:
        if not stat.S_ISDIR(inode.mode):
            raise path_error(errno.ENOTDIR, f"{os.fsdecode(name)}: not a directory")
        if self._catalogue.has_entries(inode.ino):
            raise path_error(errno.ENOTEMPTY, f"{os.fsdecode(name)}: directory not empty")

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0,
        hold: bool = False,
    ) -> Attributes | None:  # fmt: skip
        """Move a name, replacing an existing one; *flags* are those of renameat2(2).

        Returns the attributes of the replaced inode (see *hold* of :meth:`unlink`), or None.
        """
        if flags not in _RENAMES:
            raise path_error(errno.EINVAL, f"rename: unknown flags {flags:#x}")
        arguments = parent, name, new_parent, new_name, flags, hold
        replaced = self._regions.patiently(partial(self._rename, *arguments))
        self._regions.reap()
        return replaced

    def _rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, hold: bool,
        steps: float,
    ) -> Attributes | None:  # fmt: skip
        with self._guard.lock, self._guard.checked:
            source = self._directory(parent)
            inode = self._existing(source, name)
            into = self.destination(new_parent, new_name)
            victim = self.find(into, new_name)
            if victim is not None and flags & RENAME_NOREPLACE:
                raise path_error(errno.EEXIST, f"{os.fsdecode(new_name)}: exists")
            if victim is inode:
                return None  # two names of one inode: both stay, as POSIX requires
            self._check_removable(source, name, inode)
            if victim is not None:
                self._check_removable(into, new_name, victim)
            self._check_no_loop(inode, into, steps)
            if flags == RENAME_EXCHANGE:
                self._exchange(source, name, inode, into, new_name, steps)
                return None
            if self._hex_alias(source, name, inode) and not inode.anonymous:
                raise path_error(
                    errno.EPERM,
                    f"{os.fsdecode(name)}: this is the region's ID name, it has another name",
                )
            if victim is not None:
                self._check_replaceable(inode, victim, new_name)
            # Before anything is changed, since it may fail for lack of memory.
            whiteout = self._catalogue.add(stat.S_IFCHR, 0, 0) if flags & RENAME_WHITEOUT else None
            if victim is not None:
                self._unnamed(into, new_name, victim, hold)
            self._move(source, name, inode, into, new_name)
            if whiteout is not None:
                self._named(source, name, whiteout)
            return victim.attributes() if victim else None

    def _check_no_loop(self, inode: Inode, into: Inode, steps: float) -> None:
        ancestor = into.ino
        while stat.S_ISDIR(inode.mode) and ancestor != ROOT:
            if ancestor == inode.ino:
                raise path_error(errno.EINVAL, "rename: a directory cannot be moved into itself")
            above = self._catalogue.names(self.get(ancestor), 1)
            if not above:
                return
            ancestor = above[0][0]
            steps -= 1
            if steps < 0:
                raise Lengthy

    def _check_replaceable(self, inode: Inode, victim: Inode, name: bytes) -> None:
        if stat.S_ISDIR(inode.mode):
            self._check_empty(victim, name)
        elif stat.S_ISDIR(victim.mode):
            raise path_error(errno.EISDIR, f"{os.fsdecode(name)}: is a directory")

    def _move(self, source: Inode, name: bytes, inode: Inode, into: Inode, new_name: bytes) -> None:
        if inode.anonymous:
            inode.anonymous = 0
            inode.nlink = 1
        else:
            self._catalogue.unlink(source.ino, name)
        self._catalogue.link(into.ino, new_name, inode)
        if stat.S_ISDIR(inode.mode):
            source.nlink -= 1
            into.nlink += 1
        inode.changed_at(self._catalogue.clock.exact())
        self.changed(source, into)

    def _exchange(
        self, source: Inode, name: bytes, inode: Inode, into: Inode, new_name: bytes, steps: float
    ) -> None:
        victim = self._existing(into, new_name)
        if self._hex_alias(source, name, inode) or self._hex_alias(into, new_name, victim):
            raise path_error(errno.EINVAL, "rename: a region without a name cannot be exchanged")
        self._check_no_loop(victim, source, steps)
        self._catalogue.link(into.ino, new_name, inode)
        self._catalogue.link(source.ino, name, victim)
        moved = stat.S_ISDIR(inode.mode) - stat.S_ISDIR(victim.mode)
        source.nlink -= moved
        into.nlink += moved
        now = self._catalogue.clock.exact()
        inode.changed_at(now)
        victim.changed_at(now)
        self.changed(source, into)

    def readdir(
        self, ino: int, after: bytes = b"", limit: int = 1000
    ) -> list[tuple[bytes, Attributes]]:
        """Return up to *limit* entries of a directory that follow *after*, in the order of their
        names.

        The root directory's nameless regions come after its names, in the order of their IDs;
        *after* is then such a hex name that is not a dentry.
        """
        limit = min(max(limit, 1), 10000)
        with self._guard.lock, self._guard.checked:
            self._directory(ino)
            nameless = self._nameless_cursor(ino, after)
            page = [] if nameless else self._catalogue.entries(ino, after, limit)
            if ino == ROOT and len(page) < limit:
                left = self._catalogue.regions(nameless, limit - len(page), anonymous=True)
                page += [(a.region.hex().encode(), a) for a in left]
            return page

    def _nameless_cursor(self, ino: int, after: bytes) -> int:
        """Return the slot after which nameless regions continue; 0 while names are being listed."""
        rid = region_of_name(after) if ino == ROOT else None
        if rid is None or self._catalogue.lookup(ino, after) is not None:
            return 0
        return rid.slot
