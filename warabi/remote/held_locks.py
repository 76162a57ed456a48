"""What a client that connects again has locked, and what it has lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from warabi import errors
from warabi._core.lock_ranges import END, EXCLUSIVE, SHARED, UNLOCK, FileLock, LockRanges
from warabi.region import RegionID

_Key = tuple[RegionID, bool, int]
"""A region, whether locks of flock(2), and an owner."""
_Request = tuple[Any, ...]
"""Arguments of the operation ``lock``."""


class HeldLocks:
    """The locks of a client, without I/O.

    A lock is *lost* if it was not held all the time: another client may have locked the same
    meanwhile.  From then on everything that uses the file fails, until the owner has unlocked what
    it has lost.

    Attributes:
        unknown: requests to unlock what may be locked at the provider, and is not here.
        lost_in: regions with lost locks.
    """

    def __init__(self) -> None:
        self._held: dict[_Key, LockRanges] = {}
        self._lost: dict[_Key, LockRanges] = {}
        self.lost_in: set[RegionID] = set()
        self.unknown: list[_Request] = []

    def check(self, region: object, what: str) -> None:
        """Check that no lock on a region was lost.

        Raises:
            StorageError: one was, and its owner has not unlocked it yet.
        """
        if region in self.lost_in:
            raise errors.StorageError(
                f"{what} {region!r}: a lock on it was lost with the connection; unlock it first"
            )

    def check_owner(self, request: Sequence[Any]) -> None:
        """Check that an owner has lost nothing of the file that it is about to lock.

        Raises:
            StorageError: it has.
        """
        region, flock, owner, kind = request[:4]
        if kind != UNLOCK and (region, flock, owner) in self._lost:
            self.check(region, "lock")

    def granted(self, request: Sequence[Any]) -> None:
        """Record that a request was carried out."""
        region, flock, owner, kind, start, end, *_ = request
        key = (region, flock, owner)
        if flock:
            start, end = 0, END
        self.unknown = [
            one
            for one in self.unknown
            if one[:3] != key or one[4] < start or one[5] > end  # else it is known now
        ]
        if kind == UNLOCK:
            self._unlock(self._held, key, start, end)
            self._found(key, start, end)
        else:
            self._held.setdefault(key, LockRanges()).lock(start, end, kind == EXCLUSIVE, 0)

    def asked(self, request: Sequence[Any]) -> None:
        """Record that a request is about to be sent.  One that converts a lock of flock(2) gives
        that up first, as the provider does."""
        region, flock, owner, kind, *_ = request
        held = self._held.get((region, flock, owner))
        if flock and held is not None and not held.covers(0, END, kind == EXCLUSIVE):
            del self._held[region, flock, owner]

    def uncertain(self, request: Sequence[Any]) -> None:
        """Record that it is unknown whether a request was carried out: what the owner had in its
        place is lost, and the provider is to unlock it."""
        region, flock, owner, kind, start, end, *_ = request
        key = (region, flock, owner)
        held = self._held.get(key)
        if kind != UNLOCK and held is not None and held.conflict(start, end, True):
            self.lose(key, FileLock(True, start, end, 0))
        self._unlock(self._held, key, start, end)
        self.unknown.append((*key, UNLOCK, start, end, 0, 0))

    def items(self) -> Iterator[tuple[_Key, FileLock]]:
        """Yield what is held."""
        for key, ranges in list(self._held.items()):
            for item in list(ranges):
                yield key, item

    @staticmethod
    def question(key: _Key, item: FileLock) -> _Request:
        """Return the arguments of ``holds_lock`` for what is held."""
        return (*key, EXCLUSIVE if item.exclusive else SHARED, item.start, item.end)

    def lose(self, key: _Key, item: FileLock) -> None:
        """Record that a lock is lost."""
        self._unlock(self._held, key, item.start, item.end)
        self._lost.setdefault(key, LockRanges()).lock(item.start, item.end, True, 0)
        self.lost_in.add(key[0])

    @staticmethod
    def _unlock(table: dict[_Key, LockRanges], key: _Key, start: int, end: int) -> None:
        ranges = table.get(key)
        if ranges is not None:
            ranges.unlock(start, end)
            if not ranges:
                del table[key]

    def _found(self, key: _Key, start: int, end: int) -> None:
        """The owner has unlocked what it had lost."""
        if key in self._lost:
            self._unlock(self._lost, key, start, end)
            self.lost_in = {region for region, _, _ in self._lost}
