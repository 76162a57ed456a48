"""Regions in files: one regular file per region, in 256 directories by ID.

Lock order: ``_lock`` is innermost and is never held during a system call on region data.  A
descriptor is closed only while it is unused, so a number is never reused during a read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, StrictBool, StrictInt, model_validator

from warabi import errors
from warabi._core import config_keys, descriptors, fileio, forks, syscalls
from warabi._core.buffers import MAX_SIZE
from warabi._core.fileio import copy_file, pread_full, pwrite_full, set_apart
from warabi._core.tuning import HANDOVER_POLL
from warabi.backends import xattr_times as filetimes
from warabi.backends.base import STRANGERS, Location, Storage
from warabi.backends.fd_cache import Borrowed, OpenFile, Translated
from warabi.backends.page_cache import LEAST, CachedFiles
from warabi.backends.record import Backend, Plan, usual_plan
from warabi.backends.settings import Bytes, Model, PathModel, Positive, unknown_key
from warabi.backends.xattr_times import Times
from warabi.errors import CorruptTarget, StorageError, WouldBlock
from warabi.metadata.journal import close_quietly, sync_directory
from warabi.region import RegionID

NEW = ".new"
"""Suffix of a file that is about to replace a region's."""
_SHARD = re.compile("[0-9a-f]{2}")
_SYNC_ONE_BY_ONE = 32
"""Up to this many unsynced files are synced one by one; beyond, by a sync of the file system."""
_BLOCKS = 64 * 1024
"""Bytes of the largest blocks in which file systems allocate."""
_MOST_DESCRIPTORS = 16384
"""Most open region files, even if the process may have more: each uses kernel memory."""
_ADVICE = "what was written to it may be lost. Write it to a new region"


class AbtIoConfig(Model):
    """Thread-pool settings of ABT-IO; those without effect here are accepted.

    ``backing_thread_count`` limits the requests that wait for stable storage concurrently.
    """

    model_config = ConfigDict(extra="allow")
    backing_thread_count: Positive | None = None

    @model_validator(mode="after")
    def _known(self) -> AbtIoConfig:
        for key in self.model_extra or ():
            if key not in config_keys.ABT_IO:
                raise unknown_key(key, {"backing_thread_count", *config_keys.ABT_IO})
        return self


class FileConfig(PathModel):
    """Settings of the ``abtio`` backend, also called ``file``."""

    create_if_missing: StrictBool = False
    override_if_exists: StrictBool = False
    alignment: Annotated[StrictInt, Field(ge=8, multiple_of=8)] = 8
    directio: StrictBool = False
    sync: StrictBool = False
    abt_io: AbtIoConfig = Field(default_factory=AbtIoConfig)
    capacity: Bytes | None = None
    checksums: StrictBool | None = None  # None: keep the target's setting
    packed: StrictBool | None = None  # None: true


def flush(fd: int, *, times: bool) -> None:
    """Flush a file to stable storage; without *times* only its data, as fdatasync(2)."""
    if times:
        os.fsync(fd)
    else:
        os.fdatasync(fd)


