"""Locks of regions: shared for reads and writes, exclusive for resizing and erasing.

A region is *entered* by reads and writes concurrently (``Inode.users``), and *closed* by what
resizes it (``Inode.exclusive``), which waits for those inside.  ``erase`` does not wait: it marks
the region dead, and the last call that leaves has its bytes freed.

Processes that were granted a region do not enter it: ``leases.py`` describes how they are kept from
bytes that are no longer the region's.

Calls ``Erasure`` and the catalogue.  Called by ``Target`` and by ``Committer``.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from warabi._core import forks, interrupts
from warabi._core.changes import CONTENT, ORIGIN
from warabi._core.tuning import INTERRUPT_CHECK
from warabi.errors import InvalidRegion, WouldBlock
from warabi.metadata.inode import Inode
from warabi.metadata.journal import translate
from warabi.region import RegionID
from warabi.target.erasure import Erasure
from warabi.target.state import TargetState, not_in_a_loop


class RegionLocks:
    """Lets calls into regions of one target and out again."""

    def __init__(self, state: TargetState, erasure: Erasure) -> None:
        self._state = state
        self._erasure = erasure
        self._catalogue = state.catalogue
        self._lock = state.lock  # the same, as each read and write takes it twice
        self._idle = forks.condition(self._lock)  # a region may have become available
        self._waiters = 0
        self._inside = 0  # number of calls in any region, for close

    def forked(self) -> None:
        """In a forked child none of the parent's calls is inside a region."""
        self._waiters = self._inside = 0

    def find(self, region: RegionID, what: str) -> Inode:
        """Return the inode of a live region; the lock is held."""
        if self._state.closed:
            self._state.check_open(what)
        inode = self._catalogue.by_rid.get(region) if type(region) is RegionID else None
        if inode is None:
            try:
                inode = self._catalogue.region(region) if type(region) is RegionID else None
            except sqlite3.Error as error:
                raise translate(error, self._catalogue.path) from error
            if inode is None:
                raise InvalidRegion(f"{what}: there is no region {region!r} in this target")
        if inode.exposed is not None:
            inode.exposed.merge_writes()
        return inode

    def enter(self, region: RegionID, what: str, wait: bool) -> Inode:
        """Be inside a region with others, for the operation *what*, until :meth:`leave`.

        Raises:
            TargetNotFound, InvalidRegion: the target is closed; there is no such region.
            WouldBlock: without *wait*, while the region is closed.
        """
        with self._lock:
            inode = self.find(region, what)
            while inode.exclusive:
                self.wait(wait)
                self._check_alive(inode, what)
            inode.users += 1
            self._inside += 1
            return inode

    def enter_new(self, inode: Inode) -> None:
        """Be inside a region that is about to exist; the lock is held."""
        inode.users += 1
        self._inside += 1

    def leave(self, inode: Inode, *, wrote: bool = False) -> None:
        """The end of :meth:`enter`; *wrote*: the call may have changed the region's bytes."""
        with self._lock:
            inode.users -= 1
            self._inside -= 1
            if wrote and not inode.dead:
                self._touch(inode)
            gone = inode.dead and not inode.users
            if gone:
                self._erasure.add(inode)
            if self._waiters:
                self._idle.notify_all()
        if gone:
            self._erasure.reap()

    def enter_exclusive(self, region: RegionID, what: str, wait: bool) -> Inode:
        """Be inside a region alone until :meth:`leave_exclusive`; raises as :meth:`enter`, without
        *wait* also while other calls are inside."""
        with self._lock:
            inode = self.find(region, what)
            while inode.exclusive or (not wait and inode.users):
                self.wait(wait)
                self._check_alive(inode, what)
            inode.exclusive = True  # from now on no other call gets in
            self._inside += 1
            try:
                while inode.users:
                    self.wait(wait)
                self._check_alive(inode, what)
            except BaseException:
                inode.exclusive = False
                self._inside -= 1
                raise
            return inode

    def leave_exclusive(self, inode: Inode, *, wrote: bool = False) -> None:
        """The end of :meth:`enter_exclusive`."""
        with self._lock:
            inode.exclusive = False
            self._inside -= 1
            if inode.dead:
                self._erasure.add(inode)
            elif wrote:
                if inode.exposed is not None:
                    inode.exposed.skip()
                self._touch(inode)
            if self._waiters:
                self._idle.notify_all()
        if inode.dead:
            self._erasure.reap()

    @contextlib.contextmanager
    def entered(self, region: RegionID, what: str) -> Iterator[Inode]:
        """Be inside a region with others while the block runs; raises as :meth:`enter`."""
        inode = self.enter(region, what, True)
        try:
            yield inode
        finally:
            self.leave(inode)

    @contextlib.contextmanager
    def kept_open(self, what: str) -> Iterator[None]:
        """Keep the target from closing while the block runs, which is inside no region."""
        with self._lock:
            self._state.check_open(what)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._waiters:
                    self._idle.notify_all()

    def wait(self, wait: bool) -> None:
        """Wait until some call has left its region; the lock is held, but released meanwhile.

        Raises:
            WouldBlock: without *wait*, or in an event loop.
        """
        if not wait:
            raise WouldBlock
        not_in_a_loop()
        self._waiters += 1
        try:
            # Signal handlers do not interrupt a condition here: see interrupts.py.
            self._idle.wait(INTERRUPT_CHECK if interrupts.waits_held() else None)
        finally:
            self._waiters -= 1
        if not self._state.closed:
            interrupts.check()

    def _check_alive(self, inode: Inode, what: str) -> None:
        if inode.dead:
            raise InvalidRegion(f"{what}: {inode.rid!r} was erased")

    def _touch(self, inode: Inode) -> None:
        if inode.share is not None:
            inode.share.merge_writes(inode)
        inode.written_by(ORIGIN.get())
        catalogue = self._catalogue
        catalogue.clock.wrote(inode)
        feed = catalogue.feed
        catalogue.touch(inode, durable=False, tell=False)
        if feed.watched:
            feed.inode(inode.ino, CONTENT)
        if not self._state.changed.is_set():
            self._state.changed.set()

    def close(self) -> bool:
        """Refuse calls from now on, and wait for those under way; False if that was done before."""
        with self._lock:
            if self._state.closed:
                return False
            self._state.closed = True
            while self._inside:
                self.wait(True)
        return True
