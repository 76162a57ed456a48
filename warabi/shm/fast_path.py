"""Reads and writes of a guest in granted regions, in Python.

This is the frequent side of the protocol in ``target/leases.py``: it needs no system call for
regions in memory, and no lock, since a hazard slot belongs to one access while it is not in the
list of free ones.  ``_fast_path.c`` is the same, compiled; ``client.py`` chooses, and has what both
have in common.
"""

from __future__ import annotations

import os
from collections import deque
from os import RWF_NOWAIT, preadv, pwrite
from time import time_ns
from typing import Any

from warabi._core.buffers import MAX_SIZE
from warabi._core.fileio import pread_full, pwrite_full
from warabi.region import RegionID
from warabi.shm.memory import SharedMapping, copy

_RECENT = 4096
_RESOLUTION = 10_000_000  # ns: resolution of the coarsest clock
_FLAT = (bytes, bytearray)
_NOTHING = memoryview(b"")


class Grant:
    """A region that may be accessed, in a file or in memory.

    Args:
        index: where in the table its version and its size are.
        version: the version for as long as this grant is valid.
        room: bytes that can be accessed, whatever the size; negative if the grant was refused.
        fd: the file; closed when this object is deallocated.
        keeper: keeps *view*, or *fd*, which then is not closed here, valid.
        view: the memory.
        start: where the region begins in the file or the memory.

    Raises:
        ValueError: *room* exceeds the memory.
    """

    __slots__ = (
        "entry",
        "fd",
        "index",
        "keeper",
        "owns",
        "room",
        "start",
        "version",
        "view",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        version: int,
        room: int,
        fd: int = -1,
        keeper: object = None,
        view: memoryview = _NOTHING,
        start: int = 0,
    ) -> None:
        self.owns = False
        if start < 0 or room > MAX_SIZE - start or (fd < 0 and room > len(view) - start):
            raise ValueError("Grant: the capacity exceeds the mapping")
        self.index = index
        self.entry = 2 * index
        self.version = version
        self.room = room
        self.fd = fd
        self.owns = fd >= 0 and keeper is None
        self.keeper = keeper
        self.start = start
        self.view = view[start:] if start else view

    def __del__(self) -> None:
        if self.owns:
            os.close(self.fd)


