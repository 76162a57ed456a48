"""Packs: files of ``SLOTS`` slots of ``SLOT`` bytes for small regions, with a record for each.

A region's location follows from its ID: slot ``n`` of the catalogue is slot ``n % SLOTS`` of pack
``n // SLOTS``.  So neither an index nor an allocator is needed; unused slots are holes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

from warabi._core.attributes import ROOT
from warabi._core.fileio import punch, pwrite_full
from warabi.region import RegionID

SLOT = 4096
"""Bytes of a slot."""
SLOTS = 256
"""Slots of a pack.  A sync of one region flushes all dirty data of its pack."""
RECORD = struct.Struct("<QQ")  # generation and size of a region
RECORDS = SLOTS * SLOT  # offset of the records
PACK = RECORDS + SLOTS * RECORD.size
"""Bytes of a pack."""


def pack_of(slot: int) -> RegionID:
    """Return the ID of the pack with that slot; its own slot is 0, so it differs from all
    regions'."""
    return RegionID.from_parts(0, slot // SLOTS + 1)


def is_pack(rid: RegionID) -> bool:
    """Whether a file of that ID is a pack."""
    return rid.slot == 0 and 0 < rid.generation <= (1 << 62) // SLOTS


def slots_of(pack: RegionID) -> range:
    """Return the catalogue's slots in a pack."""
    first = (pack.generation - 1) * SLOTS
    return range(first, first + SLOTS)


def recorded(fd: int, pack: RegionID) -> dict[RegionID, int]:
    """Return the sizes of the regions recorded in an open pack, which may be truncated."""
    records = os.pread(fd, SLOTS * RECORD.size, RECORDS).ljust(SLOTS * RECORD.size, b"\0")
    found = {}
    for slot, (generation, size) in zip(slots_of(pack), RECORD.iter_unpack(records), strict=True):
        if slot > ROOT and 0 < generation < 1 << 63:  # as in a valid region ID
            found[RegionID.from_parts(slot, generation)] = min(size, SLOT)
    return found


def forget(fd: int, numbers: Iterable[int]) -> None:
    """Clear these slots and their records in an open pack, without extending a truncated one."""
    whole = os.lseek(fd, 0, os.SEEK_END) == PACK
    for first, last in _runs(sorted(numbers)):
        punch(fd, first * SLOT, (last - first) * SLOT)
        if whole:
            cleared = bytes((last - first) * RECORD.size)
            pwrite_full(fd, memoryview(cleared), RECORDS + first * RECORD.size)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last, exclusive, of each run in sorted *numbers*."""
    start = 0
    for index, number in enumerate(numbers, 1):
        if index == len(numbers) or numbers[index] != number + 1:
            yield numbers[start], number + 1
            start = index
