"""The ``memory`` backend: regions in memfd files and shared segments.

A region of ``OWN_DESCRIPTOR`` bytes or more is a memfd of its own; smaller ones share memfd
*segments*, divided into slots of one size class each, so that a million of them need few
descriptors.  When descriptors run out, larger regions use segments, too.

Invariant: the bytes of a slot beyond its region's size are zero, and so are those of a free
slot.  So growing within a slot and allocating one need no clearing.

A region without bytes has a slot without bytes, since it is about to get its size.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

from warabi import errors
from warabi._core import descriptors, forks
from warabi._core.fileio import copy_file, data_from, hole_from, pread_full, punch
from warabi.backends.base import KERNEL, STRANGERS, THIS_PROCESS, Fresh, Location, Storage
from warabi.backends.memfd import Populated
from warabi.backends.memory_budget import PAGE, MemoryBudget
from warabi.backends.memory_pool import Own, Spare
from warabi.backends.record import Backend
from warabi.backends.settings import Bytes, Model
from warabi.region import RegionID
from warabi.shm.memory import SharedMemory

OWN_DESCRIPTOR = 64 * 1024
"""From this size in bytes on a region has its own descriptor."""
_ZEROS = memoryview(bytes(OWN_DESCRIPTOR))
_SEGMENT = 4 * 1024 * 1024
_SMALLEST = 64
_COPY = 1024 * 1024
_STEP = 32 * 1024 * 1024  # bytes that are freed at once
_SPARE_DESCRIPTORS = 256
_ROW = 1024
"""Approximate overhead of a region in bytes."""
_MAPPINGS = 4096  # most mappings of large regions: a process can have some 65,000 in all


class _Segment:
    """A mapped memfd divided into slots of one size."""

    __slots__ = (
        "__weakref__", "_memory", "free", "fresh", "number", "punched", "slot_size", "view",
    )  # fmt: skip

    def __init__(self, slot_size: int, number: int) -> None:
        self.slot_size = slot_size
        self.number = number
        # Sealed: holders of the descriptor cannot truncate what is mapped here.
        self._memory = SharedMemory("warabi-segment", max(slot_size, _SEGMENT))
        self.view = self._memory.view
        self.fresh = 0  # slots from this offset on were never used
        self.free: list[int] = []  # offsets of slots that were used and freed
        self.punched: list[int] = []  # of those, slots whose memory was freed, too

    @property
    def fd(self) -> int:
        return self._memory.fd

    @property
    def full(self) -> bool:
        left = self.free or self.punched
        return not left and self.fresh + self.slot_size > len(self.view)

    @property
    def empty(self) -> bool:
        return (len(self.free) + len(self.punched)) * self.slot_size == self.fresh

    @property
    def taken(self) -> int:
        """The most bytes of memory that it uses."""
        return self.fresh - len(self.punched) * self.slot_size

    @property
    def spare(self) -> int:
        """Bytes of memory that :meth:`give_back` can free."""
        return len(self.free) * self.slot_size if self.slot_size >= PAGE else 0

    def give_back(self, size: int) -> None:
        """Free the memory of free slots, *size* bytes if there are so many; raises as
        :func:`punch`."""
        for _ in range(min(len(self.free), -(-size // self.slot_size))):
            punch(self.fd, self.free[-1], self.slot_size)
            self.punched.append(self.free.pop())

    def take(self) -> int:
        """Return the offset of a free slot; the segment must not be full."""
        if self.free:
            return self.free.pop()
        if self.punched:
            return self.punched.pop()
        offset = self.fresh
        self.fresh += self.slot_size
        return offset

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._memory.close(discard=True)


class _Slot:
    """A small region: a part of a segment."""

    __slots__ = ("offset", "segment", "size")

    def __init__(self, segment: _Segment, offset: int, size: int) -> None:
        self.segment = segment
        self.offset = offset
        self.size = size

    def view(self) -> memoryview:
        return self.segment.view[self.offset : self.offset + self.size]


def _read(item: _Slot | Own, offset: int, out: memoryview) -> None:
    if isinstance(item, _Slot):
        start = item.offset + offset
        out[:] = item.segment.view[start : start + len(out)]
    else:
        pread_full(item.fd, out, offset)


def _clear(view: memoryview) -> None:
    size = len(view)
    view[:] = _ZEROS[:size] if size <= OWN_DESCRIPTOR else bytes(size)


def _write(item: _Slot | Own, offset: int, data: memoryview) -> None:
    if isinstance(item, _Slot):
        start = item.offset + offset
        item.segment.view[start : start + len(data)] = data
    else:
        item.write(offset, data)


class MemoryConfig(Model):
    """Settings of the ``memory`` backend."""

    capacity: Bytes | None = None


class _Fresh(Fresh):
    """A large region before its creation."""

    __slots__ = ("_own", "_storage")

    def __init__(self, storage: MemoryStorage, own: Own) -> None:
        self._storage = storage
        self._own: Own | None = own

    def become(self, rid: RegionID) -> None:
        if self._own is not None:
            self._storage.adopt(rid, self._own)
            self._own = None

    def discard(self) -> None:
        if self._own is not None:
            self._own.discard()
            self._own = None


class MemoryStorage(Storage):
    """Regions that last as long as their process.

    Args:
        limit: most bytes of memory for them, holes not counted; None for what the machine and
            the control groups of this process can provide, less a reserve.
        others: returns the bytes of that memory that something else uses: the catalogue.
    """

    blocking: ClassVar[bool] = False

    def __init__(self, limit: int | None = None, others: Callable[[], int] = int) -> None:
        self._regions: dict[bytes, _Slot | Own] = {}
        # Protects the allocation of slots; the data of a region need no lock (see Storage).
        self._lock = forks.lock()
        self._open: dict[int, list[_Segment]] = {}  # segments with free slots, by slot size
        self._numbers = itertools.count(1)
        self._own = 0  # large regions
        self._spare = Spare()
        most = descriptors.limit()
        self._most_mappings = min(_MAPPINGS, most // 8)
        self._mappings: dict[Own, None] = {}  # oldest first; each also uses a descriptor
        self._own_limit = max(64, most - _SPARE_DESCRIPTORS - self._most_mappings)
        self._segments: weakref.WeakSet[_Segment] = weakref.WeakSet()
        self._taken = 0  # by large regions, when last measured
        self._unsure: set[Own] = set()  # regions that may use more by now
        self._lent: set[Own] = set()  # regions that other processes may fill without a request
        self._others = others
        self._budget = MemoryBudget(limit, self._used, self._promised, self._relieve)

    def _used(self) -> int:
        """Return the bytes of memory in use, without pending writes."""
        for own in [*self._unsure]:
            with self._lock:
                if own in self._unsure:  # else it was freed meanwhile
                    self._unsure.discard(own)
                    self._taken += own.look()
        with self._lock:
            segments = sum(segment.taken for segment in self._segments)
            regions = self._taken + segments + self._spare.size + len(self._regions) * _ROW
        return regions + self._others()

    def _promised(self) -> int:
        """Return the bytes of memory that other processes may still fill without a request."""
        promised = 0
        for own in [*self._lent]:
            with self._lock:
                if own not in self._lent:  # freed meanwhile
                    continue
                self._taken += own.look()
                if (rest := own.size - own.taken) > 0:
                    promised += rest
                else:
                    self._lent.discard(own)
        return promised

    def charge(self, count: int) -> None:
        """Reserve *count* bytes of memory for something else.

        Raises:
            StorageFull: there is too little memory.
        """
        self._budget.charge(count)

    def _relieve(self, size: int) -> None:
        """Free at least *size* bytes of spare memory, if there are so many."""
        with self._lock:
            size -= self._spare.size
            self._spare.clear()
            for segment in self._segments:
                if size <= 0:
                    break
                if spare := segment.spare:
                    segment.give_back(size)
                    size -= spare

    def _promise(self, item: _Slot | Own) -> bool:
        """Reserve memory for a region's holes, so that other processes may fill it; whether it
        fits."""
        if isinstance(item, Own) and item.filled < item.size and item not in self._lent:
            try:
                self._budget.charge(item.size - item.filled)
            except errors.StorageFull:
                return False
            self._lent.add(item)
        return True

    def create(self, rid: RegionID, size: int) -> None:
        self._charge_place(size, 0)
        with self._lock:
            self._regions[rid] = self._allocate(size)

    def written(self, data: memoryview) -> Fresh | None:
        return self._fresh(len(data), THIS_PROCESS, lambda own: own.replace(data))

    def cleared(self, size: int, holder: int) -> Fresh | None:
        return self._fresh(size, holder, Own.clear)

    def _fresh(self, size: int, holder: int, fill: Callable[[Own], None]) -> Fresh | None:
        """Return spare memory that *fill* has prepared; None if there is none."""
        if size < OWN_DESCRIPTOR:
            return None
        try:
            with self._lock:
                own = self._spare.take(size, holder)
            if own is None:
                return None
            try:
                self._budget.charge(_ROW)  # the memory itself is already counted
                fill(own)
            except BaseException:
                own.discard()
                raise
        except (OSError, errors.StorageFull):
            return None  # use new memory instead, which reports errors
        return _Fresh(self, own)

    def adopt(self, rid: RegionID, own: Own) -> None:
        """Create a region whose memory is *own*, which exists already."""
        with self._lock:
            self._regions[rid] = own
            self._own += 1
            self._unsure.add(own)
            self._note_mapped(own)

    def _allocate(self, size: int) -> _Slot | Own:
        try:
            try:
                return self._place(size)
            except OSError as error:
                if not descriptors.are_short(error):
                    raise
                # Caches of spare memory and mappings hold some.
                self._spare.clear()
                for own in [*self._mappings]:
                    self._unmap(own)
                return self._place(size)
        except (OSError, ValueError, OverflowError) as error:
            if not isinstance(error, OSError):
                error = OSError(12, str(error))
            raise errors.from_os(error, f"memory region of {size} bytes") from error

    def _place(self, size: int) -> _Slot | Own:
        """Allocate a memfd or a slot; raises ``OSError``, ``ValueError``, ``OverflowError``."""
        if size >= OWN_DESCRIPTOR and self._own < self._own_limit:
            self._spare.relieve()
            if len(self._spare) and self._own + len(self._spare) >= self._own_limit:
                self._spare.shrink()
            own = Own(size)
            self._own += 1
            return own
        return self._allocate_slot(size)

    def _allocate_slot(self, size: int) -> _Slot:
        slot_size = self._slot_size(size)
        segments = self._open.setdefault(slot_size, [])
        if not segments:
            segments.append(_Segment(slot_size, next(self._numbers)))
            self._segments.add(segments[-1])
        segment = segments[-1]
        slot = _Slot(segment, segment.take(), size)
        if segment.full:
            segments.pop()
        return slot

    @staticmethod
    def _slot_size(size: int) -> int:
        return max(_SMALLEST, 1 << (size - 1).bit_length()) if size else 0

    def _free(self, item: _Slot | Own) -> None:
        if isinstance(item, Own):
            self._forget(item)
            self._own -= 1
            self._mappings.pop(item, None)
            item.mapping = None
            if not self._spare.keep(item):
                item.discard()
            return
        segment = item.segment
        if not segment.slot_size:
            return
        _clear(item.view())
        segments = self._open.setdefault(segment.slot_size, [])
        if segment.full:
            segments.append(segment)
        segment.free.append(item.offset)
        if segment.empty and len(segments) > 1:
            segments.remove(segment)  # not the last of its size: free its memory

    def _forget(self, item: Own) -> None:
        """Stop counting the memory of a large region; the lock is held."""
        self._taken -= item.taken
        item.taken = 0
        self._unsure.discard(item)
        self._lent.discard(item)

    def erase(self, rid: RegionID) -> None:
        with self._lock:
            self._free(self._regions.pop(rid))

    def resize(self, rid: RegionID, size: int) -> None:
        if self.moves(rid, size):
            self._charge_move(rid, size)
        self._shrink_long(rid, size)
        with self._lock:
            item = self._regions[rid]
            if isinstance(item, Own):
                # Never back to a slot: a region that shrinks often grows again.
                if size < item.size:
                    self._unsure.add(item)
                elif size > item.size:
                    item.sparse = True
                try:
                    item.resize(size)
                except OSError as error:
                    raise errors.from_os(error, f"resize to {size} bytes") from error
                if item.mapping is not None and size < len(item.mapping):
                    self._unmap(item)
            elif size <= item.segment.slot_size:
                if size < item.size:
                    _clear(item.view()[size:])
                item.size = size
            else:
                self._move(rid, size)
                self._free(item)

    def _shrink_long(self, rid: RegionID, size: int) -> None:
        """Free most of what a region shrinks by, which takes long, without the lock."""
        with self._lock:
            item = self._regions[rid]
            if isinstance(item, _Slot) or item.size - size <= _STEP:
                return
            self._unmap(item)
            self._unsure.add(item)
        try:
            step = max(_STEP, (item.size - size) // 1000)  # most of such a large region is a hole
            for end in range(item.size - step, size, -step):
                item.resize(end)
        except OSError as error:
            raise errors.from_os(error, f"resize to {size} bytes") from error

    def allocate(self, rid: RegionID, offset: int, size: int) -> None:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            return  # whose memory counts since it was handed out
        try:
            self._budget.charge(item.holes(offset, size))
            try:
                item.allocate(offset, offset + size)
            finally:
                self._unsure.add(item)
        except OSError as error:
            raise errors.from_os(error, f"allocate {size} bytes") from error

    def zero(self, rid: RegionID, offset: int, size: int, *, free: bool) -> None:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            start = item.offset + offset
            _clear(item.segment.view[start : start + size])
            return
        self._expect_holes(item, offset)
        try:
            step = max(_STEP, size // 1000)
            for start in range(offset, offset + size, step):
                punch(item.fd, start, min(step, offset + size - start))
        except OSError as error:
            raise errors.from_os(error, f"zero {size} bytes") from error
        if not free:
            self.allocate(rid, offset, size)

    def _expect_holes(self, item: Own, offset: int) -> None:
        """Bytes from *offset* on may become holes, which other processes may fill if they have the
        region's descriptor.  There is no view of it."""
        with self._lock:
            self._unmap(item)
            item.filled = min(item.filled, offset)
            item.sparse = True
            self._unsure.add(item)
            if item.holder != THIS_PROCESS:
                self._lent.add(item)

    def space(self, rid: RegionID, size: int) -> int:
        item = self._regions.get(rid)
        return os.fstat(item.fd).st_blocks * 512 if isinstance(item, Own) else size

    def leaves_holes(self, size: int) -> bool:
        return size >= OWN_DESCRIPTOR

    def seek(self, rid: RegionID, offset: int, end: int, *, hole: bool) -> int:
        item = self._regions[rid]
        if isinstance(item, _Slot):
            return super().seek(rid, offset, end, hole=hole)
        return (hole_from if hole else data_from)(item.fd, offset, end)

    def copy_range(
        self, source: RegionID, start: int, rid: RegionID, offset: int, size: int
    ) -> None:
        item, target = self._regions[source], self._regions[rid]
        if isinstance(item, _Slot) or isinstance(target, _Slot):
            super().copy_range(source, start, rid, offset, size)
            return
        filled, end = target.filled, offset + size
        try:
            self._budget.charge(min(target.holes(offset, size), os.fstat(item.fd).st_blocks * 512))
            self._expect_holes(target, offset)
            copy_file(item.fd, target.fd, size, start, offset)
            if offset <= filled and hole_from(target.fd, offset, end) == end:
                target.filled = max(filled, end)
        except OSError as error:
            raise errors.from_os(error, f"copy of {size} bytes") from error
        finally:
            self._unsure.add(target)

    def read_into(self, rid: RegionID, offset: int, out: memoryview) -> None:
        _read(self._regions[rid], offset, out)

    read_into_nowait = read_into

    def view(
        self, rid: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> memoryview | None:
        item, end = self._regions[rid], offset + size
        if isinstance(item, _Slot):
            found = item.view()[offset:end]
        elif end > item.filled or (mapping := self._mapped(item, end)) is None:
            return None
        else:
            found = mapping.view(offset, end)
        return found if writable else found.toreadonly()

    def _mapped(self, item: Own, end: int) -> Populated | None:
        """Return a mapping of at least the first *end* bytes of a region; None if that fails."""
        mapping = item.mapping
        if mapping is None or len(mapping) < end:
            with self._lock:
                try:
                    mapping = item.map()
                except OSError:
                    return None
                self._note_mapped(item)
        return mapping

    def _note_mapped(self, item: Own) -> None:
        self._mappings[item] = None
        if len(self._mappings) > self._most_mappings:
            self._unmap(next(iter(self._mappings)))

    def _unmap(self, item: Own) -> None:
        item.mapping = item.warm = None
        self._mappings.pop(item, None)

    def write(self, rid: RegionID, offset: int, data: memoryview) -> None:
        item = self._regions[rid]
        charged = None
        if isinstance(item, Own) and offset + len(data) > item.filled:
            charged = item
            try:
                self._budget.charge(item.missing(offset, len(data)))
            except errors.StorageFull:
                # It may be allocated already; finding out takes system calls.
                self._budget.charge(item.holes(offset, len(data)))
        try:
            _write(item, offset, data)
        except OSError as error:
            raise errors.from_os(error, f"write of {len(data)} bytes") from error
        finally:
            if charged is not None:
                self._unsure.add(charged)

    def write_beyond(self, rid: RegionID, offset: int, data: memoryview) -> None:
        item = self._regions[rid]
        fresh = (
            self.written(data) if isinstance(item, _Slot) and not (item.size or offset) else None
        )
        if fresh is None:
            sparse = offset > item.size or (isinstance(item, Own) and item.sparse)
            super().write_beyond(rid, offset, data)
            if isinstance(item := self._regions[rid], Own):  # it may have been a slot before
                item.sparse = sparse
            return
        fresh.become(rid)
        with self._lock:
            self._free(item)

    def persist(self, rid: RegionID, offset: int, size: int, *, times: bool = False) -> None:
        """No effect: memory is never durable."""

    def persist_all(self) -> None:
        """No effect: memory is never durable."""

    def wrote(self, rid: bytes) -> None:
        """No effect: memory is never durable."""

    def grew(self, rid: bytes, size: int) -> None:
        with self._lock:
            item = self._regions[rid]
            item.size = size
            if isinstance(item, Own):
                item.extent = size
                self._unsure.add(item)

    def persist_names(self) -> None:
        """No effect: memory is never durable."""

    def oldest_fresh(self) -> RegionID | None:
        return None

    def sync_found(self) -> None:
        """No effect: nothing survives a crash."""

    def moves(self, rid: RegionID, size: int) -> bool:
        item = self._regions[rid]
        return isinstance(item, _Slot) and size > item.segment.slot_size

    def _charge_move(self, rid: RegionID, size: int) -> None:
        """Reserve memory before moving a region; without the lock, which measuring acquires."""
        self._charge_place(size, min(size, self._regions[rid].size))

    def _charge_place(self, size: int, filled: int) -> None:
        """Reserve memory before allocating a region of *size* bytes, *filled* of them with data."""
        if size < OWN_DESCRIPTOR or self._own >= self._own_limit:
            slot_size = self._slot_size(size)
            segments = self._open.get(slot_size, [])[-1:]  # another thread may remove it
            filled = 0 if segments and segments[0].free else slot_size
        self._budget.charge(_ROW + filled)

    def replace(self, rid: RegionID, size: int) -> Callable[[], None]:
        self._charge_move(rid, size)
        with self._lock:
            item = self._regions[rid]
            self._move(rid, size)

        def free() -> None:
            with self._lock:
                self._free(item)

        return free

    def _move(self, rid: RegionID, size: int) -> None:
        """Copy a region to a new location of *size* bytes; the old one is not freed."""
        item = self._regions[rid]
        kept = min(size, item.size)
        fresh = self._allocate(size)
        if isinstance(fresh, Own):
            self._unsure.add(fresh)
            fresh.sparse = size > kept
        for start in range(0, kept, _COPY):
            piece = memoryview(bytearray(min(_COPY, kept - start)))
            _read(item, start, piece)
            _write(fresh, start, piece)
        self._regions[rid] = fresh

    def share(self, rid: RegionID, *, writable: bool, holder: int = STRANGERS) -> Location | None:
        if writable and not self._promise(self._regions[rid]):
            return None
        with self._lock:
            item = self._regions[rid]
            if isinstance(item, Own):
                if holder == KERNEL and item.sealed:
                    return None  # its end may not be where the region's is
                # A read-only guest creates no regions for which the memory could be reused.
                holder = holder if writable or holder == KERNEL else STRANGERS
                self._spare.given(item, holder)
                # Reading a mapping fills holes: only those whose memory was reserved may be.
                reserved = writable or item in self._lent
                mapped = item.filled >= item.size or (reserved and not item.sparse)
                return Location(_duplicate(item.fd, writable), 0, None, segment=0, mapped=mapped)
            segment = item.segment
            return Location(
                _duplicate(segment.fd, writable), item.offset, segment.slot_size,
                segment=segment.number, mapped=True,
            )  # fmt: skip

    def left(self, holder: int) -> None:
        with self._lock:
            self._spare.left(holder)

    def vacate(self, rid: RegionID) -> None:
        """No effect: erasing frees the memory even if other processes hold a descriptor."""

    def metadata_durable(self, rid: RegionID) -> bool:
        """Always true: memory is never durable."""
        return True

    def room(self) -> tuple[int, int]:
        total, available = self._budget.room()
        # Spare memory is freed when little is left.
        with self._lock:
            spare = self._spare.size + sum(segment.spare for segment in self._segments)
        return total, min(total, available + spare)

    def scan(self) -> Iterator[tuple[RegionID, int]]:
        return ((RegionID(rid), item.size) for rid, item in list(self._regions.items()))

    def close(self) -> None:
        with self._lock:
            for item in self._regions.values():
                if isinstance(item, Own):
                    os.close(item.fd)
            self._regions.clear()
            self._spare.clear()
            self._unsure.clear()
            self._lent.clear()
            self._mappings.clear()
            self._open.clear()

    destroy = close


def _duplicate(fd: int, writable: bool) -> int:
    """Open the same memory again, for another process.

    Not dup(2): the flags of the open file, such as ``O_APPEND``, would be shared, and with that one
    set pwrite(2) ignores the offset.
    """
    return os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)


BACKEND = Backend(
    name="memory",
    config=MemoryConfig,
    storage=MemoryStorage,
    open=lambda settings, root: MemoryStorage(),
    in_memory=MemoryStorage,
)
