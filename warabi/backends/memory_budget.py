"""Limits on the memory for regions, so that it is exhausted before the machine's memory is.

Memory for regions is *charged* before it is filled.  A charge is taken from an allowance; only when
that is exhausted are the machine, the control groups of this process and, if there is a limit, the
actual memory use examined to determine the next allowance.  So charges may be too high, for example
for pages that exist already, which only causes more examinations; and memory use of other programs
is noticed in time, since an allowance is a fraction of the available memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from warabi._core import forks
from warabi._core.procfs import unescaped
from warabi._core.tuning import GROUPS_CHECK
from warabi.errors import StorageFull

PAGE = 4096
_STEP = 64 * 1024 * 1024  # most bytes of an allowance
_RELIEF = 8 * 1024 * 1024  # bytes that are freed in addition to those missing
_PART = 4  # an allowance is at most this fraction of what is left
_LARGEST_RESERVE = 256 * 1024 * 1024
_RESERVE_PART = 8
_UNLIMITED = 1 << 60  # control groups version 1 report more than this if there is no limit
_MOST_READ = 16 * 1024
_NAMES = (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree")


class Machine:
    """The memory of this machine, as available to this process and its control groups.

    The list of control groups is refreshed at most once per minute, since processes hardly ever
    move to other groups; their limits are read each time.

    Args:
        root: the directory with ``proc``, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._meminfo = str(root / "proc/meminfo")
        self._groups: list[_Group] = []
        self._until = 0.0  # when to list the groups again
        self._known: tuple[int, int] | None = None

    def physical(self) -> int:
        """Bytes of memory without swap space, or the limit of a control group."""
        limits = [limit for limit, _ in self._limits()]
        return min([self._info()[b"MemTotal"], *limits])

    def memory(self) -> tuple[int, int]:
        """Total bytes, and bytes available now, including swap space.

        If this process has no free descriptor, returns the previous result.
        """
        try:
            self._known = self._memory()
        except OSError:
            if self._known is None:
                raise
        return self._known

    def _memory(self) -> tuple[int, int]:
        info = self._info()
        total = info[b"MemTotal"] + info[b"SwapTotal"]
        available = info[b"MemAvailable"] + info[b"SwapFree"]
        for limit, left in self._limits():
            total, available = min(total, limit), min(available, left)
        return total, available

    def _info(self) -> dict[bytes, int]:
        found = {}
        for line in _content(self._meminfo).splitlines():
            name, _, value = line.partition(b":")
            if name in _NAMES:
                found[name] = int(value.split()[0]) * 1024
        return found

    def _limits(self) -> list[tuple[int, int]]:
        """Return the limit, and the bytes left below it, of each control group with a limit."""
        if (now := time.monotonic()) >= self._until:
            self._groups = _groups(self._root)
            self._until = now + GROUPS_CHECK
        return [limit for group in self._groups if (limit := _limit(group)) is not None]


_machine = Machine()
physical_memory = _machine.physical
machine_memory = _machine.memory


