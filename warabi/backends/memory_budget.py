"""How much memory regions may take, so that they run out before the machine does.

Memory for regions is *charged* before it is filled.  A charge takes from an allowance; only when
that is used up does a look at the machine, at the control groups of this process and, if there is a
limit, at what the regions really take, tell how large the next one may be.  So charges may be too
high, for pages that exist already perhaps, and cost nothing but looks; and what other programs do
with the memory meanwhile is seen in time, for an allowance is a part of what is left.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from warabi.errors import StorageFull

PAGE = 4096
_STEP = 64 * 1024 * 1024  # bytes of an allowance, at most
_RELIEF = 8 * 1024 * 1024  # more bytes that are given back than are missing
_PART = 4  # no allowance is more than this part of what is left
_LARGEST_RESERVE = 256 * 1024 * 1024
_RESERVE_PART = 8
_UNLIMITED = 1 << 60  # what version 1 of control groups says without a limit is more
_PATIENCE = 60.0  # seconds
_MOST_READ = 16 * 1024
_NAMES = (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Machine:
    """The memory of this machine, as far as this process and its control groups can have it.

    Where the groups are is read again after a minute at the earliest, as a process hardly ever gets
    into others; their limits are read each time.

    Args:
        root: the directory with ``proc``, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._meminfo = str(root / "proc/meminfo")
        self._groups: list[_Group] = []
        self._until = 0.0  # when to look for the groups again
        self._known: tuple[int, int] | None = None

    def physical(self) -> int:
        """Bytes of memory without swap space, or the limit of a control group."""
        limits = [limit for limit, _ in self._limits()]
        return min([self._info()[b"MemTotal"], *limits])

    def memory(self) -> tuple[int, int]:
        """Bytes in all, and those that can be had now, swap space included.

        When this process has no descriptor left to look with, what was found before.
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
        """Limit, and bytes left below it, of each control group with one."""
        if (now := time.monotonic()) >= self._until:
            self._groups = _groups(self._root)
            self._until = now + _PATIENCE
        return [limit for group in self._groups if (limit := _limit(group)) is not None]


_machine = Machine()
physical_memory = _machine.physical
machine_memory = _machine.memory


def _content(path: str) -> bytes:
    """All of a file of the kernel's, by as few system calls as that takes; raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(fd, _MOST_READ)
        # Shorter reads are the end: the kernel makes the text of such a file at once.
        while found and len(found) % PAGE == 0 and (more := os.read(fd, _MOST_READ)):
            found += more
        return found
    finally:
        os.close(fd)


def reserve(total: int) -> int:
    """What of *total* bytes of memory regions leave to everything else, this process included."""
    return min(_LARGEST_RESERVE, total // _RESERVE_PART)


class _Group(NamedTuple):
    """The files of a control group, and how the names in the last one begin."""

    limit: str
    usage: str
    stat: str
    prefix: bytes


def _groups(root: Path) -> list[_Group]:
    """The control groups for memory that this process is in, and those above them."""
    found = []
    for directory, top, (limit, usage, prefix) in _places(root):
        for each in (directory, *directory.parents):
            if (each / limit).exists():  # there is none at the root of a hierarchy
                files = [str(each / name) for name in (limit, usage, "memory.stat")]
                found.append(_Group(files[0], files[1], files[2], prefix.encode()))
            if each == top:
                break
    return found


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")


def _places(root: Path) -> list[tuple[Path, Path, tuple[str, str, str]]]:
    """The directories of this process's control groups for memory, each with the one where its
    hierarchy is mounted, and how its files are named."""
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
        # In a container the mount may be of a group further down than the path begins.
        below = own_path.relative_to(inner) if own_path.is_relative_to(inner) else Path()
        top = root / point.relative_to("/")
        places.append((top / below, top, _V2 if version == 2 else _V1))
    return places


def _path(field: bytes) -> Path:
    text = _ESCAPED.sub(lambda found: bytes((int(found[1], 8),)), field)
    return Path(text.decode(errors="surrogateescape"))


def _limit(group: _Group) -> tuple[int, int] | None:
    """A group's limit, and the bytes left below it; None without one."""
    try:
        most = int(_content(group.limit))
        if most >= _UNLIMITED:
            return None
        used = int(_content(group.usage))
        stat = dict(line.split() for line in _content(group.stat).splitlines())
        # Pages of files are given back before a process is killed; those of regions are none.
        files = sum(
            int(stat.get(group.prefix + kind, 0)) for kind in (b"inactive_file", b"active_file")
        )
    except (OSError, ValueError):  # "max", or the group is gone
        return None
    return most, max(0, most - used + files)


class MemoryBudget:
    """What regions in memory may still take.

    Args:
        limit: bytes that they may take in all; None for what the machine can give.
        used: how many they take.
        promised: how many more they would take if others filled what they may fill.
        relieve: gives back at least so many bytes that are kept and not used, if there are.
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
        self._lock = threading.Lock()

    def charge(self, count: int) -> None:
        """Take note that *count* bytes are about to be filled.

        Raises:
            StorageFull: they do not fit; nothing may be filled.
        """
        # Threads may lose each other's charges here; the reserve is much more than they can lose.
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
        """Total bytes, and those that can be had now without relief."""
        total, available = machine_memory()
        left = self._below(total, available)
        return total if self.limit is None else min(total, self.limit), left
