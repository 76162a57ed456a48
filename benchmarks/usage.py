"""Processor time and memory of processes, from ``/proc``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of the living threads of these processes, to the nanosecond."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident(pid: int) -> int:
    """Bytes of memory that the process sees, shared ones included (``VmRSS``)."""
    return _status(pid, "VmRSS")


def memory(pid: int) -> int:
    """Bytes of memory that exist because of the process: its own pages, and those of its memfds,
    whether or not it maps them."""
    total = _status(pid, "RssAnon")
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("/memfd:"):
                total += os.stat(entry).st_blocks * 512
    return total