class Reach:
    """Accesses granted regions.

    Args:
        life: has the liveness word of the provider.
        table, write_times, hazards: as in ``target/leases.py``.
        word: index of the liveness word in *life*, in words of 4 bytes.
        alive: its value while the provider lives.
        writable: whether regions may be written.

    Attributes:
        grants: by region.
        table: its words, of 8 bytes.
        usable: whether accesses are allowed.
        writable: as above.
        in_memory: whether files of regions are, so that reading them never waits for a device.
    """

    def __init__(
        self,
        life: SharedMapping,
        table: SharedMapping,
        write_times: SharedMapping,
        hazards: SharedMapping,
        word: int,
        alive: int,
        writable: bool,
    ) -> None:
        self._mappings = (life, table, write_times, hazards)  # keeps the memory of the views mapped
        self._life = life.view.cast("I")
        self.table, self._write_times, self._hazards = (
            m.view.cast("Q") for m in (table, write_times, hazards)
        )
        self._word = word
        self._alive = alive
        self._free = list(range(len(self._hazards)))
        # Takes a free hazard slot.  An iterator, so that a signal handler that raises (Ctrl-C)
        # cannot run between removing the slot from the list and the `try` that returns it: handlers
        # run after calls, and there is none.
        self._next_free = iter(self._free.pop, None)
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self.grants: dict[bytes, Grant] = {}
        self.writable = writable
        self.usable = True
        self.in_memory = False

    @property
    def living(self) -> bool:
        """Whether the provider lives."""
        return self._life[self._word] == self._alive

    @property
    def busy(self) -> int:
        """Number of pending accesses."""
        return len(self._hazards) - len(self._free)

    @property
    def recent(self) -> tuple[int, ...]:
        """The last-write times that this guest stored most recently."""
        return tuple(self._recent)

    def _drop(self, region: bytes, grant: Grant) -> None:
        """Called with a grant that is no longer valid."""
        raise NotImplementedError

    def _failure(self, region: bytes, error: OSError) -> Exception:
        """Return the exception to raise for an I/O error."""
        raise NotImplementedError

    def size(self, region: bytes, /) -> int:
        """Return the size of a granted region in bytes; -1 if the provider must be asked."""
        grant = self.grants.get(region)
        if grant is None or self._life[self._word] != self._alive:
            return -1
        size = self.table[grant.entry + 1]
        return size if self.usable and self.table[grant.entry] == grant.version else -1

    def write(self, region: bytes, offset: int, data: memoryview, /) -> bool:
        """Write *data*, all of it within the region; False if the provider must do it.

        Raises:
            StorageFull, StorageError: writing failed.
        """
        grant = self.grants.get(region)
        if grant is None or not self.writable:
            return False
        size = len(data)
        end = offset + size
        if end > grant.room or offset < 0 or self._life[self._word] != self._alive:
            return False
        table, entry, version = self.table, grant.entry, grant.version
        try:
            for slot in self._next_free:  # noqa: B007
                break
        except IndexError:
            return False  # as many threads as hazard slots
        try:
            self._hazards[slot] = grant.index
            if not self.usable or table[entry] != version or end > table[entry + 1]:
                done = False
            else:
                touched = True  # bytes may have been stored, even if the write then fails
                try:
                    if grant.fd < 0:
                        copy(grant.view[offset:end], data)
                    else:
                        place, count = grant.start + offset, 0
                        try:
                            count = pwrite(grant.fd, data, place)
                            if count != size:
                                pwrite_full(grant.fd, data[count:], place + count)
                        except OSError as error:
                            touched = count > 0
                            raise self._failure(region, error) from error
                finally:
                    if touched:
                        # The provider reads the last-write time 0 first, and the others only if it
                        # has changed: so the region's is stored first.  Both are later than time 0
                        # was, even if the clock did not advance; otherwise the provider could miss
                        # this write.  A value far in the future is ignored.
                        write_times = self._write_times
                        now = time_ns()
                        if 0 <= (last := write_times[0]) - now < _RESOLUTION:
                            now = last + 1
                        write_times[grant.index] = now
                        write_times[0] = now
                        self._recent.append(now)
                done = table[entry] == version
        finally:
            self._hazards[slot] = 0
            self._free.append(slot)
        if not done and table[entry] != version:
            self._drop(region, grant)
        return done

    def try_write(self, region: Any, offset: Any, data: Any, /) -> bool:
        """The same as :meth:`write` for unchecked arguments; False also for valid ones that need
        further checks."""
        if type(region) is RegionID and type(offset) is int and type(data) in _FLAT:
            return self.write(region, offset, memoryview(data))
        return False

    def read_some(
        self,
        region: bytes,
        offset: int,
        place: memoryview,
        wait: bool = True,
        short: bool = True,
        /,
    ) -> int:
        """Fill *place* from within the region; returns the number of bytes read, or -1 if the
        provider must do it.

        *place* may have been modified then.  Without *wait* it also fails if the bytes are not in
        memory.  With *short* the region may end before *place* does.
        """
        grant = self.grants.get(region)
        if grant is None or grant.room < 0 or self._life[self._word] != self._alive or offset < 0:
            return -1
        table, entry, version = self.table, grant.entry, grant.version
        size = len(place)
        try:
            for slot in self._next_free:  # noqa: B007
                break
        except IndexError:
            return -1
        try:
            self._hazards[slot] = grant.index
            have = table[entry + 1] - offset
            if size > have:
                if not short:
                    return -1
                size = max(0, have)
                place = place[:size]
            if not self.usable or table[entry] != version or offset + size > grant.room:
                size = -1
            elif grant.fd < 0:
                copy(place, grant.view[offset : offset + size])
            else:
                flags = 0 if wait or self.in_memory else RWF_NOWAIT
                # One inline call suffices for most; calling a function would add a tenth to the
                # time.
                offset += grant.start
                done = preadv(grant.fd, (place,), offset, flags)
                if done != size:
                    done += pread_full(grant.fd, place[done:], offset + done, flags)
                    size = size if done == size else -1
            if table[entry] != version:
                size = -1
        except OSError:  # of a file; the provider reports it
            size = -1
        finally:
            self._hazards[slot] = 0
            self._free.append(slot)
        if size < 0 and table[entry] != version:
            self._drop(region, grant)
        return size

    def try_read(self, region: Any, offset: Any, place: Any, /) -> bool:
        """Fill *place*, for unchecked arguments as :meth:`try_write`; False if the provider must do
        it."""
        if type(region) is RegionID and type(offset) is int and type(place) is bytearray:
            return self.read_some(region, offset, memoryview(place), True, False) >= 0
        return False
