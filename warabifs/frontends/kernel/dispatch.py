"""Dispatches FUSE requests by opcode: decodes arguments, calls the file system, encodes replies.

An exception becomes an errno here, as ``warabifs/frontends/errnos.py`` says; ``trio.Cancelled``,
which is no ``Exception``, passes.

What follows a request's header lies in a buffer that is used again after the answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import trio

from warabi import errors
from warabi._core.attributes import (
    APPEND_ONLY,
    FIRST_REPORT,
    IMMUTABLE,
    NO_DUMP,
    ROOT,
    Attributes,
)
from warabi._core.counters import Counters
from warabi._core.lock_ranges import EXCLUSIVE, SHARED, UNLOCK
from warabi._core.tuning import LOCK_CANCEL_PAUSE
from warabi.errors import path_error
from warabi.metadata.domain import NAME_MAX, clamped
from warabi.region import RegionID
from warabifs.frontends.callers import UNKNOWN, groups_of, is_root
from warabifs.frontends.errnos import UNKNOWN_EFFECT, errno_of
from warabifs.frontends.kernel import protocol
from warabifs.frontends.kernel.passthrough import Passing
from warabifs.frontends.kernel.protocol import Feature, Header, Opcode, Open, Valid
from warabifs.frontends.kernel.session import Answer, Early, Told
from warabifs.fs.filesystem import BLOCK, CAPABILITY, FileSystem
from warabifs.fs.report_file import VALID
from warabifs.fs.write_ordering import KERNEL

_ENTRIES = (
    Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.CREATE,
    Opcode.TMPFILE, Opcode.READDIRPLUS,
)  # fmt: skip
"""Requests whose replies make inodes known to the kernel."""
_SILENT = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.NOTIFY_REPLY)
"""Requests without a reply."""
_SAME_FOR_REPORTS = (
    Opcode.STATFS, Opcode.INTERRUPT, Opcode.OPEN, Opcode.FLUSH, Opcode.LSEEK,
)  # fmt: skip
"""Requests on a report for which the usual reply holds: it concerns the mount, or is ENOSYS, which
the kernel applies to all files."""
_GETFLAGS, _SETFLAGS, _FSGETXATTR, _FSSETXATTR = (
    0x80086601, 0x40086602, 0x801C581F, 0x401C5820,
)  # fmt: skip
_EXTENDED = {IMMUTABLE: 0x8, APPEND_ONLY: 0x10, NO_DUMP: 0x80}
"""The flags that ``FS_IOC_FSGETXATTR`` has in place of those of ``FS_IOC_GETFLAGS``."""
_STATX_BASIC_STATS, _STATX_BTIME = 0x7FF, 0x800
_SECOND = 1_000_000_000
_NAME = b"\0"  # ends a name
_LARGE = 64 * 1024
"""From this size in bytes on, storing the data takes longer than replying first."""
_APPEND, _ACCESS, _WRITE_ONLY = os.O_APPEND, os.O_ACCMODE, os.O_WRONLY
_DIRECT = os.O_DIRECT
_SYNC = os.O_SYNC  # of which O_DSYNC is a part
_READ_DIRECT, _WRITE_DIRECT = protocol.READ_LOCKOWNER, protocol.WRITE_LOCKOWNER

Handler = Callable[["Operations", Header, memoryview], Coroutine[Any, Any, Answer]]
_HANDLERS: dict[int, Handler] = {}


def _handles(*opcodes: Opcode) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for opcode in opcodes:
            _HANDLERS[opcode] = handler
        return handler

    return register


def name_of(opcode: int) -> str:
    """Return the name of a request for the log; its number if the opcode is unknown."""
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"opcode {opcode}"


def _seconds(timeout: float) -> tuple[int, int]:
    """Return whole seconds, and the rest in ns."""
    return divmod(int(timeout * _SECOND), _SECOND)


def _last(body: memoryview, start: int = 0) -> bytes:
    """Return the name at the end of a request, after its first *start* bytes."""
    return bytes(body[start:-1])


def _owner(header: Header) -> tuple[int, int]:
    """Return the user and group who will own what a request makes."""
    if UNKNOWN in (header.uid, header.gid):
        raise path_error(errno.EOVERFLOW, "the user or group has no ID on this idmapped mount")
    return header.uid, header.gid


def _packed(attributes: Attributes) -> bytes:
    ino, _, mode, nlink, uid, gid, rdev, size, atime, mtime, ctime, space, _, _ = attributes
    return protocol.pack_attributes(
        ino, size, -(-(size if space < 0 else space) // 512) if stat.S_ISREG(mode) else 0,
        atime // _SECOND, mtime // _SECOND, ctime // _SECOND,
        atime % _SECOND, mtime % _SECOND, ctime % _SECOND,
        mode, nlink, uid, gid, rdev & 0xFFFFFFFF, BLOCK, 0,
    )  # fmt: skip


def _packed_statx(attributes: Attributes) -> bytes:
    times = (
        attributes.atime_ns, attributes.btime_ns, attributes.ctime_ns, attributes.mtime_ns,
    )  # fmt: skip
    return protocol.pack_statx(
        _STATX_BASIC_STATS | (_STATX_BTIME if attributes.btime_ns else 0), BLOCK, 0,
        attributes.nlink, attributes.uid, attributes.gid, attributes.mode,
        attributes.ino, attributes.size, attributes.blocks, 0,
        *(part for time in times for part in divmod(time, _SECOND)),
        os.major(attributes.rdev), os.minor(attributes.rdev),
    )  # fmt: skip


# Looked up once, not in their class for each request.
_SIZE, _MODE, _UID, _GID, _ATIME, _MTIME = (
    Valid.SIZE, Valid.MODE, Valid.UID, Valid.GID, Valid.ATIME, Valid.MTIME
)  # fmt: skip
_SIZE_OF_OPEN = Valid.SIZE | Valid.HANDLE
_ATIME_NOW, _MTIME_NOW, _KILL_SUIDGID = Valid.ATIME_NOW, Valid.MTIME_NOW, Valid.KILL_SUIDGID
_NOW = _ATIME_NOW | _MTIME_NOW

_ENTRY = protocol.ENTRY_SIZE + protocol.direntry_size(b"name")
"""Bytes of a directory entry with a short name: entries that are fetched and do not fit are fetched
again."""
_NO_ATTRIBUTES = bytes(protocol.ATTRIBUTES_SIZE)
_NO_ENTRY = bytes(protocol.ENTRY_SIZE)


class Operations:
    """Executes requests of the kernel on a :class:`FileSystem`.

    Args:
        files: the file system.
        entry_timeout: seconds for which the kernel may cache a name.
        directory_timeout: the same for names of directories.
        attr_timeout: seconds for which it may cache attributes.
        negative_timeout: seconds for which it may cache that a name does not exist.
        direct_io: whether reads and writes bypass the page cache.
        writeback: whether the kernel may defer writes until a file is closed or synced.
        passing: the files that the kernel accesses directly; None for none.
        interrupt: called with interrupted requests; None if waiting cannot be interrupted.
        locks: which are for the target to keep, and not for the kernel: ``flock``, ``posix``.
        counters: of the bytes that are read and written.
    """

    def __init__(
        self, files: FileSystem, *, entry_timeout: float, directory_timeout: float,
        attr_timeout: float, negative_timeout: float, direct_io: bool, writeback: bool,
        passing: Passing | None = None, interrupt: Callable[[int], None] | None = None,
        locks: frozenset[str] = frozenset(), counters: Counters | None = None,
    ) -> None:  # fmt: skip
        self._files = files
        self._counters = counters or Counters()
        self._interrupt = interrupt
        self._passing = passing
        self._entry_valid = _seconds(entry_timeout)
        self._directory_valid = _seconds(directory_timeout)
        self._attr_valid = _seconds(attr_timeout)
        self._negative_valid = _seconds(negative_timeout)
        self._open_flags = Open.PARALLEL_DIRECT_WRITES | direct_io * Open.DIRECT_IO
        self._writeback = writeback
        self._uninterruptible: set[int] = set()  # requests under way
        self._waiting_locks: set[int] = set()  # likewise
        self._openless = files.openless and not direct_io  # sent with each open reply
        self.features = (
            Feature.ASYNC_READ | Feature.EXPORT_SUPPORT | Feature.BIG_WRITES | Feature.DONT_MASK
            | Feature.DO_READDIRPLUS | Feature.ASYNC_DIO | Feature.PARALLEL_DIROPS
            | Feature.MAX_PAGES | Feature.INIT_EXT
            | Feature.CACHE_SYMLINKS  # an inode's target never changes
            # The kernel checks access control lists, the target keeps them consistent with modes.
            | Feature.POSIX_ACL
            # Write requests say whether set-ID bits are to be cleared, so that the kernel does not
            # ask before each write whether there is a capability to clear.
            | Feature.HANDLE_KILLPRIV_V2
            # It also says whether an access control list clears the set-group-ID bit.
            | Feature.SETXATTR_EXT
            # Here no permission depends on the user of a request: the kernel checks them.
            | Feature.ALLOW_IDMAP
        )  # fmt: skip
        """The requested features; after the negotiation, the features agreed on."""
        if not self._openless:
            self.features |= Feature.ATOMIC_O_TRUNC
        if not files.openless and not (files.pages.notified and attr_timeout):
            # With it, each read after a write requests the attributes, finds that the file changed,
            # and drops all its pages.  That is useless if only this kernel can have changed the
            # file, or if it is notified of changes by others, unless attr_timeout is 0.
            self.features |= Feature.AUTO_INVAL_DATA
        if writeback:
            self.features |= Feature.WRITEBACK_CACHE
        if files.appends or direct_io:
            self.features |= Feature.DIRECT_IO_ALLOW_MMAP
        if passing is not None:
            self.features |= Feature.PASSTHROUGH
        if "flock" in locks:
            self.features |= Feature.FLOCK_LOCKS
        if "posix" in locks:
            self.features |= Feature.POSIX_LOCKS

    def handle(self, header: Header, body: memoryview) -> Coroutine[Any, Any, Answer]:
        """Handle a request.

        A view that is returned is valid until the caller's task next awaits.
        """
        if header.node >= FIRST_REPORT:
            return self._on_report(header, body)
        return _HANDLERS.get(header.opcode, _unknown)(self, header, body)

    def refusal(self, header: Header, body: memoryview, error: Exception) -> Answer:
        """Return the reply to a request whose handler raised *error*."""
        if isinstance(error, UNKNOWN_EFFECT):
            self._doubt(header, body)
        number = errno_of(error, name_of(header.opcode))
        return None if header.opcode in _SILENT else number

    async def undo(self, header: Header, body: memoryview, answer: Answer) -> None:
        """Release what the reply *answer*, which the kernel will not get, refers to, and make the
        kernel look up again what the request may have changed.

        Never for a target in this process, for which requests are not interrupted.
        """
        if header.node >= FIRST_REPORT:
            return
        self._doubt(header, body)
        opcode = header.opcode
        if not isinstance(answer, (bytes, memoryview)):
            return
        if opcode in _ENTRIES:
            await self._files.forget([(ino, 1) for ino in protocol.inodes_of(opcode, answer)])
        if opcode in (Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE):
            start = 0 if opcode == Opcode.OPEN else protocol.ENTRY_SIZE
            await self._files.release(protocol.HANDLE.unpack_from(answer, start)[0])
        elif opcode in (Opcode.SETLK, Opcode.SETLKW):
            handle, owner, start, end, kind, _, flags = protocol.LOCK.unpack_from(body)
            if kind != UNLOCK and self._files.is_open(handle):
                flock = bool(flags & protocol.LOCK_FLOCK)
                lock = (flock, owner, UNLOCK, start, end, 0, 0)
                await self._files.lock(header.node, handle, *lock)
        elif opcode == Opcode.OPENDIR:
            self._files.releasedir(protocol.HANDLE.unpack_from(answer)[0])

    def _doubt(self, header: Header, body: memoryview) -> None:
        """A request may or may not have changed something: have the kernel believe neither.

        By itself the kernel does so for some requests that are interrupted, and not for what it
        believes to be absent.
        """
        changed = protocol.changed_by(header, body)
        for directory, name in changed.names:
            self._files.drop_name(directory, name)
            self._files.doubt_listing(directory)
        for ino in changed.inodes:
            self._files.drop_attributes(ino)

    @contextlib.contextmanager
    def _uncut(self, header: Header, truncates: int) -> Iterator[None]:
        """Do not interrupt a request that *truncates* a file whose size the kernel caches.

        With writeback the kernel relies on its own size, and would never query the new one.
        """
        if not (truncates and self._writeback):
            yield
            return
        self._uninterruptible.add(header.unique)
        try:
            yield
        finally:
            self._uninterruptible.remove(header.unique)

    def _entry(self, attributes: Attributes) -> bytes:
        directory = stat.S_ISDIR(attributes.mode)
        valid, rest = self._directory_valid if directory else self._entry_valid
        attr_valid, attr_rest = self._attr_valid
        # The kernel keeps 32 bits of the generation, and knows the root, with 0, without a lookup.
        generation = 0 if attributes.ino == ROOT else attributes.generation
        start = protocol.pack_entry(attributes.ino, generation, valid, attr_valid, rest, attr_rest)
        return start + _packed(attributes)

    def _attributes(self, attributes: Attributes) -> bytes:
        self._files.note_attributes(attributes)
        return protocol.pack_validity(*self._attr_valid) + _packed(attributes)

    def _opened(self, handle: int, region: RegionID, flags: int, keep_cache: bool) -> bytes:
        if self._passing is not None:
            backing = self._passing.open(region, flags)
            if backing:
                return protocol.opened(handle, Open.PASSTHROUGH | Open.NOFLUSH, backing)
            keep_cache = keep_cache and self._passing.is_cache_true(region.slot)
        open_flags = self._open_flags | keep_cache * Open.KEEP_CACHE
        if flags & _APPEND and self._appends_past_cache(flags):
            open_flags |= Open.DIRECT_IO
        return protocol.opened(handle, open_flags)

    def _appends_past_cache(self, flags: int) -> bool:
        """Whether a file opened with ``O_APPEND`` bypasses the page cache for writes.

        Otherwise the cache would have the data where the kernel assumes the end to be, until it
        gets the actual offset.  Files open for reading, too, could not be mapped without the
        feature.
        """
        if not self._files.appends:
            return False
        writes_only = flags & _ACCESS == _WRITE_ONLY
        return writes_only or bool(self.features & Feature.DIRECT_IO_ALLOW_MMAP)

    async def _on_report(self, header: Header, body: memoryview) -> Answer:
        """Execute a request on a report, which can only be read."""
        reports, node, opcode = self._files.reports, header.node, header.opcode
        if opcode == Opcode.FORGET:
            reports.forget(node)
            return None
        if opcode == Opcode.GETATTR:
            return protocol.pack_validity(VALID, 0) + _packed(reports.getattr(node))
        if opcode == Opcode.IOCTL:
            return errno.ENOTTY
        if opcode == Opcode.STATX:
            return protocol.pack_statx_validity(VALID, 0) + _packed_statx(reports.getattr(node))
        if opcode == Opcode.OPEN and not self._openless:
            reports.open(node, protocol.OPEN.unpack_from(body)[0])
            return protocol.opened(0, self._open_flags)
        if opcode == Opcode.READ:
            _, offset, size, _ = protocol.READ.unpack_from(body)
            return reports.read(node, offset, size)
        if opcode == Opcode.LSEEK and not self._writeback:
            _, offset, whence = protocol.LSEEK.unpack_from(body)
            end = reports.getattr(node).size
            if offset >= end:
                return errno.ENXIO
            return protocol.NUMBER.pack(offset if whence == os.SEEK_DATA else end)
        if opcode == Opcode.FLUSH and self.features & Feature.POSIX_LOCKS:
            return b""
        if opcode in (Opcode.RELEASE, Opcode.FSYNC):
            return b""
        if opcode == Opcode.GETXATTR:
            return errno.ENODATA
        if opcode == Opcode.LISTXATTR:
            return _fitting(b"", protocol.SIZE.unpack_from(body)[0])
        if opcode in _SAME_FOR_REPORTS or opcode not in _HANDLERS:
            return await _HANDLERS.get(opcode, _unknown)(self, header, body)
        return errno.EPERM

    # Inodes

    @_handles(Opcode.LOOKUP)
    async def lookup(self, header: Header, body: memoryview) -> Answer:
        name = _last(body)
        try:
            return self._entry(await self._files.lookup(header.node, name))
        except errors.PathError as error:
            if error.errno != errno.ENOENT:
                raise
            if self._files.reports.has(header.node, name):
                made = await self._files.reports.lookup()
                found = protocol.pack_entry(made.ino, made.generation, VALID, VALID, 0, 0)
                return found + _packed(made)
            if self._negative_valid == (0, 0):
                raise
            if not self._files.note_absent(header.node, name):
                raise
            valid, rest = self._negative_valid
            return protocol.pack_entry(0, 0, valid, 0, rest, 0) + _NO_ATTRIBUTES

    @_handles(Opcode.FORGET)
    async def forget(self, header: Header, body: memoryview) -> Answer:
        await self._files.forget([(header.node, protocol.FORGET.unpack_from(body)[0])])
        return None

    @_handles(Opcode.BATCH_FORGET)
    async def forget_many(self, header: Header, body: memoryview) -> Answer:
        count, _ = protocol.FORGET_COUNT.unpack_from(body)
        items = body[protocol.FORGET_COUNT.size :][: count * protocol.FORGET_ONE.size]
        await self._files.forget(list(protocol.FORGET_ONE.iter_unpack(items)))
        return None

    @_handles(Opcode.NOTIFY_REPLY)
    async def notify_reply(self, header: Header, body: memoryview) -> Answer:
        return None  # not a request

    @_handles(Opcode.INTERRUPT)
    async def interrupted(self, header: Header, body: memoryview) -> Answer:
        if self._interrupt is None:
            return errno.ENOSYS  # the kernel sends no further ones then
        (unique,) = protocol.INTERRUPTED.unpack_from(body)
        if unique not in self._uninterruptible:
            self._interrupt(unique)
        if unique in self._waiting_locks:
            await self._cancel_lock(unique)
        return None

    @_handles(Opcode.DESTROY)
    async def destroy(self, header: Header, body: memoryview) -> Answer:
        return b""

    @_handles(Opcode.GETATTR)
    async def getattr(self, header: Header, body: memoryview) -> Answer:
        return self._attributes(await self._files.getattr(header.node))

    @_handles(Opcode.STATX)
    async def statx(self, header: Header, body: memoryview) -> Answer:
        found = await self._files.getattr(header.node)
        self._files.note_attributes(found)
        return protocol.pack_statx_validity(*self._attr_valid) + _packed_statx(found)

    @_handles(Opcode.IOCTL)
    async def ioctl(self, header: Header, body: memoryview) -> Answer:
        _, command, _, _ = protocol.IOCTL.unpack_from(body)
        arguments = body[protocol.IOCTL.size :]
        if command in (_GETFLAGS, _FSGETXATTR):
            flags = (await self._files.getattr(header.node)).flags
            if command == _GETFLAGS:
                return protocol.IOCTL_DONE + protocol.INODE_FLAGS.pack(flags)
            found = sum(extended for flag, extended in _EXTENDED.items() if flags & flag)
            return protocol.IOCTL_DONE + protocol.EXTENDED_FLAGS.pack(found)
        if command == _SETFLAGS:
            (flags,) = protocol.INODE_FLAGS.unpack_from(arguments)
        elif command == _FSSETXATTR:
            (wanted,) = protocol.EXTENDED_FLAGS.unpack_from(arguments)
            flags = sum(flag for flag, extended in _EXTENDED.items() if wanted & extended)
            if wanted & ~sum(_EXTENDED.values()):
                return errno.EOPNOTSUPP
        else:
            return errno.ENOTTY
        # The kernel would write files by itself, or append whole pages.
        if (self._passing is not None and flags & (IMMUTABLE | APPEND_ONLY)) or (
            self._writeback and flags & APPEND_ONLY
        ):
            return errno.EOPNOTSUPP
        await self._files.set_flags(header.node, flags)
        return protocol.IOCTL_DONE

    @_handles(Opcode.SETATTR)
    async def setattr(self, header: Header, body: memoryview) -> Answer:
        (
            valid, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _,
        ) = protocol.SETATTR.unpack_from(body)  # fmt: skip
        if (
            self._files.appends
            and valid & _SIZE_OF_OPEN == _SIZE_OF_OPEN
            and self._files.is_rollback(header.node, handle, size)
        ):
            return self._attributes(await self._files.getattr(header.node))
        now = time.time_ns() if valid & _NOW else 0
        # The kernel's seconds have 64 bits, which do not fit into nanoseconds of 64 bits.
        new_atime = now if valid & _ATIME_NOW else clamped(atime * _SECOND + atime_ns)
        new_mtime = now if valid & _MTIME_NOW else clamped(mtime * _SECOND + mtime_ns)
        with self._uncut(header, valid & _SIZE):
            changed = await self._files.setattr(
                header.node,
                size if valid & _SIZE else None,
                mode if valid & _MODE else None,
                uid if valid & _UID else None,
                gid if valid & _GID else None,
                new_atime if valid & _ATIME else None,
                new_mtime if valid & _MTIME else None,
                kill_setid=valid & _KILL_SUIDGID != 0,
            )
        return self._attributes(changed)

    @_handles(Opcode.READLINK)
    async def readlink(self, header: Header, body: memoryview) -> Answer:
        return await self._files.readlink(header.node)

    @_handles(Opcode.STATFS)
    async def statfs(self, header: Header, body: memoryview) -> Answer:
        total, available, count = await self._files.statfs()
        free = max(0, available // BLOCK)
        return protocol.pack_statfs(
            total // BLOCK, free, free, count + free, free, BLOCK, NAME_MAX, BLOCK, 0
        )

    # Names

    @_handles(Opcode.MKNOD)
    async def mknod(self, header: Header, body: memoryview) -> Answer:
        mode, rdev, umask, _ = protocol.MKNOD.unpack_from(body)
        name = _last(body, protocol.MKNOD.size)
        made = await self._files.mknod(header.node, name, mode, *_owner(header), rdev, umask)
        return self._entry(made)

    @_handles(Opcode.MKDIR)
    async def mkdir(self, header: Header, body: memoryview) -> Answer:
        mode, umask = protocol.MKDIR.unpack_from(body)
        name = _last(body, protocol.MKDIR.size)
        made = await self._files.mkdir(header.node, name, mode, *_owner(header), umask)
        return self._entry(made)

    @_handles(Opcode.SYMLINK)
    async def symlink(self, header: Header, body: memoryview) -> Answer:
        name, _, target = _last(body).partition(_NAME)
        made = await self._files.symlink(header.node, name, target, *_owner(header))
        return self._entry(made)

    @_handles(Opcode.LINK)
    async def link(self, header: Header, body: memoryview) -> Answer:
        (ino,) = protocol.LINK.unpack_from(body)
        name = _last(body, protocol.LINK.size)
        return self._entry(await self._files.link(ino, header.node, name))

    @_handles(Opcode.UNLINK)
    async def unlink(self, header: Header, body: memoryview) -> Answer:
        await self._files.unlink(header.node, _last(body))
        return b""

    @_handles(Opcode.RMDIR)
    async def rmdir(self, header: Header, body: memoryview) -> Answer:
        await self._files.rmdir(header.node, _last(body))
        return b""

    @_handles(Opcode.RENAME)
    async def rename(self, header: Header, body: memoryview) -> Answer:
        (directory,) = protocol.RENAME.unpack_from(body)
        return await self._rename(header.node, directory, 0, _last(body, protocol.RENAME.size))

    @_handles(Opcode.RENAME2)
    async def rename_with_flags(self, header: Header, body: memoryview) -> Answer:
        directory, flags, _ = protocol.RENAME2.unpack_from(body)
        names = _last(body, protocol.RENAME2.size)
        return await self._rename(header.node, directory, flags, names)

    async def _rename(self, old: int, new: int, flags: int, names: bytes) -> Answer:
        name, _, new_name = names.partition(_NAME)
        await self._files.rename(old, name, new, new_name, flags)
        return b""

    # Files

    @_handles(Opcode.CREATE)
    async def create(self, header: Header, body: memoryview) -> Answer:
        if self._openless:
            # The kernel creates it with MKNOD and opens it itself: there is no RELEASE.
            return errno.ENOSYS
        flags, mode, umask, more = protocol.CREATE.unpack_from(body)
        name = _last(body, protocol.CREATE.size)
        handle, fresh, made = await self._files.create(
            header.node, name, mode, *_owner(header), flags, umask,
            keep_setid=self._keeps_setid(header, flags, more),
        )  # fmt: skip
        return self._entry(made) + self._opened(handle, made.region, flags, fresh)

    @_handles(Opcode.TMPFILE)
    async def tmpfile(self, header: Header, body: memoryview) -> Answer:
        flags, mode, umask, _ = protocol.CREATE.unpack_from(body)
        handle, made = await self._files.tmpfile(header.node, mode, *_owner(header), flags, umask)
        return self._entry(made) + self._opened(handle, made.region, flags, keep_cache=True)

    @_handles(Opcode.OPEN)
    async def open(self, header: Header, body: memoryview) -> Answer:
        if self._openless:
            return errno.ENOSYS  # the kernel opens this and all other files itself
        flags, more = protocol.OPEN.unpack_from(body)
        keep_setid = self._keeps_setid(header, flags, more)
        with self._uncut(header, flags & os.O_TRUNC):
            handle, fresh, found = await self._files.open(header.node, flags, keep_setid=keep_setid)
        return self._opened(handle, found.region, flags, fresh)

    def _keeps_setid(self, header: Header, flags: int, more: int) -> bool:
        """Whether opening a file with these flags of open(2), and ``OPEN_...`` in *more*, leaves
        its set-ID bits; without truncation it does anyway."""
        if self.features & Feature.HANDLE_KILLPRIV_V2:
            return not more & protocol.OPEN_KILL_SUIDGID
        return not flags & os.O_TRUNC or is_root(header.uid, header.pid)

    def _kills_setid(self, header: Header, ino: int) -> bool:
        """Whether a request that changes the data of a file has to clear its set-ID bits.

        The request does not say whether the program may keep them; root may.
        """
        return not self._files.is_harmless(ino) and not is_root(header.uid, header.pid)

    @_handles(Opcode.READ)
    async def read(self, header: Header, body: memoryview) -> Answer:
        handle, offset, size, flags = protocol.READ.unpack_from(body)
        if not flags & _READ_DIRECT:
            self._files.fill_pages(header.node, offset, size)
        data = await self._files.read(header.node, handle, offset, size, header.pid)
        self._counters.add_bytes(Opcode.READ, len(data))
        return data

    @_handles(Opcode.WRITE)
    async def write(self, header: Header, body: memoryview) -> Answer:
        handle, offset, size, flags, _, opened, _ = protocol.WRITE.unpack_from(body)
        data = body[protocol.WRITE.size :][:size]
        kill_setid = bool(flags & protocol.WRITE_KILL_SUIDGID)
        direct = flags & _WRITE_DIRECT
        if not direct:
            self._files.fill_pages(header.node, offset, size)
        # After other writes the kernel sends FSYNC itself, also after synchronous ones with
        # O_DIRECT.
        synced = opened & _SYNC if direct else 0
        # The program need not wait for it: after other writes the kernel itself drops its caches.
        unwaited = direct and opened & _DIRECT
        files, node = self._files, header.node
        if unwaited:
            believed = files.is_believed(node, offset, size)
        else:
            believed = bool(direct) and files.may_have_pages(node, offset, size)
        if size >= _LARGE and not (kill_setid or synced or believed):
            rest = files.begin_write(node, handle, offset, data)
            if rest is not None:
                self._counters.add_bytes(Opcode.WRITE, size)
                return Early(protocol.written(size), rest)
        thread = KERNEL if flags & protocol.WRITE_CACHE else header.pid
        try:
            if opened & _APPEND and files.appends:
                await files.append(node, handle, offset, data, thread, kill_setid)
            else:
                await files.write(node, handle, offset, data, thread, kill_setid)
        except BaseException:
            if unwaited:
                files.failed_past_pages(handle, offset + size)
            raise
        self._counters.add_bytes(Opcode.WRITE, size)
        if files.appends:
            files.note_written(node, offset + size)
        return await self._written(node, handle, offset, size, direct, unwaited, synced)

    async def _written(
        self, node: int, handle: int, offset: int, size: int,
        direct: int, unwaited: int, synced: int,
    ) -> Answer:  # fmt: skip
        """Return the reply to a write, after the invalidations that it requires.

        The kernel drops pages, and cached times, before it sends a write with ``O_DIRECT``, and
        after it only if the program waits for it.  Pages read or written, and times queried, in
        between would stay cached although they are outdated.
        """
        if synced:
            await self._files.fsync(node, handle, synced != _SYNC)
        answer = protocol.written(size)
        if unwaited:
            return Told(answer) if self._files.drop_believed(node, offset, size) else answer
        if direct and self._files.drop_pages(node, offset, size):
            return Told(answer)
        return answer

    @_handles(Opcode.FALLOCATE)
    async def fallocate(self, header: Header, body: memoryview) -> Answer:
        handle, offset, size, mode = protocol.FALLOCATE.unpack_from(body)
        files, node = self._files, header.node
        kills = self._kills_setid(header, node)
        await files.fallocate(node, handle, mode, offset, size, header.pid, kills)
        return b""

    @_handles(Opcode.LSEEK)
    async def lseek(self, header: Header, body: memoryview) -> Answer:
        if self._writeback:
            return errno.ENOSYS  # it would miss data that the kernel has not written back yet
        handle, offset, whence = protocol.LSEEK.unpack_from(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            return errno.EINVAL
        found = await self._files.seek(header.node, handle, offset, whence == os.SEEK_HOLE)
        return errno.ENXIO if found is None else protocol.NUMBER.pack(found)

    @_handles(Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64)
    async def copy_file_range(self, header: Header, body: memoryview) -> Answer:
        handle, offset, node, to, at, size = protocol.COPY_FILE_RANGE.unpack_from(body)
        count = await self._files.copy_range(
            (header.node, handle, offset), (node, to, at), size, header.pid,
            self._kills_setid(header, node),
        )  # fmt: skip
        if header.opcode == Opcode.COPY_FILE_RANGE:
            return protocol.written(count)
        return protocol.NUMBER.pack(count)

    @_handles(Opcode.FLUSH)
    async def flush(self, header: Header, body: memoryview) -> Answer:
        """Nothing is deferred: every write reaches the target before its reply.  Only locks of
        the process may end.

        Without these an errno makes the kernel send the request only once, and not on each close.
        """
        if not self.features & Feature.POSIX_LOCKS:
            return errno.ENOSYS
        handle, owner = protocol.FLUSH.unpack_from(body)
        await self._files.flush(header.node, handle, owner)
        return b""

    # Locks

    @_handles(Opcode.SETLK, Opcode.SETLKW)
    async def lock(self, header: Header, body: memoryview) -> Answer:
        handle, owner, start, end, kind, pid, flags = protocol.LOCK.unpack_from(body)
        unique = header.unique
        waits = header.opcode == Opcode.SETLKW and kind != UNLOCK
        if waits:
            self._waiting_locks.add(unique)
        try:
            await self._files.lock(
                header.node, handle, bool(flags & protocol.LOCK_FLOCK), owner, kind, start,
                end, pid, unique if waits else 0,
            )  # fmt: skip
        finally:
            self._waiting_locks.discard(unique)
        return b""

    @_handles(Opcode.GETLK)
    async def test_lock(self, header: Header, body: memoryview) -> Answer:
        handle, owner, start, end, kind, _, flags = protocol.LOCK.unpack_from(body)
        flock = bool(flags & protocol.LOCK_FLOCK)
        found = await self._files.test_lock(header.node, handle, flock, owner, kind, start, end)
        if found is None:
            return protocol.pack_lock(start, end, UNLOCK, 0)
        kind = EXCLUSIVE if found.exclusive else SHARED
        return protocol.pack_lock(found.start, found.end, kind, found.pid)

    async def _cancel_lock(self, unique: int) -> None:
        """End a request that waits for a lock: the program has a signal, whatever it is.

        Again until that has succeeded: the request may not have been sent yet, or be sent again
        over another connection.
        """
        while unique in self._waiting_locks:
            with contextlib.suppress(errors.Exception):
                await self._files.cancel_lock(unique)
            if unique in self._waiting_locks:
                await trio.sleep(LOCK_CANCEL_PAUSE)

    @_handles(Opcode.FSYNC)
    async def fsync(self, header: Header, body: memoryview) -> Answer:
        handle, flags = protocol.HANDLE.unpack_from(body)
        await self._files.fsync(header.node, handle, bool(flags & protocol.FSYNC_DATA))
        return b""

    @_handles(Opcode.RELEASE)
    async def release(self, header: Header, body: memoryview) -> Answer:
        handle, _ = protocol.HANDLE.unpack_from(body)
        if self._passing is not None:
            await self._passing.release(header.node)
        if handle:  # 0: a TMPFILE, before the kernel knew that it needs no OPEN
            await self._files.release(handle)
        return b""

    # Directories

    @_handles(Opcode.OPENDIR)
    async def opendir(self, header: Header, body: memoryview) -> Answer:
        handle, keep = self._files.opendir(header.node)
        flags = Open.CACHE_DIR | keep * Open.KEEP_CACHE if self._files.keep_listings else 0
        return protocol.opened(handle, flags)

    @_handles(Opcode.READDIRPLUS)
    async def readdir(self, header: Header, body: memoryview) -> Answer:
        """Return as many entries with attributes as fit."""
        handle, cookie, room, _ = protocol.READ.unpack_from(body)
        files = self._files
        found: list[bytes] = []
        while True:
            try:
                entries = await files.readdir(handle, cookie, max(1, room // _ENTRY))
            except Exception:
                if found:  # whose lookups are counted: the kernel gets them, and then the error
                    break
                raise
            if not entries:
                break
            for entry in entries:
                room -= protocol.ENTRY_SIZE + protocol.direntry_size(entry.name)
                if room < 0:
                    return b"".join(found)
                name, attributes, cookie = entry
                if entry.dot:
                    # The kernel does not count lookups of the dots, and must not get their
                    # attributes here.
                    found.append(_NO_ENTRY)
                else:
                    found.append(self._entry(attributes))
                    files.count_entry(handle, entry)
                found.append(protocol.pack_direntry(attributes.ino, cookie, attributes.mode, name))
        if not found:
            files.end_listing(handle)
        return b"".join(found)

    @_handles(Opcode.RELEASEDIR)
    async def releasedir(self, header: Header, body: memoryview) -> Answer:
        self._files.releasedir(protocol.HANDLE.unpack_from(body)[0])
        return b""

    @_handles(Opcode.FSYNCDIR)
    async def fsyncdir(self, header: Header, body: memoryview) -> Answer:
        await self._files.fsyncdir()
        return b""

    # Extended attributes

    @_handles(Opcode.GETXATTR)
    async def getxattr(self, header: Header, body: memoryview) -> Answer:
        size, _ = protocol.SIZE.unpack_from(body)
        name = _last(body, protocol.SIZE.size)
        if name == CAPABILITY and self._files.is_incapable(header.node):
            return errno.ENODATA
        return _fitting(await self._files.getxattr(header.node, name), size)

    @_handles(Opcode.SETXATTR)
    async def setxattr(self, header: Header, body: memoryview) -> Answer:
        extended = self.features & Feature.SETXATTR_EXT
        form = protocol.SETXATTR_EXT if extended else protocol.SETXATTR
        size, flags, *more = form.unpack_from(body)
        name, _, rest = bytes(body[form.size :]).partition(_NAME)
        if extended:
            keep_setgid = not more[0] & protocol.SETXATTR_ACL_KILL_SGID
        else:
            groups = groups_of(header.uid, header.gid, header.pid)
            keep_setgid = await self._files.loses_setgid(header.node, name, groups) is None
        await self._files.setxattr(header.node, name, rest[:size], keep_setgid, flags)
        return b""

    @_handles(Opcode.REMOVEXATTR)
    async def removexattr(self, header: Header, body: memoryview) -> Answer:
        await self._files.removexattr(
            header.node, _last(body), groups_of(header.uid, header.gid, header.pid)
        )
        return b""

    @_handles(Opcode.LISTXATTR)
    async def listxattr(self, header: Header, body: memoryview) -> Answer:
        size, _ = protocol.SIZE.unpack_from(body)
        names = await self._files.listxattr(header.node)
        # Only readable for privileged users, but the kernel does not hide their names.
        others = [name for name in names if not name.startswith(b"trusted.")]
        if len(others) < len(names) and not is_root(header.uid, header.pid):
            names = others
        return _fitting(b"".join(name + _NAME for name in names), size)


def _fitting(value: bytes, room: int) -> Answer:
    """Return a value, or only its size if the caller's buffer has size 0."""
    if not room:
        return protocol.written(len(value))
    return value if len(value) <= room else errno.ERANGE


async def _unknown(operations: Operations, header: Header, body: memoryview) -> Answer:
    """Reject an unknown request; the kernel sends no further ones, and falls back where
    possible."""
    return errno.ENOSYS
