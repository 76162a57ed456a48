"""Direct access by processes of the same host: hazard pointers with versions and membarrier(2).

A *guest* is such a process, or one connection of it.  It is *granted* a region: the descriptor
with its data, and an index into memory that is shared with all guests:

* the *table*, which only the provider writes: for each index, from 1 on, the *version* of the grant
  and the region's size.  A grant is valid while its version is unchanged; versions are
  never reused.  After those, for each index, the version again while the region is
  *metadata-durable*: all except its data is on stable storage, so a guest that syncs its
  descriptor persists the region.
* the *last-write times*, which guests write: when the region of an index was last
  written.  Time 0 is set after every other one.
* an array of *hazard slots* for each guest, in which it announces the
  index that it is about to access.

A guest that reads or writes stores the index in a free hazard slot, checks the version, moves the
data, checks the version again, and clears the slot.  If the version changed, the access is void,
and the guest sends a request to the provider.  To revoke a region (to erase, shrink or move it) the
provider first changes the version, then executes a barrier, and then reads the hazard slots: a
guest that has not announced an access by then will see the new version before it touches anything.
While a slot still has the index, the old location is not reused (:meth:`Grants.later`).  The
provider never waits for a guest to clear a slot, for it may have been stopped.

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
from warabi.shm.layout import ENTRIES, HAZARD_SLOTS, METADATA_DURABLE, TABLE
from warabi.shm.memory import STRONGLY_ORDERED, SharedMemory, barrier

_PAGE = 4096  # bytes of last-write times that are compared at once


class GrantHolder:
    """A guest.

    Attributes:
        number: unique, never reused.
        hazards: its hazard slots.
        writes: whether it may write to regions.
        segments: numbers of the shared descriptors that it was given.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.hazards = SharedMemory("warabi-hazards", 8 * HAZARD_SLOTS)
        self.writes = False
        self.segments: set[int] = set()
        self._slots = self.hazards.view.cast("Q")

    def touches(self, index: int) -> bool:
        """Whether a hazard slot has that index, truthfully or not."""
        return index in self._slots.tolist()

    def touched(self) -> set[int]:
        """Return the contents of the hazard slots: any numbers."""
        return set(self._slots.tolist())

    def close(self) -> None:
        self._slots.release()
        self.hazards.close()


class Share:
    """A region's entry in the table, from its first grant until it is erased."""

    __slots__ = ("grants", "index", "seen")

    def __init__(self, grants: Grants, index: int) -> None:
        self.grants = grants
        self.index = index
        self.seen = 0  # the last-write time that was taken over

    def merge_writes(self, inode: Inode) -> bool:
        """Take over the last-write time; returns whether it has changed."""
        return self.grants.merge_writes(self, inode)

    def clear_metadata_durable(self) -> None:
        """Clear metadata durability: guests must request persists from the provider."""
        self.grants.clear_metadata_durable(self)


