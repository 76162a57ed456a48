"""A client's part of direct access to regions of a provider on the same host.

What the parties share, and what keeps a guest from bytes that are not its region's any more, is
told in ``grants.py``.  Here is the frequent side of it, without any system call for regions in
memory and without any lock: a lane is a guest's own while it is out of the list of free ones.

An access that cannot be made returns False, and the caller asks the provider, which also tells
what is wrong.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from os import RWF_NOWAIT, preadv, pwrite
from time import time_ns
from typing import Any

from warabi import errors
from warabi.fileio import pread_full, pwrite_full
from warabi.lanes import ENTRIES, FIRM, LANES, TABLE
from warabi.region import RegionID
from warabi.shared_memory import Mapping, copy, register

_LARGE = 64 * 1024
"""Bytes from which on a region is asked for when it is first touched, not the second time."""
_MOST_GRANTS = 65536
_RECENT = 4096
_SPARE_ROOM = 1024 * 1024
_CLOSING_PATIENCE = 5.0


class _Grant:
    """A region that may be reached.

    Attributes:
        entry: twice the index: where the stamp is in the table, and after it the size.
        room: bytes that can be reached, whatever the size; negative when the grant was refused.
        waits: whether writing waits for the medium.
    """

    __slots__ = ("entry", "fd", "index", "mapping", "offset", "room", "stamp", "view", "waits")

    def __init__(self, index: int, stamp: int, room: int) -> None:
        self.index = index
        self.entry = 2 * index
        self.stamp = stamp
        self.room = room
        self.offset = 0
        self.fd = -1
        self.waits = False
        self.mapping: Mapping | None = None  # keeps what `view` shows
        self.view = memoryview(b"")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Guest:
    """Direct access to the regions of one target.

    Args:
        joined: what ``join`` answered.
        descriptors: what came with it; closed here.

    Raises:
        OSError: this process cannot take part.
    """

    def __init__(self, joined: Sequence[int], descriptors: Sequence[int]) -> None:
        offset, self._alive, writable = joined
        self._writable = bool(writable)
        try:
            if not register():
                raise OSError(errno.ENOSYS, "no membarrier")
            life, table, marks, board = descriptors
            self._mappings = [
                Mapping(life, resource.getpagesize(), writable=False),
                Mapping(table, TABLE, writable=False),
                Mapping(marks, 8 * ENTRIES, writable=self._writable),
                Mapping(board, 8 * LANES, writable=True),
            ]
        finally:
            for fd in descriptors:
                os.close(fd)
        self._life = self._mappings[0].view.cast("I")
        self._word = offset // 4
        self._table, self._marks, self._board = (m.view.cast("Q") for m in self._mappings[1:])
        self._lanes = list(range(LANES))
        self._grants: dict[bytes, _Grant] = {}
        self._touched: dict[bytes, int] = {}
        self._segments: dict[int, Mapping] = {}
        self.recent: deque[int] = deque(maxlen=_RECENT)
        """The latest marks of its own."""
        self._files = 0
        self._most_files = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self.usable = True

    @property
    def writes(self) -> bool:
        """Whether it may write to anything."""
        return self.usable and self._writable

    # Asking for grants

    def wants(self, region: RegionID, size: int) -> bool:
        """Whether to ask for a grant, now that the region was about to be touched for *size*."""
        if not self.usable or self._life[self._word] != self._alive:
            return False
        if size < _LARGE and region not in self._grants:
            count = self._touched.get(region, 0)
            if len(self._touched) >= _MOST_GRANTS:
                self._touched.clear()
            self._touched[region] = count + 1
            if not count:
                return False
        grant = self._grants.get(region)
        # One that is refused stays so; one that is there has to be asked for again when the region
        # has outgrown it.
        return grant is None or 0 <= grant.room < self._table[grant.entry + 1]

    def add(self, region: RegionID, granted: Sequence[Any] | None, descriptors: list[int]) -> None:
        """Take what ``grant`` answered; the descriptors are closed here."""
        try:
            self._make_room()
            self._touched.pop(region, None)
            if granted is None:
                self._grants[region] = _Grant(0, -1, -1)
            else:
                self._grants[region] = self._granted(granted, descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)

    def _granted(self, granted: Sequence[Any], descriptors: list[int]) -> _Grant:
        index, stamp, offset, room, segment, mapped, waits, _ = granted
        if not mapped:
            grant = _Grant(index, stamp, 1 << 63)
            grant.fd = descriptors.pop()
            grant.waits = bool(waits)
            self._files += 1
            return grant
        size = self._table[2 * index + 1]
        if segment:
            if descriptors:
                extent = os.fstat(descriptors[0]).st_size
                self._segments[segment] = Mapping(descriptors[0], extent, writable=self._writable)
            grant = _Grant(index, stamp, room)
            grant.mapping = self._segments[segment]
            grant.view = grant.mapping.view[offset : offset + room]
            return grant
        # More than there is: what it grows by can be reached without asking again.
        room = -(-2 * size // _SPARE_ROOM) * _SPARE_ROOM or _SPARE_ROOM
        grant = _Grant(index, stamp, room)
        grant.mapping = Mapping(descriptors[0], room, writable=self._writable)
        grant.view = grant.mapping.view
        return grant

    def _make_room(self) -> None:
        if len(self._grants) >= _MOST_GRANTS or self._files >= self._most_files:
            for region in list(self._grants)[: len(self._grants) // 4 + 1]:
                grant = self._grants.pop(region, None)
                if grant is not None and grant.fd >= 0:
                    self._files -= 1

    # Access

    def size(self, region: RegionID) -> int:
        """Bytes of a region that was granted; -1 when the provider has to be asked."""
        grant = self._grants.get(region)
        if grant is None or self._life[self._word] != self._alive:
            return -1
        size = self._table[grant.entry + 1]
        return size if self.usable and self._table[grant.entry] == grant.stamp else -1

    def write(self, region: RegionID, offset: int, data: memoryview, wait: bool = True) -> bool:
        """Store *data*, all of it within the region; False when the provider has to do it.

        Without *wait*, also where writing waits for the medium.

        Raises:
            StorageFull, StorageError: the medium.
        """
        grant = self._grants.get(region)
        if grant is None or not self._writable or (grant.waits and not wait):
            return False
        size = len(data)
        end = offset + size
        if end > grant.room or self._life[self._word] != self._alive:
            return False
        table, entry, stamp = self._table, grant.entry, grant.stamp
        try:
            lane = self._lanes.pop()
        except IndexError:
            return False  # as many threads as there are lanes
        try:
            self._board[lane] = grant.index
            if not self.usable or table[entry] != stamp or end > table[entry + 1]:
                done = False
            else:
                if grant.fd < 0:
                    copy(grant.view[offset:end], data)
                else:
                    try:
                        count = pwrite(grant.fd, data, offset)
                        if count != size:
                            pwrite_full(grant.fd, data[count:], offset + count)
                    except OSError as error:
                        raise errors.from_os(error, f"write {region!r}") from error
                marks = self._marks
                marks[grant.index] = marks[0] = now = time_ns()
                self.recent.append(now)
                done = table[entry] == stamp
        finally:
            self._board[lane] = 0
            self._lanes.append(lane)
        if not done and table[entry] != stamp:
            self._drop(region, grant)
        return done

    def fill(self, region: RegionID, granted: Sequence[Any], fd: int, data: memoryview) -> bool:
        """Store *data* in a region that ``make`` made; as :meth:`write`.  The descriptor is closed.

        By a system call: to map what nobody has touched would take longer than to copy.
        """
        grant = _Grant(granted[0], granted[1], 1 << 63)
        grant.fd = fd
        self._files += 1
        self._grants[region] = grant
        try:
            return self.write(region, 0, data)
        finally:
            self.let_go(region)

    def read_into(
        self, region: RegionID, offset: int, place: memoryview, *, wait: bool = True
    ) -> bool:
        """Fill *place*, from within the region; False when the provider has to do it.

        *place* may have been changed then.  Without *wait*, also where the bytes are not in memory.
        """
        return self.read_some(region, offset, place, wait, False) >= 0

    def read_some(
        self,
        region: RegionID,
        offset: int,
        place: memoryview,
        wait: bool = True,
        short: bool = True,
    ) -> int:
        """As :meth:`read_into`, but with *short* the region may end before *place* does: returns
        how many bytes were read, -1 when the provider has to do it."""
        grant = self._grants.get(region)
        if grant is None or grant.room < 0 or self._life[self._word] != self._alive:
            return -1
        table, entry, stamp = self._table, grant.entry, grant.stamp
        size = len(place)
        try:
            lane = self._lanes.pop()
        except IndexError:
            return -1
        try:
            self._board[lane] = grant.index
            have = table[entry + 1] - offset
            if size > have:
                if not short:
                    return -1
                size = max(0, have)
                place = place[:size]
            if not self.usable or table[entry] != stamp or offset + size > grant.room:
                size = -1
            elif grant.fd < 0:
                copy(place, grant.view[offset : offset + size])
            else:
                flags = 0 if wait else RWF_NOWAIT
                # Most are read by one call, made here: a function's would be a tenth of the whole.
                done = preadv(grant.fd, (place,), offset, flags)
                if done != size:
                    done += pread_full(grant.fd, place[done:], offset + done, flags)
                    size = size if done == size else -1
            if table[entry] != stamp:
                size = -1
        except OSError:  # of a file; the provider says what is wrong
            size = -1
        finally:
            self._board[lane] = 0
            self._lanes.append(lane)
        if size < 0 and table[entry] != stamp:
            self._drop(region, grant)
        return size

    def persist(self, region: RegionID, offset: int, size: int) -> bool:
        """Put bytes within the region on the medium; False when the provider has to do it, also
        when that failed: it must know, for the kernel says so only once."""
        grant = self._grants.get(region)
        if grant is None or grant.room < 0 or self._life[self._word] != self._alive:
            return False
        table, entry, stamp = self._table, grant.entry, grant.stamp
        if (
            not self.usable
            or table[FIRM + grant.index] != stamp
            or offset + size > table[entry + 1]
        ):
            return False
        if grant.fd >= 0:
            try:
                os.fdatasync(grant.fd)
            except OSError:
                return False
        return table[entry] == stamp

    def let_go(self, region: RegionID) -> None:
        """Keep no descriptor of a region that is gone."""
        grant = self._grants.get(region)
        if grant is not None:
            self._drop(region, grant)

    def _drop(self, region: RegionID, grant: _Grant) -> None:
        if self._grants.get(region) is grant:
            del self._grants[region]
            if grant.fd >= 0:
                self._files -= 1

    # The end

    def forget(self) -> None:
        """Use no lane any more, and keep no descriptor: in a forked child, whose parent's the lanes
        are, and when the provider ends in this process."""
        self.usable = False
        self._grants.clear()

    def close(self) -> None:
        """Let nothing more begin, and wait for what is under way."""
        self.usable = False
        deadline = time.monotonic() + _CLOSING_PATIENCE
        while len(self._lanes) < LANES and time.monotonic() < deadline:
            time.sleep(0.0005)
        self._grants.clear()


class Access(ABC):
    """Direct access as a client has it, however it comes to it.

    Like a :class:`Guest` it says False where the provider has to be asked.
    """

    def __init__(self) -> None:
        self._guest: Guest | None = None

    @abstractmethod
    def _asked(self, what: str, region: RegionID, size: int, wait: bool) -> Guest | None:
        """The guest, if it was granted the region now."""

    def size(self, region: RegionID) -> int:
        """As :meth:`Guest.size`."""
        return -1 if self._guest is None else self._guest.size(region)

    def persist(self, region: RegionID, offset: int, size: int) -> bool:
        """As :meth:`Guest.persist`."""
        return self._guest is not None and self._guest.persist(region, offset, size)

    def write(self, region: RegionID, offset: int, data: memoryview, *, wait: bool = True) -> bool:
        """As :meth:`Guest.write`."""
        guest = self._guest
        if guest is not None and guest.write(region, offset, data, wait):
            return True
        found = self._asked("write", region, len(data), wait)
        return found is not None and found.write(region, offset, data, wait=wait)

    def read_into(
        self, region: RegionID, offset: int, place: memoryview, *, wait: bool = True
    ) -> bool:
        """As :meth:`Guest.read_into`."""
        guest = self._guest
        if guest is not None and guest.read_some(region, offset, place, wait, False) >= 0:
            return True
        found = self._asked("read", region, len(place), wait)
        return found is not None and found.read_into(region, offset, place, wait=wait)