def _content(path: str) -> bytes:
    """Read a file of the kernel with as few system calls as possible; raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(fd, _MOST_READ)
        # A short read is the end: the kernel generates the text at once.
        while found and len(found) % PAGE == 0 and (more := os.read(fd, _MOST_READ)):
            found += more
        return found
    finally:
        os.close(fd)


def reserve(total: int) -> int:
    """Return the part of *total* bytes that is reserved for other use, including this process."""
    return min(_LARGEST_RESERVE, total // _RESERVE_PART)


class _Group(NamedTuple):
    """The files of a control group, and the prefix of the names in the last one."""

    limit: str
    usage: str
    stat: str
    prefix: bytes


def _groups(root: Path) -> list[_Group]:
    """Return the memory control groups of this process, and their ancestors."""
    found = []
    for directory, top, (limit, usage, prefix) in _places(root):
        for each in (directory, *directory.parents):
            if (each / limit).exists():  # the root of a hierarchy has no limit
                files = [str(each / name) for name in (limit, usage, "memory.stat")]
                found.append(_Group(files[0], files[1], files[2], prefix.encode()))
            if each == top:
                break
    return found


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")


def _places(root: Path) -> list[tuple[Path, Path, tuple[str, str, str]]]:
    """Return the directories of this process's memory control groups, each with the mount point of
    its hierarchy, and its file names."""
    try:
        own = (root / "proc/self/cgroup").read_bytes().splitlines()
        mounts = (root / "proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    paths = {}  # by version
    for line in own:
        _, controllers, path = line.split(b":", 2)
        if not controllers:
            paths[2] = path
        elif b"memory" in controllers.split(b","):
            paths[1] = path
    places = []
    for line in mounts:
        left, _, right = line.partition(b" - ")
        kind, *_, options = right.split(b" ")
        version = {b"cgroup2": 2, b"cgroup": 1}.get(kind, 0)
        if version not in paths or (version == 1 and b"memory" not in options.split(b",")):
            continue
        inner, point = (_path(field) for field in left.split(b" ")[3:5])
        own_path = _path(paths[version])
        # In a container the root of the mount may be a descendant of the path's first group.
        below = own_path.relative_to(inner) if own_path.is_relative_to(inner) else Path()
        top = root / point.relative_to("/")
        places.append((top / below, top, _V2 if version == 2 else _V1))
    return places


def _path(field: bytes) -> Path:
    return Path(os.fsdecode(unescaped(field)))


def _limit(group: _Group) -> tuple[int, int] | None:
    """Return a group's limit, and the bytes left below it; None without a limit."""
    try:
        most = int(_content(group.limit))
        if most >= _UNLIMITED:
            return None
        used = int(_content(group.usage))
        stat = dict(line.split() for line in _content(group.stat).splitlines())
        # The page cache of files is reclaimed before a process is killed; memory of regions is not.
        files = sum(
            int(stat.get(group.prefix + kind, 0)) for kind in (b"inactive_file", b"active_file")
        )
    except (OSError, ValueError):  # "max", or the group was removed
        return None
    return most, max(0, most - used + files)


class MemoryBudget:
    """The memory that regions may still use.

    Args:
        limit: most bytes in all; None for what the machine can provide.
        used: returns the bytes in use.
        promised: returns the bytes that would be used in addition if other processes filled the
            memory shared with them.
        relieve: frees at least so many spare bytes, if there are so many.
    """

    def __init__(
        self,
        limit: int | None,
        used: Callable[[], int],
        promised: Callable[[], int],
        relieve: Callable[[int], None],
    ) -> None:
        self.limit = limit
        self._used = used
        self._promised = promised
        self._relieve = relieve
        self._allowance = 0
        self._lock = forks.lock()

    def charge(self, count: int) -> None:
        """Reserve *count* bytes that are about to be filled.

        Raises:
            StorageFull: there is too little memory; nothing may be filled.
        """
        # Charges of concurrent threads may get lost; the reserve is much more than they can lose.
        self._allowance -= count
        if self._allowance < 0:
            self._look(count)

    def _look(self, count: int) -> None:
        with self._lock:
            self._allowance = 0
            left = self._left()
            if left < count:
                self._relieve(count - left + _RELIEF)
                left = self._left()
                if left < count:
                    raise StorageFull(self._refusal(count, left))
            self._allowance = min(_STEP, (left - count) // _PART)

    def _left(self) -> int:
        return self._below(*machine_memory())

    def _below(self, total: int, available: int) -> int:
        left = available - reserve(total)
        if self.limit is not None:
            left = min(left, self.limit - self._used())
        return max(0, left - self._promised())

    def _refusal(self, count: int, left: int) -> str:
        if self.limit is not None:
            return (
                f"{count} more bytes do not fit: {self._used()} of {self.limit} bytes of memory are"
                f" used, and {left} are left"
            )
        return f"{count} more bytes do not fit: this machine has memory for {left} more"

    def room(self) -> tuple[int, int]:
        """Return total bytes, and bytes available without freeing spare memory."""
        total, available = machine_memory()
        left = self._below(total, available)
        return total if self.limit is None else min(total, self.limit), left
