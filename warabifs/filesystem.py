"""File semantics over a target: what the kernel's requests mean.

Knows nothing of pyfuse3; raises the library's exceptions and ``OSError``.

The kernel keeps *lookup counts*: an inode number that was handed out may be used in requests
until it is forgotten, even when its last name is gone.  So a removed inode stays pinned in the
target until its count is zero (``_Known.held``), and an open file pins its inode.

Tasks interleave only where a method awaits.  The tables are changed between awaits, never
across one: look at ``_known`` again after an await instead of keeping an entry.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from warabi import errors
from warabi.aio import Target
from warabi.errors import path_error
from warabi.inode import ROOT, Attributes
from warabi.region import RegionID
from warabi.tree import region_of_name

BLOCK = 4096
_PAGE = 128  # directory entries fetched at a time


@dataclass(slots=True)
class _Known:
    """An inode that the kernel knows."""

    region: RegionID
    count: int = 0
    held: int = 0  # pins that end when the kernel forgets
    aliased: bool = False  # the kernel has a name for it that spells its ID


@dataclass(slots=True)
class _File:
    """An open file."""

    ino: int
    region: RegionID


@dataclass(slots=True)
class _Directory:
    """An open directory; the cookie of entry *i* is *i* + 3, after the two dots."""

    ino: int
    names: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry: *next_cookie* continues after it; dots are not counted as lookups."""

    name: bytes
    attributes: Attributes
    next_cookie: int

    @property
    def dot(self) -> bool:
        return self.name in (b".", b"..")


