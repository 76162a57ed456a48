"""Regions in files: one regular file per region, in 256 directories by ID.

Lock order: ``_lock`` is innermost and is never held over a system call on region data.  A
descriptor is closed only while nobody uses it, so a number is never reused under a reader.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from warabi import errors
from warabi.backends.base import Storage, pread_full, pwrite_full
from warabi.buffers import MAX_SIZE
from warabi.catalogue import sync_directory
from warabi.errors import CorruptTarget, StorageError, WouldBlock
from warabi.region import RegionID

_SHARD = re.compile("[0-9a-f]{2}")
_SYNC_ONE_BY_ONE = 32
"""Up to this many unsynced files are synced singly; beyond, the file system as a whole is."""


class OpenFile:
    """An open region file and how many calls are using it."""

    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class FileStorage(Storage):
    """Regions as files below *root*, a directory that belongs to the target.

    With *sync* each write returns only when it is on the medium.
    """

    blocking: ClassVar[bool] = True

    def __init__(self, root: Path, *, sync: bool = False) -> None:
        self.root = root
        self._flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DSYNC if sync else 0)
        self.write_waits = self.write_waits or sync
        self._lock = threading.Lock()
        self._descriptors: dict[bytes, OpenFile] = {}  # by last use, oldest first
        self._limit = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._dirty: set[bytes] = set()  # written since the last persist
        self._fresh: set[bytes] = set()  # created since their directory was synced
        self._failed: dict[bytes, str] = {}  # a sync failed: what was written may be gone
        with os.scandir(root) as entries:
            self._shards = {e.name for e in entries if e.is_dir() and _SHARD.fullmatch(e.name)}

    def _path(self, rid: bytes) -> str:
        name = rid.hex()
        return f"{self.root}/{name[-2:]}/{name}"

    @contextlib.contextmanager
    def _translated(self, rid: bytes, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CorruptTarget(f"{what}: the file of region {rid.hex()} is missing") from error
        except OSError as error:
            raise errors.from_os(error, f"{what} region {rid.hex()}") from error

    @contextlib.contextmanager
    def _borrow(self, rid: bytes) -> Iterator[int]:
        """The region's descriptor, open while the block runs."""
        with self._lock:
            held = self._descriptors.pop(rid, None)
            if held is None:
                held = OpenFile(os.open(self._path(rid), self._flags))
                self._evict()
            self._descriptors[rid] = held  # last: most recently used
            held.users += 1
        try:
            yield held.fd
        finally:
            with self._lock:
                held.users -= 1
                if not held.users and self._descriptors.get(rid) is not held:
                    self._close(rid, held)  # erased meanwhile

    def _close(self, rid: bytes, held: OpenFile) -> None:
        """Let go of a descriptor that nobody uses; ``_lock`` is held."""
        os.close(held.fd)

    def _set_size(self, fd: int, size: int) -> None:
        """Make an open region file end at *size* bytes, or leave it as it was."""
        os.ftruncate(fd, size)

    def _evict(self) -> None:
        if len(self._descriptors) < self._limit:
            return
        for rid in list(self._descriptors)[: self._limit // 8]:
            if not self._descriptors[rid].users:
                self._close(rid, self._descriptors.pop(rid))

    def create(self, rid: RegionID, size: int) -> None:
        with self._translated(rid, "create"):
            shard = rid.hex()[-2:]
            if shard not in self._shards:
                os.makedirs(f"{self.root}/{shard}", exist_ok=True)
                with self._lock:
                    self._shards.add(shard)
            path = self._path(rid)
            fd = os.open(path, self._flags | os.O_CREAT | os.O_EXCL, 0o600)
            if size:
                try:
                    self._set_size(fd, size)
                except BaseException:
                    os.close(fd)
                    os.unlink(path)
                    raise
            with self._lock:
                self._evict()
                self._descriptors[rid] = OpenFile(fd)
                self._dirty.add(rid)
                self._fresh.add(rid)

    def erase(self, rid: RegionID) -> None:
        with self._lock:
            held = self._descriptors.pop(rid, None)
            for known in (self._dirty, self._fresh):
                known.discard(rid)
            self._failed.pop(rid, None)
            if held is not None and not held.users:  # else a sync of everything is at it
                self._close(rid, held)
        try:
            os.unlink(self._path(rid))
        except FileNotFoundError:
            pass  # gone is what was wanted
        except OSError as error:
            raise errors.from_os(error, f"erase region {rid.hex()}") from error

    def resize(self, rid: RegionID, size: int) -> None:
        with self._translated(rid, "resize"), self._borrow(rid) as fd:
            self._set_size(fd, size)
            self._dirty.add(rid)

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        self._read(rid, offset, out, 0)

    def read_into_nowait(self, rid: RegionID, offset: int, out: memoryview) -> None:
        try:
            self._read(rid, offset, out, os.RWF_NOWAIT)
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise WouldBlock from None
            raise

    def _read(self, rid: bytes, offset: int, out: memoryview, flags: int) -> None:
        with self._translated(rid, "read"), self._borrow(rid) as fd:
            count = pread_full(fd, out, offset, flags)
        if count < len(out):
            raise CorruptTarget(
                f"read region {rid.hex()}: its file ends at {offset + count} bytes,"
                f" {len(out)} bytes at {offset} were expected"
            )

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        with self._translated(rid, "write"), self._borrow(rid) as fd:
            try:
                pwrite_full(fd, data, offset)
            finally:
                self._dirty.add(rid)  # not before: a sync that runs now may not see all of it

    write_beyond = write  # a file grows by itself, and cheaper than by ftruncate first

    def persist(self, rid: RegionID, offset: int, size: int) -> None:
        self._persist_file(rid)

    def _persist_file(self, rid: bytes) -> None:
        """Put the whole file on the medium, and its name."""
        self._check_failed(rid)
        # Even when nothing seems dirty: another persist of the region may still be waiting for
        # the medium, and this one may not return before it.
        self._dirty.discard(rid)
        with self._translated(rid, "persist"), self._borrow(rid) as fd, self._remembered(rid):
            os.fdatasync(fd)
        self._persist_name(rid)

    def _check_failed(self, rid: bytes) -> None:
        if failed := self._failed.get(rid):
            raise StorageError(failed)

    @contextlib.contextmanager
    def _remembered(self, rid: bytes) -> Iterator[None]:
        """Keep a failed sync in mind: the kernel reports it once and then calls the pages clean."""
        try:
            yield
        except OSError as error:
            self._failed[rid] = (
                f"persist region {rid.hex()}: a sync failed ({error.strerror}); what was"
                " written to it may be lost. Write it to a new region"
            )
            raise

    def _persist_name(self, rid: bytes) -> None:
        if rid in self._fresh:
            with self._translated(rid, "persist"):
                sync_directory(Path(self._path(rid)).parent)
                sync_directory(self.root)
            self._fresh.discard(rid)

    def persist_all(self) -> None:
        with self._lock:
            pending = self._dirty | self._fresh
        if len(pending) <= _SYNC_ONE_BY_ONE:
            for rid in pending:
                with contextlib.suppress(CorruptTarget):  # erased meanwhile
                    self._persist_file(rid)
            return
        self._dirty -= pending  # before the sync: what is written while it runs is dirty again
        try:
            _sync_file_system(self.root)
        except OSError as error:
            self._dirty |= pending
            raise errors.from_os(error, f"sync of {self.root}") from error
        self._fresh -= pending
        if self._failed:
            raise StorageError(next(iter(self._failed.values())))

    def view(self, rid: RegionID) -> memoryview | None:
        return None

    def share(self, rid: RegionID) -> int | None:
        with self._translated(rid, "share"), self._borrow(rid) as fd:
            return fd

    def room(self) -> tuple[int, int]:
        info = os.statvfs(self.root)
        if not info.f_blocks:
            return MAX_SIZE, MAX_SIZE  # a file system that does not tell, such as ramfs
        return info.f_frsize * info.f_blocks, info.f_frsize * info.f_bavail

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        for shard in sorted(self._shards):
            with os.scandir(self.root / shard) as entries:
                for entry in entries:
                    if len(entry.name) == 32:
                        with contextlib.suppress(ValueError):
                            yield RegionID(bytes.fromhex(entry.name)), entry.stat().st_size

    def close(self) -> None:
        with self._lock:
            for rid, held in self._descriptors.items():
                self._close(rid, held)
            self._descriptors.clear()

    def destroy(self) -> None:
        self.close()
        for shard in self._shards:
            shutil.rmtree(self.root / shard, ignore_errors=True)
        self._shards.clear()


def _sync_file_system(root: Path) -> None:
    """syncfs(2), which Python does not offer."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)
