"""A guest's accesses: what is done for each read and write of a region that was granted.

This is the frequent side of what ``target/leases.py`` tells, without any system call for regions in
memory and without any lock: a lane is a guest's own while it is out of the list of free ones.
``_fast_path.c`` is the same, compiled; ``client.py`` chooses.  What they have in common is in
``client.py``, too, and so is all that is rare.
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
_RESOLUTION = 10_000_000  # ns: that of the coarsest clock
_FLAT = (bytes, bytearray)
_NOTHING = memoryview(b"")


class Grant:
    """A region that may be reached, in a file or in memory.

    Args:
        index: where in the table its stamp and its size are.
        stamp: the stamp for as long as this is good.
        room: bytes that can be reached, whatever the size; negative when the grant was refused.
        fd: the file; closed when nobody refers to this object.
        waits: whether writing waits for the medium.
        keeper: keeps what *view* shows, or *fd*, which is not closed then.
        view: the memory.
        start: where the region begins in the file or the memory.

    Raises:
        ValueError: more room than memory.
    """

    __slots__ = (
        "entry", "fd", "index", "keeper", "owns", "room", "stamp", "start", "view", "waits",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        stamp: int,
        room: int,
        fd: int = -1,
        waits: bool = False,
        keeper: object = None,
        view: memoryview = _NOTHING,
        start: int = 0,
    ) -> None:
        self.owns = False
        if start < 0 or room > MAX_SIZE - start or (fd < 0 and room > len(view) - start):
            raise ValueError("Grant: more room than there is")
        self.index = index
        self.entry = 2 * index
        self.stamp = stamp
        self.room = room
        self.fd = fd
        self.waits = waits
        self.owns = fd >= 0 and keeper is None
        self.keeper = keeper
        self.start = start
        self.view = view[start:] if start else view

    def __del__(self) -> None:
        if self.owns:
            os.close(self.fd)


class Reach:
    """Reaches what was granted.

    Args:
        life: has the word that tells whether the provider lives.
        table, marks, board: as in ``target/leases.py``.
        word: which word of *life*, of 4 bytes.
        alive: what the word is while the provider lives.
        writable: whether regions may be written.

    Attributes:
        grants: by region.
        table: its words, of 8 bytes.
        usable: whether anything may be touched.
        writable: as above.
    """

    def __init__(
        self,
        life: SharedMapping,
        table: SharedMapping,
        marks: SharedMapping,
        board: SharedMapping,
        word: int,
        alive: int,
        writable: bool,
    ) -> None:
        self._mappings = (life, table, marks, board)  # keeps what the views show
        self._life = life.view.cast("I")
        self.table, self._marks, self._board = (m.view.cast("Q") for m in (table, marks, board))
        self._word = word
        self._alive = alive
        self._lanes = list(range(len(self._board)))
        # Takes a free lane.  Iterated over, so that a signal's handler that raises (Ctrl-C) cannot
        # come between a lane's leaving the list and the `try` that puts it back: handlers run after
        # calls, and there is none.
        self._free_lane = iter(self._lanes.pop, None)
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self.grants: dict[bytes, Grant] = {}
        self.writable = writable
        self.usable = True

    @property
    def living(self) -> bool:
        """Whether the provider lives."""
        return self._life[self._word] == self._alive

    @property
    def busy(self) -> int:
        """How many accesses are under way."""
        return len(self._board) - len(self._lanes)

    @property
    def recent(self) -> tuple[int, ...]:
        """The latest marks of its own."""
        return tuple(self._recent)

    def _drop(self, region: bytes, grant: Grant) -> None:
        """Called with a grant that is not good any more."""
        raise NotImplementedError

    def _failure(self, region: bytes, error: OSError) -> Exception:
        """Called when the medium fails; what to raise."""
        raise NotImplementedError

    def size(self, region: bytes, /) -> int:
        """Bytes of a region that was granted; -1 when the provider has to be asked."""
        grant = self.grants.get(region)
        if grant is None or self._life[self._word] != self._alive:
            return -1
        size = self.table[grant.entry + 1]
        return size if self.usable and self.table[grant.entry] == grant.stamp else -1

    def write(self, region: bytes, offset: int, data: memoryview, wait: bool = True, /) -> bool:
        """Store *data*, all of it within the region; False when the provider has to do it.

        Without *wait*, also where writing waits for the medium.

        Raises:
            StorageFull, StorageError: the medium.
        """
        grant = self.grants.get(region)
        if grant is None or not self.writable or (grant.waits and not wait):
            return False
        size = len(data)
        end = offset + size
        if end > grant.room or offset < 0 or self._life[self._word] != self._alive:
            return False
        table, entry, stamp = self.table, grant.entry, grant.stamp
        try:
            for lane in self._free_lane:  # noqa: B007
                break
        except IndexError:
            return False  # as many threads as there are lanes
        try:
            self._board[lane] = grant.index
            if not self.usable or table[entry] != stamp or end > table[entry + 1]:
                done = False
            else:
                touched = True  # bytes may have been stored, also by what then failed
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
                        # The provider looks at mark 0 first, and at the others only if that has
                        # changed: so the region's comes first.  Both are later than mark 0 was,
                        # even if the clock tells the same time again, or the provider could take
                        # this write for one that it has seen.  One far ahead is not believed.
                        marks = self._marks
                        now = time_ns()
                        if 0 <= (last := marks[0]) - now < _RESOLUTION:
                            now = last + 1
                        marks[grant.index] = now
                        marks[0] = now
                        self._recent.append(now)
                done = table[entry] == stamp
        finally:
            self._board[lane] = 0
            self._lanes.append(lane)
        if not done and table[entry] != stamp:
            self._drop(region, grant)
        return done

    def put(self, region: Any, offset: Any, data: Any, /) -> bool:
        """As :meth:`write`, of arguments that nobody has checked; False also where it takes more
        than a look to say that they are right."""
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
        """Fill *place*, from within the region; returns how many bytes were read, -1 when the
        provider has to do it.

        *place* may have been changed then.  Without *wait*, also where the bytes are not in memory.
        With *short* the region may end before *place* does.
        """
        grant = self.grants.get(region)
        if grant is None or grant.room < 0 or self._life[self._word] != self._alive or offset < 0:
            return -1
        table, entry, stamp = self.table, grant.entry, grant.stamp
        size = len(place)
        try:
            for lane in self._free_lane:  # noqa: B007
                break
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
                offset += grant.start
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

    def take(self, region: Any, offset: Any, place: Any, /) -> bool:
        """Fill *place*, of arguments that nobody has checked, as :meth:`put`; False when the
        provider has to do it."""
        if type(region) is RegionID and type(offset) is int and type(place) is bytearray:
            return self.read_some(region, offset, memoryview(place), True, False) >= 0
        return False
