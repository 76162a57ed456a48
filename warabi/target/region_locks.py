"""Who is inside which region, and when its bytes may go.

``_lock`` guards the catalogue, the inodes and the book-keeping here.  It is held for short
steps, never while bytes move or a medium is waited for, and is the outermost lock: storage
locks nest inside it, the catalogue's sync lock is taken without it.  What has to hold it for
longer than an event loop may wait takes ``_long`` first, and says so by that (``occupied``).

A region is *entered* by reads and writes side by side (``Inode.users``), and *closed* by
whoever resizes it (``Inode.exclusive``), who waits for those inside.  ``erase`` waits for
nobody: it marks the region dead, and the last one out frees the bytes.

Other processes that were granted a region are not inside: ``leases.py`` tells how they are kept
from bytes that are no longer the region's.
"""

from __future__ import annotations

import builtins
import logging
import math
import os
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TypeVar

from warabi._core import forks, interrupts
from warabi._core.changes import CONTENT, ORIGIN
from warabi.backends import Storage
from warabi.errors import (
    Exception,
    InvalidRegion,
    Lengthy,
    TargetBusy,
    TargetNotFound,
    WouldBlock,
)
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.inode import Inode
from warabi.metadata.journal import translate
from warabi.metadata.notifications import Feed
from warabi.region import RegionID
from warabi.target.leases import Grants, Share

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LOOPS: set[int] = set()
"""Threads that run the event loop of an engine or a mount.  What would have one of them wait for a
region, or do what takes long, raises ``WouldBlock`` there, nothing having been done; a worker
thread does it."""
_GRACE = 0.02
"""Seconds between when a target is found free and when its lock is taken, at most and about."""
STEPS = 5000
"""Names or directories, of some microseconds each, that are gone through while others wait."""
_ERASED = 256
"""Regions in memory that are erased from storage at a time, by an event loop, too."""
_ERASED_FILES = 16384  # more, since those that share a file are best erased together
LONG = 32 * 1024 * 1024
"""Bytes of memory that take long to give back."""


class Guard:
    """The target's lock, and what is checked under it: ``with guard.lock, guard.checked``.

    Both are named wherever the lock is taken: a context written in Python that took it could be
    interrupted by a signal's handler between the two, and the lock would never be released.

    Attributes:
        lock: the target's.
        checked: a context for a block that holds the lock: refuses it once the target is closed,
            trims the catalogue at its end, and translates SQLite's errors.
        closed: whether *checked* refuses.
        reason: what it says then.
    """

    __slots__ = ("checked", "closed", "lock", "reason")

    def __init__(
        self, lock: threading.Lock, catalogue: Catalogue, changed: threading.Event
    ) -> None:
        self.lock = lock
        self.checked = Checked(self, catalogue, changed)
        self.closed = False
        self.reason = "the target is closed"


