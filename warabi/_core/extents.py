"""Extents of a region: ``(offset, size)`` pairs in bytes.  Pure arithmetic."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from operator import add
from typing import Any

from warabi._core.buffers import MAX_SIZE, checked_size
from warabi.errors import InvalidBuffer, OutOfBounds, ProtocolError
from warabi.region import RegionID

Extent = tuple[int, int]
EXTENTS = 16384
"""Most extents in one message; longer lists are split."""


def checked_extents(extents: Any, what: str) -> list[Extent]:
    """Check extents, which may overlap and be in any order; returns them as a list of pairs.

    Raises:
        OutOfBounds: not pairs of sizes, or an end beyond 2**63 - 1.
    """
    try:
        pairs = [(offset, size) for offset, size in extents]
    except (TypeError, ValueError):
        raise OutOfBounds(f"{what}: expected (offset, size) pairs, got {extents!r:.100}") from None
    if pairs:
        starts, sizes = zip(*pairs, strict=True)
        whole = {*map(type, starts), *map(type, sizes)} == {int}
        if whole and min(*starts, *sizes) >= 0 and max(map(add, starts, sizes)) <= MAX_SIZE:
            return pairs  # common case: one check for all instead of one for each
    checked = [
        (checked_size(offset, f"{what}: offset"), checked_size(size, f"{what}: size"))
        for offset, size in pairs
    ]
    for offset, size in checked:
        checked_size(offset + size, f"{what}: end of an extent")
    return checked


def total(extents: Iterable[Extent]) -> int:
    """Return the total bytes of all extents."""
    return sum(size for _, size in extents)


def check_total(extents: list[Extent], have: int, what: str) -> None:
    """Check that a buffer of *have* bytes is exactly as large as the extents together.

    Raises:
        InvalidBuffer: it is larger or smaller.
    """
    want = total(extents)
    if want != have:
        raise InvalidBuffer(f"{what}: a buffer of {have} bytes for extents of {want} bytes in all")


def pack(extents: list[Extent]) -> bytes:
    """Encode extents for a message: little-endian u64 pairs."""
    flat = [number for extent in extents for number in extent]
    return struct.pack(f"<{len(flat)}Q", *flat)


def unpack(packed: bytes, what: str) -> list[Extent]:
    """Decode the result of :func:`pack`.

    Raises:
        ProtocolError: not pairs of numbers.
        OutOfBounds: the numbers are not valid extents.
    """
    if len(packed) % 16:
        raise ProtocolError(f"{what}: {len(packed)} bytes are no extents")
    if len(packed) > 16 * EXTENTS:
        raise ProtocolError(f"{what}: {len(packed) // 16} extents, the limit is {EXTENTS}")
    return checked_extents(struct.iter_unpack("<QQ", packed), what)


def groups(extents: list[Extent], size: int, count: int) -> Iterator[list[Extent]]:
    """Yield the extents in order, split where needed, in groups of at most *count* extents and
    *size* bytes."""
    group: list[Extent] = []
    room = size
    for offset, left in extents:
        while True:
            if group and (len(group) == count or (room == 0 and left)):
                yield group
                group, room = [], size
            piece = min(left, room)
            group.append((offset, piece))
            offset, left, room = offset + piece, left - piece, room - piece
            if not left:
                break
    if group:
        yield group


def views(extents: list[Extent], buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the offset and the part of *buffer* for each extent that is not empty."""
    start = 0
    for offset, size in extents:
        if size:
            yield offset, buffer[start : start + size]
        start += size


def beyond_end(what: str, region: RegionID, offset: int, size: int, have: int) -> OutOfBounds:
    """Return the error for an extent that ends beyond a region of *have* bytes."""
    return OutOfBounds(
        f"{what} {region!r}: {size} bytes at offset {offset} end beyond its {have} bytes"
    )
