"""Describes the machine, the versions and the date of a run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from benchmarks.processes import ROOT


def _first(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def describe(disk: Path) -> str:
    """The machine in a line."""
    model = _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$")
    memory = int(_first("/proc/meminfo", r"^MemTotal:\s+(\d+)")) / (1 << 20)
    shown = subprocess.run(
        ["stat", "-f", "-c", "%T", disk], capture_output=True, text=True, timeout=10, check=False
    )
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores of {model}, {memory:.0f} GiB, Linux {platform.release()},"
        f" Python {platform.python_version()}; the disk's file system is {shown.stdout.strip()}"
    )


def commit() -> str:
    """The commit of this checkout, with a plus if something is changed."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def load() -> str:
    """How many processes wanted to run, on average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
