"""The largest read or write request that the kernel sends."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MOST = Path("/proc/sys/fs/fuse/max_pages_limit")  # since Linux 6.13; 256 by default


def _largest() -> int:
    """1 MiB, or up to 4 MiB if the administrator lets requests have more pages.

    More than that gained nothing.
    """
    pages = 256
    with contextlib.suppress(OSError, ValueError):
        pages = int(_MOST.read_text())
    return min(max(pages, 256), 1024) * 4096


MAX_WRITE = _largest()
"""Bytes in one read or write."""
