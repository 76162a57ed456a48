"""What is grafted: entries, and lists of them."""

from __future__ import annotations

import stat
from typing import Any

from warabi.metadata.domain import Row
from warabi.region import RegionID
from warabi.target.entries import ArchiveEntry
from warabi.target.graft import adopt
from warabi.target.target import Target


def entry(path: bytes, mode: int, slot: int = 50, generation: int = 1, **more: Any) -> ArchiveEntry:
    xattrs = more.pop("xattrs", [])
    row = Row(slot, generation, mode, 1, 5, 6, 0, 0, 1, 2, 3, 0, None)
    return ArchiveEntry(path, row, xattrs).changed(**more)


def listing(*entries: ArchiveEntry) -> bytes:
    return b"".join(one.pack() for one in entries)


def region(target: Target, path: bytes, content: bytes, **more: Any) -> ArchiveEntry:
    rid = adopt(target, RegionID(), len(content)).region
    target.write(rid, 0, content)
    size = len(content)
    return entry(path, stat.S_IFREG | 0o640, rid.slot, rid.generation, size=size, **more)