class Checked:
    """See :class:`Guard`."""

    __slots__ = ("_catalogue", "_changed", "_guard")

    def __init__(self, guard: Guard, catalogue: Catalogue, changed: threading.Event) -> None:
        self._guard = guard
        self._catalogue = catalogue
        self._changed = changed

    def __enter__(self) -> None:
        if self._guard.closed:
            raise TargetNotFound(self._guard.reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._catalogue.trim()
            except builtins.Exception:
                # What was asked for is done; what could not be written is kept, and the next
                # commit tells why.
                self._catalogue.restore()
                self._changed.set()
        if not self._changed.is_set() and self._catalogue.uncommitted:
            self._changed.set()
        if isinstance(error, sqlite3.Error):
            self._catalogue.restore()
            raise translate(error, self._catalogue.path) from error


class RegionLoan:
    """Bytes of a region where they are, for a block that hands them to system calls.

    Nobody resizes the region or frees its bytes before the end of the block, which must not wait.

    Attributes:
        place: the bytes; None, without a reason, where that cannot be, now or at all: who reads or
            writes the usual way finds out why.  A load or store here would be killed if
            somebody who was granted the region had cut off its memory; a system call fails.
    """

    __slots__ = ("_gate", "_inode", "_wanted", "place")

    def __init__(
        self, gate: RegionGate, region: RegionID, offset: int, size: int, *, writable: bool
    ) -> None:
        self._gate = gate
        self._wanted = (region, offset, size, writable)
        self._inode: Inode | None = None
        self.place: memoryview | None = None

    def __enter__(self) -> RegionLoan:
        region, offset, size, writable = self._wanted
        gate = self._gate
        if gate.occupied:
            return self
        try:
            self._inode = gate._enter(region, "lend", False)
        except (Exception, WouldBlock):
            return self
        try:
            if offset >= 0 and offset + size <= self._inode.size:
                self.place = gate._storage.view(region, offset, size, writable=writable)
        except BaseException:
            gate._leave(self._inode)
            raise
        return self

    def load(self, offset: int, out: memoryview) -> None:
        """Fill *out* from *offset* of the region, within what was lent."""
        self._gate._storage.read_into(self._wanted[0], offset, out)

    def store(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset* of the region, within what was lent."""
        self._gate._storage.write(self._wanted[0], offset, data)

    def __exit__(self, *_: object) -> None:
        wrote = self._wanted[3] and self.place is not None
        self.place = None
        if self._inode is not None:
            self._gate._leave(self._inode, wrote=wrote)


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
        self._flushes: Counter[int] = Counter()  # of event loops, by their threads
        self._changed = threading.Event()  # the catalogue has something to commit
        self._guard = Guard(self._lock, catalogue, self._changed)
        # For the storage, which still has something to do when others are refused.
        self._storage_guard = Guard(self._lock, catalogue, self._changed)
        # To erase when that change is synced, and no guest touches that share any more.
        self._freed: deque[tuple[int, RegionID, Share | None]] = deque()
        self._grants: Grants | None = None  # while there are guests
        self._erasing = False  # a thread erases what loops leave to it
        self._holds: set[RegionID] = set()  # surveys that go on: erased bytes stay meanwhile
        self._kept: dict[RegionID, int] = {}  # sizes of regions erased during surveys
        self._ending: set[RegionID] = set()  # of those, the ones that calls are still inside
        self._long = threading.Lock()  # taken before `_lock` by what holds that for long
        self._grafting = threading.Lock()  # one graft at a time; taken before all others
        self._pid = os.getpid()
        forks.register(self)

    def _forked(self) -> None:
        """The target is the parent's: every call here fails, at once and without a lock of old."""
        reason = f"the target belongs to process {self._pid}, from which this one was forked"
        self._closed = True
        self._lock, self._long = threading.Lock(), threading.Lock()
        self._grafting = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._changed = threading.Event()
        for guard in (self._guard, self._storage_guard):
            guard.lock, guard.closed, guard.reason = self._lock, True, reason
        self._catalogue.give_up()
        self._grants = None

    @property
    def occupied(self) -> bool:
        """Whether a thread holds the lock for long, or is about to; event loops, which would have
        everybody wait, leave the target alone meanwhile."""
        return self._long.locked()

    def _announce(self) -> None:
        """Let event loops that found the target free, and are about to take its lock, do so; the
        caller holds ``_long``, and is about to hold the lock for long."""
        time.sleep(_GRACE)

    def patiently(self, work: Callable[[float], _T]) -> _T:
        """The result of *work*, which takes the lock and is told how many steps it may do with it.

        Where more are needed it raises ``Lengthy``, having done nothing, and is called once more,
        in a thread that may take its time.
        """
        try:
            return work(STEPS)
        except Lengthy:
            self._not_in_a_loop()
        with self._long:
            self._announce()
            return work(math.inf)

    @property
    def feed(self) -> Feed:
        """Tells what changes in the target."""
        return self._catalogue.feed

    def say_closed(self, reason: str) -> None:
        """Have calls after the target is closed fail with *reason*."""
        self._guard.reason = reason

    def _find(self, region: RegionID, what: str) -> Inode:
        """The region's inode, alive; the lock is held."""
        if self._closed:
            raise TargetNotFound(f"{what}: {self._guard.reason}")
        inode = self._catalogue.by_rid.get(region) if type(region) is RegionID else None
        if inode is None:
            try:
                inode = self._catalogue.region(region) if type(region) is RegionID else None
            except sqlite3.Error as error:
                raise translate(error, self._catalogue.path) from error
            if inode is None:
                raise InvalidRegion(f"{what}: there is no region {region!r} in this target")
        if inode.exposed is not None:
            inode.exposed.settle()
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

    def lend(
        self, region: RegionID, offset: int, size: int, *, writable: bool = False
    ) -> RegionLoan:
        """*size* bytes at *offset* where they are: ``with target.lend(...) as loan``."""
        return RegionLoan(self, region, offset, size, writable=writable)

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

    def _leave_exclusive(self, inode: Inode, *, wrote: bool = False) -> None:
        with self._lock:
            inode.exclusive = False
            self._inside -= 1
            if inode.dead:
                self._free(inode)
            elif wrote:
                if inode.exposed is not None:
                    inode.exposed.skip()
                self._touch(inode)
            if self._waiters:
                self._idle.notify_all()
        if self._freed:
            self._reap()

    def _not_in_a_loop(self) -> None:
        """Raise ``WouldBlock`` in a thread that runs an engine's event loop."""
        if threading.get_ident() in LOOPS:
            raise WouldBlock

    def _wait(self, wait: bool) -> None:
        if not wait:
            raise WouldBlock
        self._not_in_a_loop()
        self._check_waiting()
        self._waiters += 1
        try:
            # No handler interrupts a condition here, which would lose the lock: see interrupts.py.
            self._idle.wait(interrupts.LOOK_AROUND if interrupts.waits_held() else None)
        finally:
            self._waiters -= 1
        if not self._closed:
            interrupts.check()

    def _check_waiting(self) -> None:
        """Refuse to wait where an event loop would, for what only that loop brings to its end."""
        if self._flushes[threading.get_ident()]:
            raise TargetBusy(
                "a task of this thread is persisting, and cannot finish while the thread blocks"
                " here: let it finish first, or use warabi.aio"
            )

    def _check_alive(self, inode: Inode, what: str) -> None:
        if inode.dead:
            raise InvalidRegion(f"{what}: {inode.rid!r} was erased")

    def _touch(self, inode: Inode) -> None:
        if inode.share is not None:
            inode.share.settle(inode)
        inode.written_by(ORIGIN.get())
        self._catalogue.clock.wrote(inode)
        feed = self._catalogue.feed
        self._catalogue.touch(inode, durable=False, tell=False)
        if feed.watched:
            feed.inode(inode.ino, CONTENT)
        if not self._changed.is_set():
            self._changed.set()

    def _free(self, inode: Inode) -> None:
        self._freed.append((self._catalogue.change, inode.rid, inode.share))
        inode.share = None
        if self._holds:
            self._kept[inode.rid] = inode.size
        self._ending.discard(inode.rid)
        if not self._changed.is_set():
            self._changed.set()

    def _reap(self) -> None:
        """Erase from storage what the catalogue on the medium no longer mentions.

        It may take long, and an event loop does not wait: files are removed by who commits next,
        and many regions in memory by a thread.
        """
        if not (self._freed or self._kept or self._grants is not None):
            return
        in_loop = threading.get_ident() in LOOPS
        if not (in_loop and self._freed and self._left_to_others()):
            while self._erase_some():
                pass
        if self._grants is not None and self._grants.waiting:
            self._free_what_is_quiet()

    def _left_to_others(self) -> bool:
        """Whether others erase what an event loop would: have them do it."""
        with self._lock:
            if not self._holds:
                self._kept.clear()
            if self._storage.blocking:
                self._changed.set()
                return True
            if self._holds or len(self._freed) <= _ERASED or self._closed:
                return False
            if not self._erasing:
                self._erasing = True
                self._inside += 1
                threading.Thread(target=self._erase_beside, name="warabi-free").start()
            return True

    def _erase_beside(self) -> None:
        try:
            while self._erase_some():
                pass
        finally:
            with self._lock:
                self._erasing = False
                self._inside -= 1
                if self._waiters:
                    self._idle.notify_all()

    def _erase_some(self) -> bool:
        """Erase some of what is due; whether there may be more, after others had the lock."""
        due: list[RegionID] = []
        most = _ERASED_FILES if self._storage.blocking else _ERASED
        taken = 0
        with self._lock:
            if not self._holds:
                self._kept.clear()
            while (
                taken < most
                and not self._holds
                and self._freed
                and self._catalogue.is_synced(self._freed[0][0])
            ):
                taken += 1
                _, rid, share = self._freed.popleft()
                if share is not None and share.grants is self._grants:
                    share.grants.later(share.index, partial(self._erase_granted, rid, share))
                else:
                    due.append(rid)
        failed = self._erase_bytes(due) if due else 0
        return taken == most and not failed

    def _erase_bytes(self, rids: list[RegionID]) -> int:
        """Erase regions from storage; how many could not be."""
        failed = 0
        for rid, error in self._storage.erase_all(rids):
            # Erased it is, only its bytes are still there: the next one tries again.
            log.warning("%s; it will be retried", error)
            self._freed.append((0, rid, None))
            failed += 1
        return failed

    def _erase_granted(self, rid: RegionID, share: Share) -> None:
        # Guests that have not noticed yet hold descriptors and mappings, which would keep the room.
        try:
            self._storage.vacate(rid)
        except Exception as error:
            log.warning("%s; other processes may still hold its memory", error)
        self._erase_bytes([rid])
        with self._lock:
            share.grants.recycle(share.index)

    def _free_what_is_quiet(self) -> None:
        """Free places that guests were still touching when regions left them."""
        with self._lock:
            due = [] if self._grants is None else self._grants.due()
        for free in due:
            free()
