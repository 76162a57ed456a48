"""Transfer managers: where the bytes of large requests are between socket and storage.

``__default__`` takes a buffer of a transfer's size each time.  ``pipeline`` has a fixed set of
buffers, made when the provider starts, shared by all its clients: larger transfers go through
them in chunks, one being received or sent while others are being stored or loaded, and who
finds no free buffer waits for one.  So a pipeline's memory does not grow with clients or sizes.

Used from one Trio loop; nothing here is thread-safe.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import Any

import trio

from warabi._core.extents import Extent
from warabi.errors import ConfigError
from warabi.local import async_ops
from warabi.protocol.wire import Limits
from warabi.provider.channel import STALL_PATIENCE
from warabi.region import RegionID
from warabi.target.target import Target

_SPARE = 8 * 1024 * 1024  # bytes of buffers that the default manager keeps, at most
_SPARE_COUNT = 16  # how many these may be


class Transfers(ABC):
    """Gives out buffers.

    Attributes:
        chunk: bytes of the largest buffer; larger transfers are cut into chunks of that size.
        patience: seconds for which a peer may keep a buffer waiting.
    """

    chunk: int
    patience: float

    async def acquire(self, size: int) -> memoryview:
        """A view of *size* bytes, at most ``chunk``, with undefined content; give it back."""
        while (view := self.acquire_nowait(size)) is None:
            await self._wait()
        return view

    @abstractmethod
    def acquire_nowait(self, size: int) -> memoryview | None:
        """As :meth:`acquire`, or None when it would have to wait."""

    @abstractmethod
    def release(self, view: memoryview) -> None:
        """Give back what was acquired."""

    @abstractmethod
    async def _wait(self) -> None:
        """Until a buffer may be free."""


class DefaultTransfers(Transfers):
    """A buffer for every transfer, the last ones kept for the next of about the same size."""

    def __init__(self) -> None:
        self.chunk = Limits().payload
        self.patience = math.inf  # such a peer keeps nobody else waiting
        self._spare: list[bytearray] = []  # the latest last; their sizes are powers of two

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
    """Pools of buffers, each pool's larger than those of the one before.

    Args:
        num_pools: how many pools.
        num_buffers_per_pool: how many buffers in each.
        first_buffer_size: bytes of a buffer in the first pool.
        buffer_size_multiplier: how much larger those of the next one are.

    Raises:
        ConfigError: this machine has not so much memory.
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
        # All of them: the first in line may need a larger buffer than this one.
        self._waiting.unpark_all()


def part(extents: list[Extent], start: int, end: int) -> list[Extent]:
    """The extents of the bytes from *start* to *end* of what *extents* hold together."""
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
    """Write *data* to *extents*, without keeping the loop waiting."""
    if len(extents) == 1:
        await async_ops.write(target, region, extents[0][0], data, False, extend)
    else:
        await async_ops.write_vector(target, region, extents, data)


async def load(
    target: Target, region: RegionID, extents: list[Extent], place: memoryview, short: bool,
    *, wait: bool = True,
) -> None:  # fmt: skip
    """Fill *place* from *extents*, without keeping the loop waiting.

    With *short*, of a single extent, what the region no longer has reads as zero.  Without *wait*
    ``WouldBlock`` is raised where the medium would have to be waited for.
    """
    if len(extents) == 1:
        offset = extents[0][0]
        count = await async_ops.read_into(target, region, offset, place, short=short, wait=wait)
        if count < len(place):
            place[count:] = bytes(len(place) - count)
    else:
        await async_ops.read_vector(target, region, extents, place, wait=wait)
