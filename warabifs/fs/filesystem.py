"""The file system: POSIX file operations, carried out on a target.

This module does not know the FUSE protocol; it raises the library's exceptions and ``OSError``.

The kernel keeps *lookup counts*: it may use an inode number that it was given until it forgets it,
even after the last name is gone.  So a removed inode stays pinned in the target until its count is
zero (``Known.held``), and an open file pins its inode.

Tasks interleave only where a method awaits.  The tables are changed between awaits, never
across one: look at ``_known`` again after an await instead of keeping an entry.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from contextlib import suppress
from typing import Any

import trio

from warabi import errors
from warabi._core.attributes import (
    APPEND_ONLY,
    IMMUTABLE,
    LOCATION_XATTR,
    ROOT,
    Attributes,
    without_setid,
)
from warabi._core.buffers import MAX_SIZE
from warabi._core.changes import ATTRIBUTES, Changes
from warabi._core.lock_ranges import FileLock
from warabi.aio import Target
from warabi.errors import path_error
from warabi.metadata import acl
from warabi.metadata.tree import RENAME_EXCHANGE, region_of_name
from warabi.region import RegionID
from warabi.target.target import Target as LocalTarget
from warabifs.fs.dentry_mirror import BelievedNames
from warabifs.fs.handles import Directory, File, Known, ListedEntry, Listing, Listings, Outdated
from warabifs.fs.locks import Locks
from warabifs.fs.page_versions import PageVersions
from warabifs.fs.read_buffers import Buffers
from warabifs.fs.report_file import ReportFiles
from warabifs.fs.write_ordering import Writes

BLOCK = 4096
CAPABILITY = b"security.capability"
"""The attribute that the kernel reads before each write to a file, since a write removes it."""
KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
FALLOCATE_MODES: dict[int, Callable[[Target, RegionID, int, int], Awaitable[None]]] = {
    0: lambda target, *extent: target.allocate(*extent),
    KEEP_SIZE: lambda target, *extent: target.allocate(*extent, keep_size=True),
    _PUNCH_HOLE | KEEP_SIZE: lambda target, *extent: target.punch_hole(*extent),
    _ZERO_RANGE: lambda target, *extent: target.zero_range(*extent),
    _ZERO_RANGE | KEEP_SIZE: lambda target, *extent: target.zero_range(*extent, keep_size=True),
}
"""The supported modes of fallocate(2), and the calls that implement them."""
_PAGE = 512  # directory entries fetched at a time
_FORGOTTEN = 65536  # forgotten inodes after which the table of known inodes is copied
_SPARE_NAMES = 200_000  # kept names of directories that are closed or removed


class FileSystem:
    """The files of a target.

    Args:
        target: the target.
        exclusive: no other client changes the target, so the kernel's caches stay valid.
        attr_timeout: seconds for which attributes of an inode may be cached.
        local: *target* itself if it is in this process; reads and writes call it directly.
        drop_name: makes the kernel drop a name in a directory, asynchronously.
        drop_attributes: makes the kernel drop an inode's attributes, asynchronously.
        remember_names: the kernel caches all names for a while, not only those of directories.
        keep_listings: seconds for which the kernel may keep listings of directories.  Not longer
            than the names and attributes that come with them: those are requested one by one then.
        openless: files are used without an open request.  An inode that is removed while it is
            open then stays for as long as the kernel knows it; no other client can remove it.
        location: what the attribute ``LOCATION_XATTR`` says, empty: nothing.
    """

    def __init__(
        self, target: Target, *, exclusive: bool, attr_timeout: float,
        drop_name: Callable[[int, bytes], None],
        drop_attributes: Callable[[int], None] = lambda ino: None,
        local: LocalTarget | None = None, remember_names: bool = False,
        keep_listings: float = 0.0, openless: bool = False, location: str = "",
    ) -> None:  # fmt: skip
        self._target = target
        self._attr_timeout = attr_timeout
        self._local = local
        self._exclusive = exclusive
        self.openless = openless
        self._location = os.fsencode(location)
        self.appends = not exclusive
        """Whether the provider chooses the offset of appends, since other clients append, too."""
        self.drop_name = drop_name
        self.drop_attributes = drop_attributes
        self._remember_names = remember_names
        self.keep_listings = keep_listings
        self._names = BelievedNames(drop_name)
        self._known: dict[int, Known] = {}
        self._forgotten = 0  # inodes forgotten since ``_known`` was copied
        self._handles: dict[int, File | Directory] = {}
        self._next_handle = itertools.count(1)
        self._xattr_changes = 0
        self._listings = Listings(_SPARE_NAMES)
        self.pages = PageVersions(target, alone=exclusive)
        self._buffers = Buffers()
        self.writes = Writes()
        self.reports = ReportFiles()
        self._locks = Locks(target, self._refresh)
        self.cancel_lock = self._locks.cancel
        self.forget_bytes: Callable[[int, int, int], None] = lambda ino, offset, size: None
        """Makes the kernel write back and drop pages; waits, and so is called in a thread."""

    # What the kernel has cached

    def _count(
        self, attributes: Attributes, parent: int | None = None, name: bytes = b""
    ) -> Attributes:
        known = self._known.get(attributes.ino)
        if known is None:
            known = self._known[attributes.ino] = Known(
                attributes.region, stat.S_ISDIR(attributes.mode)
            )
        known.count += 1
        known.note_attributes(attributes)
        if parent is not None and (known.directory or self._remember_names):
            self._means(parent, name, attributes.ino)
        if parent == ROOT and region_of_name(name) == known.region:
            known.aliased = True
        return attributes

    def _new(
        self, attributes: Attributes, parent: int | None = None, name: bytes = b""
    ) -> Attributes:
        """As :meth:`_count`, for an inode that was just created."""
        self._count(attributes, parent, name)
        self.pages.made(attributes.ino)
        known = self._known[attributes.ino]
        known.incapable = time.monotonic() + self._attr_timeout
        if self._exclusive and attributes.mode == without_setid(attributes.mode):
            known.harmless = known.incapable
        return attributes

    def count_entry(self, handle: int, entry: ListedEntry) -> None:
        """Count the lookup of an entry that :meth:`readdir` of *handle* returned."""
        self._count(entry.attributes, self._handles[handle].ino, entry.name)

    async def forget(self, inodes: Iterable[tuple[int, int]]) -> None:
        """Subtract lookup counts of inodes: pairs of inode number and count."""
        for ino, count in inodes:
            known = self._known.get(ino)
            if known is None:
                self.reports.forget(ino)
                continue
            known.count -= count
            if known.count <= 0:
                del self._known[ino]
                self._forgotten += 1
                self._listings.forget(ino)
                self.pages.forget(ino)
                self._names.forget(ino)
                if known.held:
                    await self._target.call("unpin", ino, known.held)
        if self._forgotten >= _FORGOTTEN:  # a dictionary does not shrink when keys are removed
            self._forgotten = 0
            self._known = dict(self._known)

    def _means(self, parent: int, name: bytes, ino: int) -> None:
        """Record that the kernel has cached *ino* for a name; 0: it has nothing cached."""
        if self._exclusive:
            return  # the kernel needs no invalidation
        self._names.set(parent, name, ino)

    def note_absent(self, parent: int, name: bytes) -> bool:
        """Return whether the kernel may cache that a name does not exist, and record that it
        does."""
        if self._exclusive:
            return True
        if parent == ROOT and region_of_name(name) is not None:
            return False  # creating a region without a name sends no notification of its ID name
        self._names.set_absent(parent, name)
        return True

    def is_directory(self, ino: int) -> bool:
        """Whether the kernel knows *ino* as a directory."""
        known = self._known.get(ino)
        return ino == ROOT or (known is not None and known.directory)

    def outdated(self, changes: Changes) -> Outdated:
        """Return the part of *changes* that affects what the kernel has cached."""
        if changes.everything:
            self.pages.forget_all()
            for ino in (ROOT, *self._known):
                self._is_listing_outdated(ino)
            return Outdated(dict.fromkeys((ROOT, *self._known), False), self._names.all())
        inodes = {}
        for ino, what in changes.inodes.items():
            if ino in self._known or ino == ROOT:
                inodes[ino] = not self._is_listing_outdated(ino) and what == ATTRIBUTES
                if what != ATTRIBUTES:
                    self.pages.forget(ino)
        names = {}
        for (parent, name), ino in changes.names.items():
            believed = self._names.get(parent, name)
            if (parent in self._known or parent == ROOT) and not 0 < ino == believed:
                names[parent, name] = believed
                self._names.forget_absent(parent, name)
        return Outdated(inodes, names)

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
            if known.aliased:  # otherwise this name would keep the kernel from forgetting the inode
                self.drop_name(ROOT, attributes.region.hex().encode())
        else:
            await self._target.call("unpin", attributes.ino, 1)

    # Inodes

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        found = await self._target.call("lookup", parent, name)
        if name in (b".", b".."):  # "." and "..": resolving a file handle, which gives no name
            return self._count(found)
        return self._count(found, parent, name)

    async def getattr(self, ino: int) -> Attributes:
        attributes: Attributes = await self._target.call("getattr", ino)
        return attributes

    async def setattr(
        self, ino: int, size: int | None, mode: int | None, uid: int | None, gid: int | None,
        atime_ns: int | None, mtime_ns: int | None, *, kill_setid: bool = False,
    ) -> Attributes:  # fmt: skip
        """Change the attributes that are not None.  *kill_setid*: also clear the set-ID bits."""
        if kill_setid and not (mode is None and self._exclusive and self.is_harmless(ino)):
            mode = without_setid(mode or (await self.getattr(ino)).mode)
        if mode is not None and ino in self._known:
            self._known[ino].harmless = 0.0
        if size is not None:
            await self._target.resize(self._region(ino), size)
            if mode is uid is gid is atime_ns is mtime_ns is None:
                return await self.getattr(ino)
        attributes: Attributes = await self._target.call(
            "setattr", ino, mode, uid, gid, atime_ns, mtime_ns
        )
        return attributes

    async def readlink(self, ino: int) -> bytes:
        target: bytes = await self._target.call("readlink", ino)
        return target

    async def statfs(self) -> tuple[int, int, int]:
        """Return total and available bytes, and the number of regions."""
        room: tuple[int, int, int] = await self._target.call("room")
        return room

    def statistics(self) -> dict[str, int]:
        """Return numbers for monitoring: ``open_files`` and ``open_directories`` of programs, and
        ``known_inodes``, those that the kernel has not forgotten."""
        handles = list(self._handles.values())
        files = sum(isinstance(handle, File) for handle in handles)
        return {
            "open_files": files,
            "open_directories": len(handles) - files,
            "known_inodes": len(self._known),
        }

    # Names

    async def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int, umask: int
    ) -> Attributes:
        made = await self._target.call("mknod", parent, name, mode, uid, gid, rdev, False, umask)
        return self._new(made, parent, name)

    async def mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int
    ) -> Attributes:
        made = await self._target.call("mkdir", parent, name, mode, uid, gid, umask)
        return self._count(made, parent, name)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        made = await self._target.call("symlink", parent, name, target, uid, gid)
        return self._count(made, parent, name)

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        return self._count(await self._target.call("link", ino, parent, name), parent, name)

    async def unlink(self, parent: int, name: bytes) -> None:
        removed = await self._target.call("unlink", parent, name, True)
        self._means(parent, name, 0)
        await self._released(removed)

    async def rmdir(self, parent: int, name: bytes) -> None:
        removed = await self._target.call("rmdir", parent, name, True)
        self._means(parent, name, 0)
        await self._released(removed)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        replaced = await self._target.call(
            "rename", parent, name, new_parent, new_name, flags, True
        )
        moved = self._names.get(parent, name)
        exchanged = self._names.get(new_parent, new_name) if flags & RENAME_EXCHANGE else 0
        self._means(parent, name, exchanged)
        self._means(new_parent, new_name, moved)
        await self._released(replaced)

    # Files

    def _add_handle(self, handle: File | Directory) -> int:
        number = next(self._next_handle)
        self._handles[number] = handle
        return number

    def _region_of(self, ino: int, handle: int) -> RegionID:
        """Return the region of an open file; *handle* is 0 if the kernel opened it itself."""
        if not handle:
            return self._region(ino)
        found = self._handles[handle]
        assert isinstance(found, File)
        self.pages.used(found)
        return found.region

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, flags: int, umask: int,
        *, keep_setid: bool,
    ) -> tuple[int, bool, Attributes]:  # fmt: skip
        """Create and open a file; *keep_setid*, and what it returns, are as for :meth:`open`."""
        try:
            made = await self._target.call("mknod", parent, name, mode, uid, gid, 0, True, umask)
        except errors.PathError as error:
            if error.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            # Another client created the name after the kernel's lookup.
            found = await self._target.call("lookup", parent, name)
            opened = await self.open(found.ino, flags, keep_setid=keep_setid)
            self._count(opened[2], parent, name)
            return opened
        self._new(made, parent, name)
        return self._add_handle(File(made.ino, made.region)), True, made

    async def tmpfile(
        self, parent: int, mode: int, uid: int, gid: int, flags: int, umask: int
    ) -> tuple[int, Attributes]:
        """Create a file without a name; returns its handle, 0 if files are not opened, and its
        attributes.

        Like a removed file it is kept until the kernel forgets the inode: usually at the last
        close, later if an ``O_PATH`` descriptor of it is left.
        """
        exclusive = bool(flags & os.O_EXCL)
        made = await self._target.call("tmpfile", parent, exclusive, mode, uid, gid, umask)
        self._new(made)
        self._known[made.ino].held += 1
        if self.openless:
            return 0, made
        return self._add_handle(File(made.ino, made.region, pinned=False)), made

    def is_harmless(self, ino: int) -> bool:
        """Whether the file is known to have no set-ID bits."""
        known = self._known.get(ino)
        return known is not None and time.monotonic() < known.harmless

    async def _kill_setid(self, ino: int) -> None:
        """Clear the set-ID bits of a file on a write by a caller that may not keep them."""
        if self.is_harmless(ino):
            return
        now = time.monotonic()
        mode = (await self.getattr(ino)).mode
        if mode != without_setid(mode):
            await self.setattr(ino, None, without_setid(mode), None, None, None, None)
            self.drop_attributes(ino)  # the kernel may have the old mode cached
        known = self._known.get(ino)
        if known is not None:
            known.harmless = now + self._attr_timeout

    async def _emptied(self, attributes: Attributes, *, keep_setid: bool) -> Attributes:
        """Truncate a pinned file that is being opened with ``O_TRUNC``, and unpin it on failure.

        Unless *keep_setid*, as for root, this clears the set-ID bits like any other change.
        """
        try:
            await self._target.resize(attributes.region, 0)
            mode = without_setid(attributes.mode)
            if mode == attributes.mode or keep_setid:
                return await self.getattr(attributes.ino)
            return await self.setattr(attributes.ino, None, mode, None, None, None, None)
        except BaseException:
            await self._target.call("unpin", attributes.ino, 1)
            raise

    async def open(self, ino: int, flags: int, *, keep_setid: bool) -> tuple[int, bool, Attributes]:
        """Open a file.

        *keep_setid*: truncation (``O_TRUNC``) does not clear the set-ID bits.

        Returns:
            the handle, whether the kernel may keep its cached pages, and the file's attributes.
        """
        attributes, version = await self.pages.pin(ino)
        if attributes.flags and flags & os.O_ACCMODE != os.O_RDONLY:
            await self._check_flags(attributes, flags)
        if flags & os.O_TRUNC:
            attributes = await self._emptied(attributes, keep_setid=keep_setid)
        file = File(ino, attributes.region)
        return self._add_handle(file), self.pages.opened(file, version), attributes

    async def _check_flags(self, attributes: Attributes, flags: int) -> None:
        """Refuse what chattr(1) forbids when the file is opened, as other file systems do, and not
        only when it is written."""
        appends = flags & os.O_APPEND and not flags & os.O_TRUNC
        if attributes.flags & (IMMUTABLE if appends else IMMUTABLE | APPEND_ONLY):
            await self._target.call("unpin", attributes.ino, 1)
            raise path_error(errno.EPERM, f"inode {attributes.ino}: see chattr(1)")

    async def set_flags(self, ino: int, flags: int) -> None:
        """Set the flags of chattr(1)."""
        await self._target.call("set_flags", ino, flags)

    def fill_pages(self, ino: int, offset: int, size: int) -> None:
        """Record that the kernel reads or writes these bytes through its page cache."""
        known = self._known.get(ino)
        if known is not None:
            known.fill_pages(offset, size)

    def may_have_pages(self, ino: int, offset: int, size: int) -> bool:
        """Whether the kernel may have cached pages with some of these bytes."""
        known = self._known.get(ino)
        return known is not None and known.may_have_pages(offset, size)

    def note_attributes(self, attributes: Attributes) -> None:
        """Record that attributes of a known inode are sent to the kernel."""
        known = self._known.get(attributes.ino)
        if known is not None:
            known.note_attributes(attributes)

    def is_believed(self, ino: int, offset: int, size: int) -> bool:
        """Whether the kernel may have cached pages with some of these bytes, or times of the file
        from before they were written."""
        known = self._known.get(ino)
        return known is not None and (known.believed or known.may_have_pages(offset, size))

    def drop_believed(self, ino: int, offset: int, size: int) -> bool:
        """Make the kernel drop its pages with these bytes, and the file's times, asynchronously.

        Returns:
            whether it may have had any of these cached.
        """
        known = self._known.get(ino)
        believed = known is not None and known.believed
        if known is not None:
            known.believed = False
        if self.drop_pages(ino, offset, size):  # this drops the times, too
            return True
        if believed:
            self.drop_attributes(ino)
        return believed

    def drop_pages(self, ino: int, offset: int, size: int) -> bool:
        """Make the kernel drop its pages with these bytes, asynchronously; whether it may have
        any."""
        if not self.may_have_pages(ino, offset, size):
            return False
        self.writes.drop(ino, *self._known[ino].drop_pages(offset, size))
        return True

    def note_written(self, ino: int, end: int) -> None:
        """Record that the kernel gets the reply to a write of bytes up to *end*."""
        known = self._known.get(ino)
        if known is not None and known.size < end:
            known.size = end

    def is_within(self, ino: int, end: int) -> bool:
        """Whether *end* is not beyond the size that the kernel takes a file to have."""
        known = self._known.get(ino)
        return known is not None and end <= known.size

    def is_rollback(self, ino: int, handle: int, size: int) -> bool:
        """Whether the kernel truncates a file to *size* because a write that extends it failed with
        ``O_DIRECT``, and not because a program requested it.

        The kernel truncates to the size that it knows; bytes appended by other clients since then
        lie beyond it and must not be lost.
        """
        known, file = self._known.get(ino), self._handles.get(handle)
        if known is None or not isinstance(file, File):
            return False
        failed, file.failed_end = file.failed_end, 0
        return size == known.size and size < failed

    def failed_past_pages(self, handle: int, end: int) -> None:
        """Record that an ``O_DIRECT`` write of bytes before *end* has failed."""
        file = self._handles.get(handle)
        if isinstance(file, File):
            file.failed_end = max(file.failed_end, end)

    async def read(
        self, ino: int, handle: int, offset: int, size: int, thread: int = 0
    ) -> memoryview:
        """Read up to *size* bytes, fewer only at the end of the file.

        *thread* is the calling thread, see ``write_ordering.py``.  The result is valid until the
        caller's task next awaits.
        """
        region = self._region_of(ino, handle)
        if self._local is None or self.writes.under_way:
            await self.writes.read(region, thread, offset, size)
        if self._local is not None and not self._local.occupied:
            view = self._local.view(region, offset, size)
            if view is not None:
                return view
        with self._buffers.loan(size) as loan:
            count = await self._read_some(region, offset, size, loan.place)
            return loan.taken[:count]

    async def _read_some(
        self, region: RegionID, offset: int, size: int, place: Callable[[], memoryview]
    ) -> int:
        local = self._local
        if local is not None and not local.occupied:
            with suppress(errors.WouldBlock):
                wait = not local.blocking
                return local.read_into(region, offset, place(), short=True, wait=wait)
        return await self._target.read_later(region, offset, size, place)

    async def write(
        self, ino: int, handle: int, offset: int, data: Any,
        thread: int = 0, kill_setid: bool = False,
    ) -> int:  # fmt: skip
        """Write all of *data*; with *kill_setid* also clear the file's set-ID bits.

        Returns:
            the number of bytes.
        """
        region = self._region_of(ino, handle)
        if kill_setid or not self._wrote(region, offset, data):
            if self.writes.under_way:
                await self.writes.follow(region, offset, len(data))
            with self.writes.one(region, thread, offset, len(data)):
                if kill_setid:
                    await self._kill_setid(ino)
                await self._target.write(region, offset, data, extend=True)
        return len(data)

    async def append(
        self, ino: int, handle: int, offset: int, data: Any,
        thread: int = 0, kill_setid: bool = False,
    ) -> None:  # fmt: skip
        """Write *data* at the end of the file at the provider; otherwise as :meth:`write`.

        The kernel expects the data at *offset*, the end that it knows.  If the provider placed them
        elsewhere, the kernel is made to drop the file's size, and its pages at both offsets.
        """
        region, size = self._region_of(ino, handle), len(data)
        with self.writes.one(region, thread, offset, size) as write:
            await self.writes.after_appends(write)
            if kill_setid:
                await self._kill_setid(ino)
            found = await self._append(region, offset, data)
        if found != offset:
            self.writes.drop(ino, offset, size)
            self.writes.drop(ino, found, size)

    async def _append(self, region: RegionID, offset: int, data: Any) -> int:
        if self.appends:
            return await self._target.append(region, data)
        await self._target.write(region, offset, data, extend=True)
        return offset

    def _wrote(self, region: RegionID, offset: int, data: Any) -> bool:
        """Write *data* if that needs no waiting; whether it did."""
        local = self._local
        if local is not None and not local.occupied:
            with suppress(errors.WouldBlock):
                local.write(region, offset, data, extend=True, wait=not local.blocking)
                return True
        return False

    def begin_write(
        self, ino: int, handle: int, offset: int, data: memoryview
    ) -> Callable[[], None] | None:
        """Return a function that writes *data*, or None if that might wait or fail: use
        :meth:`write` then."""
        if self._local is None:
            return None
        return self._local.begin_write(self._region_of(ino, handle), offset, data)

    async def fallocate(
        self, ino: int, handle: int, mode: int, offset: int, size: int,
        thread: int = 0, kill_setid: bool = False,
    ) -> None:  # fmt: skip
        """fallocate(2), in a *mode* of ``FALLOCATE_MODES``; *thread* and *kill_setid* are as in
        :meth:`write`.

        Raises:
            PathError: EOPNOTSUPP, for any other mode.
        """
        try:
            call = FALLOCATE_MODES[mode]
        except KeyError:
            raise path_error(errno.EOPNOTSUPP, f"fallocate: unknown mode {mode:#x}") from None
        region = self._region_of(ino, handle)
        with self.writes.one(region, thread, offset, size):
            if kill_setid:
                await self._kill_setid(ino)
            await call(self._target, region, offset, size)
        if self.appends and not mode & KEEP_SIZE:
            self.note_written(ino, offset + size)

    async def copy_range(
        self, source: tuple[int, int, int], place: tuple[int, int, int], size: int,
        thread: int = 0, kill_setid: bool = False,
    ) -> int:  # fmt: skip
        """Copy up to *size* bytes between open files, each an inode, handle and offset; how many.

        *thread* and *kill_setid* are as in :meth:`write`.
        """
        (*source_file, start), (*file, offset) = source, place
        original, region = self._region_of(*source_file), self._region_of(*file)
        if self.writes.under_way:
            await self.writes.read(original, thread, start, size)
            await self.writes.follow(region, offset, size)
        with self.writes.one(region, thread, offset, size):
            if kill_setid:
                await self._kill_setid(place[0])
            count: int = await self._target.call(
                "copy_range", region, offset, original, start, size
            )
        if self.appends and count:  # else the kernel does not believe that the file has grown
            self.note_written(place[0], offset + count)
        return count

    async def seek(self, ino: int, handle: int, offset: int, hole: bool) -> int | None:
        """The first offset from *offset* on at which the file has data, or with *hole* a hole; the
        end of the file counts as one.  None if there is none."""
        region = self._region_of(ino, handle)
        if self.writes.under_way:
            await self.writes.read(region, 0, offset, MAX_SIZE)
        if hole:
            return await self._target.seek_hole(region, offset)
        found = await self._target.seek_data(region, offset)
        end = await self._target.size(region) if found is None else found
        known = self._known.get(ino)
        if known is not None and offset < end and known.may_have_pages(offset, end - offset):
            # A program may have written to a mapping, which the kernel writes back much later.
            pages = known.drop_pages(offset, end - offset)
            await trio.to_thread.run_sync(self._forget, ino, *pages, abandon_on_cancel=True)
            found = await self._target.seek_data(region, offset)
        return found

    def _forget(self, ino: int, offset: int, size: int) -> None:
        with suppress(OSError):  # not cached, or the mount has ended
            self.forget_bytes(ino, offset, size)

    async def fsync(self, ino: int, handle: int, datasync: bool) -> None:
        await self._target.fsync(self._region_of(ino, handle), times=not datasync)

    async def release(self, handle: int) -> None:
        file = self._handles.pop(handle)
        if isinstance(file, File):
            if file.ino in self._known:
                self.pages.used(file)
            if self._locks.of(handle):
                with suppress(errors.Exception):  # a lost connection, which has no locks
                    await self._locks.release(file.ino, file.region, handle)
        if not isinstance(file, File) or file.pinned:
            await self._target.call("unpin", file.ino, 1)

    # Locks

    def is_open(self, handle: int) -> bool:
        """Whether the kernel has not released an open file yet."""
        return handle in self._handles

    async def lock(
        self, ino: int, handle: int, flock: bool, owner: int, kind: int, start: int, end: int,
        pid: int, wait: int,
    ) -> None:  # fmt: skip
        """Lock or unlock bytes of an open file, see ``Locks.lock``."""
        file = self._handles[handle]
        assert isinstance(file, File)
        await self._locks.lock(ino, file.region, handle, flock, owner, kind, start, end, pid, wait)
        if handle not in self._handles:  # a program that was killed did not wait for the lock
            await self._locks.release(ino, file.region, handle)

    async def test_lock(
        self, ino: int, handle: int, flock: bool, owner: int, kind: int, start: int, end: int
    ) -> FileLock | None:
        """Return a lock that conflicts with one of these bytes of an open file."""
        region = self._region_of(ino, handle)
        return await self._locks.test(region, flock, owner, kind, start, end)

    async def flush(self, ino: int, handle: int, owner: int) -> None:
        """A process closes a descriptor of an open file, and so unlocks what *owner* has locked of
        the file's ranges."""
        if self._locks.has(ino, owner):
            await self._locks.flush(ino, self._region_of(ino, handle), owner)

    async def _refresh(self, ino: int) -> None:
        known = self._known.get(ino)
        if known is not None and (known.pages or known.believed):
            known.pages, known.believed = 0, False
            self.pages.forget(ino)
            await trio.to_thread.run_sync(self._forget, ino, 0, 0, abandon_on_cancel=True)

    # Directories

    def opendir(self, ino: int) -> tuple[int, bool]:
        """Open a directory; returns the handle, and whether the kernel may keep its listing."""
        listing = self._listings.open(ino)
        now = time.monotonic()
        keep = listing.read is not None and (not listing.complete or now < listing.kept_until)
        if not keep:
            listing.complete, listing.read = False, None
        if not listing.complete:
            listing.kept_until = now + self.keep_listings
        return self._add_handle(Directory(ino, listing)), keep

    def releasedir(self, handle: int) -> None:
        directory = self._handles.pop(handle)
        assert isinstance(directory, Directory)
        self._listings.close(directory.ino, directory.listing)

    def end_listing(self, handle: int) -> None:
        """The kernel gets to the end of a directory; if others changed it meanwhile, make it drop
        its listing, asynchronously."""
        directory = self._handles[handle]
        assert isinstance(directory, Directory)
        if self.keep_listings and not directory.listing.end():
            self.writes.drop(directory.ino, 0, 0)

    def doubt_listing(self, ino: int) -> None:
        """Make the kernel drop its listing of a directory, asynchronously: it may have changed."""
        if self._is_listing_outdated(ino):
            self.writes.drop(ino, 0, 0)

    def _is_listing_outdated(self, ino: int) -> bool:
        """Whether the kernel has to drop its listing of a directory that another client changed."""
        listing = self._listings.get(ino)
        return listing is not None and listing.change()

    async def fsyncdir(self) -> None:
        await self._target.call("commit")

    async def readdir(self, handle: int, cookie: int, most: int) -> list[ListedEntry]:
        """Return up to *most* entries after *cookie* (0: the start); empty at the end.  The entries
        "." and ".." are not counted in *most*.

        Entries are in the order of their names, so concurrent additions and removals do not move
        other entries.  Attributes are fetched on each call, since the kernel caches them.
        """
        directory = self._handles[handle]
        assert isinstance(directory, Directory)
        entries: list[ListedEntry] = []
        if cookie < 2:
            if cookie == 0:
                directory.listing = self._listings.begin(directory.ino, directory.listing)
                directory.met = 0
            for position, name in enumerate((b".", b"..")[cookie:], cookie):
                dot = await self._target.call("lookup", directory.ino, name)
                entries.append(ListedEntry(name, dot, position + 1))
            cookie = 2
        listing = directory.listing
        if listing.read is None:
            listing.read = listing.version
        start = cookie - 2 - (listing.base if cookie > 2 else 0)
        if start < 0:
            return []  # a cookie that was never returned
        while start > len(listing.names):
            if not (listing.in_order and await self._read_ahead(directory.ino, listing)):
                return []  # a cookie that was never returned
        after = listing.names[start - 1] if start else b""
        page = await self._target.call("readdir", directory.ino, after, min(most, _PAGE))
        directory.met += len(page)
        if not page:
            listing.length = max(listing.length, directory.met)
        positions = listing.place([name for name, _ in page], start)
        for position, (name, attributes) in zip(positions, page, strict=True):
            entries.append(ListedEntry(name, attributes, listing.base + position + 3))
        return entries

    async def _read_ahead(self, ino: int, listing: Listing) -> bool:
        """Find positions of further names in a directory, for a cookie of an earlier listing, which
        an NFS server may send.  They are the same as then if the directory has not changed.

        Returns:
            whether there were further names.
        """
        await trio.lowlevel.checkpoint()
        start = len(listing.names)
        after = listing.names[-1] if start else b""
        page = await self._target.call("readdir", ino, after, _PAGE)
        if start == len(listing.names):  # unless another task did so during the call
            listing.place([name for name, _ in page], start)
        return bool(page)

    # Extended attributes

    def is_incapable(self, ino: int) -> bool:
        """Whether an inode is known to have no attribute ``CAPABILITY``."""
        known = self._known.get(ino)
        return known is not None and time.monotonic() < known.incapable

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        if name == LOCATION_XATTR and self._location:
            return self._location
        known, changes = self._known.get(ino), self._xattr_changes
        try:
            value: bytes = await self._target.call("getxattr", ino, name)
        except errors.PathError as error:
            absent = name == CAPABILITY and error.errno == errno.ENODATA
            if absent and known is not None and changes == self._xattr_changes:
                known.incapable = time.monotonic() + self._attr_timeout
            raise
        return value

    async def setxattr(
        self, ino: int, name: bytes, value: bytes, keep_setgid: bool, flags: int = 0
    ) -> None:
        """Set an extended attribute; *flags* are those of setxattr(2).

        Without *keep_setgid* an access control list clears the set-group-ID bit.
        """
        if flags:
            await self._target.call("setxattr_if", ino, name, value, keep_setgid, flags)
        else:
            await self._target.call("setxattr", ino, name, value, keep_setgid)
        self._xattr_changes += 1  # invalidates lookups of CAPABILITY that are still running
        if ino in self._known:
            self._known[ino].incapable = 0.0

    async def loses_setgid(
        self, ino: int, name: bytes, groups: Callable[[], Container[int]] | None
    ) -> Attributes | None:
        """Return the attributes of a file if changing its attribute *name*, an access control list,
        clears its set-group-ID bit.

        *groups* returns the caller's groups.  It is None for root, for whom it never does.
        """
        if name != acl.ACCESS or groups is None:
            return None
        file = await self.getattr(ino)
        return file if file.mode & stat.S_ISGID and file.gid not in groups() else None

    async def removexattr(
        self, ino: int, name: bytes, groups: Callable[[], Container[int]] | None
    ) -> None:
        """Remove an extended attribute; *groups* as for :meth:`loses_setgid`."""
        lost = await self.loses_setgid(ino, name, groups)
        await self._target.call("removexattr", ino, name)
        if lost is not None:
            mode = lost.mode & ~stat.S_ISGID
            await self._target.call("setattr", ino, mode, None, None, None, None)

    async def listxattr(self, ino: int) -> list[bytes]:
        names: list[bytes] = await self._target.call("listxattr", ino)
        return names
