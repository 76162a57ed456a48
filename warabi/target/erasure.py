"""Erased regions: when the storage may free their bytes, and which thread does that.

Order of an erasure: the region's row goes, calls inside the region end, the commit that forgets it
is durable, no guest is in the middle of an access, no survey that may still copy the bytes goes on.
``erase`` waits for none of that.

Calls ``Sharing`` and the storage.  Called by what ends a region (``Target``, the tree of names), by
``RegionLocks`` when the last call leaves an erased one, and by ``Committer`` after a commit.
"""

from __future__ import annotations

import logging
import stat
import threading
from collections import deque
from functools import partial

from warabi.errors import Exception
from warabi.metadata.inode import Inode
from warabi.region import RegionID
from warabi.target.leases import Share
from warabi.target.sharing import Sharing
from warabi.target.state import LOOPS, TargetState

log = logging.getLogger(__name__)

_MOST = 256
"""Regions in memory that are erased from storage at a time, also by an event loop."""
_MOST_FILES = 16384  # more, since regions in the same pack are best erased together


class Erasure:
    """Frees the bytes of erased regions of one target."""

    def __init__(self, state: TargetState, sharing: Sharing) -> None:
        self._state = state
        self._sharing = sharing
        # To be erased when that change is synced, and no guest accesses the region any more.
        self._freed: deque[tuple[int, RegionID, Share | None]] = deque()
        self._thread: threading.Thread | None = None  # erases what loops leave to it
        self._holds: set[RegionID] = set()  # running surveys, which keep the data of erased regions
        self._kept: dict[RegionID, int] = {}  # sizes of regions erased during surveys
        self._ending: set[RegionID] = set()  # those in which calls are still pending

    @property
    def pending(self) -> int:
        """How many erased regions still have bytes in the storage."""
        return len(self._freed)

    def is_pending(self, region: RegionID) -> bool:
        """Whether an erased region still has bytes in the storage; the lock is held."""
        return any(region == freed for _, freed, _ in self._freed)

    # Surveys; the lock is held

    def hold(self, survey: RegionID) -> None:
        """Keep the bytes of regions that are erased from now on, until *survey* is erased."""
        self._holds.add(survey)

    def is_ending(self, region: RegionID) -> bool:
        """Whether calls are still inside a region that was erased during a survey."""
        return region in self._ending

    def kept(self, region: RegionID) -> int | None:
        """Return the size of an erased region whose data are kept for a survey, after calls in it
        have ended."""
        return self._kept.get(region)

    # Erasing

    def discard(self, inode: Inode) -> None:
        """Remove a nameless inode, and free its data; the guard is held."""
        self._state.storage.retire(inode)
        self._state.catalogue.remove(inode)
        inode.dead = True
        self._sharing.withdraw(inode)
        self._holds.discard(inode.rid)
        if stat.S_ISREG(inode.mode):
            if not (inode.users or inode.exclusive):
                self.add(inode)
            elif self._holds:
                self._ending.add(inode.rid)

    def add(self, inode: Inode) -> None:
        """No call is inside an erased region any more; the lock is held."""
        self._freed.append((self._state.catalogue.change, inode.rid, inode.share))
        inode.share = None
        if self._holds:
            self._kept[inode.rid] = inode.size
        self._ending.discard(inode.rid)
        if not self._state.changed.is_set():
            self._state.changed.set()

    def reap(self) -> None:
        """Erase from storage what the durable catalogue no longer mentions.

        It may take long, and an event loop does not wait: files are removed by the thread that
        commits next, and many regions in memory by a thread of their own.
        """
        if not (self._freed or self._kept or self._sharing.active):
            return
        in_loop = threading.get_ident() in LOOPS
        if not (in_loop and self._freed and self._left_to_others()):
            while self._erase_some():
                pass
        self._sharing.free_drained()

    def _left_to_others(self) -> bool:
        """Leave erasing to another thread, if an event loop should not do it; whether it was
        left."""
        state = self._state
        with state.lock:
            if not self._holds:
                self._kept.clear()
            if state.storage.blocking:
                state.changed.set()
                return True
            if self._holds or len(self._freed) <= _MOST or state.closed:
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._erase_all, name="warabi-free")
                self._thread.start()
            return True

    def _erase_all(self) -> None:
        try:
            while self._erase_some():
                pass
        finally:
            with self._state.lock:
                self._thread = None

    def _erase_some(self) -> bool:
        """Erase some pending regions; returns whether there may be more."""
        due: list[RegionID] = []
        state = self._state
        most = _MOST_FILES if state.storage.blocking else _MOST
        taken = 0
        with state.lock:
            if not self._holds:
                self._kept.clear()
            while (
                taken < most
                and not self._holds
                and self._freed
                and state.catalogue.is_synced(self._freed[0][0])
            ):
                taken += 1
                _, rid, share = self._freed.popleft()
                if share is None or not self._sharing.later(
                    share, partial(self._erase_granted, rid, share)
                ):
                    due.append(rid)
        failed = self._erase_bytes(due) if due else 0
        return taken == most and not failed

    def _erase_bytes(self, rids: list[RegionID]) -> int:
        """Erase regions from storage; returns the number of failures."""
        failed = 0
        for rid, error in self._state.storage.erase_all(rids):
            # The region is erased, only its bytes are still there: the next commit tries again.
            log.warning("%s; it will be retried", error)
            self._freed.append((0, rid, None))
            self._state.changed.set()
            failed += 1
        return failed

    def _erase_granted(self, rid: RegionID, share: Share) -> None:
        # Guests that have not noticed yet hold descriptors and mappings, which would keep the
        # memory.
        try:
            self._state.storage.vacate(rid)
        except Exception as error:
            log.warning("%s; other processes may still hold its memory", error)
        self._erase_bytes([rid])
        with self._state.lock:
            share.grants.recycle(share.index)

    def close(self) -> None:
        """Wait for the thread; no call is inside any region, and none begins."""
        thread = self._thread
        if thread is not None:
            thread.join()
