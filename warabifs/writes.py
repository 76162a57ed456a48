"""Writes of a mount that are under way, for reads of the same bytes that come after them.

The kernel does not hold the pages of a write that it has sent: they may be dropped, and read anew,
before it is answered.  What such a read brings stays in the page cache after the write.  So it must
bring what the write stores, and waits for it, though it could be answered sooner, from shared
memory or beside a thread that writes.
"""

from __future__ import annotations

import trio

from warabi.region import RegionID


class Writes:
    """Those of one mount.

    Attributes:
        under_way: in the order in which they began.
    """

    def __init__(self) -> None:
        self.under_way: list[Write] = []

    def one(self, region: RegionID, offset: int, size: int) -> Write:
        """A write of *size* bytes at *offset*, under way for as long as the block runs."""
        return Write(self.under_way, region, offset, offset + size)

    async def end(self, region: RegionID, offset: int, size: int) -> None:
        """Return when those of any of these bytes have ended that are under way now."""
        end = offset + size
        for write in self.under_way.copy():
            if write.region == region and write.start < end and offset < write.end:
                await write.wait()


class Write:
    """One of them."""

    __slots__ = ("_ended", "_under_way", "end", "region", "start")

    def __init__(self, under_way: list[Write], region: RegionID, start: int, end: int) -> None:
        self._under_way = under_way
        self._ended: trio.Event | None = None
        self.region = region
        self.start = start
        self.end = end

    async def wait(self) -> None:
        """Return when it has ended, well or not."""
        if self in self._under_way:
            self._ended = self._ended or trio.Event()
            await self._ended.wait()

    def __enter__(self) -> Write:
        self._under_way.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way.remove(self)
        if self._ended is not None:
            self._ended.set()
