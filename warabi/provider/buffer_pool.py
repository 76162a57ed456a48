"""Transfer managers: buffers for the data of large requests between socket and storage.

``__default__`` allocates a buffer of a transfer's size each time.  ``pipeline`` has a fixed set of
buffers, allocated when the provider starts, shared by all its clients: larger transfers use them in
chunks, one being received or sent while others are being stored or loaded, and a transfer waits if
no buffer is free.  So a pipeline's memory does not grow with the number of clients or sizes.

Used from one Trio loop; nothing here is thread-safe.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import Any

import trio

from warabi._core.extents import Extent
from warabi._core.tuning import STALL_PATIENCE
from warabi.errors import ConfigError
from warabi.in_process import async_ops
from warabi.protocol.wire import Limits
from warabi.region import RegionID
from warabi.target.target import Target

_SPARE = 8 * 1024 * 1024  # most bytes of spare buffers of the default manager
_SPARE_COUNT = 16  # most spare buffers


class Transfers(ABC):
    """Allocates buffers.

    Attributes:
        chunk: bytes of the largest buffer; larger transfers are split into chunks of that size.
        patience: seconds that a slow peer may occupy a buffer.
    """

    chunk: int
    patience: float

    async def acquire(self, size: int) -> memoryview:
        """Return a view of *size* bytes, at most ``chunk``, with undefined contents; release it
        after use."""
        while (view := self.acquire_nowait(size)) is None:
            await self._wait()
        return view

    @abstractmethod
    def acquire_nowait(self, size: int) -> memoryview | None:
        """The same as :meth:`acquire`, or None if it would have to wait."""

    @abstractmethod
    def release(self, view: memoryview) -> None:
        """Release an acquired view."""

    @abstractmethod
    async def _wait(self) -> None:
        """Wait until a buffer may be free."""


class DefaultTransfers(Transfers):
    """Allocates a buffer for every transfer, and keeps recent ones for similar sizes."""

    def __init__(self) -> None:
        self.chunk = Limits().payload
        self.patience = math.inf  # a slow peer does not block others
        self._spare: list[bytearray] = []  # most recent last; sizes are powers of two

    def acquire_nowait(self, size: int) -> memoryview | None:
        room = 1 << (size - 1).bit_length() if size > 1 else 1
        for index, buffer in enumerate(self._spare):
            if len(buffer) == room:
                return memoryview(self._spare.pop(index))[:size]
        return memoryview(bytearray(room))[:size]

    async def _wait(self) -> None:
        raise AssertionError("no buffer left in the pool")

    def release(self, view: memoryview) -> None:
        owner = view.obj
        assert isinstance(owner, bytearray)
        self._spare.append(owner)
        while len(self._spare) > _SPARE_COUNT or sum(map(len, self._spare)) > _SPARE:
            self._spare.pop(0)


class PipelineTransfers(Transfers):
    """Pools of buffers; each pool has larger buffers than the previous one.

    Args:
        num_pools: number of pools.
        num_buffers_per_pool: number of buffers in each.
        first_buffer_size: bytes of a buffer in the first pool.
        buffer_size_multiplier: growth of the buffer size from one pool to the next.

    Raises:
        ConfigError: the machine has too little memory.
    """

    def __init__(
        self,
        num_pools: int,
        num_buffers_per_pool: int,
        first_buffer_size: int,
        buffer_size_multiplier: int,
    ) -> None:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        sizes: list[int] = []
        for _ in range(num_pools):
            sizes.append(sizes[-1] * buffer_size_multiplier if sizes else first_buffer_size)
            if num_buffers_per_pool * sum(sizes) > have:
                raise ConfigError(
                    "configuration: $.transfer_manager.config: the buffers exceed this machine's"
                    f" {have} bytes of memory"
                )
        self.chunk = sizes[-1]
        self.patience = STALL_PATIENCE
        self._free = {
            size: [bytearray(size) for _ in range(num_buffers_per_pool)] for size in sizes
        }
        self._waiting = trio.lowlevel.ParkingLot()

    def acquire_nowait(self, size: int) -> memoryview | None:
        for buffer_size, free in self._free.items():
            if buffer_size >= size and free:
                return memoryview(free.pop())[:size]
        return None

    async def _wait(self) -> None:
        await self._waiting.park()

    def release(self, view: memoryview) -> None:
        owner = view.obj
        assert isinstance(owner, bytearray)
        self._free[len(owner)].append(owner)
        # Wake all: the first in the queue may need a larger buffer than this one.
        self._waiting.unpark_all()


def part(extents: list[Extent], start: int, end: int) -> list[Extent]:
    """Return the extents of the bytes from *start* to *end* of the concatenated *extents*."""
    found = []
    for offset, size in extents:
        low, high = max(start, 0), min(end, size)
        if low < high:
            found.append((offset + low, high - low))
        start, end = start - size, end - size
        if end <= 0:
            break
    return found


async def store(
    target: Target, region: RegionID, extents: list[Extent], data: Any, extend: bool
) -> None:
    """Write *data* to *extents*, without blocking the loop."""
    if len(extents) == 1:
        await async_ops.write(target, region, extents[0][0], data, False, extend)
    else:
        await async_ops.write_vector(target, region, extents, data)


async def load(
    target: Target, region: RegionID, extents: list[Extent], place: memoryview, short: bool,
    *, wait: bool = True,
) -> None:  # fmt: skip
    """Fill *place* from *extents*, without blocking the loop.

    With *short*, for a single extent, bytes beyond the region's end read as zero.  Without *wait*
    ``WouldBlock`` is raised instead of waiting for stable storage.
    """
    if len(extents) == 1:
        offset = extents[0][0]
        count = await async_ops.read_into(target, region, offset, place, short=short, wait=wait)
        if count < len(place):
            place[count:] = bytes(len(place) - count)
    else:
        await async_ops.read_vector(target, region, extents, place, wait=wait)
