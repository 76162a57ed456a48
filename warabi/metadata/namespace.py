"""The namespace of a target: the tree, with extended attributes and paths."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from functools import partial

from warabi._core.attributes import (
    LINKS,
    REGION_XATTR,
    ROOT,
    TARGET_XATTR,
    VIRTUAL_XATTRS,
    Attributes,
)
from warabi.errors import InvalidRegion, Lengthy, PathError, path_error
from warabi.metadata import acl, domain
from warabi.metadata.inode import Inode, check_unfixed
from warabi.metadata.tree import Tree
from warabi.region import RegionID


class Namespace(Tree):
    """Directories, links, symlinks, special files and extended attributes of one target."""

    # Extended attributes

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return an extended attribute; ENODATA if it does not exist, EOPNOTSUPP if it cannot
        exist.

        ``user.warabi.region`` is a region's ID in hex, ``user.warabi.target`` the target's UUID.
        """
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            if name == REGION_XATTR and stat.S_ISREG(inode.mode):
                return inode.rid.hex().encode()
            if name == TARGET_XATTR:
                return self._catalogue.uuid.encode()
            value = self._catalogue.xattr(ino, name)
            if value is None:
                domain.xattr_name(name)
                raise path_error(errno.ENODATA, f"{os.fsdecode(name)}: no such attribute")
            return value

    def setxattr(
        self, ino: int, name: bytes, value: bytes, keep_setgid: bool = True, flags: int = 0
    ) -> None:
        """Set an extended attribute; EPERM for virtual ones, EOPNOTSUPP for a name outside
        ``user.``, ``trusted.`` and ``security.`` that is not an access control list, ERANGE, E2BIG
        and ENOSPC if it is too long or too large.

        With ``XATTR_CREATE`` in *flags* it must not exist (EEXIST), with ``XATTR_REPLACE`` it must
        (ENODATA); as on Linux that does not concern access control lists.

        An access control list also changes the mode, and is not stored if the mode can express it.
        Without *keep_setgid*, for a caller outside the file's group, it clears the set-group-ID
        bit.
        """
        flags = domain.xattr_flags(flags)
        if name in (acl.ACCESS, acl.DEFAULT):
            self._set_list(ino, name, acl.unpack(value), keep_setgid)
        else:
            self._change_xattr(ino, name, value, flags)

    setxattr_if = setxattr

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an extended attribute; ENODATA if it does not exist, except for a list."""
        self._change_xattr(ino, name, None)

    def _set_list(
        self, ino: int, name: bytes, entries: list[acl.AclEntry], keep_setgid: bool
    ) -> None:
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            if stat.S_ISLNK(inode.mode):
                raise path_error(
                    errno.EOPNOTSUPP, f"inode {ino}: a symbolic link has no access control list"
                )
            check_unfixed(inode, "setxattr")
            if name == acl.DEFAULT and not stat.S_ISDIR(inode.mode):
                raise path_error(
                    errno.EACCES,
                    f"inode {ino}: only a directory can have a default access control list",
                )
            kept, mode = entries, inode.mode
            if name == acl.ACCESS and entries:
                mode = mode & ~0o777 | acl.mode_of(entries)
                if not keep_setgid:
                    mode &= ~stat.S_ISGID
                kept = entries if acl.extended(entries) else []
            value = acl.pack(kept) if kept else None
            self._catalogue.charge(len(value or b""))
            self._catalogue.set_xattr(inode, name, value)
            self._catalogue.set_attributes(inode, mode)
            inode.changed_at(self._catalogue.clock.exact())

    def _change_xattr(self, ino: int, name: bytes, value: bytes | None, flags: int = 0) -> None:
        with self._guard.lock, self._guard.checked:
            inode = self.get(ino)
            if name in VIRTUAL_XATTRS:
                raise path_error(errno.EPERM, f"{os.fsdecode(name)}: read-only")
            domain.xattr_name(name)
            check_unfixed(inode, os.fsdecode(name))
            if flags:
                exists = self._catalogue.xattr(ino, name) is not None
                if exists and flags & os.XATTR_CREATE:
                    raise path_error(errno.EEXIST, f"{os.fsdecode(name)}: the attribute exists")
                if not exists and flags & os.XATTR_REPLACE:
                    raise path_error(errno.ENODATA, f"{os.fsdecode(name)}: no such attribute")
            if value is not None:
                self._check_xattr_room(ino, name, value)
                self._catalogue.charge(len(value))
            if value is None and self._catalogue.xattr(ino, name) is None:
                if name in (acl.ACCESS, acl.DEFAULT):
                    return  # like Linux: there is nothing to remove
                raise path_error(errno.ENODATA, f"{os.fsdecode(name)}: no such attribute")
            self._catalogue.set_xattr(inode, name, value)
            inode.changed_at(self._catalogue.clock.exact())

    def _check_xattr_room(self, ino: int, name: bytes, value: bytes) -> None:
        names, values = self._catalogue.xattr_bytes(ino, name)
        names += len(name) + 1
        if names > domain.XATTR_LIST_MAX or names + values + len(value) > domain.XATTR_TOTAL_MAX:
            raise path_error(
                errno.ENOSPC,
                f"{os.fsdecode(name)}: the attribute names of an inode may take at most"
                f" {domain.XATTR_LIST_MAX} bytes, its attributes {domain.XATTR_TOTAL_MAX}",
            )

    def listxattr(self, ino: int) -> list[bytes]:
        """Return the names of the extended attributes, without virtual ones."""
        with self._guard.lock, self._guard.checked:
            self.get(ino)
            return self._catalogue.xattrs(ino)

    # Paths

    def resolve(self, path: str) -> Attributes:
        """Return the inode at *path*, from the root.

        Symbolic links are followed within the path, but not at its end.
        """
        return self._regions.patiently(partial(self._resolve, path, _parts(path), False))

    def follow(self, path: str) -> Attributes:
        """The same as :meth:`resolve`, but a symbolic link at the end is followed, too."""
        return self._regions.patiently(partial(self._resolve, path, _parts(path), True))

    def _resolve(self, path: str, parts: list[bytes], follow: bool, steps: float) -> Attributes:
        with self._guard.lock, self._guard.checked:
            return self._walk(path, parts, follow, steps).attributes()

    def _walk(self, path: str, parts: list[bytes], follow: bool, steps: float) -> Inode:
        """Return the inode at *path*, after *steps* components at most; the guard is held."""
        root = self.get(ROOT)
        above, left, links = [root], parts[::-1], 0
        while left:
            steps -= 1
            if steps < 0:
                raise Lengthy
            name = left.pop()
            directory = above[-1]
            if not stat.S_ISDIR(directory.mode):
                raise path_error(
                    errno.ENOTDIR, f"{path}: a component of the path is not a directory"
                )
            if name == b"..":
                above = above[:-1] or [root]
                continue
            found = self.find(directory, name)
            if found is None:
                raise path_error(errno.ENOENT, f"{path}: no such file or directory")
            if found.target is None or not (left or follow):
                above.append(found)
                continue
            links += 1
            if links > LINKS:
                raise path_error(errno.ELOOP, f"{path}: too many symbolic links")
            if found.target.startswith(b"/"):
                above = [root]
            left += _components(found.target)[::-1]
        return above[-1]

    def open_name(self, path: str) -> RegionID:
        """Return the region at *path*; ENOENT, ENOTDIR, EISDIR, or EINVAL if it is not a region."""
        with about("open_name", path):
            found = self.resolve(path)
            if stat.S_ISREG(found.mode):
                return found.region
            raise path_error(errno.EISDIR if stat.S_ISDIR(found.mode) else errno.EINVAL)

    def link_name(self, region: RegionID, path: str) -> None:
        """Give *region* the name *path*, in an existing directory; EEXIST if the name exists."""
        with about("link_name", path):
            parent, name = self._split(path)
            with self._guard.lock, self._guard.checked:
                ino = self._region(region, "link_name", path).ino
            self.link(ino, parent, name)

    def unlink_name(self, path: str) -> None:
        """Remove the name *path*; removing its last name erases a region."""
        with about("unlink_name", path):
            self.unlink(*self._split(path))

    def _split(self, path: str) -> tuple[int, bytes]:
        return self._regions.patiently(partial(self._split_guarded, path))

    def _split_guarded(self, path: str, steps: float) -> tuple[int, bytes]:
        with self._guard.lock, self._guard.checked:
            return self.split(path, steps)

    def split(self, path: str, steps: float) -> tuple[int, bytes]:
        """Return the inode of the directory that *path* is in, and its last component; the guard is
        held.  Raises ``Lengthy`` after *steps* directories."""
        parts = _parts(path)
        if not parts:
            raise path_error(errno.EISDIR, f"{path!r}: the root directory")
        return self._walk(path, parts[:-1], True, steps).ino, parts[-1]

    def publish(
        self, region: RegionID, path: str, exclusive: bool, mode: int | None = None,
        uid: int | None = None, gid: int | None = None,
    ) -> Attributes:  # fmt: skip
        """Give *region*, which has no name yet, the name *path*, in an existing directory.

        What has the name, not a directory (EISDIR), loses it in the same step; with *exclusive*
        it is an error (EEXIST).  With *mode* it gets what a new file of that mode and owner gets in
        the directory, and the pin ends that it was made with.
        """
        with about("publish" if mode is None else "store", path):
            parent, name = self._split(path)
            with self._guard.lock, self._guard.checked:
                inode = self._region(region, "publish", path)
                directory, _ = self.check_free(parent, name, exclusive)
                if mode is not None and inode.linkable:
                    self.inherit(inode, directory, mode, uid, gid)
                    inode.pins -= 1
                attributes = self.give_name(inode, parent, name, exclusive)
        self._regions.reap()
        return attributes

    def _region(self, region: RegionID, what: str, path: str) -> Inode:
        inode = self._catalogue.region(region)
        if inode is None or inode.dead:
            raise InvalidRegion(f"{what} {path}: there is no region {region!r} in this target")
        return inode

    def paths(self, inode: Inode, most: int, characters: float, steps: float) -> list[str]:
        """Return *most* paths of an inode from the root, all for -1, and no more once they have so
        many *characters*.  Raises ``Lengthy`` after *steps* directories; the guard is held.

        Names that a graft has staged, and not joined, have no path.
        """
        above: dict[int, bytes | None] = {}
        found: list[str] = []
        for parent, name in self._catalogue.names(inode, most):
            if parent not in above:
                above[parent] = self._path(parent, steps)
                steps -= (above[parent] or b"").count(b"/")
            path = above[parent]
            if path is None:
                continue
            found.append(os.fsdecode(path + b"/" + name))
            characters -= len(found[-1])
            if characters < 0:
                break
        return found

    def _path(self, ino: int, steps: float) -> bytes | None:
        names: list[bytes] = []
        while ino != ROOT:
            above = self._catalogue.names(self.get(ino), 1) if ino > 0 else []
            if not above:
                return None
            ino, name = above[0]
            names.append(b"/" + name)
            if len(names) > steps:
                raise Lengthy
        return b"".join(reversed(names))


@contextlib.contextmanager
def about(what: str, path: str) -> Iterator[None]:
    """Put the operation and the whole path into the message of a ``PathError``."""
    try:
        yield
    except PathError as error:
        number = error.errno or errno.EIO
        raise path_error(number, f"{what} {path}: {os.strerror(number)}") from None


def _parts(path: str) -> list[bytes]:
    try:
        encoded = os.fsencode(path)
    except UnicodeError as error:
        raise path_error(errno.EINVAL, f"{path!r:.100}: {error}") from None
    return _components(encoded)


def _components(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]