class Grants:
    """The table, the last-write times and the guests of one target."""

    def __init__(self, catalogue: Catalogue, wrote: Callable[[bytes], None]) -> None:
        self._catalogue = catalogue
        self._wrote = wrote
        self.table = SharedMemory("warabi-table", TABLE, mine=True)
        self.write_times = SharedMemory("warabi-write_times", 8 * ENTRIES)
        self._entries = self.table.view.cast("Q")
        self._write_times = self.write_times.view.cast("Q")
        self._entries[0] = 1  # liveness word for guests in this process
        self._guests: list[GrantHolder] = []
        self._shared: dict[int, Inode] = {}
        self._free: list[int] = []
        self._next = 1
        # Random, so that it differs from every version of an earlier provider.
        self._version = secrets.randbits(62) + 1
        self._seen = 0  # of time 0
        self._known = b""  # all last-write times when they were last compared
        self._later: list[tuple[int, Callable[[], None]]] = []
        self.on_withdraw: Callable[[RegionID], None] = lambda region: None
        """Called when a region was erased, so that a guest in this process drops its grant."""
        self.on_forget: Callable[[], None] = lambda: None
        """Called when all grants end."""

    def join(self) -> GrantHolder:
        guest = GrantHolder()
        self._guests.append(guest)
        return guest

    def leave(self, guest: GrantHolder) -> bool:
        """Remove a guest whose process cannot access anything any more; whether it was the last."""
        if guest not in self._guests:
            return False
        self._guests.remove(guest)
        for index in guest.touched() if guest.writes else ():
            # It ended during an access: if that was a write, some bytes may have been stored, but
            # the last-write times were not set.
            inode = self._shared.get(index)
            if inode is not None:
                self._wrote_at(inode, self._catalogue.clock.exact())
        guest.close()
        return not self._guests

    def grant(self, inode: Inode) -> tuple[int, int] | None:
        """Return index and version for access to the region; None if all indexes are in use."""
        share = inode.share
        if share is None:
            if not self._free and self._next == ENTRIES:
                return None
            index = self._free.pop() if self._free else self._next
            self._next = max(self._next, index + 1)
            share = inode.share = Share(self, index)
            share.seen = self._write_times[index]
            self._shared[index] = inode
            self._entries[2 * index + 1] = inode.size
            self._new_version(index)
        return share.index, self._entries[2 * share.index]

    def _new_version(self, index: int) -> None:
        self._version += 1
        self._entries[2 * index] = self._version

    def resized(self, inode: Inode) -> None:
        """Publish the region's size; grants of one that shrank were revoked before."""
        if inode.share is not None:
            self._entries[2 * inode.share.index + 1] = inode.size

    def set_metadata_durable(self, share: Share) -> None:
        """Mark the region as metadata-durable."""
        self._entries[METADATA_DURABLE + share.index] = self._entries[2 * share.index]

    def clear_metadata_durable(self, share: Share) -> None:
        """See :meth:`Share.clear_metadata_durable`."""
        self._entries[METADATA_DURABLE + share.index] = 0

    def clear_all_metadata_durable(self) -> None:
        """Clear metadata durability of every region."""
        for index in self._shared:
            self._entries[METADATA_DURABLE + index] = 0

    def revoke(self, inode: Inode) -> bool:
        """Revoke all grants of the region; returns whether no access is pending.

        Data that a guest wrote and reports as written are present when this returns.
        """
        share = inode.share
        if share is None:
            return True
        self._new_version(share.index)
        barrier()
        share.merge_writes(inode)
        return self.drained(share.index)

    def withdraw(self, share: Share) -> None:
        """Permanently revoke the grants of an erased region."""
        self._entries[2 * share.index] = 0
        barrier()
        inode = self._shared.pop(share.index)
        self.on_withdraw(inode.rid)

    def recycle(self, index: int) -> None:
        """Reuse the index of an erased region without pending accesses."""
        self._free.append(index)

    def drained(self, index: int) -> bool:
        """Whether no access that began before the version changed is pending."""
        return not any(guest.touches(index) for guest in self._guests)

    def later(self, index: int, free: Callable[[], None]) -> None:
        """Call *free* when no access to the index is pending."""
        self._later.append((index, free))

    def due(self) -> list[Callable[[], None]]:
        """Return functions whose indexes have no pending access; call them without the target's
        lock."""
        found = [free for index, free in self._later if self.drained(index)]
        if found:
            self._later = [item for item in self._later if item[1] not in found]
        return found

    @property
    def waiting(self) -> bool:
        return bool(self._later)

    # Writes by guests

    def merge_writes(self, share: Share, inode: Inode) -> bool:
        """See :meth:`Share.merge_writes`."""
        mark = self._write_times[share.index]
        if mark == share.seen:
            return False
        share.seen = mark
        self._wrote_at(inode, mark)
        return True

    def _wrote_at(self, inode: Inode, mark: int) -> None:
        """Record a write by a guest; the time *mark* may be any number."""
        inode.written_by(None)
        self._catalogue.clock.wrote_at(inode, mark)
        self._catalogue.touch(inode, durable=False, tell=False)
        if self._catalogue.feed.watched:
            self._catalogue.feed.inode(inode.ino, max(mark, CONTENT))
        self._wrote(inode.rid)

    def merge_all_writes(self, *, thorough: bool = False) -> None:
        """Take over all writes by guests.

        Time 0 shows whether there is anything; two guests that set it at the very same time can
        hide one's write, which only matters if *thorough*.
        """
        if self._write_times[0] == self._seen and not thorough:
            return
        self._seen = self._write_times[0]
        if not STRONGLY_ORDERED:
            barrier()  # otherwise a region's time might be loaded before time 0, which is set later
        # There may be hundreds of thousands, and the target's lock is held: examine single times
        # only in pages that changed.
        write_times = bytes(self.write_times.view[: 8 * self._next])
        known = self._known.ljust(len(write_times), b"\0")
        for start in range(0, len(write_times), _PAGE):
            end = start + _PAGE
            if write_times[start:end] == known[start:end]:
                continue
            for index in range(start // 8, min(end, len(write_times)) // 8):
                inode = self._shared.get(index)
                if inode is not None and inode.share is not None:
                    self.merge_writes(inode.share, inode)
        self._known = write_times

    # The end

    def revoke_all(self) -> None:
        """Revoke all grants; guests must request them again."""
        for index in self._shared:
            self._new_version(index)
        barrier()
        self.merge_all_writes(thorough=True)

    @property
    def all_drained(self) -> bool:
        return all(not any(guest.hazards.view) for guest in self._guests)

    def forget(self) -> list[Callable[[], None]]:
        """Release everything after the last guest; returns the functions that still waited."""
        self.merge_all_writes(thorough=True)
        for guest in self._guests:
            guest.close()
        for inode in self._shared.values():
            inode.share = None
        self._guests.clear()
        self._shared.clear()
        self._entries[0] = 0
        self.on_forget()
        self._entries.release()
        self._write_times.release()
        self.table.close()
        self.write_times.close()
        return [free for _, free in self._later]
