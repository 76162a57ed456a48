"""Carrying out operations from a Trio task without ever keeping its loop waiting.

What memory or the page cache can answer is done at once; what has to wait for the medium goes
to a worker thread.  Used by the provider and by Trio programs that hold a target themselves.
A call that went to a thread runs to its end even when the task is cancelled meanwhile.
"""

from __future__ import annotations

from typing import Any

import trio

from warabi.errors import WouldBlock
from warabi.operations import Operation
from warabi.region import RegionID
from warabi.target import Target


async def execute(
    target: Target, operation: Operation, arguments: list[Any] | tuple[Any, ...]
) -> Any:
    """The result of *operation* on *target*."""
    if operation.waits and target.blocking:
        return await trio.to_thread.run_sync(operation.call, target, *arguments)
    return operation.call(target, *arguments)


async def write(
    target: Target, region: RegionID, offset: int, data: Any, persist: bool, extend: bool
) -> None:
    """As ``Target.write``."""
    if not (persist and target.blocking):
        try:
            target.write(region, offset, data, persist, extend=extend, wait=not target.blocking)
            return
        except WouldBlock:
            pass
    await trio.to_thread.run_sync(
        lambda: target.write(region, offset, data, persist, extend=extend)
    )


async def read_into(
    target: Target, region: RegionID, offset: int, buffer: Any, *, short: bool = False
) -> int:
    """As ``Target.read_into``."""
    try:
        return target.read_into(region, offset, buffer, short=short, wait=not target.blocking)
    except WouldBlock:
        return await trio.to_thread.run_sync(
            lambda: target.read_into(region, offset, buffer, short=short)
        )


async def create_and_write(target: Target, data: Any, persist: bool) -> RegionID:
    """As ``Target.create_and_write``."""
    if persist and target.blocking:
        return await trio.to_thread.run_sync(target.create_and_write, data, persist)
    return target.create_and_write(data, persist)
