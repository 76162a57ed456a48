"""Mirror of the kernel's dentry cache, for targets that other clients change.

The invalidator reads it to find the names that the kernel must look up again.
"""

from __future__ import annotations

from collections.abc import Callable

_ABSENT = 10_000  # negative dentries that the kernel may hold

Key = tuple[int, bytes]


class BelievedNames:
    """The names that the kernel has cached, with the inode that each refers to.

    Args:
        drop: makes the kernel drop the cached entry of a name, asynchronously.
    """

    def __init__(self, drop: Callable[[int, bytes], None]) -> None:
        self._drop = drop
        self._names: dict[Key, int] = {}
        self._names_of: dict[int, set[Key]] = {}
        self._absent: dict[Key, None] = {}  # oldest first

    def get(self, directory: int, name: bytes) -> int:
        """Return the inode number that the kernel has cached for a name; 0 if none."""
        return self._names.get((directory, name), 0)

    def set(self, directory: int, name: bytes, ino: int) -> None:
        """Record that the kernel has cached *ino* for a name; 0: the kernel has nothing cached."""
        key = (directory, name)
        self._absent.pop(key, None)
        before = self._names.pop(key, 0)
        if before:
            self._names_of[before].discard(key)
        if ino:
            self._names[key] = ino
            self._names_of.setdefault(ino, set()).add(key)

    def set_absent(self, directory: int, name: bytes) -> None:
        """Record a negative dentry; beyond ``_ABSENT`` of them the kernel drops the oldest."""
        self._absent[directory, name] = None
        if len(self._absent) > _ABSENT:
            oldest = next(iter(self._absent))
            del self._absent[oldest]
            self._drop(*oldest)

    def forget(self, ino: int) -> None:
        """Remove all names of an inode that the kernel forgot."""
        for key in self._names_of.pop(ino, ()):
            self._names.pop(key, None)

    def forget_absent(self, directory: int, name: bytes) -> None:
        """Remove a negative dentry that the kernel is about to drop."""
        self._absent.pop((directory, name), None)

    def all(self) -> dict[Key, int]:
        """Return all names with their inodes (0 for negative dentries), and clear the latter."""
        names = {**dict.fromkeys(self._absent, 0), **self._names}
        self._absent.clear()
        return names
