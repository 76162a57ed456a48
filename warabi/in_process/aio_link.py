"""Links of Trio programs: their interface, and the direct one to a target in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from warabi._core.attributes import Attributes
from warabi._core.changes import Changes
from warabi._core.extents import Extent, pack
from warabi.errors import WouldBlock
from warabi.in_process import async_ops, locking
from warabi.in_process.watch import Watching
from warabi.region import RegionID
from warabi.target.handlers import bound
from warabi.target.state import in_loop
from warabi.target.target import Target as LocalTarget

GetBuffer = Callable[[], memoryview]
"""Returns the buffer for data when they arrive: the same one on every call."""


class AsyncLink(Protocol):
    """The interface of links to a target."""

    async def call(self, name: str, arguments: Sequence[Any]) -> Any: ...
    async def changes(self, number: int, new_names: bool) -> Changes: ...
    async def size(self, region: RegionID) -> int: ...
    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None: ...
    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None: ...
    async def read_some(
        self, region: RegionID, offset: int, size: int, place: GetBuffer
    ) -> int: ...
    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID: ...
    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        """Execute the operation ``store``; None, without effect: use several operations."""

    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None: ...
    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int: ...
    async def read_vector(
        self, region: RegionID, extents: list[Extent], place: memoryview
    ) -> None: ...


class AsyncDirectLink:
    """A link to a target in this process.

    Ctrl-C is raised at checkpoints, not between two steps of a change.
    """

    def __init__(self, target: LocalTarget) -> None:
        self._target = target
        self._watching = Watching(None)
        self._at_once = {
            name: call
            for name, call in bound(target).items()
            if not async_ops.needs_thread(target, name)
        }

    @trio.lowlevel.enable_ki_protection
    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        call = self._at_once.get(name)
        if call is not None and not self._target.occupied:
            try:
                return in_loop(call, *arguments)
            except WouldBlock:
                """Whether it takes long with these arguments."""
        elif name in locking.OPERATIONS:
            locks = self._target.file_locks
            return await locking.execute(locks, locks.local, name, arguments)
        return await async_ops.execute(self._target, name, tuple(arguments))

    @trio.lowlevel.enable_ki_protection
    async def changes(self, number: int, new_names: bool) -> Changes:
        return await self._watching.changes(lambda: self._target, number, new_names)

    @trio.lowlevel.enable_ki_protection
    async def size(self, region: RegionID) -> int:
        size: int = await self.call("size", (region,))
        return size

    @trio.lowlevel.enable_ki_protection
    async def write(
        self, region: RegionID, offset: int, data: memoryview, persist: bool, extend: bool
    ) -> None:
        await async_ops.write(self._target, region, offset, data, persist, extend)

    @trio.lowlevel.enable_ki_protection
    async def read_into(self, region: RegionID, offset: int, place: memoryview) -> None:
        await async_ops.read_into(self._target, region, offset, place)

    @trio.lowlevel.enable_ki_protection
    async def read_some(self, region: RegionID, offset: int, size: int, place: GetBuffer) -> int:
        return await async_ops.read_into(self._target, region, offset, place(), short=True)

    @trio.lowlevel.enable_ki_protection
    async def create_and_write(self, data: memoryview, persist: bool) -> RegionID:
        return await async_ops.create_and_write(self._target, data, persist)

    @trio.lowlevel.enable_ki_protection
    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        return await async_ops.store(self._target, arguments, data)

    @trio.lowlevel.enable_ki_protection
    async def write_vector(
        self, region: RegionID, extents: list[Extent], data: memoryview, persist: bool
    ) -> None:
        await self.call("write_vector", (region, pack(extents), persist, data))

    @trio.lowlevel.enable_ki_protection
    async def append(self, region: RegionID, data: memoryview, persist: bool) -> int:
        return await async_ops.append(self._target, region, data, persist)

    @trio.lowlevel.enable_ki_protection
    async def read_vector(self, region: RegionID, extents: list[Extent], place: memoryview) -> None:
        await self.call("read_vector", (region, pack(extents), place))
