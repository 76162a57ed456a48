"""Regions in memory.

A region of ``OWN_DESCRIPTOR`` bytes or more is a memfd of its own; smaller ones share memfd
*segments*, cut into slots of one size class each, so that a million of them cost no descriptors.
When descriptors run out, larger regions go to segments too.

Invariant: the bytes of a slot beyond its region's size are zero, and so are those of a free
slot.  Growing inside a slot and handing one out need no clearing then.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from typing import ClassVar

from warabi import errors
from warabi.backends.base import Storage, pread_full, pwrite_full
from warabi.region import RegionID

OWN_DESCRIPTOR = 64 * 1024
"""From this size on, in bytes, a region has a descriptor of its own."""
_SEGMENT = 4 * 1024 * 1024
_SMALLEST = 64
_SPARE_DESCRIPTORS = 256


class _Segment:
    """A mapped memfd cut into slots of one size."""

    __slots__ = ("fd", "free", "fresh", "slot_size", "view")

    def __init__(self, slot_size: int) -> None:
        self.slot_size = slot_size
        size = max(slot_size, _SEGMENT)
        self.fd = os.memfd_create("warabi-segment", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        # Dropping the last view unmaps, whoever holds it.
        self.view = memoryview(mmap.mmap(self.fd, size))
        self.fresh = 0  # slots from this offset on were never handed out
        self.free: list[int] = []  # offsets that were, and came back

    @property
    def full(self) -> bool:
        return not self.free and self.fresh + self.slot_size > len(self.view)

    @property
    def empty(self) -> bool:
        return len(self.free) * self.slot_size == self.fresh

    def take(self) -> int:
        """The offset of a free slot; the segment is not full."""
        if self.free:
            return self.free.pop()
        offset = self.fresh
        self.fresh += self.slot_size
        return offset

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _Slot:
    """A small region: a piece of a segment."""

    __slots__ = ("offset", "segment", "size")

    def __init__(self, segment: _Segment, offset: int, size: int) -> None:
        self.segment = segment
        self.offset = offset
        self.size = size

    def view(self) -> memoryview:
        return self.segment.view[self.offset : self.offset + self.size]


class _Own:
    """A large region: a memfd."""

    __slots__ = ("fd", "mapping", "size")

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("warabi-region", os.MFD_CLOEXEC)
        self.size = size
        self.mapping: memoryview | None = None
        try:
            os.ftruncate(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise


class MemoryStorage(Storage):
    """Regions that last as long as their process."""

    blocking: ClassVar[bool] = False

    def __init__(self) -> None:
        self._regions: dict[bytes, _Slot | _Own] = {}
        # Guards the slots' book-keeping; the bytes of a region need no lock (see Storage).
        self._lock = threading.Lock()
        self._open: dict[int, list[_Segment]] = {}  # segments with free slots, by slot size
        self._own = 0
        self._own_limit = max(64, _descriptor_limit() - _SPARE_DESCRIPTORS)

    def create(self, rid: RegionID, size: int) -> None:
        with self._lock:
            self._regions[rid] = self._allocate(size)

    def _allocate(self, size: int) -> _Slot | _Own:
        try:
            if size >= OWN_DESCRIPTOR and self._own < self._own_limit:
                own = _Own(size)
                self._own += 1
                return own
            return self._allocate_slot(size)
        except (OSError, ValueError, OverflowError) as error:
            if not isinstance(error, OSError):
                error = OSError(12, str(error))
            raise errors.from_os(error, f"memory region of {size} bytes") from error

    def _allocate_slot(self, size: int) -> _Slot:
        slot_size = max(_SMALLEST, 1 << (size - 1).bit_length()) if size else _SMALLEST
        segments = self._open.setdefault(slot_size, [])
        if not segments:
            segments.append(_Segment(slot_size))
        segment = segments[-1]
        slot = _Slot(segment, segment.take(), size)
        if segment.full:
            segments.pop()
        return slot

    def _free(self, item: _Slot | _Own) -> None:
        if isinstance(item, _Own):
            self._own -= 1
            item.mapping = None
            os.close(item.fd)
            return
        segment = item.segment
        item.view()[:] = bytes(item.size)
        segments = self._open.setdefault(segment.slot_size, [])
        if segment.full:
            segments.append(segment)
        segment.free.append(item.offset)
        if segment.empty and len(segments) > 1:
            segments.remove(segment)  # not the last of its size: its memory goes back

    def erase(self, rid: RegionID) -> None:
        with self._lock:
            self._free(self._regions.pop(rid))

    def resize(self, rid: RegionID, size: int) -> None:
        with self._lock:
            item = self._regions[rid]
            if isinstance(item, _Own):
                # Never back to a slot: a region that shrinks is about to grow again.
                item.mapping = None
                try:
                    os.ftruncate(item.fd, size)
                except OSError as error:
                    raise errors.from_os(error, f"resize to {size} bytes") from error
                item.size = size
            elif size <= item.segment.slot_size:
                if size < item.size:
                    item.view()[size:] = bytes(item.size - size)
                item.size = size
            else:
                fresh = self._allocate(size)
                if isinstance(fresh, _Own):
                    pwrite_full(fresh.fd, item.view(), 0)
                else:
                    fresh.view()[: item.size] = item.view()
                self._regions[rid] = fresh
                self._free(item)

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            start = item.offset + offset
            out[:] = item.segment.view[start : start + len(out)]
        else:
            pread_full(item.fd, out, offset)

    read_into_nowait = read_into

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            start = item.offset + offset
            item.segment.view[start : start + len(data)] = data
        else:
            try:
                pwrite_full(item.fd, data, offset)
            except OSError as error:
                raise errors.from_os(error, f"write of {len(data)} bytes") from error

    def persist(self, rid: RegionID, offset: int, size: int) -> None:
        """Memory is as durable as it gets."""

    def persist_all(self) -> None:
        """Memory is as durable as it gets."""

    def view(self, rid: RegionID) -> memoryview | None:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            return item.view()
        with self._lock:
            if item.mapping is None and item.size:
                item.mapping = memoryview(mmap.mmap(item.fd, item.size))
            return item.mapping or memoryview(b"")

    def share(self, rid: RegionID) -> int | None:
        item = self._regions[rid]
        return item.fd if isinstance(item, _Own) else None

    def room(self) -> tuple[int, int]:
        with open("/proc/meminfo", encoding="ascii") as file:
            info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return info["MemTotal"] + info["SwapTotal"], info["MemAvailable"] + info["SwapFree"]

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        return ((RegionID(rid), item.size) for rid, item in list(self._regions.items()))

    def close(self) -> None:
        with self._lock:
            for item in self._regions.values():
                if isinstance(item, _Own):
                    item.mapping = None
                    os.close(item.fd)
            self._regions.clear()
            self._open.clear()

    destroy = close


def _descriptor_limit() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
