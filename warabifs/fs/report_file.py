"""A virtual file in the root directory of a mount: reading it gives a report of the mount's state.

It is in no listing, and a file of the target with the same name takes precedence.  Each lookup
makes a new report and a new inode for it.  So the size and the bytes of an inode never change, a
program that reads in several steps sees one report, and no page in the kernel's cache is outdated.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections.abc import Awaitable, Callable

from warabi._core.attributes import FIRST_REPORT, ROOT, Attributes
from warabi.errors import path_error

VALID = 1
"""Seconds for which the kernel may cache the name: programs that query the attributes before they
open the file, such as cp(1), expect the same inode."""


async def _nothing() -> bytes:
    return b""


class ReportFiles:
    """The reports that the kernel knows.

    Args:
        name: the file's name in the root directory; empty for no such file.
        make: returns a report.
    """

    def __init__(self, name: bytes = b"", make: Callable[[], Awaitable[bytes]] = _nothing) -> None:
        self._name = name
        self._make = make
        self._next = itertools.count(FIRST_REPORT)
        self._reports: dict[int, tuple[Attributes, bytes]] = {}

    def has(self, directory: int, name: bytes) -> bool:
        """Whether the file has that name in that directory."""
        return directory == ROOT and name == self._name

    async def lookup(self) -> Attributes:
        """Make a report; returns the attributes of its inode, which exists until it is
        forgotten."""
        text = await self._make()
        now, ino = time.time_ns(), next(self._next)
        mode = stat.S_IFREG | 0o440
        owner = os.geteuid(), os.getegid()
        attributes = Attributes(ino, 1, mode, 1, *owner, 0, len(text), now, now, now)
        self._reports[ino] = attributes, text
        return attributes

    def forget(self, ino: int) -> None:
        """Drop a report; each is looked up once."""
        self._reports.pop(ino, None)

    def getattr(self, ino: int) -> Attributes:
        """Return the attributes of a report."""
        return self._find(ino)[0]

    def read(self, ino: int, offset: int, size: int) -> bytes:
        """Return up to *size* bytes of a report."""
        return self._find(ino)[1][offset : offset + size]

    def open(self, ino: int, flags: int) -> None:
        """Check that a report may be opened with *flags*, as for open(2)."""
        self._find(ino)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise path_error(errno.EPERM, "a report cannot be written")

    def _find(self, ino: int) -> tuple[Attributes, bytes]:
        found = self._reports.get(ino)
        if found is None:
            raise path_error(errno.ESTALE, f"inode {ino}: unknown")
        return found