class FileSystem:
    """The files of a target.

    Args:
        target: where they are.
        exclusive: nobody else changes the target, so what the kernel cached stays true.
        drop_name: makes the kernel let go of a name in a directory, later.
    """

    def __init__(
        self, target: Target, *, exclusive: bool, drop_name: Callable[[int, bytes], None]
    ) -> None:
        self._target = target
        self._exclusive = exclusive
        self._drop_name = drop_name
        self._known: dict[int, _Known] = {}
        self._parents: dict[int, int] = {ROOT: ROOT}  # of directories that the kernel knows
        self._handles: dict[int, _File | _Directory] = {}
        self._next_handle = itertools.count(1)
        self._stamps: dict[int, tuple[int, int]] = {}  # of what the page cache holds
        # One request's data at a time is copied out before the next task runs (see `read`).
        self._buffer = memoryview(bytearray(1024 * 1024))
        self._buffer_busy = False

    # What the kernel knows

    def _count(
        self, attributes: Attributes, parent: int | None = None, name: bytes = b""
    ) -> Attributes:
        known = self._known.get(attributes.ino)
        if known is None:
            known = self._known[attributes.ino] = _Known(attributes.region)
        known.count += 1
        if parent is not None and stat.S_ISDIR(attributes.mode):
            self._parents[attributes.ino] = parent
        if parent == ROOT and region_of_name(name) == attributes.region:
            known.aliased = True
        return attributes

    def count_entry(self, handle: int, entry: Entry) -> None:
        """The kernel took an entry that :meth:`readdir` of *handle* gave."""
        self._count(entry.attributes, self._handles[handle].ino, entry.name)

    async def forget(self, inodes: Iterable[tuple[int, int]]) -> None:
        """The kernel dropped so many references to each inode."""
        for ino, count in inodes:
            known = self._known.get(ino)
            if known is None:
                continue
            known.count -= count
            if known.count <= 0:
                del self._known[ino]
                self._parents.pop(ino, None)
                self._stamps.pop(ino, None)
                if known.held:
                    await self._target.call("unpin", ino, known.held)

    def _region(self, ino: int) -> RegionID:
        known = self._known.get(ino)
        if known is None:
            raise path_error(errno.ESTALE, f"inode {ino}: unknown")
        return known.region

    async def _released(self, attributes: Attributes | None) -> None:
        """Keep the pin on an inode that lost its last name until the kernel forgets it."""
        if attributes is None or attributes.nlink:
            return
        known = self._known.get(attributes.ino)
        if known is not None:
            known.held += 1
            if known.aliased:  # else that name keeps the kernel from forgetting the inode
                self._drop_name(ROOT, attributes.region.hex().encode())
        else:
            await self._target.call("unpin", attributes.ino, 1)

    # Inodes

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        if name == b".":
            return self._count(await self._target.call("getattr", parent))
        if name == b"..":
            above = self._parents.get(parent, ROOT)
            return self._count(await self._target.call("getattr", above))
        return self._count(await self._target.call("lookup", parent, name), parent, name)

    async def getattr(self, ino: int) -> Attributes:
        attributes: Attributes = await self._target.call("getattr", ino)
        return attributes

    async def setattr(
        self, ino: int, *, size: int | None, mode: int | None, uid: int | None, gid: int | None,
        atime_ns: int | None, mtime_ns: int | None,
    ) -> Attributes:  # fmt: skip
        if size is not None:
            await self._target.resize(self._region(ino), size)
        changes = (mode, uid, gid, atime_ns, mtime_ns)
        if size is not None and all(change is None for change in changes):
            return await self.getattr(ino)
        attributes: Attributes = await self._target.call("setattr", ino, *changes)
        return attributes

    async def readlink(self, ino: int) -> bytes:
        target: bytes = await self._target.call("readlink", ino)
        return target

    async def statfs(self) -> tuple[int, int, int]:
        """Total and available bytes, and the number of regions."""
        room: tuple[int, int, int] = await self._target.call("room")
        return room

    # Names

    async def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int
    ) -> Attributes:
        made = await self._target.call("mknod", parent, name, mode, uid, gid, rdev, False)
        return self._count(made)

    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        made = await self._target.call("mkdir", parent, name, mode, uid, gid)
        return self._count(made, parent)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        return self._count(await self._target.call("symlink", parent, name, target, uid, gid))

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        return self._count(await self._target.call("link", ino, parent, name))

    async def unlink(self, parent: int, name: bytes) -> None:
        await self._released(await self._target.call("unlink", parent, name, True))

    async def rmdir(self, parent: int, name: bytes) -> None:
        await self._released(await self._target.call("rmdir", parent, name, True))

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        replaced = await self._target.call(
            "rename", parent, name, new_parent, new_name, flags, True
        )
        await self._released(replaced)
        if parent != new_parent:
            moved = await self._target.call("lookup", new_parent, new_name)
            if moved.ino in self._parents:
                self._parents[moved.ino] = new_parent

    # Files

    def _add_handle(self, handle: _File | _Directory) -> int:
        number = next(self._next_handle)
        self._handles[number] = handle
        return number

    def _file(self, handle: int) -> _File:
        found = self._handles[handle]
        assert isinstance(found, _File)
        return found

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, flags: int
    ) -> tuple[int, Attributes]:
        """Make and open a file; returns its handle."""
        try:
            made = await self._target.call("mknod", parent, name, mode, uid, gid, 0, True)
        except errors.PathError as error:
            if error.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            # Somebody else was faster than the kernel's lookup.
            found = await self._target.call("lookup", parent, name)
            made = await self._target.call("pin", found.ino)
            if flags & os.O_TRUNC:
                await self._target.resize(made.region, 0)
        self._count(made)
        return self._add_handle(_File(made.ino, made.region)), made

    async def open(self, ino: int, flags: int) -> tuple[int, bool]:
        """Open a file; returns its handle, and whether the kernel's page cache is still true.

        The kernel leaves ``O_TRUNC`` to us.
        """
        attributes: Attributes = await self._target.call("pin", ino)
        if flags & os.O_TRUNC:
            try:
                await self._target.resize(attributes.region, 0)
            except BaseException:
                await self._target.call("unpin", ino, 1)
                raise
            attributes = await self.getattr(ino)
        stamp = (attributes.mtime_ns, attributes.size)
        fresh = self._exclusive or self._stamps.get(ino) == stamp
        self._stamps[ino] = stamp
        return self._add_handle(_File(ino, attributes.region)), fresh

    async def read(self, handle: int, offset: int, size: int) -> memoryview:
        """Up to *size* bytes, fewer only at the end of the file.

        The result is valid until the caller's task waits for anything.
        """
        file = self._file(handle)
        if self._buffer_busy or size > len(self._buffer):
            buffer = memoryview(bytearray(size))
            return buffer[: await self._target.read_some(file.region, offset, buffer)]
        self._buffer_busy = True
        try:
            buffer = self._buffer[:size]
            return buffer[: await self._target.read_some(file.region, offset, buffer)]
        finally:
            self._buffer_busy = False

    async def write(self, handle: int, offset: int, data: Any) -> int:
        file = self._file(handle)
        await self._target.write(file.region, offset, data, extend=True)
        self._stamps.pop(file.ino, None)  # the next open fetches the new one
        return len(data)

    async def fsync(self, handle: int, datasync: bool) -> None:
        await self._target.fsync(self._file(handle).region, times=not datasync)

    async def release(self, handle: int) -> None:
        file = self._handles.pop(handle)
        await self._target.call("unpin", file.ino, 1)

    # Directories

    def opendir(self, ino: int) -> int:
        return self._add_handle(_Directory(ino))

    def releasedir(self, handle: int) -> None:
        del self._handles[handle]

    async def fsyncdir(self) -> None:
        await self._target.call("commit")

    async def readdir(self, handle: int, cookie: int) -> list[Entry]:
        """Entries that follow *cookie*, 0 being the start; none at the end.

        Entries come in the order of their names, so what is added or removed meanwhile moves
        no other; attributes are fetched anew each time, for the kernel takes them over.
        """
        directory = self._handles[handle]
        assert isinstance(directory, _Directory)
        entries: list[Entry] = []
        if cookie < 2:
            directory.names.clear()
            above = self._parents.get(directory.ino, ROOT)
            dots = ((b".", directory.ino), (b"..", above))
            for position, (name, ino) in enumerate(dots[cookie:], cookie):
                entries.append(Entry(name, await self.getattr(ino), position + 1))
            cookie = 2
        index = cookie - 2
        after = directory.names[index - 1] if index else b""
        page = await self._target.call("readdir", directory.ino, after, _PAGE)
        directory.names[index:] = [name for name, _ in page]
        for position, (name, attributes) in enumerate(page, index):
            entries.append(Entry(name, attributes, position + 3))
        return entries

    # Extended attributes

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        value: bytes = await self._target.call("getxattr", ino, name)
        return value

    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        await self._target.call("setxattr", ino, name, value)

    async def removexattr(self, ino: int, name: bytes) -> None:
        await self._target.call("removexattr", ino, name)

    async def listxattr(self, ino: int) -> list[bytes]:
        names: list[bytes] = await self._target.call("listxattr", ino)
        return names
