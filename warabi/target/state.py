"""What the parts of a target share: catalogue, storage, and the lock that covers the catalogue.

Every other part is given this one.  It calls none of them.

What holds the lock for longer than an event loop may wait takes ``long`` first.  Event loops look
at ``occupied``, and leave the target alone meanwhile.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from warabi._core import forks
from warabi._core.tuning import OCCUPIED_GRACE
from warabi.backends import Storage
from warabi.errors import Lengthy, TargetNotFound, WouldBlock
from warabi.metadata.catalogue import Catalogue
from warabi.metadata.guard import Guard

_T = TypeVar("_T")

LOOPS: set[int] = set()
"""Threads that run the event loop of an engine or a mount, or execute a call for a Trio task
(:func:`in_loop`).  A call that would make one of them wait for a region, or take long, raises
``WouldBlock`` without effect; a worker thread then makes it."""
STEPS = 5000
"""Names or directories, of some microseconds each, to process while other calls wait."""
LONG = 32 * 1024 * 1024
"""Bytes of memory that take long to free."""


def in_loop(call: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
    """Return the result of *call* for a task of the event loop that this thread runs, which must
    not wait; raises ``WouldBlock`` where it would.

    A program's own loop is in ``LOOPS`` only meanwhile, since its blocking calls do wait.
    """
    thread = threading.get_ident()
    if thread in LOOPS:
        return call(*arguments, **named)
    LOOPS.add(thread)
    try:
        return call(*arguments, **named)
    finally:
        LOOPS.discard(thread)


def not_in_a_loop() -> None:
    """Raise ``WouldBlock`` in a thread that runs an event loop."""
    if threading.get_ident() in LOOPS:
        raise WouldBlock


class TargetState:
    """State of one target that several of its parts use.

    Attributes:
        catalogue: which regions exist.
        storage: where their bytes are.
        lock: the target's lock.  It covers *catalogue*, the inodes and what the parts know of
            them.  It is held for short steps, never while bytes of a region move or stable storage
            is waited for.  Order: ``Committer``'s lock of times and ``long`` before it; those of
            the notifications and of the storage after it.  The catalogue's sync lock is never
            held together with it, except by a checkpoint of a catalogue on another system.  See
            docs/locks.md.
        long: taken, never by an event loop, before *lock* by what holds that for long.
        grafting: taken by a graft, of which there is one at a time, before all others.
        guard: *lock* with the checks for callers of the target.
        storage_guard: as *guard*, for the storage, which still has to be served while the target
            closes and refuses calls.
        changed: set when the catalogue has something to commit.
        closed: calls are refused; *guard* follows when nothing changes any more.
    """

    def __init__(self, catalogue: Catalogue, storage: Storage) -> None:
        self.catalogue = catalogue
        self.storage = storage
        self.lock = forks.lock()
        self.long = forks.lock()
        self.grafting = forks.lock()
        self.changed = forks.event()
        self.guard = Guard(self.lock, catalogue, self.changed)
        self.storage_guard = Guard(self.lock, catalogue, self.changed)
        self.closed = False
        self._pid = os.getpid()

    def forked(self) -> None:
        """In a forked child the target is the parent's: every call fails at once."""
        self.closed = True
        for guard in (self.guard, self.storage_guard):
            guard.closed = True
            guard.reason = (
                f"the target belongs to process {self._pid}, from which this one was forked"
            )
        self.catalogue.give_up()

    def check_open(self, what: str) -> None:
        """Raise ``TargetNotFound``, for the operation *what*, once the target is closed."""
        if self.closed:
            raise TargetNotFound(f"{what}: {self.guard.reason}")

    @property
    def occupied(self) -> bool:
        """Whether a thread holds the lock for long, or is about to."""
        return self.long.locked()

    def announce(self) -> None:
        """Wait until event loops that found the target free have acquired its lock; the caller
        holds ``long``, and is about to hold the lock for long."""
        time.sleep(OCCUPIED_GRACE)

    def patiently(self, work: Callable[[float], _T]) -> _T:
        """Return the result of *work*, which acquires the lock and is passed a limit on its steps.

        If more are needed it raises ``Lengthy`` without effect, and is called again without a
        limit, unless this thread runs an event loop.
        """
        try:
            return work(STEPS)
        except Lengthy:
            not_in_a_loop()
        with self.long:
            self.announce()
            return work(math.inf)
