"""Notifications of changes to clients that cache data of a target, such as mounts.

Every change is recorded, with the target's lock held.  A *subscription* collects the changes, each
object once, until its owner fetches them; if there are too many, it reports that everything may
have changed.  Changes never wait for a subscriber.

The connection that made a change is not notified: it is in ``ORIGIN``.  Writes by guests
(``target/leases.py``) are found later, without an origin, so all are notified, with the time of the
write: a guest knows when it last wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from warabi._core import forks
from warabi._core.changes import ATTRIBUTES, CONTENT, ORIGIN, Changes

MOST = 8192
"""Most inodes and names in a subscription."""
BATCH = 1000
"""Most of each of them in one reply."""


class Subscription:
    """The changes that one subscriber has not fetched yet.

    Args:
        origin: the subscriber's own changes, which are omitted.
        new_names: whether to include names that did not exist before.
        wake: called, from any thread, when there is something to fetch.
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
        """Record a change of an inode; the feed's lock is held."""
        before = self._inodes.get(ino, ATTRIBUTES)
        # Two different times of guests' writes: which one is the last is not certain.
        merged = max(before, what) if ATTRIBUTES in (before, what) or before == what else CONTENT
        self._inodes[ino] = merged
        self._check_room()

    def name(self, parent: int, name: bytes, ino: int) -> None:
        """Record what a name refers to now; the feed's lock is held."""
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
        """Start again: the last reply did not arrive."""
        with self._lock:
            self._forget()

    def take(self, number: int) -> Changes | None:
        """Return the changes, or a part of them, as reply *number*; None if there are none."""
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
        self._lock = forks.lock()
        self._subscriptions: list[Subscription] = []
        self.watched = False
        """Whether there are subscribers."""

    def subscribe(self, origin: object, new_names: bool, wake: Callable[[], None]) -> Subscription:
        """Add a subscription, whose first reply reports that everything may have changed."""
        subscription = Subscription(self._lock, origin, new_names, wake)
        with self._lock:
            self._subscriptions = [*self._subscriptions, subscription]
            self.watched = True
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription."""
        with self._lock:
            self._drop(subscription)

    def _drop(self, subscription: Subscription) -> None:
        self._subscriptions = [one for one in self._subscriptions if one is not subscription]
        self.watched = bool(self._subscriptions)

    def nudge(self) -> None:
        """Wake every subscriber, since the way to look for changes has changed."""
        with self._lock:
            for subscription in self._subscriptions:
                self._wake(subscription)

    def inode(self, ino: int, what: int) -> None:
        """Record a change of an inode; *what* is a value of ``Changes.inodes``."""
        origin = ORIGIN.get() if what in (ATTRIBUTES, CONTENT) else None
        with self._lock:
            for subscription in self._subscriptions:
                if origin is None or subscription.origin is not origin:
                    subscription.inode(ino, what)
                    self._wake(subscription)

    def name(self, parent: int, name: bytes, ino: int, *, new: bool = False) -> None:
        """Record that a name in *parent* refers to *ino* now; *new*: it did not exist before."""
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
        except RuntimeError:  # the subscriber's event loop has ended
            self._drop(subscription)
