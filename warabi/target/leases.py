"""What processes of the same host may reach of a target's regions without asking its provider.

A *guest* is such a process, or one connection of it.  It is *granted* a region: the descriptor
that holds the bytes, and an index into memory that is shared with all guests:

* the *table*, which only the provider writes: for each index, from 1 on, a *stamp* and the
  region's size.  A grant is good while the stamp is what it was; stamps are never used twice.
  Behind those, for each index, the stamp once more while the region is *firm*: all of it but its
  bytes is on the medium, and a guest that syncs its descriptor has persisted it.
* the *marks*, which guests write: when the region of an index was last written.  Mark 0 is set
  after every other one.
* a *board* for each guest: *lanes*, in which it says what index it is about to touch.

A guest that reads or writes enters the index in a lane of its own, looks at the stamp, moves the
bytes, looks at the stamp again, and clears the lane.  With a stamp that changed it has done
nothing that counts, and asks the provider.  Whoever takes a region away (erases it, shrinks it,
moves it) first changes the stamp, then passes a barrier, and then looks at the lanes: a guest that
is not in one will see the new stamp before it touches anything.  While one is, the place that the
bytes had is given to nobody (:meth:`Grants.later`).  Nobody ever waits for a guest to leave a
lane, for it may have been stopped.

Every call is made with the target's lock held.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

from warabi._core.changes import CONTENT
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.shm.layout import ENTRIES, FIRM, LANES, TABLE
from warabi.shm.memory import STRONGLY_ORDERED, SharedMemory, barrier

_PAGE = 4096  # bytes of marks that are compared at once


class GrantHolder:
    """Somebody who may hold grants.

    Attributes:
        number: of no other one, ever.
        board: its lanes.
        writes: whether it may write to regions.
        segments: which shared descriptors it was given.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.board = SharedMemory("warabi-board", 8 * LANES)
        self.writes = False
        self.segments: set[int] = set()
        self._lanes = self.board.view.cast("Q")

    def touches(self, index: int) -> bool:
        """Whether it is in the middle of an access to that index, or says so."""
        return index in self._lanes.tolist()

    def touched(self) -> set[int]:
        """What it is in the middle of accesses to, or says so: any numbers."""
        return set(self._lanes.tolist())

    def close(self) -> None:
        self._lanes.release()
        self.board.close()


class Share:
    """A region's entry in the table, from its first grant until it is gone."""

    __slots__ = ("grants", "index", "seen")

    def __init__(self, grants: Grants, index: int) -> None:
        self.grants = grants
        self.index = index
        self.seen = 0  # the last mark that was taken into account

    def settle(self, inode: Inode) -> bool:
        """Take over when guests last wrote; whether they did since the last time."""
        return self.grants.settle(self, inode)

    def loosen(self) -> None:
        """The region is not firm (any more): guests have the provider persist it."""
        self.grants.loosen(self)


