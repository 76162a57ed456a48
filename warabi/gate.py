"""Who is inside which region, and when its bytes may go.

``_lock`` guards the catalogue, the inodes and the book-keeping here.  It is held for short
steps, never while bytes move or a medium is waited for, and is the outermost lock: storage
locks nest inside it, the catalogue's sync lock is taken without it.

A region is *entered* by reads and writes side by side (``Inode.users``), and *closed* by
whoever resizes it (``Inode.exclusive``), who waits for those inside.  ``erase`` waits for
nobody: it marks the region dead, and the last one out frees the bytes.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from types import TracebackType

from warabi.backends import Storage
from warabi.catalogue import Catalogue, translate
from warabi.errors import InvalidRegion, TargetNotFound, WouldBlock
from warabi.inode import Inode
from warabi.region import RegionID


class Guard:
    """The target's lock, as a context that translates SQLite's errors on the way out."""

    __slots__ = ("_catalogue", "_changed", "_lock", "closed")

    def __init__(
        self, lock: threading.Lock, catalogue: Catalogue, changed: threading.Event
    ) -> None:
        self._lock = lock
        self._catalogue = catalogue
        self._changed = changed
        self.closed = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self.closed:
            self._lock.release()
            raise TargetNotFound("the target is closed")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._catalogue.trim()
            if self._catalogue.uncommitted:
                self._changed.set()
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise translate(error, self._catalogue.path) from error


class RegionGate:
    """Lets calls into regions and out again.

    Args:
        catalogue: which regions exist.
        storage: where their bytes are.
    """

    def __init__(self, catalogue: Catalogue, storage: Storage) -> None:
        self._catalogue = catalogue
        self._storage = storage
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # a region may have become free
        self._waiters = 0
        self._inside = 0  # calls in any region, for close
        self._closed = False
        self._changed = threading.Event()  # the catalogue has something to commit
        self._guard = Guard(self._lock, catalogue, self._changed)
        self._freed: deque[tuple[int, RegionID]] = deque()  # to erase when that change is synced

    def _find(self, region: RegionID, what: str) -> Inode:
        """The region's inode, alive; the lock is held."""
        if self._closed:
            raise TargetNotFound(f"{what}: the target is closed")
        inode = self._catalogue.by_rid.get(region) if type(region) is RegionID else None
        if inode is None:
            try:
                inode = self._catalogue.region(region) if type(region) is RegionID else None
            except sqlite3.Error as error:
                raise translate(error, self._catalogue.path) from error
            if inode is None:
                raise InvalidRegion(f"{what}: no region {region!r} in this target")
        return inode

    def _enter(self, region: RegionID, what: str, wait: bool) -> Inode:
        with self._lock:
            inode = self._find(region, what)
            while inode.exclusive:
                self._wait(wait)
                self._check_alive(inode, what)
            inode.users += 1
            self._inside += 1
            return inode

    def _leave(self, inode: Inode, *, wrote: bool = False) -> None:
        with self._lock:
            inode.users -= 1
            self._inside -= 1
            if wrote and not inode.dead:
                self._touch(inode)
            if inode.dead and not inode.users:
                self._free(inode)
            if self._waiters:
                self._idle.notify_all()
        if self._freed:
            self._reap()

    def _enter_exclusive(self, region: RegionID, what: str, wait: bool) -> Inode:
        with self._lock:
            inode = self._find(region, what)
            while inode.exclusive or (not wait and inode.users):
                self._wait(wait)
                self._check_alive(inode, what)
            inode.exclusive = True  # from now on nobody new gets in
            self._inside += 1
            try:
                while inode.users:
                    self._wait(wait)
                self._check_alive(inode, what)
            except BaseException:
                inode.exclusive = False
                self._inside -= 1
                raise
            return inode

    def _leave_exclusive(self, inode: Inode) -> None:
        with self._lock:
            inode.exclusive = False
            self._inside -= 1
            if inode.dead:
                self._free(inode)
            if self._waiters:
                self._idle.notify_all()
        if self._freed:
            self._reap()

    def _wait(self, wait: bool) -> None:
        if not wait:
            raise WouldBlock
        self._waiters += 1
        try:
            self._idle.wait()
        finally:
            self._waiters -= 1

    def _check_alive(self, inode: Inode, what: str) -> None:
        if inode.dead:
            raise InvalidRegion(f"{what}: {inode.rid!r} was erased")

    def _touch(self, inode: Inode) -> None:
        inode.mtime = inode.ctime = time.time_ns()
        self._catalogue.touch(inode, durable=False)
        if not self._changed.is_set():
            self._changed.set()

    def _free(self, inode: Inode) -> None:
        self._freed.append((self._catalogue.change, inode.rid))
        self._changed.set()

    def _reap(self) -> None:
        """Erase from storage what the catalogue on the medium no longer mentions."""
        due = []
        with self._lock:
            while self._freed and self._catalogue.is_synced(self._freed[0][0]):
                due.append(self._freed.popleft()[1])
        for rid in due:
            self._storage.erase(rid)
