"""What the kernel believes of names in a tree that others change."""

from __future__ import annotations

from collections.abc import Callable

_ABSENT = 10_000  # names that the kernel may believe to mean nothing

Key = tuple[int, bytes]


class BelievedNames:
    """Names in directories that the kernel need not ask for.

    Args:
        drop: makes it let go of one, later.
    """

    def __init__(self, drop: Callable[[int, bytes], None]) -> None:
        self._drop = drop
        self._names: dict[Key, int] = {}
        self._names_of: dict[int, set[Key]] = {}
        self._absent: dict[Key, None] = {}  # the oldest first

    def get(self, directory: int, name: bytes) -> int:
        """The inode that it is believed to mean; 0 when none is."""
        return self._names.get((directory, name), 0)

    def set(self, directory: int, name: bytes, ino: int) -> None:
        """The kernel knows that a name means *ino* now; 0: that it must ask."""
        key = (directory, name)
        self._absent.pop(key, None)
        before = self._names.pop(key, 0)
        if before:
            self._names_of[before].discard(key)
        if ino:
            self._names[key] = ino
            self._names_of.setdefault(ino, set()).add(key)

    def set_absent(self, directory: int, name: bytes) -> None:
        """The kernel believes that a name means nothing; it lets go of the oldest of too many."""
        self._absent[directory, name] = None
        if len(self._absent) > _ABSENT:
            oldest = next(iter(self._absent))
            del self._absent[oldest]
            self._drop(*oldest)

    def forget(self, ino: int) -> None:
        """The kernel forgot an inode, and what means it."""
        for key in self._names_of.pop(ino, ()):
            self._names.pop(key, None)

    def forget_absent(self, directory: int, name: bytes) -> None:
        """The kernel is about to be told that a name may mean something."""
        self._absent.pop((directory, name), None)

    def all(self) -> dict[Key, int]:
        """All of them, and what they mean, for the kernel to forget."""
        names = {**dict.fromkeys(self._absent, 0), **self._names}
        self._absent.clear()
        return names
