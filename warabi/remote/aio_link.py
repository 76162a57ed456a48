"""The link of a Trio program to a target behind a connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from warabi import errors
from warabi._core.attributes import Attributes
from warabi._core.changes import CONTENT, Changes
from warabi._core.extents import EXTENTS, Extent, beyond_end, groups, pack, total
from warabi._core.tuning import ERASE_PATIENCE
from warabi.in_process.aio_link import GetBuffer
from warabi.protocol.operations import UNDONE
from warabi.protocol.pending import EAGER_THRESHOLD, PendingRequest, check_append, chunks
from warabi.region import RegionID
from warabi.remote.aio_connection import TrioConnection
from warabi.remote.aio_direct import AsyncDirectAccessChannel

_LATER = memoryview(b"")


@asynccontextmanager
async def _pieces() -> AsyncIterator[Callable[..., None]]:
    """Run calls concurrently; all end before the first of their errors is raised."""
    failures: list[errors.Exception] = []

    async def guarded(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        try:
            await call(*arguments)
        except errors.Exception as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        yield lambda call, *arguments: nursery.start_soon(guarded, call, *arguments)
    if failures:
        raise failures[0]


class _Read(PendingRequest):
    """A read of up to *size* bytes, whose buffer is requested when data arrive."""

    def __init__(self, size: int, place: GetBuffer) -> None:
        super().__init__("read", into=_LATER, short=True)
        self.size = size
        self._place = place

    def place(self, count: int) -> memoryview:
        if self.into is _LATER:
            self.into = self._place()
        return super().place(count)


class AsyncWireLink:
    """A link to a target over a connection; splits transfers that exceed the provider's limits."""

    def __init__(
        self,
        connection: TrioConnection,
        provider_id: int,
        side: AsyncDirectAccessChannel | None = None,
    ) -> None:
        self._connection = connection
        self._side = side
        self._provider_id = provider_id
        self.eager_write = EAGER_THRESHOLD
        self.eager_read = EAGER_THRESHOLD

    async def _request(
        self, request: PendingRequest, arguments: Sequence[Any], data: memoryview | None = None
    ) -> Any:
        eager = None
        if data is not None and len(data) <= self.eager_write:
            eager, data = bytes(data), None
        header = (self._provider_id, request.what, arguments, eager)
        soon = request.what != "watch" and not (request.what == "lock" and arguments[-1])
        if request.what in UNDONE:
            self._connection.undo_later(request, self._provider_id, arguments)
        return await self._connection.request(request, header, data, soon=soon)

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        return await self._request(PendingRequest(name), arguments)

    async def changes(self, number: int, new_names: bool) -> Changes:
        changes: Changes = await self._request(PendingRequest("watch"), (number, new_names))
        write_times = {what for what in changes.inodes.values() if what > CONTENT}
        own = self._side.wrote(write_times) if write_times and self._side is not None else ()
        for ino in [ino for ino, what in changes.inodes.items() if what in own]:
            del changes.inodes[ino]
        return changes

    async def size(self, region: RegionID) -> int:
        size = -1 if self._side is None else self._side.size(region)
        return size if size >= 0 else await self.call("size", (region,))

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        limit = self._connection.limits.payload
        if self._side is not None:
            done = await self._side.write(region, offset, data)
            if done and done == len(data):
                if persist:
                    await self.call("persist", (region, offset, done))
                return
        if len(data) <= limit:
            await self._request(PendingRequest("write"), (region, offset, persist, extend), data)
            return
        if not extend:
            await self._check_end(region, offset, len(data), "write")
        async with _pieces() as start_soon:
            for start, end in chunks(len(data), limit):
                arguments = (region, offset + start, persist, extend)
                start_soon(self._request, PendingRequest("write"), arguments, data[start:end])

    async def _check_end(self, region: RegionID, offset: int, size: int, what: str) -> None:
        have = await self.size(region)
        if offset + size > have:
            raise beyond_end(what, region, offset, size, have)

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        limit = self._connection.limits.payload
        if self._side is not None and place:
            done = await self._side.read_into(region, offset, place)
            if done == len(place):
                return
        if len(place) <= limit:
            await self._read(PendingRequest("read", into=place), region, offset)
            return
        await self._check_end(region, offset, len(place), "read")
        async with _pieces() as start_soon:
            for start, end in chunks(len(place), limit):
                start_soon(
                    self._read,
                    PendingRequest("read", into=place[start:end]),
                    region,
                    offset + start,
                )

    async def read_some(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        if self._side is not None:
            count = await self._side.read_some(region, offset, place())
            if count >= 0:
                return count
        return await self._read(_Read(size, place), region, offset)

    async def _read(self, request: PendingRequest, region: RegionID, offset: int) -> int:
        size, short = request.size, request.short
        count: int = await self._request(
            request, (region, offset, size, size <= self.eager_read, short)
        )
        return count

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        start = 0
        async with _pieces() as start_soon:
            for group in await self._groups(region, extents, "write_vector"):
                end = start + total(group)
                arguments = (region, pack(group), persist)
                start_soon(
                    self._request, PendingRequest("write_vector"), arguments, data[start:end]
                )
                start = end

    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        check_append(len(data), self._connection.limits.payload)
        offset: int = await self._request(PendingRequest("append"), (region, persist), data)
        return offset

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        start = 0
        async with _pieces() as start_soon:
            for group in await self._groups(region, extents, "read_vector"):
                end = start + total(group)
                request = PendingRequest("read_vector", into=place[start:end])
                start_soon(self._request, request, (region, pack(group)))
                start = end

    async def _groups(
        self, region: RegionID, extents: list[Extent], what: str
    ) -> list[list[Extent]]:
        """Yield the extents for each message; if there are several, all are checked first."""
        found = list(groups(extents, self._connection.limits.payload, EXTENTS))
        if len(found) > 1:
            for offset, size in extents:
                await self._check_end(region, offset, size, what)
        return found or [[]]

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        if len(data) <= self._connection.limits.payload:
            request = PendingRequest("create_and_write")
            created: RegionID = await self._request(request, (persist,), data)
            return created
        region: RegionID = await self.call("create", (len(data),))
        try:
            await self.write(region, 0, data, persist, False)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + ERASE_PATIENCE):
                await self.call("erase", (region,))
            raise
        return region

    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        if len(data) > self._connection.limits.payload:
            return None
        stored: Attributes = await self._request(PendingRequest("store"), arguments, data)
        return stored
