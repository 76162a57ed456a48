"""The pyfuse3 adapter, and the only place where an exception becomes an errno.

An exception that leaves a handler ends the whole mount.  So every handler here is wrapped:
what the library raises becomes its errno, what nobody expected becomes ``EIO`` with a
traceback in the log, and ``trio.Cancelled``, which is no ``Exception``, passes.
"""

from __future__ import annotations

import errno
import functools
import logging
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from warabi import errors
from warabi.inode import Attributes
from warabi.tree import NAME_MAX
from warabifs.filesystem import BLOCK, CAPABILITY, FileSystem
from warabifs.pace import Pace

log = logging.getLogger(__name__)

_ERRNO: dict[type[errors.Exception], int] = {
    errors.InvalidRegion: errno.ESTALE,
    errors.OutOfBounds: errno.EFBIG,  # offsets come from the kernel, never negative
    errors.InvalidBuffer: errno.EINVAL,
    errors.ConfigError: errno.EINVAL,
    errors.ProviderNotFound: errno.ENXIO,
    errors.TargetNotFound: errno.ENXIO,
    errors.ConnectionFailed: errno.ENOTCONN,
    errors.ConnectionLost: errno.ENOTCONN,
    errors.ProtocolError: errno.EPROTO,
    errors.TimedOut: errno.ETIMEDOUT,
    errors.StorageFull: errno.ENOSPC,
    errors.StorageError: errno.EIO,
    errors.CorruptTarget: errno.EIO,
    errors.PermissionDenied: errno.EACCES,
    errors.TargetBusy: errno.EBUSY,
    errors.ProviderFailed: errno.EIO,
}
_QUIET = (errors.InvalidRegion, errors.OutOfBounds, errors.StorageFull)

_NOTHING_TO_FLUSH = FUSEError(errno.ENOSYS)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def errno_of(error: Exception, what: str) -> int:
    """The errno that a program gets for *error*; what the program cannot know is logged."""
    if isinstance(error, OSError) and error.errno:  # PathError too
        return error.errno
    number = _ERRNO.get(type(error))  # type: ignore[arg-type]  # a miss for classes of others
    if number is None:
        log.error("a defect in %s", what, exc_info=error)
        return errno.EIO
    if not isinstance(error, _QUIET):
        log.error("%s: %s", what, error)
    return number


def _handler(function: Handler) -> Handler:
    name = function.__name__

    @functools.wraps(function)
    async def wrapped(self: Operations, *args: Any) -> Any:
        pace = self._pace
        pace.serving += 1
        try:
            return await function(self, *args)
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(errno_of(error, name)) from None
        finally:
            pace.serving -= 1

    return cast(Handler, wrapped)


def drop_name(directory: int, name: bytes) -> None:
    """Make the kernel let go of a name; it does so after the request that is being served."""
    pyfuse3.invalidate_entry_async(InodeT(directory), FileNameT(name), ignore_enoent=True)


def forget_inode(ino: int, attributes_only: bool) -> None:
    """Make the kernel forget an inode's attributes and bytes; waits for requests that concern it.

    Raises:
        FileNotFoundError: it does not know it.
    """
    pyfuse3.invalidate_inode(InodeT(ino), attr_only=attributes_only)


def forget_name(directory: int, name: bytes) -> None:
    """As :func:`forget_inode`, for what a name means."""
    pyfuse3.invalidate_entry(InodeT(directory), FileNameT(name))


def _groups(ctx: RequestContext) -> Callable[[], set[int]] | None:
    """What tells the groups of who makes a request; None for root."""
    return None if ctx.uid == 0 else lambda: {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}