class FileStorage(Storage):
    """Regions as files below *root*, a directory that belongs to the target.

    With *sync* each write returns only when it is on stable storage.
    """

    blocking: ClassVar[bool] = True

    def __init__(self, root: Path, *, sync: bool = False) -> None:
        self.root = root
        self._prefix = f"{root}/"
        self._flags = os.O_RDWR | os.O_CLOEXEC
        # Not O_DSYNC: of several writes by one descriptor only one would fail when data are lost.
        self._sync = sync
        self.write_waits = self.write_waits or sync
        self.shares_writes = not sync
        self._lock = forks.lock()
        self._descriptors: dict[bytes, OpenFile] = {}  # by last use, oldest first
        # The other half is for connections, direct access, and everything else.
        self._limit = min(_MOST_DESCRIPTORS, max(16, descriptors.limit() // 2))
        self._opens = 0  # how often a descriptor was not cached
        self._mapped = CachedFiles(self._limit // 8)
        # Regions that guests may sync themselves, a fraction of the limit: the kernel reports a
        # write error once to each open descriptor, so ours must stay open to receive it, too.
        self._kept: set[bytes] = set()
        self._dirty: set[bytes] = set()  # written since the last flush began
        self._flushes: dict[object, set[bytes]] = {}  # regions of each flush under way
        self._syncs: dict[bytes, set[object]] = {}  # syncs of a file under way
        # Regions whose directory entries may not be durable, oldest first; directories with new or
        # removed entries since their last sync; directories whose sync failed.
        self._fresh: dict[RegionID, None] = {}
        self._fresh_shards: set[str] = set()
        self._swept_shards: set[str] = set()
        self._lost_shards: set[str] = set()
        self.failed: dict[bytes, str] = {}  # a sync failed: written data may be lost
        self._keeps_times = True  # until the file system rejects it
        with os.scandir(root) as entries:
            self._shards = {e.name for e in entries if e.is_dir() and _SHARD.fullmatch(e.name)}
        # Always open, since the kernel reports a write error once to each open descriptor.
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        set_apart(self._root_fd)
        # tmpfs does not know the flag, and has nothing to wait for.
        self._nowait = 0 if syscalls.is_in_memory(self._root_fd) else os.RWF_NOWAIT

    def path(self, rid: bytes) -> str:
        """Return the path of the region's file."""
        name = rid.hex()
        return f"{self._prefix}{name[-2:]}/{name}"

    @staticmethod
    def translated(rid: bytes, what: str) -> Translated:
        """Return a context manager that translates errors of *what* is done with the region."""
        return Translated(rid, what)

    def borrow(self, rid: bytes) -> Borrowed:
        """Return a context manager that keeps the region's descriptor open."""
        return Borrowed(rid, self._take, self._give_back)

    def _take(self, rid: bytes) -> OpenFile:
        with self._lock:
            held = self._descriptors.pop(rid, None)
            if held is None:
                held = OpenFile(self.open(self.path(rid), self._flags, locked=True))
                self._opens += 1
                self._evict()
            self._descriptors[rid] = held  # last: most recently used
            held.users += 1
            return held

    def _give_back(self, rid: bytes, held: OpenFile) -> None:
        with self._lock:
            held.users -= 1
            if not held.users and self._descriptors.get(rid) is not held:
                self._close(rid, held)  # erased meanwhile

    def _close(self, rid: bytes, held: OpenFile) -> None:
        """Close an unused descriptor; ``_lock`` is held."""
        self._mapped.drop(held.fd)
        close_quietly(held.fd)

    def set_size(self, fd: int, size: int) -> None:
        """Set the size of an open region file, or leave it unchanged on failure."""
        os.ftruncate(fd, size)

    def open(self, path: str, flags: int, *, locked: bool = False) -> int:
        """Open a file; new ones are private.  If there are no descriptors left, first close half of
        the cached ones; *locked*: ``_lock`` is held."""
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if not descriptors.are_short(error):
                raise
        with contextlib.nullcontext() if locked else self._lock:
            self._close_oldest(len(self._descriptors) // 2 + 1)
        return os.open(path, flags, 0o600)

    def _evict(self) -> None:
        if len(self._descriptors) >= self._limit:
            self._close_oldest(self._limit // 8)

    def _close_oldest(self, count: int) -> None:
        for rid in list(self._descriptors)[:count]:
            held = self._descriptors.pop(rid)
            if held.users or rid in self._kept:
                self._descriptors[rid] = held
            else:
                self._close(rid, held)

    def _made(self, rid: bytes) -> str:
        """Return the path of a region's file, after creating its directory if necessary."""
        shard = _shard(rid)
        if shard not in self._shards:
            os.makedirs(f"{self.root}/{shard}", 0o700, exist_ok=True)
            with self._lock:
                self._shards.add(shard)
                self._fresh_shards.add(shard)
        return self.path(rid)

    def create_durable(self, rid: RegionID, data: memoryview, size: int) -> None:
        """Create a region of *size* bytes that begins with *data*; they are durable before it gets
        its name, whose durability is up to :meth:`persist_name`."""

        def fill(new: int) -> None:
            pwrite_full(new, data, 0)
            self.set_size(new, size)
            os.fsync(new)

        self._made(rid)
        self._put_in_place(rid, fill)
        with self._lock:
            self._fresh[rid] = None

    def create(self, rid: RegionID, size: int) -> None:
        with self.translated(rid, "create"):
            path = self._made(rid)
            fd = self.open(path, self._flags | os.O_CREAT | os.O_EXCL)
            if size:
                try:
                    self.set_size(fd, size)
                except BaseException:
                    close_quietly(fd)
                    os.unlink(path)
                    raise
            with self._lock:
                self._evict()
                self._descriptors[rid] = OpenFile(fd)
                self._dirty.add(rid)
                self._fresh[rid] = None

    def erase(self, rid: RegionID) -> None:
        with self._lock:
            held = self._descriptors.pop(rid, None)
            self._kept.discard(rid)
            self._dirty.discard(rid)
            self._fresh.pop(rid, None)
            self.failed.pop(rid, None)
            self._swept_shards.add(_shard(rid))
            if held is not None and not held.users:  # else a sync of everything uses it
                self._close(rid, held)
        try:
            os.unlink(self.path(rid))
        except FileNotFoundError:
            pass  # already erased
        except OSError as error:
            raise errors.from_os(error, f"erase region {rid.hex()}") from error

    def resize(self, rid: RegionID, size: int) -> None:
        with self.translated(rid, "resize"), self.borrow(rid) as fd:
            self.set_size(fd, size)
            self._dirty.add(rid)

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        self._read(rid, offset, out, 0)

    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        try:
            self._read(rid, offset, out, self._nowait)
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise WouldBlock from None
            raise

    def _read(self, rid: bytes, offset: int, out: memoryview, flags: int) -> None:
        with self.translated(rid, "read"), self.borrow(rid) as fd:
            count = pread_full(fd, out, offset, flags)
        if count < len(out):
            raise CorruptTarget(
                f"read region {rid.hex()}: its file ends at {offset + count} bytes,"
                f" {len(out)} bytes at {offset} were expected"
            )

    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None:
        if writable or size < LEAST:
            return None
        with contextlib.suppress(OSError), self.borrow(rid) as fd:
            return self._mapped.show(fd, offset, size)
        return None

    def _check_end(self, rid: bytes, fd: int, what: str, end: int) -> int:
        """Check that a file was not truncated: writing beyond its end would replace data by
        zeros.  Returns its size."""
        have = os.lseek(fd, 0, os.SEEK_END)  # cheaper than fstat(2); offsets are always explicit
        if have < end:
            raise CorruptTarget(
                f"{what} region {rid.hex()}: its file ends at {have} bytes, before {end}"
            )
        return have

    def check(self, rid: RegionID, size: int) -> None:
        with self.translated(rid, "resize"), self.borrow(rid) as fd:
            self._check_end(rid, fd, "resize", size)

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        self._write(rid, offset, data, within=True)
        if self._sync:
            self._flush_file(rid)

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        # The write extends the file, which is cheaper than ftruncate(2) first.
        self._write(rid, offset, data, within=False)
        if self._sync:
            self._flush_file(rid)

    def _write(self, rid: bytes, offset: int, data: memoryview, *, within: bool) -> None:
        """Write to the file, with *within* only if it does not end before."""
        with self.translated(rid, "write"), self.borrow(rid) as fd:
            if within:
                self._check_end(rid, fd, "write", offset + len(data))
            try:
                pwrite_full(fd, data, offset)
            finally:
                self._dirty.add(rid)  # not before: a concurrent sync may not include all of it

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        with self.translated(rid, "allocate"), self.borrow(rid) as fd:
            found = os.fstat(fd)
            blocks, end = found.st_blocks * 512, -(-found.st_size // _BLOCKS) * _BLOCKS
            kept = max(0, blocks - end)  # allocated beyond the end, presumably next to it
            have = blocks if offset < end else max(0, end + kept - offset)
            # Checked first: the attempt alone would use up all free space for a while.
            if size - have > self.room()[1]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                fileio.allocate(fd, offset, size)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    text = f"allocate region {rid.hex()}: {self.root}: its file system cannot"
                    raise errors.path_error(error.errno, text) from None
                if offset + size > found.st_size:  # free what was allocated before it failed
                    os.ftruncate(fd, found.st_size)
                    if kept:
                        with contextlib.suppress(OSError):
                            fileio.allocate(fd, found.st_size, kept)
                raise
            finally:
                self._dirty.add(rid)

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        with self.translated(rid, "zero"), self.borrow(rid) as fd:
            self._check_end(rid, fd, "zero", offset + size)
            try:
                (fileio.punch if free else fileio.zero)(fd, offset, size)
            finally:
                self._dirty.add(rid)

    def space(self, rid: RegionID, size: int) -> int:
        try:
            return os.stat(self.path(rid)).st_blocks * 512
        except OSError:
            return size  # the next read raises the error

    def leaves_holes(self, size: int) -> bool:
        return True

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        with self.translated(rid, "seek"), self.borrow(rid) as fd:
            return (fileio.hole_from if hole else fileio.data_from)(fd, offset, end)

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        with (
            self.translated(rid, f"copy of region {source.hex()} to"),
            self.borrow(source) as from_fd,
            self.borrow(rid) as fd,
        ):
            self._check_end(source, from_fd, "copy", start + size)
            self._check_end(rid, fd, "copy to", offset + size)
            try:
                copy_file(from_fd, fd, size, start, offset)
            finally:
                self._dirty.add(rid)
        if self._sync:
            self._flush_file(rid)

    def keep_times(self, rid: RegionID, times: Times) -> bool:
        if not self._keeps_times:
            return False
        with self.translated(rid, "persist"), self.borrow(rid) as fd:
            try:
                filetimes.put(fd, times)
            except OSError as error:
                self._keeps_times = error.errno != errno.EOPNOTSUPP
                return False
            return True

    def kept_times(self, rid: RegionID) -> Times | None:
        with self.translated(rid, "recovery of"):
            return filetimes.get(self.path(rid))

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        self._persist_file(rid, times=times)

    def _persist_file(self, rid: bytes, *, times: bool = False) -> None:
        """Flush the whole file and its name; with *times* also its attributes."""
        self._flush_file(rid, times=times)
        self.persist_name(rid)

    def _flush_file(self, rid: bytes, *, times: bool = False) -> None:
        # Even if nothing is dirty: another persist of the region may still be waiting for the
        # flush, and this one must not return before it.
        with (
            self._syncing(rid) as others,
            self._under_way({rid}),
            self.translated(rid, "persist"),
            self._own(rid) if others else self.borrow(rid) as fd,
            self._remembered(rid),
        ):
            flush(fd, times=times)

    @contextlib.contextmanager
    def _syncing(self, rid: bytes) -> Iterator[bool]:
        """Sync the region's file in the block, and fail if a sync that began before it fails.

        The kernel reports that it could not write once to each open file description, so two
        syncs at a time must not use the same one, or only one of them would fail.  One that was
        opened after the report to an earlier sync gets none, hence the wait for those.

        Yields:
            whether other syncs of it are under way, so that one's own descriptor has to be used.

        Raises:
            StorageError: a sync of it failed.
            WouldBlock: without *wait*, instead of waiting for a sync that began earlier.
        """
        sync = object()
        with self._lock:
            self._check_failed(rid)
            under_way = self._syncs.setdefault(rid, set())
            earlier = set(under_way)
            under_way.add(sync)
        try:
            yield bool(earlier)
        finally:
            with self._lock:
                under_way.discard(sync)
                if not under_way:
                    del self._syncs[rid]
        while not earlier.isdisjoint(under_way):
            time.sleep(HANDOVER_POLL)
        self._check_failed(rid)

    @contextlib.contextmanager
    def _own(self, rid: bytes) -> Iterator[int]:
        """A descriptor of the region's file that nothing else uses."""
        fd = self.open(self.path(rid), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            close_quietly(fd)

    @contextlib.contextmanager
    def _under_way(self, regions: set[bytes]) -> Iterator[None]:
        """Flush *regions* in the block: they are dirty no longer, or again if it fails.

        Until the flush has ended, ``persist_all`` flushes them, too: it must not return before the
        flush has, and has no part in its result.
        """
        flush = object()
        with self._lock:
            self._flushes[flush] = regions
            self._dirty -= regions  # before the flush: data written during it are dirty again
        try:
            yield
        except CorruptTarget:
            raise  # the files are gone
        except BaseException:
            self._dirty |= regions
            raise
        finally:
            with self._lock:
                del self._flushes[flush]

    def _check_failed(self, rid: bytes) -> None:
        if failed := self.failed.get(rid):
            raise StorageError(failed)

    @contextlib.contextmanager
    def _remembered(self, rid: bytes) -> Iterator[None]:
        """Remember a failed sync: the kernel reports it once and then marks the pages clean."""
        try:
            yield
        except OSError as error:
            if descriptors.are_short(error):  # nothing was attempted
                raise errors.from_os(error, f"persist region {rid.hex()}") from error
            text = f"persist region {rid.hex()}: a sync failed ({error.strerror}); {_ADVICE}"
            self.failed[rid] = text
            raise type(errors.from_os(error, text))(text) from error

    def persist_name(self, rid: bytes) -> None:
        """Flush the directory entry of the region's file, if it is new."""
        if rid in self._fresh:
            with self._remembered(rid):
                self._sync_shard(_shard(rid))

    def persist_names(self) -> None:
        with self._lock:
            shards = {_shard(rid) for rid in self._fresh if rid not in self.failed}
        try:
            for shard in shards:
                self._sync_shard(shard)
        except OSError as error:
            raise errors.from_os(error, f"sync of a directory in {self.root}") from error

    def _sync_shard(self, shard: str) -> None:
        """Flush the names in a shard; its new regions are marked as failed if that fails."""
        with self._lock:
            fresh = [rid for rid in self._fresh if _shard(rid) == shard]
            made = shard in self._fresh_shards
            if shard in self._lost_shards:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._swept_shards.discard(shard)
        try:
            sync_directory(f"{self.root}/{shard}", self.open)
            if made:
                os.fsync(self._root_fd)
        except OSError as error:
            text = f"a sync of its directory failed ({error.strerror}); {_ADVICE}"
            with self._lock:
                self._swept_shards.add(shard)
                if descriptors.are_short(error):  # not attempted, so it can be retried
                    raise
                if made:
                    self._lost_shards.add(shard)
                for rid in fresh:
                    self.failed[rid] = f"persist region {rid.hex()}: {text}"
            raise
        with self._lock:
            self._fresh_shards.discard(shard)
            for rid in fresh:
                self._fresh.pop(rid, None)

    def fresh(self) -> list[RegionID]:
        """Return the regions whose directory entries may not be durable."""
        with self._lock:
            return list(self._fresh)

    def oldest_fresh(self) -> RegionID | None:
        return min(self.fresh(), default=None)  # imported IDs are in no order

    def persist_all(self) -> None:
        with self._lock:
            pending = self._dirty.union(self._fresh, *self._flushes.values())
            swept = set(self._swept_shards)
        if len(pending) + len(swept) > _SYNC_ONE_BY_ONE:
            self._sync_everything(pending)
        else:
            self._sync_singly(pending, swept)
        if self.failed:
            raise StorageError(next(iter(self.failed.values())))

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        def fill(new: int) -> None:
            self.set_size(new, size)
            copy_file(fd, new, min(size, os.fstat(fd).st_size))
            filetimes.copy(fd, new)
            # Before it replaces data that may have been persisted.
            os.fsync(new)

        with self.translated(rid, "resize"), self.borrow(rid) as fd:
            self._put_in_place(rid, fill)
        path = self.path(rid)
        try:
            sync_directory(os.path.dirname(path), self.open)
        except OSError as error:  # the old file may reappear after a power failure
            text = f"a sync of its directory failed ({error.strerror}); {_ADVICE}"
            self.failed[rid] = f"persist region {rid.hex()}: {text}"
        return lambda: None  # the old file has no name, and is freed with its last descriptor

    def _put_in_place(self, rid: bytes, fill: Callable[[int], None]) -> None:
        """Atomically replace the region's file by a new one, which *fill* fills."""
        path = self.path(rid)
        fresh = path + NEW
        new = self.open(fresh, self._flags | os.O_CREAT | os.O_TRUNC)
        try:
            fill(new)
            os.rename(fresh, path)
        except BaseException:
            close_quietly(new)
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        with self._lock:
            held = self._descriptors.pop(rid, None)
            if held is not None and not held.users:  # else a sync of everything uses it
                self._close(rid, held)
            self._evict()
            self._descriptors[rid] = OpenFile(new)
            self._dirty.add(rid)

    def _sync_singly(self, pending: set[bytes], swept: set[str]) -> None:
        failure: errors.Exception | None = None
        for rid in pending:
            try:
                self._persist_file(rid)
            except CorruptTarget:
                pass  # erased meanwhile
            except errors.Exception as error:
                failure = failure or error  # continue with the others
        try:
            for shard in swept & self._swept_shards:
                self._sync_shard(shard)
        except OSError as error:
            raise errors.from_os(error, f"sync of a directory in {self.root}") from error
        if failure is not None:
            raise failure

    def _sync_everything(self, pending: set[bytes]) -> None:
        with self._lock:
            fresh, made, swept = list(self._fresh), set(self._fresh_shards), set(self._swept_shards)
        try:
            with self._under_way(pending):
                syscalls.syncfs(self._root_fd)
        except OSError as error:
            text = f"a sync of the file system failed ({error.strerror}); {_ADVICE}"
            for rid in pending:
                self.failed[rid] = f"persist region {rid.hex()}: {text}"
            raise errors.from_os(error, f"sync of {self.root}") from error
        with self._lock:
            self._fresh_shards -= made
            self._swept_shards -= swept
            for rid in fresh:
                self._fresh.pop(rid, None)

    def sync_found(self) -> None:
        try:
            syscalls.syncfs(self._root_fd)
        except OSError as error:
            raise errors.from_os(error, f"sync of {self.root}") from error

    def wrote(self, rid: bytes) -> None:
        self._dirty.add(rid)

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        with self.translated(rid, "share"), self.borrow(rid):
            # Not a duplicate of ours, for which the kernel would not report write errors
            # separately.
            flags = self._flags if writable else os.O_RDONLY | os.O_CLOEXEC
            fd = self.open(self.path(rid), flags)
            if len(self._kept) < self._limit // 4:
                self._kept.add(rid)
            return Location(fd, 0, None, segment=0, mapped=False)

    def metadata_durable(self, rid: RegionID) -> bool:
        return rid in self._kept and rid not in self._fresh and rid not in self.failed

    def statistics(self) -> dict[str, int]:
        return {"open_files": len(self._descriptors), "file_opens": self._opens}

    def room(self) -> tuple[int, int]:
        try:
            info = os.statvfs(self.root)
        except OSError as error:
            raise errors.from_os(error, f"free space in {self.root}") from error
        if not info.f_blocks:
            return MAX_SIZE, MAX_SIZE  # the file system does not report it, such as ramfs
        return info.f_frsize * info.f_blocks, info.f_frsize * info.f_bavail

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        for shard in sorted(self._shards):
            with os.scandir(self.root / shard) as entries:
                for entry in entries:
                    if entry.name.endswith(NEW):  # a replacement that a crash interrupted
                        os.unlink(entry.path)
                    elif len(entry.name) == 32:
                        with contextlib.suppress(ValueError):
                            yield RegionID(bytes.fromhex(entry.name)), entry.stat().st_size

    def close(self) -> None:
        with self._lock:
            for rid, held in self._descriptors.items():
                self._close(rid, held)
            self._descriptors.clear()
            if self._root_fd >= 0:
                close_quietly(self._root_fd)
                self._root_fd = -1

    def destroy(self) -> None:
        try:
            for shard in self._shards:
                shutil.rmtree(self.root / shard, ignore_errors=True)
            self._shards.clear()
            # Otherwise the files could reappear after a power failure, without the owner's lock
            # file.
            os.fsync(self._root_fd)
        finally:
            self.close()


def _shard(rid: bytes) -> str:
    return f"{rid[-1]:02x}"


def _open(settings: FileConfig, root: Path) -> Storage:
    from warabi.backends.direct_io import open_storage  # which derives from the class above

    return open_storage(
        root, direct=settings.directio, sync=settings.sync, alignment=settings.alignment
    )


def _plan(settings: FileConfig) -> Plan:
    return usual_plan(settings)._replace(
        packed=settings.packed is not False and not settings.directio,
        threads=settings.abt_io.backing_thread_count,
    )


BACKEND = Backend(
    name="file",
    aliases=("abtio",),
    config=FileConfig,
    storage=FileStorage,
    open=_open,
    existing=FileStorage,
    plan=_plan,
    fsck=True,
)
