"""Adapts pyfuse3's operations to a :class:`FileSystem`.

What pyfuse3 does not tell of a request is known from when the file was opened, or assumed to be
the safe assumption: a read leaves pages in the kernel's cache, and any thread may have sent it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from warabi import errors
from warabi._core.attributes import FIRST_REPORT, ROOT, Attributes
from warabi._core.counters import Counters
from warabi._core.tuning import PURGE_PATIENCE
from warabi.metadata.domain import NAME_MAX, clamped
from warabifs.frontends.base import Settings
from warabifs.frontends.callers import groups_of
from warabifs.frontends.errnos import UNKNOWN_EFFECT, errno_of
from warabifs.fs.filesystem import BLOCK, CAPABILITY, FileSystem
from warabifs.fs.report_file import VALID

P = ParamSpec("P")
T = TypeVar("T")
Changed = tuple[list[tuple[int, bytes]], list[int]]
"""Names in directories, and inodes, for which the kernel may have outdated entries."""

_FEW = 32
"""Directory entries that are fetched first; pyfuse3 does not tell how many there is room for."""


def _handles(
    changed: Callable[..., Changed] = lambda *_: ([], []),
) -> Callable[
    [Callable[Concatenate[Adapter, P], Awaitable[T]]],
    Callable[Concatenate[Adapter, P], Coroutine[Any, Any, T]],
]:
    """A request's handler, which may raise anything: pyfuse3 takes :exc:`FUSEError` alone, and ends
    the mount at any other exception.

    Args:
        changed: what the request changes, given its arguments.
    """

    def decorate(
        handler: Callable[Concatenate[Adapter, P], Awaitable[T]],
    ) -> Callable[Concatenate[Adapter, P], Coroutine[Any, Any, T]]:
        @functools.wraps(handler)
        async def call(self: Adapter, /, *args: P.args, **kwargs: P.kwargs) -> T:
            name, began = handler.__name__, perf_counter_ns()
            try:
                ino, *rest = args
                if isinstance(ino, int) and ino >= FIRST_REPORT:
                    result: T = self._on_report(name, ino, *rest)
                    return result
                return await handler(self, *args, **kwargs)
            except FUSEError as error:
                self._counters.add_error(name, errno.errorcode.get(error.errno, str(error.errno)))
                raise
            except Exception as error:
                self._counters.fail(name, error)
                if isinstance(error, UNKNOWN_EFFECT):
                    self._doubt(*changed(*args))
                raise FUSEError(errno_of(error, name)) from None
            finally:
                self._counters.add(name, perf_counter_ns() - began)

        return call

    return decorate


def _in_directory(directory: int, name: bytes, *_: object) -> Changed:
    return [(directory, name)], [directory]


@dataclass(slots=True)
class _Opened:
    """An open file: what pyfuse3 does not pass with each read and write.

    Attributes:
        flags: as for open(2).
        past_cache: reads and writes bypass the kernel's page cache.
        kill_setid: writes clear the set-ID bits.  For writes that bypass its cache the kernel
            leaves that to us; it applies unless the opener is root.
    """

    ino: int
    flags: int
    past_cache: bool
    kill_setid: bool


class Adapter(pyfuse3.Operations):
    """Executes requests of the kernel on a :class:`FileSystem`.

    Args:
        files: the file system.
        settings: how it is to be served.
        began: called when libfuse is about to answer the kernel's first request.
        notified: waits until the kernel has got the notifications that are pending.
        counters: of the requests.
    """

    supports_dot_lookup = True  # by which file handles are resolved
    enable_acl = True

    def __init__(
        self,
        files: FileSystem,
        settings: Settings,
        began: Callable[[], None],
        notified: Callable[[], Awaitable[None]],
        counters: Counters,
    ) -> None:
        super().__init__()
        self.enable_writeback_cache = settings.writeback
        self._files = files
        self._settings = settings
        self._began = began
        self._notified = notified
        self._counters = counters
        self._open: dict[int, _Opened] = {}
        # Openings by which an inode's bytes may get into the page cache and be written back.
        self._mappable: Counter[int] = Counter()
        self._taken = _FEW  # directory entries for which there was room

    def init(self) -> None:
        self._began()

    def _doubt(self, names: list[tuple[int, bytes]], inodes: list[int]) -> None:
        """A request may or may not have changed something: have the kernel believe neither."""
        for directory, name in names:
            self._files.drop_name(directory, name)
        for ino in inodes:
            self._files.drop_attributes(ino)

    def _entry(self, found: Attributes) -> EntryAttributes:
        ino, _, mode, nlink, uid, gid, rdev, size, atime, mtime, ctime, _, _, _ = found
        directory = stat.S_ISDIR(mode)
        settings = self._settings
        entry = EntryAttributes()
        entry.st_ino = ino
        # The kernel knows the root without asking, with 0.
        entry.generation = 0 if ino == ROOT else found.generation
        entry.attr_timeout = settings.attr_timeout
        entry.entry_timeout = settings.directory_timeout if directory else settings.entry_timeout
        entry.st_mode = mode
        entry.st_nlink = nlink
        entry.st_uid = uid
        entry.st_gid = gid
        entry.st_rdev = rdev
        entry.st_size = size
        entry.st_blksize = BLOCK
        entry.st_blocks = found.blocks
        entry.st_atime_ns = atime
        entry.st_mtime_ns = mtime
        entry.st_ctime_ns = ctime
        return entry

    def _attributes(self, found: Attributes) -> EntryAttributes:
        self._files.note_attributes(found)
        return self._entry(found)

    def _opened(
        self, handle: int, ino: int, flags: int, keep_cache: bool, ctx: RequestContext
    ) -> FileInfo:
        # Otherwise changes by a mapping could not be distinguished from appends.
        appends = bool(flags & os.O_APPEND and self._files.appends)
        past_cache = self._settings.direct_io or appends
        if not past_cache:
            self._mappable[ino] += 1
        self._open[handle] = _Opened(ino, flags, past_cache, past_cache and ctx.uid != 0)
        return FileInfo(fh=handle, direct_io=past_cache, keep_cache=keep_cache)

    def _report_entry(self, found: Attributes) -> EntryAttributes:
        entry = self._entry(found)
        entry.attr_timeout = entry.entry_timeout = VALID
        return entry

    def _on_report(self, name: str, ino: int, *args: Any) -> Any:
        """Execute a request on a report, which can only be read; its handle is its inode number."""
        reports = self._files.reports
        if name == "getattr":
            return self._report_entry(reports.getattr(ino))
        if name == "open":
            reports.open(ino, args[0])
            return FileInfo(fh=ino, direct_io=self._settings.direct_io)
        if name == "read":
            return reports.read(ino, *args)
        if name == "listxattr":
            return []
        if name in ("release", "fsync"):
            return None
        raise FUSEError(errno.ENODATA if name == "getxattr" else errno.EPERM)

    # Inodes

    @_handles()
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._entry(await self._files.lookup(parent, name))
        except errors.PathError as error:
            if error.errno != errno.ENOENT:
                raise
            if self._files.reports.has(parent, name):
                return self._report_entry(await self._files.reports.lookup())
            if not self._settings.negative_timeout:
                raise
            if not self._files.note_absent(parent, name):
                raise
            absent = EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = self._settings.negative_timeout
            return absent

    @_handles()
    async def _forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        await self._files.forget(inodes)

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(FUSEError):  # it is logged, and nothing answers this request
            await self._forget(inodes)

    @_handles()
    async def getattr(self, ino: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(await self._files.getattr(ino))

    @_handles(lambda ino, *_: ([], [ino]))
    async def setattr(
        self, ino: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:  # fmt: skip
        size = attr.st_size if fields.update_size else None
        if (
            self._files.appends
            and not (size is None or fh is None)
            and self._files.is_rollback(ino, fh, size)
        ):
            return self._attributes(await self._files.getattr(ino))
        changed = await self._files.setattr(
            ino,
            size,
            attr.st_mode if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            clamped(attr.st_atime_ns) if fields.update_atime else None,
            clamped(attr.st_mtime_ns) if fields.update_mtime else None,
        )
        return self._attributes(changed)

    @_handles()
    async def readlink(self, ino: int, ctx: RequestContext) -> bytes:
        return await self._files.readlink(ino)

    @_handles()
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        total, available, count = await self._files.statfs()
        free = max(0, available // BLOCK)
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = BLOCK
        found.f_blocks = total // BLOCK
        found.f_bfree = found.f_bavail = free
        found.f_files = count + free
        found.f_ffree = found.f_favail = free
        found.f_namemax = NAME_MAX
        return found

    # Names

    @_handles(_in_directory)
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._files.mknod(parent, name, mode, ctx.uid, ctx.gid, rdev, ctx.umask)
        return self._entry(made)

    @_handles(_in_directory)
    async def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._files.mkdir(parent, name, mode, ctx.uid, ctx.gid, ctx.umask)
        return self._entry(made)

    @_handles(_in_directory)
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._files.symlink(parent, name, target, ctx.uid, ctx.gid))

    @_handles(lambda ino, parent, name, *_: ([(parent, name)], [parent, ino]))
    async def link(
        self, ino: int, parent: int, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._files.link(ino, parent, name))

    @_handles(_in_directory)
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self._files.unlink(parent, name)

    @_handles(_in_directory)
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self._files.rmdir(parent, name)

    @_handles(lambda old, name, new, new_name, *_: ([(old, name), (new, new_name)], [old, new]))
    async def rename(
        self, old: int, name: bytes, new: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        await self._files.rename(old, name, new, new_name, flags)

    # Files

    @_handles(_in_directory)
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, fresh, made = await self._files.create(
            parent, name, mode, ctx.uid, ctx.gid, flags, ctx.umask, keep_setid=ctx.uid == 0
        )
        return self._opened(handle, made.ino, flags, fresh, ctx), self._entry(made)

    @_handles()
    async def open(self, ino: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle, fresh, _ = await self._files.open(ino, flags, keep_setid=ctx.uid == 0)
        return self._opened(handle, ino, flags, fresh, ctx)

    @_handles()
    async def read(self, fh: int, off: int, size: int) -> Any:
        """The bytes; valid until pyfuse3 has sent them, before which no other task runs."""
        ino = self._open[fh].ino
        self._files.fill_pages(ino, off, size)
        data = await self._files.read(ino, fh, off, size)
        self._counters.add_bytes("read", len(data))
        return data

    @_handles()
    async def write(self, fh: int, off: int, data: bytes) -> int:
        files, opened, size = self._files, self._open[fh], len(data)
        past_cache = opened.past_cache and not self._is_page(opened.ino, off, size)
        direct = opened.flags & os.O_DIRECT
        if not (direct or past_cache):
            files.fill_pages(opened.ino, off, size)
        try:
            if past_cache and opened.flags & os.O_APPEND and files.appends:
                await files.append(opened.ino, fh, off, data, 0, opened.kill_setid)
            else:
                await files.write(opened.ino, fh, off, data, 0, opened.kill_setid)
        except BaseException:
            if direct:
                files.failed_past_pages(fh, off + size)
            raise
        self._counters.add_bytes("write", size)
        if files.appends:
            files.note_written(opened.ino, off + size)
        if direct or past_cache:
            await self._written(opened, fh, off, size)
        return size

    def _is_page(self, ino: int, off: int, size: int) -> bool:
        """Whether the kernel may be writing a page back, by an opening that goes past its cache: it
        takes whichever opening of the inode it finds first.

        What is appended, on the other hand, is never within the size that the kernel knows.
        """
        return (
            self._mappable[ino] > 0
            and off % mmap.PAGESIZE == 0
            and self._files.is_within(ino, off + size)
        )

    async def _written(self, opened: _Opened, fh: int, off: int, size: int) -> None:
        """Sync and invalidate after a write that bypassed the page cache.

        The kernel syncs only writes through its cache, and drops cached pages only before a write
        that bypasses it: pages that were read meanwhile would stay, older than the file.
        It may also be a page that is written back by a file that is open with ``O_DIRECT``.  Then
        the kernel drops nothing until that has ended, so waiting for it has a limit.
        """
        direct = opened.flags & os.O_DIRECT
        if opened.flags & os.O_DSYNC:
            await self._files.fsync(opened.ino, fh, opened.flags & os.O_SYNC != os.O_SYNC)
        drop = self._files.drop_believed if direct else self._files.drop_pages
        if drop(opened.ino, off, size):
            with trio.move_on_after(PURGE_PATIENCE):
                await self._notified()

    async def flush(self, fh: int) -> None:
        """Nothing is buffered; after ENOSYS the kernel sends no more flush requests."""
        raise FUSEError(errno.ENOSYS)

    @_handles()
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.fsync(self._open[fh].ino, fh, datasync)

    @_handles()
    async def release(self, fh: int) -> None:
        opened = self._open.pop(fh)
        if not opened.past_cache:
            self._mappable[opened.ino] -= 1
            if not self._mappable[opened.ino]:
                del self._mappable[opened.ino]
        await self._files.release(fh)

    # Directories

    @_handles()
    async def opendir(self, ino: int, ctx: RequestContext) -> int:
        return self._files.opendir(ino)[0]

    @_handles()
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Return as many entries with attributes as fit."""
        files, cookie, taken, most = self._files, start_id, 0, self._taken + 1
        while True:
            try:
                entries = await files.readdir(fh, cookie, most)
            except Exception:
                if taken:  # whose lookups are counted: the kernel gets them, and then the error
                    return
                raise
            if not entries:
                return
            for entry in entries:
                name, attributes, cookie = entry
                if not pyfuse3.readdir_reply(token, name, self._entry(attributes), cookie):
                    self._taken = max(taken, 1)
                    return
                taken += 1
                if not entry.dot:  # of which the kernel keeps no count
                    files.count_entry(fh, entry)
            most = _FEW

    @_handles()
    async def releasedir(self, fh: int) -> None:
        self._files.releasedir(fh)

    @_handles()
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._files.fsyncdir()

    # Extended attributes

    @_handles()
    async def getxattr(self, ino: int, name: bytes, ctx: RequestContext) -> bytes:
        if name == CAPABILITY and self._files.is_incapable(ino):
            raise FUSEError(errno.ENODATA)
        return await self._files.getxattr(ino, name)

    @_handles()
    async def setxattr(self, ino: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """pyfuse3 implements XATTR_CREATE and XATTR_REPLACE by a query before this call."""
        groups = groups_of(ctx.uid, ctx.gid, ctx.pid)
        keep_setgid = await self._files.loses_setgid(ino, name, groups) is None
        await self._files.setxattr(ino, name, value, keep_setgid)

    @_handles()
    async def removexattr(self, ino: int, name: bytes, ctx: RequestContext) -> None:
        await self._files.removexattr(ino, name, groups_of(ctx.uid, ctx.gid, ctx.pid))

    @_handles()
    async def listxattr(self, ino: int, ctx: RequestContext) -> Sequence[bytes]:
        names = await self._files.listxattr(ino)
        if ctx.uid != 0:  # the kernel lets only root read these, and hides them nowhere but here
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names
