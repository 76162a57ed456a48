"""Regions in persistent memory, or in files treated alike: space is reserved, ranges are flushed.

One file per region, as in ``FileStorage``, whose locks and rules apply here, too.  A mapping
belongs to the open descriptor of its region; it is dropped with it, and when the region is resized.
Data are accessed with ``preadv`` and ``pwrite``, never through the mapping: see docs/design.md.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, StrictBool

from warabi.backends.base import STRANGERS, THIS_PROCESS, Location, Storage
from warabi.backends.fd_cache import OpenFile
from warabi.backends.file import FileStorage, flush
from warabi.backends.range_flush import FlushMapping, PageCacheMapping, map_persistent
from warabi.backends.record import Backend, Plan, usual_plan
from warabi.backends.settings import Bytes, PathModel
from warabi.errors import CorruptTarget
from warabi.region import RegionID

_MOST_MAPPINGS = 16384
"""Most open regions; Linux allows a process 65530 mappings, for everything it maps."""


SMALLEST_POOL = 8 * 1024 * 1024
"""Smallest size of a target in bytes, as for PMDK's pools."""


def _no_pool_or_large(size: int) -> int:
    if 0 < size < SMALLEST_POOL:
        raise ValueError(f"expected 0 or at least {SMALLEST_POOL}")
    return size


class PmemConfig(PathModel):
    """Settings of the ``pmem`` backend, also called ``pmdk``."""

    create_if_missing_with_size: Annotated[Bytes, AfterValidator(_no_pool_or_large)] = 0
    override_if_exists: StrictBool = False
    checksums: StrictBool | None = None


class PmemStorage(FileStorage):
    """Regions as files below *root* whose space is reserved, and of which ranges are flushed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._limit = min(self._limit, _MOST_MAPPINGS)
        self._mappings: dict[bytes, FlushMapping] = {}
        self._persistent = True  # until libpmem reports that a file is not in persistent memory
        # Created or resized since their metadata were flushed.
        self._unsettled: set[bytes] = set()
        self._shared: set[bytes] = set()  # whose files are shared with other processes

    def _close(self, rid: bytes, held: OpenFile) -> None:
        self._unmap(rid)
        super()._close(rid, held)

    def _unmap(self, rid: bytes) -> None:
        if mapping := self._mappings.pop(rid, None):
            mapping.close()

    def set_size(self, fd: int, size: int) -> None:
        old = os.fstat(fd).st_size
        if size <= old:
            os.ftruncate(fd, size)
            return
        # Checked first: the attempt would temporarily use all available space.
        if size - old > self.room()[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            os.posix_fallocate(fd, old, size - old)
        except BaseException:
            os.ftruncate(fd, old)  # frees what was reserved before the error
            raise

    def create(self, rid: RegionID, size: int) -> None:
        super().create(rid, size)
        self._unsettled.add(rid)

    def erase(self, rid: RegionID) -> None:
        self._unsettled.discard(rid)
        self._shared.discard(rid)
        super().erase(rid)

    def leaves_holes(self, size: int) -> bool:
        return False

    def resize(self, rid: RegionID, size: int) -> None:
        with self._lock:
            self._unmap(rid)
        self._unsettled.add(rid)
        super().resize(rid, size)

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        self._unsettled.add(rid)
        super().allocate(rid, offset, size)

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        self._unsettled.add(rid)
        super().zero(rid, offset, size, free=free)

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        self._unsettled.add(rid)  # holes are copied, too
        super().copy_range(source, start, rid, offset, size)

    write_beyond = Storage.write_beyond  # which reserves space before it writes

    view = Storage.view  # not supported: persistent memory has no page cache

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        with (
            self._syncing(rid) as others,
            self.translated(rid, "persist"),
            self.borrow(rid) as fd,
        ):
            length = self._check_end(rid, fd, "persist", offset + size)
            unsettled = rid in self._unsettled
            mapping = self._mapping(rid, fd, length) if size else None
            if mapping is not None and mapping.size < offset + size:
                raise CorruptTarget(
                    f"persist region {rid.hex()}: the size of its file was changed from outside"
                )
            with self._under_way({rid} if size == length else set()), self._remembered(rid):
                cached = isinstance(mapping, PageCacheMapping)
                if others and cached:
                    with self._own(rid) as own:
                        flush(own, times=times)
                elif times:
                    os.fsync(fd)
                elif unsettled and not cached:
                    os.fdatasync(fd)  # the metadata that msync would flush
                if mapping is not None and not ((times or others) and cached):
                    mapping.flush(offset, size, shared=rid in self._shared)
            self._unsettled.discard(rid)
        self.persist_name(rid)

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        if holder != THIS_PROCESS:
            self._shared.add(rid)  # before a persist can overlap with their access
        return super().share(rid, writable=writable, holder=holder)

    def metadata_durable(self, rid: RegionID) -> bool:
        return super().metadata_durable(rid) and rid not in self._unsettled

    def _mapping(self, rid: bytes, fd: int, length: int) -> FlushMapping:
        with self._lock:
            mapping = self._mappings.get(rid)
            if mapping is None:
                mapping = map_persistent(fd) if self._persistent else None
                self._persistent = mapping is not None
                self._mappings[rid] = mapping = mapping or PageCacheMapping(fd, length)
            return mapping


def _plan(settings: PmemConfig) -> Plan:
    return usual_plan(settings)._replace(
        create=bool(settings.create_if_missing_with_size),
        creation="create_if_missing_with_size",
        pool=settings.create_if_missing_with_size or None,
    )


BACKEND = Backend(
    name="pmem",
    aliases=("pmdk",),
    config=PmemConfig,
    storage=PmemStorage,
    open=lambda settings, root: PmemStorage(root),
    existing=FileStorage,
    plan=_plan,
    spelled=False,  # a new target needs a size
    fsck=True,
)
