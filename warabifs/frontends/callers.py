"""The caller of a request: whether it is root, and its groups, which FUSE does not send."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

UNKNOWN = 0xFFFFFFFF
"""User and group of a request that makes nothing which they would own.

If idmapped mounts are allowed, the kernel sends those of such requests on no mount.  Both may also
have no mapping on the mount of a request that does make something.
"""
_IDMAPPED = re.compile(
    r"^(?:\S+ ){5}(?:\S+,)?idmapped(?:,\S+)? (?:.* )?- fuse\.warabifs ", re.MULTILINE
)


def is_root(uid: int, pid: int) -> bool:
    """Whether the process *pid* that makes a request, whose user is *uid*, is root's.

    If *uid* is ``UNKNOWN``, that is a process of root, and no thread of the kernel: an NFS server
    acts for others.
    """
    if uid != UNKNOWN:
        return uid == 0
    status = _status(pid)
    return _numbers(status, "Kthread") == [0] and _numbers(status, "Uid")[3:] == [0]


def groups_of(uid: int, gid: int, pid: int) -> Callable[[], set[int]] | None:
    """A function that returns the groups of the process *pid*, whose user and group are *uid* and
    *gid*; None for root, whose groups do not matter."""
    if is_root(uid, pid):
        return None
    if uid != UNKNOWN:
        return lambda: {gid, *_numbers(_status(pid), "Groups")}
    return lambda: _own_groups(pid)


def _own_groups(pid: int) -> set[int]:
    """Return the groups of a process; none if it may use an idmapped mount, where the groups of
    files are others."""
    try:
        mounts = Path(f"/proc/{pid}/mountinfo").read_text(errors="replace")
    except OSError:
        return set()
    status = _status(pid)
    if _IDMAPPED.search(mounts) or _numbers(status, "Kthread") != [0]:
        return set()
    return {*_numbers(status, "Gid")[3:], *_numbers(status, "Groups")}


def _status(pid: int) -> str:
    """Return what proc_pid_status(5) says of a thread; nothing if it has exited, or is in another
    PID namespace."""
    try:
        return Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return ""


def _numbers(status: str, field: str) -> list[int]:
    found = re.search(rf"^{field}:(.*)$", status, re.MULTILINE)
    return [int(number) for number in found[1].split()] if found else []