class Operations(pyfuse3.Operations):
    """Requests of the kernel, handed to a :class:`FileSystem`.

    Args:
        files: the file system.
        entry_timeout: seconds for which the kernel may believe a name.
        directory_timeout: likewise, if it is a directory's.
        attr_timeout: seconds for which it may believe attributes.
        negative_timeout: seconds for which it may believe that a name does not exist.
        direct_io: whether reads and writes bypass the page cache.
        writeback: whether the kernel may hold back writes, until a file is closed or synced.
        pace: is told of requests that are being served.
    """

    supports_dot_lookup = True
    enable_acl = True  # the kernel obeys the lists, the target keeps them true to the modes

    def __init__(
        self, files: FileSystem, *, entry_timeout: float, directory_timeout: float,
        attr_timeout: float, negative_timeout: float, direct_io: bool, writeback: bool, pace: Pace,
    ) -> None:  # fmt: skip
        super().__init__()
        self.answered = trio.Event()
        """Set when the kernel has been told what this file system can."""
        self._files = files
        self._pace = pace
        self._entry_timeout = entry_timeout
        self._directory_timeout = directory_timeout
        self._attr_timeout = attr_timeout
        self._negative_timeout = negative_timeout
        self._direct_io = direct_io
        self.enable_writeback_cache = writeback

    def init(self) -> None:
        self.answered.set()

    def _entry(self, attributes: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(attributes.ino)
        entry.generation = 0  # slots are not used twice within a mount
        directory = stat.S_ISDIR(attributes.mode)
        entry.entry_timeout = self._directory_timeout if directory else self._entry_timeout
        entry.attr_timeout = self._attr_timeout
        entry.st_mode = ModeT(attributes.mode)
        entry.st_nlink = attributes.nlink
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_rdev = attributes.rdev
        entry.st_size = attributes.size
        entry.st_blksize = BLOCK
        entry.st_blocks = -(-attributes.size // 512) if stat.S_ISREG(attributes.mode) else 0
        entry.st_atime_ns = attributes.atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        return entry

    def _info(self, handle: int, keep_cache: bool) -> FileInfo:
        return FileInfo(fh=FileHandleT(handle), direct_io=self._direct_io, keep_cache=keep_cache)

    # Inodes

    @_handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        try:
            return self._entry(await self._files.lookup(parent_inode, name))
        except errors.PathError as error:
            if error.errno != errno.ENOENT or not self._negative_timeout:
                raise
            if not self._files.note_absent(parent_inode, name):
                raise
            absent = EntryAttributes()
            absent.st_ino = InodeT(0)
            absent.entry_timeout = self._negative_timeout
            return absent

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        try:
            await self._files.forget(inode_list)
        except Exception as error:  # nobody waits for an answer
            errno_of(error, "forget")

    @_handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self._files.getattr(inode))

    @_handler
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields,
        fh: FileHandleT | None, ctx: RequestContext,
    ) -> EntryAttributes:  # fmt: skip
        changed = await self._files.setattr(
            inode,
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(changed)

    @_handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self._files.readlink(inode))

    @_handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        total, available, count = await self._files.statfs()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks = total // BLOCK
        data.f_bfree = data.f_bavail = available // BLOCK
        data.f_ffree = data.f_favail = max(0, available // BLOCK)
        data.f_files = count + data.f_ffree
        data.f_namemax = NAME_MAX
        return data

    # Names

    @_handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._files.mknod(parent_inode, name, mode, ctx.uid, ctx.gid, rdev, ctx.umask)
        return self._entry(made)

    @_handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._files.mkdir(parent_inode, name, mode, ctx.uid, ctx.gid, ctx.umask)
        return self._entry(made)

    @_handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._files.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    @_handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._files.link(inode, new_parent_inode, new_name))

    @_handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._files.unlink(parent_inode, name)

    @_handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._files.rmdir(parent_inode, name)

    @_handler
    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT,
        name_new: FileNameT, flags: FlagT, ctx: RequestContext,
    ) -> None:  # fmt: skip
        await self._files.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # Files

    @_handler
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, made = await self._files.create(
            parent_inode, name, mode, ctx.uid, ctx.gid, flags, ctx.umask
        )
        return self._info(handle, True), self._entry(made)

    @_handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return self._info(*await self._files.open(inode, flags, keep_setid=ctx.uid == 0))

    @_handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        # pyfuse3 takes any buffer, and hands it to the kernel before this task waits again.
        return cast(bytes, await self._files.read(fh, off, size))

    @_handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    async def flush(self, fh: FileHandleT) -> None:
        """Nothing is held back: every write has reached the target when it returned.

        Told so in this way, the kernel asks only once, and not at each close.
        """
        raise _NOTHING_TO_FLUSH

    @_handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.fsync(fh, datasync)

    @_handler
    async def release(self, fh: FileHandleT) -> None:
        await self._files.release(fh)

    # Directories

    @_handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(self._files.opendir(inode))

    @_handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        cookie = start_id
        while entries := await self._files.readdir(fh, cookie):
            for entry in entries:
                attributes = self._entry(entry.attributes)
                taken = pyfuse3.readdir_reply(
                    token, FileNameT(entry.name), attributes, entry.next_cookie
                )
                if not taken:
                    return
                if not entry.dot:
                    self._files.count_entry(fh, entry)
                cookie = entry.next_cookie

    @_handler
    async def releasedir(self, fh: FileHandleT) -> None:
        self._files.releasedir(fh)

    @_handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.fsyncdir()

    # Extended attributes

    @_handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if name == CAPABILITY and self._files.is_incapable(inode):
            raise FUSEError(errno.ENODATA)
        return await self._files.getxattr(inode, name)

    @_handler
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        await self._files.setxattr(inode, name, value, _groups(ctx))

    @_handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self._files.removexattr(inode, name, _groups(ctx))

    @_handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        names = await self._files.listxattr(inode)
        if ctx.uid != 0:  # the kernel lets nobody else read these, and hides them nowhere but here
            names = [name for name in names if not name.startswith(b"trusted.")]
        return [XAttrNameT(name) for name in names]
