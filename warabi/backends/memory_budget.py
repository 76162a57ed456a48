"""How much memory regions may take, so that they run out before the machine does.

Memory for regions is *charged* before it is filled.  A charge takes from an allowance; only when
that is used up does a look at the machine, at the control groups of this process and, if there is a
limit, at what the regions really take, tell how large the next one may be.  So charges may be too
high, for pages that exist already perhaps, and cost nothing but looks; and what other programs do
with the memory meanwhile is seen in time, for an allowance is a part of what is left.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from warabi.errors import StorageFull

PAGE = 4096
_STEP = 64 * 1024 * 1024  # bytes of an allowance, at most
_PART = 4  # no allowance is more than this part of what is left
_LARGEST_RESERVE = 256 * 1024 * 1024
_RESERVE_PART = 16
_UNLIMITED = 1 << 60  # what version 1 of control groups says without a limit is more
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def physical_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could have: the machine's without swap space, or the limit
    of one of its control groups.  *root* is where ``proc`` is, for tests."""
    limits = [limit for limit, _ in _groups(root)]
    return min([_meminfo(root)["MemTotal"], *limits])


def machine_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes that this process could have, and those that it can get now, swap space included."""
    info = _meminfo(root)
    total = info["MemTotal"] + info["SwapTotal"]
    available = info["MemAvailable"] + info["SwapFree"]
    for limit, left in _groups(root):
        total, available = min(total, limit), min(available, left)
    return total, available


def reserve(total: int) -> int:
    """What of *total* bytes of memory regions leave to everything else, this process included."""
    return min(_LARGEST_RESERVE, total // _RESERVE_PART)


def _meminfo(root: Path) -> dict[str, int]:
    with open(root / "proc/meminfo", encoding="ascii") as file:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit, and bytes left below it, of each control group with one that this process is in."""
    found = []
    for directory, top, files in _places(root):
        while True:
            if (group := _group(directory, *files)) is not None:
                found.append(group)
            if directory == top or top not in directory.parents:
                break
            directory = directory.parent
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


def _group(directory: Path, limit: str, usage: str, prefix: str) -> tuple[int, int] | None:
    try:
        most = int((directory / limit).read_bytes())
        if most >= _UNLIMITED:
            return None
        used = int((directory / usage).read_bytes())
        stat = dict(line.split() for line in (directory / "memory.stat").read_bytes().splitlines())
        # Pages of files are given back before a process is killed; those of regions are none.
        files = sum(
            int(stat.get(f"{prefix}{kind}_file".encode(), 0)) for kind in ("inactive", "active")
        )
    except (OSError, ValueError):  # "max", or no such file at the root of a hierarchy
        return None
    return most, max(0, most - used + files)


class Budget:
    """What regions in memory may still take.

    Args:
        limit: bytes that they may take in all; None for what the machine can give.
        used: how many they take.
        promised: how many more they would take if others filled what they may fill.
        relieve: gives back what is kept and not used.
    """

    def __init__(
        self,
        limit: int | None,
        used: Callable[[], int],
        promised: Callable[[], int],
        relieve: Callable[[], None],
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
                self._relieve()
                left = self._left()
                if left < count:
                    raise StorageFull(self._refusal(count, left))
            self._allowance = min(_STEP, (left - count) // _PART)

    def _left(self) -> int:
        total, available = machine_memory()
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
        """Total and available bytes."""
        total, available = machine_memory()
        if self.limit is not None:
            total = min(total, self.limit)
            available = min(available, max(0, self.limit - self._used()))
        return total, available
