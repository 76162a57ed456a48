"""A read-only link for Trio programs; ``readonly.py`` has the blocking one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from warabi._core.changes import Changes
from warabi._core.extents import Extent
from warabi.local.aio_link import AsyncLink, GetBuffer
from warabi.region import RegionID
from warabi.remote.readonly import refuse_change


class AsyncReadOnlyLink:
    """Restricts *link* to operations that only read."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        refuse_change(name)
        return await self._link.call(name, arguments)

    async def changes(self, number: int, new_names: bool) -> Changes:
        return await self._link.changes(number, new_names)

    async def size(self, region: RegionID) -> int:
        return await self._link.size(region)

    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        refuse_change("write")

    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        await self._link.read_into(region, offset, place)

    async def read_some(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        return await self._link.read_some(region, offset, size, place)

    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        refuse_change("create_and_write")
        raise AssertionError

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        refuse_change("write_vector")

    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        refuse_change("append")
        raise AssertionError

    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        await self._link.read_vector(region, extents, place)