class Grants:
    """The table, the marks and the guests of one target."""

    def __init__(self, catalogue: Catalogue, wrote: Callable[[bytes], None]) -> None:
        self._catalogue = catalogue
        self._wrote = wrote
        self.table = SharedMemory("warabi-table", TABLE, mine=True)
        self.marks = SharedMemory("warabi-marks", 8 * ENTRIES)
        self._entries = self.table.view.cast("Q")
        self._marks = self.marks.view.cast("Q")
        self._entries[0] = 1  # a sign of life, for guests in this process
        self._guests: list[GrantHolder] = []
        self._shared: dict[int, Inode] = {}
        self._free: list[int] = []
        self._next = 1
        # Nobody can guess what a stamp of an earlier provider was, nor meet it by accident.
        self._stamp = secrets.randbits(62) + 1
        self._seen = 0  # of mark 0
        self._known = b""  # all marks, as they were when all were last looked at
        self._later: list[tuple[int, Callable[[], None]]] = []
        self.on_withdraw: Callable[[RegionID], None] = lambda region: None
        """Called when a region is gone; a guest in this process lets go of it then."""
        self.on_forget: Callable[[], None] = lambda: None
        """Called when all of them are."""

    def join(self) -> GrantHolder:
        guest = GrantHolder()
        self._guests.append(guest)
        return guest

    def leave(self, guest: GrantHolder) -> bool:
        """The guest's process cannot touch anything any more; whether it was the last one."""
        if guest not in self._guests:
            return False
        self._guests.remove(guest)
        for index in guest.touched() if guest.writes else ():
            # It ended in the middle of an access: if that was a write, it may have stored some of
            # the bytes, and it never set the marks.
            inode = self._shared.get(index)
            if inode is not None:
                self._wrote_at(inode, self._catalogue.clock.exact())
        guest.close()
        return not self._guests

    def grant(self, inode: Inode) -> tuple[int, int] | None:
        """Index and stamp with which a guest may reach the region; None when all are in use."""
        share = inode.share
        if share is None:
            if not self._free and self._next == ENTRIES:
                return None
            index = self._free.pop() if self._free else self._next
            self._next = max(self._next, index + 1)
            share = inode.share = Share(self, index)
            share.seen = self._marks[index]
            self._shared[index] = inode
            self._entries[2 * index + 1] = inode.size
            self._new_stamp(index)
        return share.index, self._entries[2 * share.index]

    def _new_stamp(self, index: int) -> None:
        self._stamp += 1
        self._entries[2 * index] = self._stamp

    def resized(self, inode: Inode) -> None:
        """Let guests know the region's size; one that shrank was revoked before."""
        if inode.share is not None:
            self._entries[2 * inode.share.index + 1] = inode.size

    def fasten(self, share: Share) -> None:
        """The region is firm."""
        self._entries[FIRM + share.index] = self._entries[2 * share.index]

    def loosen(self, share: Share) -> None:
        """As :meth:`Share.loosen`."""
        self._entries[FIRM + share.index] = 0

    def loosen_all(self) -> None:
        """As :meth:`loosen`, of every region."""
        for index in self._shared:
            self._entries[FIRM + index] = 0

    def revoke(self, inode: Inode) -> bool:
        """End every grant of the region; whether no guest is in the middle of an access.

        Bytes that a guest wrote and reports as written are there when this returns.
        """
        share = inode.share
        if share is None:
            return True
        self._new_stamp(share.index)
        barrier()
        share.settle(inode)
        return self.quiet(share.index)

    def withdraw(self, share: Share) -> None:
        """The region is gone: end its grants for ever."""
        self._entries[2 * share.index] = 0
        barrier()
        inode = self._shared.pop(share.index)
        self.on_withdraw(inode.rid)

    def recycle(self, index: int) -> None:
        """Let another region have the index of one that is gone, which is quiet now."""
        self._free.append(index)

    def quiet(self, index: int) -> bool:
        """Whether no guest is in the middle of an access that began before the stamp changed."""
        return not any(guest.touches(index) for guest in self._guests)

    def later(self, index: int, free: Callable[[], None]) -> None:
        """Have *free* called when the index is quiet."""
        self._later.append((index, free))

    def due(self) -> list[Callable[[], None]]:
        """What has become quiet; to be called without the target's lock."""
        found = [free for index, free in self._later if self.quiet(index)]
        if found:
            self._later = [item for item in self._later if item[1] not in found]
        return found

    @property
    def waiting(self) -> bool:
        return bool(self._later)

    # What guests wrote

    def settle(self, share: Share, inode: Inode) -> bool:
        """As :meth:`Share.settle`."""
        mark = self._marks[share.index]
        if mark == share.seen:
            return False
        share.seen = mark
        self._wrote_at(inode, mark)
        return True

    def _wrote_at(self, inode: Inode, mark: int) -> None:
        """A guest says that it wrote to the region at *mark*, which may be any number."""
        inode.written_by(None)
        self._catalogue.clock.wrote_at(inode, mark)
        self._catalogue.touch(inode, durable=False, tell=False)
        if self._catalogue.feed.watched:
            self._catalogue.feed.inode(inode.ino, max(mark, CONTENT))
        self._wrote(inode.rid)

    def settle_all(self, *, thorough: bool = False) -> None:
        """Take over everything that guests wrote.

        Mark 0 tells whether there is anything; two guests that set it at the very same time can
        hide one's mark, which only matters to who has to be *thorough*.
        """
        if self._marks[0] == self._seen and not thorough:
            return
        self._seen = self._marks[0]
        if not STRONGLY_ORDERED:
            barrier()  # or a region's mark might be loaded before mark 0, which was set after it
        # There may be hundreds of thousands, and the target's lock is held: only where something
        # changed are they looked at one by one.
        marks = bytes(self.marks.view[: 8 * self._next])
        known = self._known.ljust(len(marks), b"\0")
        for start in range(0, len(marks), _PAGE):
            end = start + _PAGE
            if marks[start:end] == known[start:end]:
                continue
            for index in range(start // 8, min(end, len(marks)) // 8):
                inode = self._shared.get(index)
                if inode is not None and inode.share is not None:
                    self.settle(inode.share, inode)
        self._known = marks

    # The end

    def revoke_all(self) -> None:
        """End every grant; who wants one again has to ask."""
        for index in self._shared:
            self._new_stamp(index)
        barrier()
        self.settle_all(thorough=True)

    @property
    def all_quiet(self) -> bool:
        return all(not any(guest.board.view) for guest in self._guests)

    def forget(self) -> list[Callable[[], None]]:
        """Let go of everything, after the last guest; returns what still waited for one."""
        self.settle_all(thorough=True)
        for guest in self._guests:
            guest.close()
        for inode in self._shared.values():
            inode.share = None
        self._guests.clear()
        self._shared.clear()
        self._entries[0] = 0
        self.on_forget()
        self._entries.release()
        self._marks.release()
        self.table.close()
        self.marks.close()
        return [free for _, free in self._later]
