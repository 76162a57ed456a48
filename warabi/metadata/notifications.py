"""What changes in a target, told to those who keep copies of it, such as mounts.

Whoever changes something notes it, with the target's lock held.  A *subscription* gathers what
was noted, each thing once, until its owner takes it; when there is more than it can hold, it
says that everything may have changed.  Nobody ever waits for a subscriber.

A change is not told to the one who made it: ``ORIGIN`` says who is at work.  What guests wrote
(``target/leases.py``) is found later, on behalf of somebody else, so it is told to all, with the
time of the write: a guest knows when it last wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from warabi._core.changes import ATTRIBUTES, CONTENT, ORIGIN, Changes

MOST = 8192
"""Inodes and names that a subscription holds at a time."""
BATCH = 1000
"""Of each of them in one answer."""


class Subscription:
    """What one subscriber has not taken yet.

    Args:
        origin: whose changes are left out.
        new_names: whether it wants to hear of names that meant nothing before.
        wake: called, from any thread, when there is something to take.
    """

    def __init__(
        self, lock: threading.Lock, origin: object, new_names: bool, wake: Callable[[], None]
    ) -> None:
        self._lock = lock
        self.origin = origin
        self.new_names = new_names
        self.wake = wake
        self.awake = False
        self._everything = True
        self._inodes: dict[int, int] = {}
        self._names: dict[tuple[int, bytes], int] = {}

    def inode(self, ino: int, what: int) -> None:
        """Note a change of an inode; the feed's lock is held."""
        before = self._inodes.get(ino, ATTRIBUTES)
        # Of several writes by guests none is the last one for sure.
        merged = max(before, what) if ATTRIBUTES in (before, what) or before == what else CONTENT
        self._inodes[ino] = merged
        self._check_room()

    def name(self, parent: int, name: bytes, ino: int) -> None:
        """Note what a name means now; the feed's lock is held."""
        self._names[parent, name] = ino
        self._check_room()

    def _check_room(self) -> None:
        if len(self._inodes) + len(self._names) > MOST:
            self._forget()

    def _forget(self) -> None:
        self._everything = True
        self._inodes.clear()
        self._names.clear()

    def suspect_everything(self) -> None:
        """Start again: what was taken before did not arrive."""
        with self._lock:
            self._forget()

    def take(self, number: int) -> Changes | None:
        """What was noted, or a part of it, as answer *number*; None when there is nothing."""
        with self._lock:
            self.awake = False
            if not (self._everything or self._inodes or self._names):
                return None
            everything, self._everything = self._everything, False
            inodes = {ino: self._inodes.pop(ino) for ino in list(self._inodes)[:BATCH]}
            names = {key: self._names.pop(key) for key in list(self._names)[:BATCH]}
            return Changes(number, everything, inodes, names)


class Feed:
    """The subscriptions of one target."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self.watched = False
        """Whether there is anybody to tell."""

    def subscribe(self, origin: object, new_names: bool, wake: Callable[[], None]) -> Subscription:
        """A new subscription, which begins with everything; the arguments are its own."""
        subscription = Subscription(self._lock, origin, new_names, wake)
        with self._lock:
            self._subscriptions = [*self._subscriptions, subscription]
            self.watched = True
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Tell it nothing any more."""
        with self._lock:
            self._drop(subscription)

    def _drop(self, subscription: Subscription) -> None:
        self._subscriptions = [one for one in self._subscriptions if one is not subscription]
        self.watched = bool(self._subscriptions)

    def nudge(self) -> None:
        """Wake every subscriber: how it has to look has changed."""
        with self._lock:
            for subscription in self._subscriptions:
                self._wake(subscription)

    def inode(self, ino: int, what: int) -> None:
        """An inode changed: *what* is a value of ``Changes.inodes``."""
        origin = ORIGIN.get() if what in (ATTRIBUTES, CONTENT) else None
        with self._lock:
            for subscription in self._subscriptions:
                if origin is None or subscription.origin is not origin:
                    subscription.inode(ino, what)
                    self._wake(subscription)

    def name(self, parent: int, name: bytes, ino: int, *, new: bool = False) -> None:
        """A name in the directory *parent* means *ino* now; *new* when it meant nothing before."""
        origin = ORIGIN.get()
        with self._lock:
            for subscription in self._subscriptions:
                if origin is not None and subscription.origin is origin:
                    continue
                if subscription.new_names or not new:
                    subscription.name(parent, name, ino)
                    self._wake(subscription)

    def _wake(self, subscription: Subscription) -> None:
        if subscription.awake:
            return
        subscription.awake = True
        try:
            subscription.wake()
        except RuntimeError:  # its event loop has ended
            self._drop(subscription)
