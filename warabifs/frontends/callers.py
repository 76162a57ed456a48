"""Supplementary groups of the process that makes a request, which FUSE does not send."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def groups_of(uid: int, gid: int, pid: int) -> Callable[[], set[int]] | None:
    """A function that returns the groups of the process *pid*, whose user and group are *uid* and
    *gid*; None for root, whose groups do not matter."""
    return None if uid == 0 else lambda: {gid, *_supplementary(pid)}


def _supplementary(pid: int) -> list[int]:
    """Return the supplementary groups of a process; none if it has exited, or is in another
    namespace."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return []
    found = re.search(r"^Groups:(.*)$", status, re.MULTILINE)
    return [int(group) for group in found[1].split()] if found else []
